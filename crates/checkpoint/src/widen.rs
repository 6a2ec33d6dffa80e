//! Exact widening of BF16, F16 and F32 bytes to f32, and the one rounding (nearest even) back.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::simd::{Loop, widest};

/// The bits of an f32's exponent: all set in infinities and NaN.
const EXPONENT: u32 = 0x7f80_0000;
const MAGNITUDE: u32 = 0x7fff_ffff;

/// A float type as checkpoints store it, little-endian, for loops over four bytes at a time as one number, the first element
/// lowest. Everything is inlined into loops that [`widest`] compiles.
pub trait Stored {
    /// Elements in four bytes: 1 or 2.
    const IN_FOUR_BYTES: usize;
    /// Of four bytes: not the elements' signs.
    const MAGNITUDES: u32;
    /// Added to an element's magnitude it reaches the sign just where the element is infinite or NaN.
    const TO_INFINITY: u32;

    /// The first or second element; exact for every finite number.
    fn widen_one(four_bytes: u32, which: usize) -> f32;
    /// Rounds the bits of one or two f32 to nearest even. A NaN whose payload is more than its highest bit may come out as a
    /// number.
    fn narrow_together(bits: [u32; 2]) -> u32;
}

/// The same element by element.
trait Element {
    type Bytes: Copy;
    /// The bits of an element.
    type Word: Copy + Ord + Default;
    const SIZE: usize;
    /// The magnitude of an infinity: larger ones are NaN.
    const INFINITY: Self::Word;
    /// The first magnitude of an f32 that this type has no finite number for.
    const OVERFLOW: u32;

    fn elements(bytes: &[u8]) -> &[Self::Bytes];
    fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Bytes];
    fn load(bytes: Self::Bytes) -> Self::Word;
    fn magnitude(word: Self::Word) -> Self::Word;
    /// Exact for every finite number.
    fn widen(word: Self::Word) -> f32;
    /// Rounds the bits of an f32 to nearest even. NaN may come out as anything: it is reported.
    fn narrow(bits: u32) -> Self::Bytes;
}

/// BF16 as checkpoints store it.
#[derive(Debug, Clone, Copy)]
pub struct Bf16;
/// F16 as checkpoints store it.
#[derive(Debug, Clone, Copy)]
pub struct F16;
/// F32 as checkpoints store it.
#[derive(Debug, Clone, Copy)]
pub struct F32;

/// What a 16-bit type has of the two whatever its exponent.
macro_rules! sixteen_bits {
    ($name:ident, infinity: $infinity:expr, overflow: $overflow:expr, $widen:ident, $narrow:ident) => {
        impl Element for $name {
            type Bytes = [u8; 2];
            type Word = u16;
            const SIZE: usize = 2;
            const INFINITY: u16 = $infinity;
            const OVERFLOW: u32 = $overflow;

            #[inline(always)]
            fn elements(bytes: &[u8]) -> &[[u8; 2]] {
                bytes.as_chunks().0
            }
            #[inline(always)]
            fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 2]] {
                bytes.as_chunks_mut().0
            }
            #[inline(always)]
            fn load(bytes: [u8; 2]) -> u16 {
                u16::from_le_bytes(bytes)
            }
            #[inline(always)]
            fn magnitude(word: u16) -> u16 {
                word & 0x7fff
            }
            #[inline(always)]
            fn widen(word: u16) -> f32 {
                $widen(u32::from(word) << 16)
            }
            #[inline(always)]
            fn narrow(bits: u32) -> [u8; 2] {
                (($narrow(bits) >> 16) as u16).to_le_bytes()
            }
        }

        impl Stored for $name {
            const IN_FOUR_BYTES: usize = 2;
            const MAGNITUDES: u32 = 0x7fff_7fff;
            const TO_INFINITY: u32 = (0x8000 - $infinity) * 0x1_0001;

            #[inline(always)]
            fn widen_one(four_bytes: u32, which: usize) -> f32 {
                $widen(match which {
                    0 => four_bytes << 16,
                    _ => four_bytes & 0xffff_0000,
                })
            }
            #[inline(always)]
            fn narrow_together([first, second]: [u32; 2]) -> u32 {
                $narrow(first) >> 16 | $narrow(second) & 0xffff_0000
            }
        }
    };
}

sixteen_bits!(Bf16, infinity: 0x7f80, overflow: 0x7f7f_8000, widen_bf16, narrow_bf16);
sixteen_bits!(F16, infinity: 0x7c00, overflow: 0x477f_f000, widen_f16, narrow_f16);

/// From the upper half, and nothing below.
#[inline(always)]
fn widen_bf16(upper: u32) -> f32 {
    f32::from_bits(upper)
}

/// To the upper half. Adding 0x7fff plus the kept lowest bit rounds to nearest even.
#[inline(always)]
fn narrow_bf16(bits: u32) -> u32 {
    bits.wrapping_add(0x7fff + ((bits >> 16) & 1))
}

/// From the upper half, without branches: the exponent is moved by a multiplication, which is exact, subnormals included.
#[inline(always)]
fn widen_f16(upper: u32) -> f32 {
    let sign = upper & 0x8000_0000;
    let magnitude = (upper & 0x7fff_0000) >> 3;
    let special = if magnitude >= 0x0f80_0000 { EXPONENT } else { 0 };
    // 2^112
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    f32::from_bits(scaled.to_bits() | special | sign)
}

/// To the upper half, without branches, so that it vectorises; NaN becomes a NaN.
#[inline(always)]
fn narrow_f16(bits: u32) -> u32 {
    let sign = bits & 0x8000_0000;
    let magnitude = bits & MAGNITUDE;
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition itself.
    let subnormal = (f32::from_bits(magnitude) + 0.5)
        .to_bits()
        .wrapping_sub(0x3f00_0000);
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let special = if magnitude > EXPONENT { 0x7e00 } else { 0x7c00 };
    let rounded = if magnitude < 0x3880_0000 {
        subnormal
    } else {
        normal
    };
    // 65536 and above
    let rounded = if magnitude >= 0x4780_0000 {
        special
    } else {
        rounded
    };
    rounded << 16 | sign
}

impl Element for F32 {
    type Bytes = [u8; 4];
    type Word = u32;
    const SIZE: usize = 4;
    const INFINITY: u32 = EXPONENT;
    const OVERFLOW: u32 = EXPONENT;

    #[inline(always)]
    fn elements(bytes: &[u8]) -> &[[u8; 4]] {
        bytes.as_chunks().0
    }
    #[inline(always)]
    fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 4]] {
        bytes.as_chunks_mut().0
    }
    #[inline(always)]
    fn load(bytes: [u8; 4]) -> u32 {
        u32::from_le_bytes(bytes)
    }
    #[inline(always)]
    fn magnitude(word: u32) -> u32 {
        word & MAGNITUDE
    }
    #[inline(always)]
    fn widen(word: u32) -> f32 {
        f32::from_bits(word)
    }
    #[inline(always)]
    fn narrow(bits: u32) -> [u8; 4] {
        bits.to_le_bytes()
    }
}

impl Stored for F32 {
    const IN_FOUR_BYTES: usize = 1;
    const MAGNITUDES: u32 = MAGNITUDE;
    const TO_INFINITY: u32 = 0x8000_0000 - EXPONENT;

    #[inline(always)]
    fn widen_one(four_bytes: u32, _: usize) -> f32 {
        f32::from_bits(four_bytes)
    }
    #[inline(always)]
    fn narrow_together([only, _]: [u32; 2]) -> u32 {
        only
    }
}

/// Widens little-endian elements of `dtype` (BF16, F16 or F32) into `out`; exact for every finite value. Returns false if
/// any is NaN or infinite.
///
/// # Panics
/// If `dtype` is another type or the lengths differ: callers check both when they plan.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    match dtype {
        Dtype::BF16 => widest(Widen::<Bf16>::new(bytes, out)),
        Dtype::F16 => widest(Widen::<F16>::new(bytes, out)),
        Dtype::F32 => widest(Widen::<F32>::new(bytes, out)),
        other => panic!("widen takes float tensors, not {other:?}"),
    }
}

/// As [`widen`], minus `base`: what a fine-tune changed. Returns false if any of the widened values is NaN or infinite.
///
/// # Panics
/// As [`widen`].
pub fn widen_difference(dtype: Dtype, bytes: &[u8], base: &[f32], out: &mut [f32]) -> bool {
    assert_eq!(base.len(), out.len());
    match dtype {
        Dtype::BF16 => widest(Difference(Widen::<Bf16>::new(bytes, out), base)),
        Dtype::F16 => widest(Difference(Widen::<F16>::new(bytes, out), base)),
        Dtype::F32 => widest(Difference(Widen::<F32>::new(bytes, out), base)),
        other => panic!("widen takes float tensors, not {other:?}"),
    }
}

/// Rounds `values` once, to nearest even, into little-endian bytes of `dtype`. Returns false if any stored
/// value is NaN or infinite (an F16 or BF16 overflow rounds to infinity).
///
/// # Panics
/// As [`widen`].
pub fn narrow(dtype: Dtype, values: &[f32], out: &mut [u8]) -> bool {
    match dtype {
        Dtype::BF16 => widest(Narrow::<Bf16>::new(values, out)),
        Dtype::F16 => widest(Narrow::<F16>::new(values, out)),
        Dtype::F32 => widest(Narrow::<F32>::new(values, out)),
        other => panic!("narrow makes float tensors, not {other:?}"),
    }
}

/// Whether one value stays finite when it is stored as `dtype`.
pub fn narrow_one_is_finite(dtype: Dtype, value: f32) -> bool {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).is_finite(),
        Dtype::F16 => f16::from_f32(value).is_finite(),
        _ => value.is_finite(),
    }
}

struct Widen<'a, S: Element>(&'a [S::Bytes], &'a mut [f32]);

impl<'a, S: Element> Widen<'a, S> {
    fn new(bytes: &'a [u8], out: &'a mut [f32]) -> Self {
        assert_eq!(bytes.len(), out.len() * S::SIZE);
        Self(S::elements(bytes), out)
    }
}

impl<S: Element> Loop for Widen<'_, S> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = S::Word::default();
        for (o, bytes) in self.1.iter_mut().zip(self.0) {
            let word = S::load(*bytes);
            largest = largest.max(S::magnitude(word));
            *o = S::widen(word);
        }
        largest < S::INFINITY
    }
}

/// The last field is the base.
struct Difference<'a, S: Element>(Widen<'a, S>, &'a [f32]);

impl<S: Element> Loop for Difference<'_, S> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = S::Word::default();
        let pairs = self.0.1.iter_mut().zip(self.1);
        for ((o, base), bytes) in pairs.zip(self.0.0) {
            let word = S::load(*bytes);
            largest = largest.max(S::magnitude(word));
            *o = S::widen(word) - *base;
        }
        largest < S::INFINITY
    }
}

struct Narrow<'a, S: Element>(&'a [f32], &'a mut [S::Bytes]);

impl<'a, S: Element> Narrow<'a, S> {
    fn new(values: &'a [f32], out: &'a mut [u8]) -> Self {
        assert_eq!(out.len(), values.len() * S::SIZE);
        Self(values, S::elements_mut(out))
    }
}

impl<S: Element> Loop for Narrow<'_, S> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = 0u32;
        for (o, v) in self.1.iter_mut().zip(self.0) {
            let bits = v.to_bits();
            largest = largest.max(bits & MAGNITUDE);
            *o = S::narrow(bits);
        }
        largest < S::OVERFLOW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_and_f16_pattern_survives_widening_and_narrowing() {
        for bits in 0..=u16::MAX {
            for dtype in [Dtype::BF16, Dtype::F16] {
                let mut wide = [0f32];
                let finite = widen(dtype, &bits.to_le_bytes(), &mut wide);
                assert_eq!(finite, wide[0].is_finite(), "{bits:#x}");
                let mut difference = [0f32];
                assert_eq!(
                    widen_difference(dtype, &bits.to_le_bytes(), &[0.5], &mut difference),
                    finite
                );
                assert!(!finite || difference[0].to_bits() == (wide[0] - 0.5).to_bits());
                let exact = match dtype {
                    Dtype::BF16 => bf16::from_bits(bits).to_f32(),
                    _ => f16::from_bits(bits).to_f32(),
                };
                assert!(wide[0].to_bits() == exact.to_bits() || exact.is_nan() && wide[0].is_nan());
                let mut back = [0u8; 2];
                let finite = narrow(dtype, &wide, &mut back);
                assert_eq!(finite, wide[0].is_finite(), "{bits:#x}");
                if finite {
                    assert_eq!(u16::from_le_bytes(back), bits, "{dtype:?} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_as_in_the_half_crate() {
        let mut state = 1u32;
        let mut values: Vec<f32> = (0..1_000_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f32::from_bits(state)
            })
            .collect();
        // The range of f16, with every halfway point of its subnormals.
        values.extend((0..4096).map(|i| i as f32 * 2f32.powi(-25)));
        values.extend((0..40_000).map(|i| (i as f32 - 20_000.0) * 3.3));
        for value in values.into_iter().filter(|v| v.is_finite()) {
            let mut out = [0u8; 2];
            narrow(Dtype::BF16, &[value], &mut out);
            assert_eq!(
                u16::from_le_bytes(out),
                bf16::from_f32(value).to_bits(),
                "{value}"
            );
            narrow(Dtype::F16, &[value], &mut out);
            assert_eq!(u16::from_le_bytes(out), f16::from_f32(value).to_bits(), "{value}");
        }
    }

    #[test]
    fn overflow_is_reported() {
        let mut out = [0u8; 2];
        assert!(!narrow(Dtype::F16, &[70_000.0], &mut out));
        assert!(!narrow(Dtype::F16, &[f32::NAN], &mut out));
        assert!(!narrow(Dtype::BF16, &[f32::MAX], &mut out));
        assert!(!narrow(Dtype::BF16, &[f32::NAN], &mut out));
        assert!(narrow(Dtype::BF16, &[70_000.0], &mut out));
    }
}
