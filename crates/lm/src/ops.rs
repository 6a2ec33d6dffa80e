//! The arithmetic that the decoder is made of, on f32 tensors in CPU memory: matrices, linear layers, the gated activation,
//! and an exponential that the compiler can vectorise. (What a GPU computes instead is in `decoder/gpu.rs`.)

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use rayon::prelude::*;

use crate::arithmetic::{Arithmetic, Placement};
use crate::config::Activation;
use crate::kernel::{Instructions, Vectorized, vectorized};
use crate::packed::PackedMatrix;
use crate::quantized::QuantizedMatrix;

/// W \[rows, inner\]: a table of rows, or the weight of a product `x W^T`.
#[derive(Debug)]
pub(crate) enum Matrix {
    Packed(PackedMatrix),
    Quantized(QuantizedMatrix),
    /// On a GPU, \[rows, inner\] as it is.
    #[cfg(feature = "cuda")]
    Gpu(Tensor),
}

impl Matrix {
    /// From W row by row.
    pub(crate) fn new(values: Vec<f32>, inner: usize, placement: Placement<'_>) -> candle_core::Result<Self> {
        let arithmetic = placement.arithmetic;
        #[cfg(feature = "cuda")]
        let rows = values.len() / inner;
        Ok(match (placement.device, arithmetic) {
            (Device::Cpu, Arithmetic::F32) => Self::Packed(PackedMatrix::from_rows(&values, inner)),
            (Device::Cpu, Arithmetic::Bf16) => Self::Packed(PackedMatrix::rounded(&values, inner)),
            (Device::Cpu, Arithmetic::Q8_0 | Arithmetic::Q4K) => {
                Self::Quantized(QuantizedMatrix::from_rows(&values, inner, arithmetic))
            }
            #[cfg(feature = "cuda")]
            (device, Arithmetic::F32) => Self::Gpu(Tensor::from_vec(values, (rows, inner), device)?),
            #[cfg(feature = "cuda")]
            (device, Arithmetic::Bf16) => {
                let rounded: Vec<half::bf16> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
                Self::Gpu(Tensor::from_vec(rounded, (rows, inner), device)?)
            }
            (device, arithmetic) => {
                candle_core::bail!("{} is not computed on {:?}", arithmetic.name(), device.location())
            }
        })
    }

    /// From the rows of W in little-endian bf16, in CPU memory for products in f32.
    pub(crate) fn of_bf16(rows: &[Cow<'_, [u8]>], inner: usize) -> Self {
        Self::Packed(PackedMatrix::from_bf16(rows, inner))
    }

    /// From tensors on a GPU, one below the other: what [`Matrix::new`] makes of their numbers.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_gpu(parts: &[Tensor], placement: Placement<'_>) -> candle_core::Result<Self> {
        let dtype = match placement.arithmetic {
            Arithmetic::F32 => candle_core::DType::F32,
            Arithmetic::Bf16 => candle_core::DType::BF16,
            other => candle_core::bail!("{} is not computed on a GPU", other.name()),
        };
        let parts: Vec<Tensor> = parts
            .iter()
            .map(|part| part.to_dtype(dtype))
            .collect::<candle_core::Result<_>>()?;
        Ok(Self::Gpu(match parts.as_slice() {
            [one] => one.clone(),
            parts => Tensor::cat(parts, 0)?,
        }))
    }

    /// The tensor on the GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(&self) -> candle_core::Result<&Tensor> {
        match self {
            Self::Gpu(tensor) => Ok(tensor),
            _ => candle_core::bail!("a matrix is in CPU memory"),
        }
    }

    /// Bytes that it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.bytes(),
            Self::Quantized(quantized) => quantized.bytes(),
            #[cfg(feature = "cuda")]
            Self::Gpu(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
        }
    }

    /// The rows `ids`, \[ids, inner\]. Ids are below the number of rows.
    pub(crate) fn rows(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        let mut values = Vec::new();
        let ids_of = || ids.iter().map(|id| *id as usize);
        match self {
            Self::Packed(packed) => ids_of().for_each(|id| packed.extend_with_row(id, &mut values)),
            Self::Quantized(quantized) => ids_of().for_each(|id| quantized.extend_with_row(id, &mut values)),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => candle_core::bail!("a matrix is on the GPU"),
        }
        let inner = values.len() / ids.len().max(1);
        Tensor::from_vec(values, (ids.len(), inner), &Device::Cpu)
    }

    /// `x W^T`, \[rows of x, rows of W\].
    pub(crate) fn times(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Packed(packed) => self.times_rows(x, 0..packed.columns()),
            Self::Quantized(quantized) => self.times_rows(x, 0..quantized.columns()),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => candle_core::bail!("a matrix is on the GPU"),
        }
    }

    /// `x W^T` for some rows of W only; the range begins at a multiple of 16.
    pub(crate) fn times_rows(&self, x: &Tensor, range: Range<usize>) -> candle_core::Result<Tensor> {
        let shape = (x.dim(0)?, range.len());
        let product = match self {
            Self::Packed(packed) => with_slice(x, |x| packed.product(x, range))?,
            Self::Quantized(quantized) => with_slice(x, |x| quantized.product(x, range))?,
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => candle_core::bail!("a matrix is on the GPU"),
        };
        Tensor::from_vec(product, shape, &Device::Cpu)
    }
}

/// `x W^T + b`.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(weight: Matrix, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn weight(&self) -> &Matrix {
        &self.weight
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let product = self.weight.times(x)?;
        match &self.bias {
            Some(bias) => add(&product, bias),
            None => Ok(product),
        }
    }
}

/// `x + y` for `x` = \[rows, width\] and `y` of the same shape, or a row that is added to each. (candle's own sum keeps
/// threads of its own spinning beside ours.)
pub(crate) fn add(x: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let sum = with_slice(x, |x| {
        with_slice(y, |y| {
            let mut out = x.to_vec();
            by_rows(&mut out, width, |row, out| {
                let y = if y.len() == width {
                    y
                } else {
                    &y[row * width..][..width]
                };
                out.iter_mut().zip(y).for_each(|(x, y)| *x += y);
            });
            out
        })
    })??;
    Tensor::from_vec(sum, (rows, width), &Device::Cpu)
}

/// RMS norm of every row of \[rows, hidden\].
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> candle_core::Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let normed = with_slice(x, |x| {
        with_slice(weight, |weight| {
            let mut out = vec![0f32; x.len()];
            by_rows(&mut out, width, |row, out| {
                let row = &x[row * width..][..width];
                vectorized(RmsNorm {
                    row,
                    weight,
                    eps,
                    out,
                });
            });
            out
        })
    })??;
    Tensor::from_vec(normed, (rows, width), &Device::Cpu)
}

/// Rows that are worth a second thread, of the cheap operations.
const FEW_ROWS: usize = 8;

/// Runs `work` on every row of `out` \[rows, width\].
pub(crate) fn by_rows(out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    match out.len() / width < FEW_ROWS {
        true => out
            .chunks_mut(width)
            .enumerate()
            .for_each(|(row, out)| work(row, out)),
        false => out
            .par_chunks_mut(width)
            .enumerate()
            .for_each(|(row, out)| work(row, out)),
    }
}

struct RmsNorm<'a> {
    row: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Vectorized for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Instructions>(self) {
        let inverse = 1.0 / (dot(self.row, self.row) / self.row.len() as f32 + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.row).zip(self.weight) {
            *out = x * inverse * weight;
        }
    }
}

/// `activation(gate) * up` for `x` = \[rows, gate | up\].
pub(crate) fn gate(x: &Tensor, activation: Activation) -> candle_core::Result<Tensor> {
    let (rows, both) = x.dims2()?;
    let width = both / 2;
    let gated = with_slice(x, |x| {
        let mut out = vec![0f32; rows * width];
        by_rows(&mut out, width, |row, out| {
            let (gate, up) = x[row * both..][..both].split_at(width);
            match activation {
                Activation::Silu => vectorized(Swiglu { gate, up, out }),
                Activation::GeluTanh => vectorized(Geglu { gate, up, out }),
            }
        });
        out
    })?;
    Tensor::from_vec(gated, (rows, width), &Device::Cpu)
}

struct Swiglu<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Vectorized for Swiglu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Instructions>(self) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

struct Geglu<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Vectorized for Geglu<'_> {
    type Output = ();

    /// `0.5 x (1 + tanh(u)) = x / (1 + e^(-2u))` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`.
    #[inline(always)]
    fn run<I: Instructions>(self) {
        const DOUBLE: f32 = 2.0 * 0.797_884_6;
        for ((out, x), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            let twice = DOUBLE * (x + 0.044_715 * x * x * x);
            *out = x / (1.0 + exp(-twice)) * up;
        }
    }
}

/// `cap * tanh(x / cap)` of every element.
pub(crate) fn softcap(x: &Tensor, cap: f32) -> candle_core::Result<Tensor> {
    let values = with_slice(x, |x| {
        let mut out = x.to_vec();
        out.par_chunks_mut(4096)
            .for_each(|values| vectorized(Softcap { values, cap }));
        out
    })?;
    Tensor::from_vec(values, x.shape(), &Device::Cpu)
}

struct Softcap<'a> {
    values: &'a mut [f32],
    cap: f32,
}

impl Vectorized for Softcap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Instructions>(self) {
        self.values
            .iter_mut()
            .for_each(|value| *value = capped(*value, self.cap));
    }
}

/// `cap * tanh(x / cap)`; NaN stays.
#[inline(always)]
pub(crate) fn capped(x: f32, cap: f32) -> f32 {
    let scaled = x / cap;
    let tanh = 1.0 - 2.0 / (exp(2.0 * scaled) + 1.0);
    if scaled.is_nan() { x } else { cap * tanh }
}

/// Lends the elements of a contiguous f32 tensor in CPU memory, without a copy.
pub(crate) fn with_slice<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> T) -> candle_core::Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => candle_core::bail!("expected a contiguous f32 tensor in CPU memory"),
    }
}

/// Sixteen running sums, which compile to vector instructions; the order of addition is fixed.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a_blocks, b_blocks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_blocks
        .remainder()
        .iter()
        .zip(b_blocks.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_blocks.zip(b_blocks) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// `e^x` within 2 ulp for x in \[-87, 88\], clamped outside; NaN counts as the lower end.
///
/// Source of the polynomial: S. Moshier, Cephes, `expf.c`. Without branches or calls, so loops vectorise.
#[inline(always)]
#[allow(clippy::excessive_precision)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer that lies in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let x = if x > -87.0 { x } else { -87.0 };
    let x = if x < 88.0 { x } else { 88.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_375 + n * 2.121_944_400e-4;
    let mut p = 1.987_569_150_0e-4;
    p = p * r + 1.398_199_950_7e-3;
    p = p * r + 8.333_451_907_3e-3;
    p = p * r + 4.166_579_589_4e-2;
    p = p * r + 1.666_666_545_9e-1;
    p = p * r + 5.000_000_120_1e-1;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    (p * r * r + r + 1.0) * f32::from_bits(exponent << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_exactly_one_at_zero() {
        assert_eq!(exp(0.0), 1.0);
        for step in -8700..8800 {
            let x = step as f32 / 100.0 + 0.003;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}) is off by {error:e}");
        }
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(-1000.0) < 2e-38 && exp(f32::NAN) < 2e-38);
    }

    fn numbers(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7919) % 1013) as f32 / 500.0 - 1.0)
            .collect()
    }

    #[test]
    fn a_matrix_is_a_table_and_a_weight() -> candle_core::Result<()> {
        let values = numbers(40 * 3);
        let placement = Placement {
            device: &Device::Cpu,
            arithmetic: Arithmetic::F32,
            fixed_shapes: false,
        };
        let packed = Matrix::new(values.clone(), 3, placement)?;
        let x = Tensor::new(&[[1f32, -2.0, 0.5], [0.0, 1.0, 3.0]], &Device::Cpu)?;
        let dense = Tensor::from_vec(values, (40, 3), &Device::Cpu)?;
        let rows = dense.index_select(&Tensor::new(&[39u32, 0], &Device::Cpu)?, 0)?;
        assert_eq!(packed.rows(&[39, 0])?.to_vec2::<f32>()?, rows.to_vec2::<f32>()?);
        let product = x.matmul(&dense.t()?)?;
        let some = product.narrow(1, 16, 23)?;
        for (a, b) in [
            (packed.times(&x)?, product),
            (packed.times_rows(&x, 16..39)?, some),
        ] {
            let difference = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference < 1e-4, "{difference}");
        }
        Ok(())
    }

    #[test]
    fn capped_is_a_scaled_tanh_and_gelu_its_approximation() -> candle_core::Result<()> {
        for x in [-300f32, -70.0, -3.0, -1e-3, 0.0, 0.5, 12.0, 49.0, 1e4] {
            let exact = 50.0 * (x / 50.0).tanh();
            assert!((capped(x, 50.0) - exact).abs() < 1e-5, "{x}");
        }
        assert!(capped(f32::NAN, 50.0).is_nan());
        let gated = gate(
            &Tensor::new(&[[1f32, -2.0, 9.0, 1.0, 1.0, 2.0]], &Device::Cpu)?,
            Activation::GeluTanh,
        )?;
        let exact = Tensor::new(&[[1f32, -2.0, 9.0]], &Device::Cpu)?.gelu()?
            * Tensor::new(&[[1f32, 1.0, 2.0]], &Device::Cpu)?;
        let difference = (gated - exact?)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 2e-6, "{difference}");
        Ok(())
    }

    #[test]
    fn swiglu_is_silu_of_the_first_half_times_the_second() -> candle_core::Result<()> {
        let x = Tensor::new(&[[1f32, -2.0, 3.0, 4.0]], &Device::Cpu)?;
        let ours = gate(&x, Activation::Silu)?.flatten_all()?.to_vec1::<f32>()?;
        let silu = |v: f32| v / (1.0 + (-v).exp());
        assert!((ours[0] - silu(1.0) * 3.0).abs() < 1e-6 && (ours[1] - silu(-2.0) * 4.0).abs() < 1e-6);
        Ok(())
    }
}
