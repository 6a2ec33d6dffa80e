//! A recipe that has been checked: methods, ranges and references make sense, lambda is known, and from here
//! on the result is determined by it and the parents' bytes.

use std::fmt;

use cauldron_checkpoint::Dtype;
use regex::RegexSet;
use serde_json::{Map, Value, json};

use crate::mixup::draw_lambda;
use crate::spec::{MixupSpec, ModelEntry, RecipeSpec, SparsifySpec};
use crate::{RecipeError, recipe_from_value};

/// Most parents of one merge.
pub const MAX_MODELS: usize = 16;
const MAX_REFERENCE_CHARS: usize = 256;
const MAX_EXCLUDES: usize = 64;
const MAX_PATTERN_CHARS: usize = 512;
const REGEX_BYTES: usize = 1 << 20;
const DEFAULT_RETAIN: f64 = 0.5;
const METHODS: &str = "average, task_arithmetic, ties";

/// A model reference `source[+adapter]`; what the parts mean is the resolver's business.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModelRef {
    pub source: String,
    pub adapter: Option<String>,
}

impl ModelRef {
    /// Splits a reference; `field` names it in errors.
    pub fn parse(field: &str, text: &str) -> Result<Self, RecipeError> {
        let bad = |detail: &str| Err(RecipeError::new(field, detail));
        if text.chars().count() > MAX_REFERENCE_CHARS || text.chars().any(char::is_control) {
            return bad("a model reference has at most 256 printable characters");
        }
        let mut parts = text.split('+');
        let source = parts.next().unwrap_or_default().to_owned();
        let adapter = parts.next().map(str::to_owned);
        if parts.next().is_some() {
            return bad("a model reference has at most one +adapter");
        }
        if source.is_empty() || adapter.as_deref() == Some("") {
            return bad("a model reference is a name, or name+adapter");
        }
        Ok(Self { source, adapter })
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)?;
        match &self.adapter {
            Some(adapter) => write!(f, "+{adapter}"),
            None => Ok(()),
        }
    }
}

/// How deltas become one. Formulas: docs/METHODS.md.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    Average,
    TaskArithmetic { scaling: f64 },
    Ties { scaling: f64, retain: f64 },
}

impl Method {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Average => "average",
            Self::TaskArithmetic { .. } => "task_arithmetic",
            Self::Ties { .. } => "ties",
        }
    }
}

/// How DARE treats the survivors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rescale {
    /// Divided by 1 - drop_rate (the paper).
    Expectation,
    /// Left as they are.
    Off,
    /// Scaled to the tensor's L1 norm before the drop (mergekit).
    L1,
}

/// What is dropped from each parent's delta before the method.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsify {
    Dare {
        drop_rate: f64,
        rescale: Rescale,
        seed: u64,
    },
    Magnitude {
        drop_rate: f64,
    },
}

/// The contribution ratio, and where it came from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixup {
    pub lambda: f64,
    /// (alpha, seed) of the draw; None if lambda was given.
    pub drawn: Option<(f64, u64)>,
}

/// A checked recipe.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub(crate) method: Method,
    pub(crate) base: Option<ModelRef>,
    pub(crate) models: Vec<(ModelRef, f64)>,
    pub(crate) sparsify: Option<Sparsify>,
    pub(crate) mixup: Option<Mixup>,
    pub(crate) dtype: Option<Dtype>,
    pub(crate) exclude: Vec<String>,
    pub(crate) excluded: RegexSet,
    /// None: the base's, or without a base the first model's.
    pub(crate) tokenizer: Option<ModelRef>,
    serve_as: Option<String>,
}

impl Recipe {
    /// Checks everything that can be checked without the models. `draw_seed` gives a fresh seed where the
    /// recipe asks for a draw without naming one.
    pub fn from_spec(spec: &RecipeSpec, draw_seed: &mut dyn FnMut() -> u64) -> Result<Self, RecipeError> {
        let base = spec
            .base
            .as_deref()
            .map(|b| ModelRef::parse("base", b))
            .transpose()?;
        let mixup = spec
            .mixup
            .as_ref()
            .map(|m| resolve_mixup(m, draw_seed))
            .transpose()?;
        let method = resolve_method(spec)?;
        let models = resolve_models(spec, &method, mixup.is_some())?;
        let sparsify = spec.sparsify.as_ref().map(resolve_sparsify).transpose()?;
        let excluded = compile_excludes(&spec.exclude)?;
        if base.is_none() {
            let needs = match (&method, &sparsify, spec.exclude.is_empty()) {
                (Method::Average, None, true) => None,
                (Method::Average, None, false) => {
                    Some("exclude keeps tensors of the base, so a base is needed".to_owned())
                }
                (Method::Average, Some(_), _) => Some("sparsify acts on deltas from a base".to_owned()),
                (method, ..) => Some(format!("{} needs a base", method.name())),
            };
            if let Some(detail) = needs {
                return Err(RecipeError::new("base", detail));
            }
        }
        if let Some(vocab) = spec.vocab.as_deref().filter(|v| *v != "strict") {
            let detail = format!("{vocab:?} is not supported; strict is");
            return Err(RecipeError::new("vocab", detail));
        }
        Ok(Self {
            method,
            sparsify,
            mixup,
            dtype: resolve_dtype(spec.dtype.as_deref())?,
            exclude: spec.exclude.clone(),
            excluded,
            tokenizer: resolve_tokenizer(spec.tokenizer.as_deref(), base.as_ref(), &models)?,
            base,
            models,
            serve_as: spec.serve_as.clone(),
        })
    }

    /// Reads back what [`Recipe::to_json`] wrote.
    pub fn from_json(value: Value) -> Result<Self, RecipeError> {
        Self::from_spec(&recipe_from_value(value)?, &mut || 0)
    }

    pub fn method(&self) -> &Method {
        &self.method
    }

    pub fn lambda(&self) -> Option<f64> {
        self.mixup.map(|m| m.lambda)
    }

    pub fn serve_as(&self) -> Option<&str> {
        self.serve_as.as_deref()
    }

    /// All references of the recipe with the field that names each.
    pub fn references(&self) -> impl Iterator<Item = (String, &ModelRef)> {
        let models = self.models.iter().enumerate();
        self.base
            .iter()
            .map(|base| ("base".to_owned(), base))
            .chain(models.map(|(i, (model, _))| (format!("models[{i}]"), model)))
    }

    /// The weights of the parents in the order of the recipe: lambda and 1 - lambda with mixup. f64 values
    /// are rounded to f32 once, here.
    pub fn weights(&self) -> Vec<f32> {
        match self.mixup {
            Some(mixup) => vec![mixup.lambda as f32, (1.0 - mixup.lambda) as f32],
            None => self.models.iter().map(|(_, weight)| *weight as f32).collect(),
        }
    }

    /// The resolved recipe with every default written out; reading it again gives the same recipe.
    pub fn to_json(&self) -> Value {
        let mut json = self.shape_json(&|reference| reference.to_string());
        if let Some(name) = &self.serve_as {
            json.insert("serve_as".into(), json!(name));
        }
        Value::Object(json)
    }

    /// Canonical JSON of all that decides the bytes, with `name` standing for each reference.
    pub(crate) fn canonical_with(&self, name: &dyn Fn(&ModelRef) -> String) -> String {
        Value::Object(self.shape_json(name)).to_string()
    }

    /// Canonical JSON of all that decides the bytes, references as they were given.
    pub fn canonical(&self) -> String {
        self.canonical_with(&|reference| reference.to_string())
    }

    fn shape_json(&self, name: &dyn Fn(&ModelRef) -> String) -> Map<String, Value> {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        put("method", json!(self.method.name()));
        if let Some(base) = &self.base {
            put("base", json!(name(base)));
        }
        let models = self.models.iter().map(|(model, weight)| match self.mixup {
            Some(_) => json!(name(model)),
            None => json!({"model": name(model), "weight": weight}),
        });
        put("models", models.collect());
        match self.method {
            Method::Average => {}
            Method::TaskArithmetic { scaling } => {
                put("scaling", json!(scaling));
            }
            Method::Ties { scaling, retain } => {
                put("scaling", json!(scaling));
                put("retain", json!(retain));
            }
        }
        if let Some(sparsify) = &self.sparsify {
            put("sparsify", sparsify_json(sparsify));
        }
        if let Some(mixup) = &self.mixup {
            let json = match mixup.drawn {
                Some((alpha, seed)) => json!({"alpha": alpha, "seed": seed, "lambda": mixup.lambda}),
                None => json!({"lambda": mixup.lambda}),
            };
            put("mixup", json);
        }
        if let Some(dtype) = self.dtype {
            put("dtype", json!(dtype_name(dtype)));
        }
        if !self.exclude.is_empty() {
            put("exclude", json!(self.exclude));
        }
        if let Some(tokenizer) = &self.tokenizer {
            put("tokenizer", json!(name(tokenizer)));
        }
        put("vocab", json!("strict"));
        out
    }
}

fn sparsify_json(sparsify: &Sparsify) -> Value {
    match *sparsify {
        Sparsify::Magnitude { drop_rate } => json!({"kind": "magnitude", "drop_rate": drop_rate}),
        Sparsify::Dare {
            drop_rate,
            rescale,
            seed,
        } => {
            let rescale = match rescale {
                Rescale::Expectation => json!(true),
                Rescale::Off => json!(false),
                Rescale::L1 => json!("l1"),
            };
            json!({"kind": "dare", "drop_rate": drop_rate, "rescale": rescale, "seed": seed})
        }
    }
}

/// The config.json name of a float dtype.
pub(crate) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

fn resolve_dtype(dtype: Option<&str>) -> Result<Option<Dtype>, RecipeError> {
    match dtype {
        None => Ok(None),
        Some("bfloat16") => Ok(Some(Dtype::BF16)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some("float32") => Ok(Some(Dtype::F32)),
        Some(_) => Err(RecipeError::new("dtype", "must be bfloat16, float16 or float32")),
    }
}

fn resolve_method(spec: &RecipeSpec) -> Result<Method, RecipeError> {
    let scaling = spec.scaling.unwrap_or(1.0);
    if !scaling.is_finite() || (scaling as f32).is_infinite() {
        return Err(RecipeError::new("scaling", "must be a finite number"));
    }
    if spec.retain.is_some() && spec.method != "ties" {
        return Err(RecipeError::new("retain", "is a field of ties only"));
    }
    match spec.method.as_str() {
        "average" if spec.scaling.is_some() => Err(RecipeError::new(
            "scaling",
            "average has no scaling; use task_arithmetic",
        )),
        "average" => Ok(Method::Average),
        "task_arithmetic" => Ok(Method::TaskArithmetic { scaling }),
        "ties" => {
            let retain = spec.retain.unwrap_or(DEFAULT_RETAIN);
            match retain > 0.0 && retain <= 1.0 {
                true => Ok(Method::Ties { scaling, retain }),
                false => Err(RecipeError::new("retain", "must be above 0 and at most 1")),
            }
        }
        other => {
            let shown: String = other.chars().take(60).collect();
            Err(RecipeError::new(
                "method",
                format!("{shown:?} is not supported; known are {METHODS}"),
            ))
        }
    }
}

fn resolve_models(
    spec: &RecipeSpec,
    method: &Method,
    mixed: bool,
) -> Result<Vec<(ModelRef, f64)>, RecipeError> {
    let count = spec.models.len();
    if count == 0 || count > MAX_MODELS {
        return Err(RecipeError::new(
            "models",
            format!("must name 1 to {MAX_MODELS} models"),
        ));
    }
    if mixed && count != 2 {
        return Err(RecipeError::new(
            "models",
            "mixup takes exactly two models: lambda and 1 - lambda",
        ));
    }
    let mut models = Vec::with_capacity(count);
    for (index, entry) in spec.models.iter().enumerate() {
        let field = format!("models[{index}]");
        let (reference, weight) = match entry {
            ModelEntry::Reference(reference) => (reference, None),
            ModelEntry::Weighted(w) => (&w.model, w.weight),
        };
        if mixed && weight.is_some() {
            let detail = "weights and mixup exclude each other: lambda is the weight";
            return Err(RecipeError::new(format!("{field}.weight"), detail));
        }
        let weight = weight.unwrap_or(1.0);
        if !(weight as f32).is_finite() {
            return Err(RecipeError::new(
                format!("{field}.weight"),
                "must be a finite number",
            ));
        }
        models.push((ModelRef::parse(&field, reference)?, weight));
    }
    let sum: f64 = models.iter().map(|(_, weight)| weight).sum();
    // Average and TIES divide by sums of weights.
    if !mixed && matches!(method, Method::Average) && sum as f32 == 0.0 {
        return Err(RecipeError::new("models", "the weights sum to 0"));
    }
    if !mixed && matches!(method, Method::Ties { .. }) && models.iter().any(|(_, w)| *w <= 0.0) {
        let index = models.iter().position(|(_, w)| *w <= 0.0).unwrap_or_default();
        let detail = "ties takes a mean over the parents that agree: weights must be above 0";
        return Err(RecipeError::new(format!("models[{index}].weight"), detail));
    }
    Ok(models)
}

fn resolve_mixup(spec: &MixupSpec, draw_seed: &mut dyn FnMut() -> u64) -> Result<Mixup, RecipeError> {
    if let Some(lambda) = spec.lambda
        && !(0.0..=1.0).contains(&lambda)
    {
        return Err(RecipeError::new("mixup.lambda", "must be from 0 to 1"));
    }
    let Some(alpha) = spec.alpha else {
        if spec.seed.is_some() {
            return Err(RecipeError::new("mixup.seed", "is the seed of alpha's draw"));
        }
        let lambda = spec
            .lambda
            .ok_or_else(|| RecipeError::new("mixup", "give alpha (with or without a seed) or lambda"))?;
        return Ok(Mixup { lambda, drawn: None });
    };
    // 2^53: so that a seed survives clients whose numbers are f64.
    let seed = spec.seed.unwrap_or_else(|| draw_seed() & ((1 << 53) - 1));
    let lambda = draw_lambda(alpha, seed)
        .ok_or_else(|| RecipeError::new("mixup.alpha", "must be a finite number above 0"))?;
    if spec.lambda.is_some_and(|given| given != lambda) {
        let detail = format!("alpha and seed draw {lambda}; give one or the other");
        return Err(RecipeError::new("mixup.lambda", detail));
    }
    if spec.lambda.is_some() && spec.seed.is_none() {
        return Err(RecipeError::new("mixup.lambda", "give alpha or lambda, not both"));
    }
    Ok(Mixup {
        lambda,
        drawn: Some((alpha, seed)),
    })
}

fn resolve_sparsify(spec: &SparsifySpec) -> Result<Sparsify, RecipeError> {
    let drop_rate = spec.drop_rate;
    if !(0.0..1.0).contains(&drop_rate) {
        return Err(RecipeError::new(
            "sparsify.drop_rate",
            "must be at least 0 and below 1",
        ));
    }
    match spec.kind.as_str() {
        "dare" => {
            let rescale = match &spec.rescale {
                None | Some(Value::Bool(true)) => Rescale::Expectation,
                Some(Value::Bool(false)) => Rescale::Off,
                Some(Value::String(s)) if s == "l1" => Rescale::L1,
                Some(_) => {
                    return Err(RecipeError::new(
                        "sparsify.rescale",
                        "must be true, false or \"l1\"",
                    ));
                }
            };
            let seed = spec.seed.unwrap_or(0);
            Ok(Sparsify::Dare {
                drop_rate,
                rescale,
                seed,
            })
        }
        "magnitude" => match (&spec.rescale, spec.seed) {
            (Some(_), _) => Err(RecipeError::new("sparsify.rescale", "is a field of dare only")),
            (_, Some(_)) => Err(RecipeError::new("sparsify.seed", "is a field of dare only")),
            _ => Ok(Sparsify::Magnitude { drop_rate }),
        },
        other => {
            let shown: String = other.chars().take(60).collect();
            let detail = format!("{shown:?} is not supported; known are dare, magnitude");
            Err(RecipeError::new("sparsify.kind", detail))
        }
    }
}

fn compile_excludes(patterns: &[String]) -> Result<RegexSet, RecipeError> {
    if patterns.len() > MAX_EXCLUDES {
        return Err(RecipeError::new(
            "exclude",
            format!("at most {MAX_EXCLUDES} patterns"),
        ));
    }
    for (index, pattern) in patterns.iter().enumerate() {
        let bad = |detail: String| RecipeError::new(format!("exclude[{index}]"), detail);
        if pattern.is_empty() || pattern.chars().count() > MAX_PATTERN_CHARS {
            return Err(bad(format!("a pattern has 1 to {MAX_PATTERN_CHARS} characters")));
        }
        regex::RegexBuilder::new(pattern)
            .size_limit(REGEX_BYTES)
            .build()
            .map_err(|e| bad(e.to_string()))?;
    }
    regex::RegexSetBuilder::new(patterns)
        .size_limit(4 * REGEX_BYTES)
        .build()
        .map_err(|e| RecipeError::new("exclude", e.to_string()))
}

fn resolve_tokenizer(
    spec: Option<&str>,
    base: Option<&ModelRef>,
    models: &[(ModelRef, f64)],
) -> Result<Option<ModelRef>, RecipeError> {
    let Some(text) = spec else { return Ok(None) };
    if text == "base" {
        // The word, not a folder of that name: the recipe's base, whatever it is called.
        return match base {
            Some(base) => Ok(Some(base.clone())),
            None if models.iter().any(|(m, _)| m.to_string() == "base") => {
                ModelRef::parse("tokenizer", text).map(Some)
            }
            None => Err(RecipeError::new("tokenizer", "the recipe has no base")),
        };
    }
    let reference = ModelRef::parse("tokenizer", text)?;
    if base == Some(&reference) || models.iter().any(|(m, _)| *m == reference) {
        return Ok(Some(reference));
    }
    Err(RecipeError::new(
        "tokenizer",
        "must be base or one of the recipe's models",
    ))
}
