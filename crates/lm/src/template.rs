//! A model's own chat template: Jinja as transformers runs it, under a step limit and an output limit. Templates
//! come from checkpoints only, never from a request.
//!
//! Fuel bounds the work of a template and most of what its values take, but not all: a list added to itself forty times
//! is small until something walks it. So who serves strangers' checkpoints names a program to
//! [`sandbox`], and every rendering happens there.
//!
//! Source of the environment: huggingface/transformers, `utils/chat_template_utils.py`.

mod dates;
mod json;
pub mod sandbox;

use std::io::{Error as IoError, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use serde::{Deserialize, Serialize};

use crate::tokenizer::SpecialTokens;
use crate::{LmError, MAX_PROMPT_BYTES};
use dates::strftime_now;
use json::PythonJson;

const NAME: &str = "chat_template";
/// Instructions, and at 64 bytes each what they make: at most 128 MB. The longest conversation takes about a third.
const FUEL: u64 = 2_000_000;
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
}

/// A template that has been looked at: compiled here, or tried in the sandbox, which compiles it for each rendering.
#[derive(Debug)]
pub struct ChatTemplate(Place);

#[derive(Debug)]
enum Place {
    Here(Box<Environment<'static>>),
    Sandbox(String),
}

impl ChatTemplate {
    /// In the sandbox, where there is one: then an error also means that the template did harm there.
    pub fn new(source: &str) -> Result<Self, LmError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(LmError::template(format!("larger than {MAX_SOURCE_BYTES} bytes")));
        }
        if !sandbox::is_set() {
            return Self::here(source);
        }
        sandbox::try_out(source)?;
        Ok(Self(Place::Sandbox(source.to_owned())))
    }

    fn here(source: &str) -> Result<Self, LmError> {
        let environment = catch_unwind(|| environment(source))
            .map_err(|_| LmError::template("its compilation panicked"))??;
        Ok(Self(Place::Here(Box::new(environment))))
    }

    /// The prompt of a conversation. A refusal of the template itself (`raise_exception`) is an error with its
    /// message.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        special: &SpecialTokens,
    ) -> Result<String, LmError> {
        match &self.0 {
            Place::Here(environment) => render(environment, messages, add_generation_prompt, special),
            Place::Sandbox(source) => sandbox::render(source, messages, add_generation_prompt, special),
        }
    }
}

fn render(
    environment: &Environment<'static>,
    messages: &[ChatMessage],
    add_generation_prompt: bool,
    special: &SpecialTokens,
) -> Result<String, LmError> {
    let context = context(messages, add_generation_prompt, special);
    let mut output = Limited::default();
    let render = || {
        let template = environment.get_template(NAME)?;
        template.render_captured_to(context, &mut output).map(drop)
    };
    match catch_unwind(AssertUnwindSafe(render)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(LmError::template(message(&error))),
        Err(_) => return Err(LmError::template("rendering panicked")),
    }
    String::from_utf8(output.0).map_err(|_| LmError::template("rendered text is not UTF-8"))
}

fn environment(source: &str) -> Result<Environment<'static>, LmError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.map_err(|e| LmError::template(message(&e)))?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment
        .add_template_owned(NAME, without_generation_marks(source))
        .map_err(|e| LmError::template(message(&e)))?;
    Ok(environment)
}

fn context(messages: &[ChatMessage], add_generation_prompt: bool, special: &SpecialTokens) -> Value {
    let turns = messages.iter().map(|message| {
        Value::from_pairs([
            ("role", message.role.as_str()),
            ("content", message.content.as_str()),
        ])
    });
    let mut names = vec![
        ("messages", turns.collect::<Value>()),
        ("add_generation_prompt", Value::from(add_generation_prompt)),
        ("tools", Value::from(())),
        ("documents", Value::from(())),
    ];
    // Only the tokens that exist: templates ask `if bos_token is defined`.
    for (name, token) in [
        ("bos_token", &special.bos_token),
        ("eos_token", &special.eos_token),
        ("pad_token", &special.pad_token),
        ("unk_token", &special.unk_token),
    ] {
        if let Some(token) = token {
            names.push((name, Value::from(token.as_str())));
        }
    }
    Value::from_pairs(names)
}

/// Takes as many bytes as a prompt may have.
#[derive(Default)]
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, IoError> {
        if self.0.len() + bytes.len() > MAX_PROMPT_BYTES {
            return Err(IoError::other("the prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        Ok(())
    }
}

/// Kind and detail on one line; minijinja's own Display may add the source.
fn message(error: &Error) -> String {
    let place = error
        .line()
        .map(|line| format!(" (line {line})"))
        .unwrap_or_default();
    match error.detail() {
        Some(detail) => format!("{detail}{place}"),
        None => format!("{}{place}", error.kind()),
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// transformers marks the assistant's text with `{% generation %}` tags; they do not change the prompt.
fn without_generation_marks(source: &str) -> String {
    let mut kept = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|at| start + at + 2) else {
            break;
        };
        let tag = &rest[start..end];
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        kept.push_str(&rest[..start]);
        match inner {
            // An empty comment trims the white space around it as the tag would have.
            "generation" | "endgeneration" => {
                kept.push_str(&tag.replace("{%", "{#").replace("%}", "#}"));
            }
            _ => kept.push_str(tag),
        }
        rest = &rest[end..];
    }
    kept.push_str(rest);
    kept
}

/// Python's `json.dumps(ensure_ascii=False)`, which has spaces after separators and escapes no HTML.
fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<Value> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("separators")?;
    let _: Option<Value> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let mut out = Limited::default();
    let formatter = PythonJson::new(indent)?;
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    // Values are many and small: each byte of text is about one unit of work.
    state.consume_fuel(out.0.len() as u64 / 4)?;
    Ok(Value::from(String::from_utf8_lossy(&out.0).into_owned()))
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
