//! Attention over keys and values in pages: where the rows of a batch lie, what goes into the pages, and what comes of it
//! (`kernels/decoder.cu`).

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{DType, Result, Tensor, bail};

use crate::decoder::{Rows, suffix, vector};
use crate::device::{Gpu, pointer};

/// Tokens of a page.
const PAGE: usize = 16;
/// Queries that the attention kernels take together: with f32 a block, with bf16 each of its warps.
const QUERIES: usize = 16;
const ATTEND_THREADS: usize = 128;
/// Warps of a block of the bf16 kernel where sequences have many rows.
const ATTEND_WARPS: usize = 4;

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

impl Gpu {
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
            65..=128 => 128,
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
