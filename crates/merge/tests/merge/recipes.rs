//! Recipes: what the resolved form says, and that it is the same recipe when read again.

use cauldron_merge::{Recipe, draw_lambda, parse_recipe};
use serde_json::json;

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
