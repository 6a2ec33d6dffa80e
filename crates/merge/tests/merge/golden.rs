//! The golden vectors of the method definitions (docs/METHODS.md), through whole merges.

use serde_json::{Value, json};

use crate::fixture::{Models, assert_close};

const D1: [f32; 8] = [0.1, -0.4, 0.3, 0.05, -0.02, 0.5, -0.2, 0.0];
const D2: [f32; 8] = [0.2, 0.3, -0.3, 0.0, 0.6, 0.1, -0.7, 0.04];

fn merged(recipe: Value) -> Vec<f32> {
    let models = Models::new();
    models.vector("base", &[0.0; 8]).vector("a", &D1).vector("b", &D2);
    models.merge(recipe).unwrap().values("w")
}

#[test]
fn average() {
    let out = merged(json!({"method": "average", "models": ["a", "b"]}));
    assert_close(&out, &[0.15, -0.05, 0.0, 0.025, 0.29, 0.30, -0.45, 0.02]);
}

#[test]
fn task_arithmetic() {
    let out = merged(json!({"method": "task_arithmetic", "base": "base", "models": ["a", "b"]}));
    assert_close(&out, &[0.30, -0.10, 0.0, 0.05, 0.58, 0.60, -0.90, 0.04]);
}

#[test]
fn mixup_of_average_and_of_task_arithmetic_agree() {
    let expected = [0.175, 0.125, -0.15, 0.0125, 0.445, 0.20, -0.575, 0.03];
    let mixup = json!({"lambda": 0.25});
    assert_close(
        &merged(json!({"method": "average", "models": ["a", "b"], "mixup": mixup})),
        &expected,
    );
    assert_close(
        &merged(json!({"method": "task_arithmetic", "base": "base", "models": ["a", "b"], "mixup": mixup})),
        &expected,
    );
}

#[test]
fn ties_global_with_half_retained() {
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.5});
    assert_close(&merged(recipe), &[0.15, -0.40, 0.30, 0.0, 0.60, 0.50, -0.45, 0.0]);
}

#[test]
fn ties_with_mixup_keeps_single_values_in_full() {
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.5, "mixup": {"lambda": 0.25}});
    assert_close(
        &merged(recipe),
        &[0.175, -0.40, 0.30, 0.0, 0.60, 0.50, -0.575, 0.0],
    );
}

#[test]
fn ties_drops_an_element_without_majority() {
    let plain = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.3});
    assert_close(&merged(plain), &[0.0, -0.40, 0.0, 0.0, 0.60, 0.50, -0.45, 0.0]);
    let mixed = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.3, "mixup": {"lambda": 0.25}});
    assert_close(&merged(mixed), &[0.0, -0.40, 0.0, 0.0, 0.60, 0.50, -0.575, 0.0]);
}

/// A seed whose mask over `w` of the first parent keeps 1,0,1,1,0,1,0,1 at p = .2.
fn dare_seed() -> u64 {
    let keeps = [true, false, true, true, false, true, false, true];
    let models = Models::new();
    models.vector("base", &[0.0; 8]).vector("ones", &[1.0; 8]);
    (0..20_000)
        .find(|seed| {
            let sparsify = json!({"kind": "dare", "drop_rate": 0.2, "rescale": false, "seed": seed});
            let recipe = json!({"method": "task_arithmetic", "base": "base", "models": ["ones"], "sparsify": sparsify});
            let out = models.merge(recipe).unwrap().values("w");
            out.iter().zip(keeps).all(|(v, keep)| (*v != 0.0) == keep)
        })
        .unwrap()
}

#[test]
fn dare_and_its_l1_rescaling() {
    let seed = dare_seed();
    let run = |rescale: Value| {
        let sparsify = json!({"kind": "dare", "drop_rate": 0.2, "rescale": rescale, "seed": seed});
        merged(json!({"method": "task_arithmetic", "base": "base", "models": ["a"], "sparsify": sparsify}))
    };
    assert_close(
        &run(json!(true)),
        &[0.125, 0.0, 0.375, 0.0625, 0.0, 0.625, 0.0, 0.0],
    );
    assert_close(
        &run(json!("l1")),
        &[0.165263, 0.0, 0.495789, 0.082632, 0.0, 0.826316, 0.0, 0.0],
    );
    assert_close(&run(json!(false)), &[0.1, 0.0, 0.3, 0.05, 0.0, 0.5, 0.0, 0.0]);
}

#[test]
fn magnitude_drops_the_smallest_of_each_tensor() {
    let sparsify = json!({"kind": "magnitude", "drop_rate": 0.5});
    let recipe = json!({"method": "task_arithmetic", "base": "base", "models": ["a"], "sparsify": sparsify});
    assert_close(&merged(recipe), &[0.0, -0.4, 0.3, 0.0, 0.0, 0.5, -0.2, 0.0]);
}

#[test]
fn ties_by_tensor_weighs_before_it_elects() {
    let plain =
        json!({"method": "ties", "variant": "tensor", "base": "base", "models": ["a", "b"], "retain": 0.5});
    assert_close(&merged(plain), &[0.0, -0.40, 0.30, 0.0, 0.60, 0.50, -0.45, 0.0]);
    let weighted = json!({"method": "ties", "variant": "tensor", "base": "base", "retain": 0.5,
        "models": [{"model": "a", "weight": 0.25}, {"model": "b", "weight": 0.75}]});
    assert_close(
        &merged(weighted),
        &[0.0, 0.30, -0.30, 0.0, 0.60, 0.50, -0.575, 0.0],
    );
}

#[test]
fn slerp() {
    let expected = [
        0.170101, -0.25546, 0.162621, 0.046419, 0.213219, 0.502822, -0.456094, 0.015452,
    ];
    assert_close(
        &merged(json!({"method": "slerp", "models": ["a", "b"], "t": 0.25})),
        &expected,
    );
    let mixed = json!({"method": "slerp", "models": ["a", "b"], "mixup": {"lambda": 0.75}});
    assert_close(&merged(mixed), &expected);
}

#[test]
fn breadcrumbs_drop_the_smallest_and_the_largest() {
    let sparsify = json!({"kind": "breadcrumbs", "retain": 0.5, "gamma": 0.13});
    let recipe = json!({"method": "breadcrumbs", "base": "base", "models": ["a"], "sparsify": sparsify});
    assert_close(&merged(recipe), &[0.1, -0.4, 0.3, 0.0, 0.0, 0.0, -0.2, 0.0]);
}
