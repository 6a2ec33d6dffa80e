//! CMA-ES (Hansen, arXiv 1604.00772) over the unit cube, as a function of what was told: nothing is kept between asks, so a search
//! that was interrupted goes on with the same points. Points outside are moved to the border and learned from as they are there.

use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

use super::linear::{cholesky, solve_lower};

/// The first mean is the middle of the cube.
const FIRST_SIGMA: f64 = 0.25;
const LARGEST_SIGMA: f64 = 0.5;
/// Points have so many steps along an edge, so that they have short names.
const STEPS: f64 = 1e4;

/// A point that was tried.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told<'a> {
    pub point: &'a [f64],
    pub rank: Rank,
}

/// How it did; what was scored in full comes before what was dropped on the way, whatever the numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rank {
    Scored(f64),
    Dropped(f64),
    Failed,
}

impl Rank {
    /// Larger is better.
    fn key(self) -> (u8, f64) {
        match self {
            Self::Scored(score) => (2, score),
            Self::Dropped(heat) => (1, heat),
            Self::Failed => (0, 0.0),
        }
    }
}

/// The distribution that a generation is drawn from.
struct State {
    mean: Vec<f64>,
    sigma: f64,
    covariance: Vec<Vec<f64>>,
    /// The evolution paths of sigma and of the covariance.
    path_sigma: Vec<f64>,
    path_covariance: Vec<f64>,
}

fn population(dims: usize) -> usize {
    4 + (3.0 * (dims as f64).ln()).floor() as usize
}

/// Whether what comes after so many points depends on the score of the last one.
pub(super) fn ends_generation(dims: usize, points: usize) -> bool {
    points.is_multiple_of(population(dims))
}

/// The next point to try, and its generation. `told` has the points so far, in order.
pub(super) fn next(seed: u64, dims: usize, told: &[Told<'_>]) -> Option<(Vec<f64>, usize)> {
    let size = population(dims);
    let mut state = State::new(dims);
    let generations = told.chunks_exact(size);
    for (number, generation) in generations.enumerate() {
        state.learn(generation, number)?;
    }
    let generation = told.len() / size;
    Some((state.draw(seed, told.len())?, generation))
}

impl State {
    fn new(dims: usize) -> Self {
        let unit = |i: usize| (0..dims).map(|j| f64::from(u8::from(i == j))).collect();
        Self {
            mean: vec![0.5; dims],
            sigma: FIRST_SIGMA,
            covariance: (0..dims).map(unit).collect(),
            path_sigma: vec![0.0; dims],
            path_covariance: vec![0.0; dims],
        }
    }

    fn draw(&self, seed: u64, number: usize) -> Option<Vec<f64>> {
        let factor = cholesky(self.covariance.clone())?;
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        rng.set_stream(number as u64);
        let normal: Vec<f64> = StandardNormal
            .sample_iter(&mut rng)
            .take(self.mean.len())
            .collect();
        let coordinate = |i: usize| {
            let step: f64 = (0..=i).map(|k| factor[i][k] * normal[k]).sum();
            let wanted = (self.mean[i] + self.sigma * step).clamp(0.0, 1.0);
            (wanted * STEPS).round() / STEPS
        };
        Some((0..self.mean.len()).map(coordinate).collect())
    }

    /// Hansen, section 3 and appendix A, without negative weights.
    fn learn(&mut self, generation: &[Told<'_>], number: usize) -> Option<()> {
        let n = self.mean.len() as f64;
        let mut ranked: Vec<&Told<'_>> = generation.iter().collect();
        ranked.sort_by(|a, b| {
            let ((a_class, a), (b_class, b)) = (a.rank.key(), b.rank.key());
            b_class.cmp(&a_class).then(b.total_cmp(&a))
        });
        let parents = generation.len() / 2;
        let middle = (generation.len() as f64 + 1.0) / 2.0;
        let raw: Vec<f64> = (1..=parents)
            .map(|rank| middle.ln() - (rank as f64).ln())
            .collect();
        let sum: f64 = raw.iter().sum();
        let weights: Vec<f64> = raw.iter().map(|weight| weight / sum).collect();
        let mass = 1.0 / weights.iter().map(|weight| weight * weight).sum::<f64>();
        let rate_sigma = (mass + 2.0) / (n + mass + 5.0);
        let damping = 1.0 + 2.0 * (((mass - 1.0) / (n + 1.0)).sqrt() - 1.0).max(0.0) + rate_sigma;
        let rate_path = (4.0 + mass / n) / (n + 4.0 + 2.0 * mass / n);
        let rate_one = 2.0 / ((n + 1.3).powi(2) + mass);
        let rate_many =
            (2.0 * (mass - 2.0 + 1.0 / mass) / ((n + 2.0).powi(2) + mass)).clamp(0.0, 1.0 - rate_one);
        let expected = n.sqrt() * (1.0 - 1.0 / (4.0 * n) + 1.0 / (21.0 * n * n));

        let steps: Vec<Vec<f64>> = ranked[..parents]
            .iter()
            .map(|told| {
                let each = told.point.iter().zip(&self.mean);
                each.map(|(x, mean)| (x - mean) / self.sigma).collect()
            })
            .collect();
        let step = |i: usize| {
            weights
                .iter()
                .zip(&steps)
                .map(|(w, step)| w * step[i])
                .sum::<f64>()
        };
        let step: Vec<f64> = (0..self.mean.len()).map(step).collect();
        let white = solve_lower(&cholesky(self.covariance.clone())?, &step);
        let along = (rate_sigma * (2.0 - rate_sigma) * mass).sqrt();
        for (path, white) in self.path_sigma.iter_mut().zip(&white) {
            *path = (1.0 - rate_sigma) * *path + along * white;
        }
        let length = self.path_sigma.iter().map(|p| p * p).sum::<f64>().sqrt();
        let settled = 1.0 - (1.0 - rate_sigma).powi(2 * (number as i32 + 1));
        let moves = length / settled.sqrt() < (1.4 + 2.0 / (n + 1.0)) * expected;
        let along = f64::from(u8::from(moves)) * (rate_path * (2.0 - rate_path) * mass).sqrt();
        for (path, step) in self.path_covariance.iter_mut().zip(&step) {
            *path = (1.0 - rate_path) * *path + along * step;
        }
        let stays = if moves { 0.0 } else { rate_path * (2.0 - rate_path) };
        for (i, row) in self.covariance.iter_mut().enumerate() {
            for (j, entry) in row.iter_mut().enumerate() {
                let many: f64 = weights
                    .iter()
                    .zip(&steps)
                    .map(|(w, step)| w * step[i] * step[j])
                    .sum();
                let one = self.path_covariance[i] * self.path_covariance[j] + stays * *entry;
                *entry = (1.0 - rate_one - rate_many) * *entry + rate_one * one + rate_many * many;
            }
        }
        for (mean, step) in self.mean.iter_mut().zip(&step) {
            *mean += self.sigma * step;
        }
        let factor = (rate_sigma / damping * (length / expected - 1.0)).min(1.0).exp();
        self.sigma = (self.sigma * factor).min(LARGEST_SIGMA);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(dims: usize, trials: usize, score: impl Fn(&[f64]) -> f64) -> Vec<(Vec<f64>, f64)> {
        let mut told: Vec<(Vec<f64>, f64)> = Vec::new();
        while told.len() < trials {
            let known: Vec<Told<'_>> = told
                .iter()
                .map(|(point, score)| Told {
                    point,
                    rank: Rank::Scored(*score),
                })
                .collect();
            let (point, generation) = next(5, dims, &known).expect("a point");
            assert_eq!(generation, told.len() / population(dims));
            assert!(
                point.len() == dims && point.iter().all(|x| (0.0..=1.0).contains(x)),
                "{point:?}"
            );
            let score = score(&point);
            told.push((point, score));
        }
        told
    }

    fn best(told: &[(Vec<f64>, f64)]) -> f64 {
        told.iter()
            .map(|(_, score)| *score)
            .fold(f64::NEG_INFINITY, f64::max)
    }

    #[test]
    fn it_comes_near_an_optimum_inside_along_a_ridge_and_in_a_corner() {
        let sphere = |x: &[f64]| {
            -x.iter()
                .zip([0.8, 0.3, 0.6, 0.1])
                .map(|(x, o)| (x - o).powi(2))
                .sum::<f64>()
        };
        let found = search(4, 160, sphere);
        assert!(best(&found) > -1e-3, "{}", best(&found));
        assert!(best(&found) > best(&found[..8]));
        let ridge = |x: &[f64]| -(100.0 * (x[0] + x[1] - 1.2).powi(2) + (x[0] - x[1] - 0.4).powi(2));
        assert!(best(&search(2, 240, ridge)) > -1e-3);
        let corner = |x: &[f64]| x.iter().sum::<f64>();
        assert!(best(&search(3, 120, corner)) > 2.95);
    }

    #[test]
    fn the_same_told_gives_the_same_next_and_failures_are_the_worst() {
        let score = |x: &[f64]| -(x[0] - 0.9).powi(2);
        assert_eq!(search(2, 30, score), search(2, 30, score));
        let flat = search(2, 30, |_| 0.5);
        assert!(flat.iter().all(|(point, _)| point.iter().all(|x| x.is_finite())));
        // What was dropped counts less than what was scored, whatever its number, and more than what failed.
        let points = search(2, 6, score);
        let next_after = |rank: &dyn Fn(usize) -> Rank| {
            let told: Vec<Told<'_>> = points
                .iter()
                .enumerate()
                .map(|(n, (point, _))| Told { point, rank: rank(n) })
                .collect();
            next(5, 2, &told)
        };
        let scored = |n: usize| Rank::Scored(if n < 3 { 3.0 - n as f64 } else { -(n as f64) });
        let dropped = |n: usize| match n {
            0 => Rank::Scored(0.1),
            1 => Rank::Dropped(9.0),
            2 => Rank::Dropped(5.0),
            _ => Rank::Failed,
        };
        assert_eq!(next_after(&scored), next_after(&dropped));
        assert!(next_after(&|_| Rank::Failed).is_some());
    }
}
