//! Text to token ids and back, guarded: tokenizer.json is checked before it is built, every call of the
//! library is fenced against panics, and prompts are capped. Owns the special tokens and end-of-sequence ids.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cauldron_checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::LmError;
use crate::config::token_ids;
use crate::token_bytes::{TokenForm, shown};
use crate::tokenizer_guard;

/// Largest text that is encoded at once.
pub const MAX_PROMPT_BYTES: usize = 2 << 20;
const MAX_TEMPLATE_BYTES: usize = 256 << 10;

/// What tokenizer_config.json says about a model's text form.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub pad_token: Option<String>,
    pub unk_token: Option<String>,
    /// Jinja source, from chat_template.jinja or tokenizer_config.json.
    pub chat_template: Option<String>,
}

/// A way to a model's files beside its weights, by name; None where there is none.
pub type ReadFile<'a> = &'a dyn Fn(&str) -> Result<Option<Vec<u8>>, LmError>;

/// A checked tokenizer.
#[derive(Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    form: TokenForm,
    rows: usize,
    special: SpecialTokens,
    eos_ids: Vec<u32>,
}

impl TextTokenizer {
    /// Reads the tokenizer files of a checkpoint whose embedding has `vocab_rows` rows.
    pub fn load(checkpoint: &Checkpoint, vocab_rows: usize) -> Result<Self, LmError> {
        let read = |name: &str| Ok(checkpoint.read_sidecar(name)?);
        Self::from_files(checkpoint.config(), &read, vocab_rows)
    }

    /// As [`Self::load`], from config.json and a way to the files beside it.
    pub fn from_files(
        config_json: &Map<String, Value>,
        read: ReadFile<'_>,
        vocab_rows: usize,
    ) -> Result<Self, LmError> {
        let bytes = read("tokenizer.json")?.ok_or_else(|| LmError::tokenizer("tokenizer.json is missing"))?;
        let config = read_object(read, "tokenizer_config.json")?;
        let map = read_object(read, "special_tokens_map.json")?;
        let generation = read_object(read, "generation_config.json")?;
        let template = read("chat_template.jinja")?;
        let special = SpecialTokens::read(&config, &map, template)?;
        let eos_ids = token_ids(&generation, "eos_token_id").or(token_ids(config_json, "eos_token_id"));
        Self::build(&bytes, vocab_rows, special, eos_ids)
    }

    fn build(
        bytes: &[u8],
        rows: usize,
        special: SpecialTokens,
        eos_ids: Option<Vec<u32>>,
    ) -> Result<Self, LmError> {
        let file = tokenizer_guard::check(bytes, rows)?;
        let form = TokenForm::of(file.get("decoder").unwrap_or(&Value::Null));
        let tokenizer = tokenizer_of(&file, rows)?;
        let mut eos_ids = match eos_ids {
            Some(ids) => ids,
            None => {
                let eos = special.eos_token.as_deref();
                eos.and_then(|eos| tokenizer.token_to_id(eos))
                    .into_iter()
                    .collect()
            }
        };
        eos_ids.retain(|id| (*id as usize) < rows);
        eos_ids.sort_unstable();
        eos_ids.dedup();
        Ok(Self {
            tokenizer,
            form,
            rows,
            special,
            eos_ids,
        })
    }

    /// Token ids of a text of at most [`MAX_PROMPT_BYTES`]. With `add_special_tokens` the tokenizer's own
    /// template (a BOS, say) is applied.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, LmError> {
        if text.len() > MAX_PROMPT_BYTES {
            let detail = format!("has {} bytes; at most {MAX_PROMPT_BYTES} are taken", text.len());
            return Err(LmError::request("prompt", detail));
        }
        let encoding = fenced(|| self.tokenizer.encode_fast(text, add_special_tokens))?;
        let ids = encoding.get_ids().to_vec();
        match ids.iter().find(|id| **id as usize >= self.rows) {
            None => Ok(ids),
            Some(id) => Err(LmError::tokenizer(format!(
                "encoding gave the id {id}, which the model lacks"
            ))),
        }
    }

    /// Text of token ids. Ids without a token are an error.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, LmError> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.rows) {
            let detail = format!("token id {id} is not below the vocabulary size {}", self.rows);
            return Err(LmError::request("tokens", detail));
        }
        fenced(|| self.tokenizer.decode(ids, skip_special))
    }

    /// Text of one token by itself, leading space included; `bytes:\xe2\x80` where it is not UTF-8 alone, and
    /// empty where the id has no token.
    pub fn token_text(&self, id: u32) -> String {
        shown(self.token_bytes(id))
    }

    /// The bytes that one token stands for.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let added = self.tokenizer.get_added_vocabulary().simple_id_to_token(id);
        match (added, self.tokenizer.id_to_token(id)) {
            (Some(content), _) => content.into_bytes(),
            (None, Some(token)) => self.form.bytes(&token),
            (None, None) => Vec::new(),
        }
    }

    /// The id of a token given by its exact string.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Whether decoding with `skip_special` leaves the token out.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.tokenizer.get_added_vocabulary();
        added
            .simple_id_to_token(id)
            .is_some_and(|token| added.is_special_token(&token))
    }

    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// Ids that end an answer: those of generation_config.json, else of config.json, else the EOS token.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }
}

impl SpecialTokens {
    fn read(
        config: &Map<String, Value>,
        map: &Map<String, Value>,
        template_file: Option<Vec<u8>>,
    ) -> Result<Self, LmError> {
        let token = |key: &str| token_content(config.get(key)).or(token_content(map.get(key)));
        let chat_template = match template_file {
            Some(bytes) => Some(
                String::from_utf8(bytes)
                    .map_err(|_| LmError::template("chat_template.jinja is not UTF-8"))?,
            ),
            None => config.get("chat_template").and_then(template_source),
        };
        if chat_template
            .as_ref()
            .is_some_and(|t| t.len() > MAX_TEMPLATE_BYTES)
        {
            return Err(LmError::template(format!(
                "larger than {MAX_TEMPLATE_BYTES} bytes"
            )));
        }
        Ok(Self {
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
            pad_token: token("pad_token"),
            unk_token: token("unk_token"),
            chat_template,
        })
    }
}

/// A special token is a string or a serialised AddedToken.
fn token_content(token: Option<&Value>) -> Option<String> {
    let token = token?;
    let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
    Some(text.to_owned())
}

/// One template, or a list of named ones of which `default` is meant.
fn template_source(template: &Value) -> Option<String> {
    if let Some(text) = template.as_str() {
        return Some(text.to_owned());
    }
    let named = template.as_array()?;
    let default = named
        .iter()
        .find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
    Some(default.or(named.first())?.get("template")?.as_str()?.to_owned())
}

fn read_object(read: ReadFile<'_>, file: &str) -> Result<Map<String, Value>, LmError> {
    match read(file)? {
        None => Ok(Map::new()),
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| LmError::tokenizer(format!("{file}: {e}"))),
    }
}

/// The library's tokenizer of a tokenizer.json that is checked first.
pub(crate) fn checked_tokenizer(bytes: &[u8], rows: usize) -> Result<Tokenizer, LmError> {
    tokenizer_of(&tokenizer_guard::check(bytes, rows)?, rows)
}

fn tokenizer_of(checked: &Map<String, Value>, rows: usize) -> Result<Tokenizer, LmError> {
    let bytes = serde_json::to_vec(checked).map_err(|e| LmError::tokenizer(e.to_string()))?;
    let tokenizer: Tokenizer = fenced(|| Tokenizer::from_bytes(&bytes))?;
    // The library numbers added tokens itself where the file's ids do not fit.
    let mut added = tokenizer.get_added_tokens_decoder().into_keys();
    match added.find(|id| *id as usize >= rows) {
        None => Ok(tokenizer),
        Some(id) => {
            let detail = format!("an added token got the id {id}; the model has {rows} embedding rows");
            Err(LmError::tokenizer(detail))
        }
    }
}

/// Runs a call of the tokenizers crate so that neither its errors nor its panics go further.
pub(crate) fn fenced<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, LmError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| LmError::tokenizer(e.to_string())),
        Err(_) => Err(LmError::tokenizer("the tokenizer panicked on this input")),
    }
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;
