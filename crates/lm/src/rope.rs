//! Rotary position embeddings: inverse frequencies as transformers computes them, and cosines and sines for
//! the positions of a packed batch.
//!
//! Source: huggingface/transformers, `modeling_rope_utils.py` (default, linear, llama3).

use std::f32::consts::PI;

use crate::ModelConfig;

/// How a config stretches the rotary frequencies beyond the length of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f32,
    },
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position: f32,
    },
}

/// The inverse frequencies of one model.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    inv_freq: Vec<f32>,
}

/// Cosines and sines of one packed batch: row `t` holds the `head_dim / 2` angles of token `t`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let dim = config.head_dim;
        // torch: 1.0 / (base ** (arange(0, dim, 2).float() / dim)), all in f32. The power is taken in f64 and
        // rounded, the closest to any f32 `pow`.
        let plain = (0..dim).step_by(2).map(|i| {
            let exponent = i as f32 / dim as f32;
            1.0 / (config.rope_theta.powf(f64::from(exponent)) as f32)
        });
        let inv_freq = plain.map(|freq| scale(freq, config.rope_scaling)).collect();
        Self { inv_freq }
    }

    /// Angles are products of f32 numbers, as in transformers, so that far positions round alike.
    pub(crate) fn table(&self, positions: &[usize]) -> RopeTable {
        let half = self.inv_freq.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for &position in positions {
            for &freq in &self.inv_freq {
                let (s, c) = (position as f32 * freq).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        RopeTable { half, cos, sin }
    }
}

impl RopeTable {
    /// Rotates one head of token `row`: pairs are (i, i + half), the half-split layout of transformers.
    pub(crate) fn rotate(&self, row: usize, head: &mut [f32]) {
        let cos = &self.cos[row * self.half..][..self.half];
        let sin = &self.sin[row * self.half..][..self.half];
        let (low, high) = head.split_at_mut(self.half);
        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y) = (*a, *b);
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}

fn scale(freq: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::Default => freq,
        RopeScaling::Linear { factor } => freq / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position,
        } => {
            let wavelen = 2.0 * PI / freq;
            if wavelen < original_max_position / high_freq_factor {
                return freq;
            }
            if wavelen > original_max_position / low_freq_factor {
                return freq / factor;
            }
            let smooth =
                (original_max_position / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * freq / factor + smooth * freq
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        assert_eq!(scale(1.0, scaling), 1.0);
        assert_eq!(scale(1e-5, scaling), 1e-5 / 8.0);
        let middle = 2.0 * PI / 4096.0;
        let smooth = (2.0 - 1.0) / 3.0;
        let expected = (1.0 - smooth) * middle / 8.0 + smooth * middle;
        assert!((scale(middle, scaling) - expected).abs() < 1e-9);
    }

    #[test]
    fn position_zero_leaves_a_head_alone_and_rotation_keeps_its_length() {
        let rope = Rope {
            inv_freq: vec![1.0, 0.1],
        };
        let table = rope.table(&[0, 3]);
        let mut head = [1.0, 2.0, 3.0, 4.0];
        table.rotate(0, &mut head);
        assert_eq!(head, [1.0, 2.0, 3.0, 4.0]);
        table.rotate(1, &mut head);
        assert!((head[0] - (3f32.cos() - 3.0 * 3f32.sin())).abs() < 1e-6);
        let length: f32 = head.iter().map(|v| v * v).sum();
        assert!((length - 30.0).abs() < 1e-4);
    }
}
