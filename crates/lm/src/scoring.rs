//! Log-probabilities of given tokens from hidden states: the head is applied to at most [`MAX_ROWS`] rows and
//! [`TILE`] vocabulary columns at a time, with an online logsumexp, so no \[tokens, vocab\] matrix exists.
//! Natural logarithms, f32 from f32 logits.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::kernel::{Instructions, Vectorized, vectorized};
use crate::ops::{exp, with_slice};
use crate::{Decoder, LmError};

/// Hidden rows that go through the head at once.
pub const MAX_ROWS: usize = 1024;
/// Vocabulary columns of one tile.
const TILE: usize = 4096;
/// What stands for -inf and NaN: JSON has neither, and a null would be read as "no token".
pub const NO_LOGPROB: f32 = -9999.0;

/// The log-probability of one token among the likeliest.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub token: u32,
    pub logprob: f32,
    /// Falling by logit, the lowest id first among equals. `token` is always in it, with this very `logprob`.
    pub top: Vec<(u32, f32)>,
}

/// Scores `targets[i]` under the hidden row `i` of `hidden` \[rows, hidden\], with the `top` likeliest tokens.
pub fn score(
    decoder: &Decoder,
    hidden: &Tensor,
    targets: &[u32],
    top: usize,
) -> Result<Vec<TokenLogprobs>, LmError> {
    let targets: Vec<Target> = (0..)
        .zip(targets)
        .map(|(row, token)| Target {
            row,
            token: *token,
            top,
        })
        .collect();
    score_rows(decoder, hidden, &targets)
}

/// A token to be scored under a row of the hidden states.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub row: u32,
    pub token: u32,
    pub top: usize,
}

/// Scores each target, in order.
pub(crate) fn score_rows(
    decoder: &Decoder,
    hidden: &Tensor,
    targets: &[Target],
) -> Result<Vec<TokenLogprobs>, LmError> {
    #[cfg(feature = "cuda")]
    if decoder.summarizes() {
        return score_on_gpu(decoder, hidden, targets);
    }
    let mut scored = Vec::with_capacity(targets.len());
    for targets in targets.chunks(MAX_ROWS) {
        let rows: Vec<u32> = targets.iter().map(|target| target.row).collect();
        let rows = hidden.index_select(&Tensor::from_vec(rows, targets.len(), hidden.device())?, 0)?;
        let mut states: Vec<RowState> = targets.iter().map(|t| RowState::new(t.token, t.top)).collect();
        let vocab = decoder.config().vocab_size;
        for start in (0..vocab).step_by(TILE) {
            let columns = TILE.min(vocab - start);
            let tile = decoder.logits_of(&rows, start..start + columns)?;
            with_slice(&tile, |logits| {
                states
                    .par_iter_mut()
                    .zip(logits.par_chunks_exact(columns))
                    .for_each(|(state, logits)| state.see(start as u32, logits));
            })?;
        }
        scored.extend(states.into_iter().map(RowState::finish));
    }
    Ok(scored)
}

/// Logits that lie in a GPU's memory at once: 256 MiB.
#[cfg(feature = "cuda")]
const GPU_LOGITS: usize = 64 << 20;

#[cfg(feature = "cuda")]
fn score_on_gpu(
    decoder: &Decoder,
    hidden: &Tensor,
    targets: &[Target],
) -> Result<Vec<TokenLogprobs>, LmError> {
    let mut scored = Vec::with_capacity(targets.len());
    let rows_at_once = (GPU_LOGITS / decoder.config().vocab_size).clamp(1, MAX_ROWS);
    for targets in targets.chunks(rows_at_once) {
        let rows: Vec<u32> = targets.iter().map(|target| target.row).collect();
        let tokens: Vec<u32> = targets.iter().map(|target| target.token).collect();
        let top = targets.iter().map(|target| target.top).max().unwrap_or(0);
        let summaries = decoder.summarize(hidden, &rows, &tokens, top);
        let summaries = summaries.transpose()?.unwrap_or_default();
        scored.extend(targets.iter().zip(summaries).map(|(target, mut summary)| {
            summary.top.truncate(target.top);
            let state = RowState {
                target: target.token,
                target_logit: summary.target_logit,
                max: summary.largest,
                sum: summary.sum,
                limit: target.top,
                top: summary.top,
            };
            state.finish()
        }));
    }
    Ok(scored)
}

/// As [`score`], for one row whose logits are at hand.
pub fn score_logits(logits: &[f32], target: u32, top: usize) -> TokenLogprobs {
    let mut state = RowState::new(target, top);
    // In the same tiles: sums of f32 depend on where they are cut.
    for (start, tile) in (0..).step_by(TILE).zip(logits.chunks(TILE)) {
        state.see(start, tile);
    }
    state.finish()
}

impl TokenLogprobs {
    /// As if only the `top` likeliest had been asked for; not more than are there.
    pub(crate) fn with_top(&self, top: usize) -> Self {
        let mut best: Vec<(u32, f32)> = self.top.iter().take(top).copied().collect();
        if !best.iter().any(|(id, _)| *id == self.token) {
            best.push((self.token, self.logprob));
        }
        Self {
            token: self.token,
            logprob: self.logprob,
            top: best,
        }
    }
}

/// What is known of one row after some tiles. NaN logits count as absent.
struct RowState {
    target: u32,
    target_logit: f32,
    max: f32,
    /// Sum of `exp(logit - max)`.
    sum: f64,
    limit: usize,
    /// The best so far, in the order of [`TokenLogprobs::top`].
    top: Vec<(u32, f32)>,
}

impl RowState {
    fn new(target: u32, limit: usize) -> Self {
        Self {
            target,
            target_logit: f32::NEG_INFINITY,
            max: f32::NEG_INFINITY,
            sum: 0.0,
            limit,
            top: Vec::with_capacity(limit + 1),
        }
    }

    fn see(&mut self, start: u32, logits: &[f32]) {
        if let Some(logit) = self
            .target
            .checked_sub(start)
            .and_then(|at| logits.get(at as usize))
        {
            self.target_logit = *logit;
        }
        let max = vectorized(Largest(logits));
        if max > self.max {
            // exp(-inf - max) is 0 here: nothing was summed before the first finite logit.
            self.sum *= f64::from(self.max - max).exp();
            self.max = max;
        }
        if self.max.is_finite() {
            self.sum += vectorized(SumExp {
                logits,
                max: self.max,
            });
        }
        if self.limit > 0 {
            self.keep_best(start, logits);
        }
    }

    fn keep_best(&mut self, start: u32, logits: &[f32]) {
        let mut worst = match self.top.len() < self.limit {
            true => f32::NEG_INFINITY,
            false => self.top[self.limit - 1].1,
        };
        for (at, &logit) in logits.iter().enumerate() {
            // Ids rise, so a later equal logit never displaces an earlier one; NaN compares false.
            if logit > worst {
                let place = self.top.partition_point(|(_, kept)| *kept >= logit);
                self.top.insert(place, (start + at as u32, logit));
                self.top.truncate(self.limit);
                if self.top.len() == self.limit {
                    worst = self.top[self.limit - 1].1;
                }
            }
        }
    }

    fn finish(self) -> TokenLogprobs {
        let log_sum = f64::from(self.max) + self.sum.ln();
        let logprob = |logit: f32| {
            let value = (f64::from(logit) - log_sum) as f32;
            if value.is_finite() { value } else { NO_LOGPROB }
        };
        let mut top: Vec<(u32, f32)> = self
            .top
            .iter()
            .map(|(id, logit)| (*id, logprob(*logit)))
            .collect();
        let chosen = logprob(self.target_logit);
        if !top.iter().any(|(id, _)| *id == self.target) {
            top.push((self.target, chosen));
        }
        TokenLogprobs {
            token: self.target,
            logprob: chosen,
            top,
        }
    }
}

/// The largest value; NaN is passed over.
struct Largest<'a>(&'a [f32]);

impl Vectorized for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<I: Instructions>(self) -> f32 {
        let mut best = [f32::NEG_INFINITY; 16];
        let blocks = self.0.chunks_exact(16);
        let rest = blocks
            .remainder()
            .iter()
            .fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        for block in blocks {
            for (best, value) in best.iter_mut().zip(block) {
                *best = if *value > *best { *value } else { *best };
            }
        }
        best.iter().fold(rest, |a, b| a.max(*b))
    }
}

/// Sum of `exp(logit - max)`: in f32 over short stretches, in f64 over those.
struct SumExp<'a> {
    logits: &'a [f32],
    max: f32,
}

impl Vectorized for SumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Instructions>(self) -> f64 {
        let mut total = 0.0;
        for block in self.logits.chunks(256) {
            let mut sums = [0f32; 16];
            let parts = block.chunks_exact(16);
            let rest: f32 = parts.remainder().iter().map(|v| exp(v - self.max)).sum();
            for part in parts {
                for (sum, value) in sums.iter_mut().zip(part) {
                    *sum += exp(value - self.max);
                }
            }
            total += f64::from(sums.iter().sum::<f32>() + rest);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_give_what_one_pass_gives_and_the_chosen_token_is_always_in_top() {
        let logits: Vec<f32> = (0..1000)
            .map(|i| ((i * 7919) % 1013) as f32 / 90.0 - 5.0)
            .collect();
        let exact = logits.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        let mut tiled = RowState::new(3, 4);
        for (index, tile) in logits.chunks(130).enumerate() {
            tiled.see(index as u32 * 130, tile);
        }
        let (tiled, whole) = (tiled.finish(), score_logits(&logits, 3, 4));
        assert!((f64::from(whole.logprob) - (f64::from(logits[3]) - exact)).abs() < 1e-6);
        assert!((tiled.logprob - whole.logprob).abs() < 1e-6);
        assert_eq!(whole.top.len(), 5);
        assert_eq!(whole.top[4], (3, whole.logprob));
        assert!(whole.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        let ids = |scored: &TokenLogprobs| scored.top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(&tiled), ids(&whole));
    }

    #[test]
    fn a_row_at_hand_is_summed_as_one_that_comes_in_tiles() {
        let logits: Vec<f32> = (0..TILE * 2 + 999)
            .map(|i| ((i * 7919) % 10_007) as f32 / 700.0)
            .collect();
        let mut tiled = RowState::new(5000, 3);
        for (index, tile) in logits.chunks(TILE).enumerate() {
            tiled.see((index * TILE) as u32, tile);
        }
        assert_eq!(tiled.finish(), score_logits(&logits, 5000, 3));
    }

    #[test]
    fn equal_logits_rank_the_lowest_id_first_and_share_one_value() {
        let scored = score_logits(&[1.0, 2.0, 2.0, 2.0], 3, 2);
        assert_eq!(
            scored.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [1, 2, 3]
        );
        assert_eq!(scored.top[0].1, scored.logprob);
        assert_eq!(
            score_logits(&[1.0, 2.0], 1, 1).top,
            [(1, score_logits(&[1.0, 2.0], 1, 0).logprob)]
        );
    }

    #[test]
    fn infinite_and_missing_logits_become_a_number() {
        let scored = score_logits(&[f32::NEG_INFINITY, 0.0, f32::NAN], 0, 3);
        assert_eq!((scored.logprob, scored.top[0]), (NO_LOGPROB, (1, 0.0)));
        assert_eq!(score_logits(&[f32::NAN; 3], 1, 1).logprob, NO_LOGPROB);
        assert_eq!(score_logits(&[f32::INFINITY, 0.0], 0, 1).logprob, NO_LOGPROB);
    }
}
