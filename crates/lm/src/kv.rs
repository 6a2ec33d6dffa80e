//! Keys and values of past tokens. The cache lives outside the model: one object a sequence, made by the
//! caller, grown by the decoder, dropped with the sequence. It knows nothing of attention.

use crate::ModelConfig;

/// The cache of one sequence.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerKv>,
    len: usize,
}

/// One layer of one sequence: for each key/value head a growing matrix \[tokens, head_dim\].
#[derive(Debug, Clone)]
pub(crate) struct LayerKv {
    heads: Vec<HeadKv>,
    head_dim: usize,
}

#[derive(Debug, Clone, Default)]
struct HeadKv {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    pub fn new(config: &ModelConfig) -> Self {
        let layer = LayerKv {
            heads: vec![HeadKv::default(); config.num_kv_heads],
            head_dim: config.head_dim,
        };
        Self {
            layers: vec![layer; config.num_layers],
            len: 0,
        }
    }

    /// Tokens whose keys and values are in every layer; the position of the next token.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        let keep = self.len;
        self.layers.iter_mut().for_each(|layer| layer.truncate(keep));
    }

    /// A cache of its own with the first `len` tokens.
    pub(crate) fn fork(&self, len: usize) -> Self {
        let keep = self.len.min(len);
        Self {
            layers: self.layers.iter().map(|layer| layer.fork(keep)).collect(),
            len: keep,
        }
    }

    pub(crate) fn layer(&self, layer: usize) -> &LayerKv {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerKv {
        &mut self.layers[layer]
    }

    /// Counts `tokens` more, once every layer has them.
    pub(crate) fn commit(&mut self, tokens: usize) {
        self.len += tokens;
    }

    pub(crate) fn fits(&self, config: &ModelConfig) -> bool {
        let head_fits =
            |layer: &LayerKv| layer.heads.len() == config.num_kv_heads && layer.head_dim == config.head_dim;
        self.layers.len() == config.num_layers && self.layers.iter().all(head_fits)
    }
}

impl LayerKv {
    /// Appends one token: `keys` and `values` are \[kv_heads, head_dim\].
    pub(crate) fn push(&mut self, keys: &[f32], values: &[f32]) {
        let dim = self.head_dim;
        let parts = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (head, (key, value)) in self.heads.iter_mut().zip(parts) {
            head.keys.extend_from_slice(key);
            head.values.extend_from_slice(value);
        }
    }

    /// Keys of the tokens `from..to` of one head, \[to - from, head_dim\].
    pub(crate) fn keys(&self, head: usize, from: usize, to: usize) -> &[f32] {
        &self.heads[head].keys[from * self.head_dim..to * self.head_dim]
    }

    pub(crate) fn values(&self, head: usize, from: usize, to: usize) -> &[f32] {
        &self.heads[head].values[from * self.head_dim..to * self.head_dim]
    }

    fn fork(&self, len: usize) -> Self {
        let part = |values: &[f32]| values[..len * self.head_dim].to_vec();
        let heads = self.heads.iter().map(|head| HeadKv {
            keys: part(&head.keys),
            values: part(&head.values),
        });
        Self {
            heads: heads.collect(),
            head_dim: self.head_dim,
        }
    }

    fn truncate(&mut self, len: usize) {
        for head in &mut self.heads {
            head.keys.truncate(len * self.head_dim);
            head.values.truncate(len * self.head_dim);
        }
    }
}
