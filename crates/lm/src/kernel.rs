//! The one file with `unsafe`: choosing the widest instructions of this machine for small loops, and the inner
//! tile of the matrix product. Everything else calls these as safe functions.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

mod unit;

pub(crate) use unit::{Bf16, F32, Pairs, PairsAtOnce, Unit, bf16_of, f32_of};

/// Output columns of one tile; a panel of packed weights has as many.
pub(crate) const TILE_COLUMNS: usize = 16;

/// Bytes ahead that weights are asked for while those before them are used.
#[cfg(target_arch = "x86_64")]
const PREFETCH: usize = 1024;

/// A computation that gains from wide instructions. `run` and all it calls in its loops must be
/// `#[inline(always)]`, or they are compiled for the smallest machine.
pub(crate) trait Vectorized {
    type Output;
    fn run<I: Instructions>(self) -> Self::Output;
}

/// A set of instructions. The results differ only in whether a product is rounded before it is added.
pub(crate) trait Instructions {
    /// Rows of the largest tile whose sums stay in registers: 12 x 16 of the 32 registers of AVX-512, 6 x 16 fill the 16 of
    /// AVX2 as well as they can be.
    const MOST_ROWS: usize = 6;

    /// Adds the product of `x` \[steps, ROWS\] and of each panel \[steps, 16\] to its `sums` \[ROWS, 16\]. Each sum is
    /// one chain over the steps in order, whatever ROWS and PANELS are. Several panels side by side are for so few rows
    /// that one panel's sums would wait for each other. Every panel has as many steps as `x`.
    fn tiles<const ROWS: usize, const PANELS: usize, U: Unit>(
        x: &[[U::X; ROWS]],
        panels: [&[[U::W; TILE_COLUMNS]]; PANELS],
        sums: &mut [[[f32; TILE_COLUMNS]; ROWS]; PANELS],
    );

    /// One panel.
    #[inline(always)]
    fn tile<const ROWS: usize, U: Unit>(
        x: &[[U::X; ROWS]],
        panel: &[[U::W; TILE_COLUMNS]],
        sums: &mut [[f32; TILE_COLUMNS]; ROWS],
    ) {
        Self::tiles::<ROWS, 1, U>(x, [panel], std::array::from_mut(sums));
    }
}

/// Evaluates an expression with the number of rows of a tile, 1 to [`Instructions::MOST_ROWS`], as a constant. What is beyond
/// the instructions' own number is not compiled for them: it is the larger part of the code.
macro_rules! with_rows {
    ($instructions:ident, $rows:expr, $name:ident => $body:expr) => {
        with_rows!(@ $instructions, $rows, $name, $body, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2)
    };
    (@ $instructions:ident, $rows:expr, $name:ident, $body:expr, $($count:literal),*) => {
        match $rows {
            $($count => match $count <= $instructions::MOST_ROWS {
                true => { const $name: usize = $count; $body }
                false => unreachable!("a tile of more rows than there are registers for"),
            })*
            _ => { const $name: usize = 1; $body }
        }
    };
}
pub(crate) use with_rows;

/// Multiplication and addition one after the other.
struct Plain;
/// Both in one instruction, eight at a time or whatever the compiler finds best.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
struct Fused;
/// The same, sixteen at a time.
#[cfg(target_arch = "x86_64")]
struct Wide;

/// Runs `work` with the best instructions there are.
#[inline]
pub(crate) fn vectorized<V: Vectorized>(work: V) -> V::Output {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has the features that the function was compiled for.
            return unsafe { with_avx512(work) };
        }
        // SAFETY: as above.
        return unsafe { with_avx2(work) };
    }
    // NEON, with fused multiply-add, is part of the aarch64 baseline.
    #[cfg(target_arch = "aarch64")]
    return work.run::<Fused>();
    #[cfg(not(target_arch = "aarch64"))]
    work.run::<Plain>()
}

/// Whether the machine multiplies pairs of bf16 in one instruction: whether [`PairsAtOnce`] may be used.
pub(crate) fn has_pairs_at_once() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// As [`vectorized`], for work with [`PairsAtOnce`].
///
/// # Panics
/// If the machine has no such instruction.
#[inline]
pub(crate) fn vectorized_at_once<V: Vectorized>(work: V) -> V::Output {
    assert!(has_pairs_at_once(), "no instruction for pairs of bf16");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the machine has the features that the function was compiled for.
    return unsafe { with_avx512bf16(work) };
    #[cfg(not(target_arch = "x86_64"))]
    vectorized(work)
}

/// [`Instructions::MOST_ROWS`] of what [`vectorized`] runs.
pub(crate) fn most_rows() -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
    {
        return Wide::MOST_ROWS;
    }
    Plain::MOST_ROWS
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<V: Vectorized>(work: V) -> V::Output {
    work.run::<Fused>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn with_avx512<V: Vectorized>(work: V) -> V::Output {
    work.run::<Wide>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16,avx2,fma")]
fn with_avx512bf16<V: Vectorized>(work: V) -> V::Output {
    work.run::<Wide>()
}

impl Instructions for Plain {
    #[inline(always)]
    fn tiles<const ROWS: usize, const PANELS: usize, U: Unit>(
        x: &[[U::X; ROWS]],
        panels: [&[[U::W; TILE_COLUMNS]]; PANELS],
        sums: &mut [[[f32; TILE_COLUMNS]; ROWS]; PANELS],
    ) {
        // Without the instruction, `mul_add` is a library call.
        tiles_with::<ROWS, PANELS, U>(x, panels, sums, |a, b, c| a * b + c);
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Instructions for Fused {
    /// 6 x 16 sums fill the 16 vector registers of AVX2 as well as they can be.
    #[inline(always)]
    fn tiles<const ROWS: usize, const PANELS: usize, U: Unit>(
        x: &[[U::X; ROWS]],
        panels: [&[[U::W; TILE_COLUMNS]]; PANELS],
        sums: &mut [[[f32; TILE_COLUMNS]; ROWS]; PANELS],
    ) {
        tiles_with::<ROWS, PANELS, U>(x, panels, sums, f32::mul_add);
    }
}

#[inline(always)]
fn tiles_with<const ROWS: usize, const PANELS: usize, U: Unit>(
    x: &[[U::X; ROWS]],
    panels: [&[[U::W; TILE_COLUMNS]]; PANELS],
    sums: &mut [[[f32; TILE_COLUMNS]; ROWS]; PANELS],
    multiply_add: impl Fn(f32, f32, f32) -> f32,
) {
    for (panel, sums) in panels.into_iter().zip(sums) {
        // A copy that is not borrowed stays in registers.
        let mut held = *sums;
        for (x, weights) in x.iter().zip(panel) {
            let weights = weights.map(U::widen_weight);
            for (sums, x) in held.iter_mut().zip(x) {
                let x = U::widen(*x);
                for (sum, weight) in sums.iter_mut().zip(&weights) {
                    *sum = U::add(x, *weight, *sum, &multiply_add);
                }
            }
        }
        *sums = held;
    }
}

#[cfg(target_arch = "x86_64")]
impl Instructions for Wide {
    const MOST_ROWS: usize = 12;

    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    fn tiles<const ROWS: usize, const PANELS: usize, U: Unit>(
        x: &[[U::X; ROWS]],
        panels: [&[[U::W; TILE_COLUMNS]]; PANELS],
        sums: &mut [[[f32; TILE_COLUMNS]; ROWS]; PANELS],
    ) {
        assert!(panels.iter().all(|panel| panel.len() == x.len()));
        // SAFETY: work with these instructions and units is run only after the machine was asked for them. The pointers
        // are to sixteen f32 each; every panel has as many steps as `x`; a prefetch may name any address.
        unsafe {
            // Loops of constant length over indices: the compiler keeps `held` in registers only if all are unrolled.
            let mut held = [[_mm512_setzero_ps(); ROWS]; PANELS];
            for panel in 0..PANELS {
                for row in 0..ROWS {
                    held[panel][row] = _mm512_loadu_ps(sums[panel][row].as_ptr());
                }
            }
            for (at, x) in x.iter().enumerate() {
                let weights: [U::Register; PANELS] = std::array::from_fn(|panel| {
                    let place = panels[panel].as_ptr().add(at);
                    // Few rows wait for memory.
                    if ROWS < 5 {
                        _mm_prefetch::<_MM_HINT_T0>(place.cast::<i8>().wrapping_add(PREFETCH));
                    }
                    U::load(&*place)
                });
                if ROWS * (PANELS + 1) + PANELS <= 30 {
                    let x = x.map(|x| U::broadcast(x));
                    for panel in 0..PANELS {
                        for row in 0..ROWS {
                            held[panel][row] = U::add_wide(x[row], weights[panel], held[panel][row]);
                        }
                    }
                } else {
                    // There is a register for one number of `x` at a time.
                    for row in 0..ROWS {
                        let x = U::broadcast(x[row]);
                        for panel in 0..PANELS {
                            held[panel][row] = U::add_wide(x, weights[panel], held[panel][row]);
                        }
                    }
                }
            }
            for panel in 0..PANELS {
                for row in 0..ROWS {
                    _mm512_storeu_ps(sums[panel][row].as_mut_ptr(), held[panel][row]);
                }
            }
        }
    }
}

/// Rows of little-endian numbers become the first columns of a panel, which has as many steps as a row has numbers.
pub(crate) fn transpose(panel: &mut [[u16; TILE_COLUMNS]], rows: &[&[u8]]) {
    let steps = panel.len();
    assert!(rows.len() <= TILE_COLUMNS && rows.iter().all(|row| row.len() == 2 * steps));
    #[cfg(target_arch = "x86_64")]
    let done = match <&[&[u8]; TILE_COLUMNS]>::try_from(rows) {
        // SAFETY: SSE2 is part of every x86-64.
        Ok(rows) => unsafe { transpose_sse2(panel, rows) },
        Err(_) => 0,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    // A few cache lines at a time.
    const STEPS: usize = 32;
    for (block, steps) in panel[done..].chunks_mut(STEPS).enumerate() {
        let from = 2 * (done + STEPS * block);
        for (column, row) in rows.iter().enumerate() {
            let numbers = row[from..from + 2 * steps.len()].chunks_exact(2);
            for (step, number) in steps.iter_mut().zip(numbers) {
                step[column] = u16::from_le_bytes([number[0], number[1]]);
            }
        }
    }
}

/// Eight steps of all rows at a time; says how many steps it did.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
fn transpose_sse2(panel: &mut [[u16; TILE_COLUMNS]], rows: &[&[u8]; TILE_COLUMNS]) -> usize {
    const HALF: usize = TILE_COLUMNS / 2;
    let (blocks, _) = panel.as_chunks_mut::<HALF>();
    for (index, block) in blocks.iter_mut().enumerate() {
        for half in 0..2 {
            let mut square = [_mm_setzero_si128(); HALF];
            for (register, row) in square.iter_mut().zip(&rows[half * HALF..]) {
                let bytes = row.as_chunks::<16>().0[index];
                let number = u128::from_le_bytes(bytes);
                *register = _mm_set_epi64x((number >> 64) as i64, number as i64);
            }
            // Three perfect shuffles of eight by eight.
            for _ in 0..3 {
                let [a, b, c, d, e, f, g, h] = square;
                square = [
                    _mm_unpacklo_epi16(a, e),
                    _mm_unpackhi_epi16(a, e),
                    _mm_unpacklo_epi16(b, f),
                    _mm_unpackhi_epi16(b, f),
                    _mm_unpacklo_epi16(c, g),
                    _mm_unpackhi_epi16(c, g),
                    _mm_unpacklo_epi16(d, h),
                    _mm_unpackhi_epi16(d, h),
                ];
            }
            for (step, register) in block.iter_mut().zip(square) {
                let low = _mm_cvtsi128_si64(register) as u64;
                let high = _mm_cvtsi128_si64(_mm_unpackhi_epi64(register, register)) as u64;
                let numbers: [u16; HALF] = std::array::from_fn(|at| match at < 4 {
                    true => (low >> (16 * at)) as u16,
                    false => (high >> (16 * (at - 4))) as u16,
                });
                step[half * HALF..][..HALF].copy_from_slice(&numbers);
            }
        }
    }
    blocks.len() * HALF
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One tile with units of some kind.
    struct Tile<'a, U: Unit>(&'a [U::X], &'a [[U::W; TILE_COLUMNS]]);

    impl<U: Unit> Vectorized for Tile<'_, U> {
        type Output = [[f32; TILE_COLUMNS]; 5];

        #[inline(always)]
        fn run<I: Instructions>(self) -> Self::Output {
            let mut sums = [[0.5; TILE_COLUMNS]; 5];
            I::tile::<5, U>(self.0.as_chunks().0, self.1, &mut sums);
            sums
        }
    }

    const STEPS: usize = 300;

    fn x() -> Vec<f32> {
        (0..5 * STEPS)
            .map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0)
            .collect()
    }

    fn weights() -> Vec<[u16; TILE_COLUMNS]> {
        (0..STEPS as u16)
            .map(|i| std::array::from_fn(|c| 0x3f00 + (i * 7 + c as u16 * 13) % 200))
            .collect()
    }

    fn assert_close(ours: [[f32; TILE_COLUMNS]; 5], exact: [[f32; TILE_COLUMNS]; 5], tolerance: f32) {
        for (a, b) in ours.iter().flatten().zip(exact.iter().flatten()) {
            assert!((a - b).abs() < tolerance, "{a} {b}");
        }
    }

    #[test]
    fn fused_tiles_have_the_same_bits_in_registers_of_any_width() {
        let (x, panel) = (x(), weights());
        let wide: Vec<[f32; TILE_COLUMNS]> = panel.iter().map(|p| p.map(f32_of)).collect();
        let fused = vectorized(Tile::<F32>(&x, &wide));
        assert_eq!(vectorized(Tile::<Bf16>(&x, &panel)), fused);
        assert_close(fused, Tile::<F32>(&x, &wide).run::<Plain>(), 1e-3);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the machine has both features.
            let narrow = unsafe { with_avx2(Tile::<Bf16>(&x, &panel)) };
            assert_eq!(narrow, fused);
        }
    }

    #[test]
    fn pairs_of_bf16_give_the_sum_of_their_products() {
        let x: Vec<f32> = x().into_iter().map(|v| f32_of(bf16_of(v))).collect();
        let panel = weights();
        let wide: Vec<[f32; TILE_COLUMNS]> = panel.iter().map(|p| p.map(f32_of)).collect();
        let exact = vectorized(Tile::<F32>(&x, &wide));
        // Row by row the even steps beside the odd ones.
        let pairs_of_x: Vec<[u16; 2]> = (0..STEPS / 2)
            .flat_map(|step| (0..5).map(move |row| [2 * step * 5 + row, (2 * step + 1) * 5 + row]))
            .map(|pair| pair.map(|at| bf16_of(x[at])))
            .collect();
        let pairs: Vec<[[u16; 2]; TILE_COLUMNS]> = panel
            .chunks_exact(2)
            .map(|two| std::array::from_fn(|c| [two[0][c], two[1][c]]))
            .collect();
        assert_close(Tile::<Pairs>(&pairs_of_x, &pairs).run::<Plain>(), exact, 1e-3);
        assert_close(vectorized(Tile::<Pairs>(&pairs_of_x, &pairs)), exact, 1e-3);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the machine has both features.
            let at_once = unsafe { with_avx512bf16(Tile::<PairsAtOnce>(&pairs_of_x, &pairs)) };
            assert_close(at_once, exact, 1e-3);
        }
    }

    #[test]
    fn bf16_is_rounded_to_the_nearest_and_nan_stays() {
        for (value, bits) in [
            (1.0f32, 0x3f80),
            (1.003_906_3, 0x3f80), // halfway: to even
            (1.011_718_8, 0x3f82),
            (1.004, 0x3f81),
            (-0.0, 0x8000),
            (f32::MAX, 0x7f80),
            (f32::NEG_INFINITY, 0xff80),
        ] {
            assert_eq!(bf16_of(value), bits, "{value}");
        }
        assert!(f32_of(bf16_of(f32::NAN)).is_nan() && f32_of(bf16_of(f32::from_bits(0x7f80_0001))).is_nan());
    }
}
