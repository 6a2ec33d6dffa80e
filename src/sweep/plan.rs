//! Which shares are tried, and in what order. Everything follows from the sweep's seed and, where a search learns, from scores.

use cauldron_merge::{ModelEntry, RecipeSpec, draw_lambda, draw_shares};
use serde::{Deserialize, Serialize};

use super::cma;
use super::linear::{cholesky, solve, solve_lower};
use crate::serving::Shares;

/// The alphas of the paper (arXiv 2502.15434, section 4).
pub const ALPHAS: [f64; 7] = [0.2, 0.4, 0.5, 1.0, 2.0, 3.0, 5.0];
/// Seeds survive clients whose numbers are f64.
const SEEDS: u64 = 1 << 53;

/// How shares are found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Search {
    /// One draw for each alpha; then `more` draws at the alpha of the best one.
    M3 { alphas: Vec<f64>, more: u32 },
    /// Evenly spaced lambdas; for more than two parents all shares that are multiples of 1/(points - 1).
    Grid { points: u32 },
    /// Draws of one alpha.
    Random { alpha: f64, trials: u32 },
    /// A Gaussian process over lambda, or over lambda and scaling; expected improvement.
    Bayes {
        trials: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scaling: Option<Scalings>,
    },
    /// Lambdas at `groups` places over the layers, by CMA-ES.
    Cma { groups: u32, trials: u32 },
}

/// Scalings that are searched, and the one that the recipe has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scalings {
    pub low: f64,
    pub high: f64,
    pub own: f64,
}

impl Search {
    pub fn name(&self) -> &'static str {
        match self {
            Self::M3 { .. } => "m3",
            Self::Grid { .. } => "grid",
            Self::Random { .. } => "random",
            Self::Bayes { .. } => "bayes",
            Self::Cma { .. } => "cma",
        }
    }
}

/// Where a trial's shares come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The plain method.
    Plain,
    /// One parent alone, or equal shares.
    Baseline,
    /// The first draw of Beta(alpha, alpha), or of Dirichlet(alpha), with a seed.
    Draw {
        alpha: f64,
        seed: u64,
    },
    Grid,
    Bayes,
    /// The generation that it is of, from 0 on.
    Cma {
        generation: usize,
    },
}

impl Origin {
    pub fn is_baseline(&self) -> bool {
        matches!(self, Self::Plain | Self::Baseline)
    }
}

/// What was tried, as far as a search learns from it.
#[derive(Debug, Clone)]
pub struct Tried {
    pub shares: Shares,
    pub origin: Origin,
    /// Higher is better; None if it failed or was dropped.
    pub score: Option<f64>,
    /// Of one that was dropped, by the items that it was asked.
    pub heat: Option<f64>,
    pub stderr: Option<f64>,
}

/// One number for two parents.
fn shares_of(alpha: f64, seed: u64, parents: usize) -> Option<Shares> {
    match parents {
        2 => draw_lambda(alpha, seed).map(Shares::lambda),
        _ => draw_shares(alpha, seed, parents).map(Shares::each),
    }
}

/// Whether the plain method gives two parents equal shares.
fn is_equal(recipe: &RecipeSpec) -> bool {
    let bare = |model: &ModelEntry| matches!(model, ModelEntry::Reference(_));
    let plain = recipe.method == "average" && recipe.normalize != Some(false);
    plain && recipe.models.len() == 2 && recipe.models.iter().all(bare)
}

/// What is always scored: each parent alone, equal shares, and the plain method where it is another.
pub fn baselines(recipe: &RecipeSpec) -> Vec<(Shares, Origin)> {
    let parents = recipe.models.len();
    let mut all = match is_equal(recipe) {
        true => Vec::new(),
        false => vec![(Shares::Plain, Origin::Plain)],
    };
    if parents == 2 {
        all.extend([0.0, 0.5, 1.0].map(|lambda| (Shares::lambda(lambda), Origin::Baseline)));
        return all;
    }
    let equal = vec![1.0 / parents as f64; parents];
    all.push((Shares::each(equal), Origin::Baseline));
    for parent in 0..parents {
        let alone = (0..parents).map(|k| f64::from(u8::from(k == parent)));
        all.push((Shares::each(alone.collect()), Origin::Baseline));
    }
    all
}

/// The next shares to try; None once the search is over. `tried` has all that came before, baselines first.
pub fn next(search: &Search, seed: u64, parents: usize, tried: &[Tried]) -> Option<(Shares, Origin)> {
    let own = tried.iter().filter(|trial| !trial.origin.is_baseline()).count();
    let draw = |alpha: f64, number: usize| {
        let seed = seed.wrapping_add(number as u64) % SEEDS;
        Some((shares_of(alpha, seed, parents)?, Origin::Draw { alpha, seed }))
    };
    match search {
        Search::M3 { alphas, more } => match alphas.get(own) {
            Some(alpha) => draw(*alpha, own),
            None if own < alphas.len() + *more as usize => draw(best_alpha(tried)?, own),
            None => None,
        },
        Search::Grid { points } => {
            let all = grid(*points as usize, parents);
            all.get(own)
                .map(|shares| (Shares::each(shares.clone()), Origin::Grid))
        }
        Search::Random { alpha, trials } if own < *trials as usize => draw(*alpha, own),
        Search::Bayes { trials, scaling } if own < *trials as usize => {
            Some((most_promising(*scaling, tried)?, Origin::Bayes))
        }
        Search::Cma { groups, trials } if own < *trials as usize => {
            let told = tried.iter().filter_map(|trial| match &trial.shares {
                Shares::ByLayer(lambdas) => Some(cma::Told {
                    point: lambdas,
                    rank: match (trial.score, trial.heat) {
                        (Some(score), _) => cma::Rank::Scored(score),
                        (None, Some(heat)) => cma::Rank::Dropped(heat),
                        (None, None) => cma::Rank::Failed,
                    },
                }),
                _ => None,
            });
            let (lambdas, generation) = cma::next(seed, *groups as usize, &told.collect::<Vec<_>>())?;
            Some((Shares::by_layer(lambdas), Origin::Cma { generation }))
        }
        Search::Random { .. } | Search::Bayes { .. } | Search::Cma { .. } => None,
    }
}

/// How many trials a search makes, baselines included.
pub fn total(search: &Search, recipe: &RecipeSpec) -> usize {
    let parents = recipe.models.len();
    let own = match search {
        Search::M3 { alphas, more } => alphas.len() + *more as usize,
        Search::Grid { points } => grid(*points as usize, parents).len(),
        Search::Random { trials, .. } | Search::Bayes { trials, .. } | Search::Cma { trials, .. } => {
            *trials as usize
        }
    };
    own + baselines(recipe).len()
}

fn best_alpha(tried: &[Tried]) -> Option<f64> {
    let draws = tried.iter().filter_map(|trial| match trial.origin {
        Origin::Draw { alpha, .. } => Some((trial.score?, alpha)),
        _ => None,
    });
    // The first of equals.
    let best = draws.fold(None, |best: Option<(f64, f64)>, draw| match best {
        Some(best) if best.0 >= draw.0 => Some(best),
        _ => Some(draw),
    });
    best.map(|(_, alpha)| alpha)
}

/// Inner points for two parents: the ends are baselines.
fn grid(points: usize, parents: usize) -> Vec<Vec<f64>> {
    let steps = points.max(2) - 1;
    if parents == 2 {
        let inner = (1..steps).map(|k| k as f64 / steps as f64);
        return inner
            .filter(|lambda| *lambda != 0.5)
            .map(|lambda| vec![lambda])
            .collect();
    }
    let mut all = Vec::new();
    compositions(steps, parents, &mut Vec::new(), &mut all);
    let scale = |parts: Vec<usize>| parts.iter().map(|k| *k as f64 / steps as f64).collect();
    let inner = all
        .into_iter()
        .filter(|parts| parts.iter().filter(|k| **k > 0).count() > 1);
    inner.map(scale).collect()
}

fn compositions(left: usize, parts: usize, begun: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
    if parts == 1 {
        let mut whole = begun.clone();
        whole.push(left);
        all.push(whole);
        return;
    }
    for part in 0..=left {
        begun.push(part);
        compositions(left - part, parts - 1, begun, all);
        begun.pop();
    }
}

/// Of a Gaussian process: how far scores at two lambdas still have to do with each other,
const LENGTH: f64 = 0.15;
/// and at two scalings, as a share of what is searched.
const SCALING_LENGTH: f64 = 0.3;
/// Steps between the candidates' lambdas, and between their scalings.
const STEPS: u32 = 100;
const SCALING_STEPS: u32 = 20;

/// What a Gaussian process knows a trial by.
#[derive(Debug, Clone, Copy)]
struct Spot {
    lambda: f64,
    /// 0 is the lowest scaling, 1 the highest.
    scaling: f64,
}

impl Spot {
    fn of(shares: &Shares, scalings: Option<Scalings>) -> Option<Self> {
        let (Shares::Lambda(lambda), scaling) = (match shares {
            Shares::Scaled(of, scaling) => (&**of, Some(*scaling)),
            shares => (shares, None),
        }) else {
            return None;
        };
        let scaling = scalings.map_or(0.0, |s| (scaling.unwrap_or(s.own) - s.low) / (s.high - s.low));
        Some(Self {
            lambda: *lambda,
            scaling,
        })
    }

    fn shares(self, scalings: Option<Scalings>) -> Shares {
        let lambda = Shares::lambda(self.lambda);
        match scalings {
            None => lambda,
            // Names are for people too.
            Some(s) => {
                let scaling = s.low + self.scaling * (s.high - s.low);
                lambda.scaled(((scaling * 1e6).round() / 1e6).clamp(s.low, s.high))
            }
        }
    }

    fn near(self, other: Self) -> f64 {
        let lambda = (self.lambda - other.lambda) / LENGTH;
        let scaling = (self.scaling - other.scaling) / SCALING_LENGTH;
        (-0.5 * (lambda * lambda + scaling * scaling)).exp()
    }
}

/// The shares of the largest expected improvement (Jones, Schonlau and Welch 1998) on a grid.
fn most_promising(scalings: Option<Scalings>, tried: &[Tried]) -> Option<Shares> {
    let seen = tried.iter().filter_map(|trial| {
        let spot = Spot::of(&trial.shares, scalings)?;
        Some((spot, trial.score?, trial.stderr.unwrap_or(0.0)))
    });
    let seen: Vec<(Spot, f64, f64)> = seen.collect();
    let n = seen.len() as f64;
    // Each but once, whatever came of it.
    let is_new = |spot: &Spot| {
        let shares = spot.shares(scalings);
        !tried.iter().any(|trial| trial.shares == shares)
    };
    let first = || {
        let corners = [(0.25, 0.25), (0.75, 0.75)].map(|(lambda, scaling)| Spot {
            lambda,
            scaling: if scalings.is_some() { scaling } else { 0.0 },
        });
        corners.into_iter().find(is_new).map(|spot| spot.shares(scalings))
    };
    if seen.len() < 2 {
        return first();
    }
    let mean = seen.iter().map(|(_, y, _)| y).sum::<f64>() / n;
    let spread = (seen.iter().map(|(_, y, _)| (y - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    let spread = if spread > 1e-9 { spread } else { 1.0 };
    let mut matrix: Vec<Vec<f64>> = seen
        .iter()
        .map(|(a, ..)| seen.iter().map(|(b, ..)| a.near(*b)).collect())
        .collect();
    for (row, (_, _, stderr)) in seen.iter().enumerate() {
        matrix[row][row] += (stderr / spread).powi(2).max(1e-6);
    }
    let Some(factor) = cholesky(matrix) else {
        return first();
    };
    let values: Vec<f64> = seen.iter().map(|(_, y, _)| (y - mean) / spread).collect();
    let weights = solve(&factor, &values);
    let best = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let improvement = |spot: Spot| {
        let near: Vec<f64> = seen.iter().map(|(x, ..)| x.near(spot)).collect();
        let expected: f64 = near.iter().zip(&weights).map(|(k, w)| k * w).sum();
        let explained: f64 = solve_lower(&factor, &near).iter().map(|x| x * x).sum();
        let deviation = (1.0 - explained).max(1e-12).sqrt();
        let z = (expected - best) / deviation;
        deviation * (z * normal_below(z) + (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt())
    };
    // Alone, an end is a baseline; with another scaling it is not.
    let (lambdas, steps) = match scalings {
        None => (1..STEPS, 1),
        Some(_) => (0..STEPS + 1, SCALING_STEPS + 1),
    };
    let candidates = lambdas.flat_map(|k| {
        (0..steps).map(move |step| Spot {
            lambda: f64::from(k) / f64::from(STEPS),
            scaling: f64::from(step) / f64::from(SCALING_STEPS),
        })
    });
    let best = candidates.filter(is_new).map(|spot| (improvement(spot), spot));
    let best = best.reduce(|a, b| if b.0 > a.0 { b } else { a });
    best.map(|(_, spot)| spot.shares(scalings))
}

/// The share of a normal distribution below z (Abramowitz and Stegun 26.2.17; error below 1e-7).
fn normal_below(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let series = [
        0.319_381_530,
        -0.356_563_782,
        1.781_477_937,
        -1.821_255_978,
        1.330_274_429,
    ];
    let polynomial = series.iter().rev().fold(0.0, |sum, factor| (sum + factor) * t);
    let above = (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt() * polynomial;
    if z >= 0.0 { 1.0 - above } else { above }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(parents: usize) -> RecipeSpec {
        RecipeSpec {
            method: "task_arithmetic".to_owned(),
            models: vec![ModelEntry::Reference("math".to_owned()); parents],
            ..RecipeSpec::default()
        }
    }

    #[test]
    fn the_plain_method_is_scored_where_it_is_not_equal_shares() {
        let plain = |recipe: &RecipeSpec| {
            baselines(recipe)
                .iter()
                .any(|(shares, _)| *shares == Shares::Plain)
        };
        let average = |change: fn(&mut RecipeSpec)| {
            let mut recipe = recipe(2);
            recipe.method = "average".to_owned();
            change(&mut recipe);
            recipe
        };
        assert!(plain(&recipe(2)) && !plain(&average(|_| ())));
        assert!(plain(&average(|recipe| recipe.normalize = Some(false))));
        assert!(plain(&average(|recipe| recipe
            .models
            .push(recipe.models[0].clone()))));
        let weighted = |recipe: &mut RecipeSpec| recipe.models[0] = ModelEntry::Weighted(Default::default());
        assert!(plain(&average(weighted)));
    }

    fn run(search: &Search, parents: usize, score: impl Fn(f64) -> f64) -> Vec<Tried> {
        run_scaled(search, parents, |lambda, _| score(lambda))
    }

    /// The score is of lambda and scaling.
    fn run_scaled(search: &Search, parents: usize, score: impl Fn(f64, f64) -> f64) -> Vec<Tried> {
        let mut tried: Vec<Tried> = Vec::new();
        let take = |(shares, origin): (Shares, Origin), tried: &mut Vec<Tried>| {
            let scaling = shares.scaling().unwrap_or(1.0);
            let score = shares.mean_lambda().map(|lambda| score(lambda, scaling));
            tried.push(Tried {
                shares,
                origin,
                score,
                heat: None,
                stderr: Some(0.01),
            });
        };
        for baseline in baselines(&recipe(parents)) {
            take(baseline, &mut tried);
        }
        while let Some(trial) = next(search, 7, parents, &tried) {
            take(trial, &mut tried);
        }
        tried
    }

    #[test]
    fn m3_draws_once_an_alpha_and_more_at_the_best_one() {
        let search = Search::M3 {
            alphas: ALPHAS.to_vec(),
            more: 3,
        };
        let tried = run(&search, 2, |lambda| -(lambda - 0.7).abs());
        assert_eq!(tried.len(), total(&search, &recipe(2)));
        assert_eq!(tried.len(), 4 + 7 + 3);
        let draws: Vec<(f64, u64)> = tried
            .iter()
            .filter_map(|t| match t.origin {
                Origin::Draw { alpha, seed } => Some((alpha, seed)),
                _ => None,
            })
            .collect();
        assert_eq!(draws[..7].iter().map(|d| d.0).collect::<Vec<_>>(), ALPHAS);
        let nearest = tried[4..11]
            .iter()
            .max_by(|a, b| a.score.partial_cmp(&b.score).expect("numbers"));
        let Some(Origin::Draw { alpha, .. }) = nearest.map(|t| t.origin.clone()) else {
            panic!("a draw");
        };
        assert!(draws[7..].iter().all(|d| d.0 == alpha));
        // The draws are those of a recipe with this alpha and seed.
        assert_eq!(draw_lambda(draws[2].0, draws[2].1), tried[6].shares.mean_lambda());
    }

    #[test]
    fn a_grid_has_every_point_but_the_baselines() {
        let lambdas: Vec<f64> = grid(5, 2).into_iter().flatten().collect();
        assert_eq!(lambdas, [0.25, 0.75]);
        let three = grid(3, 3);
        assert_eq!(three.len(), 3, "{three:?}");
        assert!(
            three
                .iter()
                .all(|shares| (shares.iter().sum::<f64>() - 1.0).abs() < 1e-12)
        );
        assert_eq!(total(&Search::Grid { points: 5 }, &recipe(2)), 6);
    }

    #[test]
    fn a_gaussian_process_comes_near_the_best_lambda() {
        let score = |lambda: f64| 1.0 - (lambda - 0.73).powi(2);
        let search = Search::Bayes {
            trials: 8,
            scaling: None,
        };
        let tried = run(&search, 2, score);
        let best = tried
            .iter()
            .filter(|t| t.score.is_some())
            .max_by(|a, b| a.score.partial_cmp(&b.score).expect("numbers"));
        let lambda = best.and_then(|best| best.shares.mean_lambda()).expect("a trial");
        assert!((lambda - 0.73).abs() < 0.05, "{lambda}");
        assert!(tried.iter().all(|t| t.shares.scaling().is_none()));
        assert!(
            (normal_below(1.0) - 0.841_344_746).abs() < 1e-6
                && (normal_below(-1.0) - 0.158_655_254).abs() < 1e-6
        );
    }

    #[test]
    fn a_gaussian_process_finds_lambda_and_scaling_together() {
        let score = |lambda: f64, scaling: f64| 1.0 - (lambda - 0.3).powi(2) - (scaling - 1.4).powi(2);
        let search = Search::Bayes {
            trials: 16,
            scaling: Some(Scalings {
                low: 0.5,
                high: 1.5,
                own: 1.0,
            }),
        };
        let tried = run_scaled(&search, 2, score);
        assert_eq!(tried.len(), 4 + 16);
        let best = tried
            .iter()
            .filter(|t| t.score.is_some())
            .max_by(|a, b| a.score.partial_cmp(&b.score).expect("numbers"))
            .expect("a trial");
        let (lambda, scaling) = (best.shares.mean_lambda(), best.shares.scaling());
        let (lambda, scaling) = lambda.zip(scaling).expect("both");
        assert!(
            (lambda - 0.3).abs() < 0.08 && (scaling - 1.4).abs() < 0.15,
            "{lambda} {scaling}"
        );
        // No point is asked twice, and none beyond what was to be searched.
        for (i, one) in tried.iter().enumerate() {
            assert!(tried[..i].iter().all(|other| other.shares != one.shares));
            assert!(one.shares.scaling().is_none_or(|s| (0.5..=1.5).contains(&s)));
        }
    }
}
