//! The fold `W + scale * B A` of a LoRA adapter's factors into a tensor.

use crate::simd::{Loop, widest};

/// Columns that are summed together: their sums stay in registers.
const BLOCK: usize = 16;

/// The factors of one tensor, ready to fold.
#[derive(Debug, Clone)]
pub struct LoraFactors {
    /// `A` \[rank, cols\] by blocks of columns, in each the rows one after the other; the last block is filled with zeros.
    a: Vec<[f64; BLOCK]>,
    /// `B` \[rows, rank\].
    b: Vec<f64>,
    rank: usize,
    cols: usize,
    scale: f64,
}

impl LoraFactors {
    /// Of `A` \[rank, cols\] and `B` \[rows, rank\], neither of them empty.
    pub(crate) fn new(a: &[f64], b: Vec<f64>, rank: usize, scale: f64) -> Self {
        let cols = a.len() / rank;
        let block = |from: usize| {
            a.chunks_exact(cols).map(move |row| {
                let row = &row[from..cols.min(from + BLOCK)];
                std::array::from_fn(|i| row.get(i).copied().unwrap_or(0.0))
            })
        };
        Self {
            a: (0..cols).step_by(BLOCK).flat_map(block).collect(),
            b,
            rank,
            cols,
            scale,
        }
    }

    /// Folds the delta into elements `start..start + values.len()` of the flattened base tensor:
    /// `f32(f64(W) + scale * sum_k B[row, k] A[k, col])`, k in ascending order, one rounding to f32.
    pub fn fold(&self, start: usize, values: &mut [f32]) {
        widest(Fold {
            factors: self,
            start,
            values,
        });
    }
}

struct Fold<'a> {
    factors: &'a LoraFactors,
    start: usize,
    values: &'a mut [f32],
}

impl Loop for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let cols = self.factors.cols;
        let (mut row, col) = (self.start / cols, self.start % cols);
        let head = if col == 0 {
            0
        } else {
            self.values.len().min(cols - col)
        };
        let (head, rest) = self.values.split_at_mut(head);
        if !head.is_empty() {
            self.factors.fold_rows(row, col, [head]);
            row += 1;
        }
        let mut pairs = rest.chunks_exact_mut(2 * cols);
        for pair in &mut pairs {
            self.factors.fold_rows(row, 0, pair.split_at_mut(cols).into());
            row += 2;
        }
        for last in pairs.into_remainder().chunks_mut(cols) {
            self.factors.fold_rows(row, 0, [last]);
            row += 1;
        }
    }
}

impl LoraFactors {
    /// The same columns of neighbouring rows: what is loaded of `A` serves all of them.
    #[inline(always)]
    fn fold_rows<const ROWS: usize>(&self, first: usize, from: usize, mut rows: [&mut [f32]; ROWS]) {
        let b: [&[f64]; ROWS] =
            std::array::from_fn(|r| &self.b[(first + r) * self.rank..(first + r + 1) * self.rank]);
        let to = from + rows.first().map_or(0, |row| row.len());
        let blocks = self.a.chunks_exact(self.rank).enumerate();
        for (index, a) in blocks.take(to.div_ceil(BLOCK)).skip(from / BLOCK) {
            let mut sums = [[0f64; BLOCK]; ROWS];
            for (k, a) in a.iter().enumerate() {
                for (sums, b) in sums.iter_mut().zip(&b) {
                    for (sum, a) in sums.iter_mut().zip(a) {
                        *sum += b[k] * a;
                    }
                }
            }
            let start = index * BLOCK;
            let (low, high) = (start.max(from), (start + BLOCK).min(to));
            for (row, sums) in rows.iter_mut().zip(&sums) {
                let values = &mut row[low - from..high - from];
                match <&mut [f32; BLOCK]>::try_from(&mut *values) {
                    Ok(values) => add(values, sums, self.scale),
                    Err(_) => add(values, &sums[low - start..high - start], self.scale),
                }
            }
        }
    }
}

#[inline(always)]
fn add(values: &mut [f32], sums: &[f64], scale: f64) {
    for (value, sum) in values.iter_mut().zip(sums) {
        *value = (f64::from(*value) + scale * sum) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_run_of_any_shape_is_the_sum_that_is_documented() {
        let mut word = 1u64;
        let mut number = || {
            word = word.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            (word >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        for (rank, rows, cols) in [
            (1, 1, 1),
            (2, 3, 15),
            (3, 5, 16),
            (16, 4, 33),
            (5, 7, 100),
            (8, 1, 64),
        ] {
            let mut numbers = |len: usize| -> Vec<f64> { (0..len).map(|_| number()).collect() };
            let (a, b) = (numbers(rank * cols), numbers(rows * rank));
            let base: Vec<f32> = numbers(rows * cols).into_iter().map(|v| v as f32).collect();
            let factors = LoraFactors::new(&a, b.clone(), rank, 0.37);
            let expected: Vec<f32> = (0..rows * cols)
                .map(|i| {
                    let (row, col) = (i / cols, i % cols);
                    let mut sum = 0.0;
                    for k in 0..rank {
                        sum += b[row * rank + k] * a[k * cols + col];
                    }
                    (f64::from(base[i]) + 0.37 * sum) as f32
                })
                .collect();
            for start in [0, 1, cols / 2, cols - 1, cols, rows * cols - 1] {
                for end in [start + 1, start + cols, start + 2 * cols + 3, rows * cols] {
                    let range = start.min(rows * cols)..end.min(rows * cols);
                    let fold = |run: &dyn Fn(Fold<'_>)| {
                        let mut values = base[range.clone()].to_vec();
                        run(Fold {
                            factors: &factors,
                            start: range.start,
                            values: &mut values,
                        });
                        values
                    };
                    assert_eq!(fold(&|fold| widest(fold)), expected[range.clone()]);
                    assert_eq!(fold(&|fold| fold.run()), expected[range.clone()]);
                }
            }
        }
    }
}
