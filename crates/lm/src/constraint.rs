//! Answers that must be JSON of some schema: which tokens may come next. The grammar is llguidance's; here it is told the
//! bytes of this tokenizer's tokens, and its verdicts are put into logits.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::{LmError, TextTokenizer};

const MOST_LEXER_STATES: usize = 20_000;
const MOST_GRAMMAR_SYMBOLS: usize = 100_000;
const MOST_SCHEMA_BYTES: usize = 64 << 10;
const MOST_SCHEMA_KEYS: usize = 2000;
const MOST_REFERENCES: usize = 256;
const MOST_PATTERNS: usize = 16;
const COMPILE_STACK: usize = 64 << 20;
static COMPILING: Mutex<()> = Mutex::new(());
const FIELD: &str = "response_format";

/// Grammars over the tokens of one model. Made once a model: it looks at every token.
pub struct Grammars {
    factory: ParserFactory,
}

/// What one answer has to be, and how far it has come.
pub struct Constraint {
    matcher: Matcher,
}

impl Clone for Constraint {
    /// With a lexer of its own, whose states have the whole limit.
    fn clone(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
        }
    }
}

impl Grammars {
    /// `rows` are the model's logits.
    pub fn new(tokenizer: &TextTokenizer, rows: usize) -> Result<Self, LmError> {
        let ends = tokenizer.eos_ids();
        let Some(end) = ends.first() else {
            return Err(LmError::request(FIELD, "the model has no end-of-sequence token"));
        };
        let words: Vec<Vec<u8>> = (0..rows as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id);
                match tokenizer.is_special(id) || ends.contains(&id) {
                    true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
                    false => bytes,
                }
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(rows as u32, *end), &words).with_eos_tokens(ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(refused)?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        // A schema comes from a stranger, and a lexer state takes up to 2 kB.
        limits.max_lexer_states = MOST_LEXER_STATES;
        limits.max_grammar_size = MOST_GRAMMAR_SYMBOLS;
        Ok(Self { factory })
    }

    /// An answer that is an instance of a JSON Schema.
    pub fn json_schema(&self, schema: &Value) -> Result<Constraint, LmError> {
        check_size(schema)?;
        let grammar = TopLevelGrammar::from_json_schema(schema.clone());
        let compile = || Matcher::new(self.factory.create_parser(grammar));
        // One at a time, and where its recursion has room: an overflow would end the process.
        let _turn = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
        let matcher = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(COMPILE_STACK);
            thread.spawn_scoped(scope, compile).map(|thread| thread.join())
        });
        let Ok(Ok(matcher)) = matcher else {
            return Err(refused("it could not be compiled"));
        };
        match matcher.get_error() {
            None => Ok(Constraint { matcher }),
            Some(error) => Err(refused(error)),
        }
    }

    /// An answer that is any JSON object.
    pub fn json_object(&self) -> Result<Constraint, LmError> {
        self.json_schema(&json!({"type": "object"}))
    }
}

impl Constraint {
    /// Takes away the logits of all tokens that cannot come next; of the end too, as long as the answer is not whole.
    pub(crate) fn apply(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(first_line)?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if !allowed.is_allowed(token as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Goes on by the token that was drawn.
    pub(crate) fn accept(&mut self, token: u32) -> Result<(), String> {
        self.matcher.consume_token(token).map_err(first_line)
    }

    /// Whether the answer is whole and nothing can come but the end.
    pub(crate) fn is_done(&self) -> bool {
        self.matcher.is_stopped()
    }
}

fn refused(error: impl fmt::Display) -> LmError {
    LmError::request(FIELD, format!("the schema cannot be used: {}", first_line(error)))
}

/// The library's messages may end with a backtrace.
fn first_line(error: impl fmt::Display) -> String {
    let text = error.to_string();
    text.lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(300)
        .collect()
}

/// The library follows references and properties by recursion, and compares patterns of properties pair by pair.
fn check_size(schema: &Value) -> Result<(), LmError> {
    if schema.to_string().len() > MOST_SCHEMA_BYTES {
        return Err(refused(format!("it has more than {MOST_SCHEMA_BYTES} bytes")));
    }
    let (mut keys, mut references, mut patterns) = (0, 0, 0);
    let mut rest = vec![schema];
    while let Some(value) = rest.pop() {
        match value {
            Value::Array(items) => rest.extend(items),
            Value::Object(fields) => {
                keys += fields.len();
                references += usize::from(fields.contains_key("$ref"));
                if let Some(Value::Object(own)) = fields.get("patternProperties") {
                    patterns += own.len();
                }
                rest.extend(fields.values());
            }
            _ => {}
        }
    }
    for (what, count, most) in [
        ("keys", keys, MOST_SCHEMA_KEYS),
        ("references", references, MOST_REFERENCES),
        ("patternProperties", patterns, MOST_PATTERNS),
    ] {
        if count > most {
            return Err(refused(format!(
                "it has {count} {what}; at most {most} are taken"
            )));
        }
    }
    Ok(())
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammars")
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}
