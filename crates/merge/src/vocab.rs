//! Vocabularies that differ: which row of which model stands for each row of the result.
//!
//! Row for row the policies follow MergeLM (`pad_mean`: yule-BUAA/MergeLM, `utils/utils.py`) and mergekit (`union`:
//! `mergekit/tokenizer/embed.py`).

use std::collections::{BTreeMap, HashMap, HashSet};

use cauldron_checkpoint::{Checkpoint, is_float};
use serde_json::{Map, Value, json};

use crate::RecipeError;
use crate::recipe::{Recipe, Vocab};

const TOKENIZER: &str = "tokenizer.json";
/// Rows of a vocabulary.
const MOST_ROWS: usize = 1 << 24;

/// Where one row of a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Row {
    Own(u32),
    /// The mean of these (source, row).
    MeanOf(Vec<(usize, u32)>),
    /// The mean of all the model's own rows.
    OwnMean,
}

/// The rows of every source in the result's vocabulary.
#[derive(Debug, Clone, Default)]
pub(crate) struct VocabMaps {
    rows: usize,
    /// By source; None: its own rows, one by one.
    maps: Vec<Option<Vec<Row>>>,
    /// The merged tokenizer, if the policy makes one.
    pub tokenizer: Option<Value>,
}

impl VocabMaps {
    /// Rows that a tensor of this name has in the result; None if the vocabulary does not decide it.
    pub fn rows_of(&self, tensor: &str) -> Option<usize> {
        (!self.maps.is_empty() && is_vocabulary(tensor)).then_some(self.rows)
    }

    pub fn map(&self, source: usize) -> Option<&[Row]> {
        self.maps.get(source)?.as_deref()
    }

    /// Rows of the result, if they are not simply those of every parent.
    pub fn rows(&self) -> Option<usize> {
        (!self.maps.is_empty()).then_some(self.rows)
    }

    /// `base` and `owner` (whose tokenizer the result has) are indices of sources, `label` their names.
    pub fn new(
        recipe: &Recipe,
        sources: &[&Checkpoint],
        owner: usize,
        base: Option<usize>,
        label: &dyn Fn(usize) -> String,
    ) -> Result<Self, RecipeError> {
        if recipe.vocab == Vocab::Strict {
            return Ok(Self::default());
        }
        let bad =
            |source: usize, detail: String| RecipeError::new("vocab", format!("{}: {detail}", label(source)));
        let own: Vec<usize> = sources
            .iter()
            .enumerate()
            .map(|(index, source)| own_rows(source).map_err(|detail| bad(index, detail)))
            .collect::<Result<_, _>>()?;
        let tokens = |owner: usize| -> Result<Vec<Tokens>, RecipeError> {
            let read = sources
                .iter()
                .zip(&own)
                .enumerate()
                .map(|(index, (source, rows))| {
                    Tokens::read(source, *rows, index == owner).map_err(|detail| bad(index, detail))
                });
            read.collect()
        };
        let mut maps = match recipe.vocab {
            Vocab::Strict => return Ok(Self::default()),
            Vocab::PadMean => by_count(&own, own.iter().copied().max().unwrap_or(0)),
            Vocab::Base => by_count(&own, own[base.unwrap_or(owner)]),
            Vocab::Align => {
                let tokens = tokens(owner)?;
                let texts = texts_of(&tokens[owner], own[owner]);
                by_text(&texts, &tokens, &own, base)
            }
            Vocab::Union => {
                let mut tokens = tokens(owner)?;
                union(&mut tokens, &own, owner, base).map_err(|detail| bad(owner, detail))?
            }
        };
        if let Some(multiple) = recipe.pad_to_multiple_of {
            let rows = maps.rows.next_multiple_of(multiple);
            for (map, own) in maps.maps.iter_mut().zip(&own) {
                if rows > *own || map.is_some() {
                    let map = map.get_or_insert_with(|| identity(*own));
                    map.resize(rows, Row::OwnMean);
                }
            }
            maps.rows = rows;
        }
        Ok(maps)
    }
}

/// Tensors with one row a token, in the Llama family.
pub(crate) fn is_vocabulary(tensor: &str) -> bool {
    tensor.ends_with("embed_tokens.weight") || tensor.ends_with("lm_head.weight")
}

/// Rows of a model's vocabulary: those of each of its vocabulary tensors.
fn own_rows(checkpoint: &Checkpoint) -> Result<usize, String> {
    let mut rows = None;
    for (name, info) in checkpoint
        .tensors()
        .iter()
        .filter(|(name, _)| is_vocabulary(name))
    {
        match info.shape[..] {
            [own, width] if (1..=MOST_ROWS).contains(&own) && width > 0 && is_float(info.dtype) => {
                if *rows.get_or_insert(own) != own {
                    return Err(format!(
                        "tensor {name} has {own} rows, another vocabulary tensor has not"
                    ));
                }
            }
            _ => {
                let detail = format!("{:?} {:?}", info.shape, info.dtype);
                return Err(format!(
                    "tensor {name} is {detail}, no matrix of floats with up to {MOST_ROWS} rows"
                ));
            }
        }
    }
    rows.ok_or_else(|| "it has no tensor embed_tokens.weight or lm_head.weight".to_owned())
}

fn identity(rows: usize) -> Vec<Row> {
    (0..rows as u32).map(Row::Own).collect()
}

/// Row i is row i; what a model lacks is its mean.
fn by_count(own: &[usize], rows: usize) -> VocabMaps {
    let maps = own.iter().map(|own| {
        (*own != rows).then(|| {
            let mut map = identity(rows.min(*own));
            map.resize(rows, Row::OwnMean);
            map
        })
    });
    VocabMaps {
        rows,
        maps: maps.collect(),
        tokenizer: None,
    }
}

/// What is known of a checkpoint's tokens.
struct Tokens {
    /// The whole file, where the result's is made of it.
    json: Value,
    ids: BTreeMap<String, u32>,
    added: HashMap<String, Map<String, Value>>,
}

impl Tokens {
    /// Tokens with an id that the model has a row for.
    fn read(checkpoint: &Checkpoint, rows: usize, keep: bool) -> Result<Self, String> {
        let bad = |detail: String| format!("{TOKENIZER}: {detail}");
        let bytes = checkpoint
            .read_sidecar(TOKENIZER)
            .map_err(|e| bad(e.to_string()))?
            .ok_or_else(|| bad("is missing".into()))?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        let vocab = json["model"]["vocab"].as_object().ok_or_else(|| {
            bad("only vocabularies by token text are supported (BPE, WordPiece, WordLevel)".into())
        })?;
        let mut ids = BTreeMap::new();
        let mut note = |text: &str, id: Option<u64>| match id {
            Some(id) if id < rows as u64 => {
                ids.insert(text.to_owned(), id as u32);
                true
            }
            _ => false,
        };
        for (text, id) in vocab {
            note(text, id.as_u64());
        }
        let mut added = HashMap::new();
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            if let (Some(entry), Some(text)) = (token.as_object(), token["content"].as_str())
                && note(text, token["id"].as_u64())
            {
                added.insert(text.to_owned(), entry.clone());
            }
        }
        Ok(Self {
            json: if keep { json } else { Value::Null },
            ids,
            added,
        })
    }
}

/// The text of each row; None for rows that no token names (padding).
fn texts_of(tokens: &Tokens, rows: usize) -> Vec<Option<String>> {
    let mut texts = vec![None; rows];
    for (text, id) in &tokens.ids {
        texts[*id as usize] = Some(text.clone());
    }
    texts
}

/// Rows by the text of their token: a model's own row of that text, else the base's, else the mean of those that have it.
fn by_text(texts: &[Option<String>], tokens: &[Tokens], own: &[usize], base: Option<usize>) -> VocabMaps {
    let maps = (0..tokens.len()).map(|source| {
        let rows = texts.iter().enumerate().map(|(row, text)| {
            let padding = match row < own[source] {
                true => Row::Own(row as u32),
                false => Row::OwnMean,
            };
            let Some(text) = text else { return padding };
            let owner = |s: usize| tokens[s].ids.get(text).map(|id| (s, *id));
            if let Some((_, id)) = owner(source) {
                return Row::Own(id);
            }
            match base.and_then(owner) {
                Some(found) => Row::MeanOf(vec![found]),
                None => Row::MeanOf((0..tokens.len()).filter_map(owner).collect()),
            }
        });
        let rows: Vec<Row> = rows.collect();
        (rows != identity(own[source])).then_some(rows)
    });
    VocabMaps {
        rows: texts.len(),
        maps: maps.collect(),
        tokenizer: None,
    }
}

/// The owner's tokens keep their ids; tokens that only others have follow, in the order of the models and of their ids.
fn union(
    tokens: &mut [Tokens],
    own: &[usize],
    owner: usize,
    base: Option<usize>,
) -> Result<VocabMaps, String> {
    let mut merged = std::mem::take(&mut tokens[owner].json);
    let mut ids = AddedIds::read(&mut merged, own[owner])?;
    let mut texts = texts_of(&tokens[owner], own[owner]);
    let mut entries = Vec::new();
    let mut new: HashSet<&str> = HashSet::new();
    for other in tokens.iter() {
        let missing = other
            .ids
            .iter()
            .filter(|(text, _)| !tokens[owner].ids.contains_key(*text));
        let mut missing: Vec<(&str, u32)> = missing.map(|(text, id)| (text.as_str(), *id)).collect();
        missing.sort_by_key(|(_, id)| *id);
        for (text, _) in missing.into_iter().filter(|(text, _)| new.insert(text)) {
            let id = ids.next();
            let known = other.added.get(text).cloned();
            let mut entry = known.unwrap_or_else(|| plain_token(text));
            entry.insert("id".into(), json!(id));
            entries.push(Value::Object(entry));
            texts.resize(texts.len().max(id as usize + 1), None);
            texts[id as usize] = Some(text.to_owned());
        }
    }
    match merged.get_mut("added_tokens").and_then(Value::as_array_mut) {
        Some(list) => list.append(&mut entries),
        None => merged["added_tokens"] = Value::Array(entries),
    }
    Ok(VocabMaps {
        tokenizer: Some(merged),
        ..by_text(&texts, tokens, own, base)
    })
}

/// The ids that the tokenizers library gives to added tokens as it reads them: it does not look at those in the file.
struct AddedIds {
    vocab: u64,
    last: Option<u64>,
}

impl AddedIds {
    /// Of a tokenizer whose tokens beyond the model's rows are taken out.
    fn read(json: &mut Value, rows: usize) -> Result<Self, String> {
        let vocab = json["model"]["vocab"].as_object().cloned().unwrap_or_default();
        let has_row = |id: &Value| id.as_u64().is_some_and(|id| id < rows as u64);
        if let Some((text, id)) = vocab.iter().find(|(_, id)| !has_row(id)) {
            return Err(format!(
                "{TOKENIZER}: token {text:?} has the id {id}, and the model {rows} rows"
            ));
        }
        let mut ids = Self {
            vocab: vocab.len() as u64,
            last: None,
        };
        if let Some(added) = json.get_mut("added_tokens").and_then(Value::as_array_mut) {
            added.retain(|token| has_row(&token["id"]));
            for token in added {
                let text = token["content"].as_str().unwrap_or_default();
                let given = match vocab.get(text).and_then(Value::as_u64) {
                    Some(id) => {
                        ids.last = ids.last.max(Some(id));
                        id
                    }
                    None => ids.next(),
                };
                if token["id"].as_u64() != Some(given) {
                    return Err(format!(
                        "{TOKENIZER}: token {text:?} has the id {}, but the tokenizers library reads {given}",
                        token["id"]
                    ));
                }
            }
        }
        Ok(ids)
    }

    fn next(&mut self) -> u64 {
        let id = self.last.map_or(self.vocab, |last| self.vocab.max(last + 1));
        self.last = Some(id);
        id
    }
}

/// A token of a vocabulary, as an added one.
fn plain_token(text: &str) -> Map<String, Value> {
    let mut entry = Map::from_iter([("content".to_owned(), json!(text))]);
    for flag in ["single_word", "lstrip", "rstrip", "special"] {
        entry.insert(flag.into(), json!(false));
    }
    entry.insert("normalized".into(), json!(true));
    entry
}
