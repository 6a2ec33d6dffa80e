//! TIES: election of a sign for each element, and the mean or the mixup of what agrees with it.
//!
//! Source: arXiv 2306.01708 with prateeky2806/ties-merging (global variant) and mergekit's `get_mask` (tensor variant).

use super::wide;

/// What goes into one slice: trimmed deltas of the parents, 0 where trimmed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TiesInput<'a> {
    pub deltas: &'a [Vec<f32>],
    /// Sign of elements whose trimmed deltas sum to 0: 0 drops them.
    pub majority: i8,
}

/// How the values that agree are joined.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TiesMean<'a> {
    /// Sum of w d over sum of w; every delta has one vote (the paper).
    Weighted(&'a [f32]),
    /// The deltas are w d already, in the election too (mergekit): their sum.
    Premultiplied,
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

/// Sum of the elected signs of a slice: what the majority over the whole model is made of.
pub(crate) fn elected_signs(input: &TiesInput<'_>, len: usize, scratch: &mut TiesScratch) -> i64 {
    vote(input, len, &mut scratch.elected);
    sum_of_signs(&scratch.elected)
}

/// One slice of the merged delta, before scaling.
pub(crate) fn ties(
    input: &TiesInput<'_>,
    mean: TiesMean<'_>,
    out: &mut [f32],
    scratch: &mut TiesScratch,
) -> TiesCounts {
    let len = out.len();
    vote(input, len, &mut scratch.elected);
    settle(f32::from(input.majority), &mut scratch.elected);
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
    let mut kept = Vec::with_capacity(input.deltas.len());
    for (k, delta) in input.deltas.iter().enumerate() {
        let (factor, share) = match mean {
            TiesMean::Weighted(w) | TiesMean::Mixup(w) => (w[k], w[k]),
            TiesMean::Premultiplied => (1.0, 1.0),
            TiesMean::PremultipliedMean(w) => (1.0, w[k]),
        };
        let delta = &delta[..len];
        note_sides(delta, sides);
        kept.push(join(factor, share, delta, elected, out, total, count, only));
    }
    match mean {
        TiesMean::Premultiplied => {}
        TiesMean::Weighted(_) | TiesMean::PremultipliedMean(_) => divide_by_kept(total, count, out),
        TiesMean::Mixup(_) if input.deltas.len() == 2 => keep_single(count, only, out),
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

/// The sum of the trimmed deltas of each element: its sign is elected.
fn vote(input: &TiesInput<'_>, len: usize, sums: &mut Vec<f32>) {
    sums.clear();
    sums.resize(len, 0.0);
    for delta in input.deltas {
        super::add_scaled(1.0, &delta[..len], sums);
    }
}

wide! {
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
    fn note_sides<'a>(delta: &'a [f32], sides: &'a mut [u32]) {
        for (side, d) in sides.iter_mut().zip(delta) {
            *side |= u32::from(*d > 0.0) | u32::from(*d < 0.0) << 1;
        }
    }

    fn both_sides<'a>(sides: &'a [u32]) -> u64 {
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
