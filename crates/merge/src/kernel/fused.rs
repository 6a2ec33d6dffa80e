//! Elementwise methods of a few parents in one loop, from the parents' bytes to the result's: nothing of f32 goes to memory
//! between the two. What is done to an element is what the loops over tiles do, to the same bits;
//! what this does not know is theirs.

use std::marker::PhantomData;

use cauldron_checkpoint::{Bf16, Dtype, F16, F32, Stored};

use super::ties::{OfTwo, TiesMean, agree};
use super::{Loop, keep_if, on_base, widest};

/// One parent's part of a tile.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    pub bytes: &'a [u8],
    pub thinned: Thinned<'a>,
}

/// What is dropped of a delta, and what is done to the rest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Thinned<'a> {
    /// In the place of each of the parent's bytes 0xff, or 0 where the element goes; empty where none is drawn.
    pub stays: &'a [u8],
    /// What the drawn survivors are multiplied by, and divided by.
    pub factor: f32,
    pub divisor: f32,
    /// Then those with a magnitude below this go, as bits.
    pub least: u32,
}

impl Thinned<'_> {
    /// Nothing is.
    pub const NOT: Self = Self {
        stays: &[],
        factor: 1.0,
        divisor: 1.0,
        least: 0,
    };

    fn is_nothing(&self) -> bool {
        self.stays.is_empty() && self.least == 0
    }
}

/// What the parents are joined by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Joined<'a> {
    /// Their weighted sum, of which no weight is 0: of themselves, or of their deltas, scaled and added to the base.
    Sum {
        weights: &'a [f32],
        scaling: Option<f32>,
    },
    Ties {
        mean: TiesMean<'a>,
        majority: i8,
        scaling: f32,
    },
}

/// Merges a tile. None if this does not know how; false if a value is not finite. In both cases `out` means nothing.
pub(crate) fn fused(
    dtype: Dtype,
    joined: Joined<'_>,
    theta0: &[u8],
    inputs: &[Input<'_>],
    out: &mut [u8],
) -> Option<bool> {
    match dtype {
        Dtype::BF16 => of_type::<Bf16>(joined, theta0, inputs, out),
        Dtype::F16 => of_type::<F16>(joined, theta0, inputs, out),
        Dtype::F32 => of_type::<F32>(joined, theta0, inputs, out),
        _ => None,
    }
}

fn of_type<S: Stored>(
    joined: Joined<'_>,
    theta0: &[u8],
    inputs: &[Input<'_>],
    out: &mut [u8],
) -> Option<bool> {
    match (joined, inputs) {
        (Joined::Sum { weights, scaling }, [a, b]) => {
            sum::<S, 2>(weights.try_into().ok()?, scaling, theta0, [*a, *b], out)
        }
        (Joined::Sum { weights, scaling }, [a, b, c]) => {
            sum::<S, 3>(weights.try_into().ok()?, scaling, theta0, [*a, *b, *c], out)
        }
        (
            Joined::Ties {
                mean,
                majority,
                scaling,
            },
            [a, b],
        ) => {
            let two = OfTwo::of(mean, f32::from(majority), false);
            let inputs = [*a, *b];
            match (two.premultiply, two.divide) {
                (true, true) => {
                    thinned::<S, _, 2>(Ties::<true, true, false>(two, scaling), theta0, inputs, out)
                }
                (true, false) => {
                    thinned::<S, _, 2>(Ties::<true, false, false>(two, scaling), theta0, inputs, out)
                }
                (false, true) => {
                    thinned::<S, _, 2>(Ties::<false, true, false>(two, scaling), theta0, inputs, out)
                }
                (false, false) => {
                    thinned::<S, _, 2>(Ties::<false, false, true>(two, scaling), theta0, inputs, out)
                }
            }
        }
        _ => None,
    }
}

fn sum<S: Stored, const K: usize>(
    weights: [f32; K],
    scaling: Option<f32>,
    theta0: &[u8],
    inputs: [Input<'_>; K],
    out: &mut [u8],
) -> Option<bool>
where
    Sum<K>: Join<K>,
{
    match scaling {
        None if inputs.iter().all(|input| input.thinned.is_nothing()) => {
            run::<S, _, Whole, K>(Sum(weights), theta0, inputs, out)
        }
        None => None,
        Some(scaling) => thinned::<S, _, K>(OnBase(weights, scaling), theta0, inputs, out),
    }
}

fn thinned<S: Stored, J: Join<K>, const K: usize>(
    join: J,
    theta0: &[u8],
    inputs: [Input<'_>; K],
    out: &mut [u8],
) -> Option<bool> {
    let all = |has: fn(&Thinned<'_>) -> bool| inputs.iter().all(|input| has(&input.thinned));
    if all(|t| t.is_nothing()) {
        run::<S, _, Whole, K>(join, theta0, inputs, out)
    } else if all(|t| t.stays.is_empty()) {
        run::<S, _, Trimmed, K>(join, theta0, inputs, out)
    } else if !all(|t| !t.stays.is_empty() && t.factor.is_finite()) {
        None
    } else if all(|t| t.least == 0 && t.divisor == 1.0) {
        run::<S, _, Multiplied, K>(join, theta0, inputs, out)
    } else if all(|t| t.least == 0 && t.factor == 1.0) {
        run::<S, _, Divided, K>(join, theta0, inputs, out)
    } else {
        run::<S, _, All, K>(join, theta0, inputs, out)
    }
}

/// What is done to a delta that was not dropped by a draw.
trait Thin: Copy {
    /// Whether elements are dropped by a draw before.
    const DRAWN: bool;
    fn of(thinned: &Thinned<'_>) -> Self;
    fn thin(self, delta: f32) -> f32;
}

#[derive(Clone, Copy)]
struct Whole;

impl Thin for Whole {
    const DRAWN: bool = false;

    fn of(_: &Thinned<'_>) -> Self {
        Self
    }
    #[inline(always)]
    fn thin(self, delta: f32) -> f32 {
        delta
    }
}

/// Zeroed below a magnitude.
#[derive(Clone, Copy)]
struct Trimmed(f32);

impl Thin for Trimmed {
    const DRAWN: bool = false;

    fn of(thinned: &Thinned<'_>) -> Self {
        // Bits beyond infinity are NaN, which nothing reaches.
        Self(f32::from_bits(thinned.least.min(0x7fff_ffff)))
    }
    #[inline(always)]
    fn thin(self, delta: f32) -> f32 {
        keep_if(delta.abs() >= self.0, delta)
    }
}

#[derive(Clone, Copy)]
struct Multiplied(f32);

impl Thin for Multiplied {
    const DRAWN: bool = true;

    fn of(thinned: &Thinned<'_>) -> Self {
        Self(thinned.factor)
    }
    #[inline(always)]
    fn thin(self, delta: f32) -> f32 {
        delta * self.0
    }
}

#[derive(Clone, Copy)]
struct Divided(f32);

impl Thin for Divided {
    const DRAWN: bool = true;

    fn of(thinned: &Thinned<'_>) -> Self {
        Self(thinned.divisor)
    }
    #[inline(always)]
    fn thin(self, delta: f32) -> f32 {
        delta / self.0
    }
}

/// Everything, one after the other.
#[derive(Clone, Copy)]
struct All {
    factor: Multiplied,
    divisor: Divided,
    least: Trimmed,
}

impl Thin for All {
    const DRAWN: bool = true;

    fn of(thinned: &Thinned<'_>) -> Self {
        Self {
            factor: Multiplied::of(thinned),
            divisor: Divided::of(thinned),
            least: Trimmed::of(thinned),
        }
    }
    #[inline(always)]
    fn thin(self, delta: f32) -> f32 {
        self.least.thin(self.divisor.thin(self.factor.thin(delta)))
    }
}

/// What an element is made of.
trait Join<const K: usize>: Copy {
    /// Whether the inputs are differences from the base.
    const ON_DELTAS: bool;
    fn join(self, theta0: f32, inputs: [f32; K]) -> f32;
}

#[derive(Clone, Copy)]
struct Sum<const K: usize>([f32; K]);

impl Join<2> for Sum<2> {
    const ON_DELTAS: bool = false;

    #[inline(always)]
    fn join(self, _: f32, [a, b]: [f32; 2]) -> f32 {
        self.0[0] * a + self.0[1] * b
    }
}

impl Join<3> for Sum<3> {
    const ON_DELTAS: bool = false;

    #[inline(always)]
    fn join(self, _: f32, [a, b, c]: [f32; 3]) -> f32 {
        self.0[0] * a + self.0[1] * b + self.0[2] * c
    }
}

#[derive(Clone, Copy)]
struct OnBase<const K: usize>([f32; K], f32);

impl<const K: usize> Join<K> for OnBase<K>
where
    Sum<K>: Join<K>,
{
    const ON_DELTAS: bool = true;

    #[inline(always)]
    fn join(self, theta0: f32, deltas: [f32; K]) -> f32 {
        on_base(theta0, self.1, Sum(self.0).join(theta0, deltas))
    }
}

#[derive(Clone, Copy)]
struct Ties<const PREMULTIPLY: bool, const DIVIDE: bool, const KEEP_SINGLE: bool>(OfTwo, f32);

impl<const PREMULTIPLY: bool, const DIVIDE: bool, const KEEP_SINGLE: bool> Join<2>
    for Ties<PREMULTIPLY, DIVIDE, KEEP_SINGLE>
{
    const ON_DELTAS: bool = true;

    #[inline(always)]
    fn join(self, theta0: f32, [a, b]: [f32; 2]) -> f32 {
        on_base(
            theta0,
            self.1,
            agree::<PREMULTIPLY, DIVIDE, KEEP_SINGLE>(a, b, &self.0),
        )
    }
}

fn run<S: Stored, J: Join<K>, T: Thin, const K: usize>(
    join: J,
    theta0: &[u8],
    inputs: [Input<'_>; K],
    out: &mut [u8],
) -> Option<bool> {
    let len = out.len();
    let fits =
        |input: &Input<'_>| input.bytes.len() == len && (!T::DRAWN || input.thinned.stays.len() == len);
    if J::ON_DELTAS && theta0.len() != len || !inputs.iter().all(fits) {
        return None;
    }
    Some(widest(Tile::<'_, S, J, T, K> {
        join,
        theta0,
        inputs,
        out,
        marker: PhantomData,
    }))
}

struct Tile<'a, S, J, T, const K: usize> {
    join: J,
    theta0: &'a [u8],
    inputs: [Input<'a>; K],
    out: &'a mut [u8],
    marker: PhantomData<(S, T)>,
}

impl<S: Stored, J: Join<K>, T: Thin, const K: usize> Loop for Tile<'_, S, J, T, K> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let join = self.join;
        let thin = self.inputs.map(|input| T::of(&input.thinned));
        let stays = self.inputs.map(|input| input.thinned.stays);
        let (out, out_rest) = self.out.as_chunks_mut::<4>();
        let len = out.len();
        let mut beyond = 0u32;
        {
            // Lengths that the compiler sees.
            let words = |bytes| &words_of(bytes)[..len];
            let base = if J::ON_DELTAS { words(self.theta0) } else { &[] };
            let thetas = self.inputs.map(|input| words(input.bytes));
            let stays = stays.map(|stays| if T::DRAWN { words(stays) } else { &[] });
            for (i, out) in out.iter_mut().enumerate() {
                let base = if J::ON_DELTAS {
                    u32::from_le_bytes(base[i])
                } else {
                    0
                };
                let (mut theta, mut stay) = ([0; K], [0; K]);
                for k in 0..K {
                    theta[k] = u32::from_le_bytes(thetas[k][i]);
                    if T::DRAWN {
                        stay[k] = u32::from_le_bytes(stays[k][i]);
                    }
                }
                let merged = four_bytes::<S, J, T, K>(join, base, theta, stay, thin, &mut beyond);
                *out = merged.to_le_bytes();
            }
        }
        if !out_rest.is_empty() {
            let last = |bytes: &[u8]| {
                let mut word = [0; 4];
                let rest = bytes.as_chunks::<4>().1;
                word[..rest.len()].copy_from_slice(rest);
                u32::from_le_bytes(word)
            };
            let base = if J::ON_DELTAS { last(self.theta0) } else { 0 };
            let theta = self.inputs.map(|input| last(input.bytes));
            let merged = four_bytes::<S, J, T, K>(join, base, theta, stays.map(last), thin, &mut beyond);
            out_rest.copy_from_slice(&merged.to_le_bytes()[..out_rest.len()]);
        }
        beyond & !S::MAGNITUDES == 0
    }
}

#[inline(always)]
fn words_of(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks().0
}

/// Merges the elements in four bytes. Sets a sign in `beyond` where a value is not finite.
#[inline(always)]
fn four_bytes<S: Stored, J: Join<K>, T: Thin, const K: usize>(
    join: J,
    base: u32,
    mut thetas: [u32; K],
    stays: [u32; K],
    thin: [T; K],
    beyond: &mut u32,
) -> u32 {
    *beyond |= infinities::<S>(base);
    for k in 0..K {
        *beyond |= infinities::<S>(thetas[k]);
        if T::DRAWN {
            // What goes is as the base: its delta is 0.
            thetas[k] = base ^ (base ^ thetas[k]) & stays[k];
        }
    }
    let mut bits = [0; 2];
    for (which, bits) in bits.iter_mut().enumerate().take(S::IN_FOUR_BYTES) {
        let theta0 = S::widen_one(base, which);
        let mut values = [0f32; K];
        for k in 0..K {
            values[k] = S::widen_one(thetas[k], which);
            if J::ON_DELTAS {
                values[k] = thin[k].thin(values[k] - theta0);
            }
        }
        *bits = join.join(theta0, values).to_bits();
    }
    let merged = S::narrow_together(bits);
    *beyond |= infinities::<S>(merged);
    merged
}

/// The signs of infinite values and NaN are set.
#[inline(always)]
fn infinities<S: Stored>(word: u32) -> u32 {
    (word & S::MAGNITUDES).wrapping_add(S::TO_INFINITY)
}

#[cfg(test)]
mod tests {
    use cauldron_checkpoint::{narrow, widen};

    use super::*;
    use crate::kernel::{TiesScratch, add_to_base, divide, keep_between, multiply, ties, weighted_sum};

    const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

    /// Numbers near each other, equal, opposite, 0 of both signs, and subnormal.
    fn numbers(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let value = ((state >> 16) % 9) as f32 * 0.25 - 1.0;
                match (state >> 26) % 8 {
                    0 => 0.0,
                    1 => -0.0,
                    2 => value * 2f32.powi(-16),
                    3 => value + (state >> 20) as f32 * 2f32.powi(-12),
                    _ => value,
                }
            })
            .collect()
    }

    fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * dtype.bitsize() / 8];
        assert!(narrow(dtype, values, &mut bytes));
        bytes
    }

    fn values(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() * 8 / dtype.bitsize()];
        widen(dtype, bytes, &mut values);
        values
    }

    /// By the loops over tiles.
    fn by_tiles(dtype: Dtype, joined: Joined<'_>, theta0: &[u8], inputs: &[Input<'_>]) -> Vec<u8> {
        let base = values(dtype, theta0);
        let on_deltas = !matches!(joined, Joined::Sum { scaling: None, .. });
        let mut deltas: Vec<Vec<f32>> = inputs.iter().map(|input| values(dtype, input.bytes)).collect();
        for (delta, input) in deltas.iter_mut().zip(inputs).filter(|_| on_deltas) {
            let Thinned {
                stays,
                factor,
                divisor,
                least,
            } = input.thinned;
            crate::kernel::subtract(&base, delta);
            for (d, stay) in delta.iter_mut().zip(stays.chunks(dtype.bitsize() / 8)) {
                *d = if stay[0] == 0 { 0.0 } else { *d };
            }
            multiply(factor, delta);
            divide(delta, divisor);
            keep_between(least, u32::MAX, delta);
        }
        let mut merged = vec![0.0; base.len()];
        let scaling = match joined {
            Joined::Sum { weights, scaling } => {
                weighted_sum(weights, &deltas, &mut merged);
                scaling
            }
            Joined::Ties {
                mean,
                majority,
                scaling,
            } => {
                // A third parent that changed nothing, so that this goes the way of many.
                deltas.push(vec![0.0; base.len()]);
                ties(
                    &mut deltas,
                    majority,
                    mean,
                    false,
                    &mut merged,
                    &mut TiesScratch::default(),
                );
                Some(scaling)
            }
        };
        if let Some(scaling) = scaling {
            add_to_base(&base, scaling, &mut merged);
        }
        stored(dtype, &merged)
    }

    fn joins() -> Vec<Joined<'static>> {
        let weights = &[0.3f32, 0.7, 0.0];
        let mut joins = vec![Joined::Sum {
            weights: &weights[..2],
            scaling: None,
        }];
        joins.extend([1.0, 0.8].map(|s| Joined::Sum {
            weights: &weights[..2],
            scaling: Some(s),
        }));
        for majority in [-1, 0, 1] {
            for mean in [
                TiesMean::Weighted(weights),
                TiesMean::Premultiplied(weights),
                TiesMean::PremultipliedMean(weights),
                TiesMean::Mixup(weights),
            ] {
                joins.push(Joined::Ties {
                    mean,
                    majority,
                    scaling: 0.9,
                });
            }
        }
        joins
    }

    #[test]
    fn one_loop_gives_the_bits_of_the_loops_over_tiles() {
        let mut compared = 0;
        for dtype in DTYPES {
            for len in [1usize, 2, 31, 64, 1001] {
                let size = dtype.bitsize() / 8;
                let [theta0, a, b] = [1, 2, 3].map(|seed| stored(dtype, &numbers(len, seed * 77)));
                let [stays_a, stays_b] = [3, 4].map(|n| -> Vec<u8> {
                    (0..len)
                        .flat_map(|i| vec![if i % n == 0 { 0 } else { 0xff }; size])
                        .collect()
                });
                let least = 0.5f32.to_bits();
                let thinned: Vec<[Thinned<'_>; 2]> = vec![
                    [Thinned::NOT; 2],
                    [
                        Thinned {
                            least,
                            ..Thinned::NOT
                        },
                        Thinned::NOT,
                    ],
                    [
                        Thinned {
                            least: u32::MAX,
                            ..Thinned::NOT
                        },
                        Thinned {
                            least,
                            ..Thinned::NOT
                        },
                    ],
                    [&stays_a, &stays_b].map(|stays| Thinned {
                        stays,
                        factor: 1.7,
                        ..Thinned::NOT
                    }),
                    [&stays_a, &stays_b].map(|stays| Thinned {
                        stays,
                        divisor: 0.3,
                        ..Thinned::NOT
                    }),
                    [
                        Thinned {
                            stays: &stays_a,
                            factor: 2.0,
                            ..Thinned::NOT
                        },
                        Thinned {
                            stays: &stays_b,
                            divisor: 0.7,
                            least,
                            ..Thinned::NOT
                        },
                    ],
                ];
                for (joined, [thin_a, thin_b]) in joins()
                    .into_iter()
                    .flat_map(|join| thinned.iter().map(move |t| (join, *t)))
                {
                    let inputs =
                        [(&a, thin_a), (&b, thin_b)].map(|(bytes, thinned)| Input { bytes, thinned });
                    let mut out = vec![0; theta0.len()];
                    match fused(dtype, joined, &theta0, &inputs, &mut out) {
                        Some(finite) => assert!(finite),
                        None => continue,
                    }
                    compared += 1;
                    let expected = by_tiles(dtype, joined, &theta0, &inputs);
                    assert!(out == expected, "{dtype:?} {len} {joined:?} {thin_a:?}");
                }
            }
        }
        assert_eq!(compared, 3 * 5 * (1 + 14 * 6));
    }

    #[test]
    fn what_is_not_finite_is_reported_wherever_it_lies() {
        for dtype in DTYPES {
            let size = dtype.bitsize() / 8;
            for len in [1usize, 64, 101] {
                for at in [0, len / 2, len - 1] {
                    for bad in [
                        f32::INFINITY,
                        f32::NEG_INFINITY,
                        f32::NAN,
                        f32::from_bits(0xffff_ffff),
                    ] {
                        for which in 0..3 {
                            let mut all = [1, 2, 3].map(|seed| stored(dtype, &numbers(len, seed)));
                            narrow(dtype, &[bad], &mut all[which][at * size..(at + 1) * size]);
                            if bad.is_nan() && dtype == Dtype::BF16 {
                                // What narrowing makes of the widest payload is a number.
                                all[which][at * size..(at + 1) * size].copy_from_slice(&[0xff, 0x7f]);
                            }
                            // Dropped or not.
                            let stays = vec![0; len * size];
                            for stays in [&[][..], &stays] {
                                let inputs = [1, 2].map(|k| Input {
                                    bytes: &all[k],
                                    thinned: Thinned {
                                        stays,
                                        ..Thinned::NOT
                                    },
                                });
                                for joined in joins() {
                                    let mut out = vec![0; len * size];
                                    let reads_base = !matches!(joined, Joined::Sum { scaling: None, .. });
                                    if let Some(finite) = fused(dtype, joined, &all[0], &inputs, &mut out) {
                                        assert_eq!(
                                            finite,
                                            which == 0 && !reads_base,
                                            "{dtype:?} {at} of {len}, {which}: {bad}"
                                        );
                                    }
                                }
                            }
                        }
                    }
                }
            }
            // A sum beyond the largest number.
            let large = stored(dtype, &[if dtype == Dtype::F16 { 60_000.0 } else { 3e38 }; 3]);
            let inputs = [0; 2].map(|_| Input {
                bytes: &large,
                thinned: Thinned::NOT,
            });
            let joined = Joined::Sum {
                weights: &[1.0, 1.0],
                scaling: None,
            };
            let mut out = vec![0; large.len()];
            assert_eq!(fused(dtype, joined, &[], &inputs, &mut out), Some(false));
        }
    }
}
