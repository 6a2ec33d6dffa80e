//! The same block on a GPU, through the kernels of crates/gpu: the residual stream and all that is not a product is f32; a
//! product's inputs are f32 or bf16, as the arithmetic says.

use candle_core::{DType, Device, Tensor};
use cauldron_gpu::{Attention, Gate, Gpu, Heads, Pages, Rotation, Rows, Span, Summary};

use super::{Decoder, Layer, Segment};
use crate::arithmetic::Arithmetic;
use crate::config::Activation;
use crate::rope::RopeTable;
use crate::sampler::Chance;
use crate::{LmError, ModelConfig};

/// A GPU, and the type of the inputs of its products.
#[derive(Debug)]
pub(super) struct OnGpu {
    gpu: Gpu,
    inputs: DType,
}

impl OnGpu {
    /// None in CPU memory.
    pub fn of(
        config: &ModelConfig,
        device: &Device,
        arithmetic: Arithmetic,
        fixed: bool,
    ) -> Result<Option<Self>, LmError> {
        if matches!(device, Device::Cpu) {
            return Ok(None);
        }
        heads(config).check()?;
        Ok(Some(Self {
            gpu: Gpu::new(device)?.with_fixed_shapes(fixed),
            inputs: match arithmetic {
                Arithmetic::Bf16 => DType::BF16,
                _ => DType::F32,
            },
        }))
    }

    /// Pages of all layers.
    pub fn pages(&self, config: &ModelConfig, blocks: usize) -> Result<Vec<Pages>, LmError> {
        (0..config.num_layers)
            .map(|_| Ok(self.gpu.pages(blocks, heads(config), self.inputs)?))
            .collect()
    }

    pub fn copy_page(&self, layers: &mut [Pages], from: u32, to: u32) -> Result<(), LmError> {
        for pages in layers {
            self.gpu.copy_page(pages, from, to)?;
        }
        Ok(())
    }

    pub fn run(
        &self,
        decoder: &Decoder,
        layers: &mut [Pages],
        blocks: usize,
        segments: &[Segment<'_>],
    ) -> Result<Tensor, LmError> {
        let (gpu, config) = (&self.gpu, &decoder.config);
        let (tokens, positions) = super::rows_of(segments);
        let spans: Vec<Span<'_>> = super::with_first_rows(segments)
            .map(|(row, segment)| Span {
                row,
                rows: segment.tokens.len(),
                position: segment.position,
                pages: segment.blocks,
            })
            .collect();
        let batch = Batch {
            attention: gpu.plan_attention(&spans, heads(config), blocks, self.inputs)?,
            rotations: decoder
                .ropes
                .iter()
                .map(|rope| self.rotation(rope.table(&positions)))
                .collect::<Result<_, _>>()?,
        };
        let mut hidden = gpu.select(decoder.embedding.on_gpu()?, &tokens, DType::F32)?;
        if config.gemma_block {
            hidden = gpu.scale(&hidden, (config.hidden_size as f64).sqrt())?;
        }
        for (layer, pages) in decoder.layers.iter().zip(layers) {
            hidden = self.layer(layer, hidden, &batch, pages, config)?;
        }
        let normed = gpu.rms_norm(&hidden, &decoder.norm, config.rms_norm_eps as f32, DType::F32)?;
        Ok(normed.tensor()?)
    }

    fn rotation(&self, table: RopeTable) -> Result<Rotation, LmError> {
        let upload = |values: Vec<f32>| {
            let len = values.len();
            Tensor::from_vec(values, len, self.gpu.device())
        };
        let (half, cosines, sines) = table.into_parts();
        Ok(Rotation {
            half,
            cosines: upload(cosines)?,
            sines: upload(sines)?,
        })
    }

    fn layer(
        &self,
        layer: &Layer,
        mut hidden: Rows,
        batch: &Batch,
        pages: &mut Pages,
        config: &ModelConfig,
    ) -> Result<Rows, LmError> {
        let (gpu, inputs) = (&self.gpu, self.inputs);
        let eps = config.rms_norm_eps as f32;
        let normed = gpu.rms_norm(&hidden, &layer.input_norm, eps, inputs)?;
        let qkv = self.linear(&layer.qkv, &normed)?;
        let norms = layer.qk_norm.as_ref().map(|norms| (&norms.query, &norms.key));
        let rotation = layer.rope.map(|rope| &batch.rotations[rope]);
        let queries = gpu.rotate_and_store(&qkv, &batch.attention, rotation, norms, eps, pages)?;
        let shape = &layer.shape;
        let attended = gpu.attend(
            &queries,
            &batch.attention,
            pages,
            shape.window,
            shape.scale,
            shape.softcap,
        )?;
        hidden = self.add(
            hidden,
            &layer.attention_out,
            &attended,
            layer.attention_norm.as_ref(),
            eps,
        )?;
        let normed = gpu.rms_norm(&hidden, &layer.mlp_input_norm, eps, inputs)?;
        let both = self.linear(&layer.gate_up, &normed)?;
        let activation = match config.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        let gated = gpu.gate(&both, activation, inputs)?;
        self.add(hidden, &layer.down, &gated, layer.mlp_norm.as_ref(), eps)
    }

    fn linear(&self, linear: &crate::ops::Linear, x: &Rows) -> Result<Rows, LmError> {
        let weight = linear.weight().on_gpu()?;
        let product = self.gpu.product(x, weight, 0..weight.dim(0)?)?;
        Ok(match linear.bias() {
            None => product,
            Some(bias) => self.gpu.add_to_each(&product, bias)?,
        })
    }

    /// `hidden` with a layer's result added, which goes through a norm first where there is one.
    fn add(
        &self,
        mut hidden: Rows,
        linear: &crate::ops::Linear,
        x: &Rows,
        norm: Option<&Tensor>,
        eps: f32,
    ) -> Result<Rows, LmError> {
        if norm.is_none() && linear.bias().is_none() {
            self.gpu.add_product(x, linear.weight().on_gpu()?, &mut hidden)?;
            return Ok(hidden);
        }
        let mut product = self.linear(linear, x)?;
        if let Some(norm) = norm {
            product = self.gpu.rms_norm(&product, norm, eps, DType::F32)?;
        }
        Ok(self.gpu.add(&hidden, &product)?)
    }

    /// Logits of some rows of hidden states.
    fn logits(&self, decoder: &Decoder, hidden: &Tensor, rows: &[u32]) -> Result<Rows, LmError> {
        let x = self.gpu.select(hidden, rows, self.inputs)?;
        let mut logits = self
            .gpu
            .product(&x, decoder.lm_head.on_gpu()?, 0..decoder.config.vocab_size)?;
        if let Some(cap) = decoder.config.logit_softcap {
            self.gpu.softcap(&mut logits, cap)?;
        }
        Ok(logits)
    }

    /// As [`Decoder::logits`], in CPU memory.
    pub fn logits_of_all(&self, decoder: &Decoder, hidden: &Tensor) -> Result<Tensor, LmError> {
        let rows: Vec<u32> = (0..hidden.dim(0)? as u32).collect();
        Ok(self
            .logits(decoder, hidden, &rows)?
            .tensor()?
            .to_device(&Device::Cpu)?)
    }

    /// A token of each row, or None where the CPU has to draw it.
    pub fn draw(
        &self,
        decoder: &Decoder,
        hidden: &Tensor,
        rows: &[u32],
        chances: &[Chance],
    ) -> Result<Vec<Option<u32>>, LmError> {
        let logits = self.logits(decoder, hidden, rows)?;
        let chances: Vec<cauldron_gpu::Chance> = chances
            .iter()
            .map(|Chance { uniform, sampling }| cauldron_gpu::Chance {
                uniform: *uniform,
                temperature: sampling.temperature,
                top_k: u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
                top_p: sampling.top_p,
                min_p: sampling.min_p,
            })
            .collect();
        Ok(self.gpu.draw_from_rows(&logits, &chances)?)
    }

    /// Of each row: what its log-probabilities follow from.
    pub fn summarize(
        &self,
        decoder: &Decoder,
        hidden: &Tensor,
        rows: &[u32],
        targets: &[u32],
        top: usize,
    ) -> Result<Vec<Summary>, LmError> {
        let logits = self.logits(decoder, hidden, rows)?;
        Ok(self.gpu.summarize(&logits, targets, top)?)
    }
}

/// What all layers of one batch go by.
struct Batch {
    attention: Attention,
    rotations: Vec<Rotation>,
}

fn heads(config: &ModelConfig) -> Heads {
    Heads {
        queries: config.num_heads,
        keys: config.num_kv_heads,
        size: config.head_dim,
    }
}
