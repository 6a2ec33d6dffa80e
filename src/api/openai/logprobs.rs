//! Log-probabilities as the two routes print them. Values are printed from the f32 they were computed as, everywhere the
//! same way: clients compare a token's value with the largest of its alternatives for equality.

use cauldron_lm::{TextTokenizer, TokenLogprobs};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// Token texts with their log-probabilities, as a JSON object. Two tokens with the same text: the likelier one.
#[derive(Debug, Clone, Default, PartialEq, utoipa::ToSchema)]
#[schema(value_type = std::collections::HashMap<String, f32>)]
pub struct TopLogprobs(#[schema(inline)] Vec<(String, f32)>);

impl TopLogprobs {
    pub fn new(tokenizer: &TextTokenizer, tokens: &[(u32, f32)]) -> Self {
        let mut entries: Vec<(String, f32)> = Vec::with_capacity(tokens.len());
        for (token, logprob) in tokens {
            let text = tokenizer.token_text(*token);
            match entries.iter_mut().find(|(known, _)| *known == text) {
                Some((_, known)) => *known = known.max(*logprob),
                None => entries.push((text, *logprob)),
            }
        }
        Self(entries)
    }
}

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, logprob) in &self.0 {
            map.serialize_entry(text, logprob)?;
        }
        map.end()
    }
}

/// `logprobs` of /v1/completions: parallel lists over tokens; the first prompt token has null.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, utoipa::ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<TopLogprobs>>,
    /// Characters before each token, counted from the start of the text.
    pub text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// Appends the prompt's tokens; `logprobs` has one entry for each.
    pub fn push_prompt(
        &mut self,
        tokenizer: &TextTokenizer,
        prompt: &[u32],
        logprobs: &[Option<TokenLogprobs>],
        offset: &mut usize,
    ) {
        for (index, token) in prompt.iter().enumerate() {
            let entry = logprobs.get(index).and_then(Option::as_ref);
            self.push(tokenizer, *token, entry, offset);
        }
    }

    /// Appends one token.
    pub fn push(
        &mut self,
        tokenizer: &TextTokenizer,
        token: u32,
        entry: Option<&TokenLogprobs>,
        offset: &mut usize,
    ) {
        let text = tokenizer.token_text(token);
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        self.tokens.push(text);
        self.token_logprobs.push(entry.map(|e| e.logprob));
        self.top_logprobs
            .push(entry.map(|e| TopLogprobs::new(tokenizer, &e.top)));
    }
}

/// `logprobs` of /v1/chat/completions.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, utoipa::ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
}

/// One generated token with its alternatives.
#[derive(Debug, Clone, PartialEq, serde::Serialize, utoipa::ToSchema)]
pub struct ChatLogprob {
    #[serde(flatten)]
    pub own: TokenLogprob,
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token's text, bytes and log-probability.
#[derive(Debug, Clone, PartialEq, serde::Serialize, utoipa::ToSchema)]
pub struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

impl ChatLogprob {
    pub fn new(tokenizer: &TextTokenizer, entry: &TokenLogprobs, count: usize) -> Self {
        let one = |token: u32, logprob: f32| TokenLogprob {
            token: tokenizer.token_text(token),
            logprob,
            bytes: tokenizer.token_bytes(token),
        };
        Self {
            own: one(entry.token, entry.logprob),
            top_logprobs: entry
                .top
                .iter()
                .take(count)
                .map(|(token, logprob)| one(*token, *logprob))
                .collect(),
        }
    }
}
