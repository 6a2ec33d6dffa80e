//! Causal attention over a packed ragged batch with grouped queries, on keys and values where they lie in their blocks:
//! each sequence sees the blocks of its table and nothing else. Knows no weights; queries come rotated, keys and values
//! are in the blocks already.
//!
//! Work is cut into (sequence, key/value head, rows); no \[tokens, tokens, heads\] matrix ever exists. A row's result
//! has the same bits however the work is cut and whatever else is in the batch: every sum runs over the positions in
//! order, in one accumulator.

use rayon::prelude::*;

use crate::ModelConfig;
use crate::kernel::{F32, Instructions, TILE_COLUMNS, Vectorized, vectorized, with_rows};
use crate::kv::{BLOCK_TOKENS, KvLayer};
use crate::ops::{capped, exp};
use crate::packed::Rows;

/// Scores that one task may hold (f32, so 1 MiB: they stay in the second cache).
const TASK_SCORES: usize = 256 << 10;
const MAX_TASK_ROWS: usize = 128;
/// Scores that are not worth a second thread.
const FEW_SCORES: usize = 4096;

/// The shape of one layer's attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Latest positions a token sees, itself included.
    pub window: Option<usize>,
    /// Of the products of queries and keys.
    pub scale: f32,
    pub softcap: Option<f32>,
}

/// The rows of one sequence in the packed batch.
#[derive(Debug)]
pub(crate) struct Span<'a> {
    /// First row in the batch.
    pub row: usize,
    pub rows: usize,
    /// Position of the first row in its sequence.
    pub position: usize,
    /// The sequence's blocks; they hold `position + rows` tokens.
    pub blocks: &'a [u32],
}

impl AttentionShape {
    pub(crate) fn of(config: &ModelConfig, layer: usize) -> Self {
        Self {
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            window: config.windows[layer],
            scale: config.attention_scale as f32,
            softcap: config.attention_softcap,
        }
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first position that the token at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Some query rows of one sequence against one key/value head.
struct Task<'a> {
    row: usize,
    rows: usize,
    position: usize,
    head: usize,
    blocks: &'a [u32],
}

impl Task<'_> {
    fn scores(&self, shape: AttentionShape) -> usize {
        let to = self.position + self.rows;
        self.rows * shape.group() * (to - shape.first_seen(self.position))
    }
}

/// `queries` is the packed batch with rows of `stride` elements that begin with \[heads, head_dim\]; the
/// result is \[rows, heads * head_dim\].
pub(crate) fn attend(
    shape: AttentionShape,
    queries: &[f32],
    stride: usize,
    spans: &[Span<'_>],
    layer: &KvLayer,
) -> Vec<f32> {
    let tasks = cut(shape, spans);
    let run = |task: &Task<'_>| {
        vectorized(Attend {
            task,
            shape,
            layer,
            queries,
            stride,
        })
    };
    let scores: usize = tasks.iter().map(|task| task.scores(shape)).sum();
    let outputs: Vec<Vec<f32>> = match scores <= FEW_SCORES {
        true => tasks.iter().map(run).collect(),
        false => tasks.par_iter().map(run).collect(),
    };
    let rows: usize = spans.iter().map(|span| span.rows).sum();
    let width = shape.heads * shape.head_dim;
    let part = shape.group() * shape.head_dim;
    let mut packed = vec![0f32; rows * width];
    for (task, output) in tasks.iter().zip(&outputs) {
        for (row, values) in output.chunks_exact(part).enumerate() {
            let at = (task.row + row) * width + task.head * part;
            packed[at..at + part].copy_from_slice(values);
        }
    }
    packed
}

fn cut<'a>(shape: AttentionShape, spans: &[Span<'a>]) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    for span in spans {
        let seen = span.position + span.rows;
        let rows_at_once = (TASK_SCORES / (shape.group() * seen)).clamp(1, MAX_TASK_ROWS);
        for from in (0..span.rows).step_by(rows_at_once) {
            for head in 0..shape.kv_heads {
                tasks.push(Task {
                    row: span.row + from,
                    rows: rows_at_once.min(span.rows - from),
                    position: span.position + from,
                    head,
                    blocks: span.blocks,
                });
            }
        }
    }
    tasks
}

struct Attend<'a> {
    task: &'a Task<'a>,
    shape: AttentionShape,
    layer: &'a KvLayer,
    queries: &'a [f32],
    stride: usize,
}

impl Vectorized for Attend<'_> {
    /// \[rows, group, head_dim\].
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<I: Instructions>(self) -> Vec<f32> {
        let (task, shape) = (self.task, self.shape);
        let (dim, group) = (shape.head_dim, shape.group());
        let mut scaled = Vec::with_capacity(task.rows * group * dim);
        for row in task.row..task.row + task.rows {
            let at = row * self.stride + task.head * group * dim;
            scaled.extend(self.queries[at..at + group * dim].iter().map(|q| q * shape.scale));
        }
        let first_block = shape.first_seen(task.position) / BLOCK_TOKENS;
        let to = task.position + task.rows;
        let blocks = &task.blocks[first_block..to.div_ceil(BLOCK_TOKENS)];
        let from = first_block * BLOCK_TOKENS;
        let width = blocks.len() * BLOCK_TOKENS;
        let mut scores = self.scores::<I>(&scaled, blocks, width);
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let position = task.position + row / group;
            let seen = shape.first_seen(position) - from..position + 1 - from;
            scores[..seen.start].fill(0.0);
            scores[seen.end..].fill(0.0);
            let scores = &mut scores[seen];
            if let Some(cap) = shape.softcap {
                scores.iter_mut().for_each(|score| *score = capped(*score, cap));
            }
            softmax(scores);
        }
        self.weighted_values::<I>(&scores, blocks, to - from)
    }
}

impl Attend<'_> {
    /// Products of the queries with the keys of the blocks, \[queries, width\].
    #[inline(always)]
    fn scores<I: Instructions>(&self, queries: &[f32], blocks: &[u32], width: usize) -> Vec<f32> {
        let dim = self.shape.head_dim;
        let count = queries.len() / dim;
        let x = Rows::pack::<F32>(queries, dim);
        let mut scores = vec![0f32; count * width];
        for (index, block) in blocks.iter().enumerate() {
            let keys = self.layer.keys(*block, self.task.head);
            for x in x.blocks() {
                let out = &mut scores[x.row * width + index * BLOCK_TOKENS..];
                with_rows!(I, x.rows, ROWS => score_tile::<I, ROWS>(x.values, keys, out, width));
            }
        }
        scores
    }

    /// Sums of the values of the first `seen` tokens of the blocks, weighted by `weights` \[queries, width\].
    #[inline(always)]
    fn weighted_values<I: Instructions>(&self, weights: &[f32], blocks: &[u32], seen: usize) -> Vec<f32> {
        let dim = self.shape.head_dim;
        let width = blocks.len() * BLOCK_TOKENS;
        let count = weights.len() / width;
        let mut out = vec![0f32; count * dim];
        for x in Rows::pack::<F32>(weights, width).blocks() {
            let out = &mut out[x.row * dim..];
            with_rows!(I, x.rows, ROWS => self.value_tile::<I, ROWS>(x.values, blocks, seen, out));
        }
        out
    }

    /// `x` is \[positions, ROWS\]; `out` \[ROWS, head_dim\].
    #[inline(always)]
    fn value_tile<I: Instructions, const ROWS: usize>(
        &self,
        x: &[f32],
        blocks: &[u32],
        seen: usize,
        out: &mut [f32],
    ) {
        let dim = self.shape.head_dim;
        // Slots beyond the last token hold what was there before.
        let x = &x.as_chunks::<ROWS>().0[..seen];
        for column in (0..dim).step_by(TILE_COLUMNS) {
            let mut sums = [[0f32; TILE_COLUMNS]; ROWS];
            for (block, x) in blocks.iter().zip(x.chunks(BLOCK_TOKENS)) {
                let values = self.layer.values(*block, self.task.head, column / TILE_COLUMNS);
                I::tile::<ROWS, F32>(x, &values[..x.len()], &mut sums);
            }
            let columns = TILE_COLUMNS.min(dim - column);
            for (row, sums) in sums.iter().enumerate() {
                out[row * dim + column..][..columns].copy_from_slice(&sums[..columns]);
            }
        }
    }
}

#[inline(always)]
fn score_tile<I: Instructions, const ROWS: usize>(
    x: &[f32],
    keys: &[[f32; BLOCK_TOKENS]],
    out: &mut [f32],
    width: usize,
) {
    let mut sums = [[0f32; BLOCK_TOKENS]; ROWS];
    I::tile::<ROWS, F32>(x.as_chunks::<ROWS>().0, keys, &mut sums);
    for (row, sums) in sums.iter().enumerate() {
        out[row * width..][..BLOCK_TOKENS].copy_from_slice(sums);
    }
}

#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let mut most = [f32::NEG_INFINITY; 16];
    let blocks = scores.chunks_exact(16);
    let rest = blocks
        .remainder()
        .iter()
        .fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    for block in blocks {
        for (most, score) in most.iter_mut().zip(block) {
            *most = if *score > *most { *score } else { *most };
        }
    }
    let max = most.iter().fold(rest, |a, b| a.max(*b));
    let mut sums = [0f32; 16];
    let mut blocks = scores.chunks_exact_mut(16);
    for block in &mut blocks {
        for (score, sum) in block.iter_mut().zip(&mut sums) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    let mut total: f32 = sums.iter().sum();
    for score in blocks.into_remainder() {
        *score = exp(*score - max);
        total += *score;
    }
    let inverse = 1.0 / total;
    scores.iter_mut().for_each(|score| *score *= inverse);
}
