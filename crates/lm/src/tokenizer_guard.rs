//! Checks of tokenizer.json before the tokenizers crate sees it, which panics on bad merges, aborts on huge
//! paddings, spends minutes on absurd patterns and takes any id. What is refused is named; padding,
//! truncation and BPE dropout are dropped, since they would change prompts.

use serde_json::{Map, Value};

use crate::LmError;

const MAX_FILE_BYTES: usize = 64 << 20;
const MAX_TOKEN_BYTES: usize = 4096;
const MAX_COMPONENTS: usize = 64;
const MAX_DEPTH: usize = 8;
const MAX_PATTERN_BYTES: usize = 4096;
const MAX_REPLACE_PATTERN_BYTES: usize = 256;
/// Normalisers may make a text this many times longer, by their literal contents.
const MAX_GROWTH: usize = 64;
const MAX_CHARSMAP_BYTES: usize = 2 << 20;
const MAX_SPECIAL_IDS: usize = 64;
const MAX_COUNT: u64 = 4096;

/// Every component of the four pipeline stages that is let through.
const COMPONENTS: &[&str] = &[
    "BPEDecoder",
    "BertNormalizer",
    "BertPreTokenizer",
    "BertProcessing",
    "ByteFallback",
    "ByteLevel",
    "CTC",
    "CharDelimiterSplit",
    "Digits",
    "Fuse",
    "Lowercase",
    "Metaspace",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Prepend",
    "Punctuation",
    "Replace",
    "RobertaProcessing",
    "Sequence",
    "Split",
    "Strip",
    "StripAccents",
    "TemplateProcessing",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
    "WordPiece",
];
const NESTED: &[&str] = &["normalizers", "pretokenizers", "decoders", "processors"];

/// Parses and checks tokenizer.json for a model with `rows` embedding rows.
pub(crate) fn check(bytes: &[u8], rows: usize) -> Result<Map<String, Value>, LmError> {
    if bytes.len() > MAX_FILE_BYTES {
        return refuse(format!("tokenizer.json is larger than {MAX_FILE_BYTES} bytes"));
    }
    let mut file: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| LmError::tokenizer(format!("tokenizer.json: {e}")))?;
    file.insert("padding".to_owned(), Value::Null);
    file.insert("truncation".to_owned(), Value::Null);
    check_added_tokens(file.get("added_tokens"), rows)?;
    for stage in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        let mut walk = Walk {
            rows,
            seen: 0,
            growth: 1,
        };
        if let Some(component) = file.get(stage).filter(|c| !c.is_null()) {
            walk.component(component, 0)?;
        }
    }
    let model = file
        .get_mut("model")
        .and_then(Value::as_object_mut)
        .ok_or_else(|| LmError::tokenizer("tokenizer.json has no model"))?;
    check_model(model, rows)?;
    model.insert("dropout".to_owned(), Value::Null);
    Ok(file)
}

fn refuse<T>(detail: impl Into<String>) -> Result<T, LmError> {
    Err(LmError::tokenizer(detail))
}

fn check_id(id: Option<u64>, rows: usize, of: &str) -> Result<(), LmError> {
    match id {
        Some(id) if id < rows as u64 => Ok(()),
        Some(id) => refuse(format!(
            "{of} has the id {id}; the model has {rows} embedding rows"
        )),
        None => refuse(format!("{of} has an id that is not a count")),
    }
}

fn check_added_tokens(tokens: Option<&Value>, rows: usize) -> Result<(), LmError> {
    let tokens = match tokens {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(tokens)) if tokens.len() <= rows => tokens,
        Some(_) => return refuse("added_tokens is not a list, or longer than the embedding"),
    };
    for token in tokens {
        match token.get("content").and_then(Value::as_str) {
            Some(content) if !content.is_empty() && content.len() <= MAX_TOKEN_BYTES => {}
            _ => return refuse("an added token is empty, too long or has no content"),
        }
        check_id(token.get("id").and_then(Value::as_u64), rows, "an added token")?;
    }
    Ok(())
}

fn check_model(model: &Map<String, Value>, rows: usize) -> Result<(), LmError> {
    let kind = model.get("type").and_then(Value::as_str);
    match (kind, model.get("vocab")) {
        (Some("BPE"), Some(Value::Object(vocab))) => {
            check_vocab(vocab, rows)?;
            check_merges(model, vocab)
        }
        (Some("WordPiece" | "WordLevel"), Some(Value::Object(vocab))) => {
            let longest = model.get("max_input_chars_per_word").and_then(Value::as_u64);
            if longest.is_some_and(|longest| longest > MAX_COUNT) {
                return refuse("max_input_chars_per_word is absurd");
            }
            check_vocab(vocab, rows)
        }
        (Some("Unigram"), Some(Value::Array(vocab))) => {
            check_id((vocab.len() as u64).checked_sub(1), rows, "the last piece")?;
            let short = |piece: &Value| {
                let text = piece.get(0).and_then(Value::as_str);
                text.is_some_and(|text| text.len() <= MAX_TOKEN_BYTES)
            };
            match vocab.iter().all(short) {
                true => Ok(()),
                false => refuse("a piece is too long or not text"),
            }
        }
        _ => refuse("the model must be BPE, Unigram, WordPiece or WordLevel, with a vocab"),
    }
}

fn check_vocab(vocab: &Map<String, Value>, rows: usize) -> Result<(), LmError> {
    for (token, id) in vocab {
        if token.len() > MAX_TOKEN_BYTES {
            return refuse("a token is too long");
        }
        check_id(id.as_u64(), rows, "a token")?;
    }
    Ok(())
}

/// Both parts and their sum must be tokens; a part shorter than the subword prefix makes the library panic.
fn check_merges(model: &Map<String, Value>, vocab: &Map<String, Value>) -> Result<(), LmError> {
    let Some(Value::Array(merges)) = model.get("merges") else {
        return refuse("BPE without merges");
    };
    let prefix = model
        .get("continuing_subword_prefix")
        .and_then(Value::as_str)
        .unwrap_or("");
    for (index, merge) in merges.iter().enumerate() {
        let parts = match merge {
            Value::String(line) if line.starts_with("#version") => continue,
            Value::String(line) => line.split_once(' '),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
            _ => None,
        };
        let whole = parts.and_then(|(a, b)| {
            let known = vocab.contains_key(a) && vocab.contains_key(b);
            let tail = b.get(prefix.len()..)?;
            known.then(|| format!("{a}{tail}"))
        });
        if !whole.is_some_and(|whole| vocab.contains_key(&whole)) {
            return refuse(format!("merge {index} names tokens that the vocab lacks"));
        }
    }
    Ok(())
}

struct Walk {
    rows: usize,
    seen: usize,
    growth: usize,
}

impl Walk {
    fn component(&mut self, component: &Value, depth: usize) -> Result<(), LmError> {
        self.seen += 1;
        if self.seen > MAX_COMPONENTS || depth > MAX_DEPTH {
            return refuse("too many components");
        }
        let kind = component.get("type").and_then(Value::as_str).unwrap_or("(none)");
        if !COMPONENTS.contains(&kind) {
            let kind: String = kind.chars().filter(|c| !c.is_control()).take(40).collect();
            return refuse(format!("component {kind} is not supported"));
        }
        match kind {
            "Replace" => {
                pattern(component, MAX_REPLACE_PATTERN_BYTES)?;
                self.grow(component, "content")?;
            }
            "Prepend" => self.grow(component, "prepend")?,
            "Split" => pattern(component, MAX_PATTERN_BYTES)?,
            "Precompiled" => {
                let charsmap = component.get("precompiled_charsmap").and_then(Value::as_str);
                if charsmap.is_none_or(|map| map.len() > MAX_CHARSMAP_BYTES) {
                    return refuse("precompiled_charsmap is missing or too large");
                }
            }
            "TemplateProcessing" => self.template(component)?,
            "BertProcessing" | "RobertaProcessing" => {
                for key in ["sep", "cls"] {
                    let id = component
                        .get(key)
                        .and_then(|pair| pair.get(1))
                        .and_then(Value::as_u64);
                    check_id(id, self.rows, key)?;
                }
            }
            _ => {}
        }
        for key in ["start", "stop"] {
            if component
                .get(key)
                .and_then(Value::as_u64)
                .is_some_and(|n| n > MAX_COUNT)
            {
                return refuse(format!("{key} of {kind} is absurd"));
            }
        }
        for key in NESTED {
            for part in component
                .get(*key)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                self.component(part, depth + 1)?;
            }
        }
        Ok(())
    }

    fn grow(&mut self, component: &Value, key: &str) -> Result<(), LmError> {
        let length = component.get(key).and_then(Value::as_str).map_or(0, str::len);
        self.growth = self.growth.saturating_mul(length.max(1));
        match self.growth <= MAX_GROWTH {
            true => Ok(()),
            false => refuse("replacements make texts too long"),
        }
    }

    fn template(&self, component: &Value) -> Result<(), LmError> {
        for side in ["single", "pair"] {
            let pieces = component.get(side).and_then(Value::as_array);
            if pieces.is_some_and(|pieces| pieces.len() > MAX_SPECIAL_IDS) {
                return refuse("the template is too long");
            }
        }
        let tokens = component.get("special_tokens").and_then(Value::as_object);
        for token in tokens.into_iter().flat_map(Map::values) {
            let ids = token.get("ids").and_then(Value::as_array);
            let Some(ids) = ids.filter(|ids| ids.len() <= MAX_SPECIAL_IDS) else {
                return refuse("a special token of the template has no ids, or too many");
            };
            for id in ids {
                check_id(id.as_u64(), self.rows, "a special token of the template")?;
            }
        }
        Ok(())
    }
}

fn pattern(component: &Value, longest: usize) -> Result<(), LmError> {
    let pattern = component.get("pattern");
    let text = ["String", "Regex"]
        .iter()
        .find_map(|kind| pattern?.get(*kind)?.as_str())
        .or(pattern.and_then(Value::as_str));
    match text {
        Some(text) if !text.is_empty() && text.len() <= longest => Ok(()),
        _ => refuse("a pattern is empty, missing or too long"),
    }
}
