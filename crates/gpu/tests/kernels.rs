//! The kernels of the merge, compiled for the CPU (feature `emulated`), beside the same arithmetic written out element by
//! element, on numbers that models hardly have: zeros of both signs, subnormal ones, magnitudes where a reciprocal is of no use.

#![cfg(feature = "emulated")]
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use cauldron_gpu::{
    Bytes, Chance, Change, Draw, Edge, Gpu, Mean, Member, Number, Operation, Pass, Survivors,
};

/// A delta that many elements have.
const SIZE: f32 = 0.03125;
/// More than a tile, and no whole number of runs.
const ELEMENTS: usize = 8192 + 1003;

fn gpu() -> Gpu {
    Gpu::new(&Device::Cpu).unwrap()
}

/// Numbers without end.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One of a kind that makes trouble, its magnitude below 2^40.
    fn value(&mut self) -> f32 {
        let sign = (self.next() as u32 & 1) << 31;
        let mantissa = self.next() as u32 & 0x7f_ffff;
        let exponent = match self.next() % 8 {
            0 => return f32::from_bits(sign),
            // Subnormal.
            1 => 0,
            // About 1e-30, below which the quotient is not taken from the reciprocal.
            2 => 20 + self.next() as u32 % 15,
            3 => self.next() as u32 % 167,
            // Such as weights have.
            _ => 115 + self.next() as u32 % 12,
        };
        // Often of few bits, so that parents have elements in common, and deltas of the same size.
        let bits = if self.next().is_multiple_of(2) {
            0x7c_0000
        } else {
            0x7f_ffff
        };
        f32::from_bits(sign | exponent << 23 | mantissa & bits)
    }

    fn values(&mut self, like: &[f32]) -> Vec<f32> {
        (0..ELEMENTS)
            .map(|i| match (self.next() % 5, like.get(i)) {
                (0, Some(like)) => *like,
                // Where edges are.
                (1, Some(like)) => like + [SIZE, -SIZE][self.next() as usize % 2],
                _ => self.value(),
            })
            .collect()
    }
}

/// A member of a pass with all that may be done to it.
#[derive(Clone, Copy)]
struct Rule {
    number: Number,
    formed: bool,
    masked: bool,
    between: Option<[(u32, u64); 2]>,
    survivors: Survivors,
    trim: Option<(u32, u64)>,
    before: f32,
    factor: f32,
    share: f32,
}

const PLAIN: Rule = Rule {
    number: Number::Bf16,
    formed: false,
    masked: false,
    between: None,
    survivors: Survivors::Keep,
    trim: None,
    before: 1.0,
    factor: 0.35,
    share: 0.35,
};

/// Nothing is done to a delta that is kept.
fn keeping(kept: Option<&Bytes>) -> Change<'_> {
    Change {
        kept,
        between: None,
        survivors: Survivors::Keep,
        trim: Edge::LOWEST,
    }
}

fn encoded(values: &[f32], number: Number) -> Vec<u8> {
    let of = |value: &f32| match number {
        Number::Bf16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
        Number::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
        Number::F32 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(of).collect()
}

/// As the type has them.
fn stored(values: &[f32], number: Number) -> Vec<f32> {
    let of = |value: &f32| match number {
        Number::Bf16 => half::bf16::from_f32(*value).to_f32(),
        // Sums of them stay finite.
        Number::F16 => half::f16::from_f32(value.clamp(-100.0, 100.0)).to_f32(),
        Number::F32 => *value,
    };
    values.iter().map(of).collect()
}

fn is_above(edge: (u32, u64), value: f32, at: usize) -> bool {
    let bits = value.abs().to_bits();
    bits > edge.0 || (bits == edge.0 && (at as u64) < edge.1)
}

struct Case {
    operation: Operation,
    rules: Vec<Rule>,
    base: Number,
    out: Number,
    divisor: f32,
    scaling: f32,
    majority: f32,
}

impl Case {
    /// What becomes of one element.
    fn element(&self, at: usize, theta0: f32, values: &[f32], kept: &[Vec<bool>]) -> f32 {
        let mut deltas = Vec::new();
        for ((rule, value), kept) in self.rules.iter().zip(values).zip(kept) {
            if self.operation == Operation::WeightedSum {
                deltas.push(*value);
                continue;
            }
            let mut delta = if rule.formed { *value } else { value - theta0 };
            if rule.masked && !kept[at] {
                delta = 0.0;
            }
            if let Some([low, high]) = rule.between
                && (!is_above(low, delta, at) || is_above(high, delta, at))
            {
                delta = 0.0;
            }
            delta = match rule.survivors {
                Survivors::Keep => delta,
                Survivors::Divide(by) => delta / by,
                Survivors::Multiply(by) => delta * by,
            };
            if let (Operation::Ties(_), Some(trim)) = (self.operation, rule.trim)
                && !is_above(trim, delta, at)
            {
                delta = 0.0;
            }
            deltas.push(delta);
        }
        let on_base = |change: f32, scaling: f32| {
            if change == 0.0 {
                theta0
            } else {
                theta0 + scaling * change
            }
        };
        if self.operation == Operation::SparseSum {
            deltas.iter_mut().for_each(|delta| *delta = on_base(*delta, 1.0));
        }
        let Operation::Ties(mean) = self.operation else {
            let terms = self
                .rules
                .iter()
                .zip(&deltas)
                .filter(|(rule, _)| rule.factor != 0.0);
            let sum = terms
                .map(|(rule, delta)| rule.factor * delta)
                .reduce(|a, b| a + b);
            let sum = sum.unwrap_or(0.0) / self.divisor;
            return match self.operation {
                Operation::Deltas => on_base(sum, self.scaling),
                _ => sum,
            };
        };
        for (delta, rule) in deltas.iter_mut().zip(&self.rules) {
            *delta *= rule.before;
        }
        let vote = deltas.iter().fold(0.0f32, |sum, delta| sum + delta);
        let elected = if vote > 0.0 {
            1.0
        } else if vote < 0.0 {
            -1.0
        } else {
            self.majority
        };
        let agree: Vec<_> = self
            .rules
            .iter()
            .zip(&deltas)
            .filter(|(_, delta)| (**delta > 0.0 && elected > 0.0) || (**delta < 0.0 && elected < 0.0))
            .collect();
        let sum = agree
            .iter()
            .fold(0.0f32, |sum, (rule, delta)| sum + rule.factor * **delta);
        let total = agree.iter().fold(0.0f32, |sum, (rule, _)| sum + rule.share);
        let change = match (mean, agree.as_slice()) {
            (Mean::Mixup, [(_, only)]) => **only,
            (Mean::Mixup, _) if self.rules.len() == 2 => sum,
            (Mean::Mean | Mean::Mixup, _) if total != 0.0 => sum / total,
            _ => sum,
        };
        on_base(change, self.scaling)
    }

    fn check(&self, numbers: &mut Numbers) {
        let gpu = gpu();
        let base = stored(&numbers.values(&[]), self.base);
        let values: Vec<Vec<f32>> = self
            .rules
            .iter()
            .map(|rule| stored(&numbers.values(&base), rule.number))
            .collect();
        let kept: Vec<Vec<bool>> = self
            .rules
            .iter()
            .map(|_| (0..ELEMENTS).map(|_| !numbers.next().is_multiple_of(3)).collect())
            .collect();
        let upload = |bytes: &[u8]| gpu.upload(bytes).unwrap();
        let bits = |kept: &Vec<bool>| {
            let mut bytes = vec![0u8; ELEMENTS.div_ceil(32) * 4];
            for (i, _) in kept.iter().enumerate().filter(|(_, kept)| **kept) {
                bytes[i / 8] |= 1 << (i % 8);
            }
            upload(&bytes)
        };
        let masks: Vec<Bytes> = kept.iter().map(bits).collect();
        let inputs: Vec<Bytes> = self
            .rules
            .iter()
            .zip(&values)
            .map(|(rule, values)| upload(&encoded(values, rule.number)))
            .collect();
        let there = upload(&encoded(&base, self.base));
        let edge = |(bits, index): (u32, u64)| Edge::new(bits, index);
        let members = self.rules.iter().zip(&inputs).zip(&masks);
        let members = members.map(|((rule, values), mask)| Member {
            values,
            number: rule.number,
            formed: rule.formed,
            change: Change {
                kept: rule.masked.then_some(mask),
                between: rule.between.map(|[low, high]| (edge(low), edge(high))),
                survivors: rule.survivors,
                trim: rule.trim.map_or(Edge::LOWEST, edge),
            },
            before: rule.before,
            factor: rule.factor,
            share: rule.share,
        });
        let pass = Pass {
            operation: self.operation,
            elements: ELEMENTS,
            base: (self.operation != Operation::WeightedSum).then_some((&there, self.base)),
            members: members.collect(),
            divisor: self.divisor,
            scaling: self.scaling,
            majority: self.majority,
            out: self.out,
        };
        let size = encoded(&[0.0], self.out).len();
        let mut out = gpu.bytes(size * ELEMENTS).unwrap();
        let flag = Tensor::zeros(1, DType::U32, &Device::Cpu).unwrap();
        let passes = [pass];
        let plan = gpu.plan(&passes).unwrap();
        gpu.merge(&plan, &passes, &mut [&mut out], &flag).unwrap();
        let found = gpu.download(&out).unwrap();
        let expected: Vec<f32> = (0..ELEMENTS)
            .map(|at| {
                let values: Vec<f32> = values.iter().map(|values| values[at]).collect();
                self.element(at, base[at], &values, &kept)
            })
            .collect();
        assert!(expected.iter().all(|value| value.is_finite()));
        let expected_bytes = encoded(&expected, self.out);
        for at in 0..ELEMENTS {
            let range = size * at..size * (at + 1);
            assert_eq!(
                found[range.clone()],
                expected_bytes[range],
                "{:?} of {} to {:?}: element {at}, {:e} of {:e} and {:?}",
                self.operation,
                self.rules.len(),
                self.out,
                expected[at],
                base[at],
                values.iter().map(|values| values[at]).collect::<Vec<_>>(),
            );
        }
        assert_eq!(flag.to_vec1::<u32>().unwrap(), [0]);
    }
}

#[test]
fn every_kernel_does_the_arithmetic_written_out() {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    let operations = [
        Operation::WeightedSum,
        Operation::Deltas,
        Operation::SparseSum,
        Operation::Ties(Mean::Sum),
        Operation::Ties(Mean::Mean),
        Operation::Ties(Mean::Mixup),
    ];
    let size = SIZE.to_bits();
    // Edges within a run, between two, before and after all of them.
    let edges = [
        (size, 4003),
        (size, 4000),
        (0, 5),
        (0, 0),
        (size, u64::MAX),
        (size, 9193),
    ];
    let sparsifiers = |k: usize| {
        let between = Some([edges[k % 6], (0.5f32.to_bits(), 8197 + k as u64)]);
        [
            PLAIN,
            Rule {
                formed: true,
                number: Number::F32,
                ..PLAIN
            },
            Rule {
                masked: true,
                survivors: Survivors::Divide(0.8),
                ..PLAIN
            },
            Rule {
                masked: true,
                survivors: Survivors::Divide(0.1),
                ..PLAIN
            },
            // All bits of its mantissa are set; too large for a reciprocal.
            Rule {
                survivors: Survivors::Divide(f32::from_bits(0x3f7f_ffff)),
                ..PLAIN
            },
            Rule {
                survivors: Survivors::Divide(3.0e5),
                ..PLAIN
            },
            Rule {
                masked: true,
                survivors: Survivors::Multiply(1.234),
                ..PLAIN
            },
            Rule { between, ..PLAIN },
            Rule {
                number: Number::F32,
                masked: true,
                survivors: Survivors::Divide(0.3),
                ..PLAIN
            },
            Rule {
                between,
                survivors: Survivors::Multiply(0.7),
                ..PLAIN
            },
        ]
    };
    let types = [Number::Bf16, Number::F16, Number::F32];
    for operation in operations {
        for count in [1, 2, 3, 4] {
            for sparsifier in 0..10 {
                let rules = (0..count)
                    .map(|k| Rule {
                        trim: Some(edges[(k + sparsifier) % 6]),
                        factor: [0.35, -0.65, 0.0, 1.5][(k + sparsifier) % 4],
                        share: [0.35, 0.65, 1.0, 1.5][(k + sparsifier) % 4],
                        before: [1.0, 0.5, 1.0, -0.25][(k + sparsifier) % 4],
                        ..sparsifiers(k + sparsifier)[sparsifier]
                    })
                    .collect();
                let mut case = Case {
                    operation,
                    rules,
                    base: Number::Bf16,
                    out: types[sparsifier % 3],
                    divisor: [1.0, 3.0, 2.0, -1.0, -0.7][(count + sparsifier) % 5],
                    scaling: [1.0, 0.7][sparsifier % 2],
                    majority: [1.0, -1.0, 0.0][(count + sparsifier) % 3],
                };
                if matches!(operation, Operation::Ties(_)) {
                    case.divisor = 1.0;
                }
                if case.out == Number::F16 {
                    case.base = Number::F16;
                    for rule in &mut case.rules {
                        rule.number = Number::F16;
                    }
                }
                if sparsifier == 5 {
                    // One parent of each type.
                    for (k, rule) in case.rules.iter_mut().enumerate() {
                        rule.number = types[k % 3];
                    }
                }
                case.check(&mut numbers);
            }
        }
    }
}

#[test]
fn a_result_that_is_not_finite_is_told() {
    let gpu = gpu();
    for (value, number, out) in [
        (3.0e38, Number::F32, Number::F32),
        (3.0e38, Number::Bf16, Number::Bf16),
        (6.0e4, Number::F32, Number::F16),
    ] {
        for at in [0, 5, 8191, ELEMENTS - 1] {
            for is_large in [false, true] {
                let mut values = vec![1.0f32; ELEMENTS];
                values[at] = if is_large { value } else { 1.0 };
                let values = gpu.upload(&encoded(&values, number)).unwrap();
                let members = [0, 1].map(|_| Member {
                    values: &values,
                    number,
                    formed: false,
                    change: keeping(None),
                    before: 1.0,
                    factor: 1.0,
                    share: 1.0,
                });
                let passes = [Pass {
                    operation: Operation::WeightedSum,
                    elements: ELEMENTS,
                    base: None,
                    members: members.to_vec(),
                    divisor: 1.0,
                    scaling: 1.0,
                    majority: 1.0,
                    out,
                }];
                let mut to = gpu.bytes(encoded(&[0.0], out).len() * ELEMENTS).unwrap();
                let flag = Tensor::zeros(1, DType::U32, &Device::Cpu).unwrap();
                let plan = gpu.plan(&passes).unwrap();
                gpu.merge(&plan, &passes, &mut [&mut to], &flag).unwrap();
                let told = flag.to_vec1::<u32>().unwrap() != [0];
                assert_eq!(told, is_large, "{value} at {at} to {out:?}");
            }
        }
    }
}

#[test]
fn bits_that_are_drawn_from_any_element_on_are_those_of_the_whole() {
    let gpu = gpu();
    let (key, threshold) = ([7, 11], 1 << 30);
    let bit = |bytes: &[u8], i: usize| bytes[i / 8] >> (i % 8) & 1;
    let whole = gpu
        .download(&gpu.keep_bits(1000, key, threshold).unwrap())
        .unwrap();
    for first in [0, 1, 2, 3, 4, 31, 64, 333] {
        let elements = 1000 - first - first % 7;
        let mut lane = gpu.lane().unwrap();
        lane.reserve(0, elements * 4).unwrap();
        lane.reserve(elements.div_ceil(32) * 4, elements * 4).unwrap();
        let bits = lane.input(0..elements.div_ceil(32) * 4).unwrap();
        // Ones, of which the bits keep some.
        let ones = gpu.upload(&encoded(&vec![1.0; elements], Number::F32)).unwrap();
        let base = gpu.upload(&encoded(&vec![0.0; elements], Number::F32)).unwrap();
        let draw = Draw {
            bits: &bits,
            first,
            elements,
            key,
            threshold,
        };
        let pass = Pass {
            operation: Operation::Deltas,
            elements,
            base: Some((&base, Number::F32)),
            members: vec![Member {
                values: &ones,
                number: Number::F32,
                formed: false,
                change: keeping(Some(&bits)),
                before: 1.0,
                factor: 1.0,
                share: 1.0,
            }],
            divisor: 1.0,
            scaling: 1.0,
            majority: 1.0,
            out: Number::F32,
        };
        let out = lane.out(0..4 * elements).unwrap();
        lane.start(0, &[draw], &[(pass, out)], 4 * elements).unwrap();
        assert!(lane.host().is_err(), "it is in use");
        let found = lane.finish().unwrap().unwrap().to_vec();
        for i in 0..elements {
            let kept = f32::from_le_bytes(found[4 * i..4 * i + 4].try_into().unwrap()) == 1.0;
            assert_eq!(kept, bit(&whole, first + i) == 1, "element {i} from {first}");
        }
    }
}

/// The rules of `Sampler` in crates/lm, one step after the other.
fn token_of(logits: &[f32], chance: &Chance) -> u32 {
    let best = logits
        .iter()
        .copied()
        .filter(|l| !l.is_nan())
        .fold(f32::NEG_INFINITY, f32::max);
    let mut all: Vec<(u32, f64)> = (0..)
        .zip(logits)
        .map(|(id, logit)| match logit.is_nan() {
            true => (id, 0.0),
            false => (
                id,
                ((f64::from(*logit) - f64::from(best)) / f64::from(chance.temperature)).exp(),
            ),
        })
        .collect();
    let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if chance.top_k > 0 && (chance.top_k as usize) < all.len() {
        all.sort_by(likelier);
        all.truncate(chance.top_k as usize);
    }
    if chance.top_p < 1.0 {
        all.sort_by(likelier);
        let total: f64 = all.iter().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        let last = all.iter().position(|(_, weight)| {
            sum += weight;
            sum >= f64::from(chance.top_p) * total
        });
        all.truncate(last.unwrap() + 1);
    }
    all.retain(|(_, weight)| *weight >= f64::from(chance.min_p) && *weight > 0.0);
    let mut left = chance.uniform * all.iter().map(|(_, weight)| weight).sum::<f64>();
    for (id, weight) in &all {
        if left < *weight {
            return *id;
        }
        left -= weight;
    }
    all.last().unwrap().0
}

#[test]
fn tokens_are_drawn_by_the_rules_of_the_sampler() {
    let gpu = gpu();
    let mut numbers = Numbers(77);
    let plain = Chance {
        uniform: 0.0,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
    };
    let rules = [
        plain,
        Chance {
            temperature: 0.3,
            ..plain
        },
        Chance {
            temperature: 5.0,
            ..plain
        },
        Chance { min_p: 0.2, ..plain },
        Chance { top_k: 1, ..plain },
        Chance { top_k: 40, ..plain },
        Chance {
            top_k: 700,
            temperature: 2.0,
            ..plain
        },
        Chance {
            top_k: u32::MAX,
            ..plain
        },
        Chance { top_p: 0.9, ..plain },
        Chance { top_p: 1e-6, ..plain },
        Chance {
            top_p: 0.95,
            temperature: 0.7,
            ..plain
        },
        Chance {
            top_k: 30,
            top_p: 0.8,
            min_p: 0.05,
            ..plain
        },
    ];
    let uniforms = [0.0, 1e-9, 0.25, 0.5, 0.77, 0.999, 1.0 - f64::EPSILON];
    // More tokens than threads, as many, fewer; peaked logits, in steps so that some are equal, and some that are no numbers.
    for vocab in [3003, 5, 2] {
        let logits: Vec<f32> = (0..vocab)
            .map(|i| match numbers.next() % 50 {
                0 if i > 0 => f32::NAN,
                1 if i > 0 => f32::NEG_INFINITY,
                n => (n as f32 / 8.0).floor() + (numbers.next() % 7) as f32 - 9.0,
            })
            .collect();
        for rule in rules {
            let chances: Vec<Chance> = uniforms.map(|uniform| Chance { uniform, ..rule }).to_vec();
            let rows = logits.repeat(chances.len());
            let rows = Tensor::from_vec(rows, (chances.len(), vocab), &Device::Cpu).unwrap();
            let drawn = gpu.draw_tokens(&rows, &chances).unwrap();
            for (chance, token) in chances.iter().zip(drawn) {
                assert_eq!(token, Some(token_of(&logits, chance)), "{vocab} {chance:?}");
            }
        }
    }
}

#[test]
fn what_is_not_drawn_is_left_to_the_cpu() {
    let chance = Chance {
        uniform: 0.5,
        temperature: 1.0,
        top_k: 0,
        top_p: 0.9,
        min_p: 0.0,
    };
    let draw = |logits: Vec<f32>, chance: Chance| {
        let vocab = logits.len();
        let rows = Tensor::from_vec(logits, (1, vocab), &Device::Cpu).unwrap();
        gpu().draw_tokens(&rows, &[chance]).unwrap()[0]
    };
    // A flat row, of which a cut leaves too many.
    assert_eq!(draw(vec![1.0; 3000], chance), None);
    assert_eq!(
        draw(
            vec![1.0; 3000],
            Chance {
                top_k: 2000,
                top_p: 1.0,
                ..chance
            }
        ),
        None
    );
    let uncut = Chance { top_p: 1.0, ..chance };
    assert_eq!(draw(vec![1.0; 3000], uncut), Some(1500));
    for row in [[f32::NAN; 8], [f32::NEG_INFINITY; 8], [f32::INFINITY; 8]] {
        assert_eq!(draw(row.to_vec(), uncut), None);
    }
}
