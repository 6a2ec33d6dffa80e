//! The kernels for GPUs, compiled for the CPU (feature `emulated`), beside the loops for CPUs: the same bytes.

use candle_core::Device;
use cauldron_checkpoint::Dtype;
use cauldron_gpu::Gpu;
use cauldron_merge::{Family, Parents, Resident};
use serde_json::{Value, json};

use crate::fixture::{Counter, Models, checked, noise};

/// A base and three models of a type: a matrix of more than one tile, one of odd sizes, a vector.
fn models(dtypes: [Dtype; 4]) -> Models {
    let models = Models::new();
    let shapes = [
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
    let weighted = json!([{"model": "a", "weight": 0.5}, {"model": "b", "weight": -0.25}, {"model": "c", "weight": 1.5}]);
    vec![
        json!({"method": "average", "models": two}),
        json!({"method": "average", "models": two, "mixup": mix}),
        json!({"method": "average", "models": three, "mixup": shares}),
        json!({"method": "average", "models": [{"model": "a", "weight": 1.0}, {"model": "b", "weight": 0.0}, {"model": "c", "weight": 2.5}]}),
        json!({"method": "average", "base": "base", "models": two, "sparsify": dare}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "scaling": 0.7}),
        json!({"method": "task_arithmetic", "base": "base", "models": weighted, "normalize": true}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "mixup": mix, "exclude": ["norm"]}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "mixup": mix, "sparsify": dare}),
        json!({"method": "task_arithmetic", "base": "base", "models": three, "sparsify": dare_l1}),
        json!({"method": "task_arithmetic", "base": "base", "models": two, "sparsify": della}),
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
