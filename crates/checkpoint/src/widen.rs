//! Exact widening of BF16, F16 and F32 bytes to f32, and the one rounding (nearest even) back.

use half::{bf16, f16};
use safetensors::Dtype;

/// Widens little-endian elements of `dtype` (BF16, F16 or F32) into `out`; exact for every finite value.
///
/// # Panics
/// If `dtype` is another type or the lengths differ: callers check both when they plan.
pub fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::BF16 => {
            assert_eq!(bytes.len(), out.len() * 2);
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        Dtype::F16 => {
            assert_eq!(bytes.len(), out.len() * 2);
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Dtype::F32 => {
            assert_eq!(bytes.len(), out.len() * 4);
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
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
        Dtype::BF16 => {
            assert_eq!(out.len(), values.len() * 2);
            let mut finite = true;
            for (o, &v) in out.chunks_exact_mut(2).zip(values) {
                let bits = v.to_bits();
                // Adding 0x7fff plus the kept lowest bit rounds to nearest even; NaN payloads are caught below.
                let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
                finite &= (rounded & 0x7f80) != 0x7f80 && (bits & 0x7f80_0000) != 0x7f80_0000;
                o.copy_from_slice(&rounded.to_le_bytes());
            }
            finite
        }
        Dtype::F16 => {
            assert_eq!(out.len(), values.len() * 2);
            let mut finite = true;
            for (o, &v) in out.chunks_exact_mut(2).zip(values) {
                let rounded = f16::from_f32(v);
                finite &= rounded.is_finite();
                o.copy_from_slice(&rounded.to_le_bytes());
            }
            finite
        }
        Dtype::F32 => {
            assert_eq!(out.len(), values.len() * 4);
            let mut finite = true;
            for (o, &v) in out.chunks_exact_mut(4).zip(values) {
                finite &= (v.to_bits() & 0x7f80_0000) != 0x7f80_0000;
                o.copy_from_slice(&v.to_le_bytes());
            }
            finite
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_and_f16_pattern_survives_widening_and_narrowing() {
        for bits in 0..=u16::MAX {
            for dtype in [Dtype::BF16, Dtype::F16] {
                let mut wide = [0f32];
                widen(dtype, &bits.to_le_bytes(), &mut wide);
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
    fn bf16_rounding_is_to_nearest_even_as_in_the_half_crate() {
        let mut state = 1u32;
        for _ in 0..1_000_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(state);
            if value.is_finite() {
                let mut out = [0u8; 2];
                narrow(Dtype::BF16, &[value], &mut out);
                assert_eq!(
                    u16::from_le_bytes(out),
                    bf16::from_f32(value).to_bits(),
                    "{value}"
                );
            }
        }
    }

    #[test]
    fn overflow_is_reported() {
        let mut out = [0u8; 2];
        assert!(!narrow(Dtype::F16, &[70_000.0], &mut out));
        assert!(!narrow(Dtype::BF16, &[f32::MAX], &mut out));
        assert!(!narrow(Dtype::BF16, &[f32::NAN], &mut out));
        assert!(narrow(Dtype::BF16, &[70_000.0], &mut out));
    }
}
