//! A model's own chat template: Jinja as transformers runs it, under a step limit and an output limit. Templates
//! come from checkpoints only, never from a request.
//!
//! Fuel bounds time, not memory: a template can double a string in a variable. Who serves strangers' checkpoints
//! renders a trial in a process of its own first.
//!
//! Source of the environment: huggingface/transformers, `utils/chat_template_utils.py`.

use std::io::{Error as IoError, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};

use crate::tokenizer::SpecialTokens;
use crate::{LmError, MAX_PROMPT_BYTES};

const NAME: &str = "chat_template";
const FUEL: u64 = 5_000_000;
const MAX_SOURCE_BYTES: usize = 256 << 10;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    pub fn new(source: &str) -> Result<Self, LmError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(LmError::template(format!("larger than {MAX_SOURCE_BYTES} bytes")));
        }
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
        Ok(Self { environment })
    }

    /// The prompt of a conversation. A refusal of the template itself (`raise_exception`) is an error with its
    /// message.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        special: &SpecialTokens,
    ) -> Result<String, LmError> {
        let context = context(messages, add_generation_prompt, special);
        let mut output = Limited(Vec::new());
        let render = || {
            let template = self.environment.get_template(NAME)?;
            template.render_captured_to(context, &mut output).map(drop)
        };
        match catch_unwind(AssertUnwindSafe(render)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(LmError::template(message(&error))),
            Err(_) => return Err(LmError::template("rendering panicked")),
        }
        String::from_utf8(output.0).map_err(|_| LmError::template("rendered text is not UTF-8"))
    }
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
fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<Value> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("separators")?;
    let _: Option<Value> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(indent) if indent <= 16 => {
            let spaces = " ".repeat(indent);
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: indent is too large",
            ));
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonJson)),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from(String::from_utf8_lossy(&out).into_owned()))
}

struct PythonJson;

impl Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Result<(), IoError> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Result<(), IoError> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> Result<(), IoError> {
        out.write_all(b": ")
    }
}

/// The UTC date and time by a Python format; the directives that templates use.
fn strftime_now(format: String) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    strftime(&format, now)
}

fn strftime(format: &str, unix: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, second) = (unix / 86_400, unix % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('I') => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a count of days since 1970-01-01 (H. Hinnant, `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era_day = shifted % 146_097;
    let era_year = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
    let year_day = era_day - (365 * era_year + era_year / 4 - era_year / 100);
    let shifted_month = (5 * year_day + 2) / 153;
    let day = year_day - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = shifted / 146_097 * 400 + era_year + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
