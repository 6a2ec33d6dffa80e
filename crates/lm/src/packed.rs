//! Matrices packed for products `x W^T`: panels of 16 output columns, each \[inner, 16\], so that one layout is
//! read in sequence whether `x` has one row (decoding, bound by memory) or a thousand (prefill, bound by
//! arithmetic).

use std::borrow::Cow;
use std::ops::Range;

use bytemuck::Pod;
use rayon::prelude::*;

use crate::kernel::{
    Bf16, F32, Instructions, Pairs, PairsAtOnce, TILE_COLUMNS, Unit, Vectorized, bf16_of, f32_of,
    has_pairs_at_once, most_rows, transpose, vectorized, vectorized_at_once, with_rows,
};
use crate::pages::Zeroed;

/// Inner numbers that one pass takes: a panel's share of at most 16 KiB, and that of a tile's rows, stay in the first cache.
const INNER_BLOCK: usize = 256;
/// Rows of `x` that a task of many rows takes.
const ROW_BLOCK: usize = 96;
/// Up to this many rows the tasks divide the columns, above the rows.
const FEW_ROWS: usize = 48;
/// Panels of one task that divides the columns.
const PANELS: usize = 8;
/// Panels that many rows take at once: with 12 rows their sums fill 24 of the 32 registers of AVX-512, and each number of
/// `x` that is loaded is used twice.
const PAIR: usize = 2;

/// A matrix W \[columns, inner\], packed. "Columns" are those of the product.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    panels: Panels,
    columns: usize,
    inner: usize,
}

#[derive(Debug)]
enum Panels {
    F32(Zeroed<[f32; TILE_COLUMNS]>),
    /// Half the memory to read for the same products, to the bit.
    Bf16(Zeroed<[u16; TILE_COLUMNS]>),
    /// Two neighbours of the inner dimension beside each other, for rounded factors.
    Pairs(Zeroed<[[u16; 2]; TILE_COLUMNS]>),
}

impl PackedMatrix {
    /// From W row by row, \[columns, inner\], for products in f32.
    pub(crate) fn from_rows(values: &[f32], inner: usize) -> Self {
        let is_bf16 = |value: &f32| value.to_bits().trailing_zeros() >= 16;
        let panels = match values.par_chunks(1 << 16).all(|part| part.iter().all(is_bf16)) {
            true => Panels::Bf16(pack(values, inner, 1, |v| bf16_of(v[0]))),
            false => Panels::F32(pack(values, inner, 1, |v| v[0])),
        };
        Self::new(panels, values, inner)
    }

    /// As [`PackedMatrix::from_rows`], from rows of little-endian bf16.
    pub(crate) fn from_bf16(rows: &[Cow<'_, [u8]>], inner: usize) -> Self {
        let mut panels = Zeroed::dense(rows.len().div_ceil(TILE_COLUMNS) * inner);
        panels
            .par_chunks_exact_mut(inner)
            .zip(rows.par_chunks(TILE_COLUMNS))
            .for_each(|(panel, rows)| {
                let rows: Vec<&[u8]> = rows.iter().map(|row| &**row).collect();
                transpose(panel, &rows);
            });
        Self {
            panels: Panels::Bf16(panels),
            columns: rows.len(),
            inner,
        }
    }

    /// As [`PackedMatrix::from_rows`], for products of factors rounded to bf16.
    pub(crate) fn rounded(values: &[f32], inner: usize) -> Self {
        Self::new(Panels::Pairs(pack(values, inner, 2, Pairs::pack)), values, inner)
    }

    fn new(panels: Panels, values: &[f32], inner: usize) -> Self {
        Self {
            panels,
            columns: values.len() / inner,
            inner,
        }
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(&panels[..]),
            Panels::Bf16(panels) => size_of_val(&panels[..]),
            Panels::Pairs(panels) => size_of_val(&panels[..]),
        }
    }

    /// Appends row `index` of W.
    pub(crate) fn extend_with_row(&self, index: usize, out: &mut Vec<f32>) {
        let (panel, column) = (index / TILE_COLUMNS, index % TILE_COLUMNS);
        let inner = self.inner;
        match &self.panels {
            Panels::F32(panels) => out.extend(panels[panel * inner..][..inner].iter().map(|v| v[column])),
            Panels::Bf16(panels) => {
                let row = panels[panel * inner..][..inner].iter();
                out.extend(row.map(|v| f32_of(v[column])));
            }
            Panels::Pairs(panels) => {
                let steps = inner.div_ceil(2);
                let row = panels[panel * steps..][..steps].iter();
                out.extend(row.flat_map(|v| v[column]).take(inner).map(f32_of));
            }
        }
    }

    /// `x W^T` for some columns, \[rows of x, columns\], on all threads. The range begins at a panel.
    pub(crate) fn product(&self, x: &[f32], columns: Range<usize>) -> Vec<f32> {
        match &self.panels {
            Panels::F32(panels) => self.product_with::<F32>(x, columns, |x, start, width, out| {
                vectorized(Part::<F32>::new(self, x, panels, start, width, out));
            }),
            Panels::Bf16(panels) => self.product_with::<Bf16>(x, columns, |x, start, width, out| {
                vectorized(Part::<Bf16>::new(self, x, panels, start, width, out));
            }),
            Panels::Pairs(panels) => {
                self.product_with::<Pairs>(x, columns, |x, start, width, out| match has_pairs_at_once() {
                    true => {
                        vectorized_at_once(Part::<PairsAtOnce>::new(self, x, panels, start, width, out));
                    }
                    false => vectorized(Part::<Pairs>::new(self, x, panels, start, width, out)),
                })
            }
        }
    }

    /// `part` adds the columns `start..start + width` for some rows to `out` \[rows, width\].
    fn product_with<U: Unit>(
        &self,
        x: &[f32],
        columns: Range<usize>,
        part: impl Fn(&Rows<U::X>, usize, usize, &mut [f32]) + Sync,
    ) -> Vec<f32> {
        let rows = x.len() / self.inner;
        let width = columns.len();
        let mut out = vec![0f32; rows * width];
        if rows > FEW_ROWS {
            // Few and large tasks keep the panels in cache, but every thread should have as many as the others.
            let share = rows.div_ceil(rayon::current_num_threads());
            let block = share.div_ceil(share.div_ceil(ROW_BLOCK));
            out.par_chunks_mut(block * width)
                .zip(x.par_chunks(block * self.inner))
                .for_each(|(out, x)| part(&Rows::pack::<U>(x, self.inner), columns.start, width, out));
            return out;
        }
        let x = Rows::pack::<U>(x, self.inner);
        let share = PANELS * TILE_COLUMNS;
        out.par_chunks_mut(rows * share)
            .enumerate()
            .for_each(|(task, out)| part(&x, columns.start + task * share, out.len() / rows, out));
        if rows == 1 {
            out
        } else {
            joined(&out, rows, width, share)
        }
    }
}

/// Panels of W, given row by row, with so many numbers a step; columns beyond the last are zeros.
fn pack<W>(
    values: &[f32],
    inner: usize,
    numbers: usize,
    to: impl Fn(&[f32]) -> W + Sync,
) -> Zeroed<[W; TILE_COLUMNS]>
where
    W: Send,
    [W; TILE_COLUMNS]: Pod,
{
    let (columns, steps) = (values.len() / inner, inner.div_ceil(numbers));
    let mut panels = Zeroed::<[W; TILE_COLUMNS]>::dense(columns.div_ceil(TILE_COLUMNS) * steps);
    panels
        .par_chunks_exact_mut(steps)
        .zip(values.par_chunks(inner * TILE_COLUMNS))
        .for_each(|(panel, rows)| {
            for (column, row) in rows.chunks_exact(inner).enumerate() {
                for (packed, values) in panel.iter_mut().zip(row.chunks(numbers)) {
                    packed[column] = to(values);
                }
            }
        });
    panels
}

/// Column stretches \[rows, share\] one after the other become rows.
pub(crate) fn joined(parts: &[f32], rows: usize, width: usize, share: usize) -> Vec<f32> {
    let mut out = vec![0f32; parts.len()];
    for (task, part) in parts.chunks(rows * share).enumerate() {
        let part_width = part.len() / rows;
        for (row, values) in part.chunks_exact(part_width).enumerate() {
            let at = row * width + task * share;
            out[at..at + part_width].copy_from_slice(values);
        }
    }
    out
}

/// Rows of `x` in blocks for the tiles, each block \[steps, rows of the block\].
pub(crate) struct Rows<X> {
    values: Vec<X>,
    steps: usize,
    rows: usize,
    /// Rows of a block; the last one may have fewer.
    block: usize,
}

/// One block of [`Rows`].
pub(crate) struct RowBlock<'a, X> {
    /// The first row.
    pub row: usize,
    pub rows: usize,
    pub values: &'a [X],
}

impl<X: Copy + Default> Rows<X> {
    /// In blocks of nearly the same size.
    #[inline(always)]
    pub(crate) fn pack<U: Unit<X = X>>(x: &[f32], inner: usize) -> Self {
        let (rows, steps) = (x.len() / inner, inner.div_ceil(U::NUMBERS));
        let block = rows.div_ceil(rows.div_ceil(most_rows()).max(1)).max(1);
        let mut values = vec![X::default(); rows * steps];
        let blocks = values.chunks_mut(block * steps);
        for (block, x) in blocks.zip(x.chunks(block * inner)) {
            let rows = x.len() / inner;
            for (row, x) in x.chunks_exact(inner).enumerate() {
                for (packed, numbers) in block.chunks_exact_mut(rows).zip(x.chunks(U::NUMBERS)) {
                    packed[row] = U::pack(numbers);
                }
            }
        }
        Self {
            values,
            steps,
            rows,
            block,
        }
    }

    #[inline(always)]
    pub(crate) fn blocks(&self) -> impl Iterator<Item = RowBlock<'_, X>> {
        (0..self.rows).step_by(self.block).map(|row| {
            let rows = self.block.min(self.rows - row);
            RowBlock {
                row,
                rows,
                values: &self.values[row * self.steps..(row + rows) * self.steps],
            }
        })
    }
}

/// Some columns of the product, for some rows.
struct Part<'a, U: Unit> {
    x: &'a Rows<U::X>,
    panels: &'a [[U::W; TILE_COLUMNS]],
    width: usize,
    out: &'a mut [f32],
}

impl<'a, U: Unit> Part<'a, U> {
    fn new(
        matrix: &PackedMatrix,
        x: &'a Rows<U::X>,
        panels: &'a [[U::W; TILE_COLUMNS]],
        start: usize,
        width: usize,
        out: &'a mut [f32],
    ) -> Self {
        let steps = matrix.inner.div_ceil(U::NUMBERS);
        let first = start / TILE_COLUMNS * steps;
        Self {
            x,
            panels: &panels[first..first + width.div_ceil(TILE_COLUMNS) * steps],
            width,
            out,
        }
    }
}

impl<U: Unit> Vectorized for Part<'_, U> {
    type Output = ();

    #[inline(always)]
    fn run<I: Instructions>(self) {
        match self.x.rows {
            1 => self.few_rows::<I, 1, 8>(),
            2 => self.few_rows::<I, 2, 4>(),
            3 => self.few_rows::<I, 3, 4>(),
            4 => self.few_rows::<I, 4, 2>(),
            _ => self.many_rows::<I>(),
        }
    }
}

impl<U: Unit> Part<'_, U> {
    const BLOCK: usize = INNER_BLOCK / U::NUMBERS;

    /// One block of rows, which reads each panel once: several panels at a time, whole panels one after the other.
    #[inline(always)]
    fn few_rows<I: Instructions, const ROWS: usize, const PANELS: usize>(self) {
        let steps = self.x.steps;
        for (group, panels) in self.panels.chunks(PANELS * steps).enumerate() {
            for from in (0..steps).step_by(Self::BLOCK) {
                let part = from..steps.min(from + Self::BLOCK);
                let x = &self.x.values.as_chunks::<ROWS>().0[part.clone()];
                let out = &mut self.out[group * PANELS * TILE_COLUMNS..];
                let place = Place {
                    width: self.width,
                    columns: self.width - group * PANELS * TILE_COLUMNS,
                };
                match panels.len() == PANELS * steps {
                    true => {
                        let panels = std::array::from_fn(|index| &panels[index * steps..][part.clone()]);
                        place.add::<I, U, ROWS, PANELS>(x, panels, out);
                    }
                    false => {
                        for (index, panel) in panels.chunks_exact(steps).enumerate() {
                            let column = index * TILE_COLUMNS;
                            let place = Place {
                                columns: place.columns - column,
                                ..place
                            };
                            place.add::<I, U, ROWS, 1>(x, [&panel[part.clone()]], &mut out[column..]);
                        }
                    }
                }
            }
        }
    }

    /// All rows on a block of two panels, which stays in the first cache, before the next block of the same panels: their
    /// part of the result stays near too.
    #[inline(always)]
    fn many_rows<I: Instructions>(self) {
        let steps = self.x.steps;
        // Weights that many blocks of rows need are widened once for all of them.
        let widens = U::WIDENS && self.x.rows > self.x.block;
        let none = [<U::Widened as Unit>::W::default(); TILE_COLUMNS];
        let mut wide = [(); PAIR].map(|()| vec![none; if widens { Self::BLOCK.min(steps) } else { 0 }]);
        for (group, panels) in self.panels.chunks(PAIR * steps).enumerate() {
            let column = group * PAIR * TILE_COLUMNS;
            let place = Place {
                width: self.width,
                columns: self.width - column,
            };
            let out = &mut self.out[column..];
            let count = panels.len() / steps;
            for from in (0..steps).step_by(Self::BLOCK) {
                let part = from..steps.min(from + Self::BLOCK);
                // A single last panel is taken twice, and its second sums are dropped.
                let panels: [_; PAIR] =
                    std::array::from_fn(|index| &panels[index.min(count - 1) * steps..][part.clone()]);
                // The constant alone says what is compiled.
                if U::WIDENS && widens {
                    for (wide, panel) in wide.iter_mut().zip(panels) {
                        for (wide, weights) in wide.iter_mut().zip(panel) {
                            *wide = weights.map(U::widened);
                        }
                    }
                    let panels = std::array::from_fn(|index| &wide[index][..part.len()]);
                    place.add_all::<I, U::Widened>(self.x, &part, panels, out);
                } else {
                    place.add_all::<I, U>(self.x, &part, panels, out);
                }
            }
        }
    }
}

/// Where the sums of some panels go.
#[derive(Clone, Copy)]
struct Place {
    /// Between the rows of the result.
    width: usize,
    /// Columns that are left in it.
    columns: usize,
}

impl Place {
    #[inline(always)]
    fn add_all<I: Instructions, U: Unit>(
        self,
        x: &Rows<U::X>,
        part: &Range<usize>,
        panels: [&[[U::W; TILE_COLUMNS]]; PAIR],
        out: &mut [f32],
    ) {
        for block in x.blocks() {
            let x = &block.values[part.start * block.rows..part.end * block.rows];
            let out = &mut out[block.row * self.width..];
            with_rows!(I, block.rows, ROWS => {
                let x = x.as_chunks::<ROWS>().0;
                match ROWS <= U::MOST_ROWS_OF_TWO {
                    true => self.add::<I, U, ROWS, PAIR>(x, panels, out),
                    false => self.add_one_by_one::<I, U, ROWS>(x, panels, out),
                }
            });
        }
    }

    #[inline(always)]
    fn add_one_by_one<I: Instructions, U: Unit, const ROWS: usize>(
        self,
        x: &[[U::X; ROWS]],
        panels: [&[[U::W; TILE_COLUMNS]]; PAIR],
        out: &mut [f32],
    ) {
        for (index, panel) in panels.into_iter().enumerate() {
            let column = index * TILE_COLUMNS;
            if column < self.columns {
                let place = Self {
                    columns: self.columns - column,
                    ..self
                };
                place.add::<I, U, ROWS, 1>(x, [panel], &mut out[column..]);
            }
        }
    }

    /// Adds the products of some rows with some panels to `out`; columns beyond the last are dropped.
    #[inline(always)]
    fn add<I: Instructions, U: Unit, const ROWS: usize, const PANELS: usize>(
        self,
        x: &[[U::X; ROWS]],
        panels: [&[[U::W; TILE_COLUMNS]]; PANELS],
        out: &mut [f32],
    ) {
        let mut sums = [[[0f32; TILE_COLUMNS]; ROWS]; PANELS];
        I::tiles::<ROWS, PANELS, U>(x, panels, &mut sums);
        for (panel, sums) in sums.iter().enumerate() {
            let column = panel * TILE_COLUMNS;
            let columns = TILE_COLUMNS.min(self.columns.saturating_sub(column));
            for (row, sums) in sums.iter().enumerate().filter(|_| columns > 0) {
                let out = &mut out[row * self.width + column..][..columns];
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0)
            .collect()
    }

    fn expected(x: &[f32], weight: &[f32], inner: usize) -> Vec<f32> {
        let dot = |x: &[f32], w: &[f32]| -> f64 {
            x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        x.chunks_exact(inner)
            .flat_map(|x| weight.chunks_exact(inner).map(move |w| dot(x, w) as f32))
            .collect()
    }

    fn assert_close(ours: &[f32], exact: &[f32], what: &str) {
        assert_eq!(ours.len(), exact.len(), "{what}");
        for (a, b) in ours.iter().zip(exact) {
            assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{what}: {a} {b}");
        }
    }

    #[test]
    fn bf16_is_packed_as_its_f32_is() {
        for (columns, inner) in [(1, 1), (16, 32), (37, 75), (48, 576)] {
            // All numbers; what is none may come out as another one that is none.
            let number = |half: u16| if f32_of(half).is_nan() { 0 } else { half };
            let halves: Vec<u16> = (0..columns * inner)
                .map(|i| number((i * 40_503 % 65_536) as u16))
                .collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
            let rows: Vec<Cow<'_, [u8]>> = bytes.chunks(2 * inner).map(Cow::Borrowed).collect();
            let values: Vec<f32> = halves.iter().map(|half| f32_of(*half)).collect();
            let (direct, detour) = (
                PackedMatrix::from_bf16(&rows, inner),
                PackedMatrix::from_rows(&values, inner),
            );
            match (&direct.panels, &detour.panels) {
                (Panels::Bf16(a), Panels::Bf16(b)) => assert_eq!(a[..], b[..]),
                _ => panic!("not bf16"),
            }
            assert_eq!((direct.columns, direct.inner), (detour.columns, detour.inner));
        }
    }

    #[test]
    fn products_of_any_shape_are_right() {
        for (rows, inner, columns) in [
            (1, 5, 3),
            (2, 16, 16),
            (6, 70, 33),
            (7, 600, 100),
            (13, 300, 33),
            (49, 33, 65),
            (200, 1100, 40),
        ] {
            let (x, weight) = (values(rows * inner, 1), values(columns * inner, 2));
            let exact = expected(&x, &weight, inner);
            let what = format!("{rows} x {inner} x {columns}");
            let packed = PackedMatrix::from_rows(&weight, inner);
            assert_close(&packed.product(&x, 0..columns), &exact, &what);
            let mut row = Vec::new();
            packed.extend_with_row(columns - 1, &mut row);
            assert_eq!(row, weight[(columns - 1) * inner..]);
        }
    }

    #[test]
    fn a_range_of_columns_is_a_part_of_the_product() {
        let (x, weight) = (values(3 * 20, 3), values(90 * 20, 4));
        let packed = PackedMatrix::from_rows(&weight, 20);
        assert_eq!(packed.columns(), 90);
        let exact = expected(&x, &weight[32 * 20..80 * 20], 20);
        assert_close(&packed.product(&x, 32..80), &exact, "columns 32..80");
    }

    #[test]
    fn bf16_weights_take_half_the_memory_and_give_the_same_bits() {
        let (columns, inner) = (50, 700);
        let weight: Vec<f32> = values(columns * inner, 7)
            .iter()
            .map(|v| f32::from_bits(v.to_bits() & 0xffff_0000))
            .collect();
        let narrow = PackedMatrix::from_rows(&weight, inner);
        let wide = Panels::F32(pack(&weight, inner, 1, |v| v[0]));
        let wide = PackedMatrix::new(wide, &weight, inner);
        assert_eq!(narrow.bytes() * 2, wide.bytes());
        for rows in [1, 5, 6, 7, 100] {
            let x = values(rows * inner, rows);
            assert_eq!(
                narrow.product(&x, 0..columns),
                wide.product(&x, 0..columns),
                "{rows} rows"
            );
        }
        let (mut a, mut b) = (Vec::new(), Vec::new());
        narrow.extend_with_row(17, &mut a);
        wide.extend_with_row(17, &mut b);
        assert_eq!(a, b);
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        company(1100, PackedMatrix::from_rows);
        company(1101, PackedMatrix::rounded);
    }

    fn company(inner: usize, packed: fn(&[f32], usize) -> PackedMatrix) {
        let columns = 70;
        let packed = packed(&values(columns * inner, 1), inner);
        let x = values(130 * inner, 2);
        let all = packed.product(&x, 0..columns);
        for row in [0, 5, 64, 129] {
            for count in [1, 2, 3, 4, 5, 13] {
                let row = row.min(130 - count);
                let some = packed.product(&x[row * inner..][..count * inner], 0..columns);
                assert_eq!(
                    some,
                    all[row * columns..][..count * columns],
                    "{count} rows from {row}"
                );
            }
        }
    }

    #[test]
    fn bf16_arithmetic_is_that_of_rounded_factors() {
        for (rows, inner, columns) in [(1, 5, 3), (3, 301, 33), (5, 600, 100), (130, 70, 40)] {
            let (x, weight) = (values(rows * inner, 1), values(columns * inner, 2));
            let round = |values: &[f32]| -> Vec<f32> { values.iter().map(|v| f32_of(bf16_of(*v))).collect() };
            let exact = expected(&round(&x), &round(&weight), inner);
            let packed = PackedMatrix::rounded(&weight, inner);
            let what = format!("{rows} x {inner} x {columns}");
            assert_close(&packed.product(&x, 0..columns), &exact, &what);
            let mut row = Vec::new();
            packed.extend_with_row(columns - 1, &mut row);
            assert_eq!(row, round(&weight[(columns - 1) * inner..]));
            assert_eq!(packed.bytes(), columns.div_ceil(16) * 16 * inner.div_ceil(2) * 4);
        }
    }
}
