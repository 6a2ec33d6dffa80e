//! API keys: only their digests are kept, and they are compared in constant time.

use std::path::Path;

use anyhow::{Context, bail};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

/// What a key opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    Admin,
    /// Asking served models.
    Inference,
}

/// The keys of a service; empty means that no key is asked for.
#[derive(Debug, Clone, Default)]
pub struct ApiKeys(Vec<([u8; 32], Scope)>);

impl ApiKeys {
    /// Reads a key file: `KEY`, `admin KEY` or `inference KEY` a line.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).context("reading --api-key-file")?;
        Self::parse(&text)
    }

    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (scope, key) = match line.split_once(char::is_whitespace) {
                None => (Scope::Admin, line),
                Some(("admin", key)) => (Scope::Admin, key.trim()),
                Some(("inference", key)) => (Scope::Inference, key.trim()),
                Some(_) => bail!(
                    "--api-key-file, line {}: must be [admin|inference] KEY",
                    index + 1
                ),
            };
            if key.len() < 8 || key.contains(char::is_whitespace) {
                bail!(
                    "--api-key-file, line {}: a key has at least 8 characters and no blanks",
                    index + 1
                );
            }
            keys.push((digest(key), scope));
        }
        match keys.is_empty() {
            true => bail!("--api-key-file has no key"),
            false => Ok(Self(keys)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What `key` opens; None if it is not one of these. Looks at every key, whatever matched before.
    pub fn scope_of(&self, key: &str) -> Option<Scope> {
        let given = digest(key);
        self.0.iter().fold(None, |best, (known, opens)| {
            let equal: bool = known.ct_eq(&given).into();
            match (equal, best) {
                (false, best) => best,
                (true, Some(Scope::Admin)) => Some(Scope::Admin),
                (true, _) => Some(*opens),
            }
        })
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_open_what_they_say() {
        let keys = ApiKeys::parse("# two\nadmin 0123456789\n\ninference abcdefghij\n").unwrap();
        assert_eq!(keys.scope_of("0123456789"), Some(Scope::Admin));
        assert_eq!(keys.scope_of("abcdefghij"), Some(Scope::Inference));
        assert_eq!(keys.scope_of(""), None);
        assert_eq!(keys.scope_of("0123456788"), None);
        // A key that is listed twice opens the most.
        for text in [
            "admin 0123456789\ninference 0123456789",
            "inference 0123456789\n0123456789",
        ] {
            let keys = ApiKeys::parse(text).unwrap();
            assert_eq!(keys.scope_of("0123456789"), Some(Scope::Admin));
        }
        for bad in ["", "short", "root 0123456789", "admin 0123 456789"] {
            assert!(ApiKeys::parse(bad).is_err(), "{bad}");
        }
    }
}
