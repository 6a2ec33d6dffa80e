//! Names that a client may choose, as types: nothing else from a request becomes part of a path or a label.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Name of a served model or of a folder under the models directory: 1 to 96 of `A-Z a-z 0-9 . _ -`, not starting with
/// a dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelName(String);

/// The text is no [`ModelName`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to 96 of A-Z a-z 0-9 . _ - and does not start with a dot")]
pub struct NameError;

impl ModelName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Stands between a family's name and the shares of a point; no name that a client chooses has it.
const AT: char = '@';

impl ModelName {
    /// The name of a family's point.
    pub fn of_point(family: &Self, shares: &impl fmt::Display) -> Self {
        Self(format!("{family}{AT}{shares}"))
    }

    /// The family's name and the shares, if a text may be the name of a point.
    pub fn split_point(text: &str) -> Option<(&str, &str)> {
        text.split_once(AT)
    }

    pub fn is_point(&self) -> bool {
        self.0.contains(AT)
    }

    pub fn is_point_of(&self, family: &Self) -> bool {
        Self::split_point(&self.0).is_some_and(|(name, _)| name == family.0)
    }
}

impl FromStr for ModelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        let fits = (1..=96).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(plain);
        match fits {
            true => Ok(Self(text.to_owned())),
            false => Err(NameError),
        }
    }
}

impl TryFrom<String> for ModelName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<ModelName> for String {
    fn from(name: ModelName) -> Self {
        name.0
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_single_path_components() {
        for good in ["base", "lm-math", "Llama-3.1_8B", "a"] {
            assert!(good.parse::<ModelName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a\\b",
            "a b",
            "a\0",
            "é",
            "a;b",
            "a+b",
            "a@0.5",
            &"a".repeat(97),
        ] {
            assert_eq!(bad.parse::<ModelName>(), Err(NameError), "{bad:?}");
        }
    }
}
