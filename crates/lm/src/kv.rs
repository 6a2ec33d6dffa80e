//! Storage of keys and values, in blocks of 16 tokens that any sequence's table may name. A block of one head is laid
//! out as the panels that [`crate::kernel::tile`] reads, so that attention runs on the blocks where they lie. It knows
//! nothing of sequences: which block holds what is the scheduler's business.

use crate::ModelConfig;
use crate::kernel::TILE_COLUMNS;
use crate::pages::Zeroed;

/// Tokens of one block.
pub const BLOCK_TOKENS: usize = TILE_COLUMNS;

/// Blocks of all layers of one model. In CPU memory they are taken from the system as they are first written.
#[derive(Debug)]
pub struct KvPool {
    pub(crate) store: Store,
    blocks: usize,
}

/// Where the blocks lie, layer by layer.
#[derive(Debug)]
pub(crate) enum Store {
    Host(Vec<KvLayer>),
    #[cfg(feature = "cuda")]
    Gpu(Vec<cauldron_gpu::Pages>),
}

/// The blocks of one layer.
#[derive(Debug)]
pub(crate) struct KvLayer {
    /// \[block, head, head_dim\] panels of 16 tokens.
    keys: Zeroed<[f32; BLOCK_TOKENS]>,
    /// \[block, head, head_dim / 16, token\] panels of 16 dimensions; the last one is padded with zeros.
    values: Zeroed<[f32; TILE_COLUMNS]>,
    kv_heads: usize,
    head_dim: usize,
}

impl KvPool {
    /// In CPU memory.
    pub fn new(config: &ModelConfig, blocks: usize) -> Self {
        let layers = (0..config.num_layers)
            .map(|_| KvLayer::new(config.num_kv_heads, config.head_dim, blocks))
            .collect();
        Self {
            store: Store::Host(layers),
            blocks,
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(layers: Vec<cauldron_gpu::Pages>, blocks: usize) -> Self {
        Self {
            store: Store::Gpu(layers),
            blocks,
        }
    }

    /// Bytes that one block takes over all layers.
    pub fn block_bytes(config: &ModelConfig) -> usize {
        let padded = config.head_dim.next_multiple_of(TILE_COLUMNS);
        let per_token = config.num_layers * config.num_kv_heads * (config.head_dim + padded);
        per_token * BLOCK_TOKENS * size_of::<f32>()
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub(crate) fn fits(&self, config: &ModelConfig) -> bool {
        let is = |heads: usize, size: usize| heads == config.num_kv_heads && size == config.head_dim;
        match &self.store {
            Store::Host(layers) => {
                let fits = |layer: &KvLayer| is(layer.kv_heads, layer.head_dim);
                layers.len() == config.num_layers && layers.iter().all(fits)
            }
            #[cfg(feature = "cuda")]
            Store::Gpu(layers) => {
                let fits = |pages: &cauldron_gpu::Pages| is(pages.heads().keys, pages.heads().size);
                layers.len() == config.num_layers && layers.iter().all(fits)
            }
        }
    }
}

impl KvLayer {
    pub(crate) fn new(kv_heads: usize, head_dim: usize, blocks: usize) -> Self {
        let panels = head_dim.div_ceil(TILE_COLUMNS);
        Self {
            keys: Zeroed::sparse(blocks * kv_heads * head_dim),
            values: Zeroed::sparse(blocks * kv_heads * panels * BLOCK_TOKENS),
            kv_heads,
            head_dim,
        }
    }

    fn panels(&self) -> usize {
        self.head_dim.div_ceil(TILE_COLUMNS)
    }

    /// Writes one token: `keys` and `values` are \[kv_heads, head_dim\].
    pub(crate) fn write(&mut self, block: u32, slot: usize, keys: &[f32], values: &[f32]) {
        let (dim, panels) = (self.head_dim, self.panels());
        let parts = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (head, (key, value)) in parts.enumerate() {
            let at = block as usize * self.kv_heads + head;
            let columns = &mut self.keys[at * dim..][..dim];
            columns
                .iter_mut()
                .zip(key)
                .for_each(|(panel, key)| panel[slot] = *key);
            let stored = &mut self.values[at * panels * BLOCK_TOKENS..][..panels * BLOCK_TOKENS];
            for (panel, value) in stored
                .chunks_exact_mut(BLOCK_TOKENS)
                .zip(value.chunks(TILE_COLUMNS))
            {
                panel[slot][..value.len()].copy_from_slice(value);
            }
        }
    }

    /// Keys of a block and head, \[head_dim\] panels of 16 tokens.
    #[inline(always)]
    pub(crate) fn keys(&self, block: u32, head: usize) -> &[[f32; BLOCK_TOKENS]] {
        &self.keys[(block as usize * self.kv_heads + head) * self.head_dim..][..self.head_dim]
    }

    /// Values of a block and head for the dimensions from `16 * panel` on, \[16 tokens\].
    #[inline(always)]
    pub(crate) fn values(&self, block: u32, head: usize, panel: usize) -> &[[f32; TILE_COLUMNS]] {
        let at = (block as usize * self.kv_heads + head) * self.panels() + panel;
        &self.values[at * BLOCK_TOKENS..][..BLOCK_TOKENS]
    }

    pub(crate) fn copy(&mut self, from: usize, to: usize, tokens: usize) {
        let (keys, values) = (
            self.kv_heads * self.head_dim,
            self.kv_heads * self.panels() * BLOCK_TOKENS,
        );
        for at in 0..keys {
            let source = self.keys[from * keys + at];
            self.keys[to * keys + at][..tokens].copy_from_slice(&source[..tokens]);
        }
        for panel in (0..values).step_by(BLOCK_TOKENS) {
            let source = from * values + panel;
            self.values
                .copy_within(source..source + tokens, to * values + panel);
        }
    }
}
