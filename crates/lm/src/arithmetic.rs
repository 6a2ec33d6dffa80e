//! How products with weights are computed, and what the weights take in memory for it.

use candle_core::Device;

use crate::config::ModelConfig;
use crate::weights::expected_tensors;
use crate::{LmError, quantized};

/// Where weights lie, and how products with them are computed there.
#[derive(Debug, Clone, Copy)]
pub struct Placement<'a> {
    pub device: &'a Device,
    /// On a GPU there is no quantised one.
    pub arithmetic: Arithmetic,
    /// On a GPU the library of products takes other kernels for other numbers of rows, which changes last bits. With
    /// fixed shapes every product has the same number, so that a row does not depend on its company; few rows cost as
    /// much as many. In CPU memory that holds anyway.
    pub fixed_shapes: bool,
}

impl Placement<'_> {
    /// Whether weights that are bf16 numbers are held as they are.
    pub(crate) fn keeps_bf16(&self) -> bool {
        matches!(self.device, Device::Cpu) && self.arithmetic == Arithmetic::F32
    }
}

/// The arithmetic of products with weights; everything else is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// f32 by f32. Weights that are all bf16 numbers are held as such.
    #[default]
    F32,
    /// Both sides rounded to bf16, products added in f32: twice as fast where the machine has an instruction for it. The
    /// last bits are those of the machine.
    Bf16,
    /// Weights in GGUF's blocks of 32 8-bit numbers with a common factor, the other side rounded to such blocks for each
    /// product. A quarter of the memory of f32; scores are those of another model.
    Q8_0,
    /// Weights in GGUF's blocks of 256 4-bit numbers. A matrix whose inner dimension is not a multiple of 256 is in
    /// blocks of [`Arithmetic::Q8_0`].
    Q4K,
}

impl Arithmetic {
    /// As checkpoints and GGUF files name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
        }
    }

    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4K)
    }

    /// Whether it can be done with a model's matrices.
    pub fn check(self, config: &ModelConfig) -> Result<(), LmError> {
        let mut matrices = expected_tensors(config).into_iter();
        let refused = matrices.find(|(_, shape)| match shape[..] {
            [_, inner] => self.is_quantized() && !inner.is_multiple_of(quantized::LEAST_BLOCK),
            _ => false,
        });
        match refused {
            None => Ok(()),
            Some((tensor, shape)) => Err(LmError::Tensor {
                tensor,
                detail: format!(
                    "is {shape:?}; {} takes rows of multiples of {}",
                    self.name(),
                    quantized::LEAST_BLOCK
                ),
            }),
        }
    }

    /// Bytes of all weights of a model in memory. `are_bf16`: whether they are bf16 numbers.
    pub fn weight_bytes(self, config: &ModelConfig, are_bf16: bool) -> usize {
        let bytes = |shape: &[usize]| {
            let numbers: usize = shape.iter().product();
            match (self, shape) {
                (Self::Q8_0 | Self::Q4K, [_, inner]) => numbers / inner * quantized::row_bytes(self, *inner),
                (Self::Bf16, [_, _]) => 2 * numbers,
                (Self::F32, [_, _]) if are_bf16 => 2 * numbers,
                _ => 4 * numbers,
            }
        };
        expected_tensors(config)
            .iter()
            .map(|(_, shape)| bytes(shape))
            .sum()
    }
}
