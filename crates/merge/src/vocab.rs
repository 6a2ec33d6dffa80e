//! Vocabularies that differ: which row of which model stands for each row of the result.
//!
//! Row for row the policies follow MergeLM (`pad_mean`: yule-BUAA/MergeLM, `utils/utils.py`) and mergekit (`union`:
//! `mergekit/tokenizer/embed.py`).

use std::collections::{BTreeMap, HashMap};

use cauldron_checkpoint::Checkpoint;
use serde_json::{Map, Value, json};

use crate::RecipeError;
use crate::recipe::{Recipe, Vocab};

const TOKENIZER: &str = "tokenizer.json";

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

    /// `reference` and `base` are indices of sources.
    pub fn new(
        recipe: &Recipe,
        sources: &[&Checkpoint],
        reference: usize,
        base: Option<usize>,
    ) -> Result<Self, RecipeError> {
        let own: Vec<usize> = sources.iter().map(|s| own_rows(s)).collect();
        let mut maps = match recipe.vocab {
            Vocab::Strict => return Ok(Self::default()),
            Vocab::PadMean => by_count(&own, own.iter().copied().max().unwrap_or(0)),
            Vocab::Base => by_count(&own, own[base.unwrap_or(reference)]),
            Vocab::Union => union(sources, &own, reference, base)?,
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

fn own_rows(checkpoint: &Checkpoint) -> usize {
    let vocabulary = checkpoint.tensors().iter().find(|(name, _)| is_vocabulary(name));
    vocabulary
        .and_then(|(_, info)| info.shape.first().copied())
        .unwrap_or(0)
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
    json: Value,
    ids: BTreeMap<String, u32>,
    added: HashMap<String, Map<String, Value>>,
}

impl Tokens {
    /// Tokens with an id that the model has a row for.
    fn read(checkpoint: &Checkpoint, rows: usize) -> Result<Self, RecipeError> {
        let bad = |detail: String| RecipeError::new("vocab", format!("union: {TOKENIZER}: {detail}"));
        let bytes = checkpoint
            .read_sidecar(TOKENIZER)
            .map_err(|e| bad(e.to_string()))?
            .ok_or_else(|| bad("a model lacks it".into()))?;
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
        Ok(Self { json, ids, added })
    }
}

/// The reference's tokens keep their ids; tokens that only others have follow, in the order of the models and of their ids.
fn union(
    sources: &[&Checkpoint],
    own: &[usize],
    reference: usize,
    base: Option<usize>,
) -> Result<VocabMaps, RecipeError> {
    let tokens: Vec<Tokens> = sources
        .iter()
        .zip(own)
        .map(|(source, rows)| Tokens::read(source, *rows))
        .collect::<Result<_, _>>()?;
    let mut merged = tokens[reference].json.clone();
    // Rows of the reference that no token names (padding) stay where they are.
    let mut texts: Vec<Option<&str>> = vec![None; own[reference]];
    for (text, id) in &tokens[reference].ids {
        texts[*id as usize] = Some(text);
    }
    let mut new_entries = Vec::new();
    for other in &tokens {
        let mut missing: Vec<(&str, u32)> = other
            .ids
            .iter()
            .filter(|(text, _)| !tokens[reference].ids.contains_key(*text))
            .map(|(text, id)| (text.as_str(), *id))
            .collect();
        missing.sort_by_key(|(_, id)| *id);
        for (text, _) in missing {
            if texts[own[reference]..].contains(&Some(text)) {
                continue;
            }
            let id = texts.len();
            let mut entry = other
                .added
                .get(text)
                .cloned()
                .unwrap_or_else(|| plain_token(text));
            entry.insert("id".into(), json!(id));
            new_entries.push(Value::Object(entry));
            texts.push(Some(text));
        }
    }
    match merged.get_mut("added_tokens").and_then(Value::as_array_mut) {
        Some(list) => list.append(&mut new_entries),
        None => merged["added_tokens"] = Value::Array(new_entries),
    }
    let maps = (0..sources.len()).map(|source| {
        let rows = texts.iter().enumerate().map(|(row, text)| {
            let Some(text) = text else {
                return match row < own[source] {
                    true => Row::Own(row as u32),
                    false => Row::OwnMean,
                };
            };
            let owner = |s: usize| tokens[s].ids.get(*text).map(|id| (s, *id));
            if let Some((_, id)) = owner(source) {
                return Row::Own(id);
            }
            match base.and_then(owner) {
                Some(found) => Row::MeanOf(vec![found]),
                None => Row::MeanOf((0..sources.len()).filter_map(owner).collect()),
            }
        });
        let rows: Vec<Row> = rows.collect();
        (rows != identity(own[source])).then_some(rows)
    });
    Ok(VocabMaps {
        rows: texts.len(),
        maps: maps.collect(),
        tokenizer: Some(merged),
    })
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
