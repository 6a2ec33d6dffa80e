//! The contribution ratio of Mixup Model Merge (arXiv 2502.15434, section 3): lambda ~ Beta(alpha, alpha).

use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use rand_distr::{Beta, Distribution};

/// The ChaCha stream that lambdas are drawn from; other draws of a seed use other streams.
const LAMBDA_STREAM: u64 = 7;

/// The first draw of Beta(alpha, alpha) from the seed's stream; None if `alpha` is not a usable shape.
///
/// The same (alpha, seed) gives the same lambda on every machine: ChaCha12 and the sampler are portable.
pub fn draw_lambda(alpha: f64, seed: u64) -> Option<f64> {
    if !(alpha.is_finite() && alpha > 0.0) {
        return None;
    }
    let beta = Beta::new(alpha, alpha).ok()?;
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    rng.set_stream(LAMBDA_STREAM);
    let lambda = beta.sample(&mut rng);
    // Extreme shapes underflow to NaN inside the sampler.
    (0.0..=1.0).contains(&lambda).then_some(lambda)
}

/// The first draw of Dirichlet(alpha) over `parents` parents, by breaking a stick: each share is a Beta(alpha, (parents left)
/// alpha) part of what is left. For two parents the first share is [`draw_lambda`]'s.
pub fn draw_shares(alpha: f64, seed: u64, parents: usize) -> Option<Vec<f64>> {
    if !(alpha.is_finite() && alpha > 0.0) {
        return None;
    }
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    rng.set_stream(LAMBDA_STREAM);
    let mut left = 1.0;
    let mut shares = Vec::with_capacity(parents);
    for after in (1..parents).rev() {
        let part = Beta::new(alpha, alpha * after as f64).ok()?.sample(&mut rng);
        if !(0.0..=1.0).contains(&part) {
            return None;
        }
        shares.push(left * part);
        left *= 1.0 - part;
    }
    shares.push(left);
    Some(shares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_two_are_lambda_and_of_more_have_the_moments_of_a_dirichlet() {
        assert_eq!(draw_shares(0.5, 42, 2).unwrap()[0], draw_lambda(0.5, 42).unwrap());
        for (alpha, parents) in [(0.5, 3), (2.0, 4)] {
            let draws: Vec<Vec<f64>> = (0..20_000)
                .map(|seed| draw_shares(alpha, seed, parents).unwrap())
                .collect();
            let n = draws.len() as f64;
            for k in 0..parents {
                let mean = draws.iter().map(|d| d[k]).sum::<f64>() / n;
                let variance = draws.iter().map(|d| (d[k] - mean).powi(2)).sum::<f64>() / n;
                let share = 1.0 / parents as f64;
                let expected = share * (1.0 - share) / (alpha * parents as f64 + 1.0);
                assert!((mean - share).abs() < 0.01, "{alpha} {parents} {k}: {mean}");
                assert!(
                    (variance - expected).abs() < 0.005,
                    "{alpha} {parents} {k}: {variance}"
                );
            }
            assert!(draws.iter().all(|d| (d.iter().sum::<f64>() - 1.0).abs() < 1e-12));
        }
    }

    /// Kolmogorov-Smirnov against the distribution functions that are known in closed form: alpha = 1 (uniform) and
    /// alpha = 0.5 (arcsine).
    #[test]
    fn draws_follow_the_distribution_function() {
        for (alpha, cdf) in [
            (1.0, (|x| x) as fn(f64) -> f64),
            (0.5, |x: f64| 2.0 / std::f64::consts::PI * x.sqrt().asin()),
        ] {
            let mut draws: Vec<f64> = (0..20_000)
                .map(|seed| draw_lambda(alpha, seed).unwrap())
                .collect();
            draws.sort_by(f64::total_cmp);
            let n = draws.len() as f64;
            let distance = draws
                .iter()
                .enumerate()
                .map(|(i, x)| {
                    (cdf(*x) - i as f64 / n)
                        .abs()
                        .max((cdf(*x) - (i + 1) as f64 / n).abs())
                })
                .fold(0.0, f64::max);
            // The 1e-6 quantile of the statistic.
            assert!(distance * n.sqrt() < 2.69, "{alpha}: {distance}");
        }
    }

    #[test]
    fn a_seed_gives_the_published_lambda() {
        assert_eq!(draw_lambda(0.5, 42), Some(0.811_513_435_011_355_8));
    }

    #[test]
    fn draws_have_the_moments_of_a_symmetric_beta() {
        for alpha in [0.2, 0.5, 1.0, 3.0] {
            let draws: Vec<f64> = (0..20_000)
                .map(|seed| draw_lambda(alpha, seed).unwrap())
                .collect();
            let n = draws.len() as f64;
            let mean = draws.iter().sum::<f64>() / n;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            assert!((mean - 0.5).abs() < 0.01, "{alpha}: {mean}");
            assert!(
                (variance - 1.0 / (4.0 * (2.0 * alpha + 1.0))).abs() < 0.005,
                "{alpha}: {variance}"
            );
        }
    }

    #[test]
    fn shapes_that_are_no_shapes_are_refused() {
        for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(draw_lambda(alpha, 1), None);
        }
    }
}
