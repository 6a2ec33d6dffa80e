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

#[cfg(test)]
mod tests {
    use super::*;

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
