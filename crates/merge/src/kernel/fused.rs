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
#[path = "fused_tests.rs"]
mod tests;
