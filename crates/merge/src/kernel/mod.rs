//! The arithmetic, on slices of f32 that fit in the first-level cache: parents in the order of the recipe, no fused
//! multiply-add, no reordering. Each function is elementwise or sums over fixed lanes, so how a tensor is cut into slices
//! cannot show in a merged element. Loops are compiled for the widest instructions of the machine (checkpoint's `simd`).
//!
//! Formulas and sources: docs/METHODS.md.

#[cfg(test)]
mod bench;
mod fused;
pub(crate) mod philox;
mod ties;

pub(crate) use fused::{Input, Joined, Thinned, fused};

#[cfg(feature = "gpu")]
pub(crate) use ties::TiesRules;
pub(crate) use ties::{TiesMean, TiesScratch, elected_signs, ties};

pub(crate) use cauldron_checkpoint::simd::{Loop, indices_within, nonzero, widest, within};

/// Elements that are looked at together where a buffer lies on the stack.
const BLOCK: usize = 256;
/// Running sums that vectorise; the order of addition is part of the arithmetic.
const LANES: usize = 16;

/// Defines functions whose loops run with the widest instructions of the machine.
macro_rules! wide {
    ($($(#[$doc:meta])* $vis:vis fn $name:ident<$lt:lifetime>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$doc])*
        $vis fn $name<$lt>($($arg: $ty),*) $(-> $ret)? {
            struct Call<$lt> { $($arg: $ty,)* marker: std::marker::PhantomData<&$lt ()> }
            impl<$lt> $crate::kernel::Loop for Call<$lt> {
                type Output = $crate::kernel::wide!(@ret $($ret)?);
                #[inline(always)]
                fn run(self) -> Self::Output {
                    let Self { $($arg,)* marker: _ } = self;
                    $body
                }
            }
            $crate::kernel::widest(Call { $($arg,)* marker: std::marker::PhantomData })
        }
    )*};
    (@ret $ret:ty) => { $ret };
    (@ret) => { () };
}
pub(crate) use wide;

/// `out[i] = sum of w * x[i]`, in order; a parent with weight 0 is not read (0 * NaN is NaN).
pub(crate) fn weighted_sum(weights: &[f32], inputs: &[Vec<f32>], out: &mut [f32]) {
    let mut first = true;
    for (&w, input) in weights.iter().zip(inputs) {
        if w == 0.0 {
            continue;
        }
        let input = &input[..out.len()];
        match first {
            true => scale_into(w, input, out),
            false => add_scaled(w, input, out),
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
        divide_by(divisor, out);
    }
}

wide! {
    /// `out = w x`.
    pub(crate) fn scale_into<'a>(w: f32, x: &'a [f32], out: &'a mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = w * *x;
        }
    }

    /// `out += w x`.
    pub(crate) fn add_scaled<'a>(w: f32, x: &'a [f32], out: &'a mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o += w * *x;
        }
    }

    /// `values *= by`.
    pub(crate) fn multiply<'a>(by: f32, values: &'a mut [f32]) {
        for v in values {
            *v *= by;
        }
    }

    fn divide_by<'a>(divisor: f32, out: &'a mut [f32]) {
        for o in out {
            *o /= divisor;
        }
    }

    /// `values -= base`.
    pub(crate) fn subtract<'a>(base: &'a [f32], values: &'a mut [f32]) {
        for (v, base) in values.iter_mut().zip(base) {
            *v -= *base;
        }
    }

    /// `out[i] = theta - theta0`.
    pub(crate) fn delta<'a>(theta0: &'a [f32], theta: &'a [f32], out: &'a mut [f32]) {
        for ((o, t), t0) in out.iter_mut().zip(theta).zip(theta0) {
            *o = *t - *t0;
        }
    }

    /// [`on_base`] of each element.
    pub(crate) fn add_to_base<'a>(theta0: &'a [f32], scaling: f32, merged: &'a mut [f32]) {
        for (m, t0) in merged.iter_mut().zip(theta0) {
            *m = on_base(*t0, scaling, *m);
        }
    }

    /// NearSwap: `a + w (b - a)` in mergekit's form `w b + (1 - w) a`, w = t / max(|a - b|, 1e-6) clamped to \[0, 1\].
    pub(crate) fn nearswap<'a>(t: f32, a: &'a [f32], b: &'a [f32], out: &'a mut [f32]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            let distance = (*a - *b).abs();
            let distance = if distance > 1e-6 { distance } else { 1e-6 };
            let w = t / distance;
            let w = if w < 0.0 { 0.0 } else { w };
            let w = if w > 1.0 { 1.0 } else { w };
            *o = w * *b + (1.0 - w) * *a;
        }
    }

    /// Whether all values are finite.
    pub(crate) fn all_finite<'a>(values: &'a [f32]) -> bool {
        let mut bad = 0u32;
        for v in values {
            bad |= u32::from(v.to_bits() & 0x7f80_0000 == 0x7f80_0000);
        }
        bad == 0
    }

    /// Elements that are not 0.
    pub(crate) fn count_nonzero<'a>(values: &'a [f32]) -> u64 {
        let mut count = 0u32;
        for v in values {
            count += u32::from(*v != 0.0);
        }
        u64::from(count)
    }

    /// Elements whose magnitude is exactly that of `bits`.
    pub(crate) fn count_equal<'a>(values: &'a [f32], bits: u32) -> u64 {
        let mut count = 0u32;
        for v in values {
            count += u32::from(magnitude_bits(*v) == bits);
        }
        u64::from(count)
    }

    /// Elements whose magnitude is smaller than that of `bits`, and those that have just that.
    pub(crate) fn count_below_and_equal<'a>(values: &'a [f32], bits: u32) -> (u64, u64) {
        let (mut below, mut equal) = (0u32, 0u32);
        for v in values {
            below += u32::from(magnitude_bits(*v) < bits);
            equal += u32::from(magnitude_bits(*v) == bits);
        }
        (u64::from(below), u64::from(equal))
    }

    /// Zeroes what lies below `low` or above `high`, by magnitude.
    pub(crate) fn keep_between<'a>(low: u32, high: u32, values: &'a mut [f32]) {
        for v in values {
            let magnitude = magnitude_bits(*v);
            *v = keep_if((magnitude >= low) & (magnitude <= high), *v);
        }
    }

    /// Sum of squares, summed in f32 over lanes of a slice of at most a few thousand elements; for statistics only.
    pub(crate) fn sum_squares<'a>(values: &'a [f32]) -> f64 {
        let mut lanes = [0f32; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for (lane, v) in lanes.iter_mut().zip(block) {
                *lane += *v * *v;
            }
        }
        for (lane, v) in lanes.iter_mut().zip(rest) {
            *lane += *v * *v;
        }
        lanes.iter().map(|lane| f64::from(*lane)).sum()
    }

    /// Sum of magnitudes in f64 over fixed lanes.
    pub(crate) fn sum_magnitudes<'a>(values: &'a [f32]) -> f64 {
        let mut lanes = [0f64; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for (lane, v) in lanes.iter_mut().zip(block) {
                *lane += f64::from(v.abs());
            }
        }
        for (lane, v) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(v.abs());
        }
        lanes.iter().sum()
    }

    /// Dot product in f64 over fixed lanes: products of two f32 are exact in f64.
    pub(crate) fn dot<'a>(a: &'a [f32], b: &'a [f32]) -> f64 {
        let mut lanes = [0f64; LANES];
        let ((a_blocks, a_rest), (b_blocks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (a, b) in a_blocks.iter().zip(b_blocks) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += f64::from(*a) * f64::from(*b);
            }
        }
        for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
            *lane += f64::from(*a) * f64::from(*b);
        }
        lanes.iter().sum()
    }

    /// Dot product in f32 over lanes of a slice of at most a few thousand elements; for statistics only.
    pub(crate) fn dot_f32<'a>(a: &'a [f32], b: &'a [f32]) -> f64 {
        let mut lanes = [0f32; LANES];
        let (a_blocks, b_blocks) = (a.as_chunks::<LANES>().0, b.as_chunks::<LANES>().0);
        for (a, b) in a_blocks.iter().zip(b_blocks) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += *a * *b;
            }
        }
        let tail = a_blocks.len() * LANES;
        for (lane, (a, b)) in lanes.iter_mut().zip(a[tail..].iter().zip(&b[tail..])) {
            *lane += *a * *b;
        }
        lanes.iter().map(|lane| f64::from(*lane)).sum()
    }

    /// [`sum_squares`] of `a` and `b`, their [`dot_f32`], and [`sum_squares`] of `base`, in one loop and to the same bits.
    pub(crate) fn moments<'a>(a: &'a [f32], b: &'a [f32], base: &'a [f32]) -> [f64; 4] {
        let mut lanes = [[0f32; LANES]; 4];
        let mut add = |a: &[f32], b: &[f32], base: &[f32]| {
            let [squares_a, squares_b, products, squares] = &mut lanes;
            for lane in 0..a.len() {
                squares_a[lane] += a[lane] * a[lane];
                squares_b[lane] += b[lane] * b[lane];
                products[lane] += a[lane] * b[lane];
                squares[lane] += base[lane] * base[lane];
            }
        };
        let ((a, a_rest), (b, b_rest), (base, base_rest)) =
            (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), base.as_chunks::<LANES>());
        for ((a, b), base) in a.iter().zip(b).zip(base) {
            add(a, b, base);
        }
        add(a_rest, b_rest, base_rest);
        lanes.map(|lanes| lanes.iter().map(|lane| f64::from(*lane)).sum())
    }

    /// Elements where `a` and `b` have opposite signs.
    fn opposite<'a>(a: &'a [f32], b: &'a [f32]) -> u64 {
        let mut count = 0u32;
        for (a, b) in a.iter().zip(b) {
            count += u32::from((*a > 0.0) & (*b < 0.0) | (*a < 0.0) & (*b > 0.0));
        }
        u64::from(count)
    }
}

/// The bits that order |x|: those of an f32 without its sign.
#[inline(always)]
pub(crate) fn magnitude_bits(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// `value`, or 0: without a choice, which compilers make a store under a mask of, slow on many machines.
#[inline(always)]
pub(crate) fn keep_if(stays: bool, value: f32) -> f32 {
    f32::from_bits(value.to_bits() & 0u32.wrapping_sub(u32::from(stays)))
}

/// `theta0 + scaling * merged`; where the sum of deltas is 0 the base's value stays as it is, sign of zero included.
#[inline(always)]
fn on_base(theta0: f32, scaling: f32, merged: f32) -> f32 {
    if merged == 0.0 {
        theta0
    } else {
        theta0 + scaling * merged
    }
}

/// `value` times the factor of those that stay, or 0.
#[inline(always)]
pub(crate) fn survive(stays: bool, factor: f32, value: f32) -> f32 {
    keep_if(stays, value * factor)
}

/// Elements where deltas of both signs meet.
pub(crate) fn conflicting(deltas: &[Vec<f32>], len: usize) -> u64 {
    match deltas {
        [] | [_] => 0,
        [a, b] => opposite(&a[..len], &b[..len]),
        _ => (0..len)
            .step_by(BLOCK)
            .map(|from| {
                let mut sides = [0u32; BLOCK];
                let block = from..len.min(from + BLOCK);
                for delta in deltas {
                    ties::note_sides(&delta[block.clone()], &mut sides[..block.len()]);
                }
                ties::both_sides(&sides[..block.len()])
            })
            .sum(),
    }
}
