//! What is asked and how answers count: tasks, read from JSON lines and settings into types that cannot be wrong.

use cauldron_checkpoint::Digest;
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::attack::Attack;

/// Items of one task at most, and bytes of its file.
pub const MAX_ITEMS: usize = 100_000;
pub const MAX_FILE_BYTES: u64 = 64 << 20;
const MAX_CHOICES: usize = 64;
const MAX_ANSWER_TOKENS: u64 = 4096;
const DEFAULT_ANSWER_TOKENS: u64 = 64;
/// Of a line that [`Task::to_json`] wrote: its prompt before an attack.
const UNATTACKED: &str = "prompt_before_attack";

/// A task that cannot be used. `field` is a path into what describes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {detail}")]
pub struct TaskError {
    pub field: String,
    pub detail: String,
}

impl TaskError {
    pub fn new(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            detail: detail.into(),
        }
    }
}

/// Kinds of tasks, and how their answers count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The model writes an answer, greedily.
    Generate,
    /// The likeliest of some continuations is the answer.
    Choice,
    /// How likely given continuations are.
    Loglikelihood,
    /// Another program asked; only its scores are here.
    Imported,
}

/// When a generated answer is right. Answers are trimmed.
#[derive(Debug, Clone)]
pub enum Match {
    /// It is one of the right ones.
    Exact,
    /// Its last number is that of a right one.
    Numeric,
    /// It contains a right one.
    Contains,
    /// What the first group of a pattern finds in it (or the whole match) is a right one.
    Regex(Regex),
}

impl Match {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Numeric => "numeric",
            Self::Contains => "contains",
            Self::Regex(_) => "regex",
        }
    }
}

/// One question.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Item {
    pub prompt: String,
    pub answer: Answer,
    /// The prompt before an attack changed it; decides on which side of a split the item is.
    #[serde(skip)]
    pub unattacked: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Right answers, any of them.
    Texts(Vec<String>),
    Choice {
        choices: Vec<String>,
        right: usize,
    },
    Continuation(String),
}

/// A task with its items.
#[derive(Debug, Clone)]
pub struct Task {
    pub name: String,
    pub kind: Kind,
    pub matching: Match,
    /// The metric that selects among models.
    pub metric: &'static str,
    pub max_tokens: usize,
    pub stop: Vec<String>,
    /// What attacks may change of a prompt: the first group, or the whole match. Without one, all of it.
    pub attack_within: Option<Regex>,
    /// What its items are already under.
    pub attack: Option<Attack>,
    pub items: Vec<Item>,
    /// Whether a written answer ends where it can no longer be right: the scores are the same, and wrong answers are cut.
    pub is_hasty: bool,
    /// Of all that decides the scores but the model.
    pub digest: Digest,
}

/// Settings of a task beside its items.
#[derive(Debug, Default)]
pub struct TaskSettings {
    pub name: Option<String>,
    pub file: Option<String>,
    pub items: Option<Vec<Value>>,
    kind: Option<String>,
    metric: Option<String>,
    pattern: Option<String>,
    max_tokens: Option<u64>,
    stop: Option<Vec<String>>,
    limit: Option<u64>,
    attack_within: Option<String>,
    /// An attack of its own.
    pub attack: Option<Attack>,
}

const FIELDS: &str =
    "name, file, items, kind, metric, pattern, max_tokens, stop, limit, attack, attack_within";

impl TaskSettings {
    /// Reads `{"file": ..., ...}`, or the name of a file; `field` is its place in the request.
    pub fn read(field: &str, value: Value) -> Result<Self, TaskError> {
        let bad = |name: &str, detail: &str| TaskError::new(format!("{field}.{name}"), detail);
        let mut fields = match value {
            Value::String(file) => {
                return Ok(Self {
                    file: Some(file),
                    ..Self::default()
                });
            }
            Value::Object(fields) => fields,
            _ => return Err(TaskError::new(field, "must be an object or the name of a file")),
        };
        let mut settings = Self::default();
        for (name, place) in [
            ("name", &mut settings.name),
            ("file", &mut settings.file),
            ("kind", &mut settings.kind),
            ("metric", &mut settings.metric),
            ("pattern", &mut settings.pattern),
            ("attack_within", &mut settings.attack_within),
        ] {
            *place = match take(&mut fields, name) {
                None => None,
                Some(Value::String(text)) => Some(text),
                Some(_) => return Err(bad(name, "must be a string")),
            };
        }
        for (name, place) in [
            ("max_tokens", &mut settings.max_tokens),
            ("limit", &mut settings.limit),
        ] {
            *place = match take(&mut fields, name) {
                None => None,
                Some(value) => {
                    let number = value.as_u64().filter(|number| *number > 0);
                    Some(number.ok_or_else(|| bad(name, "must be a whole number above 0"))?)
                }
            };
        }
        settings.items = match take(&mut fields, "items") {
            None => None,
            Some(Value::Array(items)) => Some(items),
            Some(_) => return Err(bad("items", "must be a list of objects")),
        };
        let stops = |value: Value| match value {
            Value::String(stop) => Some(vec![stop]),
            Value::Array(stops) => stops
                .into_iter()
                .map(|stop| stop.as_str().map(str::to_owned))
                .collect(),
            _ => None,
        };
        settings.stop = match take(&mut fields, "stop") {
            None => None,
            Some(value) => {
                let found: Option<Vec<String>> = stops(value);
                let sound = found.filter(|stops| {
                    stops.len() <= 16 && stops.iter().all(|stop| (1..=256).contains(&stop.len()))
                });
                Some(sound.ok_or_else(|| {
                    bad(
                        "stop",
                        "must be a string or a list of at most 16, each of 1 to 256 bytes",
                    )
                })?)
            }
        };
        let attack = take(&mut fields, "attack");
        settings.attack = attack
            .map(|attack| Attack::read(&format!("{field}.attack"), attack))
            .transpose()?;
        match fields.keys().next() {
            None => Ok(settings),
            Some(unknown) => {
                let shown: String = unknown.chars().take(100).collect();
                Err(bad(&shown, &format!("unknown field; known are {FIELDS}")))
            }
        }
    }

    /// The task, with the items of its file if it has one.
    pub fn with_items(self, field: &str, items: Vec<Value>) -> Result<Task, TaskError> {
        let bad = |name: &str, detail: String| TaskError::new(format!("{field}.{name}"), detail);
        let kind = match self.kind.as_deref() {
            Some("generate") => Kind::Generate,
            Some("choice") => Kind::Choice,
            Some("loglikelihood") => Kind::Loglikelihood,
            Some(_) => return Err(bad("kind", "must be generate, choice or loglikelihood".into())),
            None if items.first().is_some_and(|item| item.get("choices").is_some()) => Kind::Choice,
            None if items.first().is_some_and(|item| item.get("text").is_some()) => Kind::Loglikelihood,
            None => Kind::Generate,
        };
        let (matching, metric) = matching(kind, self.metric.as_deref(), self.pattern.as_deref())
            .map_err(|(name, detail)| bad(name, detail))?;
        let attack_within = self.attack_within.as_deref().map(compiled).transpose();
        let attack_within = attack_within.map_err(|detail| bad("attack_within", detail))?;
        let max_tokens = self.max_tokens.unwrap_or(DEFAULT_ANSWER_TOKENS);
        if max_tokens > MAX_ANSWER_TOKENS {
            return Err(bad("max_tokens", format!("at most {MAX_ANSWER_TOKENS}")));
        }
        let limit = self.limit.map_or(usize::MAX, |limit| limit as usize);
        if items.is_empty() {
            return Err(bad("items", "there are none".into()));
        }
        if items.len().min(limit) > MAX_ITEMS {
            return Err(bad("items", format!("at most {MAX_ITEMS}")));
        }
        let items = items.into_iter().take(limit).enumerate();
        let items: Vec<Item> = items
            .map(|(index, value)| item(kind, value).map_err(|detail| bad(&format!("items[{index}]"), detail)))
            .collect::<Result<_, _>>()?;
        let name = self.name.or(self.file).unwrap_or_else(|| "task".to_owned());
        let stop = self.stop.unwrap_or_default();
        let digest = digest(kind, &matching, max_tokens, &stop, &items, false);
        Ok(Task {
            name: name.chars().take(100).collect(),
            kind,
            matching,
            metric,
            max_tokens: max_tokens as usize,
            stop,
            attack_within,
            attack: None,
            items,
            is_hasty: false,
            digest,
        })
    }
}

impl Task {
    /// Some of its items, as a task of their own.
    pub fn subset(&self, which: &dyn Fn(usize) -> bool) -> Self {
        let items = self.items.iter().enumerate().filter(|(index, _)| which(*index));
        self.with(items.map(|(_, item)| item.clone()).collect())
    }

    /// The same task with other items.
    pub fn with(&self, items: Vec<Item>) -> Self {
        Self {
            digest: digest(
                self.kind,
                &self.matching,
                self.max_tokens as u64,
                &self.stop,
                &items,
                self.is_hasty,
            ),
            items,
            ..self.clone()
        }
    }

    /// For whoever wants the scores alone.
    pub fn hasty(&self) -> Self {
        let is_hasty = self.kind == Kind::Generate && matches!(self.matching, Match::Exact);
        let hasty = Self {
            is_hasty,
            ..self.clone()
        };
        hasty.with(self.items.clone())
    }

    /// What [`Task::from_json`] makes it of again.
    pub fn to_json(&self) -> Value {
        let items = self.items.iter().map(|item| {
            let mut line = match &item.answer {
                Answer::Texts(texts) => json!({"prompt": item.prompt, "answers": texts}),
                Answer::Choice { choices, right } => {
                    json!({"prompt": item.prompt, "choices": choices, "answer": right})
                }
                Answer::Continuation(text) => json!({"prompt": item.prompt, "completion": text}),
            };
            if let Some(unattacked) = &item.unattacked {
                line[UNATTACKED] = unattacked.as_str().into();
            }
            line
        });
        let mut out = json!({
            "name": self.name,
            "kind": self.kind,
            "metric": self.metric,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "items": items.collect::<Vec<_>>(),
        });
        if let Match::Regex(pattern) = &self.matching {
            out["pattern"] = pattern.as_str().into();
        }
        if let Some(attack) = &self.attack {
            out["attack"] = json!(attack);
        }
        out
    }

    /// Reads [`Self::to_json`] back.
    pub fn from_json(value: Value) -> Result<Self, TaskError> {
        let mut settings = TaskSettings::read("task", value)?;
        let items = settings.items.take().unwrap_or_default();
        let before = |item: &Value| item.get(UNATTACKED).and_then(Value::as_str).map(str::to_owned);
        let unattacked: Vec<Option<String>> = items.iter().map(before).collect();
        let attack = settings.attack.take();
        let mut task = settings.with_items("task", items)?;
        task.attack = attack;
        for (item, unattacked) in task.items.iter_mut().zip(unattacked) {
            item.unattacked = unattacked;
        }
        Ok(task)
    }
}

fn take(fields: &mut Map<String, Value>, name: &str) -> Option<Value> {
    fields.remove(name).filter(|value| !value.is_null())
}

fn compiled(pattern: &str) -> Result<Regex, String> {
    let compiled = regex::RegexBuilder::new(pattern).size_limit(1 << 20).build();
    compiled.map_err(|e| e.to_string())
}

/// How answers are matched, and the metric that selects.
fn matching(
    kind: Kind,
    metric: Option<&str>,
    pattern: Option<&str>,
) -> Result<(Match, &'static str), (&'static str, String)> {
    if pattern.is_some() && metric != Some("regex") {
        return Err(("pattern", "is of the metric regex".into()));
    }
    let found = match (kind, metric) {
        (Kind::Generate, None | Some("exact")) => (Match::Exact, "exact"),
        (Kind::Generate, Some("numeric")) => (Match::Numeric, "numeric"),
        (Kind::Generate, Some("contains")) => (Match::Contains, "contains"),
        (Kind::Generate, Some("regex")) => {
            let pattern = pattern.ok_or_else(|| ("pattern", "is required for regex".to_owned()))?;
            (
                Match::Regex(compiled(pattern).map_err(|detail| ("pattern", detail))?),
                "regex",
            )
        }
        (Kind::Choice, None | Some("acc")) => (Match::Exact, "acc"),
        (Kind::Choice, Some("acc_norm")) => (Match::Exact, "acc_norm"),
        (Kind::Choice, Some("mcc")) => (Match::Exact, "mcc"),
        (Kind::Choice, Some("brier")) => (Match::Exact, "brier"),
        (Kind::Loglikelihood, None | Some("perplexity")) => (Match::Exact, "perplexity"),
        (Kind::Loglikelihood, Some("loglikelihood")) => (Match::Exact, "loglikelihood"),
        (Kind::Loglikelihood, Some("greedy")) => (Match::Exact, "greedy"),
        (kind, _) => {
            let known = match kind {
                Kind::Generate => "exact, numeric, contains, regex",
                Kind::Choice => "acc, acc_norm, mcc, brier",
                Kind::Loglikelihood => "perplexity, loglikelihood, greedy",
                Kind::Imported => "those of the program that asked",
            };
            return Err(("metric", format!("must be one of {known}")));
        }
    };
    Ok(found)
}

/// Reads one line. Fields that are not ours stay what they are: task files carry all sorts of notes.
fn item(kind: Kind, value: Value) -> Result<Item, String> {
    let Value::Object(mut fields) = value else {
        return Err("must be an object".into());
    };
    let text = |fields: &mut Map<String, Value>, names: &[&str]| -> Result<Option<String>, String> {
        for name in names {
            match fields.remove(*name) {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) => return Ok(Some(text)),
                Some(_) => return Err(format!("{name} must be a string")),
            }
        }
        Ok(None)
    };
    let answer = match kind {
        Kind::Generate => {
            let many = fields.remove("answers").filter(|value| !value.is_null());
            let texts = match many {
                Some(Value::Array(answers)) => answers
                    .iter()
                    .map(|answer| answer.as_str().map(str::to_owned))
                    .collect::<Option<Vec<_>>>()
                    .ok_or("answers must be strings")?,
                Some(_) => return Err("answers must be a list of strings".into()),
                None => vec![
                    text(&mut fields, &["answer", "completion"])?
                        .ok_or("has neither answer nor completion")?,
                ],
            };
            if texts.is_empty() {
                return Err("answers is empty".into());
            }
            Answer::Texts(texts)
        }
        Kind::Choice => {
            let Some(Value::Array(choices)) = fields.remove("choices") else {
                return Err("choices must be a list of strings".into());
            };
            let choices: Option<Vec<String>> =
                choices.iter().map(|c| c.as_str().map(str::to_owned)).collect();
            let choices = choices.ok_or("choices must be strings")?;
            let sound =
                (2..=MAX_CHOICES).contains(&choices.len()) && choices.iter().all(|choice| !choice.is_empty());
            if !sound {
                return Err(format!("choices must be 2 to {MAX_CHOICES} texts, none empty"));
            }
            let right = fields.remove("answer").or_else(|| fields.remove("completion"));
            let right = match right {
                Some(Value::String(text)) => choices.iter().position(|choice| *choice == text),
                Some(Value::Number(index)) => index.as_u64().map(|index| index as usize),
                _ => None,
            };
            let right = right.filter(|right| *right < choices.len());
            Answer::Choice {
                right: right.ok_or("answer must be one of the choices, or its index")?,
                choices,
            }
        }
        Kind::Loglikelihood => {
            let text = text(&mut fields, &["completion", "text"])?.filter(|text| !text.is_empty());
            Answer::Continuation(text.ok_or("has neither completion nor text")?)
        }
        Kind::Imported => return Err("is not asked here".into()),
    };
    let prompt = text(&mut fields, &["prompt", "context"])?;
    if prompt.is_none() && kind != Kind::Loglikelihood {
        return Err("has no prompt".into());
    }
    Ok(Item {
        prompt: prompt.unwrap_or_default(),
        answer,
        unattacked: None,
    })
}

/// The version of what is done with a task; part of its digest.
const VERSION: u32 = 1;

fn digest(
    kind: Kind,
    matching: &Match,
    max_tokens: u64,
    stop: &[String],
    items: &[Item],
    is_hasty: bool,
) -> Digest {
    let pattern = match matching {
        Match::Regex(pattern) => Some(pattern.as_str()),
        _ => None,
    };
    let mut all = json!({
        "version": VERSION,
        "kind": kind,
        "matching": matching.name(),
        "pattern": pattern,
        "max_tokens": (kind == Kind::Generate).then_some(max_tokens),
        "stop": stop,
        "items": items,
    });
    if is_hasty {
        all["hasty"] = true.into();
    }
    Digest::of(all.to_string().as_bytes())
}

/// The objects of a file of JSON lines.
pub fn parse_lines(bytes: &[u8]) -> Result<Vec<Value>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let values = lines
        .map(|(number, line)| serde_json::from_str(line).map_err(|e| format!("line {}: {e}", number + 1)));
    values.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(settings: Value, items: Vec<Value>) -> Result<Task, TaskError> {
        TaskSettings::read("tasks[0]", settings)?.with_items("tasks[0]", items)
    }

    #[test]
    fn kinds_follow_from_the_items_and_bad_ones_are_named() {
        let math = json!({"prompt": "1+1=", "completion": " 2", "kind": "add"});
        let choice = json!({"prompt": "a", "choices": [" x", " y"], "answer": " y"});
        let text = json!({"text": "all of it"});
        let made = task(json!("math.jsonl"), vec![math.clone()]).expect("a task");
        assert_eq!(
            (made.kind, made.metric, made.name.as_str()),
            (Kind::Generate, "exact", "math.jsonl")
        );
        let made = task(json!({"metric": "mcc"}), vec![choice.clone()]).expect("a task");
        assert_eq!((made.kind, made.metric), (Kind::Choice, "mcc"));
        assert_eq!(
            task(json!({}), vec![text]).expect("a task").kind,
            Kind::Loglikelihood
        );
        for (settings, items, field) in [
            (json!({"kinds": "x"}), vec![math.clone()], "tasks[0].kinds"),
            (json!({"kind": "x"}), vec![math.clone()], "tasks[0].kind"),
            (json!({"metric": "acc"}), vec![math.clone()], "tasks[0].metric"),
            (json!({"metric": "regex"}), vec![math.clone()], "tasks[0].pattern"),
            (
                json!({"metric": "regex", "pattern": "("}),
                vec![math.clone()],
                "tasks[0].pattern",
            ),
            (json!({"limit": 0}), vec![math.clone()], "tasks[0].limit"),
            (json!({"stop": [1]}), vec![math.clone()], "tasks[0].stop"),
            (json!({}), vec![], "tasks[0].items"),
            (
                json!({}),
                vec![math.clone(), json!({"prompt": "x"})],
                "tasks[0].items[1]",
            ),
            (
                json!({}),
                vec![json!({"prompt": "x", "choices": ["a", "b"], "answer": 2})],
                "tasks[0].items[0]",
            ),
            (json!(3), vec![math.clone()], "tasks[0]"),
        ] {
            let error = task(settings, items).expect_err(field);
            assert_eq!(error.field, field, "{error}");
        }
    }

    #[test]
    fn the_digest_is_of_what_decides_the_scores() {
        let items = || vec![json!({"prompt": "1+1=", "completion": " 2"})];
        let of = |settings: Value| task(settings, items()).expect("a task").digest;
        let plain = of(json!({}));
        assert_eq!(of(json!({"name": "other"})), plain);
        let noted = task(
            json!({}),
            vec![json!({"prompt": "1+1=", "completion": " 2", "note": 1})],
        );
        assert_eq!(noted.expect("a task").digest, plain);
        let made = task(json!({"metric": "regex", "pattern": "(\\d)"}), items()).expect("a task");
        let again = Task::from_json(made.to_json()).expect("a task");
        assert_eq!(again.digest, made.digest);
        assert_eq!(made.subset(&|_| true).digest, made.digest);
        assert_eq!(made.subset(&|_| false).items.len(), 0);
        for other in [
            json!({"max_tokens": 3}),
            json!({"stop": "\n"}),
            json!({"metric": "numeric"}),
        ] {
            assert_ne!(of(other.clone()), plain, "{other}");
        }
    }
}
