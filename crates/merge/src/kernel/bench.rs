//! Speed of the kernels over arrays in memory, beside a copy of the same size and STREAM's scaling: `bench/kernels.sh` runs
//! it. Nothing is asserted but that the kernels did their work.

use std::hint::black_box;
use std::time::Instant;

use cauldron_checkpoint::{Dtype, narrow, widen, widen_difference};
use rayon::prelude::*;
use serde_json::json;

use super::*;
use crate::masks;
use crate::rng::{MaskWords, drop_threshold};
use crate::select::{Bracket, Counter};
use crate::sparsify::{Drop, DropScratch, Survivors, word_threshold};
use crate::stream::TILE;

/// Elements of an array: far more than the caches hold.
const ELEMENTS: usize = 64 << 20;
/// Elements that one thread takes at a time, as the merge does.
const CHUNK: usize = 64 << 10;
const REPEATS: usize = 7;

/// BF16 tensors of a base and two experts, and the output.
struct Arrays {
    inputs: [Vec<u8>; 3],
    out: Vec<u8>,
}

impl Arrays {
    /// Noise of the sizes that weights and their changes have.
    fn new() -> Self {
        let noise = |seed: u64, scale: f32| {
            move |start: usize, values: &mut [f32]| {
                let mut words = Vec::new();
                let skip = MaskWords::new(seed, 0, "noise").fill(start, values.len(), &mut words);
                for (v, word) in values.iter_mut().zip(&words[skip..]) {
                    // A sum of four bytes is bell-shaped enough.
                    let sum: u32 = word.to_le_bytes().iter().map(|b| u32::from(*b)).sum();
                    *v = (sum as f32 / 510.0 - 1.0) * scale;
                }
            }
        };
        let base = noise(0, 0.05);
        let tensor = |seed: Option<u64>| {
            let mut bytes = vec![0u8; ELEMENTS * 2];
            bytes
                .par_chunks_mut(CHUNK * 2)
                .enumerate()
                .for_each(|(index, bytes)| {
                    let (mut values, mut delta) = (vec![0f32; CHUNK], vec![0f32; CHUNK]);
                    base(index * CHUNK, &mut values);
                    if let Some(seed) = seed {
                        noise(seed, 0.002)(index * CHUNK, &mut delta);
                        add_scaled(1.0, &delta, &mut values);
                    }
                    narrow(Dtype::BF16, &values, bytes);
                });
            bytes
        };
        Self {
            inputs: [tensor(None), tensor(Some(1)), tensor(Some(2))],
            out: vec![1u8; ELEMENTS * 2],
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Local {
    theta: [Vec<f32>; 3],
    deltas: Vec<Vec<f32>>,
    merged: Vec<f32>,
    ties: TiesScratch,
    drops: DropScratch,
    words: Vec<u32>,
    stays: [Vec<u8>; 2],
    counters: [Counter; 2],
    bits: Vec<u32>,
}

impl Local {
    fn new() -> Self {
        let tile = || vec![0f32; TILE];
        Self {
            theta: [tile(), tile(), tile()],
            deltas: vec![tile(), tile()],
            merged: tile(),
            ..Self::default()
        }
    }

    fn widen(&mut self, which: &[usize], parts: &[&[u8]; 3]) {
        for &i in which {
            assert!(widen(Dtype::BF16, parts[i], &mut self.theta[i]));
        }
    }

    fn form_deltas(&mut self, parts: &[&[u8]; 3]) {
        self.widen(&[0], parts);
        for k in 0..2 {
            let base = &self.theta[0];
            assert!(widen_difference(
                Dtype::BF16,
                parts[k + 1],
                base,
                &mut self.deltas[k]
            ));
        }
    }

    fn join(&mut self, mean: TiesMean<'_>, counted: bool) {
        let Self {
            deltas,
            merged,
            ties: scratch,
            ..
        } = self;
        black_box(ties(deltas, 1, mean, counted, merged, scratch));
        add_to_base(&self.theta[0], 1.0, &mut self.merged);
    }

    fn finish(&self, out: &mut [u8]) {
        assert!(narrow(Dtype::BF16, &self.merged, out));
    }
}

fn ties_of(mean: TiesMean<'_>) -> Joined<'_> {
    Joined::Ties {
        mean,
        majority: 1,
        scaling: 1.0,
    }
}

fn merge(joined: Joined<'_>, parts: &[&[u8]; 3], thinned: [Thinned<'_>; 2], out: &mut [u8]) {
    let theta0 = match joined {
        Joined::Sum { scaling: None, .. } => &[],
        _ => parts[0],
    };
    let inputs = [0, 1].map(|k| Input {
        bytes: parts[k + 1],
        thinned: thinned[k],
    });
    assert_eq!(fused(Dtype::BF16, joined, theta0, &inputs, out), Some(true));
}

/// As the merge has it.
fn observed(at: usize) -> bool {
    (at / TILE).is_multiple_of(8)
}

/// What is done to one tile: its place, its bytes of the inputs, its bytes of the output.
type Kernel = fn(&mut Local, usize, &[&[u8]; 3], &mut [u8]);

/// Name, bytes that an element moves in all, and the kernel.
const KERNELS: &[(&str, usize, Kernel)] = &[
    ("average", 6, |_, _, parts, out| {
        let joined = Joined::Sum {
            weights: &[0.6, 0.4],
            scaling: None,
        };
        merge(joined, parts, [Thinned::NOT; 2], out);
    }),
    ("task_arithmetic", 8, |local, at, parts, out| {
        if observed(at) {
            local.form_deltas(parts);
            black_box(moments(&local.deltas[0], &local.deltas[1], &local.theta[0]));
            weighted_sum(&[0.6, 0.4], &local.deltas, &mut local.merged);
            add_to_base(&local.theta[0], 1.0, &mut local.merged);
            return local.finish(out);
        }
        let joined = Joined::Sum {
            weights: &[0.6, 0.4],
            scaling: Some(1.0),
        };
        merge(joined, parts, [Thinned::NOT; 2], out);
    }),
    ("ties", 8, |local, at, parts, out| {
        let mean = TiesMean::Weighted(&[0.6, 0.4]);
        let edge = 0.001f32.to_bits();
        if observed(at) {
            local.form_deltas(parts);
            for delta in &mut local.deltas {
                keep_between(edge, u32::MAX, delta);
            }
            black_box(moments(&local.deltas[0], &local.deltas[1], &local.theta[0]));
            local.join(mean, true);
            return local.finish(out);
        }
        let trimmed = Thinned {
            least: edge,
            ..Thinned::NOT
        };
        merge(ties_of(mean), parts, [trimmed; 2], out);
    }),
    ("mixed ties", 8, |_, _, parts, out| {
        let trimmed = Thinned {
            least: 0.001f32.to_bits(),
            ..Thinned::NOT
        };
        merge(ties_of(TiesMean::Mixup(&[0.6, 0.4])), parts, [trimmed; 2], out);
    }),
    ("dare_ties", 8, |local, at, parts, out| {
        let mean = TiesMean::Premultiplied(&[0.6, 0.4]);
        let threshold = drop_threshold(0.5);
        let drawn = |k: usize| MaskWords::new(1, k, "bench");
        if observed(at) {
            local.form_deltas(parts);
            for (k, delta) in local.deltas.iter_mut().enumerate() {
                Drop::Dare {
                    words: drawn(k),
                    threshold,
                    survivors: Survivors::Divide(0.5),
                }
                .apply(at, delta, &mut local.drops);
            }
            local.join(mean, true);
            return local.finish(out);
        }
        for k in 0..2 {
            let skip = drawn(k).fill(at, TILE, &mut local.words);
            local.stays[k].resize(TILE * 2, 0);
            masks::compare(
                &local.words[skip..],
                word_threshold(threshold),
                2,
                &mut local.stays[k],
            );
        }
        let thinned = local.stays.each_ref().map(|stays| Thinned {
            stays,
            factor: 2.0,
            ..Thinned::NOT
        });
        merge(ties_of(mean), parts, thinned, out);
    }),
    ("dare from masks", 8, |local, _, parts, out| {
        local.bits.resize(TILE / 32, 0x5a5a_5a5a);
        for stays in &mut local.stays {
            stays.resize(TILE * 2, 0);
            masks::spread(&local.bits, 2, stays);
        }
        let [a, b] = local.stays.each_ref().map(|stays| Thinned {
            stays,
            divisor: 0.8,
            ..Thinned::NOT
        });
        let joined = Joined::Sum {
            weights: &[0.6, 0.4],
            scaling: Some(1.0),
        };
        merge(joined, parts, [a, b], out);
    }),
    ("della_ties from masks", 8, |local, at, parts, out| {
        local.form_deltas(parts);
        local.bits.resize(TILE / 32, 0x5a5a_5a5a);
        for delta in &mut local.deltas {
            masks::apply(&local.bits, 1.5, delta);
        }
        local.join(TiesMean::Premultiplied(&[0.6, 0.4]), observed(at));
        local.finish(out);
    }),
    ("prepare: thresholds", 6, |local, at, parts, _| {
        local.form_deltas(parts);
        let bracket = Bracket::new(0.000_9f32.to_bits(), 0.000_91f32.to_bits());
        for (delta, counter) in local.deltas.iter().zip(&mut local.counters) {
            counter.count(bracket, delta);
            if at % CHUNK == CHUNK - TILE {
                black_box(counter.take());
            }
        }
    }),
    ("prepare: inner products", 6, |local, _, parts, _| {
        local.widen(&[0, 1, 2], parts);
        black_box(dot(&local.theta[1], &local.theta[1]));
        black_box(dot(&local.theta[1], &local.theta[2]));
        black_box(dot(&local.theta[2], &local.theta[2]));
    }),
    ("prepare: DELLA drops", 6, |local, at, parts, _| {
        local.form_deltas(parts);
        local.bits.clear();
        for (k, delta) in local.deltas.iter_mut().enumerate() {
            black_box(sum_magnitudes(delta));
            let drop = Drop::Della {
                words: MaskWords::new(1, k, "bench"),
                retain: 0.5,
                epsilon: 0.15,
                row: TILE,
                divide: false,
                survivors: Survivors::Keep,
            };
            drop.apply(at, delta, &mut local.drops);
            black_box(sum_magnitudes(delta));
            masks::note(delta, &mut local.bits);
        }
    }),
    ("Philox words", 4, |local, at, _, _| {
        let mut words = vec![];
        std::mem::swap(&mut words, &mut local.bits);
        black_box(MaskWords::new(1, 0, "bench").fill(at, TILE, &mut words));
        std::mem::swap(&mut words, &mut local.bits);
    }),
];

fn run(arrays: &mut Arrays, work: impl Fn(&mut Local, usize, &[&[u8]; 3], &mut [u8]) + Sync) -> Vec<f64> {
    let [a, b, c] = &arrays.inputs;
    (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            arrays.out.par_chunks_mut(CHUNK * 2).enumerate().for_each_init(
                Local::new,
                |local, (index, out)| {
                    let range = index * CHUNK * 2..(index + 1) * CHUNK * 2;
                    let parts = [&a[range.clone()], &b[range.clone()], &c[range]];
                    work(local, index * CHUNK, &parts, out);
                },
            );
            start.elapsed().as_secs_f64()
        })
        .collect()
}

fn by_tile(kernel: Kernel) -> impl Fn(&mut Local, usize, &[&[u8]; 3], &mut [u8]) + Sync {
    move |local, start, parts, out| {
        for (index, out) in out.chunks_mut(TILE * 2).enumerate() {
            let range = index * TILE * 2..(index + 1) * TILE * 2;
            let parts = parts.map(|part| &part[range.clone()]);
            kernel(local, start + index * TILE, &parts, out);
        }
    }
}

#[test]
#[ignore = "a benchmark: bench/kernels.sh"]
fn kernels_beside_a_copy() {
    let mut arrays = Arrays::new();
    let best = |times: Vec<f64>| times.into_iter().fold(f64::INFINITY, f64::min);
    let rate = |moved: usize, seconds: f64| (moved * ELEMENTS) as f64 / seconds / 1e9;
    let copied = best(run(&mut arrays, |_, _, parts, out| out.copy_from_slice(parts[0])));
    let scaled = best(run(&mut arrays, |_, _, parts, out| {
        for (o, x) in out
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(parts[0].as_chunks::<8>().0)
        {
            *o = (f64::from_le_bytes(*x) * 3.0).to_le_bytes();
        }
    }));
    let threads = rayon::current_num_threads();
    let (copied, scaled) = (rate(4, copied), rate(4, scaled));
    println!("memcpy {copied:.1} GB/s, STREAM scale {scaled:.1} GB/s, read and written on {threads} threads");
    let mut rows = Vec::new();
    for (name, moved, kernel) in KERNELS {
        let seconds = best(run(&mut arrays, by_tile(*kernel)));
        let rate = rate(*moved, seconds);
        let nanoseconds = seconds * threads as f64 / ELEMENTS as f64 * 1e9;
        let (of_copy, of_stream) = (rate / copied, rate / scaled);
        println!(
            "{name:28} {rate:5.1} GB/s, {:3.0} % of memcpy, {:3.0} % of STREAM scale, {nanoseconds:.2} ns an element and thread",
            100.0 * of_copy,
            100.0 * of_stream
        );
        rows.push(json!({"kernel": name, "gb_per_s": rate, "of_memcpy": of_copy, "of_stream_scale": of_stream, "ns": nanoseconds}));
    }
    let result = json!({"elements": ELEMENTS, "dtype": "BF16", "threads": threads,
        "memcpy_gb_per_s": copied, "stream_scale_gb_per_s": scaled, "kernels": rows});
    println!("JSON {result}");
}

/// The loops alone, over one tile that stays in the first-level cache: nanoseconds an element.
#[test]
#[ignore = "a benchmark: bench/kernels.sh"]
fn loops_in_cache() {
    let arrays = Arrays::new();
    let parts = arrays.inputs.each_ref().map(|input| &input[..TILE * 2]);
    let mut local = Local::new();
    local.form_deltas(&parts);
    local.widen(&[0, 1, 2], &parts);
    let mut out = vec![0u8; TILE * 2];
    let mut words = Vec::new();
    MaskWords::new(1, 0, "bench").fill(0, TILE, &mut words);
    let mut bits = vec![0x5a5a_5a5au32; TILE / 32];
    let time = |name: &str, run: &mut dyn FnMut()| {
        let mut best = f64::INFINITY;
        for _ in 0..30 {
            let start = Instant::now();
            (0..200).for_each(|_| run());
            best = best.min(start.elapsed().as_secs_f64() / (200 * TILE) as f64);
        }
        println!("{name:28} {:.3} ns", best * 1e9);
    };
    let Local {
        theta,
        deltas,
        merged,
        ties: scratch,
        ..
    } = &mut local;
    for (name, kernel) in KERNELS
        .iter()
        .filter(|k| !k.0.contains("prepare"))
        .map(|k| (k.0, k.2))
    {
        let mut own = Local::new();
        time(&format!("{name}, whole"), &mut || {
            kernel(&mut own, TILE, black_box(&parts), &mut out)
        });
    }
    time("widen", &mut || {
        black_box(widen(Dtype::BF16, black_box(parts[0]), &mut theta[0]));
    });
    time("widen_difference", &mut || {
        black_box(widen_difference(
            Dtype::BF16,
            black_box(parts[1]),
            &theta[0],
            &mut deltas[0],
        ));
    });
    time("weighted_sum", &mut || {
        weighted_sum(black_box(&[0.6, 0.4]), deltas, merged)
    });
    time("add_to_base", &mut || {
        add_to_base(&theta[0], black_box(1.0), merged)
    });
    time("moments", &mut || {
        black_box(moments(&deltas[0], &deltas[1], &theta[0]));
    });
    time("count_nonzero", &mut || {
        black_box(count_nonzero(&deltas[0]));
    });
    time("conflicting", &mut || {
        black_box(conflicting(deltas, TILE));
    });
    time("keep_between", &mut || {
        keep_between(black_box(0.0001f32.to_bits()), u32::MAX, &mut deltas[0])
    });
    time("ties weighted", &mut || {
        black_box(ties(
            deltas,
            1,
            TiesMean::Weighted(&[0.6, 0.4]),
            false,
            merged,
            scratch,
        ));
    });
    time("ties premultiplied", &mut || {
        black_box(ties(
            deltas,
            1,
            TiesMean::Premultiplied(&[0.6, 0.4]),
            false,
            merged,
            scratch,
        ));
    });
    time("narrow", &mut || {
        black_box(narrow(Dtype::BF16, black_box(merged), &mut out));
    });
    time("sum_magnitudes", &mut || {
        black_box(sum_magnitudes(&deltas[0]));
    });
    time("philox", &mut || {
        black_box(MaskWords::new(1, 0, "bench").fill(0, TILE, &mut words));
    });
    time("drop_by_words", &mut || {
        crate::sparsify::drop_by_words(&words, black_box(1 << 10), black_box(1.0), &mut deltas[0])
    });
    time("divide", &mut || divide(&mut deltas[0], black_box(1.0000001)));
    time("masks::note", &mut || {
        bits.clear();
        masks::note(&deltas[0], &mut bits);
    });
    time("masks::apply", &mut || {
        masks::apply(&bits, black_box(1.0), &mut deltas[0])
    });
    let mut stays = vec![0u8; TILE * 2];
    time("masks::spread", &mut || {
        masks::spread(black_box(&bits), 2, &mut stays)
    });
    time("masks::compare", &mut || {
        masks::compare(&words, black_box(1 << 10), 2, &mut stays)
    });
    local.form_deltas(&parts);
    let mut offsets = vec![0; TILE];
    time("within, few", &mut || {
        black_box(within(
            &local.deltas[0],
            0.000_9f32.to_bits(),
            1 << 10,
            &mut offsets,
        ));
    });
    time("within, many", &mut || {
        black_box(within(
            &local.deltas[0],
            0.000_9f32.to_bits(),
            1 << 30,
            &mut offsets,
        ));
    });
    let mut counter = Counter::default();
    let bracket = Bracket::new(0.000_9f32.to_bits(), 0.000_91f32.to_bits());
    time("Counter::count", &mut || counter.count(bracket, &local.deltas[0]));
    let original = local.deltas[0].clone();
    let drop = Drop::Della {
        words: MaskWords::new(1, 0, "bench"),
        retain: 0.5,
        epsilon: 0.15,
        row: TILE,
        divide: false,
        survivors: Survivors::Keep,
    };
    time("DELLA", &mut || {
        local.deltas[0].copy_from_slice(&original);
        drop.apply(0, &mut local.deltas[0], &mut local.drops)
    });
}
