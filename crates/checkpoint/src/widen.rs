//! Exact widening of BF16, F16 and F32 bytes to f32, and the one rounding (nearest even) back.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::simd::{Loop, widest};

/// The bits of an f32's exponent: all set in infinities and NaN.
const EXPONENT: u32 = 0x7f80_0000;
const MAGNITUDE: u32 = 0x7fff_ffff;
const MAGNITUDE16: u16 = 0x7fff;
const BF16_INFINITY: u16 = 0x7f80;
const F16_INFINITY: u16 = 0x7c00;
/// Magnitudes from here on round to an infinity, or are none.
const BF16_OVERFLOW: u32 = 0x7f7f_8000;
const F16_OVERFLOW: u32 = 0x477f_f000;

/// Widens little-endian elements of `dtype` (BF16, F16 or F32) into `out`; exact for every finite value. Returns false if
/// any is NaN or infinite.
///
/// # Panics
/// If `dtype` is another type or the lengths differ: callers check both when they plan.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    match dtype {
        Dtype::BF16 => {
            assert_eq!(bytes.len(), out.len() * 2);
            widest(Widen16(bytes, out, bf16_to_f32, BF16_INFINITY))
        }
        Dtype::F16 => {
            assert_eq!(bytes.len(), out.len() * 2);
            widest(Widen16(bytes, out, f16_to_f32, F16_INFINITY))
        }
        Dtype::F32 => {
            assert_eq!(bytes.len(), out.len() * 4);
            widest(Widen32(bytes, out))
        }
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
        Dtype::BF16 => {
            assert_eq!(bytes.len(), out.len() * 2);
            widest(Difference16(bytes, base, out, bf16_to_f32, BF16_INFINITY))
        }
        Dtype::F16 => {
            assert_eq!(bytes.len(), out.len() * 2);
            widest(Difference16(bytes, base, out, f16_to_f32, F16_INFINITY))
        }
        other => {
            let finite = widen(other, bytes, out);
            widest(Subtract(base, out));
            finite
        }
    }
}

/// Rounds `values` once, to nearest even, into little-endian bytes of `dtype`. Returns false if any stored
/// value is NaN or infinite (an F16 or BF16 overflow rounds to infinity).
///
/// # Panics
/// As [`widen`].
pub fn narrow(dtype: Dtype, values: &[f32], out: &mut [u8]) -> bool {
    match dtype {
        Dtype::BF16 => {
            assert_eq!(out.len(), values.len() * 2);
            widest(Narrow16(values, out, f32_to_bf16, BF16_OVERFLOW))
        }
        Dtype::F16 => {
            assert_eq!(out.len(), values.len() * 2);
            widest(Narrow16(values, out, f32_to_f16, F16_OVERFLOW))
        }
        Dtype::F32 => {
            assert_eq!(out.len(), values.len() * 4);
            widest(Narrow32(values, out))
        }
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

/// The last field is the magnitude of an infinity.
struct Widen16<'a, F: Fn(u16) -> f32>(&'a [u8], &'a mut [f32], F, u16);

impl<F: Fn(u16) -> f32> Loop for Widen16<'_, F> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = 0u16;
        for (o, b) in self.1.iter_mut().zip(self.0.as_chunks::<2>().0) {
            let bits = u16::from_le_bytes(*b);
            largest = largest.max(bits & MAGNITUDE16);
            *o = (self.2)(bits);
        }
        largest < self.3
    }
}

/// As [`Widen16`].
struct Difference16<'a, F: Fn(u16) -> f32>(&'a [u8], &'a [f32], &'a mut [f32], F, u16);

impl<F: Fn(u16) -> f32> Loop for Difference16<'_, F> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = 0u16;
        let pairs = self.2.iter_mut().zip(self.1);
        for ((o, base), b) in pairs.zip(self.0.as_chunks::<2>().0) {
            let bits = u16::from_le_bytes(*b);
            largest = largest.max(bits & MAGNITUDE16);
            *o = (self.3)(bits) - *base;
        }
        largest < self.4
    }
}

struct Subtract<'a>(&'a [f32], &'a mut [f32]);

impl Loop for Subtract<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (o, base) in self.1.iter_mut().zip(self.0) {
            *o -= *base;
        }
    }
}

struct Widen32<'a>(&'a [u8], &'a mut [f32]);

impl Loop for Widen32<'_> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = 0u32;
        for (o, b) in self.1.iter_mut().zip(self.0.as_chunks::<4>().0) {
            let bits = u32::from_le_bytes(*b);
            largest = largest.max(bits & MAGNITUDE);
            *o = f32::from_bits(bits);
        }
        largest < EXPONENT
    }
}

/// The last field is the first magnitude that overflows the narrow type.
struct Narrow16<'a, F: Fn(u32) -> u16>(&'a [f32], &'a mut [u8], F, u32);

impl<F: Fn(u32) -> u16> Loop for Narrow16<'_, F> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = 0u32;
        for (o, v) in self.1.as_chunks_mut::<2>().0.iter_mut().zip(self.0) {
            let bits = v.to_bits();
            largest = largest.max(bits & MAGNITUDE);
            *o = (self.2)(bits).to_le_bytes();
        }
        largest < self.3
    }
}

struct Narrow32<'a>(&'a [f32], &'a mut [u8]);

impl Loop for Narrow32<'_> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let mut largest = 0u32;
        for (o, v) in self.1.as_chunks_mut::<4>().0.iter_mut().zip(self.0) {
            largest = largest.max(v.to_bits() & MAGNITUDE);
            *o = v.to_le_bytes();
        }
        largest < EXPONENT
    }
}

#[inline(always)]
fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Adding 0x7fff plus the kept lowest bit rounds to nearest even. NaN may come out as anything: it is reported.
#[inline(always)]
fn f32_to_bf16(bits: u32) -> u16 {
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Without branches: the exponent is moved by a multiplication, which is exact, subnormals included.
#[inline(always)]
fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff) << 13;
    let special = if magnitude >= 0x0f80_0000 { EXPONENT } else { 0 };
    // 2^112
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    f32::from_bits(scaled.to_bits() | special | sign)
}

/// Without branches, so that it vectorises; NaN becomes a NaN.
#[inline(always)]
fn f32_to_f16(bits: u32) -> u16 {
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
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
    (rounded | sign) as u16
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
