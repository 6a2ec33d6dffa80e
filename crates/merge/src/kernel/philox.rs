//! Philox4x32-10, the generator of the words that random drops are decided by: four words for each counter.
//!
//! Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Random123.
#![allow(unsafe_code)]

use super::wide;

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;
const ROUNDS: usize = 10;

/// Words are made for a multiple of so many counters.
pub(crate) const TOGETHER: usize = 8;

/// Fills `words` with those of the counters from `first` on.
///
/// # Panics
/// If they are not those of a multiple of [`TOGETHER`] counters.
pub(crate) fn fill(key: [u32; 2], first: u64, words: &mut [u32]) {
    let (groups, rest) = words.as_chunks_mut::<{ 4 * TOGETHER }>();
    assert!(rest.is_empty());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && !is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has the feature.
        return unsafe { fill_avx2(key, first, groups) };
    }
    fill_anywhere(key, first, groups);
}

/// Of each round.
fn keys([k0, k1]: [u32; 2]) -> [[u32; 2]; ROUNDS] {
    std::array::from_fn(|round| {
        let round = round as u32;
        [
            k0.wrapping_add(round.wrapping_mul(W0)),
            k1.wrapping_add(round.wrapping_mul(W1)),
        ]
    })
}

wide! {
    /// Every word lies in 64 bits, of which the upper half is not looked at: so a multiplication of 32 bits by 32 needs no
    /// shuffles.
    fn fill_anywhere<'a>(key: [u32; 2], first: u64, groups: &'a mut [[u32; 4 * TOGETHER]]) {
        const LOW: u64 = 0xffff_ffff;
        let keys = keys(key).map(|key| key.map(u64::from));
        let blocks = groups.as_flattened_mut().as_chunks_mut::<4>().0;
        for (index, out) in blocks.iter_mut().enumerate() {
            let counter = first + index as u64;
            let (mut c0, mut c1, mut c2, mut c3) = (counter, counter >> 32, 0, 0);
            for [k0, k1] in keys {
                let p0 = u64::from(M0) * (c0 & LOW);
                let p1 = u64::from(M1) * (c2 & LOW);
                (c0, c1) = ((p1 >> 32) ^ c1 ^ k0, p1);
                (c2, c3) = ((p0 >> 32) ^ c3 ^ k1, p0);
            }
            let (low, high) = (c0 & LOW | c1 << 32, c2 & LOW | c3 << 32);
            *out = [low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32];
        }
    }
}

/// The same. Compilers have one vector wait for its product before the next begins; here two are under way.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fill_avx2(key: [u32; 2], first: u64, groups: &mut [[u32; 4 * TOGETHER]]) {
    use std::arch::x86_64::{
        _mm256_add_epi64, _mm256_blend_epi32, _mm256_mul_epu32, _mm256_permute2x128_si256, _mm256_set_epi64x,
        _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_slli_epi64, _mm256_srli_epi64, _mm256_storeu_si256,
        _mm256_unpackhi_epi64, _mm256_unpacklo_epi64, _mm256_xor_si256,
    };
    let all = |word: u64| _mm256_set1_epi64x(word.cast_signed());
    let keys = keys(key).map(|key| key.map(|word| all(word.into())));
    let (m0, m1) = (all(M0.into()), all(M1.into()));
    for (group, out) in groups.iter_mut().enumerate() {
        let counters = [0, 4].map(|at| {
            let counter = first + (group * TOGETHER + at) as u64;
            _mm256_add_epi64(all(counter), _mm256_set_epi64x(3, 2, 1, 0))
        });
        let zero = [_mm256_setzero_si256(); 2];
        let [mut c0, mut c1, mut c2, mut c3] =
            [counters, counters.map(|c| _mm256_srli_epi64::<32>(c)), zero, zero];
        // As many at a time as compilers unroll.
        for rounds in keys.as_chunks::<5>().0 {
            for [k0, k1] in rounds {
                for i in 0..2 {
                    let p0 = _mm256_mul_epu32(c0[i], m0);
                    let p1 = _mm256_mul_epu32(c2[i], m1);
                    c0[i] = _mm256_xor_si256(_mm256_srli_epi64::<32>(p1), _mm256_xor_si256(c1[i], *k0));
                    c2[i] = _mm256_xor_si256(_mm256_srli_epi64::<32>(p0), _mm256_xor_si256(c3[i], *k1));
                    (c1[i], c3[i]) = (p1, p0);
                }
            }
        }
        for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let low = _mm256_blend_epi32::<0xaa>(c0[i], _mm256_slli_epi64::<32>(c1[i]));
            let high = _mm256_blend_epi32::<0xaa>(c2[i], _mm256_slli_epi64::<32>(c3[i]));
            let (even, odd) = (_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high));
            // SAFETY: 16 words are twice 32 bytes.
            unsafe {
                let place = out.as_mut_ptr();
                _mm256_storeu_si256(place.cast(), _mm256_permute2x128_si256::<0x20>(even, odd));
                _mm256_storeu_si256(place.add(8).cast(), _mm256_permute2x128_si256::<0x31>(even, odd));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten rounds, one counter.
    fn one(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
        for _ in 0..10 {
            let p0 = u64::from(M0) * u64::from(counter[0]);
            let p1 = u64::from(M1) * u64::from(counter[2]);
            counter = [
                (p1 >> 32) as u32 ^ counter[1] ^ key[0],
                p1 as u32,
                (p0 >> 32) as u32 ^ counter[3] ^ key[1],
                p0 as u32,
            ];
            key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
        }
        counter
    }

    #[test]
    fn words_are_those_of_the_oracle_on_every_machine() {
        // The second half crosses into the upper half of the counter.
        for first in [0, 5, (1 << 32) - 16] {
            let (mut fast, mut plain) = ([0u32; 128], [[0u32; 32]; 4]);
            fill([7, u32::MAX], first, &mut fast);
            fill_anywhere([7, u32::MAX], first, &mut plain);
            assert_eq!(fast, plain.as_flattened());
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                let mut wide = [[0u32; 32]; 4];
                // SAFETY: the machine has the feature.
                unsafe { fill_avx2([7, u32::MAX], first, &mut wide) };
                assert_eq!(wide, plain);
            }
            for (index, words) in fast.as_chunks::<4>().0.iter().enumerate() {
                let counter = first + index as u64;
                let counter = [counter as u32, (counter >> 32) as u32, 0, 0];
                assert_eq!(*words, one(counter, [7, u32::MAX]));
            }
        }
    }

    #[test]
    fn the_oracle_gives_the_known_answers_of_random123() {
        assert_eq!(
            one([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            one([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            one(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
