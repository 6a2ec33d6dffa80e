//! What a decoder computes on packed rows (`kernels/decoder.cu`), and products with weights through cuBLAS. Attention is in
//! `attention.rs`.

use std::ops::Range;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{DType, Result, Tensor, bail};

use crate::device::{Gpu, pointer};
use crate::draw::Chance;

/// Rows of every product with fixed shapes; rows of all tensors have room up to a multiple of it.
const ROWS: usize = 128;
const THREADS: usize = 256;

/// \[rows, width\] on the device, with room up to a multiple of 128 rows.
#[derive(Debug)]
pub struct Rows {
    pub(crate) tensor: Tensor,
    pub(crate) rows: usize,
    pub(crate) width: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    Silu,
    GeluTanh,
}

/// Of one row of logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    pub largest: f32,
    /// Of exp(logit - largest); 0 where the largest is not finite.
    pub sum: f64,
    pub target_logit: f32,
    /// Falling, the lowest id first among equals; -inf and NaN are not in it.
    pub top: Vec<(u32, f32)>,
}

impl Rows {
    /// The rows as a tensor.
    pub fn tensor(&self) -> Result<Tensor> {
        self.tensor.narrow(0, 0, self.rows)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn is(&self, dtype: DType, width: usize) -> Result<u64> {
        if self.tensor.dtype() != dtype || self.width != width {
            bail!(
                "rows of {} {:?} where {width} {dtype:?} are due",
                self.width,
                self.tensor.dtype()
            );
        }
        pointer(&self.tensor)
    }
}

pub(crate) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => bail!("products are of F32 or BF16, not {other:?}"),
    }
}

pub(crate) fn vector(tensor: &Tensor, len: usize) -> Result<u64> {
    if tensor.dtype() != DType::F32 || tensor.elem_count() != len {
        bail!(
            "{:?} {:?} where {len} f32 are due",
            tensor.shape(),
            tensor.dtype()
        );
    }
    pointer(tensor)
}

impl Gpu {
    pub(crate) fn rows(&self, rows: usize, width: usize, dtype: DType) -> Result<Rows> {
        let room = rows.next_multiple_of(ROWS);
        Ok(Rows {
            tensor: self.empty((room, width), dtype)?,
            rows,
            width,
        })
    }

    /// Some rows of a table \[ids, width\], as `dtype`. Ids are below its number of rows.
    pub fn select(&self, table: &Tensor, ids: &[u32], dtype: DType) -> Result<Rows> {
        let (count, width) = table.dims2()?;
        if ids.iter().any(|id| *id as usize >= count) {
            bail!("a row beyond the {count} of the table");
        }
        let mut padded = ids.to_vec();
        let room = ids.len().next_multiple_of(ROWS);
        padded.resize(room, 0);
        let ids_there = Tensor::from_vec(padded, room, &self.device)?;
        Ok(Rows {
            tensor: table.index_select(&ids_there, 0)?.to_dtype(dtype)?,
            rows: ids.len(),
            width,
        })
    }

    /// `x` times a number.
    pub fn scale(&self, x: &Rows, by: f64) -> Result<Rows> {
        Ok(Rows {
            tensor: x.tensor.affine(by, 0.0)?,
            ..*x
        })
    }

    /// `x + y`, `y` being rows too.
    pub fn add(&self, x: &Rows, y: &Rows) -> Result<Rows> {
        Ok(Rows {
            tensor: (&x.tensor + &y.tensor)?,
            ..*x
        })
    }

    /// `x` with a vector added to each row.
    pub fn add_to_each(&self, x: &Rows, vector: &Tensor) -> Result<Rows> {
        Ok(Rows {
            tensor: x.tensor.broadcast_add(vector)?,
            ..*x
        })
    }

    /// RMS norm of every row of f32.
    pub fn rms_norm(&self, x: &Rows, weight: &Tensor, eps: f32, dtype: DType) -> Result<Rows> {
        let out = self.rows(x.rows, x.width, dtype)?;
        let (from, weight, to) = (
            x.is(DType::F32, x.width)?,
            vector(weight, x.width)?,
            pointer(&out.tensor)?,
        );
        let width = x.width as i32;
        let name = format!("rms_norm_{}", suffix(dtype)?);
        // SAFETY: a block reads and writes one row of `width` numbers.
        unsafe {
            self.launch(&name, (x.rows, 1), THREADS, |launch| {
                launch.arg(&from).arg(&weight).arg(&to).arg(&width).arg(&eps);
            })?;
        }
        Ok(out)
    }

    /// `activation(gate) * up` of rows \[gate | up\].
    pub fn gate(&self, x: &Rows, gate: Gate, dtype: DType) -> Result<Rows> {
        let width = x.width / 2;
        let out = self.rows(x.rows, width, dtype)?;
        let (from, to) = (x.is(DType::F32, 2 * width)?, pointer(&out.tensor)?);
        let (length, columns, gelu) = (
            (x.rows * width) as u64,
            width as i32,
            i32::from(gate == Gate::GeluTanh),
        );
        let name = format!("gate_{}", suffix(dtype)?);
        // SAFETY: a thread reads two numbers of a row and writes one.
        unsafe {
            self.launch(
                &name,
                ((x.rows * width).div_ceil(THREADS), 1),
                THREADS,
                |launch| {
                    launch.arg(&from).arg(&to).arg(&length).arg(&columns).arg(&gelu);
                },
            )?;
        }
        Ok(out)
    }

    /// `x W^T` in f32 for some rows of W \[columns, inner\]; both have one type.
    pub fn product(&self, x: &Rows, weight: &Tensor, columns: Range<usize>) -> Result<Rows> {
        let out = self.rows(x.rows, columns.len(), DType::F32)?;
        self.multiply(x, weight, columns, &out, 0.0)?;
        Ok(out)
    }

    /// Adds `x W^T` to rows of f32.
    pub fn add_product(&self, x: &Rows, weight: &Tensor, to: &mut Rows) -> Result<()> {
        self.multiply(x, weight, 0..weight.dim(0)?, to, 1.0)
    }

    fn multiply(
        &self,
        x: &Rows,
        weight: &Tensor,
        columns: Range<usize>,
        out: &Rows,
        beta: f32,
    ) -> Result<()> {
        let (all, inner) = weight.dims2()?;
        let dtype = weight.dtype();
        let (number, size) = match dtype {
            DType::F32 => (sys::cudaDataType::CUDA_R_32F, 4),
            DType::BF16 => (sys::cudaDataType::CUDA_R_16BF, 2),
            other => bail!("products are of F32 or BF16, not {other:?}"),
        };
        if columns.end > all || out.rows != x.rows {
            bail!("a product of {} rows with columns {columns:?} of {all}", x.rows);
        }
        let (a, b) = (
            pointer(weight)? + (columns.start * inner * size) as u64,
            x.is(dtype, inner)?,
        );
        let c = out.is(DType::F32, columns.len())?;
        let at_once = match self.fixed_shapes {
            true => ROWS,
            false => x.rows,
        };
        let alpha = 1f32;
        for row in (0..x.rows).step_by(at_once.max(1)) {
            let (b, c) = (
                b + (row * inner * size) as u64,
                c + (row * columns.len() * 4) as u64,
            );
            let (m, n, k) = (columns.len() as i32, at_once as i32, inner as i32);
            // Row-major x W^T is column-major W x^T.
            // SAFETY: W has `m` rows from `a` on; `x` and `out` have room for whole steps of rows.
            unsafe {
                gemm_ex(
                    *self.cuda.cublas_handle().handle(),
                    sys::cublasOperation_t::CUBLAS_OP_T,
                    sys::cublasOperation_t::CUBLAS_OP_N,
                    m,
                    n,
                    k,
                    (&raw const alpha).cast(),
                    a as *const _,
                    number,
                    k,
                    b as *const _,
                    number,
                    k,
                    (&raw const beta).cast(),
                    c as *mut _,
                    sys::cudaDataType::CUDA_R_32F,
                    m,
                    sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            }
            .w()?;
        }
        Ok(())
    }

    /// `cap * tanh(x / cap)`, in place.
    pub fn softcap(&self, x: &mut Rows, cap: f32) -> Result<()> {
        let (at, length) = (x.is(DType::F32, x.width)?, (x.rows * x.width) as u64);
        // SAFETY: a thread reads and writes one number.
        unsafe {
            self.launch(
                "softcap",
                ((x.rows * x.width).div_ceil(THREADS), 1),
                THREADS,
                |launch| {
                    launch.arg(&at).arg(&length).arg(&cap);
                },
            )
        }
    }

    /// As [`Gpu::draw_tokens`].
    pub fn draw_from_rows(&self, logits: &Rows, chances: &[Chance]) -> Result<Vec<Option<u32>>> {
        let from = logits.is(DType::F32, logits.width)?;
        if chances.len() != logits.rows {
            bail!("{} draws from {} rows", chances.len(), logits.rows);
        }
        // SAFETY: the rows were found to be there.
        unsafe { self.draw_from(from, logits.width, chances) }
    }

    /// Of each row of logits: what its log-probabilities follow from, and its `top` largest.
    pub fn summarize(&self, logits: &Rows, targets: &[u32], top: usize) -> Result<Vec<Summary>> {
        let (rows, vocab) = (logits.rows, logits.width);
        if targets.len() != rows || targets.iter().any(|target| *target as usize >= vocab) {
            bail!("{} targets below {vocab} for {rows} rows", targets.len());
        }
        let targets = Tensor::from_slice(targets, rows, &self.device)?;
        let floats = |count: usize| self.empty(count.max(1), DType::F32);
        let (largest, target_logits, top_logits) = (floats(rows)?, floats(rows)?, floats(rows * top)?);
        let sums = self.empty(rows, DType::F64)?;
        let top_ids = self.empty((rows * top).max(1), DType::U32)?;
        let from = logits.is(DType::F32, vocab)?;
        let at = [
            pointer(&targets)?,
            pointer(&largest)?,
            pointer(&sums)?,
            pointer(&target_logits)?,
            pointer(&top_logits)?,
            pointer(&top_ids)?,
        ];
        let (columns, best) = (vocab as i32, top as i32);
        // SAFETY: a block reads one row, and writes its entries of each result.
        unsafe {
            self.launch("summarize", (rows, 1), THREADS, |launch| {
                launch.arg(&from).arg(&at[0]).arg(&columns).arg(&best);
                at[1..].iter().for_each(|pointer| {
                    launch.arg(pointer);
                });
            })?;
        }
        let (largest, target_logits) = (largest.to_vec1::<f32>()?, target_logits.to_vec1::<f32>()?);
        let (sums, ids) = (sums.to_vec1::<f64>()?, top_ids.to_vec1::<u32>()?);
        let values = top_logits.to_vec1::<f32>()?;
        let summary = |row: usize| Summary {
            largest: largest[row],
            sum: sums[row],
            target_logit: target_logits[row],
            top: (row * top..(row + 1) * top)
                .map(|at| (ids[at], values[at]))
                .take_while(|(id, _)| *id != u32::MAX)
                .collect(),
        };
        Ok((0..rows).map(summary).collect())
    }
}
