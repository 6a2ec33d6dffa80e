//! What a step of the inner dimension of a product is: one number, or two that are multiplied at once.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::TILE_COLUMNS;

/// How an element of `x` meets one of each of sixteen columns of the weight.
pub(crate) trait Unit: Send + Sync {
    type X: Copy + Default + Send + Sync;
    type W: Copy + Default + Send + Sync;
    /// Both as f32.
    type Wide: Copy;
    #[cfg(target_arch = "x86_64")]
    type Register: Copy;
    /// The unit with widened weights, which gives the same bits; and whether it is worth it.
    type Widened: Unit<X = Self::X>;
    const WIDENS: bool = false;
    /// Numbers of one step.
    const NUMBERS: usize;
    /// Rows up to which two panels at once are faster than one after the other.
    const MOST_ROWS_OF_TWO: usize = 8;

    /// Of at most `NUMBERS` numbers; those beyond are zeros.
    fn pack(numbers: &[f32]) -> Self::X;
    fn widen(x: Self::X) -> Self::Wide;
    fn widen_weight(weight: Self::W) -> Self::Wide;
    fn widened(weight: Self::W) -> <Self::Widened as Unit>::W;
    fn add(x: Self::Wide, weight: Self::Wide, sum: f32, multiply_add: &impl Fn(f32, f32, f32) -> f32) -> f32;

    /// # Safety
    /// The machine has AVX-512F, here and below; and AVX512-BF16 for [`PairsAtOnce`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn broadcast(x: Self::X) -> Self::Register;
    /// # Safety
    /// As above.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(weights: &[Self::W; TILE_COLUMNS]) -> Self::Register;
    /// # Safety
    /// As above.
    #[cfg(target_arch = "x86_64")]
    unsafe fn add_wide(x: Self::Register, weights: Self::Register, sums: __m512) -> __m512;
}

/// f32 by f32.
#[derive(Debug)]
pub(crate) struct F32;
/// f32 by bf16, which is widened in a register: the same bits as [`F32`] with the wide weight.
#[derive(Debug)]
pub(crate) struct Bf16;
/// Two bf16 by two bf16; their exact products are added one after the other, the second first.
#[derive(Debug)]
pub(crate) struct Pairs;
/// The same in one instruction, which takes numbers below the normal ones for zeros.
#[derive(Debug)]
pub(crate) struct PairsAtOnce;

/// The nearest bf16, the even one of two. NaN stays.
#[inline(always)]
pub(crate) fn bf16_of(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    if value.is_nan() { quiet } else { rounded }
}

#[inline(always)]
pub(crate) fn f32_of(bf16: u16) -> f32 {
    f32::from_bits(u32::from(bf16) << 16)
}

impl Unit for F32 {
    type X = f32;
    type W = f32;
    type Wide = f32;
    #[cfg(target_arch = "x86_64")]
    type Register = __m512;
    type Widened = F32;
    const NUMBERS: usize = 1;

    #[inline(always)]
    fn pack(numbers: &[f32]) -> f32 {
        numbers[0]
    }

    #[inline(always)]
    fn widen(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn widen_weight(weight: f32) -> f32 {
        weight
    }

    #[inline(always)]
    fn widened(weight: f32) -> f32 {
        weight
    }

    #[inline(always)]
    fn add(x: f32, weight: f32, sum: f32, multiply_add: &impl Fn(f32, f32, f32) -> f32) -> f32 {
        multiply_add(x, weight, sum)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn broadcast(x: f32) -> __m512 {
        // SAFETY: the caller vouches for the feature; so below.
        unsafe { _mm512_set1_ps(x) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(weights: &[f32; TILE_COLUMNS]) -> __m512 {
        // SAFETY: the pointer is to sixteen f32.
        unsafe { _mm512_loadu_ps(weights.as_ptr()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn add_wide(x: __m512, weights: __m512, sums: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(x, weights, sums) }
    }
}

impl Unit for Bf16 {
    type X = f32;
    type W = u16;
    type Wide = f32;
    #[cfg(target_arch = "x86_64")]
    type Register = __m512;
    type Widened = F32;
    const WIDENS: bool = true;
    const NUMBERS: usize = 1;

    #[inline(always)]
    fn pack(numbers: &[f32]) -> f32 {
        numbers[0]
    }

    #[inline(always)]
    fn widen(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn widen_weight(weight: u16) -> f32 {
        f32_of(weight)
    }

    #[inline(always)]
    fn widened(weight: u16) -> f32 {
        f32_of(weight)
    }

    #[inline(always)]
    fn add(x: f32, weight: f32, sum: f32, multiply_add: &impl Fn(f32, f32, f32) -> f32) -> f32 {
        multiply_add(x, weight, sum)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn broadcast(x: f32) -> __m512 {
        // SAFETY: the caller vouches for the feature; so below.
        unsafe { _mm512_set1_ps(x) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(weights: &[u16; TILE_COLUMNS]) -> __m512 {
        // SAFETY: the pointer is to sixteen u16.
        unsafe {
            let halves = _mm256_loadu_si256(weights.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn add_wide(x: __m512, weights: __m512, sums: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(x, weights, sums) }
    }
}

#[inline(always)]
fn pair_of(numbers: &[f32]) -> [u16; 2] {
    [bf16_of(numbers[0]), numbers.get(1).map_or(0, |v| bf16_of(*v))]
}

#[inline(always)]
fn add_pair(x: [f32; 2], weight: [f32; 2], sum: f32, multiply_add: &impl Fn(f32, f32, f32) -> f32) -> f32 {
    multiply_add(x[0], weight[0], multiply_add(x[1], weight[1], sum))
}

impl Unit for Pairs {
    type X = [u16; 2];
    type W = [u16; 2];
    type Wide = [f32; 2];
    #[cfg(target_arch = "x86_64")]
    type Register = [__m512; 2];
    type Widened = Pairs;
    const NUMBERS: usize = 2;

    #[inline(always)]
    fn pack(numbers: &[f32]) -> [u16; 2] {
        pair_of(numbers)
    }

    #[inline(always)]
    fn widen(x: [u16; 2]) -> [f32; 2] {
        x.map(f32_of)
    }

    #[inline(always)]
    fn widen_weight(weight: [u16; 2]) -> [f32; 2] {
        weight.map(f32_of)
    }

    #[inline(always)]
    fn widened(weight: [u16; 2]) -> [u16; 2] {
        weight
    }

    #[inline(always)]
    fn add(x: [f32; 2], weight: [f32; 2], sum: f32, multiply_add: &impl Fn(f32, f32, f32) -> f32) -> f32 {
        add_pair(x, weight, sum, multiply_add)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn broadcast(x: [u16; 2]) -> [__m512; 2] {
        // SAFETY: the caller vouches for the feature; so below.
        unsafe { x.map(|x| _mm512_set1_ps(f32_of(x))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(weights: &[[u16; 2]; TILE_COLUMNS]) -> [__m512; 2] {
        // SAFETY: the pointer is to sixteen pairs, the first of each in the lower half.
        unsafe {
            let both = _mm512_loadu_si512(weights.as_ptr().cast());
            let second = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)),
                _mm512_castsi512_ps(second),
            ]
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn add_wide(x: [__m512; 2], weights: [__m512; 2], sums: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(x[0], weights[0], _mm512_fmadd_ps(x[1], weights[1], sums)) }
    }
}

impl Unit for PairsAtOnce {
    type X = [u16; 2];
    type W = [u16; 2];
    type Wide = [f32; 2];
    #[cfg(target_arch = "x86_64")]
    type Register = __m512bh;
    type Widened = PairsAtOnce;
    const NUMBERS: usize = 2;
    const MOST_ROWS_OF_TWO: usize = 12;

    #[inline(always)]
    fn pack(numbers: &[f32]) -> [u16; 2] {
        pair_of(numbers)
    }

    #[inline(always)]
    fn widen(x: [u16; 2]) -> [f32; 2] {
        x.map(f32_of)
    }

    #[inline(always)]
    fn widen_weight(weight: [u16; 2]) -> [f32; 2] {
        weight.map(f32_of)
    }

    #[inline(always)]
    fn widened(weight: [u16; 2]) -> [u16; 2] {
        weight
    }

    #[inline(always)]
    fn add(x: [f32; 2], weight: [f32; 2], sum: f32, multiply_add: &impl Fn(f32, f32, f32) -> f32) -> f32 {
        add_pair(x, weight, sum, multiply_add)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn broadcast(x: [u16; 2]) -> __m512bh {
        let both = u32::from(x[0]) | u32::from(x[1]) << 16;
        // SAFETY: the caller vouches for the features; so below. Both types are 64 bytes without invalid values.
        unsafe { std::mem::transmute(_mm512_set1_epi32(both as i32)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load(weights: &[[u16; 2]; TILE_COLUMNS]) -> __m512bh {
        // SAFETY: the pointer is to 64 bytes.
        unsafe { std::mem::transmute(_mm512_loadu_si512(weights.as_ptr().cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn add_wide(x: __m512bh, weights: __m512bh, sums: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_dpbf16_ps(sums, x, weights) }
    }
}
