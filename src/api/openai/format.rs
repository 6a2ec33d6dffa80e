//! `response_format`: what an answer has to be.

use cauldron_lm::Constraint;
use serde_json::Value;

use super::error::ApiError;
use crate::serving::Served;

const FIELD: &str = "response_format";

/// The field, checked as far as it can be without a model.
#[derive(Debug, Clone)]
pub enum Format {
    JsonObject,
    JsonSchema(Value),
}

impl Format {
    /// None for text.
    pub fn read(value: Option<Value>) -> Result<Option<Self>, ApiError> {
        let bad = |message: &str| ApiError::invalid(FIELD, message);
        let Some(value) = value else {
            return Ok(None);
        };
        match value.get("type").and_then(Value::as_str) {
            Some("text") => Ok(None),
            None if value.as_object().is_some_and(serde_json::Map::is_empty) => Ok(None),
            Some("json_object") => Ok(Some(Self::JsonObject)),
            Some("json_schema") => match value.pointer("/json_schema/schema") {
                Some(schema @ (Value::Object(_) | Value::Bool(true))) => {
                    Ok(Some(Self::JsonSchema(schema.clone())))
                }
                _ => Err(bad("json_schema.schema must be a JSON Schema")),
            },
            _ => Err(bad("type must be text, json_object or json_schema")),
        }
    }

    /// For the tokens of a model. Takes a while: off the async threads.
    pub fn constraint(&self, served: &Served) -> Result<Constraint, ApiError> {
        let grammars = served.grammars()?;
        Ok(match self {
            Self::JsonObject => grammars.json_object()?,
            Self::JsonSchema(schema) => grammars.json_schema(schema)?,
        })
    }
}
