//! Strict JSON: a reader that refuses duplicate keys and says where an error is, and typed access to objects
//! that names the field.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::RecipeError;
use crate::setting::Setting;

/// Parses one JSON value; a key that comes twice is an error, as is anything after the value.
pub(crate) fn parse_strict(body: &[u8]) -> Result<Value, RecipeError> {
    let path = RefCell::new(Vec::new());
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = Strict { path: &path }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    parsed.map_err(|e| RecipeError::new(render(&path.borrow()), e.to_string()))
}

enum Step {
    Key(String),
    Index(usize),
}

fn render(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Key(key) if text.is_empty() => text.push_str(key),
            Step::Key(key) => text.push_str(&format!(".{key}")),
            Step::Index(index) => text.push_str(&format!("[{index}]")),
        }
    }
    text.chars().take(200).collect()
}

/// Builds a `Value`, leaving `path` at the place where an error happened.
struct Strict<'a> {
    path: &'a RefCell<Vec<Step>>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v)
            .map(Value::Number)
            .ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        loop {
            self.path.borrow_mut().push(Step::Index(items.len()));
            let next = seq.next_element_seed(Strict { path: self.path })?;
            self.path.borrow_mut().pop();
            match next {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.path.borrow_mut().push(Step::Key(key.clone()));
            if entries.contains_key(&key) {
                return Err(A::Error::custom("the key is given twice"));
            }
            let value = map.next_value_seed(Strict { path: self.path })?;
            self.path.borrow_mut().pop();
            entries.insert(key, value);
        }
        Ok(Value::Object(entries))
    }
}

/// Reads an object field by field; what is left at the end is unknown and refused. Null counts as absent.
pub(crate) struct Fields {
    prefix: String,
    entries: Map<String, Value>,
}

impl Fields {
    pub fn new(field: &str, value: Value) -> Result<Self, RecipeError> {
        match value {
            Value::Object(entries) => Ok(Self {
                prefix: field.to_owned(),
                entries,
            }),
            _ => Err(RecipeError::new(field, "must be a JSON object")),
        }
    }

    pub fn path(&self, key: &str) -> String {
        match self.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}.{key}"),
        }
    }

    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.entries.shift_remove(key).filter(|v| !v.is_null())
    }

    fn typed<T>(
        &mut self,
        key: &str,
        what: &str,
        get: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, RecipeError> {
        let field = self.path(key);
        self.take(key)
            .map(|value| get(&value).ok_or_else(|| RecipeError::new(field, format!("must be {what}"))))
            .transpose()
    }

    pub fn string(&mut self, key: &str) -> Result<Option<String>, RecipeError> {
        self.typed(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub fn number(&mut self, key: &str) -> Result<Option<f64>, RecipeError> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn boolean(&mut self, key: &str) -> Result<Option<bool>, RecipeError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A parameter that may differ by tensor.
    pub fn setting(&mut self, key: &str) -> Result<Option<Setting>, RecipeError> {
        let field = self.path(key);
        self.take(key)
            .map(|value| Setting::read(&field, value))
            .transpose()
    }

    pub fn seed(&mut self, key: &str) -> Result<Option<u64>, RecipeError> {
        self.typed(key, "an integer from 0 to 2^64 - 1", Value::as_u64)
    }

    pub fn array(&mut self, key: &str) -> Result<Option<Vec<Value>>, RecipeError> {
        self.typed(key, "an array", |v| v.as_array().cloned())
    }

    /// Refuses what was not taken.
    pub fn finish(self, known: &[&str]) -> Result<(), RecipeError> {
        match self.entries.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let shown: String = key.chars().take(100).collect();
                let detail = format!("unknown field; known are {}", known.join(", "));
                Err(RecipeError::new(self.path(&shown), detail))
            }
        }
    }
}
