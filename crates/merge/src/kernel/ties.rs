//! TIES: election of a sign for each element, and the mean or the mixup of what agrees with it.
//!
//! Source: arXiv 2306.01708 with prateeky2806/ties-merging (global variant) and mergekit's `get_mask` (tensor variant).

use super::{keep_if, wide};

/// How the values that agree are joined.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TiesMean<'a> {
    /// Sum of w d over sum of w; every delta has one vote (the paper).
    Weighted(&'a [f32]),
    /// Each delta counts as w d, in the election too (mergekit): their sum.
    Premultiplied(&'a [f32]),
    /// The same, over sum of w.
    PremultipliedMean(&'a [f32]),
    /// As [`Self::Weighted`], but one agreeing parent keeps its value in full (Mixup Model Merge). With two parents whose
    /// weights are lambda and 1 - lambda, nothing is divided: both in agreement give lambda d1 + (1 - lambda) d2.
    Mixup(&'a [f32]),
}

/// What TIES kept of a slice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TiesCounts {
    /// For each parent the elements whose value went into the result.
    pub kept: Vec<u64>,
    /// Elements where kept deltas of both signs met.
    pub conflicting: u64,
}

/// Buffers of one slice, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct TiesScratch {
    elected: Vec<f32>,
    total: Vec<f32>,
    count: Vec<u32>,
    only: Vec<f32>,
    sides: Vec<u32>,
}

/// The same for kernels elsewhere.
#[cfg(feature = "gpu")]
#[derive(Debug, Clone)]
pub(crate) struct TiesRules {
    /// By parent: what it is multiplied by before the election, what after it, and its share of the divisor.
    pub factors: Vec<(f32, f32, f32)>,
    pub divide: bool,
    pub keep_single: bool,
    pub majority: i8,
}

impl TiesMean<'_> {
    #[cfg(feature = "gpu")]
    pub fn rules(&self, parents: usize, majority: i8) -> TiesRules {
        TiesRules {
            factors: (0..parents).map(|k| self.factors(k)).collect(),
            divide: !matches!(self, Self::Premultiplied(_)),
            keep_single: matches!(self, Self::Mixup(_)),
            majority,
        }
    }

    /// Of parent k: what its delta is multiplied by before the election, what after it, and what it adds to the divisor.
    fn factors(&self, k: usize) -> (f32, f32, f32) {
        match self {
            Self::Weighted(w) | Self::Mixup(w) => (1.0, w[k], w[k]),
            Self::Premultiplied(w) | Self::PremultipliedMean(w) => (w[k], 1.0, w[k]),
        }
    }
}

/// Sum of the elected signs of a slice: what the majority over the whole model is made of.
pub(crate) fn elected_signs(deltas: &[Vec<f32>], len: usize, scratch: &mut TiesScratch) -> i64 {
    if let [a, b] = deltas {
        return signs_of_two(&a[..len], &b[..len]);
    }
    vote(deltas, len, &mut scratch.elected);
    sum_of_signs(&scratch.elected)
}

/// One slice of the merged delta, before scaling, from the parents' trimmed deltas: 0 where trimmed. `majority` is the sign
/// of elements whose deltas sum to 0; 0 drops them. The deltas may come back multiplied. Unless `counted`, what is returned
/// means nothing.
pub(crate) fn ties(
    deltas: &mut [Vec<f32>],
    majority: i8,
    mean: TiesMean<'_>,
    counted: bool,
    out: &mut [f32],
    scratch: &mut TiesScratch,
) -> TiesCounts {
    let len = out.len();
    let majority = f32::from(majority);
    if let [a, b] = &*deltas {
        let two = OfTwo::of(mean, majority, counted);
        return ties_of_two(&a[..len], &b[..len], two, out);
    }
    for (k, delta) in deltas.iter_mut().enumerate() {
        let before = mean.factors(k).0;
        if before != 1.0 {
            super::multiply(before, &mut delta[..len]);
        }
    }
    vote(deltas, len, &mut scratch.elected);
    settle(majority, &mut scratch.elected);
    let TiesScratch {
        elected,
        total,
        count,
        only,
        sides,
    } = scratch;
    for buffer in [&mut *total, &mut *only] {
        buffer.clear();
        buffer.resize(len, 0.0);
    }
    for buffer in [&mut *count, &mut *sides] {
        buffer.clear();
        buffer.resize(len, 0);
    }
    out.fill(0.0);
    let mut kept = Vec::with_capacity(deltas.len());
    for (k, delta) in deltas.iter().enumerate() {
        let (_, factor, share) = mean.factors(k);
        let delta = &delta[..len];
        note_sides(delta, sides);
        kept.push(join(factor, share, delta, elected, out, total, count, only));
    }
    match mean {
        TiesMean::Premultiplied(_) => {}
        TiesMean::Weighted(_) | TiesMean::PremultipliedMean(_) => divide_by_kept(total, count, out),
        TiesMean::Mixup(_) => {
            divide_by_kept(total, count, out);
            keep_single(count, only, out);
        }
    }
    TiesCounts {
        kept,
        conflicting: both_sides(sides),
    }
}

/// What two parents are joined with.
#[derive(Debug, Clone, Copy)]
pub(super) struct OfTwo {
    weights: [f32; 2],
    pub premultiply: bool,
    /// Without either of the two, one agreeing delta keeps its value in full.
    pub divide: bool,
    counted: bool,
    majority: f32,
}

impl OfTwo {
    pub fn of(mean: TiesMean<'_>, majority: f32, counted: bool) -> Self {
        let (TiesMean::Weighted(weights)
        | TiesMean::Premultiplied(weights)
        | TiesMean::PremultipliedMean(weights)
        | TiesMean::Mixup(weights)) = mean;
        Self {
            weights: [weights[0], weights[1]],
            premultiply: matches!(mean, TiesMean::Premultiplied(_) | TiesMean::PremultipliedMean(_)),
            divide: matches!(mean, TiesMean::Weighted(_) | TiesMean::PremultipliedMean(_)),
            counted,
            majority,
        }
    }
}

/// [`ties`] of two parents in one loop, to the same bits.
fn ties_of_two(a: &[f32], b: &[f32], two: OfTwo, out: &mut [f32]) -> TiesCounts {
    let (kept, conflicting) = join_two(a, b, two, out);
    TiesCounts {
        kept: kept.map(u64::from).to_vec(),
        conflicting: u64::from(conflicting),
    }
}

/// The sum of the trimmed deltas of each element: its sign is elected.
fn vote(deltas: &[Vec<f32>], len: usize, sums: &mut Vec<f32>) {
    sums.clear();
    sums.resize(len, 0.0);
    for delta in deltas {
        super::add_scaled(1.0, &delta[..len], sums);
    }
}

/// Joins two deltas; the constants say what [`OfTwo`] does. Of two values of one sign both have the elected one; else the
/// larger has it, or of two equal ones that with the sign of the majority.
#[inline(always)]
pub(super) fn agree<const PREMULTIPLY: bool, const DIVIDE: bool, const KEEP_SINGLE: bool>(
    a: f32,
    b: f32,
    two: &OfTwo,
) -> f32 {
    let [weight_a, weight_b] = two.weights;
    let (a, b) = votes::<PREMULTIPLY>(a, b, two);
    let elected = elect(a, b, two);
    if DIVIDE {
        let [agrees_a, agrees_b] = agreement(a, b, elected);
        let (weighted_a, weighted_b) = match PREMULTIPLY {
            true => (a, b),
            false => (weight_a * a, weight_b * b),
        };
        let sum = keep_if(agrees_a, weighted_a) + keep_if(agrees_b, weighted_b);
        let total = keep_if(agrees_a, weight_a) + keep_if(agrees_b, weight_b);
        let mean = sum / total;
        return if total != 0.0 { mean } else { sum };
    }
    let both = match KEEP_SINGLE {
        true => weight_a * a + weight_b * b,
        false => a + b,
    };
    let smaller = if a < b { a } else { b };
    let larger = if a > b { a } else { b };
    let single = if elected.is_sign_negative() {
        smaller
    } else {
        larger
    };
    let single = keep_if(elected != 0.0, single);
    if (smaller > 0.0) | (larger < 0.0) {
        both
    } else {
        single
    }
}

/// What counts in the election.
#[inline(always)]
fn votes<const PREMULTIPLY: bool>(a: f32, b: f32, two: &OfTwo) -> (f32, f32) {
    match PREMULTIPLY {
        true => (two.weights[0] * a, two.weights[1] * b),
        false => (a, b),
    }
}

/// A number of the elected sign, or 0.
#[inline(always)]
fn elect(a: f32, b: f32, two: &OfTwo) -> f32 {
    let sum = a + b;
    if sum == 0.0 { two.majority } else { sum }
}

/// Which have the elected sign.
#[inline(always)]
fn agreement(a: f32, b: f32, elected: f32) -> [bool; 2] {
    let sign = elected.to_bits() & 0x8000_0000;
    let is_elected = elected != 0.0;
    [a, b].map(|value| (f32::from_bits(value.to_bits() ^ sign) > 0.0) & is_elected)
}

#[inline(always)]
fn join_two_as<const PREMULTIPLY: bool, const DIVIDE: bool, const KEEP_SINGLE: bool, const COUNTED: bool>(
    a: &[f32],
    b: &[f32],
    two: OfTwo,
    out: &mut [f32],
) -> ([u32; 2], u32) {
    let (mut kept_a, mut kept_b, mut conflicting) = (0u32, 0u32, 0u32);
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        if COUNTED {
            let (a, b) = votes::<PREMULTIPLY>(*a, *b, &two);
            let [agrees_a, agrees_b] = agreement(a, b, elect(a, b, &two));
            kept_a += u32::from(agrees_a);
            kept_b += u32::from(agrees_b);
            conflicting += u32::from((a != 0.0) & (b != 0.0)) & ((a.to_bits() ^ b.to_bits()) >> 31);
        }
        *out = agree::<PREMULTIPLY, DIVIDE, KEEP_SINGLE>(*a, *b, &two);
    }
    ([kept_a, kept_b], conflicting)
}

wide! {
    fn join_two<'a>(a: &'a [f32], b: &'a [f32], two: OfTwo, out: &'a mut [f32]) -> ([u32; 2], u32) {
        match (two.premultiply, two.divide, two.counted) {
            (true, true, true) => join_two_as::<true, true, false, true>(a, b, two, out),
            (true, true, false) => join_two_as::<true, true, false, false>(a, b, two, out),
            (true, false, true) => join_two_as::<true, false, false, true>(a, b, two, out),
            (true, false, false) => join_two_as::<true, false, false, false>(a, b, two, out),
            (false, true, true) => join_two_as::<false, true, false, true>(a, b, two, out),
            (false, true, false) => join_two_as::<false, true, false, false>(a, b, two, out),
            (false, false, true) => join_two_as::<false, false, true, true>(a, b, two, out),
            (false, false, false) => join_two_as::<false, false, true, false>(a, b, two, out),
        }
    }

    fn signs_of_two<'a>(a: &'a [f32], b: &'a [f32]) -> i64 {
        let mut total = 0i32;
        for (a, b) in a.iter().zip(b) {
            let sum = *a + *b;
            total += i32::from(sum > 0.0) - i32::from(sum < 0.0);
        }
        i64::from(total)
    }

    fn sum_of_signs<'a>(sums: &'a [f32]) -> i64 {
        let mut total = 0i32;
        for s in sums {
            total += i32::from(*s > 0.0) - i32::from(*s < 0.0);
        }
        i64::from(total)
    }

    /// From sums to signs.
    fn settle<'a>(majority: f32, sums: &'a mut [f32]) {
        for s in sums {
            *s = if *s > 0.0 { 1.0 } else if *s < 0.0 { -1.0 } else { majority };
        }
    }

    /// Bit 0: a delta above 0; bit 1: one below.
    pub(super) fn note_sides<'a>(delta: &'a [f32], sides: &'a mut [u32]) {
        for (side, d) in sides.iter_mut().zip(delta) {
            *side |= u32::from(*d > 0.0) | u32::from(*d < 0.0) << 1;
        }
    }

    /// Elements with both.
    pub(super) fn both_sides<'a>(sides: &'a [u32]) -> u64 {
        let mut count = 0u32;
        for side in sides {
            count += u32::from(*side == 3);
        }
        u64::from(count)
    }

    /// Adds one parent's values where they agree with the elected sign; returns how many do.
    #[allow(clippy::too_many_arguments)]
    fn join<'a>(
        factor: f32, share: f32, delta: &'a [f32], elected: &'a [f32], sum: &'a mut [f32], total: &'a mut [f32], count: &'a mut [u32],
        only: &'a mut [f32],
    ) -> u64 {
        let mut kept = 0u32;
        let len = delta.len();
        let (elected, sum, total) = (&elected[..len], &mut sum[..len], &mut total[..len]);
        let (count, only) = (&mut count[..len], &mut only[..len]);
        for i in 0..len {
            let d = delta[i];
            let e = elected[i];
            let agrees = (d > 0.0) & (e > 0.0) | (d < 0.0) & (e < 0.0);
            sum[i] += if agrees { factor * d } else { 0.0 };
            total[i] += if agrees { share } else { 0.0 };
            only[i] = if agrees { d } else { only[i] };
            count[i] += u32::from(agrees);
            kept += u32::from(agrees);
        }
        u64::from(kept)
    }

    fn divide_by_kept<'a>(total: &'a [f32], count: &'a [u32], out: &'a mut [f32]) {
        for ((o, total), count) in out.iter_mut().zip(total).zip(count) {
            let mean = *o / *total;
            *o = if *count == 0 || *total == 0.0 { *o } else { mean };
        }
    }

    fn keep_single<'a>(count: &'a [u32], only: &'a [f32], out: &'a mut [f32]) {
        for ((o, count), only) in out.iter_mut().zip(count).zip(only) {
            *o = if *count == 1 { *only } else { *o };
        }
    }
}
