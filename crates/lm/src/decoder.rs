//! One decoder for all families: packed rows of several sequences, of different lengths and positions, in one
//! forward. Weights lie on one device; keys and values belong to the caller.

#[cfg(feature = "cuda")]
mod gpu;

use std::ops::Range;
use std::sync::Arc;

use crate::arithmetic::{Arithmetic, Placement};
use crate::attention::{AttentionShape, Span, attend};
use crate::kv::{BLOCK_TOKENS, KvLayer, KvPool, Store};
use crate::ops::{self, Linear, Matrix, by_rows, dot, gate, softcap};
use crate::rope::{Rope, RopeTable};
#[cfg(feature = "cuda")]
use crate::sampler::Chance;
use crate::weights::{Loader, WeightSource, check_shape, expected_tensors};
use crate::{LmError, ModelConfig};
use candle_core::{Device, Tensor};

/// New tokens of one sequence, and the blocks of its keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    pub tokens: &'a [u32],
    /// Tokens before them: their keys and values are in the blocks.
    pub position: usize,
    /// Block `i` holds the tokens from `16 i` on. No other segment writes into a block that this one writes into.
    pub blocks: &'a [u32],
}

/// A loaded model.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    embedding: Arc<Matrix>,
    layers: Vec<Layer>,
    norm: Tensor,
    /// \[vocab, hidden\]; the embedding itself where they are tied.
    lm_head: Arc<Matrix>,
    /// Those of the config's `ropes`.
    ropes: Vec<Rope>,
    #[cfg(feature = "cuda")]
    on_gpu: Option<gpu::OnGpu>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Tensor,
    qkv: Linear,
    qk_norm: Option<QkNorm>,
    attention_out: Linear,
    /// What goes over the attention's result before it is added (Gemma).
    attention_norm: Option<Tensor>,
    mlp_input_norm: Tensor,
    gate_up: Linear,
    down: Linear,
    /// What goes over the feed-forward layer's result before it is added (Gemma).
    mlp_norm: Option<Tensor>,
    shape: AttentionShape,
    rope: Option<usize>,
}

/// Weights of the query and key norms, \[head_dim\] each.
#[derive(Debug)]
struct QkNorm {
    query: Tensor,
    key: Tensor,
}

impl Decoder {
    /// Whether all tensors are there in their shapes. Reads none.
    pub fn check_weights(config: &ModelConfig, weights: &dyn WeightSource) -> Result<(), LmError> {
        expected_tensors(config)
            .iter()
            .try_for_each(|(name, shape)| check_shape(weights, name, shape))
    }

    /// Checks every tensor's shape first, then reads them all.
    pub fn load(config: ModelConfig, weights: &dyn WeightSource, device: &Device) -> Result<Self, LmError> {
        let placement = Placement {
            device,
            arithmetic: Arithmetic::F32,
            fixed_shapes: false,
        };
        Self::load_for(config, weights, placement)
    }

    /// As [`Decoder::load`], with products of some kind.
    pub fn load_for(
        config: ModelConfig,
        weights: &dyn WeightSource,
        placement: Placement<'_>,
    ) -> Result<Self, LmError> {
        Self::check_weights(&config, weights)?;
        placement.arithmetic.check(&config)?;
        #[cfg(feature = "cuda")]
        let on_gpu = gpu::OnGpu::of(
            &config,
            placement.device,
            placement.arithmetic,
            placement.fixed_shapes,
        )?;
        let loader = Loader::new(weights, placement);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = Arc::new(loader.stacked(&[("model.embed_tokens.weight".to_owned(), vocab)], hidden)?);
        let lm_head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => Arc::new(loader.stacked(&[("lm_head.weight".to_owned(), vocab)], hidden)?),
        };
        let layers = (0..config.num_layers)
            .map(|index| Layer::load(&config, &loader, index))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embedding,
            layers,
            norm: loader.norm("model.norm.weight", hidden, &config)?,
            lm_head,
            ropes: config.ropes.iter().map(Rope::new).collect(),
            #[cfg(feature = "cuda")]
            on_gpu,
            config,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes that the matrices take in memory.
    pub fn weight_bytes(&self) -> usize {
        let tables = match Arc::ptr_eq(&self.embedding, &self.lm_head) {
            true => self.embedding.bytes(),
            false => self.embedding.bytes() + self.lm_head.bytes(),
        };
        let linears = |layer: &Layer| {
            [&layer.qkv, &layer.attention_out, &layer.gate_up, &layer.down].map(Linear::bytes)
        };
        tables + self.layers.iter().flat_map(linears).sum::<usize>()
    }

    /// Room for keys and values of so many blocks, where the weights lie.
    pub fn new_pool(&self, blocks: usize) -> Result<KvPool, LmError> {
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &self.on_gpu {
            let pages = on_gpu.pages(&self.config, blocks)?;
            return Ok(KvPool::on_gpu(pages, blocks));
        }
        Ok(KvPool::new(&self.config, blocks))
    }

    /// Copies the first `tokens` tokens of a block into another, in every layer.
    pub fn copy_block(&self, pool: &mut KvPool, from: u32, to: u32, tokens: usize) -> Result<(), LmError> {
        match &mut pool.store {
            Store::Host(layers) => {
                for layer in layers {
                    layer.copy(from as usize, to as usize, tokens);
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Store::Gpu(layers) => match &self.on_gpu {
                // What comes after these tokens is not looked at.
                Some(on_gpu) => on_gpu.copy_page(layers, from, to),
                None => Err(LmError::request("prompt", "its blocks are on a GPU")),
            },
        }
    }

    /// Whether log-probabilities are cheaper to be had than logits.
    pub(crate) fn summarizes(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.on_gpu.is_some();
        #[cfg(not(feature = "cuda"))]
        false
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn summarize(
        &self,
        hidden: &Tensor,
        rows: &[u32],
        targets: &[u32],
        top: usize,
    ) -> Option<Result<Vec<cauldron_gpu::Summary>, LmError>> {
        let on_gpu = self.on_gpu.as_ref()?;
        Some(on_gpu.summarize(self, hidden, rows, targets, top))
    }

    /// Draws the next token of some rows where their logits lie. None for a row where its logits have to be looked at.
    #[cfg(feature = "cuda")]
    pub(crate) fn draw(
        &self,
        hidden: &Tensor,
        rows: &[u32],
        chances: &[Chance],
    ) -> Result<Vec<Option<u32>>, LmError> {
        match &self.on_gpu {
            None => Ok(vec![None; rows.len()]),
            Some(on_gpu) => on_gpu.draw(self, hidden, rows, chances),
        }
    }

    /// Runs the new tokens of all segments in one packed forward, puts their keys and values into the blocks, and
    /// returns the final hidden states (after the last norm) as \[total tokens, hidden\], in the order of the segments.
    /// In CPU memory a row has the same bits however a text is cut and whatever runs beside it.
    ///
    /// Nothing is computed if a segment is empty, has an id outside the vocabulary or is too long. After any
    /// other error the blocks hold nothing of use from `position` on.
    pub fn forward(&self, pool: &mut KvPool, segments: &[Segment<'_>]) -> Result<Tensor, LmError> {
        self.check(pool, segments)?;
        // On a thread of the pool, so that the many short parallel loops need not wake one to begin.
        rayon::scope(|_| self.run(pool, segments))
    }

    /// Logits of a few hidden rows \[rows, hidden\] as \[rows, vocab\] f32 in CPU memory. For many rows use
    /// [`crate::score`], which never holds the whole matrix.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, LmError> {
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &self.on_gpu {
            return on_gpu.logits_of_all(self, hidden);
        }
        self.logits_of(&hidden.contiguous()?, 0..self.config.vocab_size)
    }

    /// As [`Decoder::logits`], of some tokens only; the range begins at a multiple of 16.
    pub(crate) fn logits_of(&self, hidden: &Tensor, tokens: Range<usize>) -> Result<Tensor, LmError> {
        let logits = self.lm_head.times_rows(hidden, tokens)?;
        Ok(match self.config.logit_softcap {
            None => logits,
            Some(cap) => softcap(&logits, cap)?,
        })
    }

    fn check(&self, pool: &KvPool, segments: &[Segment<'_>]) -> Result<(), LmError> {
        let refuse = |detail: String| Err(LmError::request("prompt", detail));
        if segments.is_empty() {
            return refuse("nothing to run".into());
        }
        if !pool.fits(&self.config) {
            return refuse("its blocks were made for another model".into());
        }
        for segment in segments {
            check_tokens(&self.config, segment.tokens)?;
            let end = segment.position + segment.tokens.len();
            if end > self.config.max_position_embeddings {
                return refuse(format!(
                    "runs past max_position_embeddings = {}",
                    self.config.max_position_embeddings
                ));
            }
            let there = segment
                .blocks
                .iter()
                .all(|block| (*block as usize) < pool.blocks());
            if segment.blocks.len() * BLOCK_TOKENS < end || !there {
                return refuse("has too few blocks".into());
            }
        }
        Ok(())
    }

    fn run(&self, pool: &mut KvPool, segments: &[Segment<'_>]) -> Result<Tensor, LmError> {
        #[cfg(feature = "cuda")]
        let blocks = pool.blocks();
        // One pattern without feature `cuda`.
        #[allow(clippy::infallible_destructuring_match)]
        let layers = match &mut pool.store {
            Store::Host(layers) => layers,
            #[cfg(feature = "cuda")]
            Store::Gpu(layers) => {
                return match &self.on_gpu {
                    Some(on_gpu) => on_gpu.run(self, layers, blocks, segments),
                    None => Err(LmError::request("prompt", "its blocks are on a GPU")),
                };
            }
        };
        let (tokens, positions) = rows_of(segments);
        let ropes: Vec<RopeTable> = self.ropes.iter().map(|rope| rope.table(&positions)).collect();
        let mut hidden = self.embedding.rows(&tokens)?;
        if self.config.gemma_block {
            hidden = hidden.affine((self.config.hidden_size as f64).sqrt(), 0.0)?;
        }
        for (layer, blocks) in self.layers.iter().zip(layers) {
            let rope = layer.rope.map(|rope| &ropes[rope]);
            hidden = layer.forward(&hidden, blocks, segments, rope, &self.config)?;
        }
        Ok(rms_norm(&hidden, &self.norm, &self.config)?)
    }
}

/// Each segment with its first row in the batch.
fn with_first_rows<'s, 'a>(segments: &'s [Segment<'a>]) -> impl Iterator<Item = (usize, &'s Segment<'a>)> {
    segments.iter().scan(0, |row, segment| {
        let first = *row;
        *row += segment.tokens.len();
        Some((first, segment))
    })
}

/// Tokens and positions of a batch, row by row.
fn rows_of(segments: &[Segment<'_>]) -> (Vec<u32>, Vec<usize>) {
    let mut tokens = Vec::new();
    let mut positions = Vec::new();
    for segment in segments {
        tokens.extend_from_slice(segment.tokens);
        positions.extend(segment.position..segment.position + segment.tokens.len());
    }
    (tokens, positions)
}

/// Every id is a row of the embedding, and there is at least one.
pub(crate) fn check_tokens(config: &ModelConfig, tokens: &[u32]) -> Result<(), LmError> {
    if tokens.is_empty() {
        return Err(LmError::request("prompt", "is empty"));
    }
    match tokens.iter().find(|id| **id as usize >= config.vocab_size) {
        None => Ok(()),
        Some(id) => Err(LmError::request(
            "prompt",
            format!(
                "token id {id} is not below the vocabulary size {}",
                config.vocab_size
            ),
        )),
    }
}

impl Layer {
    fn load(config: &ModelConfig, loader: &Loader<'_>, index: usize) -> Result<Self, LmError> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let hidden = config.hidden_size;
        let dim = config.head_dim;
        let (q, kv) = (config.num_heads * dim, config.num_kv_heads * dim);
        let linear = |parts: &[(&str, usize)], columns: usize, bias: bool| {
            let named = |kind: &str| -> Vec<(String, usize)> {
                parts
                    .iter()
                    .map(|(part, rows)| (name(&format!("{part}.{kind}")), *rows))
                    .collect()
            };
            let weight = loader.stacked(&named("weight"), columns)?;
            let bias = match bias {
                true => Some(loader.joined(&named("bias"))?),
                false => None,
            };
            Ok::<_, LmError>(Linear::new(weight, bias))
        };
        let qk_norm = match config.qk_norm {
            false => None,
            true => Some(QkNorm {
                query: loader.norm(&name("self_attn.q_norm.weight"), dim, config)?,
                key: loader.norm(&name("self_attn.k_norm.weight"), dim, config)?,
            }),
        };
        let norm = |part: &str| loader.norm(&name(part), hidden, config);
        let gemma_norm = |part: &str| match config.gemma_block {
            true => norm(part).map(Some),
            false => Ok(None),
        };
        let mlp = config.intermediate_size;
        let (qkv, gate_up): (&[_], &[_]) = match config.fused_projections {
            true => (
                &[("self_attn.qkv_proj", q + 2 * kv)],
                &[("mlp.gate_up_proj", 2 * mlp)],
            ),
            false => (
                &[
                    ("self_attn.q_proj", q),
                    ("self_attn.k_proj", kv),
                    ("self_attn.v_proj", kv),
                ],
                &[("mlp.gate_proj", mlp), ("mlp.up_proj", mlp)],
            ),
        };
        Ok(Self {
            input_norm: norm("input_layernorm.weight")?,
            qkv: linear(qkv, hidden, config.qkv_bias)?,
            qk_norm,
            attention_out: linear(&[("self_attn.o_proj", hidden)], q, config.o_bias)?,
            attention_norm: gemma_norm("post_attention_layernorm.weight")?,
            mlp_input_norm: norm(match config.gemma_block {
                true => "pre_feedforward_layernorm.weight",
                false => "post_attention_layernorm.weight",
            })?,
            gate_up: linear(gate_up, hidden, config.mlp_bias)?,
            down: linear(&[("mlp.down_proj", hidden)], mlp, config.mlp_bias)?,
            mlp_norm: gemma_norm("post_feedforward_layernorm.weight")?,
            shape: AttentionShape::of(config, index),
            rope: config.layer_ropes[index],
        })
    }

    fn forward(
        &self,
        hidden: &Tensor,
        blocks: &mut KvLayer,
        segments: &[Segment<'_>],
        rope: Option<&RopeTable>,
        config: &ModelConfig,
    ) -> Result<Tensor, LmError> {
        let qkv = self.qkv.forward(&rms_norm(hidden, &self.input_norm, config)?)?;
        let (rows, stride) = qkv.dims2()?;
        let mut qkv = qkv.flatten_all()?.to_vec1::<f32>()?;
        self.norm_and_rotate(&mut qkv, stride, rope, config.rms_norm_eps as f32)?;
        let attended = self.attend(&qkv, stride, blocks, segments);
        let width = config.num_heads * config.head_dim;
        let attended = Tensor::from_vec(attended, (rows, width), &Device::Cpu)?;
        let mut attended = self.attention_out.forward(&attended)?;
        if let Some(norm) = &self.attention_norm {
            attended = rms_norm(&attended, norm, config)?;
        }
        let hidden = ops::add(hidden, &attended)?;
        let both = self
            .gate_up
            .forward(&rms_norm(&hidden, &self.mlp_input_norm, config)?)?;
        let mut fed = self.down.forward(&gate(&both, config.activation)?)?;
        if let Some(norm) = &self.mlp_norm {
            fed = rms_norm(&fed, norm, config)?;
        }
        Ok(ops::add(&hidden, &fed)?)
    }

    /// Norms and rotates the query and key heads of every row in place, where the layer does so.
    fn norm_and_rotate(
        &self,
        qkv: &mut [f32],
        stride: usize,
        rope: Option<&RopeTable>,
        eps: f32,
    ) -> candle_core::Result<()> {
        let norms = match &self.qk_norm {
            None if rope.is_none() => return Ok(()),
            None => None,
            Some(norms) => Some((norms.query.to_vec1::<f32>()?, norms.key.to_vec1::<f32>()?)),
        };
        let dim = self.shape.head_dim;
        let rotated = self.shape.heads + self.shape.kv_heads;
        by_rows(qkv, stride, |row, values| {
            for (head, values) in values.chunks_exact_mut(dim).take(rotated).enumerate() {
                if let Some((query, key)) = &norms {
                    let weight = if head < self.shape.heads { query } else { key };
                    let inverse = 1.0 / (dot(values, values) / dim as f32 + eps).sqrt();
                    for (value, weight) in values.iter_mut().zip(weight) {
                        *value = *value * inverse * weight;
                    }
                }
                if let Some(rope) = rope {
                    rope.rotate(row, values);
                }
            }
        });
        Ok(())
    }

    /// Puts the new keys and values into the blocks, then attends.
    fn attend(&self, qkv: &[f32], stride: usize, layer: &mut KvLayer, segments: &[Segment<'_>]) -> Vec<f32> {
        let dim = self.shape.head_dim;
        let keys_at = self.shape.heads * dim;
        let values_at = keys_at + self.shape.kv_heads * dim;
        let mut rows = qkv.chunks_exact(stride);
        for segment in segments {
            for (position, row) in (segment.position..).zip(rows.by_ref().take(segment.tokens.len())) {
                let block = segment.blocks[position / BLOCK_TOKENS];
                let slot = position % BLOCK_TOKENS;
                layer.write(block, slot, &row[keys_at..values_at], &row[values_at..]);
            }
        }
        let spans: Vec<Span<'_>> = with_first_rows(segments)
            .map(|(row, segment)| Span {
                row,
                rows: segment.tokens.len(),
                position: segment.position,
                blocks: segment.blocks,
            })
            .collect();
        attend(self.shape, qkv, stride, &spans, layer)
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor, config: &ModelConfig) -> candle_core::Result<Tensor> {
    ops::rms_norm(x, weight, config.rms_norm_eps as f32)
}
