//! Whatever the shapes, dtypes, methods and cuts: the same bytes for any number of threads, any files of the parents, any
//! size of what is computed together, and after any interruption.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use cauldron_checkpoint::{CheckpointError, Dtype, Hold, Keeper};
use cauldron_merge::{Family, HoldWeights, MergeOptions, Parents, merge_digest};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

use crate::fixture::{Counter, Merged, Models, checked, noise};

/// One tensor: name and shape.
type Shape = (String, Vec<usize>);

#[derive(Debug, Clone)]
struct Case {
    shapes: Vec<Shape>,
    /// Of the base and the models; whether neighbours' values are often equal.
    dtypes: Vec<Dtype>,
    coarse: bool,
    recipe: Value,
    /// Whether a model is an adapter over its checkpoint, by model.
    adapters: Vec<bool>,
    threads: usize,
    max_shard_bytes: u64,
    window_elements: usize,
    /// Where, as a share of all bytes, a first try stops.
    stop: f64,
}

fn shapes() -> impl Strategy<Value = Vec<Shape>> {
    let shape = prop_oneof![
        3 => prop::collection::vec(1usize..80, 1..=2),
        1 => prop::collection::vec(1usize..12, 3),
        // More than one chunk: short rows, long rows, a vector.
        1 => (60_000usize..90_000).prop_map(|n| vec![n / 7, 7]),
        1 => (60_000usize..90_000).prop_map(|n| vec![2, n / 2]),
        1 => (60_000usize..90_000).prop_map(|n| vec![n]),
        1 => Just(vec![0, 3]),
    ];
    prop::collection::vec((select(vec!["mlp", "self_attn", "norm"]), shape), 1..6).prop_map(|all| {
        let named = all.into_iter().enumerate();
        named
            .map(|(i, (part, shape))| (format!("model.layers.{i}.{part}.weight"), shape))
            .collect()
    })
}

fn sparsifiers() -> impl Strategy<Value = Value> {
    let amount = (1u32..10).prop_map(|p| f64::from(p) / 10.0);
    let rescale = select(vec![json!(true), json!(false), json!("l1")]);
    (select(vec!["none", "dare", "magnitude", "della", "breadcrumbs"]), amount, rescale, 0u64..5).prop_map(
        |(kind, drop_rate, rescale, seed)| match kind {
            "none" => Value::Null,
            "dare" => json!({"kind": kind, "drop_rate": drop_rate, "rescale": rescale, "seed": seed}),
            "della" => {
                let epsilon = drop_rate.min(1.0 - drop_rate) / 2.0;
                json!({"kind": kind, "drop_rate": drop_rate, "epsilon": epsilon, "rescale": rescale, "seed": seed})
            }
            "magnitude" => json!({"kind": kind, "drop_rate": drop_rate, "rescale": if rescale == json!(true) { json!(false) } else { rescale }}),
            _ => json!({"kind": kind, "drop_rate": drop_rate, "gamma": (1.0 - drop_rate) / 4.0}),
        },
    )
}

/// A method and what it takes beside models, base and sparsifier; the number of models that it takes.
fn methods() -> impl Strategy<Value = (Value, std::ops::RangeInclusive<usize>)> {
    select(vec![
        (json!({"method": "average"}), 1..=4),
        (json!({"method": "average", "mixup": {"lambda": 0.3}}), 2..=2),
        (json!({"method": "task_arithmetic", "scaling": 0.7}), 1..=4),
        (
            json!({"method": "task_arithmetic", "mixup": {"alpha": 0.5, "seed": 3}}),
            2..=4,
        ),
        (json!({"method": "ties", "retain": 0.4}), 2..=4),
        (
            json!({"method": "ties", "retain": 0.4, "variant": "tensor"}),
            2..=4,
        ),
        (
            json!({"method": "ties", "retain": 0.7, "mixup": {"lambda": 0.8}}),
            2..=2,
        ),
        (json!({"method": "slerp", "t": 0.4}), 2..=2),
        (json!({"method": "multislerp"}), 2..=3),
        (json!({"method": "karcher"}), 2..=3),
        (json!({"method": "nuslerp"}), 2..=2),
        (json!({"method": "model_stock"}), 2..=3),
        (json!({"method": "sce", "select": 0.5}), 2..=3),
        (json!({"method": "nearswap", "t": 0.01}), 1..=1),
        (json!({"method": "arcee_fusion"}), 1..=1),
    ])
}

fn cases() -> impl Strategy<Value = Case> {
    let recipe = (methods(), sparsifiers(), 0usize..4).prop_map(|((mut recipe, counts), sparsify, more)| {
        let count = (counts.start() + more).min(*counts.end());
        let entries: &mut Map<String, Value> = recipe.as_object_mut().unwrap();
        let models: Vec<String> = (0..count).map(|k| format!("m{k}")).collect();
        entries.insert("models".into(), json!(models));
        let average = matches!(entries["method"].as_str(), Some("average" | "slerp" | "karcher"));
        if !average || !sparsify.is_null() {
            entries.insert("base".into(), json!("base"));
        }
        if !sparsify.is_null() {
            entries.insert("sparsify".into(), sparsify);
        }
        recipe
    });
    let dtype = select(vec![Dtype::BF16, Dtype::F16, Dtype::F32]);
    let cut = (
        select(vec![1usize, 2, 8]),
        select(vec![500u64, 60_000, 1 << 30]),
        select(vec![64usize, 5_000, 70_000, 8 << 20]),
    );
    (
        shapes(),
        prop::collection::vec(dtype, 5),
        any::<bool>(),
        recipe,
        prop::collection::vec(prop::bool::weighted(0.2), 4),
        cut,
        0.0f64..1.0,
    )
        .prop_map(|(shapes, dtypes, coarse, mut recipe, adapters, cut, stop)| {
            let can_be_changed = shapes.iter().any(is_matrix);
            for (index, model) in recipe["models"].as_array_mut().unwrap().iter_mut().enumerate() {
                if adapters[index] && can_be_changed {
                    *model = json!(format!("m{index}+lora{index}"));
                }
            }
            let (threads, max_shard_bytes, window_elements) = cut;
            Case {
                shapes,
                dtypes,
                coarse,
                recipe,
                adapters,
                threads,
                max_shard_bytes,
                window_elements,
                stop,
            }
        })
}

/// Whether an adapter can change a tensor.
fn is_matrix((_, shape): &Shape) -> bool {
    shape.len() == 2 && shape[0] > 0
}

impl Case {
    fn models(&self) -> Models {
        let models = Models::new();
        for index in (0..self.adapters.len()).filter(|index| self.adapters[*index]) {
            let factors: Vec<_> = self
                .shapes
                .iter()
                .filter(|shape| is_matrix(shape))
                .map(|(name, shape)| {
                    let factor = |of: u32, shape: [usize; 2]| {
                        (shape.to_vec(), noise(of + index as u32, shape[0] * shape[1]))
                    };
                    let module = name.strip_suffix(".weight").unwrap();
                    (module, factor(7, [3, shape[1]]), factor(77, [shape[0], 3]))
                })
                .collect();
            if !factors.is_empty() {
                models.lora(&format!("lora{index}"), &factors, 2.0);
            }
        }
        for (seed, dtype) in self.dtypes.iter().enumerate() {
            let name = if seed == 0 {
                "base".to_owned()
            } else {
                format!("m{}", seed - 1)
            };
            let tensors: Vec<_> = self
                .shapes
                .iter()
                .enumerate()
                .map(|(i, (name, shape))| {
                    let len = shape.iter().product();
                    let base = noise(i as u32, len);
                    let own = noise((100 * seed + i) as u32, len);
                    let step = if self.coarse { 0.02 } else { 1e-6 };
                    let values = base.iter().zip(&own).map(|(base, own)| match seed {
                        0 => *base,
                        _ => base + (own * 0.3 / step).round() * step,
                    });
                    (name.as_str(), shape.clone(), values.collect())
                })
                .collect();
            models.add(&name, *dtype, &tensors);
        }
        models
    }

    fn merge(&self, models: &Models) -> Merged {
        models.merge(self.recipe.clone()).unwrap()
    }

    /// In parts, with an interruption.
    fn merge_in_parts(&self, models: &Models, total: u64) -> Merged {
        let options = MergeOptions {
            max_shard_bytes: self.max_shard_bytes,
            window_elements: self.window_elements,
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .build()
            .unwrap();
        pool.install(|| {
            let first = Counter {
                cancel_at: Some((total as f64 * self.stop) as u64),
                ..Counter::default()
            };
            let dir = tempfile::tempdir().unwrap();
            let dir = match models.merge_in(dir, self.recipe.clone(), &options, &first) {
                Ok(merged) => return merged,
                Err((dir, refused)) => {
                    assert_eq!(refused.slug(), "cancelled");
                    dir
                }
            };
            let merged = models.merge_in(dir, self.recipe.clone(), &options, &Counter::default());
            merged.map_err(|(_, refused)| refused).unwrap()
        })
    }
}

/// Deals the tensors of a model to files of their own.
fn shard(dir: &Path) {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut weight_map = Map::new();
    for (i, (name, view)) in all.tensors().into_iter().enumerate() {
        let file = format!("part-{i}.safetensors");
        fs::write(
            dir.join(&file),
            safetensors::serialize([(&name, view)], None).unwrap(),
        )
        .unwrap();
        weight_map.insert(name, file.into());
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::remove_file(dir.join("model.safetensors")).unwrap();
}

/// All weights.
struct InMemory;

impl HoldWeights for InMemory {
    fn hold(&self, _: Option<&str>, weights: Arc<dyn Hold>) -> Result<(), CheckpointError> {
        weights.hold(Arc::new(weights.read_all(&|| true, Box::new(()))?));
        Ok(())
    }

    fn room(&self, _: u64) -> Option<Box<dyn Keeper>> {
        Some(Box::new(()))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases_to_run(), max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn how_a_merge_is_cut_does_not_show(case in cases()) {
        let models = case.models();
        let whole = case.merge(&models);
        prop_assert_eq!(whole.seen, whole.total);
        for parent in fs::read_dir(models.path()).unwrap() {
            let parent = parent.unwrap().path();
            if !parent.join("adapter_config.json").exists() {
                shard(&parent);
            }
        }
        let parts = case.merge_in_parts(&models, whole.total);
        prop_assert_eq!(parts.digest, whole.digest);
        prop_assert_eq!(&parts.manifest.tensors, &whole.manifest.tensors);
        for (name, _) in &case.shapes {
            prop_assert_eq!(parts.bytes(name), whole.bytes(name), "{}", name);
        }
    }

    /// A merge looks at its tiles, small tensors' all; a point that nobody looks at goes from bytes to bytes.
    #[test]
    fn a_point_of_a_family_in_memory_is_the_merge_on_disk(mut case in cases(), alike in 0u32..4) {
        if alike > 0 {
            case.dtypes = vec![case.dtypes[0]; case.dtypes.len()];
        }
        let models = case.models();
        let merged = case.merge(&models);
        let recipe = checked(case.recipe.clone()).unwrap();
        let parents = Parents::open(&recipe, &models).unwrap();
        parents.hold_weights(&InMemory).unwrap();
        let obs = Counter::default();
        for family in [Family::prepare(&recipe, &parents, &obs), Family::prepare_for_points(&recipe, &parents, &InMemory, &obs)] {
            let family = family.unwrap();
            let point = family.point(None).unwrap().unobserved();
            let names: Vec<String> = point.tensor_names().map(str::to_owned).collect();
            for (index, name) in names.iter().enumerate() {
                let (_, _, bytes) = point.tensor(index, &obs).unwrap();
                prop_assert_eq!(bytes, merged.bytes(name), "{}", name);
            }
        }
        prop_assert_eq!(merge_digest(&recipe, &parents, &obs).unwrap(), merged.digest);
    }
}

/// `MERGE_CASES` asks for more.
fn cases_to_run() -> u32 {
    let asked = std::env::var("MERGE_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    asked.unwrap_or(96)
}
