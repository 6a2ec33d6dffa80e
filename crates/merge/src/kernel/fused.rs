//! Elementwise methods of a few parents in one loop, from the parents' bytes to the result's: nothing of f32 goes to memory
//! between the two. What is done to an element is what the loops over tiles do, by the same functions and to the same bits;
//! what this does not know is theirs.

use cauldron_checkpoint::{Bf16, Dtype, F16, F32, Stored};

use super::ties::{OfTwo, TiesMean, agree};
use super::{Loop, at_least, on_base, survive, widest};

/// One parent's part of a tile.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    pub bytes: &'a [u8],
    pub thinned: Thinned<'a>,
}

/// What is dropped of a delta, and what is done to the rest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Thinned<'a> {
    /// Elements whose word lies below the threshold go; empty where none is drawn.
    pub words: &'a [u32],
    pub threshold: u32,
    /// What the drawn survivors are multiplied by, and divided by.
    pub factor: f32,
    pub divisor: f32,
    /// Then those with a magnitude below this go, as bits.
    pub least: u32,
}

impl Thinned<'_> {
    /// Nothing is.
    pub const NOT: Self = Self {
        words: &[],
        threshold: 0,
        factor: 1.0,
        divisor: 1.0,
        least: 0,
    };
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
) -> Option<bool> {
    let is_whole = |input: &Input<'_>| input.thinned.words.is_empty() && input.thinned.least == 0;
    let is_whole = inputs.iter().all(is_whole);
    match scaling {
        None if is_whole => run::<S, _, K, false, false>(Sum(weights), theta0, inputs, out),
        None => None,
        Some(scaling) if is_whole => {
            run::<S, _, K, false, false>(OnBase(weights, scaling), theta0, inputs, out)
        }
        Some(scaling) => thinned::<S, _, K>(OnBase(weights, scaling), theta0, inputs, out),
    }
}

fn thinned<S: Stored, J: Join<K>, const K: usize>(
    join: J,
    theta0: &[u8],
    inputs: [Input<'_>; K],
    out: &mut [u8],
) -> Option<bool> {
    let drawn = inputs.iter().filter(|input| !input.thinned.words.is_empty());
    match drawn.count() {
        0 => run::<S, _, K, false, true>(join, theta0, inputs, out),
        drawn if drawn == K => run::<S, _, K, true, true>(join, theta0, inputs, out),
        _ => None,
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

impl<const K: usize> Join<K> for Sum<K> {
    const ON_DELTAS: bool = false;

    #[inline(always)]
    fn join(self, _: f32, inputs: [f32; K]) -> f32 {
        let mut sum = self.0[0] * inputs[0];
        for (weight, input) in self.0.iter().zip(&inputs).skip(1) {
            sum += weight * input;
        }
        sum
    }
}

#[derive(Clone, Copy)]
struct OnBase<const K: usize>([f32; K], f32);

impl<const K: usize> Join<K> for OnBase<K> {
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
            agree::<PREMULTIPLY, DIVIDE, KEEP_SINGLE>(a, b, &self.0).merged,
        )
    }
}

fn run<S: Stored, J: Join<K>, const K: usize, const DRAWN: bool, const TRIMMED: bool>(
    join: J,
    theta0: &[u8],
    inputs: [Input<'_>; K],
    out: &mut [u8],
) -> Option<bool> {
    let out = S::elements_mut(out);
    let theta0 = S::elements(theta0);
    let len = if J::ON_DELTAS { theta0.len() } else { out.len() };
    let fits = |input: &Input<'_>| {
        input.bytes.len() == len * S::SIZE && (!DRAWN || input.thinned.words.len() == len)
    };
    if out.len() != len || !inputs.iter().all(fits) {
        return None;
    }
    Some(widest(Tile::<'_, S, J, K, DRAWN, TRIMMED> {
        join,
        theta0,
        thetas: inputs.map(|input| S::elements(input.bytes)),
        thinned: inputs.map(|input| input.thinned),
        out,
    }))
}

struct Tile<'a, S: Stored, J, const K: usize, const DRAWN: bool, const TRIMMED: bool> {
    join: J,
    theta0: &'a [S::Bytes],
    thetas: [&'a [S::Bytes]; K],
    thinned: [Thinned<'a>; K],
    out: &'a mut [S::Bytes],
}

impl<S: Stored, J: Join<K>, const K: usize, const DRAWN: bool, const TRIMMED: bool> Loop
    for Tile<'_, S, J, K, DRAWN, TRIMMED>
{
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let len = self.out.len();
        // Lengths that the compiler sees.
        let theta0 = if J::ON_DELTAS {
            &self.theta0[..len]
        } else {
            self.theta0
        };
        let thetas = self.thetas.map(|theta| &theta[..len]);
        let words = self
            .thinned
            .map(|t| if DRAWN { &t.words[..len] } else { t.words });
        let least = self.thinned.map(|t| t.least.min(0x7fff_ffff).cast_signed());
        let (mut largest, mut merged_largest) = (S::Word::default(), 0u32);
        for (i, out) in self.out.iter_mut().enumerate() {
            let mut base = 0.0;
            if J::ON_DELTAS {
                let word = S::load(theta0[i]);
                largest = largest.max(S::magnitude(word));
                base = S::widen(word);
            }
            let mut values = [0f32; K];
            for k in 0..K {
                let word = S::load(thetas[k][i]);
                largest = largest.max(S::magnitude(word));
                let mut value = S::widen(word);
                if J::ON_DELTAS {
                    value -= base;
                }
                let thinned = &self.thinned[k];
                if DRAWN {
                    value =
                        survive(words[k][i] >= thinned.threshold, thinned.factor, value) / thinned.divisor;
                }
                if TRIMMED {
                    value = at_least(least[k], value);
                }
                values[k] = value;
            }
            let bits = self.join.join(base, values).to_bits();
            merged_largest = merged_largest.max(bits & 0x7fff_ffff);
            *out = S::narrow(bits);
        }
        (largest < S::INFINITY) & (merged_largest < S::OVERFLOW)
    }
}
