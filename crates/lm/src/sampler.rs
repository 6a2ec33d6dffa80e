//! Choosing the next token from one row of logits. One sampler a request with its own random stream, so that
//! a seeded request gives the same tokens whatever else runs beside it.

use std::collections::{HashMap, HashSet};

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::LmError;

/// How a request's tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Only the `top_k` likeliest; 0 is off.
    pub top_k: usize,
    /// Only the fewest tokens that together have this probability; 1 is off.
    pub top_p: f32,
    /// Only tokens at least this likely, relative to the likeliest; 0 is off.
    pub min_p: f32,
    /// Divides (multiplies, where negative) the logits of tokens of prompt and answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit once for each time the answer has it; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit if the answer has it; 0 is off.
    pub presence_penalty: f32,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Whether the likeliest token is taken, whatever came before it.
    pub(crate) fn takes_likeliest(&self) -> bool {
        self.temperature == 0.0
            && self.repetition_penalty == 1.0
            && self.frequency_penalty == 0.0
            && self.presence_penalty == 0.0
    }

    /// Checks ranges; an error names the field.
    pub fn validate(&self) -> Result<(), LmError> {
        let checks = [
            (
                "temperature",
                self.temperature,
                self.temperature >= 0.0,
                "at least 0",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "from 0 to 1",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0,
                "above 0",
            ),
            ("frequency_penalty", self.frequency_penalty, true, "a number"),
            ("presence_penalty", self.presence_penalty, true, "a number"),
        ];
        for (field, value, valid, range) in checks {
            if !valid || !value.is_finite() {
                return Err(LmError::request(field, format!("must be {range}, not {value}")));
            }
        }
        Ok(())
    }
}

/// The state of one request's draws.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha12Rng,
    prompt: HashSet<u32>,
    answer: HashMap<u32, u32>,
    /// Of the next draw, if it was begun elsewhere.
    uniform: Option<f64>,
}

/// What decides a draw, beside the logits.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct Chance {
    /// From 0 on and below 1: the share of all weights that lies before the token.
    pub uniform: f64,
    pub sampling: Sampling,
}

impl Sampler {
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let prompt = match sampling.repetition_penalty == 1.0 {
            true => HashSet::new(),
            false => prompt.iter().copied().collect(),
        };
        Self {
            sampling,
            rng: ChaCha12Rng::seed_from_u64(sampling.seed),
            prompt,
            answer: HashMap::new(),
            uniform: None,
        }
    }

    /// What the next draw goes by, if neither the likeliest token is taken nor what came before counts. It stays the same until
    /// [`Self::drawn`] or [`Self::sample`].
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn chance(&mut self) -> Option<Chance> {
        let Sampling {
            temperature,
            repetition_penalty,
            frequency_penalty,
            presence_penalty,
            ..
        } = self.sampling;
        let is_fresh = repetition_penalty == 1.0 && frequency_penalty == 0.0 && presence_penalty == 0.0;
        if temperature == 0.0 || !is_fresh {
            return None;
        }
        let uniform = self.next_uniform();
        self.uniform = Some(uniform);
        Some(Chance {
            uniform,
            sampling: self.sampling,
        })
    }

    /// A token was drawn by [`Self::chance`].
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn drawn(&mut self) {
        self.uniform = None;
    }

    /// 53 random bits: uniform in [0, 1).
    fn next_uniform(&mut self) -> f64 {
        let next = || (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        self.uniform.take().unwrap_or_else(next)
    }

    /// Draws the next token; `banned` ids cannot be drawn. None if no logit is a number. The logits are
    /// changed on the way.
    pub fn sample(&mut self, logits: &mut [f32], banned: &[u32]) -> Option<u32> {
        for id in banned {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        self.penalise(logits);
        let best = argmax(logits)?;
        let token = match self.sampling.temperature == 0.0 {
            true => best,
            false => self.draw(logits, logits[best as usize]),
        };
        *self.answer.entry(token).or_insert(0) += 1;
        Some(token)
    }

    fn penalise(&self, logits: &mut [f32]) {
        let Sampling {
            repetition_penalty: repetition,
            frequency_penalty: frequency,
            presence_penalty: presence,
            ..
        } = self.sampling;
        if repetition != 1.0 {
            let fresh = self.prompt.iter().filter(|id| !self.answer.contains_key(id));
            for id in fresh.chain(self.answer.keys()) {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / repetition
                    } else {
                        *logit * repetition
                    };
                }
            }
        }
        if frequency != 0.0 || presence != 0.0 {
            for (id, count) in &self.answer {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit -= frequency * *count as f32 + presence;
                }
            }
        }
    }

    fn draw(&mut self, logits: &[f32], best: f32) -> u32 {
        let temperature = f64::from(self.sampling.temperature);
        let weight = |logit: f32| ((f64::from(logit) - f64::from(best)) / temperature).exp();
        let mut candidates: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .map(|(id, logit)| (id as u32, if logit.is_nan() { 0.0 } else { weight(*logit) }))
            .collect();
        self.keep_top_k(&mut candidates);
        self.keep_top_p(&mut candidates);
        if self.sampling.min_p > 0.0 {
            // The likeliest has weight 1.
            candidates.retain(|(_, weight)| *weight >= f64::from(self.sampling.min_p));
        }
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = self.next_uniform() * total;
        let mut last = candidates.first().map_or(0, |(id, _)| *id);
        for (id, weight) in candidates.into_iter().filter(|(_, weight)| *weight > 0.0) {
            if left < weight {
                return id;
            }
            left -= weight;
            last = id;
        }
        last
    }

    fn keep_top_k(&self, candidates: &mut Vec<(u32, f64)>) {
        let k = self.sampling.top_k;
        if k > 0 && k < candidates.len() {
            candidates.select_nth_unstable_by(k - 1, likelier);
            candidates.truncate(k);
            candidates.sort_unstable_by(likelier);
        }
    }

    fn keep_top_p(&self, candidates: &mut Vec<(u32, f64)>) {
        let share = f64::from(self.sampling.top_p);
        if share >= 1.0 {
            return;
        }
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        // Tokens this unlikely cannot be among the fewest that reach the share: all of them together weigh
        // less than the rest of 1. Dropping them first keeps the sort short.
        let floor = (1.0 - share) * total / candidates.len() as f64;
        candidates.retain(|(_, weight)| *weight >= floor);
        candidates.sort_unstable_by(likelier);
        let mut sum = 0.0;
        let kept = candidates.iter().position(|(_, weight)| {
            sum += weight;
            sum >= share * total
        });
        candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
    }
}

/// Falling by weight, rising by id.
fn likelier(a: &(u32, f64), b: &(u32, f64)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The lowest id with the largest logit; None if every logit is NaN or -inf.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        let beaten = best.map_or(f32::NEG_INFINITY, |(_, kept)| kept);
        if logit > beaten {
            best = Some((id as u32, logit));
        }
    }
    best.map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling, &[]);
        (0..count)
            .map(|_| sampler.sample(&mut logits.to_vec(), &[]).expect("a token"))
            .collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_the_largest_logit_and_honours_bans() {
        let mut sampler = Sampler::new(Sampling::default(), &[]);
        assert_eq!(sampler.sample(&mut [0.0, 3.0, 3.0, f32::NAN], &[]), Some(1));
        assert_eq!(sampler.sample(&mut [0.0, 3.0, 3.0, 1.0], &[1, 2, 99]), Some(3));
        assert_eq!(sampler.sample(&mut [f32::NAN, f32::NEG_INFINITY], &[]), None);
    }

    #[test]
    fn the_same_seed_gives_the_same_draws_and_frequencies_follow_the_softmax() {
        let sampling = Sampling {
            temperature: 2.0,
            seed: 7,
            ..Sampling::default()
        };
        let logits = [0.0, 2.0, 4.0];
        let first = draws(sampling, &logits, 20_000);
        assert_eq!(first, draws(sampling, &logits, 20_000));
        assert_ne!(first, draws(Sampling { seed: 8, ..sampling }, &logits, 20_000));
        let total: f64 = [0.0f64, 1.0, 2.0].iter().map(|v| v.exp()).sum();
        for (id, logit) in [0.0f64, 1.0, 2.0].iter().enumerate() {
            let share = first.iter().filter(|t| **t == id as u32).count() as f64 / 20_000.0;
            assert!((share - logit.exp() / total).abs() < 0.015, "{id}: {share}");
        }
    }

    #[test]
    fn a_draw_that_was_begun_elsewhere_is_the_same_draw() {
        let sampling = Sampling {
            temperature: 1.0,
            seed: 3,
            ..Sampling::default()
        };
        let logits = [0.0, 0.5, 1.0, 0.2];
        let expected = draws(sampling, &logits, 50);
        let mut sampler = Sampler::new(sampling, &[]);
        for expected in expected {
            let begun = sampler.chance().expect("a chance").uniform;
            assert_eq!(sampler.chance().expect("a chance").uniform, begun);
            assert_eq!(sampler.sample(&mut logits.to_vec(), &[]), Some(expected));
        }
        let greedy = Sampler::new(Sampling::default(), &[]).chance();
        assert!(greedy.is_none());
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let one = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let support = |sampling: Sampling| {
            let mut seen = draws(sampling, &logits, 500);
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(support(one), [0, 1, 2, 3]);
        assert_eq!(support(Sampling { top_k: 3, ..one }), [0, 1, 2]);
        assert_eq!(support(Sampling { top_p: 0.74, ..one }), [0, 1]);
        assert_eq!(support(Sampling { top_p: 0.76, ..one }), [0, 1, 2]);
        assert_eq!(support(Sampling { top_p: 0.01, ..one }), [0]);
        assert_eq!(support(Sampling { min_p: 0.4, ..one }), [0, 1]);
    }

    #[test]
    fn penalties_move_what_was_seen() {
        let mut repetition = Sampler::new(
            Sampling {
                repetition_penalty: 2.0,
                ..Sampling::default()
            },
            &[0],
        );
        assert_eq!(repetition.sample(&mut [3.0, 2.0, -1.0], &[]), Some(1));
        assert_eq!(repetition.sample(&mut [1.0, 1.0, 0.6], &[]), Some(2));
        let mut presence = Sampler::new(
            Sampling {
                presence_penalty: 0.5,
                frequency_penalty: 0.4,
                ..Sampling::default()
            },
            &[0],
        );
        assert_eq!(presence.sample(&mut [1.0, 0.5], &[]), Some(0));
        assert_eq!(presence.sample(&mut [1.3, 0.5], &[]), Some(1));
        assert_eq!(presence.sample(&mut [1.5, 0.5], &[]), Some(0));
        assert_eq!(presence.sample(&mut [1.5, 1.2], &[]), Some(1));
    }

    #[test]
    fn bad_ranges_name_the_field() {
        let zero_p = Sampling {
            top_p: 0.0,
            ..Sampling::default()
        };
        assert!(
            zero_p
                .validate()
                .is_err_and(|e| e.to_string().starts_with("top_p"))
        );
        let nan = Sampling {
            temperature: f32::NAN,
            ..Sampling::default()
        };
        assert!(
            nan.validate()
                .is_err_and(|e| e.to_string().starts_with("temperature"))
        );
        assert!(Sampling::default().validate().is_ok());
    }
}
