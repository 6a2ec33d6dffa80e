//! Drawing tokens where the logits lie (`kernels/draw.cu`).

use candle_core::{DType, Result, Tensor, bail};

use crate::device::{Gpu, pointer};
use crate::merge::{Plain, as_bytes};

/// What the kernel says of a row that it does not draw from.
const NONE: u32 = u32::MAX;

/// How one row's token is drawn; what the fields mean: `Sampling` of crates/lm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chance {
    /// At least 0 and below 1: the share of all weights that lies before the token.
    pub uniform: f64,
    /// Above 0.
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RawChance {
    uniform: f64,
    temperature: f32,
    top_p: f32,
    min_p: f32,
    top_k: u32,
}

impl Plain for RawChance {}

impl Gpu {
    /// Draws one token from each row of f32 logits \[rows, vocab\]. None where that is the CPU's: a cut leaves more than 1024 tokens,
    /// or no logit is finite.
    pub fn draw_tokens(&self, logits: &Tensor, chances: &[Chance]) -> Result<Vec<Option<u32>>> {
        let (rows, vocab) = logits.dims2()?;
        if logits.dtype() != DType::F32 || rows != chances.len() || vocab == 0 || vocab > i32::MAX as usize {
            bail!("{} draws from logits {:?}", chances.len(), logits.shape());
        }
        // SAFETY: the tensor has the rows.
        unsafe { self.draw_from(pointer(logits)?, vocab, chances) }
    }

    /// # Safety
    /// From `logits` on lie as many rows of `vocab` f32.
    pub(crate) unsafe fn draw_from(
        &self,
        logits: u64,
        vocab: usize,
        chances: &[Chance],
    ) -> Result<Vec<Option<u32>>> {
        let raw: Vec<RawChance> = chances
            .iter()
            .map(|chance| RawChance {
                uniform: chance.uniform,
                temperature: chance.temperature,
                top_p: chance.top_p,
                min_p: chance.min_p,
                top_k: chance.top_k,
            })
            .collect();
        if raw.is_empty() {
            return Ok(Vec::new());
        }
        let bytes = as_bytes(&raw);
        let raw = Tensor::from_slice(bytes, bytes.len(), &self.device)?;
        let tokens = Tensor::zeros(chances.len(), DType::U32, &self.device)?;
        // SAFETY: a block reads one row and its chance, and writes one token.
        unsafe {
            self.launch_draw(
                chances.len(),
                logits,
                pointer(&raw)?,
                vocab as i32,
                pointer(&tokens)?,
            )?
        };
        let tokens = tokens.to_vec1::<u32>()?;
        Ok(tokens
            .into_iter()
            .map(|token| Some(token).filter(|token| *token != NONE))
            .collect())
    }
}
