//! Rotary position embeddings: inverse frequencies as transformers computes them, and cosines and sines for
//! the positions of a packed batch.
//!
//! Source: huggingface/transformers, `modeling_rope_utils.py` (default, linear, dynamic, yarn, llama3).

use std::f32::consts::PI;
use std::f64::consts::TAU;

/// One rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of each head that are rotated.
    pub dim: usize,
    pub scaling: RopeScaling,
}

/// How a config stretches the rotary frequencies beyond the length of pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f32,
    },
    /// Changes the frequencies of texts beyond `max_position_embeddings` only, which are not run here.
    Dynamic {
        factor: f32,
    },
    /// Frequencies that turn often within the original length stay, those that turn seldom are divided.
    Yarn {
        factor: f32,
        original_max_position: f32,
        /// Turns above which a frequency stays, and below which it is divided by all of `factor`.
        beta_fast: f32,
        beta_slow: f32,
        /// Whether the ends of the ramp between them are whole dimensions.
        truncate: bool,
        /// Multiplies cosines and sines.
        attention_factor: f32,
    },
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position: f32,
    },
    /// Each frequency is divided by a factor of its own (Phi-3). Texts beyond the original length, which have other
    /// factors, are not run here.
    LongRope {
        short_factors: Vec<f32>,
        original_max_position: usize,
        /// Multiplies cosines and sines.
        attention_factor: f32,
    },
}

/// The inverse frequencies of one model.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    inv_freq: Vec<f32>,
    /// Of cosines and sines.
    amplitude: f32,
}

/// Cosines and sines of one packed batch: row `t` holds the angles of token `t`, one for two rotated dimensions.
#[derive(Debug)]
pub(crate) struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig) -> Self {
        let dim = config.dim;
        // torch: base ** (arange(0, dim, 2).float() / dim), all in f32. The power is taken in f64 and rounded, the
        // closest to any f32 `pow`.
        let powers = (0..dim).step_by(2).map(|i| {
            let exponent = i as f32 / dim as f32;
            config.theta.powf(f64::from(exponent)) as f32
        });
        let (inv_freq, amplitude) = match &config.scaling {
            RopeScaling::Yarn {
                factor,
                attention_factor,
                ..
            } => {
                let kept = yarn_kept(&config.scaling, dim, config.theta);
                let freqs = powers.map(|power| 1.0 / power).zip(kept);
                let mixed = freqs.map(|(freq, kept)| freq / factor * (1.0 - kept) + freq * kept);
                (mixed.collect(), *attention_factor)
            }
            RopeScaling::LongRope {
                short_factors,
                attention_factor,
                ..
            } => {
                let stretched = powers
                    .zip(short_factors)
                    .map(|(power, factor)| 1.0 / (factor * power));
                (stretched.collect(), *attention_factor)
            }
            scaling => (powers.map(|power| scale(1.0 / power, scaling)).collect(), 1.0),
        };
        Self { inv_freq, amplitude }
    }

    /// Angles are products of f32 numbers, as in transformers, so that far positions round alike.
    pub(crate) fn table(&self, positions: &[usize]) -> RopeTable {
        let half = self.inv_freq.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for &position in positions {
            for &freq in &self.inv_freq {
                let (s, c) = (position as f32 * freq).sin_cos();
                cos.push(c * self.amplitude);
                sin.push(s * self.amplitude);
            }
        }
        RopeTable { half, cos, sin }
    }
}

impl RopeTable {
    /// Pairs of a row; cosines and sines.
    #[cfg(feature = "cuda")]
    pub(crate) fn into_parts(self) -> (usize, Vec<f32>, Vec<f32>) {
        (self.half, self.cos, self.sin)
    }

    /// Rotates the leading dimensions of one head of token `row`: pairs are (i, i + half), the half-split layout of
    /// transformers.
    pub(crate) fn rotate(&self, row: usize, head: &mut [f32]) {
        let cos = &self.cos[row * self.half..][..self.half];
        let sin = &self.sin[row * self.half..][..self.half];
        let (low, high) = head[..2 * self.half].split_at_mut(self.half);
        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y) = (*a, *b);
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}

fn scale(freq: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
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
        _ => freq,
    }
}

/// How much of each frequency stays as it is, from 1 to 0 along a ramp over the dimensions.
fn yarn_kept(scaling: &RopeScaling, dim: usize, theta: f64) -> Vec<f32> {
    let RopeScaling::Yarn {
        original_max_position,
        beta_fast,
        beta_slow,
        truncate,
        ..
    } = *scaling
    else {
        return vec![1.0; dim / 2];
    };
    // The dimension whose frequency makes so many turns within the original length.
    let dimension = |turns: f32| {
        let length = f64::from(original_max_position) / (f64::from(turns) * TAU);
        dim as f64 * length.ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    (0..dim / 2)
        .map(|i| 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(rope: serde_json::Value) -> Rope {
        let config = serde_json::json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 128,
            "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 16,
            "max_position_embeddings": 131_072, "rope_parameters": rope});
        let config = crate::ModelConfig::from_json(config.as_object().expect("an object")).expect("a config");
        Rope::new(&config.ropes[0])
    }

    /// Numbers of transformers 5, `ROPE_INIT_FUNCTIONS[rope_type]` for this config.
    #[test]
    fn yarn_and_dynamic_scaling_equal_transformers() {
        let yarn = |extra: serde_json::Value| {
            let mut table = serde_json::json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 4096});
            for (key, value) in extra.as_object().expect("an object") {
                table[key] = value.clone();
            }
            rope(table)
        };
        let rest = [2.5e-4, 7.905_695e-5];
        for (rope, middle, amplitude) in [
            (
                yarn(serde_json::json!({})),
                [0.025_693_506, 0.006_249_999_6, 0.001_383_496_6],
                1.138_629_4,
            ),
            (
                yarn(
                    serde_json::json!({"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.707, "mscale_all_dim": 1.0}),
                ),
                [0.031_622_78, 0.007_499_999_4, 0.001_581_139],
                0.964_326_9,
            ),
            (
                yarn(serde_json::json!({"attention_factor": 1.25, "truncate": false})),
                [0.028_613_61, 0.006_556_971, 0.001_285_631_9],
                1.25,
            ),
        ] {
            let expected = [&[1.0, 0.316_227_76, 0.1], &middle[..], &rest[..]].concat();
            close(&rope.inv_freq, &expected);
            close(&[rope.amplitude], &[amplitude]);
        }
        let long = yarn(serde_json::json!({"rope_theta": 1e6, "original_max_position_embeddings": 32768}));
        let expected = [
            1.0,
            0.177_827_94,
            0.031_622_78,
            0.004_217_56,
            5e-4,
            4.445_698_5e-5,
            7.905_694e-6,
            1.405_853_4e-6,
        ];
        close(&long.inv_freq, &expected);
        let dynamic = rope(serde_json::json!({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}));
        let plain = rope(serde_json::json!({"rope_type": "default", "rope_theta": 10000.0}));
        assert_eq!((dynamic.inv_freq, dynamic.amplitude), (plain.inv_freq, 1.0));
    }

    fn close(ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() <= 3e-7 * b.abs(), "{ours:?} {theirs:?}");
        }
    }

    #[test]
    fn the_amplitude_scales_what_is_rotated() {
        let rope = Rope {
            inv_freq: vec![1.0],
            amplitude: 2.0,
        };
        let mut head = [1.0, 3.0];
        rope.table(&[0]).rotate(0, &mut head);
        assert_eq!(head, [2.0, 6.0]);
    }

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        assert_eq!(scale(1.0, &scaling), 1.0);
        assert_eq!(scale(1e-5, &scaling), 1e-5 / 8.0);
        let middle = 2.0 * PI / 4096.0;
        let smooth = (2.0 - 1.0) / 3.0;
        let expected = (1.0 - smooth) * middle / 8.0 + smooth * middle;
        assert!((scale(middle, &scaling) - expected).abs() < 1e-9);
    }

    #[test]
    fn position_zero_leaves_a_head_alone_and_rotation_keeps_its_length() {
        let rope = Rope {
            inv_freq: vec![1.0, 0.1],
            amplitude: 1.0,
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
