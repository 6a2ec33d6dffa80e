use super::*;
use crate::Recipe;

fn recipe(yaml: &str) -> Value {
    let spec = parse_mergekit(yaml.as_bytes()).unwrap();
    Recipe::from_spec(&spec, &mut || 0).unwrap().to_json()
}

#[test]
fn a_configuration_becomes_the_recipe_that_says_the_same() {
    let found = recipe(
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: base\n  - model: a\n    parameters: {density: [1, 0.5], weight: 0.5}\n  - model: b\n    parameters:\n      weight:\n        - filter: mlp\n          value: 0.5\n        - value: 0\nparameters: {density: 0.7, normalize: true, int8_mask: true, lambda: 0.9}\ndtype: float32\nout_dtype: bfloat16\n",
    );
    assert_eq!(
        found,
        json!({"method": "ties", "base": "base", "models": [
            {"model": "a", "weight": 0.5, "retain": [{"value": [1.0, 0.5]}, {"value": 0.7}]},
            {"model": "b", "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0.0}], "retain": 0.7}],
            "scaling": 0.9, "variant": "tensor", "retain": 1.0, "normalize": true, "dtype": "bfloat16", "vocab": "strict"})
    );
}

#[test]
fn slices_keep_their_own_parameters() {
    let found = recipe(
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources:\n    - model: b\n      layer_range: [1, 3]\n      parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}\n",
    );
    assert_eq!(
        found["slices"][1]["sources"],
        json!([{"model": "b", "layers": [1, 3]}])
    );
    assert_eq!(
        found["models"][1]["weight"],
        json!([{"filter": "o_proj", "slice": 1, "value": 0.5}, {"slice": 1, "value": 1.0}])
    );
}

#[test]
fn the_base_gives_config_and_tokenizer_where_it_is_a_model_like_any_other() {
    let found = recipe(
        "merge_method: linear\nbase_model: b\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 2}}\ntokenizer_source: a\n",
    );
    assert_eq!(found["models"][0], json!({"model": "b", "weight": 2.0}));
    assert_eq!(
        (&found["vocab"], &found["tokenizer"]),
        (&json!("align"), &json!("a"))
    );
}

#[test]
fn what_is_unknown_is_refused_by_name() {
    let cases = [
        ("merge_method: magic\nmodels: []\n", "merge_method"),
        ("merge_method: linear\nmodels: []\nslices: []\n", "models"),
        ("merge_method: linear\nmodles: []\n", "modles"),
        (
            "merge_method: linear\nmodels: [{model: a}]\n",
            "models[0].parameters.weight",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]\n",
            "models[0].parameters.wieght",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: yes please}\n",
            "parameters.t",
        ),
        (
            "merge_method: ties\nmodels: []\nchat_template: chatml\n",
            "chat_template",
        ),
        (
            "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {lambda: no}\n",
            "parameters.lambda",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: mlp, value: 1}]}}]\n",
            "models[0].parameters.weight",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{layers: [0, 1], value: 1}]}}]\n",
            "models[0].parameters.weight[0].layers",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [{filter: mlp, value: 1}]}\n",
            "parameters.t",
        ),
        (
            "merge_method: karcher\nmodels: [{model: a}]\nparameters: {max_iter: 2.5}\n",
            "parameters.max_iter",
        ),
        (
            "merge_method: karcher\nmodels: [{model: a}]\ndtype: nonsense\nout_dtype: bfloat16\n",
            "dtype",
        ),
        (
            "merge_method: passthrough\nbase_model: b\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
            "base_model",
        ),
        (
            "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [8, 9], parameters: {scale: [{filter: layers.8., value: 0}]}}]\n",
            "models[0].parameters.scale",
        ),
        ("- a\n- b\n", ""),
        ("a: &x [*x]", ""),
    ];
    for (yaml, field) in cases {
        assert_eq!(
            parse_mergekit(yaml.as_bytes()).unwrap_err().field,
            field,
            "{yaml}"
        );
    }
}
