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
/// `low..=low + span` to the front of `offsets`, in order. Returns both numbers.
///
/// # Panics
/// If `offsets` is shorter than `values`.
pub fn within(values: &[f32], low: u32, span: u32, offsets: &mut [u32]) -> (u64, usize) {
    compact::<f32, false>(values, low, span, offsets)
}

/// Puts the indices of the words that lie in `low..high` to the front of `indices`, in order. Returns how many.
///
/// # Panics
/// If `indices` is shorter than `words`, or `high` is below `low`.
pub fn indices_within(words: &[u32], low: u32, high: u32, indices: &mut [u32]) -> usize {
    match high - low {
        0 => 0,
        width => compact::<u32, true>(words, low, width - 1, indices).1,
    }
}

/// 32 bits that are compared as a number.
trait Word: Copy {
    /// The bits that count.
    const MASK: u32;
    fn bits(self) -> u32;
}

impl Word for u32 {
    const MASK: u32 = u32::MAX;
    fn bits(self) -> u32 {
        self
    }
}

impl Word for f32 {
    const MASK: u32 = 0x7fff_ffff;
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

/// Counts the values below `low`, and lists those in `low..=low + span`: their indices, or their distances from `low`. No
/// compiler makes vectors of such a loop.
fn compact<W: Word, const INDICES: bool>(
    values: &[W],
    low: u32,
    span: u32,
    list: &mut [u32],
) -> (u64, usize) {
    let list = &mut list[..values.len()];
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        let (vectors, rest) = values.as_chunks::<16>();
        let at = vectors.len() * 16;
        // SAFETY: the machine has the features; `list` has a place for every value, and a `Word` has 32 bits.
        let (below, inside) = unsafe { compact_avx512::<W, INDICES>(vectors, low, span, list) };
        let (rest_below, rest_inside) =
            compact_scalar::<W, INDICES>(rest, at as u32, low, span, &mut list[at..]);
        list.copy_within(at..at + rest_inside, inside);
        return (below + rest_below, inside + rest_inside);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt") {
        let (vectors, rest) = values.as_chunks::<8>();
        let at = vectors.len() * 8;
        // SAFETY: the machine has the features; `list` has a place for every value, and a `Word` has 32 bits.
        let (below, inside) = unsafe { compact_avx2::<W, INDICES>(vectors, low, span, list) };
        let (rest_below, rest_inside) =
            compact_scalar::<W, INDICES>(rest, at as u32, low, span, &mut list[at..]);
        list.copy_within(at..at + rest_inside, inside);
        return (below + rest_below, inside + rest_inside);
    }
    compact_scalar::<W, INDICES>(values, 0, low, span, list)
}

/// `first` is the index of the first value.
fn compact_scalar<W: Word, const INDICES: bool>(
    values: &[W],
    first: u32,
    low: u32,
    span: u32,
    list: &mut [u32],
) -> (u64, usize) {
    let mut below = 0u32;
    let mut inside = 0;
    let list = &mut list[..values.len()];
    for (index, value) in values.iter().enumerate() {
        let word = value.bits() & W::MASK;
        let offset = word.wrapping_sub(low);
        below += u32::from(word < low);
        list[inside] = if INDICES { first + index as u32 } else { offset };
        inside += usize::from(offset <= span);
    }
    (u64::from(below), inside)
}

/// # Safety
/// `list` has at least 16 places for each vector, and `W` has 32 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn compact_avx512<W: Word, const INDICES: bool>(
    vectors: &[[W; 16]],
    low: u32,
    span: u32,
    list: &mut [u32],
) -> (u64, usize) {
    use std::arch::x86_64::{
        _mm512_add_epi32, _mm512_and_si512, _mm512_cmple_epu32_mask, _mm512_cmplt_epu32_mask,
        _mm512_loadu_si512, _mm512_maskz_compress_epi32, _mm512_set1_epi32, _mm512_setr_epi32,
        _mm512_storeu_si512, _mm512_sub_epi32,
    };
    let all = |word: u32| _mm512_set1_epi32(word.cast_signed());
    let (mask, lows, spans) = (all(W::MASK), all(low), all(span));
    let mut indices = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let (mut below, mut inside) = (0u64, 0usize);
    for vector in vectors {
        // SAFETY: 16 words are 64 bytes.
        let words = unsafe { _mm512_loadu_si512(vector.as_ptr().cast()) };
        let words = _mm512_and_si512(words, mask);
        let offsets = _mm512_sub_epi32(words, lows);
        let hit = _mm512_cmple_epu32_mask(offsets, spans);
        below += u64::from(_mm512_cmplt_epu32_mask(words, lows).count_ones());
        let listed = if INDICES { indices } else { offsets };
        // SAFETY: at most 16 places for each of the vectors before are filled.
        unsafe {
            let place = list.as_mut_ptr().add(inside);
            _mm512_storeu_si512(place.cast(), _mm512_maskz_compress_epi32(hit, listed));
        }
        inside += hit.count_ones() as usize;
        indices = _mm512_add_epi32(indices, all(16));
    }
    (below, inside)
}

/// For each set of lanes of a vector of eight, these lanes in order; what follows them does not matter.
#[cfg(target_arch = "x86_64")]
static LANES_OF: [[u8; 8]; 256] = {
    let mut table = [[0u8; 8]; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut at) = (0, 0);
        while lane < 8 {
            if set & (1 << lane) != 0 {
                table[set][at] = lane;
                at += 1;
            }
            lane += 1;
        }
        set += 1;
    }
    table
};

/// # Safety
/// `list` has at least 8 places for each vector, and `W` has 32 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,popcnt")]
unsafe fn compact_avx2<W: Word, const INDICES: bool>(
    vectors: &[[W; 8]],
    low: u32,
    span: u32,
    list: &mut [u32],
) -> (u64, usize) {
    use std::arch::x86_64::{
        _mm_cvtsi64_si128, _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_ps, _mm256_cmpeq_epi32,
        _mm256_cvtepu8_epi32, _mm256_loadu_si256, _mm256_min_epu32, _mm256_movemask_ps,
        _mm256_permutevar8x32_epi32, _mm256_set1_epi32, _mm256_setr_epi32, _mm256_storeu_si256,
        _mm256_sub_epi32,
    };
    let all = |word: u32| _mm256_set1_epi32(word.cast_signed());
    let (mask, lows, spans) = (all(W::MASK), all(low), all(span));
    let mut indices = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let lanes = |equal| _mm256_movemask_ps(_mm256_castsi256_ps(equal)).cast_unsigned();
    let (mut reached, mut inside) = (0u64, 0usize);
    for vector in vectors {
        // SAFETY: 8 words are 32 bytes.
        let words = unsafe { _mm256_loadu_si256(vector.as_ptr().cast()) };
        let words = _mm256_and_si256(words, mask);
        let offsets = _mm256_sub_epi32(words, lows);
        // There are no unsigned comparisons: the smaller of two is the one, or is not.
        let hit = lanes(_mm256_cmpeq_epi32(_mm256_min_epu32(offsets, spans), offsets));
        reached += u64::from(lanes(_mm256_cmpeq_epi32(_mm256_min_epu32(words, lows), lows)).count_ones());
        let listed = if INDICES { indices } else { offsets };
        let order = _mm_cvtsi64_si128(i64::from_le_bytes(LANES_OF[hit as usize]));
        // SAFETY: at most 8 places for each of the vectors before are filled.
        unsafe {
            let place = list.as_mut_ptr().add(inside);
            let packed = _mm256_permutevar8x32_epi32(listed, _mm256_cvtepu8_epi32(order));
            _mm256_storeu_si256(place.cast(), packed);
        }
        inside += hit.count_ones() as usize;
        indices = _mm256_add_epi32(indices, all(8));
    }
    (vectors.len() as u64 * 8 - reached, inside)
}

/// Appends a word for 32 values each: bit i is set where value i is not 0.
pub fn nonzero(values: &[[f32; 32]], bits: &mut Vec<u32>) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the machine has the feature.
        return unsafe { nonzero_avx512(values, bits) };
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has the feature.
        return unsafe { nonzero_avx2(values, bits) };
    }
    nonzero_scalar(values, bits);
}

fn nonzero_scalar(values: &[[f32; 32]], bits: &mut Vec<u32>) {
    let word = |values: &[f32; 32]| {
        let set = values.iter().enumerate().map(|(i, v)| u32::from(*v != 0.0) << i);
        set.fold(0, |word, set| word | set)
    };
    bits.extend(values.iter().map(word));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn nonzero_avx512(values: &[[f32; 32]], bits: &mut Vec<u32>) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_set1_epi32, _mm512_test_epi32_mask};
    let magnitudes = _mm512_set1_epi32(0x7fff_ffff);
    for values in values {
        let [low, high] = [0, 16].map(|at| {
            // SAFETY: 16 of the 32 values are 64 bytes.
            let half = unsafe { _mm512_loadu_si512(values[at..at + 16].as_ptr().cast()) };
            u32::from(_mm512_test_epi32_mask(half, magnitudes))
        });
        bits.push(low | high << 16);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn nonzero_avx2(values: &[[f32; 32]], bits: &mut Vec<u32>) {
    use std::arch::x86_64::{
        _CMP_NEQ_UQ, _mm256_cmp_ps, _mm256_loadu_ps, _mm256_movemask_ps, _mm256_setzero_ps,
    };
    for values in values {
        let marks = [0, 8, 16, 24].map(|at| {
            // SAFETY: 8 of the 32 values are 32 bytes.
            let eight = unsafe { _mm256_loadu_ps(values[at..at + 8].as_ptr()) };
            let marked = _mm256_cmp_ps::<_CMP_NEQ_UQ>(eight, _mm256_setzero_ps());
            _mm256_movemask_ps(marked).cast_unsigned() << at
        });
        bits.push(marks.into_iter().fold(0, |word, marks| word | marks));
    }
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
                let values = &values[..len];
                let found = within(values, low, last - low, &mut fast);
                let expected = compact_scalar::<f32, false>(values, 0, low, last - low, &mut plain);
                assert_eq!(found, expected);
                assert_eq!(fast[..found.1], plain[..found.1]);
                let words: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
                let found = indices_within(&words, low, last, &mut fast);
                let inside = |i: &u32| (low..last).contains(&words[*i as usize]);
                assert_eq!(fast[..found], (0..len as u32).filter(inside).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_is_not_0_is_marked_the_same_way_by_every_machine() {
        let mut values = [[0f32; 32]; 3];
        values[0][0] = -1.0;
        values[1] = std::array::from_fn(|i| if i % 3 == 0 { -0.0 } else { f32::from_bits(1) });
        values[2][31] = f32::INFINITY;
        let (mut fast, mut plain) = (vec![7], vec![7]);
        nonzero(&values, &mut fast);
        nonzero_scalar(&values, &mut plain);
        assert_eq!(fast, plain);
        assert_eq!((fast[1], fast[3]), (1, 1 << 31));
    }
}
