//! A recipe as canonical JSON: every default written out, fields in one order. What decides the bytes is in it, and
//! nothing else.

use cauldron_checkpoint::Dtype;
use serde_json::{Map, Value, json};

use super::check::has_weights;
use super::{Amount, Drops, Method, Mixup, Model, ModelRef, Recipe, Rescale, Shares, Sparsify, Trim, Vocab};

impl Recipe {
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
        out.insert("method".into(), json!(self.method.name()));
        if let Some(base) = &self.base {
            out.insert("base".into(), json!(name(base)));
        }
        let models = self.models.iter().map(|model| self.model_json(model, name));
        out.insert("models".into(), models.collect());
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        match (&self.method, &self.mixup) {
            // t is 1 - lambda.
            (Method::Slerp { .. }, Some(_)) => {}
            _ => method_json(&self.method, &mut put),
        }
        if let Some(sparsify) = &self.sparsify {
            put("sparsify", sparsify_json(sparsify));
        }
        if let Some(mixup) = &self.mixup {
            put("mixup", mixup_json(mixup));
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
        put("vocab", json!(self.vocab.name()));
        if let Some(multiple) = self.pad_to_multiple_of.filter(|_| self.vocab != Vocab::Strict) {
            put("pad_to_multiple_of", json!(multiple));
        }
        if !self.slices.is_empty() {
            put("slices", self.slices_json(name));
        }
        out
    }

    fn model_json(&self, model: &Model, name: &dyn Fn(&ModelRef) -> String) -> Value {
        let mut json = Map::from_iter([("model".to_owned(), json!(name(&model.reference)))]);
        if self.mixup.is_none() && has_weights(self.method.name()) {
            json.insert("weight".into(), model.weight.to_json());
        }
        let own = [
            ("retain", &model.retain),
            ("epsilon", &model.epsilon),
            ("gamma", &model.gamma),
        ];
        for (key, setting) in own {
            if let Some(setting) = setting {
                json.insert(key.into(), setting.to_json());
            }
        }
        match json.len() {
            1 => json!(name(&model.reference)),
            _ => Value::Object(json),
        }
    }

    fn slices_json(&self, name: &dyn Fn(&ModelRef) -> String) -> Value {
        let slices = self.slices.iter().map(|slice| {
            let sources = slice.sources.iter().filter_map(|(model, from)| {
                let reference = match model {
                    Some(index) => &self.models[*index].reference,
                    None => self.base.as_ref()?,
                };
                Some(json!({"model": name(reference), "layers": [from, from + slice.layers]}))
            });
            json!({"sources": sources.collect::<Value>()})
        });
        slices.collect()
    }
}

fn method_json(method: &Method, put: &mut dyn FnMut(&str, Value) -> Option<Value>) {
    match method {
        Method::Average { normalize } => {
            // The default is not written, as it was not in version 1 of the format.
            if !normalize {
                put("normalize", json!(false));
            }
        }
        Method::TaskArithmetic { scaling, normalize } => {
            put("scaling", scaling.to_json());
            if *normalize {
                put("normalize", json!(true));
            }
        }
        Method::Ties {
            scaling,
            trim,
            normalize,
        } => {
            put("scaling", scaling.to_json());
            match trim {
                Trim::Global { retain } => {
                    put("retain", json!(retain));
                }
                Trim::Tensor { retain } => {
                    put("variant", json!("tensor"));
                    put("retain", retain.to_json());
                    put("normalize", json!(normalize));
                }
            }
        }
        Method::Slerp { t } | Method::NearSwap { t } => {
            put("t", t.to_json());
        }
        Method::NuSlerp { granularity } | Method::ModelStock { granularity } => {
            put("granularity", json!(granularity.name()));
        }
        Method::MultiSlerp { normalize } => {
            put("normalize", json!(normalize));
        }
        Method::Karcher { max_iter, tolerance } => {
            put("max_iter", json!(max_iter));
            put("tolerance", json!(tolerance));
        }
        Method::Sce { select } => {
            put("select", json!(select));
        }
        Method::ArceeFusion | Method::Passthrough => {}
    }
}

fn sparsify_json(sparsify: &Sparsify) -> Value {
    let mut out = Map::from_iter([("kind".to_owned(), json!(sparsify.drops.name()))]);
    let (key, amount) = match &sparsify.amount {
        Amount::Drop(rate) => ("drop_rate", rate),
        Amount::Retain(share) => ("retain", share),
    };
    out.insert(key.into(), amount.to_json());
    let rescale = match sparsify.rescale {
        Rescale::Expectation => json!(true),
        Rescale::Off => json!(false),
        Rescale::L1 => json!("l1"),
    };
    out.insert("rescale".into(), rescale);
    match sparsify.drops {
        Drops::Della => out.insert("epsilon".into(), sparsify.epsilon.to_json()),
        Drops::Breadcrumbs => out.insert("gamma".into(), sparsify.gamma.to_json()),
        Drops::Dare | Drops::Magnitude => None,
    };
    if sparsify.drops.is_random() {
        out.insert("seed".into(), json!(sparsify.seed));
    }
    Value::Object(out)
}

fn mixup_json(mixup: &Mixup) -> Value {
    let mut out = Map::new();
    if let Some((alpha, seed)) = mixup.drawn {
        out.insert("alpha".into(), json!(alpha));
        out.insert("seed".into(), json!(seed));
    }
    match &mixup.shares {
        Shares::Lambda(lambda) => out.insert("lambda".into(), lambda.to_json()),
        Shares::Each(shares) => out.insert("shares".into(), json!(shares)),
    };
    Value::Object(out)
}

/// The config.json name of a float dtype.
pub(crate) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}
