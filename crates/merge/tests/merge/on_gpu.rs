//! The kernels for GPUs, compiled for the CPU (feature `emulated`), beside the loops for CPUs: the same bytes.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use candle_core::Device;
use cauldron_checkpoint::Dtype;
use cauldron_gpu::Gpu;
use cauldron_merge::{
    Family, Lease, Lender, Manifest, MergeError, MergeOptions, Parents, Resident, Streamed, merge_to_folder,
    merge_to_folder_on_gpu,
};
use serde_json::{Value, json};

use crate::fixture::{Counter, Models, checked, noise};

fn models(dtypes: [Dtype; 4]) -> Models {
    models_of(dtypes, [("model.norm.weight", vec![5])])
}

/// A base and three models of a type: a matrix of more than one tile, one of odd sizes, vectors, and one more tensor.
fn models_of(dtypes: [Dtype; 4], more: [(&'static str, Vec<usize>); 1]) -> Models {
    let models = Models::new();
    let [more] = more;
    let shapes = [
        more,
        ("model.layers.0.mlp.up_proj.weight", vec![93, 101]),
        ("model.layers.1.mlp.up_proj.weight", vec![7, 13]),
        ("model.layers.1.norm.weight", vec![37]),
    ];
    for (k, (name, dtype)) in ["base", "a", "b", "c"].into_iter().zip(dtypes).enumerate() {
        let tensors: Vec<_> = shapes
            .iter()
            .enumerate()
            .map(|(i, (tensor, shape))| {
                let len = shape.iter().product();
                let base = noise(i as u32, len);
                let own = noise((10 * k + i) as u32 + 100, len);
                // Some are as the base has them.
                let moved = |(at, (base, own)): (usize, (&f32, &f32))| match k == 0 || at % 5 == k {
                    _ if at % 11 == 0 => 0.0,
                    true => *base,
                    false => base + 0.1 * own,
                };
                let values = base.iter().zip(&own).enumerate().map(moved);
                (*tensor, shape.clone(), values.collect())
            })
            .collect();
        models.add(name, dtype, &tensors);
    }
    models
}

fn recipes() -> Vec<Value> {
    let two = ["a", "b"];
    let three = ["a", "b", "c"];
    let mix = json!({"lambda": 0.35});
    let shares = json!({"shares": [0.2, 0.3, 0.5]});
    let dare = json!({"kind": "dare", "drop_rate": 0.3, "seed": 3});
    let dare_l1 = json!({"kind": "dare", "drop_rate": 0.3, "rescale": "l1"});
    let della = json!({"kind": "della", "retain": 0.6, "epsilon": 0.2, "rescale": false});
    let della_own = json!({"kind": "della", "retain": 0.6, "epsilon": 0.2, "seed": 5});
    let weighted = json!([{"model": "a", "weight": 0.5}, {"model": "b", "weight": -0.25}, {"model": "c", "weight": 1.5}]);
    vec![
        json!({"method": "average", "models": two}),
        json!({"method": "average", "models": two, "mixup": mix}),
        json!({"method": "average", "models": three, "mixup": shares}),
        json!({"method": "average", "models": [{"model": "a", "weight": 1.0}, {"model": "b", "weight": 0.0}, {"model": "c", "weight": 2.5}]}),
        // The sum is divided by a negative number.
        json!({"method": "average", "models": [{"model": "a", "weight": 0.5}, {"model": "b", "weight": -1.5}]}),
        json!({"method": "average", "base": "base", "models": two, "sparsify": dare}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "scaling": 0.7}),
        json!({"method": "task_arithmetic", "base": "base", "models": weighted, "normalize": true}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "mixup": mix, "exclude": ["norm"]}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "mixup": mix, "sparsify": dare}),
        json!({"method": "task_arithmetic", "base": "base", "models": three, "sparsify": dare_l1}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "sparsify": della}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "sparsify": della_own, "mixup": mix}),
        json!({"method": "ties", "base": "base", "models": three, "retain": 0.6, "sparsify": della_own}),
        json!({"method": "average", "base": "base", "models": two, "sparsify": della_own}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "sparsify": {"kind": "magnitude", "retain": 0.4}}),
        json!({"method": "ties", "base": "base", "models": two, "retain": 0.6}),
        json!({"method": "ties", "base": "base", "models": two, "retain": 0.6, "mixup": mix}),
        json!({"method": "ties", "base": "base", "models": three, "retain": 0.3, "mixup": shares}),
        json!({"method": "ties", "base": "base", "models": weighted, "retain": 0.4, "variant": "tensor", "normalize": true}),
        json!({"method": "ties", "base": "base", "models": weighted, "retain": 0.4, "variant": "tensor", "normalize": false}),
        json!({"method": "ties", "base": "base", "models": two, "retain": 0.5, "mixup": mix, "sparsify": dare}),
        json!({"method": "ties", "base": "base", "models": two, "retain": 1.0, "variant": "tensor",
            "sparsify": {"kind": "breadcrumbs", "retain": 0.7, "gamma": 0.05}}),
        json!({"method": "slerp", "models": two, "t": 0.3}),
        json!({"method": "nuslerp", "base": "base", "models": [{"model": "a", "weight": 0.3}, {"model": "b", "weight": 0.7}]}),
        json!({"method": "multislerp", "models": three}),
        json!({"method": "karcher", "models": three}),
        json!({"method": "model_stock", "base": "base", "models": three}),
    ]
}

#[test]
fn points_in_a_gpus_memory_have_the_bytes_of_the_cpu() {
    let same = [Dtype::BF16; 4];
    let mixed = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F32];
    for (dtypes, out) in [
        (same, "bfloat16"),
        (same, "float32"),
        (mixed, "float16"),
        (mixed, "bfloat16"),
    ] {
        let models = models(dtypes);
        for mut recipe in recipes() {
            recipe["dtype"] = json!(out);
            let recipe = checked(recipe).unwrap();
            let parents = Parents::open(&recipe, &models).unwrap();
            let quiet = Counter::default();
            let family = Family::prepare_for_points(&recipe, &parents, &(), &quiet).unwrap();
            let gpu = Gpu::new(&Device::Cpu).unwrap();
            let resident = Resident::load(&family, gpu, &quiet).unwrap();
            let mut written = resident.room().unwrap();
            let lambdas: &[Option<f64>] = match recipe.lambda() {
                Some(_) => &[None, Some(0.0), Some(0.8), Some(1.0)],
                None => &[None],
            };
            for lambda in lambdas {
                let point = family.point(*lambda).unwrap();
                resident.write(&point, &mut written).unwrap();
                resident.finish(&written).unwrap();
                for index in 0..point.tensor_names().count() {
                    let (_, _, exact) = point.tensor(index, &quiet).unwrap();
                    let ours = resident.tensor(&written, index).unwrap();
                    assert!(
                        ours == exact,
                        "{recipe:?} {lambda:?} tensor {index}, {dtypes:?} to {out}"
                    );
                }
            }
        }
    }
}

/// Merges on the CPU and on the GPU: what is in the folder, and how far the progress came.
fn both(
    models: &Models,
    recipe: &Value,
    options: &MergeOptions,
    gpu: Gpu,
) -> [Result<Manifest, MergeError>; 2] {
    let recipe = checked(recipe.clone()).unwrap_or_else(|e| panic!("{recipe}: {e}"));
    let merge = |streamed: Option<&mut Streamed<'_>>| {
        let parents = Parents::open(&recipe, models).unwrap();
        let out = tempfile::tempdir().unwrap();
        let counter = Counter::default();
        let merged = match streamed {
            None => merge_to_folder(&recipe, &parents, out.path(), options, &counter),
            Some(gpu) => merge_to_folder_on_gpu(gpu, &recipe, &parents, out.path(), options, &counter),
        };
        if merged.is_ok() {
            assert_eq!(
                *counter.seen.lock().unwrap(),
                parents.bytes_total(&recipe),
                "progress"
            );
        }
        merged
    };
    let lender = Lends {
        gpu,
        asked: None,
        given_back: Arc::default(),
        failures: Mutex::default(),
    };
    let mut streamed = Streamed::new(&lender);
    let both = [merge(None), merge(Some(&mut streamed))];
    assert!(lender.failures.lock().unwrap().len() <= 1);
    both
}

fn assert_same(models: &Models, recipe: &Value, options: &MergeOptions, gpu: Gpu) {
    // The manifest has the digests of all files.
    let [cpu, gpu] =
        both(models, recipe, options, gpu).map(|merged| merged.unwrap_or_else(|e| panic!("{recipe}: {e}")));
    let json = |manifest: &Manifest| serde_json::to_string_pretty(manifest).unwrap();
    assert_eq!(json(&gpu), json(&cpu), "{recipe}");
}

fn gpu() -> Gpu {
    Gpu::new(&Device::Cpu).unwrap()
}

/// Windows of one chunk and of several; chunks that begin at no multiple of 4.
fn windows() -> [MergeOptions; 2] {
    [1, 150_000].map(|window_elements| MergeOptions {
        window_elements,
        ..MergeOptions::default()
    })
}

#[test]
fn merges_through_a_gpu_have_the_bytes_and_the_statistics_of_the_cpu() {
    let large = [("model.layers.2.mlp.up_proj.weight", vec![500, 401])];
    let mixed = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F32];
    // What the kernels do not compute.
    let others = [
        json!({"method": "sce", "base": "base", "models": ["a", "b"], "select": 0.5}),
        json!({"method": "arcee_fusion", "base": "base", "models": ["a"]}),
    ];
    for (dtypes, out, options) in [
        ([Dtype::BF16; 4], "bfloat16", windows()[1]),
        (mixed, "float16", windows()[0]),
    ] {
        let models = models_of(dtypes, large.clone());
        for mut recipe in recipes().into_iter().chain(others.clone()) {
            recipe["dtype"] = json!(out);
            let gpu = gpu();
            assert_same(&models, &recipe, &options, gpu.clone());
            // DELLA is drawn by ranks.
            let is_computed = !others.iter().any(|other| other["method"] == recipe["method"])
                && (recipe["sparsify"]["kind"] != "della");
            assert_eq!(gpu.has_copied(), is_computed, "{recipe}");
        }
    }
}

#[test]
fn a_gpu_that_breaks_in_a_merge_leaves_the_rest_to_the_cpu() {
    let models = models([Dtype::BF16; 4]);
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.6, "mixup": {"lambda": 0.35}});
    // A window takes four copies.
    for copies in 0..14 {
        assert_same(&models, &recipe, &windows()[0], gpu().breaking_after(copies));
    }
}

#[test]
fn a_gpu_that_is_wanted_back_is_given_back_in_the_middle_of_a_merge() {
    let models = models([Dtype::BF16; 4]);
    for recipe in [
        json!({"method": "task_arithmetic", "base": "base", "models": ["a", "b"]}),
        // Prepared group by group.
        json!({"method": "slerp", "models": ["a", "b"], "t": 0.3}),
        json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.5}),
    ] {
        let recipe = checked(recipe).unwrap();
        let parents = Parents::open(&recipe, &models).unwrap();
        let merge = |gpu: Option<&mut Streamed<'_>>| {
            let (out, quiet) = (tempfile::tempdir().unwrap(), Counter::default());
            let [options, _] = windows();
            match gpu {
                Some(gpu) => merge_to_folder_on_gpu(gpu, &recipe, &parents, out.path(), &options, &quiet),
                None => merge_to_folder(&recipe, &parents, out.path(), &options, &quiet),
            }
            .unwrap()
        };
        let expected = merge(None);
        for asked in [0, 1, 2, 3, 1000] {
            let lender = Lends {
                gpu: gpu(),
                asked: Some(asked),
                given_back: Arc::default(),
                failures: Mutex::default(),
            };
            let mut streamed = Streamed::new(&lender);
            assert_eq!(merge(Some(&mut streamed)), expected);
            assert_eq!(lender.given_back.load(Relaxed), 1, "before the merge is dropped");
            assert!(lender.failures.lock().unwrap().is_empty());
            assert_eq!(streamed.has_merged(), asked == 1000);
        }
    }
}

/// Lends a GPU, and wants it back when it has been asked so often.
#[derive(Debug)]
struct Lends {
    gpu: Gpu,
    asked: Option<usize>,
    given_back: Arc<AtomicUsize>,
    failures: Mutex<Vec<String>>,
}

#[derive(Debug)]
struct Lent {
    asked: Option<AtomicUsize>,
    given_back: Arc<AtomicUsize>,
}

impl Lender for Lends {
    fn lend(&self) -> Option<(Gpu, Box<dyn Lease>)> {
        let lent = Lent {
            asked: self.asked.map(AtomicUsize::new),
            given_back: self.given_back.clone(),
        };
        Some((self.gpu.clone(), Box::new(lent)))
    }

    fn failed(&self, detail: &str) {
        assert_eq!(self.given_back.load(Relaxed), 1, "nothing is left there");
        self.failures.lock().unwrap().push(detail.to_owned());
    }
}

impl Lease for Lent {
    fn is_wanted_back(&self) -> bool {
        let take = |left: &AtomicUsize| {
            left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1))
                .is_err()
        };
        self.asked.as_ref().is_some_and(take)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.given_back.fetch_add(1, Relaxed);
    }
}

#[test]
fn adapters_and_rows_that_moved_pass_through_a_gpu() {
    let models = Models::new();
    let name = "model.layers.0.mlp.up_proj";
    let weight = format!("{name}.weight");
    let embed = "model.embed_tokens.weight";
    let (rows, width) = (300, 33);
    for (k, (model, tokens)) in [("base", rows), ("a", rows + 2), ("b", rows)]
        .into_iter()
        .enumerate()
    {
        let tensors = [
            (embed, vec![tokens, width], noise(k as u32, tokens * width)),
            (weight.as_str(), vec![90, 101], noise(7, 90 * 101)),
        ];
        models.add(model, Dtype::BF16, &tensors);
    }
    let side = |seed, shape: [usize; 2]| (shape.to_vec(), noise(seed, shape[0] * shape[1]));
    models.lora("own", &[(name, side(50, [4, 101]), side(51, [90, 4]))], 8.0);
    for recipe in [
        json!({"method": "average", "models": ["a", "b"], "vocab": "pad_mean"}),
        json!({"method": "task_arithmetic", "base": "base", "models": ["a", "b+own"], "vocab": "base",
            "sparsify": {"kind": "dare", "drop_rate": 0.3, "seed": 3}}),
        json!({"method": "ties", "base": "base+own", "models": ["a", "b"], "vocab": "base", "retain": 0.5}),
        json!({"method": "average", "models": ["a+own", "b+own"], "vocab": "pad_mean", "mixup": {"lambda": 0.25}}),
        // A parent that adds nothing is not read, nor is its adapter.
        json!({"method": "average", "models": [{"model": "a"}, {"model": "b+own", "weight": 0.0}], "vocab": "pad_mean"}),
        json!({"method": "average", "models": ["a+own", "b+own"], "vocab": "pad_mean", "mixup": {"lambda": 1.0}}),
    ] {
        for options in windows() {
            let gpu = gpu();
            assert_same(&models, &recipe, &options, gpu.clone());
            assert!(gpu.has_copied());
        }
    }
}

#[test]
fn what_is_not_finite_is_refused_as_on_the_cpu() {
    let name = "model.layers.0.mlp.up_proj.weight";
    let models = Models::new();
    let mut values = noise(1, 700);
    models.add("base", Dtype::F32, &[(name, vec![7, 100], values.clone())]);
    models.add("large", Dtype::F32, &[(name, vec![7, 100], vec![60_000.0; 700])]);
    values[333] = f32::NAN;
    models.add("nan", Dtype::F32, &[(name, vec![7, 100], values)]);
    let too_large = json!({"method": "task_arithmetic", "base": "base", "models": ["large"], "scaling": 2.0, "dtype": "float16"});
    // TIES trims what is not a number, and it must be found all the same.
    let not_a_number = json!({"method": "ties", "base": "base", "models": ["large", "nan"], "retain": 0.5, "variant": "tensor"});
    for (recipe, slug) in [(too_large, "non-finite"), (not_a_number, "non-finite-input")] {
        let [cpu, gpu] = both(&models, &recipe, &MergeOptions::default(), gpu()).map(Result::unwrap_err);
        assert_eq!(gpu.to_string(), cpu.to_string());
        assert_eq!(gpu.slug(), slug);
    }
}
