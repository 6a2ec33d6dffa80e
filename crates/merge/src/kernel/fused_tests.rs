//! The one loop beside the loops over tiles.

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
                let inputs = [(&a, thin_a), (&b, thin_b)].map(|(bytes, thinned)| Input { bytes, thinned });
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
