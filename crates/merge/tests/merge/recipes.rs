//! Recipes: what the resolved form says, and that it is the same recipe when read again.

use cauldron_merge::{Recipe, draw_lambda, parse_recipe};
use serde_json::{Value, json};

use crate::fixture::checked;

#[test]
fn a_draw_is_recorded_and_can_be_read_again() {
    let recipe =
        checked(json!({"method": "average", "models": ["a", "b"], "mixup": {"alpha": 0.5, "seed": 42}}))
            .unwrap();
    assert_eq!(recipe.lambda(), draw_lambda(0.5, 42));
    let resolved = recipe.to_json();
    assert_eq!(
        resolved["mixup"],
        json!({"alpha": 0.5, "seed": 42, "lambda": recipe.lambda()})
    );
    let again = Recipe::from_json(resolved).unwrap();
    assert_eq!(again.canonical(), recipe.canonical());
}

#[test]
fn alpha_without_a_seed_is_a_new_draw_each_time() {
    let spec = parse_recipe(br#"{"method":"average","models":["a","b"],"mixup":{"alpha":1}}"#).unwrap();
    let mut next = 0;
    let mut draw = || {
        next += 1;
        next
    };
    let first = Recipe::from_spec(&spec, &mut draw).unwrap();
    let second = Recipe::from_spec(&spec, &mut draw).unwrap();
    assert_ne!(first.lambda(), second.lambda());
    assert_ne!(first.canonical(), second.canonical());
}

#[test]
fn the_name_it_is_served_under_is_not_part_of_a_recipe() {
    let plain = checked(json!({"method": "average", "models": ["a", "b"]})).unwrap();
    let named =
        checked(json!({"serve_as": "x", "models": ["a", {"model": "b", "weight": 1}], "method": "average"}))
            .unwrap();
    assert_eq!(plain.canonical(), named.canonical());
    assert_eq!(named.serve_as(), Some("x"));
    assert_eq!(named.to_json()["serve_as"], json!("x"));
}

#[test]
fn defaults_are_written_out() {
    let recipe = checked(json!({"method": "ties", "base": "b0", "models": ["a", "b"],
        "sparsify": {"kind": "dare", "drop_rate": 0.2}}))
    .unwrap();
    let json = recipe.to_json();
    assert_eq!(json["scaling"], json!(1.0));
    assert_eq!(json["retain"], json!(0.5));
    assert_eq!(
        json["sparsify"],
        json!({"kind": "dare", "drop_rate": 0.2, "rescale": true, "seed": 0})
    );
}

/// One recipe of each method and option, all valid.
pub fn of_every_kind() -> Vec<Value> {
    let two = json!(["a", "b"]);
    let deltas = |method: &str, more: Value| {
        let mut recipe = json!({"method": method, "base": "base", "models": two});
        recipe
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        recipe
    };
    let mut recipes = vec![
        json!({"method": "average", "models": two}),
        json!({"method": "linear", "models": [{"model": "a", "weight": 0.7}, {"model": "b", "weight": [0.1, 0.9]}], "normalize": false}),
        json!({"method": "average", "models": ["a", "b", "c"], "mixup": {"alpha": 0.5, "seed": 3}}),
        json!({"method": "average", "models": ["a", "b", "c"], "mixup": {"shares": [0.2, 0.3, 0.5]}}),
        json!({"method": "average", "models": two, "mixup": {"lambda": [0.0, 1.0]}}),
        json!({"method": "slerp", "models": two, "t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.4}]}),
        json!({"method": "slerp", "models": two, "mixup": {"lambda": 0.3}}),
        json!({"method": "karcher", "models": ["a", "b", "c"], "max_iter": 5}),
        json!({"method": "multislerp", "models": ["a", "b", "c"]}),
        json!({"method": "nearswap", "base": "base", "models": ["a"], "t": 0.01}),
        json!({"method": "arcee_fusion", "base": "base", "models": ["a"]}),
        json!({"method": "passthrough", "models": [{"model": "a", "weight": 0.5}]}),
        deltas(
            "task_arithmetic",
            json!({"scaling": [0.5, 1.0], "normalize": true}),
        ),
        deltas("ties", json!({"retain": 0.3, "scaling": 0.5})),
        deltas(
            "ties",
            json!({"variant": "tensor", "retain": [0.3, 0.9], "normalize": false}),
        ),
        deltas("ties", json!({"variant": "tensor", "mixup": {"lambda": 0.3}})),
        deltas("sce", json!({"select": 0.4})),
        deltas("model_stock", json!({"granularity": "row"})),
        deltas("nuslerp", json!({"granularity": "column"})),
        deltas("nuslerp", json!({"granularity": "row"})),
        deltas("multislerp", json!({})),
        deltas(
            "breadcrumbs",
            json!({"sparsify": {"kind": "breadcrumbs", "retain": 0.6, "gamma": 0.1}}),
        ),
        deltas(
            "breadcrumbs_ties",
            json!({"sparsify": {"kind": "breadcrumbs", "drop_rate": 0.4, "rescale": "l1"}}),
        ),
        deltas(
            "della",
            json!({"sparsify": {"kind": "della", "drop_rate": 0.3, "window": 0.2, "seed": 5}}),
        ),
        deltas(
            "della_linear",
            json!({"sparsify": {"kind": "della", "retain": 0.6, "epsilon": 0.1, "rescale": "l1"}}),
        ),
        deltas(
            "dare_ties",
            json!({"sparsify": {"kind": "dare", "drop_rate": 0.3}}),
        ),
    ];
    for kind in ["dare", "magnitude", "della", "breadcrumbs"] {
        let sparsify = json!({"kind": kind, "retain": 0.6});
        recipes.push(deltas(
            "average",
            json!({"sparsify": sparsify, "mixup": {"lambda": 0.25}}),
        ));
        recipes.push(deltas("slerp", json!({"sparsify": sparsify, "t": 0.4})));
        recipes
            .push(json!({"method": "arcee_fusion", "base": "base", "models": ["a"], "sparsify": sparsify}));
    }
    recipes
}

#[test]
fn a_resolved_recipe_reads_back_as_itself_whatever_the_method() {
    for recipe in of_every_kind() {
        let resolved = checked(recipe.clone()).unwrap_or_else(|e| panic!("{recipe}: {e}"));
        let again = cauldron_merge::Recipe::from_json(resolved.to_json());
        let again = again.unwrap_or_else(|e| panic!("{}: {e}", resolved.to_json()));
        assert_eq!(again.to_json(), resolved.to_json());
    }
}
