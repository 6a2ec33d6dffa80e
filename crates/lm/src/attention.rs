//! Causal attention over a packed ragged batch with grouped queries: each sequence sees its own cache and
//! nothing else. Knows no weights; queries come rotated, keys and values are in the cache already.
//!
//! Work is cut into (sequence, key/value head, block of query rows); the blocks are sized so that the scores
//! of one block stay small, and no \[tokens, tokens, heads\] matrix ever exists.

use rayon::prelude::*;

use crate::ModelConfig;
use crate::kernel::{Vectorized, vectorized};
use crate::kv::LayerKv;
use crate::ops::{dot, exp};
use crate::packed::PackedMatrix;

/// Scores that one block may hold (f32, so 8 MiB).
const BLOCK_SCORES: usize = 2 << 20;
const MAX_BLOCK_ROWS: usize = 128;
/// Up to this many query vectors a block is computed as plain dot products, with no copy of keys or values.
const FEW_QUERIES: usize = 8;

/// The shape of one layer's attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Latest positions a token sees, itself included.
    pub window: Option<usize>,
}

/// The rows of one sequence in the packed batch.
#[derive(Debug)]
pub(crate) struct Span<'a> {
    /// First row in the batch.
    pub row: usize,
    pub rows: usize,
    /// Position of the first row in its sequence.
    pub position: usize,
    /// Holds `position + rows` tokens.
    pub layer: &'a LayerKv,
}

impl AttentionShape {
    pub(crate) fn of(config: &ModelConfig, layer: usize) -> Self {
        Self {
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            window: config.windows[layer],
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

/// One task: some query rows of one sequence against one key/value head.
struct Block<'a> {
    row: usize,
    rows: usize,
    position: usize,
    head: usize,
    layer: &'a LayerKv,
}

/// `queries` is the packed batch with rows of `stride` elements that begin with \[heads, head_dim\]; the
/// result is \[rows, heads * head_dim\].
pub(crate) fn attend(shape: AttentionShape, queries: &[f32], stride: usize, spans: &[Span<'_>]) -> Vec<f32> {
    let blocks = cut(shape, spans);
    let outputs: Vec<Vec<f32>> = blocks
        .par_iter()
        .map(|block| block.attend(shape, queries, stride))
        .collect();
    let rows: usize = spans.iter().map(|span| span.rows).sum();
    let width = shape.heads * shape.head_dim;
    let part = shape.group() * shape.head_dim;
    let mut packed = vec![0f32; rows * width];
    for (block, output) in blocks.iter().zip(&outputs) {
        for (row, values) in output.chunks_exact(part).enumerate() {
            let at = (block.row + row) * width + block.head * part;
            packed[at..at + part].copy_from_slice(values);
        }
    }
    packed
}

fn cut<'a>(shape: AttentionShape, spans: &[Span<'a>]) -> Vec<Block<'a>> {
    let mut blocks = Vec::new();
    for span in spans {
        let seen = span.position + span.rows;
        let rows_at_once = (BLOCK_SCORES / (shape.group() * seen)).clamp(1, MAX_BLOCK_ROWS);
        for from in (0..span.rows).step_by(rows_at_once) {
            for head in 0..shape.kv_heads {
                blocks.push(Block {
                    row: span.row + from,
                    rows: rows_at_once.min(span.rows - from),
                    position: span.position + from,
                    head,
                    layer: span.layer,
                });
            }
        }
    }
    blocks
}

impl Block<'_> {
    /// The result is \[rows, group, head_dim\].
    fn attend(&self, shape: AttentionShape, queries: &[f32], stride: usize) -> Vec<f32> {
        let (dim, group) = (shape.head_dim, shape.group());
        let scale = 1.0 / (dim as f32).sqrt();
        let mut scaled = Vec::with_capacity(self.rows * group * dim);
        for row in self.row..self.row + self.rows {
            let at = row * stride + self.head * group * dim;
            scaled.extend(queries[at..at + group * dim].iter().map(|q| q * scale));
        }
        let from = shape.first_seen(self.position);
        let to = self.position + self.rows;
        let keys = self.layer.keys(self.head, from, to);
        let values = self.layer.values(self.head, from, to);
        let mask = Mask {
            shape,
            position: self.position,
            from,
            to,
        };
        if self.rows * group <= FEW_QUERIES {
            return vectorized(FewQueries {
                queries: &scaled,
                keys,
                values,
                mask,
            });
        }
        let mut scores = PackedMatrix::from_rows(keys, dim).product_here(&scaled);
        vectorized(CausalSoftmax {
            mask,
            scores: &mut scores,
        });
        PackedMatrix::from_columns(values, dim).product_here(&scores)
    }
}

/// What the rows of a block see: rows are \[query row, group\], columns the positions `from..to`.
#[derive(Clone, Copy)]
struct Mask {
    shape: AttentionShape,
    /// Position of the first query row.
    position: usize,
    from: usize,
    to: usize,
}

struct FewQueries<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    mask: Mask,
}

impl Vectorized for FewQueries<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<const FUSED: bool>(self) -> Vec<f32> {
        let dim = self.mask.shape.head_dim;
        let seen = self.mask.to - self.mask.from;
        let mut scores = vec![0f32; self.queries.len() / dim * seen];
        for (position, key) in self.keys.chunks_exact(dim).enumerate() {
            for (query, scores) in self.queries.chunks_exact(dim).zip(scores.chunks_exact_mut(seen)) {
                scores[position] = dot(query, key);
            }
        }
        self.mask.softmax(&mut scores);
        let mut out = vec![0f32; self.queries.len()];
        for (position, value) in self.values.chunks_exact(dim).enumerate() {
            for (out, scores) in out.chunks_exact_mut(dim).zip(scores.chunks_exact(seen)) {
                let weight = scores[position];
                for (out, value) in out.iter_mut().zip(value) {
                    *out += weight * value;
                }
            }
        }
        out
    }
}

struct CausalSoftmax<'a> {
    mask: Mask,
    scores: &'a mut [f32],
}

impl Vectorized for CausalSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        self.mask.softmax(self.scores);
    }
}

impl Mask {
    /// Softmax over what each row sees; the rest of the row becomes 0.
    #[inline(always)]
    fn softmax(&self, scores: &mut [f32]) {
        let group = self.shape.group();
        for (row, scores) in scores.chunks_exact_mut(self.to - self.from).enumerate() {
            let position = self.position + row / group;
            let first = self.shape.first_seen(position) - self.from;
            let last = position + 1 - self.from;
            scores[..first].fill(0.0);
            scores[last..].fill(0.0);
            softmax(&mut scores[first..last]);
        }
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
