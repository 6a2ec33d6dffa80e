//! The one file with `unsafe`: choosing the widest instructions of this machine for small loops, and the inner
//! tile of the matrix product. Everything else calls these as safe functions.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Output columns of one tile; a panel of packed weights has as many.
pub(crate) const TILE_COLUMNS: usize = 16;

/// A computation that gains from wide instructions. `run` and all it calls in its loops must be
/// `#[inline(always)]`, or they are compiled for the smallest machine.
pub(crate) trait Vectorized {
    type Output;
    fn run<I: Instructions>(self) -> Self::Output;
}

/// A set of instructions. The results differ only in whether a product is rounded before it is added.
pub(crate) trait Instructions {
    /// Adds the product of `x` \[inner, ROWS\] and `panel` \[inner, 16\] to `sums` \[ROWS, 16\]. Each sum is one chain
    /// over the inner elements in order, whatever ROWS is.
    fn tile<const ROWS: usize, W: Weight>(
        x: &[[f32; ROWS]],
        panel: &[[W; TILE_COLUMNS]],
        sums: &mut [[f32; TILE_COLUMNS]; ROWS],
    );
}

/// Evaluates an expression with the number of rows of a tile, 1 to 12, as a constant.
macro_rules! with_rows {
    ($rows:expr, $name:ident => $body:expr) => {
        with_rows!(@ $rows, $name, $body, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2)
    };
    (@ $rows:expr, $name:ident, $body:expr, $($count:literal),*) => {
        match $rows {
            $($count => { const $name: usize = $count; $body })*
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

/// Rows of the largest tile whose sums stay in registers: 12 x 16 of the 32 registers of AVX-512, 6 x 16 fill the 16 of
/// AVX2 as well as they can be.
pub(crate) fn most_rows() -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return 12;
    }
    6
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

/// A packed weight: f32, or bf16 that is widened in a register. The numbers are the same.
pub(crate) trait Weight: Copy + Send + Sync {
    /// Whether many rows gain from a block of weights that is widened once for all of them.
    const WIDENS: bool;
    fn widen(self) -> f32;
    /// Sixteen of them.
    ///
    /// # Safety
    /// The machine has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(panel: &[Self; TILE_COLUMNS]) -> __m512;
}

impl Weight for f32 {
    const WIDENS: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(panel: &[Self; TILE_COLUMNS]) -> __m512 {
        // SAFETY: the pointer is to sixteen f32; the caller vouches for the feature.
        unsafe { _mm512_loadu_ps(panel.as_ptr()) }
    }
}

/// The upper half of the f32.
impl Weight for u16 {
    const WIDENS: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(panel: &[Self; TILE_COLUMNS]) -> __m512 {
        // SAFETY: the pointer is to sixteen u16; the caller vouches for the feature.
        unsafe {
            let halves = _mm256_loadu_si256(panel.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }
}

#[inline(always)]
fn tile_with<const ROWS: usize, W: Weight>(
    x: &[[f32; ROWS]],
    panel: &[[W; TILE_COLUMNS]],
    sums: &mut [[f32; TILE_COLUMNS]; ROWS],
    multiply_add: impl Fn(f32, f32, f32) -> f32,
) {
    // A copy that is not borrowed stays in registers.
    let mut held = *sums;
    for (x, weights) in x.iter().zip(panel) {
        let weights = weights.map(W::widen);
        for (sums, x) in held.iter_mut().zip(x) {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                *sum = multiply_add(*x, *weight, *sum);
            }
        }
    }
    *sums = held;
}

impl Instructions for Plain {
    #[inline(always)]
    fn tile<const ROWS: usize, W: Weight>(
        x: &[[f32; ROWS]],
        panel: &[[W; TILE_COLUMNS]],
        sums: &mut [[f32; TILE_COLUMNS]; ROWS],
    ) {
        // Without the instruction, `mul_add` is a library call.
        tile_with(x, panel, sums, |a, b, c| a * b + c);
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Instructions for Fused {
    /// 6 x 16 sums fill the 16 vector registers of AVX2 as well as they can be.
    #[inline(always)]
    fn tile<const ROWS: usize, W: Weight>(
        x: &[[f32; ROWS]],
        panel: &[[W; TILE_COLUMNS]],
        sums: &mut [[f32; TILE_COLUMNS]; ROWS],
    ) {
        tile_with(x, panel, sums, f32::mul_add);
    }
}

#[cfg(target_arch = "x86_64")]
impl Instructions for Wide {
    #[inline(always)]
    fn tile<const ROWS: usize, W: Weight>(
        x: &[[f32; ROWS]],
        panel: &[[W; TILE_COLUMNS]],
        sums: &mut [[f32; TILE_COLUMNS]; ROWS],
    ) {
        // SAFETY: only `with_avx512` runs work with these instructions, after the machine was asked for them. The
        // pointers are to sixteen f32 each.
        unsafe {
            let mut held = [_mm512_setzero_ps(); ROWS];
            for (held, sums) in held.iter_mut().zip(sums.iter()) {
                *held = _mm512_loadu_ps(sums.as_ptr());
            }
            for (x, weights) in x.iter().zip(panel) {
                let weights = W::load(weights);
                for (held, x) in held.iter_mut().zip(x) {
                    *held = _mm512_fmadd_ps(_mm512_set1_ps(*x), weights, *held);
                }
            }
            for (held, sums) in held.iter().zip(sums.iter_mut()) {
                _mm512_storeu_ps(sums.as_mut_ptr(), *held);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs one tile with each set of instructions that this machine has.
    struct Tile<'a, W>(&'a [f32], &'a [[W; TILE_COLUMNS]]);

    impl<W: Weight> Vectorized for Tile<'_, W> {
        type Output = [[f32; TILE_COLUMNS]; 5];

        #[inline(always)]
        fn run<I: Instructions>(self) -> Self::Output {
            let mut sums = [[0.5; TILE_COLUMNS]; 5];
            I::tile::<5, W>(self.0.as_chunks().0, self.1, &mut sums);
            sums
        }
    }

    #[test]
    fn fused_tiles_have_the_same_bits_in_registers_of_any_width() {
        let x: Vec<f32> = (0..5 * 300)
            .map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0)
            .collect();
        let panel: Vec<[u16; TILE_COLUMNS]> = (0..300u16)
            .map(|i| std::array::from_fn(|c| 0x3f00 + (i * 7 + c as u16 * 13) % 200))
            .collect();
        let wide: Vec<[f32; TILE_COLUMNS]> = panel.iter().map(|p| p.map(Weight::widen)).collect();
        assert_eq!(vectorized(Tile(&x, &panel)), vectorized(Tile(&x, &wide)));
        let plain = Tile(&x, &wide).run::<Plain>();
        for (a, b) in vectorized(Tile(&x, &wide))
            .iter()
            .flatten()
            .zip(plain.iter().flatten())
        {
            assert!((a - b).abs() < 1e-3, "{a} {b}");
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the machine has both features.
            let narrow = unsafe { with_avx2(Tile(&x, &panel)) };
            assert_eq!(narrow, vectorized(Tile(&x, &panel)));
        }
    }
}
