//! Model references as recipes write them.

use std::fmt;

use crate::RecipeError;

const MAX_REFERENCE_CHARS: usize = 256;

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
