//! The one place that chooses instructions: loops written once are compiled for the baseline, AVX2 and AVX-512, and the
//! widest that this machine has runs. The results are the same bits everywhere: Rust neither contracts a multiplication
//! and an addition into one, nor reorders sums.
#![allow(unsafe_code)]

/// A loop over slices. `run` and all it calls in its loops must be `#[inline(always)]`, or they are compiled for the
/// smallest machine.
pub trait Loop {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs `work` with the widest instructions of this machine.
#[inline]
pub fn widest<L: Loop>(work: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            // SAFETY: the machine has the four features that the function was compiled for.
            return unsafe { with_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has the feature that the function was compiled for.
            return unsafe { with_avx2(work) };
        }
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2")]
fn with_avx512<L: Loop>(work: L) -> L::Output {
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<L: Loop>(work: L) -> L::Output {
    work.run()
}

/// Counts the values whose magnitude, as bits, lies below `low`; and puts the distances from `low` of those that lie in
/// `low..=low + span` to the front of `offsets`, in order. Returns both numbers. No compiler makes vectors of such a loop.
///
/// # Panics
/// If `offsets` is shorter than `values`.
pub fn within(values: &[f32], low: u32, span: u32, offsets: &mut [u32]) -> (u64, usize) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        let (vectors, rest) = values.as_chunks::<16>();
        let (head, tail) = offsets.split_at_mut(vectors.len() * 16);
        // SAFETY: the machine has the features; `head` has room for every value of `vectors`.
        let (below, inside) = unsafe { within_avx512(vectors, low, span, head) };
        let (rest_below, rest_inside) = within_scalar(rest, low, span, tail);
        offsets.copy_within(vectors.len() * 16..vectors.len() * 16 + rest_inside, inside);
        return (below + rest_below, inside + rest_inside);
    }
    within_scalar(values, low, span, offsets)
}

fn within_scalar(values: &[f32], low: u32, span: u32, offsets: &mut [u32]) -> (u64, usize) {
    let mut below = 0u32;
    let mut inside = 0;
    let offsets = &mut offsets[..values.len()];
    for v in values {
        let magnitude = v.to_bits() & 0x7fff_ffff;
        let offset = magnitude.wrapping_sub(low);
        below += u32::from(magnitude < low);
        offsets[inside] = offset;
        inside += usize::from(offset <= span);
    }
    (u64::from(below), inside)
}

/// # Safety
/// `offsets` has at least 16 places for each vector.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn within_avx512(vectors: &[[f32; 16]], low: u32, span: u32, offsets: &mut [u32]) -> (u64, usize) {
    use std::arch::x86_64::{
        _mm512_and_si512, _mm512_cmple_epu32_mask, _mm512_cmplt_epu32_mask, _mm512_loadu_si512,
        _mm512_maskz_compress_epi32, _mm512_set1_epi32, _mm512_storeu_si512, _mm512_sub_epi32,
    };
    let magnitudes = _mm512_set1_epi32(0x7fff_ffff);
    let (lows, spans) = (
        _mm512_set1_epi32(low.cast_signed()),
        _mm512_set1_epi32(span.cast_signed()),
    );
    let (mut below, mut inside) = (0u64, 0usize);
    for vector in vectors {
        // SAFETY: 16 floats are 64 bytes.
        let bits = unsafe { _mm512_loadu_si512(vector.as_ptr().cast()) };
        let magnitude = _mm512_and_si512(bits, magnitudes);
        let offset = _mm512_sub_epi32(magnitude, lows);
        let hit = _mm512_cmple_epu32_mask(offset, spans);
        below += u64::from(_mm512_cmplt_epu32_mask(magnitude, lows).count_ones());
        // SAFETY: before this vector at most 16 places for each of those before it are filled.
        unsafe {
            let place = offsets.as_mut_ptr().add(inside);
            _mm512_storeu_si512(place.cast(), _mm512_maskz_compress_epi32(hit, offset));
        }
        inside += hit.count_ones() as usize;
    }
    (below, inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_within_a_bracket_are_found_the_same_way_by_every_machine() {
        let mut state = 7u32;
        let values: Vec<f32> = (0..1003)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f32::from_bits(state & 0x83ff_ffff | 0x3c00_0000)
            })
            .collect();
        for len in [0, 1, 15, 16, 17, 1003] {
            for (low, last) in [
                (0, 0x7fff_ffff),
                (0x3e00_0000, 0x3e40_0000),
                (0x3d00_0000, 0x3d00_0000),
                (0, 0),
            ] {
                let (mut fast, mut plain) = (vec![0; len], vec![0; len]);
                let found = within(&values[..len], low, last - low, &mut fast);
                assert_eq!(found, within_scalar(&values[..len], low, last - low, &mut plain));
                assert_eq!(fast[..found.1], plain[..found.1]);
            }
        }
    }
}
