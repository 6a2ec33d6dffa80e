//! The edges where merging code goes wrong without anyone noticing.

use cauldron_checkpoint::{Checkpoint, Dtype};
use cauldron_merge::MergeOptions;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::fixture::{Counter, Models, noise, read_bytes};
use crate::recipes::of_every_kind;

fn three(models: &Models, dtype: Dtype) {
    for (seed, name) in ["base", "a", "b", "c"].into_iter().enumerate() {
        let tensors = [
            ("big", vec![300, 250], noise(seed as u32, 75_000)),
            ("empty", vec![0, 4], vec![]),
            ("one", vec![1], noise(seed as u32 + 9, 1)),
            ("scalar", vec![], noise(seed as u32 + 20, 1)),
        ];
        models.add(name, dtype, &tensors);
    }
}

#[test]
fn the_number_of_threads_and_the_shard_size_do_not_show() {
    let models = Models::new();
    three(&models, Dtype::BF16);
    for recipe in of_every_kind() {
        let whole = models.merge(recipe.clone()).unwrap();
        assert_eq!(whole.seen, whole.total, "progress ends at its total: {recipe}");
        for threads in [1, 2, 8] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let options = MergeOptions {
                max_shard_bytes: 1000,
                window_elements: 20_000,
            };
            let cut = pool.install(|| {
                models
                    .merge_with(recipe.clone(), &options, &Counter::default())
                    .unwrap()
            });
            assert!(cut.dir.path().join("model.safetensors.index.json").is_file());
            assert_eq!(cut.digest, whole.digest);
            for name in whole.checkpoint().tensors().keys() {
                assert_eq!(cut.bytes(name), whole.bytes(name), "{threads} threads, {recipe}");
            }
        }
    }
}

/// Methods that give equal parents back to the bit.
fn exact_on_equals() -> Vec<Value> {
    let both = json!(["a", "b"]);
    let mut recipes = vec![json!({"method": "average", "models": both})];
    for method in ["task_arithmetic", "ties", "average"] {
        for sparsify in [
            Value::Null,
            json!({"kind": "dare", "drop_rate": 0.3}),
            json!({"kind": "dare", "drop_rate": 0.3, "rescale": "l1"}),
            json!({"kind": "magnitude", "drop_rate": 0.4}),
        ] {
            recipes.push(json!({"method": method, "base": "base", "models": both, "sparsify": sparsify, "mixup": {"lambda": 0.35}}));
        }
    }
    recipes
}

#[test]
fn equal_parents_give_the_base_back() {
    let models = Models::new();
    let values = [0.5, -0.0, 0.0, 1e-30, -3.25, 7.0];
    for name in ["base", "a", "b"] {
        models.add(name, Dtype::BF16, &[("w", vec![6], values.to_vec())]);
    }
    let base = read_bytes(&Checkpoint::open(&models.path().join("base")).unwrap(), "w");
    for recipe in exact_on_equals() {
        assert_eq!(models.merge(recipe.clone()).unwrap().bytes("w"), base, "{recipe}");
    }
}

#[test]
fn average_at_the_ends_gives_the_parents_bytes() {
    let models = Models::new();
    three(&models, Dtype::F16);
    for (lambda, parent) in [(1.0, "a"), (0.0, "b")] {
        let merged = models
            .merge(json!({"method": "average", "models": ["a", "b"], "mixup": {"lambda": lambda}}))
            .unwrap();
        let parent = Checkpoint::open(&models.path().join(parent)).unwrap();
        for name in parent.tensors().keys() {
            assert_eq!(merged.bytes(name), read_bytes(&parent, name));
        }
    }
}

#[test]
fn a_parent_of_weight_zero_is_not_read_into_the_sum() {
    let models = Models::new();
    models.vector("a", &[1.0, 2.0]).vector("b", &[f32::NAN, 1.0]);
    let recipe =
        |lambda: f64| json!({"method": "average", "models": ["a", "b"], "mixup": {"lambda": lambda}});
    assert_eq!(models.merge(recipe(1.0)).unwrap().values("w"), [1.0, 2.0]);
    assert_eq!(
        models.merge(recipe(0.5)).err().unwrap().slug(),
        "non-finite-input"
    );
}

#[test]
fn swapping_the_parents_swaps_lambda() {
    let models = Models::new();
    three(&models, Dtype::F32);
    for method in ["average", "task_arithmetic", "ties"] {
        let run = |first: &str, second: &str, lambda: f64| {
            let recipe = json!({"method": method, "base": "base", "models": [first, second], "mixup": {"lambda": lambda}});
            models.merge(recipe).unwrap().values("big")
        };
        // 0.25 and 0.75 are exact, and f32 addition commutes.
        assert_eq!(run("a", "b", 0.25), run("b", "a", 0.75), "{method}");
    }
}

#[test]
fn an_overflow_fails_the_merge_and_names_the_tensor() {
    let models = Models::new();
    models
        .add("base", Dtype::F16, &[("w", vec![1], vec![0.0])])
        .add("a", Dtype::F16, &[("w", vec![1], vec![60_000.0])])
        .add("b", Dtype::F16, &[("w", vec![1], vec![60_000.0])]);
    let recipe = json!({"method": "task_arithmetic", "base": "base", "models": ["a", "b"]});
    assert_eq!(models.merge(recipe).err().unwrap().slug(), "non-finite");
}

#[test]
fn fp16_ones_half_masked_with_l1_stay_finite() {
    let models = Models::new();
    models
        .add("base", Dtype::F16, &[("w", vec![400, 400], vec![0.0; 160_000])])
        .add("ones", Dtype::F16, &[("w", vec![400, 400], vec![1.0; 160_000])]);
    let recipe = json!({"method": "task_arithmetic", "base": "base", "models": ["ones"],
        "sparsify": {"kind": "dare", "drop_rate": 0.5, "rescale": "l1"}});
    let values = models.merge(recipe).unwrap().values("w");
    assert!(values.iter().all(|v| *v == 0.0 || (*v - 2.0).abs() < 0.02));
}

#[test]
fn ties_keeps_every_element_that_equals_the_threshold() {
    let models = Models::new();
    models
        .vector("base", &[0.0; 4])
        .vector("a", &[0.5, 0.5, 0.5, 0.1])
        .vector("b", &[0.0; 4]);
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.25});
    assert_eq!(models.merge(recipe).unwrap().values("w"), [0.5, 0.5, 0.5, 0.0]);
}

#[test]
fn integers_are_copied_if_all_agree() {
    let models = Models::new();
    let with_ids = |name: &str, id: u8| {
        let ids = [id, 0, 0, 0];
        let ones = 1.0f32.to_le_bytes();
        let views = [
            ("ids", TensorView::new(Dtype::I32, vec![1], &ids).unwrap()),
            ("w", TensorView::new(Dtype::F32, vec![1], &ones).unwrap()),
        ];
        models.add_raw(name, json!({}), &safetensors::serialize(views, None).unwrap());
    };
    with_ids("a", 3);
    with_ids("b", 3);
    with_ids("c", 4);
    let merged = models
        .merge(json!({"method": "average", "models": ["a", "b"]}))
        .unwrap();
    assert_eq!(merged.bytes("ids"), [3, 0, 0, 0]);
    let refused = models.merge(json!({"method": "average", "models": ["a", "c"]}));
    assert_eq!(refused.err().unwrap().slug(), "integer-tensor-differs");
}

#[test]
fn excluded_tensors_stay_the_bases() {
    let models = Models::new();
    three(&models, Dtype::BF16);
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "exclude": ["^big$"]});
    let merged = models.merge(recipe).unwrap();
    let base = Checkpoint::open(&models.path().join("base")).unwrap();
    assert_eq!(merged.bytes("big"), read_bytes(&base, "big"));
    assert_ne!(merged.bytes("one"), read_bytes(&base, "one"));
    assert_eq!(merged.seen, merged.total);
}

#[test]
fn a_lora_adapter_is_folded_in_while_reading() {
    let models = Models::new();
    models
        .add("base", Dtype::BF16, &[("w.weight", vec![2, 3], vec![1.0; 6])])
        .lora(
            "lora",
            &[(
                "w",
                (vec![1, 3], vec![1.0, 2.0, 3.0]),
                (vec![2, 1], vec![0.5, -0.5]),
            )],
            2.0,
        );
    let recipe = json!({"method": "average", "models": ["base+lora"], "dtype": "float32"});
    assert_eq!(
        models.merge(recipe).unwrap().values("w.weight"),
        [2.0, 3.0, 4.0, 0.0, -1.0, -2.0]
    );
    let half = json!({"method": "task_arithmetic", "base": "base", "models": ["base+lora"], "scaling": 0.5});
    assert_eq!(
        models.merge(half).unwrap().values("w.weight"),
        [1.5, 2.0, 2.5, 0.5, 0.0, -0.5]
    );
}

#[test]
fn a_cancelled_merge_stops() {
    let models = Models::new();
    three(&models, Dtype::BF16);
    let counter = Counter {
        cancel_at: Some(1),
        ..Counter::default()
    };
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"]});
    let stopped = models.merge_with(recipe, &MergeOptions::default(), &counter);
    assert_eq!(stopped.err().unwrap().slug(), "cancelled");
}

#[test]
fn squares_beyond_f32_do_not_break_the_statistics() {
    let models = Models::new();
    let mut huge = vec![0.5f32; 40];
    huge[7] = 1e30;
    models.vector("base", &huge);
    huge[7] = 2e30;
    models.vector("a", &huge);
    models.vector("b", &[0.25; 40]);
    for which in [json!(["a"]), json!(["a", "b"]), json!(["a", "b", "a"])] {
        let recipe = json!({"method": "task_arithmetic", "base": "base", "models": which, "scaling": 0.5});
        let merged = models.merge(recipe).unwrap();
        let read = cauldron_merge::read_manifest(merged.dir.path()).unwrap();
        assert_eq!(read, merged.manifest);
        assert!(read.tensors[0].base_norm > 9e29, "{:?}", read.tensors[0]);
    }
}

#[test]
fn a_threshold_over_many_small_tensors_is_exact() {
    let models = Models::new();
    let names: Vec<String> = (0..4096).map(|i| format!("t{i:04}")).collect();
    for (seed, model) in [(1u32, "base"), (2, "a"), (3, "b")] {
        let tensors: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, name)| (name.as_str(), vec![512], noise(seed * 5000 + i as u32, 512)))
            .collect();
        models.add(model, Dtype::BF16, &tensors);
    }
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.1});
    let merged = models.merge(recipe).unwrap();
    for kept in &merged.manifest.summary.kept {
        assert!(*kept > 0.05 && *kept <= 0.1 + 1e-3, "{kept}");
    }
}

#[test]
fn numbers_that_make_no_sense_for_some_tensor_are_refused() {
    let models = Models::new();
    for (seed, name) in ["base", "a", "b"].into_iter().enumerate() {
        let layers: Vec<String> = (0..11).map(|layer| format!("model.layers.{layer}.w")).collect();
        let tensors: Vec<_> = layers
            .iter()
            .map(|layer| (layer.as_str(), vec![2, 8], noise(seed as u32, 16)))
            .collect();
        models.add(name, Dtype::F32, &tensors);
    }
    let with = |sparsify: Value| json!({"method": "task_arithmetic", "base": "base", "models": ["a", "b"], "sparsify": sparsify});
    for (recipe, field) in [
        // 0.95 + 0.15 in the second layer.
        (
            with(json!({"kind": "della", "retain": [1.0, 0.5], "epsilon": 0.15})),
            "sparsify.epsilon",
        ),
        (with(json!({"kind": "dare", "retain": 1e-20})), "sparsify.retain"),
        (json!({"method": "slerp", "models": ["a", "b"], "t": 1e308}), "t"),
    ] {
        assert_eq!(
            models.merge(recipe.clone()).err().unwrap().field(),
            field,
            "{recipe}"
        );
    }
}

#[test]
fn what_nobody_changed_stays_the_bases() {
    let models = Models::new();
    for name in ["base", "a", "b", "c"] {
        models.vector(name, &[0.5, -0.25, 1.0]);
    }
    let recipe = json!({"method": "multislerp", "base": "base", "models": ["a", "b", "c"]});
    assert_eq!(models.merge(recipe).unwrap().values("w"), [0.5, -0.25, 1.0]);
}

#[test]
fn models_that_are_no_relatives_are_warned_of_whatever_the_method() {
    let models = Models::new();
    let base = noise(1, 4000);
    let near: Vec<f32> = base.iter().map(|v| v * 1.01).collect();
    models
        .vector("base", &base)
        .vector("near", &near)
        .vector("far", &noise(9, 4000));
    for recipe in [
        json!({"method": "average", "models": ["base", "far"]}),
        json!({"method": "slerp", "models": ["near", "far"], "t": 0.5}),
        json!({"method": "ties", "base": "base", "models": ["near", "far"], "retain": 0.01}),
        json!({"method": "average", "base": "base", "models": ["near", "far"],
            "sparsify": {"kind": "dare", "drop_rate": 0.9}}),
    ] {
        let warnings = models.merge(recipe.clone()).unwrap().manifest.warnings;
        assert_eq!(warnings.len(), 1, "{recipe}: {warnings:?}");
        assert!(
            warnings[0].starts_with("models[1]: ") && warnings[0].contains("cosine"),
            "{warnings:?}"
        );
    }
}

#[test]
fn rows_that_no_thread_can_hold_are_refused_by_methods_by_row() {
    let models = Models::new();
    for name in ["base", "a", "b"] {
        models.add(
            name,
            Dtype::BF16,
            &[("experts", vec![2, (4 << 20) + 1], vec![0.5; (8 << 20) + 2])],
        );
    }
    let della = json!({"kind": "della", "retain": 0.5});
    for recipe in [
        json!({"method": "nuslerp", "models": ["a", "b"], "granularity": "row"}),
        json!({"method": "model_stock", "base": "base", "models": ["a", "b"], "granularity": "row"}),
        json!({"method": "ties", "base": "base", "models": ["a", "b"], "sparsify": della}),
    ] {
        assert_eq!(
            models.merge(recipe.clone()).err().unwrap().field(),
            "method",
            "{recipe}"
        );
    }
}
