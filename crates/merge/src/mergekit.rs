//! mergekit's YAML configurations (schema of 0.1.5) as recipes. What a configuration says that a recipe cannot is refused by
//! name, never ignored.
//!
//! Source: mergekit 0.1.5, `config.py`, `parameter_resolver.py`, and the signatures in `merge_methods/`.

use serde_json::{Map, Value, json};

use crate::RecipeError;
use crate::json::Fields;
use crate::setting::{Setting, layer_range};
use crate::spec::{ModelEntry, RecipeSpec, SliceSource, SliceSpec, SparsifySpec, WeightedModel};

const MAX_BYTES: usize = 1 << 20;
const FIELDS: &[&str] = &[
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
];

const DTYPES: &[&str] = &["bfloat16", "float16", "float32"];
/// Parameters that are true or false; all others are numbers.
const SWITCHES: &[&str] = &[
    "normalize",
    "rescale",
    "int8_mask",
    "nuslerp_row_wise",
    "nuslerp_flatten",
    "normalize_weights",
    "filter_wise",
];

/// How a method's parameters are called: name, scope, and what a recipe calls it.
struct Known {
    method: &'static str,
    /// Of each input.
    own: &'static [&'static str],
    /// Of the whole.
    shared: &'static [&'static str],
    weight_required: bool,
}

const METHODS: &[Known] = &[
    known("linear", &["weight"], &["normalize"], true),
    known("task_arithmetic", &["weight", "density"], GENERALIZED, true),
    known("ties", &["weight", "density"], GENERALIZED, true),
    known("dare_linear", &["weight", "density"], GENERALIZED, true),
    known("dare_ties", &["weight", "density"], GENERALIZED, true),
    known("breadcrumbs", &["weight", "density", "gamma"], GENERALIZED, true),
    known(
        "breadcrumbs_ties",
        &["weight", "density", "gamma"],
        GENERALIZED,
        true,
    ),
    known("della", &["weight", "density", "epsilon"], GENERALIZED, true),
    known(
        "della_linear",
        &["weight", "density", "epsilon"],
        GENERALIZED,
        true,
    ),
    known("slerp", &[], &["t"], false),
    known(
        "nuslerp",
        &["weight"],
        &["nuslerp_row_wise", "nuslerp_flatten"],
        true,
    ),
    known("multislerp", &["weight"], &["normalize_weights"], true),
    known("karcher", &[], &["max_iter", "tol"], false),
    known("model_stock", &[], &["filter_wise"], false),
    known("sce", &[], &["select_topk", "int8_mask"], false),
    known("nearswap", &[], &["t"], false),
    known("arcee_fusion", &[], &[], false),
    known("passthrough", &["scale"], &[], false),
];
const GENERALIZED: &[&str] = &["normalize", "rescale", "lambda", "int8_mask"];

const fn known(
    method: &'static str,
    own: &'static [&'static str],
    shared: &'static [&'static str],
    weight_required: bool,
) -> Known {
    Known {
        method,
        own,
        shared,
        weight_required,
    }
}

/// Reads a configuration. Model names are model references of this service, not paths.
pub fn parse_mergekit(text: &[u8]) -> Result<RecipeSpec, RecipeError> {
    if text.len() > MAX_BYTES {
        return Err(RecipeError::new("", "a configuration has at most 1 MiB"));
    }
    let text = std::str::from_utf8(text).map_err(|e| RecipeError::new("", e.to_string()))?;
    let value: Value = serde_saphyr::from_str(text).map_err(|e| RecipeError::new("", e.to_string()))?;
    let mut fields = Fields::new("", value)?;
    let name = fields.string("merge_method")?;
    let base = fields
        .take("base_model")
        .map(|v| reference("base_model", v))
        .transpose()?;
    let models = fields.array("models")?;
    let slices = fields.array("slices")?;
    let shared = fields.take("parameters");
    let (dtype, out_dtype) = (fields.string("dtype")?, fields.string("out_dtype")?);
    let source = fields.take("tokenizer_source");
    let tokenizer = fields.take("tokenizer");
    fields.finish(FIELDS)?;
    let name = name.ok_or_else(|| RecipeError::new("merge_method", "is required"))?;
    let known = METHODS.iter().find(|known| known.method == name).ok_or_else(|| {
        let names: Vec<&str> = METHODS.iter().map(|known| known.method).collect();
        RecipeError::new(
            "merge_method",
            format!("is not supported; known are {}", names.join(", ")),
        )
    })?;
    let shared = Parameters::read("parameters", shared, known)?;
    let inputs = match (models, slices) {
        (Some(models), None) => Inputs::whole(models, known)?,
        (None, Some(slices)) => Inputs::sliced(slices, known)?,
        _ => return Err(RecipeError::new("models", "give either models or slices")),
    };
    let mut spec = RecipeSpec {
        method: name,
        ..RecipeSpec::default()
    };
    if let Some(unknown) = [&dtype, &out_dtype]
        .into_iter()
        .flatten()
        .find(|name| !DTYPES.contains(&name.as_str()))
    {
        return Err(RecipeError::new(
            "dtype",
            format!("{unknown} is none of {}", DTYPES.join(", ")),
        ));
    }
    spec.dtype = out_dtype.or(dtype);
    inputs.fill(&mut spec, base, &shared, known)?;
    fill_method(&mut spec, &shared, known)?;
    fill_tokenizer(&mut spec, source, tokenizer)?;
    Ok(spec)
}

fn reference(field: &str, value: Value) -> Result<String, RecipeError> {
    match value {
        Value::String(text) => Ok(text),
        _ => Err(RecipeError::new(field, "must be a model reference")),
    }
}

/// The settings of one scope, by mergekit's names.
#[derive(Debug, Clone, Default)]
struct Parameters(Vec<(String, Parameter)>);

#[derive(Debug, Clone)]
enum Parameter {
    Number(Setting),
    Switch(bool),
}

impl Parameters {
    fn read(field: &str, value: Option<Value>, known: &Known) -> Result<Self, RecipeError> {
        let Some(value) = value else {
            return Ok(Self::default());
        };
        let Value::Object(entries) = value else {
            return Err(RecipeError::new(field, "must be a mapping"));
        };
        let mut read = Vec::new();
        for (key, value) in entries {
            let field = format!("{field}.{key}");
            if !known.own.contains(&key.as_str()) && !known.shared.contains(&key.as_str()) {
                return Err(RecipeError::new(
                    field,
                    format!("is no parameter of {}", known.method),
                ));
            }
            let parameter = match value {
                Value::Null => continue,
                Value::Bool(on) if SWITCHES.contains(&key.as_str()) => Parameter::Switch(on),
                Value::Bool(_) => return Err(RecipeError::new(field, "must be a number")),
                value => {
                    rules_of(&field, &value)?;
                    Parameter::Number(Setting::read(&field, numbers(value))?)
                }
            };
            read.push((key, parameter));
        }
        Ok(Self(read))
    }

    fn setting(&self, key: &str) -> Option<Setting> {
        self.0.iter().find_map(|(name, parameter)| match parameter {
            Parameter::Number(setting) if name == key => Some(setting.clone()),
            _ => None,
        })
    }

    /// Switches hold for the whole model; elsewhere they would be left out of account.
    fn no_switches(&self, field: &str) -> Result<(), RecipeError> {
        match self
            .0
            .iter()
            .find(|(_, parameter)| matches!(parameter, Parameter::Switch(_)))
        {
            None => Ok(()),
            Some((key, _)) => {
                let detail = "is supported for the whole model only, under the top-level parameters";
                Err(RecipeError::new(format!("{field}.{key}"), detail))
            }
        }
    }

    fn switch(&self, key: &str, default: bool) -> Result<bool, RecipeError> {
        match self.0.iter().find(|(name, _)| name == key) {
            None => Ok(default),
            Some((_, Parameter::Switch(on))) => Ok(*on),
            Some(_) => Err(RecipeError::new(
                format!("parameters.{key}"),
                "must be true or false",
            )),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, RecipeError> {
        match self.setting(key) {
            None => Ok(None),
            Some(setting) => setting
                .as_constant()
                .map(Some)
                .ok_or_else(|| RecipeError::new(format!("parameters.{key}"), "must be one number")),
        }
    }
}

/// A rule has a filter and a value here, and nothing else.
fn rules_of(field: &str, value: &Value) -> Result<(), RecipeError> {
    let known = |key: &&String| !["filter", "value"].contains(&key.as_str());
    match value {
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items
                .filter(|(_, item)| item.is_object())
                .try_for_each(|(index, item)| rules_of(&format!("{field}[{index}]"), item))
        }
        Value::Object(entries) => match entries.keys().find(known) {
            None => Ok(()),
            Some(key) => Err(RecipeError::new(format!("{field}.{key}"), "is no part of a rule")),
        },
        _ => Ok(()),
    }
}

/// YAML 1.1 writers leave `1e-5` as text; mergekit reads it as a number.
fn numbers(value: Value) -> Value {
    match value {
        Value::String(text) => match text.parse::<f64>() {
            Ok(number) if number.is_finite() => json!(number),
            _ => Value::String(text),
        },
        Value::Array(items) => items.into_iter().map(numbers).collect(),
        Value::Object(entries) => {
            let entries = entries.into_iter().map(|(key, value)| match key.as_str() {
                "value" => (key, numbers(value)),
                _ => (key, value),
            });
            Value::Object(entries.collect::<Map<_, _>>())
        }
        other => other,
    }
}

/// The inputs in the order they come, each with its settings from the most special to the most general.
struct Inputs {
    models: Vec<(String, Vec<Parameters>)>,
    slices: Vec<SliceSpec>,
    /// Settings of slices as a whole.
    shared: Vec<Parameters>,
}

impl Inputs {
    fn whole(models: Vec<Value>, known: &Known) -> Result<Self, RecipeError> {
        let mut inputs = Self {
            models: Vec::new(),
            slices: Vec::new(),
            shared: Vec::new(),
        };
        for (index, value) in models.into_iter().enumerate() {
            let field = format!("models[{index}]");
            let mut fields = Fields::new(&field, value)?;
            let (model, parameters) = (fields.take("model"), fields.take("parameters"));
            fields.finish(&["model", "parameters"])?;
            let model = model.ok_or_else(|| RecipeError::new(format!("{field}.model"), "is required"))?;
            let parameters = Parameters::read(&format!("{field}.parameters"), parameters, known)?;
            parameters.no_switches(&format!("{field}.parameters"))?;
            inputs
                .models
                .push((reference(&format!("{field}.model"), model)?, vec![parameters]));
        }
        Ok(inputs)
    }

    fn sliced(slices: Vec<Value>, known: &Known) -> Result<Self, RecipeError> {
        let mut inputs = Self {
            models: Vec::new(),
            slices: Vec::new(),
            shared: Vec::new(),
        };
        for (index, value) in slices.into_iter().enumerate() {
            let field = format!("slices[{index}]");
            let mut fields = Fields::new(&field, value)?;
            let (sources, parameters) = (fields.array("sources")?, fields.take("parameters"));
            fields.finish(&["sources", "parameters"])?;
            let sources =
                sources.ok_or_else(|| RecipeError::new(format!("{field}.sources"), "is required"))?;
            let of_slice = Parameters::read(&format!("{field}.parameters"), parameters, known)?;
            of_slice.no_switches(&format!("{field}.parameters"))?;
            let of_slice = of_slice.in_slice(index);
            let mut listed = Vec::new();
            for (k, value) in sources.into_iter().enumerate() {
                let field = format!("{field}.sources[{k}]");
                let mut fields = Fields::new(&field, value)?;
                let (model, range) = (fields.take("model"), fields.take("layer_range"));
                let own = fields.take("parameters");
                fields.finish(&["model", "layer_range", "parameters"])?;
                let missing = |key: &str| RecipeError::new(format!("{field}.{key}"), "is required");
                let model = reference(&format!("{field}.model"), model.ok_or_else(|| missing("model"))?)?;
                let range = range.ok_or_else(|| missing("layer_range"))?;
                let (from, to) = layer_range(&format!("{field}.layer_range"), &range)?;
                let own = Parameters::read(&format!("{field}.parameters"), own, known)?;
                own.no_switches(&format!("{field}.parameters"))?;
                let own = own.in_slice(index);
                let at = match inputs.models.iter().position(|(name, _)| *name == model) {
                    Some(at) => at,
                    None => {
                        inputs.models.push((model.clone(), Vec::new()));
                        inputs.models.len() - 1
                    }
                };
                inputs.models[at].1.extend([own, of_slice.clone()]);
                listed.push(SliceSource {
                    model,
                    layers: [from as u64, to as u64],
                });
            }
            if inputs
                .slices
                .first()
                .is_some_and(|first: &SliceSpec| first.sources.len() < listed.len())
            {
                let detail = "has more sources than the first slice: mergekit leaves the others out of the last norm and the \
                              head; say what is meant as a JSON recipe";
                return Err(RecipeError::new(format!("{field}.sources"), detail));
            }
            inputs.slices.push(SliceSpec { sources: listed });
            inputs.shared.push(of_slice);
        }
        Ok(inputs)
    }

    /// Deals the inputs to base and models as the method understands them.
    fn fill(
        self,
        spec: &mut RecipeSpec,
        base: Option<String>,
        shared: &Parameters,
        known: &Known,
    ) -> Result<(), RecipeError> {
        let mut models = self.models;
        let at_base = base
            .as_ref()
            .and_then(|base| models.iter().position(|(name, _)| name == base));
        match known.method {
            // Methods to which the base is a model like any other; config and tokenizer are those of the first.
            "linear" | "karcher" => {
                if let Some(base) = &base {
                    let first = match at_base {
                        Some(at) => models.remove(at),
                        None => (base.clone(), Vec::new()),
                    };
                    models.insert(0, first);
                }
            }
            "passthrough" => {
                if base.is_some() && at_base != Some(0) {
                    let detail =
                        "gives a passthrough its config and tokenizer here only if it is the first model";
                    return Err(RecipeError::new("base_model", detail));
                }
            }
            "slerp" => {
                let base = base
                    .clone()
                    .ok_or_else(|| RecipeError::new("base_model", "is required"))?;
                let first = match at_base {
                    Some(at) => models.remove(at),
                    None => (base, Vec::new()),
                };
                models.insert(0, first);
            }
            _ => {
                if let Some(at) = at_base {
                    models.remove(at);
                }
                spec.base = base;
            }
        }
        for (index, (model, scopes)) in models.into_iter().enumerate() {
            let find = |key: &str| {
                let scopes = scopes
                    .iter()
                    .chain([shared])
                    .filter_map(|scope| scope.setting(key));
                let setting: Option<Setting> = scopes.reduce(Setting::or);
                let refuse = |detail: &str| {
                    Err(RecipeError::new(
                        format!("models[{index}].parameters.{key}"),
                        detail,
                    ))
                };
                match &setting {
                    Some(rules) if rules.is_too_long() => refuse("has too many rules over all slices"),
                    Some(rules) if rules.filters_layers() && !self.slices.is_empty() => {
                        refuse("filters by the number of a layer, which slices change: give it by slice")
                    }
                    _ => Ok(setting),
                }
            };
            let weight = match known.method {
                "passthrough" => find("scale")?,
                _ => find("weight")?,
            };
            if known.weight_required {
                let field = || format!("models[{index}].parameters.weight");
                match &weight {
                    None => return Err(RecipeError::new(field(), "is required")),
                    Some(rules) if !rules.covers(slices_of(&self.slices, &model)) => {
                        return Err(RecipeError::new(field(), "is required for what no filter fits"));
                    }
                    Some(_) => {}
                }
            }
            let sparse = known.method != "task_arithmetic";
            spec.models.push(ModelEntry::Weighted(WeightedModel {
                model,
                weight,
                retain: find("density")?.filter(|_| sparse),
                epsilon: find("epsilon")?,
                gamma: find("gamma")?,
            }));
        }
        let slices = self.slices.len();
        spec.slices = self.slices;
        for key in ["lambda", "t"] {
            let scopes = self
                .shared
                .iter()
                .chain([shared])
                .filter_map(|scope| scope.setting(key));
            let setting: Option<Setting> = scopes.reduce(Setting::or);
            let field = || format!("parameters.{key}");
            match &setting {
                Some(rules) if rules.is_too_long() => {
                    return Err(RecipeError::new(field(), "has too many rules over all slices"));
                }
                Some(rules) if key == "t" && !rules.covers(0..slices.max(1)) => {
                    return Err(RecipeError::new(field(), "is required for what no filter fits"));
                }
                _ => {}
            }
            match key {
                "lambda" => spec.scaling = setting,
                _ => spec.t = setting,
            }
        }
        Ok(())
    }
}

/// The slices that a model takes part in; without slices there is one.
fn slices_of(slices: &[SliceSpec], model: &str) -> Vec<usize> {
    if slices.is_empty() {
        return vec![0];
    }
    let named = |slice: &SliceSpec| slice.sources.iter().any(|source| source.model == model);
    (0..slices.len()).filter(|index| named(&slices[*index])).collect()
}

impl Parameters {
    fn in_slice(self, slice: usize) -> Self {
        let scoped = self.0.into_iter().map(|(name, parameter)| match parameter {
            Parameter::Number(setting) => (name, Parameter::Number(setting.in_slice(slice))),
            switch => (name, switch),
        });
        Self(scoped.collect())
    }
}

/// The rest of a method's parameters.
fn fill_method(spec: &mut RecipeSpec, shared: &Parameters, known: &Known) -> Result<(), RecipeError> {
    let sparsifier = |kind: &str, rescales: bool| -> Result<SparsifySpec, RecipeError> {
        let rescale = match shared.switch("rescale", rescales)? {
            true => json!("l1"),
            false => json!(false),
        };
        Ok(SparsifySpec {
            kind: kind.to_owned(),
            retain: Some(1.0.into()),
            rescale: Some(rescale),
            ..SparsifySpec::default()
        })
    };
    // It changes how mergekit holds masks, not what they are.
    shared.switch("int8_mask", false)?;
    match known.method {
        "linear" => spec.normalize = Some(shared.switch("normalize", true)?),
        "task_arithmetic" => spec.normalize = Some(shared.switch("normalize", false)?),
        "ties" => {
            if shared.switch("rescale", false)? {
                return Err(RecipeError::new(
                    "parameters.rescale",
                    "is not supported for ties",
                ));
            }
            spec.variant = Some("tensor".to_owned());
            spec.retain = Some(1.0.into());
            spec.normalize = Some(shared.switch("normalize", true)?);
        }
        "dare_linear" | "dare_ties" => {
            spec.sparsify = Some(sparsifier("dare", true)?);
            spec.normalize = Some(shared.switch("normalize", false)?);
        }
        "della" | "della_linear" => {
            spec.sparsify = Some(sparsifier("della", true)?);
            spec.normalize = Some(shared.switch("normalize", known.method == "della")?);
        }
        "breadcrumbs" | "breadcrumbs_ties" => {
            spec.sparsify = Some(sparsifier("breadcrumbs", false)?);
            spec.normalize = Some(shared.switch("normalize", false)?);
        }
        "nuslerp" => {
            let granularity = match (
                shared.switch("nuslerp_flatten", true)?,
                shared.switch("nuslerp_row_wise", false)?,
            ) {
                (true, _) => "tensor",
                (false, true) => "column",
                (false, false) => "row",
            };
            spec.granularity = Some(granularity.to_owned());
        }
        "multislerp" => spec.normalize = Some(shared.switch("normalize_weights", true)?),
        "karcher" => {
            spec.max_iter = match shared.number("max_iter")? {
                Some(n) if n < 0.0 || n.fract() != 0.0 => {
                    return Err(RecipeError::new("parameters.max_iter", "must be a whole number"));
                }
                n => n.map(|n| n as u64),
            };
            spec.tolerance = shared.number("tol")?;
        }
        "model_stock" if shared.switch("filter_wise", false)? => spec.granularity = Some("row".to_owned()),
        "sce" => spec.select = shared.number("select_topk")?,
        _ => {}
    }
    Ok(())
}

fn fill_tokenizer(
    spec: &mut RecipeSpec,
    source: Option<Value>,
    tokenizer: Option<Value>,
) -> Result<(), RecipeError> {
    let (field, source) = match (source, tokenizer) {
        (Some(_), Some(_)) => {
            return Err(RecipeError::new(
                "tokenizer",
                "give tokenizer_source or tokenizer, not both",
            ));
        }
        (Some(source), None) => ("tokenizer_source", Some(source)),
        (None, Some(tokenizer)) => {
            let mut fields = Fields::new("tokenizer", tokenizer)?;
            let source = fields.take("source").unwrap_or_else(|| json!("union"));
            spec.pad_to_multiple_of = fields.seed("pad_to_multiple_of")?;
            fields.finish(&["source", "pad_to_multiple_of"])?;
            ("tokenizer.source", Some(source))
        }
        (None, None) => return Ok(()),
    };
    let source = source.map(|source| reference(field, source)).transpose()?;
    match source.as_deref() {
        Some("union") => spec.vocab = Some("union".to_owned()),
        // The base's, or of methods without one the first model's.
        Some("base") => spec.vocab = Some("align".to_owned()),
        Some(model) => {
            spec.vocab = Some("align".to_owned());
            spec.tokenizer = Some(model.to_owned());
        }
        None => {}
    }
    Ok(())
}

#[cfg(test)]
#[path = "mergekit_tests.rs"]
mod tests;
