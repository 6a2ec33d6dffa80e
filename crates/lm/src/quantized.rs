//! Matrices in the blocks of GGUF's formats q8_0 and q4_k, with candle's kernels for one row by one row. Which kernel a
//! column is computed by does not depend on the rows of `x`, so a row of a product has the same bits in any company.
//! (candle's own product takes other kernels for other numbers of rows, and keeps threads of its own spinning beside ours.)

use std::ops::Range;

use candle_core::quantized::k_quants::{BlockQ4K, BlockQ8_0};
use candle_core::quantized::{GgmlType, QuantizedType};
use rayon::prelude::*;

use crate::arithmetic::Arithmetic;
use crate::packed::joined;

/// What the inner dimension of every matrix is a multiple of.
pub(crate) const LEAST_BLOCK: usize = BlockQ8_0::BLCK_SIZE;
/// Columns that candle's kernels take at once.
const COLUMNS: usize = 4;
/// Columns of one task where there are few rows; a multiple of [`COLUMNS`].
const TASK_COLUMNS: usize = 128;
/// Up to this many rows the tasks divide the columns, above the rows.
const FEW_ROWS: usize = 16;
/// Blocks that one task quantises.
const TASK_BLOCKS: usize = 1024;

/// A matrix W \[columns, inner\]. "Columns" are those of the product `x W^T`.
#[derive(Debug)]
pub(crate) struct QuantizedMatrix {
    blocks: Blocks,
    columns: usize,
    inner: usize,
}

#[derive(Debug)]
enum Blocks {
    Q8_0(Vec<BlockQ8_0>),
    Q4K(Vec<BlockQ4K>),
}

/// Whether a row is in blocks of 4-bit numbers.
fn is_q4k(arithmetic: Arithmetic, inner: usize) -> bool {
    arithmetic == Arithmetic::Q4K && inner.is_multiple_of(BlockQ4K::BLCK_SIZE)
}

/// Bytes of a row of `inner` numbers.
pub(crate) fn row_bytes(arithmetic: Arithmetic, inner: usize) -> usize {
    match is_q4k(arithmetic, inner) {
        true => inner / BlockQ4K::BLCK_SIZE * size_of::<BlockQ4K>(),
        false => inner / BlockQ8_0::BLCK_SIZE * size_of::<BlockQ8_0>(),
    }
}

impl QuantizedMatrix {
    /// From W row by row, \[columns, inner\]; `inner` is a multiple of [`LEAST_BLOCK`].
    pub(crate) fn from_rows(values: &[f32], inner: usize, arithmetic: Arithmetic) -> Self {
        Self {
            blocks: match is_q4k(arithmetic, inner) {
                true => Blocks::Q4K(quantize(values)),
                false => Blocks::Q8_0(quantize(values)),
            },
            columns: values.len() / inner,
            inner,
        }
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        match &self.blocks {
            Blocks::Q8_0(blocks) => blocks.storage_size_in_bytes(),
            Blocks::Q4K(blocks) => blocks.storage_size_in_bytes(),
        }
    }

    /// Appends row `index` of W, as the numbers that its blocks stand for.
    pub(crate) fn extend_with_row(&self, index: usize, out: &mut Vec<f32>) {
        fn row<T: GgmlType>(blocks: &[T], index: usize, out: &mut [f32]) {
            let count = out.len() / T::BLCK_SIZE;
            T::to_float(&blocks[index * count..][..count], out);
        }
        let from = out.len();
        out.resize(from + self.inner, 0.0);
        match &self.blocks {
            Blocks::Q8_0(blocks) => row(blocks, index, &mut out[from..]),
            Blocks::Q4K(blocks) => row(blocks, index, &mut out[from..]),
        }
    }

    /// `x W^T` for some columns, \[rows of x, columns\], on all threads. The range begins at a multiple of 16.
    pub(crate) fn product(&self, x: &[f32], columns: Range<usize>) -> Vec<f32> {
        match &self.blocks {
            Blocks::Q8_0(blocks) => product(blocks, x, self.inner, columns),
            Blocks::Q4K(blocks) => product(blocks, x, self.inner, columns),
        }
    }
}

fn quantize<T: GgmlType>(values: &[f32]) -> Vec<T> {
    let mut blocks = vec![T::zeros(); values.len() / T::BLCK_SIZE];
    blocks
        .par_chunks_mut(TASK_BLOCKS)
        .zip(values.par_chunks(TASK_BLOCKS * T::BLCK_SIZE))
        .for_each(|(blocks, values)| T::from_float(values, blocks));
    blocks
}

fn product<T: GgmlType>(weights: &[T], x: &[f32], inner: usize, columns: Range<usize>) -> Vec<f32> {
    let count = inner / T::BLCK_SIZE;
    let weights = &weights[columns.start * count..columns.end * count];
    let (rows, width) = (x.len() / inner, columns.len());
    let x: Vec<T::VecDotType> = quantize(x);
    let mut out = vec![0f32; rows * width];
    if rows > FEW_ROWS {
        let share = rows.div_ceil(rayon::current_num_threads()).min(FEW_ROWS);
        out.par_chunks_mut(share * width)
            .zip(x.par_chunks(share * count))
            .for_each(|(out, x)| part(weights, x, count, out));
        return out;
    }
    out.par_chunks_mut(rows * TASK_COLUMNS)
        .zip(weights.par_chunks(TASK_COLUMNS * count))
        .for_each(|(out, weights)| part(weights, &x, count, out));
    joined(&out, rows, width, TASK_COLUMNS)
}

/// All rows of `x` by all of `weights`, \[rows, columns\]; `count` blocks are a row.
fn part<T: GgmlType>(weights: &[T], x: &[T::VecDotType], count: usize, out: &mut [f32]) {
    let (inner, width) = (count * T::BLCK_SIZE, weights.len() / count);
    for (quad, columns) in weights.chunks(COLUMNS * count).enumerate() {
        let mut columns_of = columns.chunks_exact(count);
        let four = (
            columns_of.next(),
            columns_of.next(),
            columns_of.next(),
            columns_of.next(),
        );
        for (row, x) in x.chunks_exact(count).enumerate() {
            let out = &mut out[row * width + quad * COLUMNS..];
            match four {
                (Some(a), Some(b), Some(c), Some(d)) => {
                    (out[0], out[1], out[2], out[3]) = T::vec_dot_4(inner, a, b, c, d, x);
                }
                _ => {
                    for (out, column) in out.iter_mut().zip(columns.chunks_exact(count)) {
                        *out = T::vec_dot(inner, column, x);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
    use candle_core::{Device, Module, Tensor};

    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    fn close(ours: &[f32], theirs: &[f32], tolerance: f32) {
        assert_eq!(ours.len(), theirs.len());
        let scale = theirs.iter().fold(0f32, |a, b| a.max(b.abs()));
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() <= tolerance * scale, "{a} {b}");
        }
    }

    #[test]
    fn products_are_those_of_candle_and_a_row_does_not_depend_on_the_others() {
        for (arithmetic, inner, dtype) in [
            (Arithmetic::Q8_0, 96, GgmlDType::Q8_0),
            (Arithmetic::Q4K, 512, GgmlDType::Q4K),
            (Arithmetic::Q4K, 96, GgmlDType::Q8_0),
        ] {
            let (columns, rows) = (275, 40);
            let (w, x) = (numbers(columns * inner, 1), numbers(rows * inner, 2));
            let matrix = QuantizedMatrix::from_rows(&w, inner, arithmetic);
            assert_eq!(matrix.bytes(), columns * row_bytes(arithmetic, inner));
            let whole = matrix.product(&x, 0..columns);

            let dense = Tensor::from_vec(w.clone(), (columns, inner), &Device::Cpu).expect("a tensor");
            let theirs = QTensor::quantize(&dense, dtype).expect("quantised");
            let table = theirs.dequantize(&Device::Cpu).expect("numbers");
            let table = table
                .flatten_all()
                .and_then(|t| t.to_vec1::<f32>())
                .expect("numbers");
            let mut row = Vec::new();
            matrix.extend_with_row(7, &mut row);
            assert_eq!(row, table[7 * inner..8 * inner]);
            close(
                &row,
                &w[7 * inner..8 * inner],
                if dtype == GgmlDType::Q4K { 0.1 } else { 0.01 },
            );
            let theirs = QMatMul::from_qtensor(theirs).expect("a matrix");
            let input = Tensor::from_vec(x.clone(), (rows, inner), &Device::Cpu).expect("a tensor");
            let theirs = theirs
                .forward(&input)
                .and_then(|t| t.flatten_all())
                .expect("a product");
            close(&whole, &theirs.to_vec1::<f32>().expect("numbers"), 1e-5);

            for (from, to) in [(0, 1), (3, 9), (17, 40)] {
                let some = matrix.product(&x[from * inner..to * inner], 0..columns);
                assert_eq!(some, whole[from * columns..to * columns]);
            }
            let some = matrix.product(&x, 160..columns);
            for (some, whole) in some.chunks(columns - 160).zip(whole.chunks(columns)) {
                assert_eq!(some, &whole[160..]);
            }
        }
    }
}
