//! A masked language model (BERT, through candle-transformers): which words it expects in the place of others.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertForMaskedLM, Config};
use cauldron_checkpoint::{Checkpoint, is_float};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::LmError;
use crate::tokenizer::{MAX_PROMPT_BYTES, checked_tokenizer, fenced};

/// Larger models are not for this.
const MAX_BYTES: u64 = 2 << 30;
const ARCHITECTURE: &str = "BertForMaskedLM";
/// Tied in files that leave it out.
const TIED: [(&str, &str); 2] = [
    (
        "cls.predictions.decoder.weight",
        "bert.embeddings.word_embeddings.weight",
    ),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
];

/// A BERT with its masked language modelling head, in float32 on the CPU.
pub struct MaskedLm {
    model: BertForMaskedLM,
    tokenizer: Tokenizer,
    positions: usize,
}

impl fmt::Debug for MaskedLm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MaskedLm")
            .field("positions", &self.positions)
            .finish_non_exhaustive()
    }
}

/// What the model expects at each token of a text.
#[derive(Debug)]
pub struct Expectations<'a> {
    model: &'a MaskedLm,
    /// By token: its bytes in the text.
    offsets: Vec<(usize, usize)>,
    /// Shape (tokens, vocabulary).
    logits: Vec<Vec<f32>>,
}

impl MaskedLm {
    /// Opens a folder with config.json, tokenizer.json and safetensors.
    pub fn open(folder: &Path) -> Result<Self, LmError> {
        let checkpoint = Checkpoint::open(folder)?;
        let named = checkpoint.config().get("architectures").and_then(|a| a.get(0));
        if named.and_then(Value::as_str) != Some(ARCHITECTURE) {
            let detail = format!("must be {ARCHITECTURE}");
            return Err(LmError::config("architectures", detail));
        }
        let config: Config = serde_json::from_value(Value::Object(checkpoint.config().clone()))
            .map_err(|e| LmError::config("(the file)", e.to_string()))?;
        if config.num_attention_heads == 0 || !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return Err(LmError::config("num_attention_heads", "must divide hidden_size"));
        }
        if config.max_position_embeddings < 3 {
            return Err(LmError::config("max_position_embeddings", "must be 3 at least"));
        }
        if checkpoint.total_bytes() > MAX_BYTES {
            return Err(LmError::config(
                "(the weights)",
                format!("have more than {MAX_BYTES} bytes"),
            ));
        }
        let file = checkpoint.read_sidecar("tokenizer.json")?;
        let file = file.ok_or_else(|| LmError::tokenizer("tokenizer.json is missing"))?;
        let tokenizer = checked_tokenizer(&file, config.vocab_size)?;
        let weights = VarBuilder::from_tensors(weights(&checkpoint)?, DType::F32, &Device::Cpu);
        let positions = config.max_position_embeddings;
        let model = AssertUnwindSafe(|| BertForMaskedLM::load(weights, &config));
        let model = catch_unwind(model).map_err(|_| LmError::config("(the file)", "does not fit"))?;
        Ok(Self {
            model: model?,
            tokenizer,
            positions,
        })
    }

    /// What it expects at every token of a text that it sees in whole, as BERT-Attack asks it; of long texts the first tokens.
    pub fn read(&self, text: &str) -> Result<Expectations<'_>, LmError> {
        if text.len() > MAX_PROMPT_BYTES {
            let detail = format!("has {} bytes; at most {MAX_PROMPT_BYTES} are taken", text.len());
            return Err(LmError::request("prompt", detail));
        }
        let encoding = fenced(|| self.tokenizer.encode(text, true))?;
        let count = encoding.len().min(self.positions);
        let ids = Tensor::new(&encoding.get_ids()[..count], &Device::Cpu)?.unsqueeze(0)?;
        let kinds = ids.zeros_like()?;
        let forward = AssertUnwindSafe(|| self.model.forward(&ids, &kinds, None));
        let logits = catch_unwind(forward).map_err(|_| LmError::Compute {
            detail: "the masked language model panicked".into(),
        })??;
        Ok(Expectations {
            model: self,
            offsets: encoding.get_offsets()[..count].to_vec(),
            logits: logits.squeeze(0)?.to_vec2()?,
        })
    }
}

impl Expectations<'_> {
    /// Other words that it expects in a word's place, the likeliest first, of its `most` likeliest tokens; none for words of
    /// several tokens.
    pub fn instead_of(&self, text: &str, word: &Range<usize>, most: usize) -> Vec<String> {
        let place = self
            .offsets
            .iter()
            .position(|offsets| *offsets == (word.start, word.end));
        let Some(logits) = place.map(|place| &self.logits[place]) else {
            return Vec::new();
        };
        let own = text[word.clone()].to_lowercase();
        let mut ranked: Vec<usize> = (0..logits.len()).collect();
        let order = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        let most = most.min(ranked.len());
        if most > 0 && most < ranked.len() {
            ranked.select_nth_unstable_by(most - 1, order);
        }
        ranked.truncate(most);
        ranked.sort_by(order);
        // Parts of words (`##ing`), marks and special tokens are no words.
        let is_word = |token: &String| token.chars().count() > 1 && token.chars().all(char::is_alphabetic);
        ranked
            .into_iter()
            .filter_map(|id| self.model.tokenizer.id_to_token(id as u32))
            .filter(|token| is_word(token) && token.to_lowercase() != own)
            .collect()
    }
}

fn weights(checkpoint: &Checkpoint) -> Result<HashMap<String, Tensor>, LmError> {
    let mut found = HashMap::new();
    for (name, info) in checkpoint.tensors() {
        if is_float(info.dtype) {
            let tensor = Tensor::from_vec(checkpoint.read_f32(name)?, info.shape.as_slice(), &Device::Cpu)?;
            // As early checkpoints name them.
            let name = name.replace("LayerNorm.gamma", "LayerNorm.weight");
            found.insert(name.replace("LayerNorm.beta", "LayerNorm.bias"), tensor);
        }
    }
    for (name, tied) in TIED {
        if let (false, Some(tensor)) = (found.contains_key(name), found.get(tied)) {
            found.insert(name.to_owned(), tensor.clone());
        }
    }
    Ok(found)
}
