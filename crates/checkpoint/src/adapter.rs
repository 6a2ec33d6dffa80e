//! PEFT LoRA adapters: strict reading of the folder, and the factors of one tensor at a time ([`crate::LoraFactors`]).
//!
//! Source of the layout and of the scale: huggingface/peft, `tuners/lora` (`alpha / r`, with rsLoRA
//! `alpha / sqrt(r)`). What changes the arithmetic beyond that (DoRA, biases, saved modules) is refused by name.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::{Opened, TensorInfo, WeightFile, hash_part, open_files, read_config};
use crate::files::{identity, is_settled, open_regular, read_exact_at};
use crate::lora::LoraFactors;
use crate::{CheckpointError, Digest, dtype_size, is_float, widen};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const MAX_RANK: usize = 4096;

/// Options of a PEFT config that change the arithmetic; any value but absent, null, false, "none" or empty
/// is refused.
const UNSUPPORTED: &[&str] = &[
    "use_dora",
    "bias",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
];

/// An opened PEFT LoRA folder: for each changed tensor its two factors and its scale.
#[derive(Debug)]
pub struct Adapter {
    config: Map<String, Value>,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, TensorInfo>,
    pairs: BTreeMap<String, Pair>,
}

#[derive(Debug)]
struct Pair {
    a: String,
    b: String,
    rank: usize,
    rows: usize,
    cols: usize,
    scale: f64,
}

impl Adapter {
    /// Opens a folder and checks its config and header. No weight is read.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let config = read_config(dir, CONFIG)?;
        let (files, tensors): Opened = open_files(dir, &[WEIGHTS.to_owned()])?;
        let pairs = pair_up(&config, &tensors)?;
        Ok(Self {
            config,
            files,
            tensors,
            pairs,
        })
    }

    /// Names of the base's tensors that the adapter changes, in order.
    pub fn targets(&self) -> impl Iterator<Item = &str> {
        self.pairs.keys().map(String::as_str)
    }

    pub fn changes(&self, tensor: &str) -> bool {
        self.pairs.contains_key(tensor)
    }

    /// Names and numbers of elements of the base's tensors that the adapter changes, in order.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        let pairs = self.pairs.iter();
        pairs.map(|(name, pair)| (name.as_str(), pair.rows * pair.cols))
    }

    /// The place of a tensor among those that the adapter changes.
    pub(crate) fn place_of(&self, tensor: &str) -> Option<usize> {
        self.targets().position(|target| target == tensor)
    }

    /// Checks that each target is in `tensors` as a float matrix of the right shape.
    pub fn check_against(&self, tensors: &BTreeMap<String, TensorInfo>) -> Result<(), CheckpointError> {
        for (name, pair) in &self.pairs {
            let bad = |detail: String| CheckpointError::Tensor {
                tensor: name.clone(),
                detail,
            };
            let info = tensors
                .get(name)
                .ok_or_else(|| bad("is changed by the adapter but the model lacks it".into()))?;
            if info.shape != [pair.rows, pair.cols] || !is_float(info.dtype) {
                return Err(bad(format!(
                    "is {:?} {:?} in the model; the adapter was made for [{}, {}]",
                    info.dtype, info.shape, pair.rows, pair.cols
                )));
            }
        }
        Ok(())
    }

    /// Reads the factors of one tensor, or None if the adapter leaves it alone.
    pub fn factors(&self, tensor: &str) -> Result<Option<LoraFactors>, CheckpointError> {
        let Some(pair) = self.pairs.get(tensor) else {
            return Ok(None);
        };
        let (a, b) = (self.read_f64(&pair.a)?, self.read_f64(&pair.b)?);
        Ok(Some(LoraFactors::new(&a, b, pair.rank, pair.scale)))
    }

    /// Digest of config and tensors, as [`crate::Checkpoint::content_digest`].
    pub fn content_digest(&self) -> Result<Digest, CheckpointError> {
        let mut hasher = blake3::Hasher::new_derive_key("cauldron adapter content v1");
        hash_part(
            &mut hasher,
            CONFIG,
            Value::Object(self.config.clone()).to_string().as_bytes(),
        );
        for (name, info) in &self.tensors {
            hash_part(
                &mut hasher,
                name,
                format!("{:?}{:?}", info.dtype, info.shape).as_bytes(),
            );
            hasher.update(&self.read_bytes(name)?);
        }
        Ok(hasher.finalize().into())
    }

    /// A cheap fingerprint of the files: equal while nothing was written to them.
    pub fn identity(&self, dir: &Path) -> Result<String, CheckpointError> {
        let mut parts = Vec::new();
        for weights in &self.files {
            parts.push(identity(&weights.file, &weights.name)?);
        }
        parts.push(identity(&open_regular(dir, CONFIG)?, CONFIG)?);
        Ok(parts.join(";"))
    }

    /// Whether [`Self::identity`] may be kept: see [`crate::Checkpoint::is_settled`].
    pub fn is_settled(&self, dir: &Path) -> Result<bool, CheckpointError> {
        let config = open_regular(dir, CONFIG)?;
        let mut files = self.files.iter().map(|weights| &weights.file);
        Ok(files.all(is_settled) && is_settled(&config))
    }

    fn read_bytes(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let info = &self.tensors[name];
        let mut bytes = vec![0u8; info.byte_len() as usize];
        let source = &self.files[info.file];
        read_exact_at(&source.file, &source.name, &mut bytes, info.offset)?;
        Ok(bytes)
    }

    fn read_f64(&self, name: &str) -> Result<Vec<f64>, CheckpointError> {
        let info = &self.tensors[name];
        let mut wide = vec![0f32; info.numel()];
        widen(info.dtype, &self.read_bytes(name)?, &mut wide);
        if let Some(bad) = wide.iter().find(|v| !v.is_finite()) {
            return Err(CheckpointError::Tensor {
                tensor: name.to_owned(),
                detail: format!("has the value {bad}"),
            });
        }
        Ok(wide.into_iter().map(f64::from).collect())
    }
}

fn pair_up(
    config: &Map<String, Value>,
    tensors: &BTreeMap<String, TensorInfo>,
) -> Result<BTreeMap<String, Pair>, CheckpointError> {
    let scales = Scales::read(config)?;
    let mut pairs = BTreeMap::new();
    for (name, info) in tensors {
        let bad = |detail: &str| CheckpointError::Tensor {
            tensor: name.clone(),
            detail: detail.to_owned(),
        };
        if dtype_size(info.dtype).is_none() || !is_float(info.dtype) {
            return Err(bad("adapters are BF16, F16 or F32"));
        }
        let inner = name.strip_prefix("base_model.model.");
        let split = inner.and_then(|n| {
            let n = n.strip_suffix(".weight")?;
            let n = n.strip_suffix(".default").unwrap_or(n);
            n.strip_suffix(".lora_A")
                .map(|m| (m, true))
                .or(n.strip_suffix(".lora_B").map(|m| (m, false)))
        });
        let Some((module, is_a)) = split else {
            return Err(bad(
                "only lora_A and lora_B weights of linear layers are supported",
            ));
        };
        let other = match is_a {
            true => name.replace(".lora_A", ".lora_B"),
            false => name.replace(".lora_B", ".lora_A"),
        };
        let Some(other_info) = tensors.get(&other) else {
            return Err(bad("has no partner"));
        };
        if !is_a {
            continue;
        }
        let (&[rank, cols], &[rows, other_rank]) = (info.shape.as_slice(), other_info.shape.as_slice())
        else {
            return Err(bad("the factors must be matrices"));
        };
        if rank != other_rank || rank == 0 || rank > MAX_RANK || rows == 0 || cols == 0 {
            return Err(bad("the factors do not fit each other"));
        }
        let scale = scales.of(module, rank).map_err(|detail| bad(&detail))?;
        let pair = Pair {
            a: name.clone(),
            b: other,
            rank,
            rows,
            cols,
            scale,
        };
        // `lora_A.weight` and `lora_A.default.weight` name the same factor.
        if pairs.insert(format!("{module}.weight"), pair).is_some() {
            return Err(bad("is given twice for its module"));
        }
    }
    if pairs.is_empty() {
        return Err(CheckpointError::malformed(WEIGHTS, "no LoRA factors"));
    }
    Ok(pairs)
}

/// The scale of each module: `lora_alpha / r` with the config's per-module patterns.
struct Scales {
    alpha: f64,
    rank: usize,
    rslora: bool,
    alpha_pattern: Vec<(String, f64)>,
    rank_pattern: Vec<(String, f64)>,
}

impl Scales {
    fn read(config: &Map<String, Value>) -> Result<Self, CheckpointError> {
        let bad = |detail: String| CheckpointError::malformed(CONFIG, detail);
        if config.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(bad("peft_type is not LORA".into()));
        }
        for key in UNSUPPORTED {
            let used = match config.get(*key) {
                None | Some(Value::Null | Value::Bool(false)) => false,
                Some(Value::String(s)) => s != "none" && !s.is_empty(),
                Some(Value::Array(items)) => !items.is_empty(),
                Some(Value::Object(items)) => !items.is_empty(),
                Some(_) => true,
            };
            if used {
                return Err(bad(format!("{key} is not supported")));
            }
        }
        // With these the factors belong to a base that they themselves have changed.
        match config.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(s)) if ["gaussian", "eva", "orthogonal"].contains(&s.as_str()) => {}
            Some(other) => return Err(bad(format!("init_lora_weights {other} is not supported"))),
        }
        let rslora = match config.get("use_rslora") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(on)) => *on,
            Some(_) => return Err(bad("use_rslora must be true or false".into())),
        };
        let number = |key: &str| {
            config
                .get(key)
                .and_then(Value::as_f64)
                .filter(|v| v.is_finite() && *v > 0.0)
                .ok_or_else(|| bad(format!("{key} must be a number above 0")))
        };
        Ok(Self {
            alpha: number("lora_alpha")?,
            rank: number("r")? as usize,
            rslora,
            alpha_pattern: pattern(config, "alpha_pattern")?,
            rank_pattern: pattern(config, "rank_pattern")?,
        })
    }

    fn of(&self, module: &str, rank: usize) -> Result<f64, String> {
        let find = |patterns: &[(String, f64)]| {
            patterns
                .iter()
                .find(|(key, _)| {
                    module == key
                        || module
                            .strip_suffix(key.as_str())
                            .is_some_and(|m| m.ends_with('.'))
                })
                .map(|(_, value)| *value)
        };
        let expected = find(&self.rank_pattern).map_or(self.rank, |r| r as usize);
        if expected != rank {
            return Err(format!("has rank {rank}; {CONFIG} says {expected}"));
        }
        let alpha = find(&self.alpha_pattern).unwrap_or(self.alpha);
        let divisor = rank as f64;
        Ok(alpha / if self.rslora { divisor.sqrt() } else { divisor })
    }
}

fn pattern(config: &Map<String, Value>, key: &str) -> Result<Vec<(String, f64)>, CheckpointError> {
    let bad = |detail: String| CheckpointError::malformed(CONFIG, detail);
    let entries = match config.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(_) => return Err(bad(format!("{key} must be an object"))),
    };
    let plain = |name: &str| {
        name.chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.".contains(c))
    };
    entries
        .iter()
        .map(|(name, value)| match value.as_f64() {
            Some(v) if plain(name) && v > 0.0 => Ok((name.clone(), v)),
            _ => Err(bad(format!(
                "{key}: only plain module names with a number above 0"
            ))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_module_that_is_given_twice_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1});
        std::fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
        let bytes = [0u8; 8];
        let write = |middles: &[&str]| {
            let names = middles.iter().flat_map(|middle| {
                ["A", "B"].map(|side| format!("base_model.model.layer.lora_{side}{middle}.weight"))
            });
            let views = names.map(|name| {
                let shape = if name.contains("lora_A") {
                    vec![1, 2]
                } else {
                    vec![2, 1]
                };
                (name, TensorView::new(Dtype::F32, shape, &bytes).unwrap())
            });
            let file = safetensors::serialize(views, None).unwrap();
            std::fs::write(dir.path().join(WEIGHTS), file).unwrap();
        };
        write(&[".default"]);
        assert_eq!(
            Adapter::open(dir.path()).unwrap().targets().collect::<Vec<_>>(),
            ["layer.weight"]
        );
        write(&["", ".default"]);
        let refused = Adapter::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("given twice"), "{refused}");
    }
}
