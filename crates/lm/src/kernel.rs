//! The one file with `unsafe`: choosing the widest instructions of this machine for small loops, and the inner
//! tile of the matrix product. Everything else calls these as safe functions.
#![allow(unsafe_code)]

/// Output columns of one tile; a panel of packed weights has as many.
pub(crate) const TILE_COLUMNS: usize = 16;
/// Most rows of one tile: 6 x 16 sums fill the 16 vector registers of AVX2 as well as they can be.
pub(crate) const TILE_ROWS: usize = 6;

/// A computation that gains from wide instructions. `run` and all it calls in its loops must be
/// `#[inline(always)]`, or they are compiled for the smallest machine.
pub(crate) trait Vectorized {
    type Output;
    /// `FUSED`: the machine multiplies and adds in one instruction.
    fn run<const FUSED: bool>(self) -> Self::Output;
}

/// Runs `work` with the best instructions there are.
#[inline]
pub(crate) fn vectorized<V: Vectorized>(work: V) -> V::Output {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the machine has both features that the function was compiled for.
        return unsafe { with_avx2(work) };
    }
    // NEON, with fused multiply-add, is part of the aarch64 baseline.
    #[cfg(target_arch = "aarch64")]
    return work.run::<true>();
    #[cfg(not(target_arch = "aarch64"))]
    work.run::<false>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<V: Vectorized>(work: V) -> V::Output {
    work.run::<true>()
}

#[inline(always)]
pub(crate) fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction, `mul_add` is a library call.
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// A packed weight: f32, or bf16 that is widened in a register. The numbers are the same.
pub(crate) trait Weight: Copy + Send + Sync {
    /// Whether many rows gain from a block of weights that is widened once for all of them.
    const WIDENS: bool;
    fn widen(self) -> f32;
}

impl Weight for f32 {
    const WIDENS: bool = false;
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// The upper half of the f32.
impl Weight for u16 {
    const WIDENS: bool = true;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// Adds the product of `x` \[inner, ROWS\] and `panel` \[inner, 16\] to `sums` \[ROWS, 16\]. Each sum is one chain
/// over the inner elements in order, whatever ROWS is.
#[inline(always)]
pub(crate) fn tile<const FUSED: bool, const ROWS: usize, W: Weight>(
    x: &[[f32; ROWS]],
    panel: &[[W; TILE_COLUMNS]],
    sums: &mut [[f32; TILE_COLUMNS]; ROWS],
) {
    // A copy that is not borrowed stays in registers.
    let mut held = *sums;
    for (x, weights) in x.iter().zip(panel) {
        let weights = weights.map(W::widen);
        for (sums, x) in held.iter_mut().zip(x) {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                *sum = multiply_add::<FUSED>(*x, *weight, *sum);
            }
        }
    }
    *sums = held;
}
