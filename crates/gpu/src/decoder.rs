//! What a decoder computes on packed rows (`kernels/decoder.cu`), and products with weights through cuBLAS.

use std::ops::Range;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{DType, Result, Tensor, bail};

use crate::device::{Gpu, pointer};

/// Rows of every product with fixed shapes; rows of all tensors have room up to a multiple of it.
const ROWS: usize = 128;
/// Tokens of a page.
const PAGE: usize = 16;
/// Queries that the attention kernels take together: with f32 a block, with bf16 each of its warps.
const QUERIES: usize = 16;
const ATTEND_THREADS: usize = 128;
/// Warps of a block of the bf16 kernel where sequences have many rows.
const ATTEND_WARPS: usize = 4;
const THREADS: usize = 256;

/// \[rows, width\] on the device, with room up to a multiple of 128 rows.
#[derive(Debug)]
pub struct Rows {
    tensor: Tensor,
    rows: usize,
    width: usize,
}

/// Heads of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub queries: usize,
    pub keys: usize,
    /// A multiple of 4, at most 256.
    pub size: usize,
}

/// How query and key heads are rotated: cosines and sines, \[rows, half\] each.
#[derive(Debug)]
pub struct Rotation {
    pub half: usize,
    pub cosines: Tensor,
    pub sines: Tensor,
}

/// Keys and values of one layer in pages of 16 tokens, \[pages, heads, 16, size\] each.
#[derive(Debug)]
pub struct Pages {
    keys: Tensor,
    values: Tensor,
    heads: Heads,
}

/// Rows of one sequence in a batch.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    pub row: usize,
    pub rows: usize,
    /// Of the first row in its sequence.
    pub position: usize,
    pub pages: &'a [u32],
}

/// What the attention of a batch goes by, on the device.
#[derive(Debug)]
pub struct Attention {
    slots: Tensor,
    tasks: Tensor,
    tables: Tensor,
    task_count: usize,
    threads: usize,
    dtype: DType,
    heads_at_once: usize,
    rows: usize,
    /// Pages that the tables name are below this.
    pages: usize,
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

#[derive(Clone, Copy)]
#[repr(C)]
struct RawRotate {
    qkv: u64,
    cosines: u64,
    sines: u64,
    query_norm: u64,
    key_norm: u64,
    slots: u64,
    queries: u64,
    keys: u64,
    values: u64,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    half: i32,
    eps: f32,
    unused: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawAttend {
    queries: u64,
    keys: u64,
    values: u64,
    out: u64,
    tasks: u64,
    tables: u64,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    window: i32,
    heads_at_once: i32,
    scale: f32,
    softcap: f32,
    unused: i32,
}

// SAFETY: plain numbers, laid out as in C.
unsafe impl DeviceRepr for RawRotate {}
// SAFETY: as above.
unsafe impl DeviceRepr for RawAttend {}

impl Rows {
    /// The rows as a tensor.
    pub fn tensor(&self) -> Result<Tensor> {
        self.tensor.narrow(0, 0, self.rows)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    fn is(&self, dtype: DType, width: usize) -> Result<u64> {
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

impl Pages {
    pub fn heads(&self) -> Heads {
        self.heads
    }
}

impl Heads {
    fn width(&self) -> usize {
        (self.queries + 2 * self.keys) * self.size
    }

    /// Query heads of one key/value head that a block of the attention kernel takes.
    fn at_once(&self) -> usize {
        (self.queries / self.keys).min(QUERIES)
    }

    pub fn check(&self) -> Result<()> {
        if self.size == 0 || self.size > 256 || !self.size.is_multiple_of(4) || self.keys == 0 {
            bail!(
                "heads of {} numbers; the GPU takes multiples of 4 up to 256",
                self.size
            );
        }
        Ok(())
    }
}

fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => bail!("products are of F32 or BF16, not {other:?}"),
    }
}

fn vector(tensor: &Tensor, len: usize) -> Result<u64> {
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
    fn rows(&self, rows: usize, width: usize, dtype: DType) -> Result<Rows> {
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

    /// Pages of one layer, of zeros.
    pub fn pages(&self, pages: usize, heads: Heads, dtype: DType) -> Result<Pages> {
        heads.check()?;
        suffix(dtype)?;
        let shape = (pages, heads.keys, PAGE, heads.size);
        Ok(Pages {
            keys: Tensor::zeros(shape, dtype, &self.device)?,
            values: Tensor::zeros(shape, dtype, &self.device)?,
            heads,
        })
    }

    /// Copies a page over another.
    pub fn copy_page(&self, pages: &mut Pages, from: u32, to: u32) -> Result<()> {
        for tensor in [&pages.keys, &pages.values] {
            let page = tensor.narrow(0, from as usize, 1)?.copy()?;
            tensor.slice_set(&page, 0, to as usize)?;
        }
        Ok(())
    }

    /// Says where the rows of a batch lie in pages, and cuts their attention into tasks. `heads`: as in all its layers;
    /// `pages`: how many there are; `dtype`: theirs.
    pub fn plan_attention(
        &self,
        spans: &[Span<'_>],
        heads: Heads,
        pages: usize,
        dtype: DType,
    ) -> Result<Attention> {
        heads.check()?;
        let heads_at_once = heads.at_once();
        let rows = QUERIES / heads_at_once;
        // How rows are dealt to warps changes no result.
        let (rows_at_once, threads) = match dtype {
            DType::BF16 if spans.iter().all(|span| span.rows <= rows) => (rows, 32),
            DType::BF16 => (rows * ATTEND_WARPS, 32 * ATTEND_WARPS),
            _ => (rows, ATTEND_THREADS),
        };
        let (mut slots, mut tasks, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for span in spans {
            let end = span.position + span.rows;
            let Some(table) = span.pages.get(..end.div_ceil(PAGE)) else {
                bail!("{} pages for {end} tokens", span.pages.len());
            };
            if span.row != slots.len() || table.iter().any(|page| *page as usize >= pages) {
                bail!("a span is out of place");
            }
            let start = tables.len() as u32;
            tables.extend_from_slice(table);
            slots.extend((span.position..end).map(|at| table[at / PAGE] * PAGE as u32 + (at % PAGE) as u32));
            for from in (0..span.rows).step_by(rows_at_once) {
                let rows = rows_at_once.min(span.rows - from);
                tasks.extend([
                    (span.row + from) as u32,
                    rows as u32,
                    (span.position + from) as u32,
                    start,
                ]);
            }
        }
        let upload = |values: Vec<u32>| {
            let len = values.len();
            Tensor::from_vec(values, len, &self.device)
        };
        Ok(Attention {
            task_count: tasks.len() / 4,
            threads,
            dtype,
            rows: slots.len(),
            slots: upload(slots)?,
            tasks: upload(tasks)?,
            tables: upload(tables)?,
            heads_at_once,
            pages,
        })
    }

    /// Norms and rotates query and key heads of rows \[queries | keys | values\], puts keys and values into their pages, and
    /// returns the queries. `norms`: weights for query and key heads.
    #[allow(clippy::too_many_arguments)]
    pub fn rotate_and_store(
        &self,
        qkv: &Rows,
        plan: &Attention,
        rotation: Option<&Rotation>,
        norms: Option<(&Tensor, &Tensor)>,
        eps: f32,
        pages: &mut Pages,
    ) -> Result<Rows> {
        let heads = pages.heads;
        plan.check(qkv.rows, pages)?;
        let queries = self.rows(qkv.rows, heads.queries * heads.size, DType::F32)?;
        let (cosines, sines, half) = match rotation {
            None => (0, 0, 0),
            Some(rotation) if rotation.half * 2 <= heads.size => {
                let len = qkv.rows * rotation.half;
                let (cosines, sines) = (vector(&rotation.cosines, len)?, vector(&rotation.sines, len)?);
                (cosines, sines, rotation.half)
            }
            Some(rotation) => bail!("{} pairs in a head of {}", rotation.half, heads.size),
        };
        let (query_norm, key_norm) = match norms {
            None => (0, 0),
            Some((query, key)) => (vector(query, heads.size)?, vector(key, heads.size)?),
        };
        let raw = RawRotate {
            qkv: qkv.is(DType::F32, heads.width())?,
            cosines,
            sines,
            query_norm,
            key_norm,
            slots: pointer(&plan.slots)?,
            queries: pointer(&queries.tensor)?,
            keys: pointer(&pages.keys)?,
            values: pointer(&pages.values)?,
            heads: heads.queries as i32,
            kv_heads: heads.keys as i32,
            head_dim: heads.size as i32,
            half: half as i32,
            eps,
            unused: 0,
        };
        let name = format!("rotate_and_store_{}", suffix(pages.keys.dtype())?);
        let grid = (qkv.rows, heads.queries + 2 * heads.keys);
        // SAFETY: the slots are those of pages that are there, and all other sizes were checked.
        unsafe {
            self.launch(&name, grid, heads.size.next_multiple_of(32), |launch| {
                launch.arg(&raw);
            })?;
        }
        Ok(queries)
    }

    /// Causal attention of the queries over their sequences' pages; the result has the type of the pages. `window`: latest
    /// positions that a token sees.
    pub fn attend(
        &self,
        queries: &Rows,
        plan: &Attention,
        pages: &Pages,
        window: Option<usize>,
        scale: f32,
        softcap: Option<f32>,
    ) -> Result<Rows> {
        let heads = pages.heads;
        plan.check(queries.rows, pages)?;
        let dtype = pages.keys.dtype();
        let out = self.rows(queries.rows, queries.width, dtype)?;
        let raw = RawAttend {
            queries: queries.is(DType::F32, heads.queries * heads.size)?,
            keys: pointer(&pages.keys)?,
            values: pointer(&pages.values)?,
            out: pointer(&out.tensor)?,
            tasks: pointer(&plan.tasks)?,
            tables: pointer(&plan.tables)?,
            heads: heads.queries as i32,
            kv_heads: heads.keys as i32,
            head_dim: heads.size as i32,
            window: window.map_or(0, |window| window.min(i32::MAX as usize) as i32),
            heads_at_once: plan.heads_at_once as i32,
            scale,
            softcap: softcap.unwrap_or(0.0),
            unused: 0,
        };
        let size = match heads.size {
            ..=64 => 64,
            ..=128 => 128,
            _ => 256,
        };
        let name = format!("attend_{size}_{}", suffix(dtype)?);
        let chunks = (heads.queries / heads.keys).div_ceil(plan.heads_at_once);
        // SAFETY: the tables name pages that are there and hold the tokens; all other sizes were checked.
        unsafe {
            self.launch(
                &name,
                (plan.task_count, heads.keys * chunks),
                plan.threads,
                |launch| {
                    launch.arg(&raw);
                },
            )?;
        }
        Ok(out)
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

impl Attention {
    fn check(&self, rows: usize, pages: &Pages) -> Result<()> {
        let there = pages.keys.dim(0)?;
        let fits = self.heads_at_once == pages.heads.at_once() && self.dtype == pages.keys.dtype();
        if self.rows != rows || there < self.pages || !fits {
            bail!(
                "an attention of {} rows over {} pages does not fit",
                self.rows,
                self.pages
            );
        }
        Ok(())
    }
}
