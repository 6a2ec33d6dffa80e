//! The arithmetic, on slices of f32: parents in the order of the recipe, no fused multiply-add, no reordering.
//! Each function is elementwise, so that how a tensor is cut into slices cannot show in the result.
//!
//! Formulas and sources: docs/METHODS.md. These loops are the oracle for any faster version.

/// `out[i] = sum of w * x[i]`, in order; a parent with weight 0 is not read (0 * NaN is NaN).
pub(crate) fn weighted_sum(weights: &[f32], inputs: &[Vec<f32>], out: &mut [f32]) {
    let mut first = true;
    for (&w, input) in weights.iter().zip(inputs) {
        if w == 0.0 {
            continue;
        }
        if first {
            out.iter_mut().zip(input).for_each(|(o, &x)| *o = w * x);
        } else {
            out.iter_mut().zip(input).for_each(|(o, &x)| *o += w * x);
        }
        first = false;
    }
    if first {
        out.fill(0.0);
    }
}

/// `out[i] /= divisor`.
pub(crate) fn divide(out: &mut [f32], divisor: f32) {
    if divisor != 1.0 {
        out.iter_mut().for_each(|o| *o /= divisor);
    }
}

/// `out[i] = theta - theta0`.
pub(crate) fn delta(theta0: &[f32], theta: &[f32], out: &mut [f32]) {
    for ((o, &t), &t0) in out.iter_mut().zip(theta).zip(theta0) {
        *o = t - t0;
    }
}

/// `merged[i] = theta0 + scaling * merged[i]`; where the sum of deltas is 0 the base's value stays as it is, sign of
/// zero included.
pub(crate) fn add_to_base(theta0: &[f32], scaling: f32, merged: &mut [f32]) {
    for (m, &t0) in merged.iter_mut().zip(theta0) {
        *m = if *m == 0.0 { t0 } else { t0 + scaling * *m };
    }
}

/// How TIES weighs the parents that kept an element.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TiesWeights<'a> {
    /// Disjoint weighted mean: sum of w d over sum of w.
    Mean(&'a [f32]),
    /// Mixup: kept in both, lambda d1 + (1 - lambda) d2; kept in one, that value in full.
    Mixup(&'a [f32]),
}

/// The bits that order |x|: those of an f32 without its sign.
pub(crate) fn magnitude_bits(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// -1, 0 or 1.
pub(crate) fn sign(x: f32) -> i8 {
    i8::from(x > 0.0) - i8::from(x < 0.0)
}

/// Sum of the trimmed deltas of one element: those at or above each parent's threshold.
fn trimmed_sum(deltas: &[Vec<f32>], taus: &[u32], i: usize) -> f32 {
    let mut sum = 0.0f32;
    for (d, &tau) in deltas.iter().zip(taus) {
        if magnitude_bits(d[i]) >= tau {
            sum += d[i];
        }
    }
    sum
}

/// Sum of the elected signs of a slice: what the majority over the whole model is made of.
pub(crate) fn elected_signs(deltas: &[Vec<f32>], taus: &[u32], len: usize) -> i64 {
    (0..len)
        .map(|i| i64::from(sign(trimmed_sum(deltas, taus, i))))
        .sum()
}

/// What TIES kept of a slice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TiesCounts {
    /// For each parent the elements whose value went into the result.
    pub kept: Vec<u64>,
    /// Elements where trimmed deltas of both signs met.
    pub conflicting: u64,
}

/// TIES, variant global: trim at `taus` (bits of |delta|), elect by the sum of the trimmed deltas, where that is 0 by
/// `majority`, and merge the parents that agree. Writes the merged delta before scaling.
pub(crate) fn ties(
    weights: TiesWeights<'_>,
    deltas: &[Vec<f32>],
    taus: &[u32],
    majority: i8,
    out: &mut [f32],
) -> TiesCounts {
    let mut counts = TiesCounts {
        kept: vec![0; deltas.len()],
        conflicting: 0,
    };
    for (i, o) in out.iter_mut().enumerate() {
        let elected = match sign(trimmed_sum(deltas, taus, i)) {
            0 => majority,
            elected => elected,
        };
        let (mut sum, mut total, mut kept, mut only) = (0.0f32, 0.0f32, 0u32, 0.0f32);
        let (mut positive, mut negative) = (false, false);
        for (k, (d, &tau)) in deltas.iter().zip(taus).enumerate() {
            let d = d[i];
            let side = sign(d);
            if side == 0 || magnitude_bits(d) < tau {
                continue;
            }
            positive |= side > 0;
            negative |= side < 0;
            if side != elected {
                continue;
            }
            let (TiesWeights::Mean(w) | TiesWeights::Mixup(w)) = weights;
            if w[k] != 0.0 {
                sum += w[k] * d;
            }
            total += w[k];
            kept += 1;
            only = d;
            counts.kept[k] += 1;
        }
        counts.conflicting += u64::from(positive && negative);
        *o = match (weights, kept) {
            (_, 0) => 0.0,
            (TiesWeights::Mixup(_), 1) => only,
            (TiesWeights::Mixup(_), _) => sum,
            (TiesWeights::Mean(_), _) => sum / total,
        };
    }
    counts
}

/// Elements where deltas of both signs meet.
pub(crate) fn conflicting(deltas: &[Vec<f32>], len: usize) -> u64 {
    let mut count = 0;
    if let [a, b] = deltas {
        for (&a, &b) in a[..len].iter().zip(&b[..len]) {
            count += u64::from((a > 0.0 && b < 0.0) || (a < 0.0 && b > 0.0));
        }
        return count;
    }
    for i in 0..len {
        let positive = deltas.iter().any(|d| d[i] > 0.0);
        let negative = deltas.iter().any(|d| d[i] < 0.0);
        count += u64::from(positive && negative);
    }
    count
}

/// Sum of squares in f64 over eight lanes; for statistics only.
pub(crate) fn sum_squares(values: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(v) * f64::from(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(v) * f64::from(v);
    }
    lanes.iter().sum()
}

/// Sum of magnitudes in f64, in order: it decides the L1 rescaling, so the slices it is cut into are fixed.
pub(crate) fn sum_magnitudes(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(v.abs())).sum()
}

/// Whether all values are finite.
pub(crate) fn all_finite(values: &[f32]) -> bool {
    values
        .iter()
        .fold(true, |ok, v| ok & ((v.to_bits() & 0x7f80_0000) != 0x7f80_0000))
}
