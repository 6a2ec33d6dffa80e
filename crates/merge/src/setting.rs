//! A parameter of a recipe that may differ by tensor: a number, a gradient over the layers, or rules with filters.
//!
//! The semantics of gradients and filters are those of mergekit 0.1.5 (`mergekit/config.py`, `evaluate_setting`).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::RecipeError;
use crate::json::Fields;

const MAX_RULES: usize = 256;
const MAX_GRADIENT: usize = 1024;
const MAX_FILTER_CHARS: usize = 256;

/// Where a tensor of the result stands in its model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place<'a> {
    pub name: &'a str,
    /// Index of its decoder layer; None for embeddings, the last norm and the head.
    pub layer: Option<usize>,
    /// Which slice of a sliced recipe it belongs to; 0 without slices.
    pub slice: usize,
    /// Position of its layer in the slice, from 0 to 1; 0 for tensors outside the layers.
    pub t: f64,
}

/// A number for every tensor. The first rule that fits a tensor says which.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting(Vec<Rule>);

#[derive(Debug, Clone, PartialEq)]
struct Rule {
    /// Part of the tensor's name.
    filter: Option<String>,
    /// First layer, and the first after the last. Tensors outside the layers do not fit.
    layers: Option<(usize, usize)>,
    slice: Option<usize>,
    /// One number, or a gradient: numbers at equal distances over the layers.
    values: Vec<f64>,
}

impl Setting {
    pub fn constant(value: f64) -> Self {
        Self::gradient(vec![value])
    }

    /// Numbers at equal distances over the layers; at least one.
    pub fn gradient(values: Vec<f64>) -> Self {
        Self(vec![Rule {
            filter: None,
            layers: None,
            slice: None,
            values,
        }])
    }

    /// The number if it is the same for every tensor.
    pub fn as_constant(&self) -> Option<f64> {
        match self.0.as_slice() {
            [rule] if rule.filter.is_none() && rule.layers.is_none() && rule.slice.is_none() => {
                match rule.values.as_slice() {
                    [value] => Some(*value),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// The number of a tensor; None where no rule fits.
    pub fn at(&self, place: &Place<'_>) -> Option<f64> {
        self.0
            .iter()
            .find(|rule| rule.fits(place))
            .map(|rule| rule.at(place.t))
    }

    /// Every number that is written down: a range that holds for these holds for all tensors.
    pub fn numbers(&self) -> impl Iterator<Item = f64> {
        self.0.iter().flat_map(|rule| rule.values.iter().copied())
    }

    /// Whether some rule fits every tensor of each of these slices.
    pub(crate) fn covers(&self, slices: impl IntoIterator<Item = usize>) -> bool {
        let open = |slice: usize| {
            let fits = |rule: &Rule| {
                let anywhere = rule.filter.is_none() && rule.layers.is_none();
                anywhere && rule.slice.is_none_or(|of| of == slice)
            };
            self.0.iter().any(fits)
        };
        slices.into_iter().all(open)
    }

    /// Whether a rule looks at the number of a layer in a tensor's name.
    pub(crate) fn filters_layers(&self) -> bool {
        let filters = self.0.iter().filter_map(|rule| rule.filter.as_deref());
        filters.into_iter().any(|filter| {
            let after = filter.split_once("layers.").map(|(_, after)| after);
            after.is_some_and(|after| after.starts_with(|c: char| c.is_ascii_digit()))
        })
    }

    /// Whether it has more rules than can be written down.
    pub(crate) fn is_too_long(&self) -> bool {
        self.0.len() > MAX_RULES
    }

    /// These rules, then the others.
    pub fn or(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// The same rules for one slice of a sliced recipe only.
    pub fn in_slice(mut self, slice: usize) -> Self {
        self.0.iter_mut().for_each(|rule| rule.slice = Some(slice));
        self
    }

    /// Reads a number, an array of numbers, a rule `{filter, layers, slice, value}`, or an array of rules.
    pub fn read(field: &str, value: Value) -> Result<Self, RecipeError> {
        let rules = match value {
            Value::Array(items) if items.iter().any(Value::is_object) => {
                if items.len() > MAX_RULES {
                    return Err(RecipeError::new(
                        field,
                        format!("has more than {MAX_RULES} rules"),
                    ));
                }
                let rules = items.into_iter().enumerate();
                rules
                    .map(|(i, rule)| Rule::read(&format!("{field}[{i}]"), rule))
                    .collect::<Result<_, _>>()?
            }
            rule @ Value::Object(_) => vec![Rule::read(field, rule)?],
            values => vec![Rule {
                filter: None,
                layers: None,
                slice: None,
                values: gradient(field, values)?,
            }],
        };
        Ok(Self(rules))
    }

    /// As [`Self::read`] takes it, in its shortest form.
    pub fn to_json(&self) -> Value {
        match self.0.as_slice() {
            [rule] if rule.filter.is_none() && rule.layers.is_none() && rule.slice.is_none() => rule.value(),
            rules => rules.iter().map(Rule::to_json).collect(),
        }
    }
}

impl Rule {
    fn read(field: &str, value: Value) -> Result<Self, RecipeError> {
        let mut fields = Fields::new(field, value)?;
        let filter = fields.string("filter")?.filter(|f| f != "*");
        let layers = fields.take("layers");
        let slice = fields.seed("slice")?;
        let value = fields.take("value");
        fields.finish(&["filter", "layers", "slice", "value"])?;
        let value_field = format!("{field}.value");
        let value = value.ok_or_else(|| RecipeError::new(&value_field, "is required"))?;
        if filter
            .as_ref()
            .is_some_and(|f| f.is_empty() || f.len() > MAX_FILTER_CHARS)
        {
            let detail = format!("must have 1 to {MAX_FILTER_CHARS} characters");
            return Err(RecipeError::new(format!("{field}.filter"), detail));
        }
        Ok(Self {
            filter,
            layers: layers
                .map(|range| layer_range(&format!("{field}.layers"), &range))
                .transpose()?,
            slice: slice.map(|s| s as usize),
            values: gradient(&value_field, value)?,
        })
    }

    fn fits(&self, place: &Place<'_>) -> bool {
        let named = self
            .filter
            .as_ref()
            .is_none_or(|part| place.name.contains(part.as_str()));
        let sliced = self.slice.is_none_or(|slice| slice == place.slice);
        let layered = match (self.layers, place.layer) {
            (None, _) => true,
            (Some((from, to)), Some(layer)) => (from..to).contains(&layer),
            (Some(_), None) => false,
        };
        named && sliced && layered
    }

    fn at(&self, t: f64) -> f64 {
        let last = self.values.len() - 1;
        let scaled = t * last as f64;
        let low = (scaled as usize).min(last);
        let high = (low + 1).min(last);
        let share = scaled - low as f64;
        match share == 0.0 {
            true => self.values[low],
            false => (1.0 - share) * self.values[low] + share * self.values[high],
        }
    }

    fn value(&self) -> Value {
        match self.values.as_slice() {
            [value] => json!(value),
            values => json!(values),
        }
    }

    fn to_json(&self) -> Value {
        let mut out = Map::new();
        if let Some(filter) = &self.filter {
            out.insert("filter".into(), json!(filter));
        }
        if let Some((from, to)) = self.layers {
            out.insert("layers".into(), json!([from, to]));
        }
        if let Some(slice) = self.slice {
            out.insert("slice".into(), json!(slice));
        }
        out.insert("value".into(), self.value());
        Value::Object(out)
    }
}

/// A range of layers `[from, to]`, the last one excluded.
pub(crate) fn layer_range(field: &str, value: &Value) -> Result<(usize, usize), RecipeError> {
    let ends: Option<Vec<usize>> = value
        .as_array()
        .and_then(|ends| ends.iter().map(|end| end.as_u64().map(|e| e as usize)).collect());
    match ends.as_deref() {
        Some(&[from, to]) if from < to => Ok((from, to)),
        _ => Err(RecipeError::new(
            field,
            "must be [first layer, layer after the last], and not empty",
        )),
    }
}

fn gradient(field: &str, value: Value) -> Result<Vec<f64>, RecipeError> {
    let bad = || {
        RecipeError::new(
            field,
            "must be a finite number, an array of numbers, or rules {filter, layers, value}",
        )
    };
    let finite = |v: &Value| v.as_f64().filter(|v| v.is_finite()).ok_or_else(bad);
    match value {
        Value::Array(items) if !items.is_empty() && items.len() <= MAX_GRADIENT => {
            items.iter().map(finite).collect()
        }
        Value::Array(_) => Err(bad()),
        number => Ok(vec![finite(&number)?]),
    }
}

impl From<f64> for Setting {
    fn from(value: f64) -> Self {
        Self::constant(value)
    }
}

impl Serialize for Setting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Setting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::read("value", value).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str, layer: Option<usize>, t: f64) -> Place<'_> {
        Place {
            name,
            layer,
            slice: 0,
            t,
        }
    }

    fn read(value: Value) -> Setting {
        Setting::read("x", value).unwrap()
    }

    #[test]
    fn numbers_gradients_and_rules_are_resolved_as_mergekit_does() {
        let number = read(json!(0.25));
        assert_eq!(number.at(&place("w", None, 0.0)), Some(0.25));
        let gradient = read(json!([0.0, 1.0, 0.5]));
        for (t, expected) in [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 0.5)] {
            assert_eq!(gradient.at(&place("w", Some(1), t)), Some(expected));
        }
        let rules = read(
            json!([{"filter": "self_attn", "value": [0, 1]}, {"layers": [2, 4], "value": 3}, {"filter": "*", "value": 7}]),
        );
        assert_eq!(
            rules.at(&place("model.layers.1.self_attn.q_proj.weight", Some(1), 0.5)),
            Some(0.5)
        );
        assert_eq!(
            rules.at(&place("model.layers.3.mlp.up_proj.weight", Some(3), 0.9)),
            Some(3.0)
        );
        assert_eq!(rules.at(&place("lm_head.weight", None, 0.0)), Some(7.0));
        let partial = read(json!({"filter": "mlp", "value": 1}));
        assert_eq!(partial.at(&place("lm_head.weight", None, 0.0)), None);
    }

    #[test]
    fn what_is_read_is_written_again() {
        for value in [
            json!(0.5),
            json!([0.0, 1.0]),
            json!([{"filter": "mlp", "layers": [0, 2], "value": [1.0, 2.0]}, {"value": 0.5}]),
        ] {
            assert_eq!(read(value.clone()).to_json(), value);
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_field() {
        for (value, field) in [
            (json!("a"), "x"),
            (json!([]), "x"),
            (json!([1, "a"]), "x"),
            (json!([{"value": 1, "fliter": "mlp"}]), "x[0].fliter"),
            (json!([{"filter": "mlp"}]), "x[0].value"),
            (json!([{"layers": [3, 3], "value": 1}]), "x[0].layers"),
            (json!({"filter": "", "value": 1}), "x.filter"),
        ] {
            assert_eq!(
                Setting::read("x", value.clone()).unwrap_err().field,
                field,
                "{value}"
            );
        }
    }
}
