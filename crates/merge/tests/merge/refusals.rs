//! Bad recipes and bad models are refused with the field that is wrong.

use std::fs;

use cauldron_checkpoint::Dtype;
use cauldron_merge::parse_recipe;
use serde_json::{Value, json};

use crate::fixture::{Models, checked};

fn with(key: &str, value: Value) -> Value {
    let mut recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"]});
    recipe[key] = value;
    recipe
}

#[test]
fn each_bad_value_names_its_field() {
    let cases = [
        (with("method", json!("tise")), "method"),
        (with("method", json!(3)), "method"),
        (with("models", json!([])), "models"),
        (with("models", json!("a")), "models"),
        (with("models", json!(["a", 7])), "models[1]"),
        (with("models", json!(["a", ""])), "models[1]"),
        (with("models", json!(["a+b+c", "b"])), "models[0]"),
        (
            with("models", json!([{"model": "a", "wieght": 1}, "b"])),
            "models[0].wieght",
        ),
        (
            with("models", json!([{"model": "a", "weight": "1"}, "b"])),
            "models[0].weight",
        ),
        (
            with("models", json!([{"model": "a", "weight": 0}, "b"])),
            "models[0].weight",
        ),
        (with("base", Value::Null), "base"),
        (with("retain", json!(0)), "retain"),
        (with("retain", json!(1.01)), "retain"),
        (
            with("sparsify", json!({"kind": "dare", "drop_rate": 1.0})),
            "sparsify.drop_rate",
        ),
        (
            with("sparsify", json!({"kind": "dare", "drop_rate": -0.1})),
            "sparsify.drop_rate",
        ),
        (with("sparsify", json!({"kind": "dare"})), "sparsify.drop_rate"),
        (
            with("sparsify", json!({"kind": "dareish", "drop_rate": 0.1})),
            "sparsify.kind",
        ),
        (
            with(
                "sparsify",
                json!({"kind": "magnitude", "drop_rate": 0.1, "seed": 1}),
            ),
            "sparsify.seed",
        ),
        (
            with(
                "sparsify",
                json!({"kind": "dare", "drop_rate": 0.1, "rescale": "l2"}),
            ),
            "sparsify.rescale",
        ),
        (
            with("sparsify", json!({"kind": "dare", "drop_rate": 0.1, "seed": -1})),
            "sparsify.seed",
        ),
        (with("mixup", json!({"alpha": 0})), "mixup.alpha"),
        (with("mixup", json!({"lambda": 1.5})), "mixup.lambda"),
        (with("mixup", json!({"lambda": -0.1})), "mixup.lambda"),
        (with("mixup", json!({"alpha": 1, "lambda": 0.5})), "mixup.lambda"),
        (
            with("mixup", json!({"alpha": 1, "seed": 1, "lambda": 0.5})),
            "mixup.lambda",
        ),
        (with("mixup", json!({"seed": 1})), "mixup.seed"),
        (with("mixup", json!({})), "mixup"),
        (with("mixup", json!({"lamda": 0.5})), "mixup.lamda"),
        (with("dtype", json!("int8")), "dtype"),
        (with("exclude", json!(["("])), "exclude[0]"),
        (with("exclude", json!("w")), "exclude"),
        (with("vocab", json!("onion")), "vocab"),
        (with("tokenizer", json!("elsewhere")), "tokenizer"),
        (with("scaling", json!("1")), "scaling"),
        (with("modles", json!(1)), "modles"),
        (
            json!({"method": "average", "models": ["a", "b"], "scaling": 1.0}),
            "scaling",
        ),
        (
            json!({"method": "average", "models": [{"model": "a", "weight": 1}, {"model": "b", "weight": -1}]}),
            "models",
        ),
        (
            json!({"method": "average", "models": ["a"], "mixup": {"lambda": 0.5}}),
            "models",
        ),
        (
            json!({"method": "average", "models": ["a", {"model": "b", "weight": 2}], "mixup": {"lambda": 0.5}}),
            "models[1].weight",
        ),
        (
            json!({"method": "average", "models": ["a"], "exclude": ["x"]}),
            "base",
        ),
        (json!({"models": ["a"]}), "method"),
        (json!([1]), ""),
    ];
    for (recipe, field) in cases {
        let refused = checked(recipe.clone()).err();
        assert_eq!(refused.map(|e| e.field).as_deref(), Some(field), "{recipe}");
    }
}

#[test]
fn duplicate_keys_and_numbers_out_of_range_are_found_where_they_are() {
    let cases: [(&str, &str); 5] = [
        (r#"{"method":"average","method":"ties","models":["a"]}"#, "method"),
        (
            r#"{"method":"average","models":[{"model":"a","weight":1,"weight":2}]}"#,
            "models[0].weight",
        ),
        (r#"{"method":"ties","scaling":1e999}"#, "scaling"),
        (r#"{"method":"#, "method"),
        (r#"{"method":"average"} x"#, ""),
    ];
    for (body, field) in cases {
        assert_eq!(
            parse_recipe(body.as_bytes()).err().unwrap().field,
            field,
            "{body}"
        );
    }
    let deep = "[".repeat(100_000);
    assert!(parse_recipe(deep.as_bytes()).is_err());
}

#[test]
fn models_that_do_not_fit_are_refused_from_their_headers() {
    let models = Models::new();
    let embed = "model.embed_tokens.weight";
    models
        .add(
            "a",
            Dtype::F32,
            &[(embed, vec![4, 2], vec![0.0; 8]), ("w", vec![2], vec![0.0; 2])],
        )
        .add(
            "vocab",
            Dtype::F32,
            &[(embed, vec![5, 2], vec![0.0; 10]), ("w", vec![2], vec![0.0; 2])],
        )
        .add(
            "shape",
            Dtype::F32,
            &[(embed, vec![4, 2], vec![0.0; 8]), ("w", vec![3], vec![0.0; 3])],
        )
        .add(
            "extra",
            Dtype::F32,
            &[
                (embed, vec![4, 2], vec![0.0; 8]),
                ("w", vec![2], vec![0.0; 2]),
                ("x", vec![1], vec![0.0]),
            ],
        )
        .add("less", Dtype::F32, &[(embed, vec![4, 2], vec![0.0; 8])])
        .add_with_config(
            "arch",
            json!({"model_type": "qwen2"}),
            Dtype::F32,
            &[(embed, vec![4, 2], vec![0.0; 8]), ("w", vec![2], vec![0.0; 2])],
        );
    let cases = [
        ("vocab", "[5, 2]"),
        ("shape", "[3]"),
        ("extra", "x"),
        ("less", "lacks tensor w"),
        ("arch", "model_type"),
        ("nowhere", "no model"),
    ];
    for (model, says) in cases {
        let refused = models
            .merge(json!({"method": "average", "models": ["a", model]}))
            .err()
            .unwrap();
        assert_eq!(refused.field(), "models[1]", "{model}");
        assert!(format!("{refused:?}").contains(says), "{model}: {refused:?}");
    }
}

#[test]
fn an_adapter_for_another_base_is_refused() {
    let models = Models::new();
    models
        .add("base", Dtype::F32, &[("w.weight", vec![2, 2], vec![0.0; 4])])
        .lora(
            "lora",
            &[("w", (vec![1, 3], vec![1.0; 3]), (vec![2, 1], vec![1.0; 2]))],
            1.0,
        );
    let refused = models
        .merge(json!({"method": "average", "models": ["base+lora"]}))
        .err()
        .unwrap();
    assert_eq!(refused.field(), "models[0]");
    assert!(format!("{refused:?}").contains("adapter"), "{refused:?}");
}

#[test]
fn dora_is_not_taken_for_lora() {
    let models = Models::new();
    models
        .add("base", Dtype::F32, &[("w.weight", vec![2, 3], vec![0.0; 6])])
        .lora(
            "lora",
            &[("w", (vec![1, 3], vec![1.0; 3]), (vec![2, 1], vec![1.0; 2]))],
            1.0,
        );
    let config = json!({"peft_type": "LORA", "lora_alpha": 1, "r": 1, "use_dora": true});
    fs::write(models.path().join("lora/adapter_config.json"), config.to_string()).unwrap();
    let refused = models.merge(json!({"method": "average", "models": ["base+lora"]}));
    assert!(format!("{:?}", refused.err().unwrap()).contains("use_dora"));
}
