//! Tiny checkpoints in a temporary models folder, and one call that merges them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cauldron_checkpoint::{Checkpoint, Digest, Dtype, narrow};
use cauldron_merge::{
    Manifest, MergeError, MergeOptions, Observer, ParentResolver, Parents, Recipe, RecipeError, merge_digest,
    merge_to_folder, recipe_from_value,
};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A tensor to be written: name, shape, values as f32.
pub type Tensor<'a> = (&'a str, Vec<usize>, Vec<f32>);
/// One side of an adapter's change of a module: shape and values.
pub type Factor = (Vec<usize>, Vec<f32>);

pub struct Models {
    dir: TempDir,
}

/// Counts bytes; cancels once it has seen `cancel_at` of them.
#[derive(Default)]
pub struct Counter {
    pub seen: Mutex<u64>,
    pub cancel_at: Option<u64>,
}

impl Observer for Counter {
    fn advance(&self, bytes: u64) {
        *self.seen.lock().unwrap() += bytes;
    }

    fn cancelled(&self) -> bool {
        self.cancel_at.is_some_and(|at| *self.seen.lock().unwrap() >= at)
    }
}

#[derive(Debug)]
pub enum Refused {
    Recipe(RecipeError),
    Merge(MergeError),
}

impl Refused {
    pub fn field(&self) -> &str {
        match self {
            Self::Recipe(e) => &e.field,
            Self::Merge(e) => panic!("failed in the merge instead of being refused: {e}"),
        }
    }

    pub fn slug(&self) -> &'static str {
        match self {
            Self::Recipe(e) => panic!("refused: {e}"),
            Self::Merge(e) => e.slug(),
        }
    }
}

pub struct Merged {
    pub dir: TempDir,
    pub manifest: Manifest,
    pub digest: Digest,
    pub seen: u64,
    pub total: u64,
}

impl Merged {
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(self.dir.path()).unwrap()
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        self.checkpoint().read_f32(name).unwrap()
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        read_bytes(&self.checkpoint(), name)
    }
}

pub fn read_bytes(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    let mut out = vec![0; checkpoint.get(name).unwrap().byte_len() as usize];
    checkpoint.read_into(name, 0, &mut out).unwrap();
    out
}

impl ParentResolver for Models {
    fn folder(&self, name: &str) -> Result<PathBuf, String> {
        let path = self.dir.path().join(name);
        match path.is_dir() {
            true => Ok(path),
            false => Err(format!("no model {name:?}")),
        }
    }
}

impl Models {
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn add(&self, name: &str, dtype: Dtype, tensors: &[Tensor<'_>]) -> &Self {
        self.add_with_config(name, json!({"model_type": "llama"}), dtype, tensors)
    }

    pub fn add_with_config(&self, name: &str, config: Value, dtype: Dtype, tensors: &[Tensor<'_>]) -> &Self {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| {
                let mut out = vec![0; values.len() * dtype.bitsize() / 8];
                narrow(dtype, values, &mut out);
                out
            })
            .collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), bytes)| (*name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
        self.add_raw(name, config, &safetensors::serialize(views, None).unwrap())
    }

    pub fn add_raw(&self, name: &str, config: Value, weights: &[u8]) -> &Self {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        fs::write(dir.join("model.safetensors"), weights).unwrap();
        self
    }

    /// A model with one f32 tensor `w`.
    pub fn vector(&self, name: &str, values: &[f32]) -> &Self {
        self.add(name, Dtype::F32, &[("w", vec![values.len()], values.to_vec())])
    }

    /// A LoRA adapter of tensors `name.weight` [rows, cols]: for each name the factors `A` and `B`, all of one rank.
    pub fn lora(&self, name: &str, factors: &[(&str, Factor, Factor)], alpha: f64) -> &Self {
        let dir = self.dir.path().join(name);
        let names: Vec<[String; 2]> = factors
            .iter()
            .map(|(module, ..)| {
                ["A", "B"].map(|side| format!("base_model.model.{module}.lora_{side}.weight"))
            })
            .collect();
        let tensors: Vec<Tensor<'_>> = names
            .iter()
            .zip(factors)
            .flat_map(|([name_a, name_b], (_, a, b))| {
                [(name_a, a), (name_b, b)]
                    .map(|(name, (shape, values))| (name.as_str(), shape.clone(), values.clone()))
            })
            .collect();
        self.add(name, Dtype::F32, &tensors);
        fs::rename(
            dir.join("model.safetensors"),
            dir.join("adapter_model.safetensors"),
        )
        .unwrap();
        let config = json!({"peft_type": "LORA", "lora_alpha": alpha, "r": factors[0].1.0[0]});
        fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        self
    }

    pub fn merge(&self, recipe: Value) -> Result<Merged, Refused> {
        self.merge_with(recipe, &MergeOptions::default(), &Counter::default())
    }

    pub fn merge_with(
        &self,
        recipe: Value,
        options: &MergeOptions,
        counter: &Counter,
    ) -> Result<Merged, Refused> {
        self.merge_in(tempfile::tempdir().unwrap(), recipe, options, counter)
            .map_err(|(_, refused)| refused)
    }

    /// As [`Self::merge_with`], in a folder that may have been merged in before; an error gives it back.
    pub fn merge_in(
        &self,
        dir: TempDir,
        recipe: Value,
        options: &MergeOptions,
        counter: &Counter,
    ) -> Result<Merged, (TempDir, Refused)> {
        match self.merge_at(dir.path(), recipe, options, counter) {
            Ok((manifest, digest, total)) => Ok(Merged {
                total,
                seen: *counter.seen.lock().unwrap(),
                dir,
                manifest,
                digest,
            }),
            Err(refused) => Err((dir, refused)),
        }
    }

    fn merge_at(
        &self,
        dir: &Path,
        recipe: Value,
        options: &MergeOptions,
        counter: &Counter,
    ) -> Result<(Manifest, Digest, u64), Refused> {
        let recipe = checked(recipe).map_err(Refused::Recipe)?;
        let parents = Parents::open(&recipe, self).map_err(Refused::Recipe)?;
        let manifest = merge_to_folder(&recipe, &parents, dir, options, counter).map_err(Refused::Merge)?;
        let digest = merge_digest(&recipe, &parents, counter).map_err(Refused::Merge)?;
        // What was digested while merging is what a reading of its own finds.
        let again = Parents::open(&recipe, self).map_err(Refused::Recipe)?;
        assert_eq!(
            merge_digest(&recipe, &again, &Counter::default()).unwrap(),
            digest
        );
        assert_eq!(manifest.digest, digest);
        Ok((manifest, digest, parents.bytes_total(&recipe)))
    }
}

pub fn checked(recipe: Value) -> Result<Recipe, RecipeError> {
    Recipe::from_spec(&recipe_from_value(recipe)?, &mut || 11)
}

pub fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state as f32 / u32::MAX as f32 - 0.5) * 0.2
        })
        .collect()
}

pub fn assert_close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(*f) - e).abs() < 1e-6,
            "element {i}: {found:?} is not {expected:?}"
        );
    }
}
