//! A small byte-level tokenizer for tests: 256 byte tokens, a few merges, two special tokens.

use serde_json::{Value, json};

use super::{SpecialTokens, TextTokenizer};
use crate::LmError;

/// Rows of the tiny tokenizer's model.
pub(crate) const ROWS: usize = 300;
pub(crate) const EOS: u32 = 261;

/// The alphabet of GPT-2 in byte order.
fn alphabet() -> Vec<char> {
    let mut next = 0x100;
    (0..=255u32)
        .map(|byte| {
            let own = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
            let code = if own { byte } else { next };
            next += u32::from(!own);
            char::from_u32(code).expect("a character")
        })
        .collect()
}

/// tokenizer.json of the tiny tokenizer. Byte tokens have their byte as id.
pub(crate) fn tokenizer_json() -> Value {
    let mut vocab = serde_json::Map::new();
    for (byte, c) in alphabet().into_iter().enumerate() {
        vocab.insert(c.to_string(), json!(byte));
    }
    for (index, token) in ["th", "the", "Ġthe", "ab"].iter().enumerate() {
        vocab.insert((*token).to_owned(), json!(256 + index));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            {"id": 260, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
            {"id": 261, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["t", "h"], ["th", "e"], ["Ġ", "the"], ["a", "b"]]},
    })
}

/// The tiny tokenizer with some part of its file changed.
pub(crate) fn changed(change: impl FnOnce(&mut Value)) -> Result<TextTokenizer, LmError> {
    let mut file = tokenizer_json();
    change(&mut file);
    let special = SpecialTokens {
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..SpecialTokens::default()
    };
    TextTokenizer::build(file.to_string().as_bytes(), ROWS, special, None)
}

pub(crate) fn tiny() -> TextTokenizer {
    changed(|_| {}).expect("the tiny tokenizer")
}
