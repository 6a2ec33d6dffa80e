//! The bytes that one token stands for, exactly: byte-level alphabets, byte-fallback tokens and the
//! sentencepiece space. Decoding a token alone through its decoder would lose both halves of a split
//! character and leading spaces.

use serde_json::Value;

/// How a tokenizer writes bytes in its token strings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenForm {
    /// GPT-2's alphabet: one printable character a byte.
    ByteLevel,
    /// `▁` for a space, `<0xE2>` for a byte.
    SentencePiece,
    /// Tokens are text as it is.
    Plain,
}

impl TokenForm {
    /// Told from the `decoder` of tokenizer.json.
    pub(crate) fn of(decoder: &Value) -> Self {
        let mut kinds = Vec::new();
        collect_kinds(decoder, &mut kinds);
        if kinds.contains(&"ByteLevel") {
            Self::ByteLevel
        } else if kinds
            .iter()
            .any(|kind| matches!(*kind, "Metaspace" | "ByteFallback"))
        {
            Self::SentencePiece
        } else {
            Self::Plain
        }
    }

    /// The bytes of one vocabulary entry (not of an added token, which is text as it is).
    pub(crate) fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => token
                .chars()
                .map(byte_of)
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Self::SentencePiece => match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('\u{2581}', " ").into_bytes(),
            },
            Self::Plain => token.as_bytes().to_vec(),
        }
    }
}

/// Text where the bytes are UTF-8; else OpenAI's notation for tokens that are not text: `bytes:\xe2\x80`.
pub(crate) fn shown(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let hex = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        format!("bytes:{}", hex.collect::<String>())
    })
}

fn collect_kinds<'a>(component: &'a Value, kinds: &mut Vec<&'a str>) {
    kinds.extend(component.get("type").and_then(Value::as_str));
    let nested = component.get("decoders").and_then(Value::as_array);
    nested
        .into_iter()
        .flatten()
        .for_each(|part| collect_kinds(part, kinds));
}

fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2)
        .then(|| u8::from_str_radix(hex, 16).ok())
        .flatten()
}

/// Inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the 68 other bytes follow
/// from U+0100 on in order.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let bytes: Vec<u8> = (0..=0x143)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect();
        let mut sorted = bytes.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..=255).collect::<Vec<u8>>());
        assert_eq!(TokenForm::ByteLevel.bytes("ĠParisĊ"), b" Paris\n");
    }

    #[test]
    fn halves_of_a_character_are_shown_as_bytes() {
        assert_eq!(shown(vec![0xe2, 0x80]), "bytes:\\xe2\\x80");
        assert_eq!(shown("é".into()), "é");
        assert_eq!(shown(TokenForm::SentencePiece.bytes("<0xE2>")), "bytes:\\xe2");
        assert_eq!(shown(TokenForm::SentencePiece.bytes("▁the")), " the");
        assert_eq!(TokenForm::SentencePiece.bytes("<0xzz>"), b"<0xzz>");
    }

    #[test]
    fn the_form_is_told_from_the_decoder() {
        let nested = json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]});
        assert_eq!(TokenForm::of(&nested), TokenForm::SentencePiece);
        assert_eq!(TokenForm::of(&json!({"type": "ByteLevel"})), TokenForm::ByteLevel);
        assert_eq!(TokenForm::of(&Value::Null), TokenForm::Plain);
    }
}
