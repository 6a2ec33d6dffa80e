//! Attacks on prompts, for robustness as the paper measures it (arXiv 2502.15434, section 4, after PromptBench, arXiv
//! 2306.04528): transforms of a task's items that follow from a seed and ask no model that is scored, so that every model meets
//! the same prompts.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::LazyLock;

use cauldron_checkpoint::Digest;
use cauldron_lm::{MAX_PROMPT_BYTES, MaskedLm};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::task::{Answer, Item, Task, TaskError};

/// Share of the words that an attack on words changes.
const DEFAULT_RATE: f64 = 0.2;
/// Words of fewer letters are left alone: there is nothing inside them to mistake.
const LEAST_LETTERS: usize = 4;
/// Of a masked language model's guesses for a word, the likeliest that one is taken of.
const GUESSES: usize = 8;
/// What is appended once or repeatedly, and how often: the word overlap, negation and length tests of Naik et al. (2018).
const TAUTOLOGIES: [(&str, usize); 3] = [
    (" and true is true", 1),
    (" and false is not true", 1),
    (" and true is true", 5),
];

/// What is done to prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attack {
    pub kind: AttackKind,
    pub seed: u64,
    /// Share of the words that are changed; none for `stress_test`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// `bert`: folder of the masked language model under --models-dir.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttackKind {
    /// Characters: letters of a word swapped, replaced, left out or added (Gao et al. 2018, arXiv 1801.04354).
    DeepWordBug,
    /// Sentences: a tautology is appended (Naik et al. 2018, arXiv 1806.00692).
    StressTest,
    /// Words: synonyms of WordNet 3.0 (`synonyms.txt`).
    Synonyms,
    /// Words: what a masked language model puts in their place (Li et al. 2020, arXiv 2004.09984).
    Bert,
}

const KINDS: [(&str, AttackKind); 4] = [
    ("deep_word_bug", AttackKind::DeepWordBug),
    ("stress_test", AttackKind::StressTest),
    ("synonyms", AttackKind::Synonyms),
    ("bert", AttackKind::Bert),
];

impl AttackKind {
    pub fn name(self) -> &'static str {
        KINDS
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("", |(name, _)| name)
    }
}

impl Attack {
    /// Reads the name of a kind, or `{"kind", "seed", "rate", "model"}`; `field` is its place in the request.
    pub fn read(field: &str, value: Value) -> Result<Self, TaskError> {
        let bad = |name: &str, detail: &str| TaskError::new(format!("{field}.{name}"), detail);
        let mut fields = match value {
            Value::String(kind) => Map::from_iter([("kind".to_owned(), Value::String(kind))]),
            Value::Object(fields) => fields,
            _ => {
                return Err(TaskError::new(
                    field,
                    "must be an object or the name of an attack",
                ));
            }
        };
        let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
        let (kind, seed, rate, model) = (take("kind"), take("seed"), take("rate"), take("model"));
        if let Some(unknown) = fields.keys().next() {
            let shown: String = unknown.chars().take(100).collect();
            return Err(bad(&shown, "unknown field; known are kind, seed, rate, model"));
        }
        let kind = kind.as_ref().and_then(Value::as_str);
        let kind = KINDS
            .iter()
            .find(|(name, _)| Some(*name) == kind)
            .map(|(_, kind)| *kind);
        let kind = kind.ok_or_else(|| bad("kind", "must be deep_word_bug, stress_test, synonyms or bert"))?;
        let seed = seed.map_or(Some(0), |seed| seed.as_u64());
        let rate = match (kind, rate) {
            (AttackKind::StressTest, None) => None,
            (AttackKind::StressTest, Some(_)) => return Err(bad("rate", "is of attacks on words")),
            (_, rate) => {
                let rate = rate.map_or(Some(DEFAULT_RATE), |rate| rate.as_f64());
                let rate = rate.filter(|rate| *rate > 0.0 && *rate <= 1.0);
                Some(rate.ok_or_else(|| bad("rate", "must be a number above 0, at most 1"))?)
            }
        };
        let model = match (kind, model) {
            (AttackKind::Bert, Some(Value::String(model))) => Some(model),
            (AttackKind::Bert, _) => {
                return Err(bad(
                    "model",
                    "must be the folder of a masked language model under --models-dir",
                ));
            }
            (_, None) => None,
            (_, Some(_)) => return Err(bad("model", "is of the attack bert")),
        };
        Ok(Self {
            kind,
            seed: seed.ok_or_else(|| bad("seed", "must be a whole number"))?,
            rate,
            model,
        })
    }

    /// The task under attack, and how many of its prompts are others now. `masked` is the model of `bert`. Blocks.
    pub fn on(
        &self,
        field: &str,
        task: &Task,
        masked: Option<&MaskedLm>,
    ) -> Result<(Task, usize), TaskError> {
        let mut changed = 0;
        let mut items = Vec::with_capacity(task.items.len());
        for (index, item) in task.items.iter().enumerate() {
            let bad = |detail: String| TaskError::new(format!("{field}.items[{index}]"), detail);
            let mut item = item.clone();
            if let Some(range) = target(task, &item).map_err(|detail| bad(detail.to_owned()))? {
                let text = self.text(&item.prompt, range.clone(), masked).map_err(bad)?;
                if text != item.prompt[range.clone()] {
                    changed += 1;
                    let before = std::mem::take(&mut item.prompt);
                    item.prompt = format!("{}{text}{}", &before[..range.start], &before[range.end..]);
                    item.unattacked.get_or_insert(before);
                }
            }
            items.push(item);
        }
        if changed == 0 {
            let detail = format!("the attack {} changes none of its prompts", self.kind.name());
            return Err(TaskError::new(field, detail));
        }
        Ok((task.with(items), changed))
    }

    /// A part of a prompt under attack.
    fn text(&self, prompt: &str, within: Range<usize>, masked: Option<&MaskedLm>) -> Result<String, String> {
        let text = &prompt[within.clone()];
        // All chance is of the seed and the text: the same prompt is attacked in the same way in every task.
        let all = format!("cauldron attack v1\n{}\n{}\n{text}", self.kind.name(), self.seed);
        let all = Digest::of(all.as_bytes());
        let chance = |what: &str, index: usize| {
            let digest = Digest::of(format!("{all}\n{what}\n{index}").as_bytes());
            let first: [u8; 8] = std::array::from_fn(|byte| digest.as_bytes()[byte]);
            u64::from_be_bytes(first)
        };
        if self.kind == AttackKind::StressTest {
            let (tautology, times) = TAUTOLOGIES[chance("which", 0) as usize % TAUTOLOGIES.len()];
            // Before the mark that ends the text.
            let end = text
                .trim_end_matches(|c: char| c.is_whitespace() || ".!?:".contains(c))
                .len();
            let (text, end) = text.split_at(end);
            return Ok(format!("{text}{}{end}", tautology.repeat(times)));
        }
        let words: Vec<Range<usize>> = words(text)
            .filter(|word| self.may_change(&text[word.clone()]))
            .collect();
        let wanted = (self.rate.unwrap_or(DEFAULT_RATE) * words.len() as f64).ceil() as usize;
        let mut ranked: Vec<usize> = (0..words.len()).collect();
        ranked.sort_by_cached_key(|index| (chance("rank", *index), *index));
        let expected = masked
            .filter(|_| !words.is_empty())
            .map(|masked| masked.read(prompt))
            .transpose();
        let expected = expected.map_err(|e| e.to_string())?;
        let mut replaced: HashMap<usize, String> = HashMap::new();
        for index in ranked {
            if replaced.len() == wanted {
                break;
            }
            let range = words[index].clone();
            let word = &text[range.clone()];
            let draw = chance("draw", index);
            let other = match (self.kind, &expected) {
                (AttackKind::DeepWordBug, _) => Some(misspelt(word, draw)),
                (AttackKind::Bert, Some(expected)) => {
                    let place = within.start + range.start..within.start + range.end;
                    let guesses = expected.instead_of(prompt, &place, GUESSES);
                    pick(&guesses, draw).map(|guess| in_case_of(word, guess))
                }
                _ => pick(synonyms(word), draw).map(|synonym| in_case_of(word, synonym)),
            };
            if let Some(other) = other {
                replaced.insert(range.start, other);
            }
        }
        let mut out = String::with_capacity(text.len() + 16);
        let mut done = 0;
        for range in words {
            if let Some(other) = replaced.get(&range.start) {
                out.push_str(&text[done..range.start]);
                out.push_str(other);
                done = range.end;
            }
        }
        out.push_str(&text[done..]);
        Ok(out)
    }

    fn may_change(&self, word: &str) -> bool {
        match self.kind {
            AttackKind::Synonyms => !synonyms(word).is_empty(),
            _ => word.chars().count() >= LEAST_LETTERS,
        }
    }
}

/// The part of a prompt that an attack may change. Texts without a prompt are what is scored, not what is asked.
fn target(task: &Task, item: &Item) -> Result<Option<Range<usize>>, &'static str> {
    if matches!(item.answer, Answer::Continuation(_)) && item.prompt.is_empty() {
        return Ok(None);
    }
    if item.prompt.len() > MAX_PROMPT_BYTES {
        return Err("the prompt is too long");
    }
    let Some(pattern) = &task.attack_within else {
        return Ok(Some(0..item.prompt.len()));
    };
    let found = pattern.captures(&item.prompt);
    let found = found.and_then(|found| found.get(1).or(found.get(0)));
    let found = found.ok_or("attack_within of the task finds nothing in its prompt")?;
    Ok(Some(found.range()))
}

/// Runs of letters.
fn words(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut rest = text.char_indices().peekable();
    std::iter::from_fn(move || {
        let (start, first) = rest.find(|(_, c)| c.is_alphabetic())?;
        let mut end = start + first.len_utf8();
        while let Some((at, c)) = rest.next_if(|(_, c)| c.is_alphabetic()) {
            end = at + c.len_utf8();
        }
        Some(start..end)
    })
}

fn pick<T>(of: &[T], draw: u64) -> Option<&T> {
    of.get((draw % of.len().max(1) as u64) as usize)
}

/// One of DeepWordBug's four transformers, on a letter after the first.
fn misspelt(word: &str, draw: u64) -> String {
    let mut letters: Vec<char> = word.chars().collect();
    let at = 1 + (draw >> 8) as usize % (letters.len() - 1);
    let before = letters[at];
    // Another letter than the one that is there.
    let other = {
        let from = (before.to_ascii_lowercase() as u32).wrapping_sub('a' as u32) % 26;
        let shifted = (from + 1 + (draw >> 32) as u32 % 25) % 26;
        let letter = char::from(b'a' + shifted as u8);
        if before.is_uppercase() {
            letter.to_ascii_uppercase()
        } else {
            letter
        }
    };
    match draw % 4 {
        // With the one before it, where that is another one and not the first.
        0 if at > 1 && letters[at - 1] != before => letters.swap(at - 1, at),
        0 | 1 => letters[at] = other,
        2 => {
            letters.remove(at);
        }
        _ => letters.insert(at, other),
    }
    letters.into_iter().collect()
}

/// The other word, written as the first is.
fn in_case_of(word: &str, other: impl AsRef<str>) -> String {
    let other = other.as_ref();
    let mut letters = word.chars();
    let first_is_upper = letters.next().is_some_and(char::is_uppercase);
    if first_is_upper && letters.clone().count() > 0 && letters.all(char::is_uppercase) {
        return other.to_uppercase();
    }
    let mut chars = other.chars();
    match chars.next() {
        Some(first) if first_is_upper => first.to_uppercase().chain(chars).collect(),
        _ => other.to_owned(),
    }
}

static SYNONYMS: LazyLock<HashMap<&str, Vec<&str>>> = LazyLock::new(|| {
    let lines = include_str!("synonyms.txt").lines();
    let entries = lines.filter(|line| !line.starts_with('#')).filter_map(|line| {
        let mut words = line.split(' ');
        Some((words.next()?, words.collect()))
    });
    entries.collect()
});

fn synonyms(word: &str) -> &'static [&'static str] {
    let word = word.to_lowercase();
    SYNONYMS.get(word.as_str()).map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::eval::{Split, TaskSettings};

    fn attack(value: Value) -> Attack {
        Attack::read("attack", value).expect("an attack")
    }

    fn attacked(value: Value, text: &str) -> String {
        attack(value).text(text, 0..text.len(), None).expect("a text")
    }

    const TEXT: &str = "Review: The last MOVIE was boring, and the Organizer announced nothing else.";

    fn parts(text: &str) -> Vec<&str> {
        text.split(' ').collect()
    }

    #[test]
    fn characters_are_mistaken_in_some_words_and_the_same_ones_each_time() {
        let once = attacked(json!({"kind": "deep_word_bug", "rate": 0.3}), TEXT);
        assert_eq!(
            once,
            attacked(json!({"kind": "deep_word_bug", "rate": 0.3}), TEXT)
        );
        assert_ne!(
            once,
            attacked(json!({"kind": "deep_word_bug", "rate": 0.3, "seed": 1}), TEXT)
        );
        let changed = |out: &str| {
            parts(TEXT)
                .iter()
                .zip(parts(out))
                .filter(|(a, b)| **a != *b)
                .count()
        };
        // Of eight words of four letters or more: Review, last, MOVIE, boring, Organizer, announced, nothing, else.
        assert_eq!(changed(&once), 3, "{once}");
        assert_eq!(
            changed(&attacked(json!({"kind": "deep_word_bug", "rate": 1}), TEXT)),
            8
        );
        assert_eq!(changed(&attacked(json!("deep_word_bug"), TEXT)), 2);
        assert_eq!(attacked(json!("deep_word_bug"), "2+2 is it"), "2+2 is it");
        for draw in 0..10_000u64 {
            let draw = draw.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for word in ["lovely", "noon", "ÄÖÜß", "moon"] {
                let other = misspelt(word, draw);
                assert_ne!(other, word);
                assert_eq!(other.chars().next(), word.chars().next());
                assert!(other.chars().count().abs_diff(word.chars().count()) <= 1);
            }
        }
    }

    #[test]
    fn sentences_get_a_tautology_before_their_end() {
        let ends: std::collections::HashSet<String> = (0..50)
            .map(|seed| attacked(json!({"kind": "stress_test", "seed": seed}), "A plain one."))
            .collect();
        let long = format!("A plain one{}.", " and true is true".repeat(5));
        let expected = [
            "A plain one and true is true.",
            "A plain one and false is not true.",
            &long,
        ];
        assert_eq!(ends, expected.into_iter().map(str::to_owned).collect());
    }

    #[test]
    fn words_become_synonyms_written_as_they_are() {
        let out = attacked(json!({"kind": "synonyms", "rate": 1}), TEXT);
        let (before, after) = (parts(TEXT), parts(&out));
        assert_eq!(before.len(), after.len(), "{out}");
        let known = |word: &str, other: &str| {
            let bare = |word: &str| word.trim_matches(|c: char| !c.is_alphabetic()).to_lowercase();
            synonyms(&bare(word)).contains(&bare(other).as_str())
        };
        let changed: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).collect();
        assert!(
            changed.len() >= 3 && changed.iter().all(|(a, b)| known(a, b)),
            "{out}"
        );
        let film = after[3];
        assert!(film.chars().all(char::is_uppercase) && film != "MOVIE", "{out}");
        assert!(SYNONYMS.len() > 9000);
        assert!(
            SYNONYMS
                .iter()
                .all(|(word, others)| !others.is_empty() && !others.contains(word))
        );
    }

    #[test]
    fn only_what_may_be_attacked_is_and_items_stay_on_their_side() {
        let items: Vec<Value> = (0..40)
            .map(|i| json!({"prompt": format!("Review: it was boring {i}.\nSentiment:"), "completion": " bad"}))
            .collect();
        let read = |settings: Value| {
            let settings = TaskSettings::read("tasks[0]", settings).expect("settings");
            settings.with_items("tasks[0]", items.clone()).expect("a task")
        };
        let task = read(json!({"attack_within": "Review: (.*)"}));
        assert_eq!(task.digest, read(json!({})).digest);
        let (under, changed) = attack(json!("synonyms"))
            .on("tasks[0]", &task, None)
            .expect("a task");
        assert_eq!(changed, 40);
        assert_ne!(under.digest, task.digest);
        for (item, before) in under.items.iter().zip(&task.items) {
            assert!(
                item.prompt.starts_with("Review: ") && item.prompt.ends_with(".\nSentiment:"),
                "{item:?}"
            );
            assert_eq!(item.unattacked.as_ref(), Some(&before.prompt));
        }
        let split = Split { seed: 3, dev: 0.5 };
        assert_eq!(split.of(&under), split.of(&task));
        let again = Task::from_json(under.to_json()).expect("a task");
        assert_eq!((again.digest, split.of(&again)), (under.digest, split.of(&task)));
        let error =
            attack(json!("synonyms")).on("tasks[0]", &read(json!({"attack_within": "Title: (.*)"})), None);
        assert_eq!(error.expect_err("no such part").field, "tasks[0].items[0]");
        let error = attack(json!("synonyms")).on("tasks[0]", &read(json!({"attack_within": "\\d+"})), None);
        assert_eq!(error.expect_err("nothing to change").field, "tasks[0]");
        // What is scored is not what is asked.
        let texts = TaskSettings::read("tasks[0]", json!({})).expect("settings");
        let items = vec![
            json!({"text": "boring"}),
            json!({"prompt": "boring", "completion": "x", "text": "y"}),
        ];
        let texts = texts.with_items("tasks[0]", items).expect("a task");
        let (under, changed) = attack(json!("stress_test"))
            .on("tasks[0]", &texts, None)
            .expect("a task");
        assert_eq!((changed, under.items[0].prompt.as_str()), (1, ""));
    }

    #[test]
    fn what_is_no_attack_is_named() {
        for (value, field) in [
            (json!(1), "attack"),
            (json!("typos"), "attack.kind"),
            (json!({"seed": 1}), "attack.kind"),
            (json!({"kind": "synonyms", "seed": -1}), "attack.seed"),
            (json!({"kind": "synonyms", "rate": 0}), "attack.rate"),
            (json!({"kind": "stress_test", "rate": 0.5}), "attack.rate"),
            (json!({"kind": "synonyms", "model": "x"}), "attack.model"),
            (json!("bert"), "attack.model"),
            (json!({"kind": "synonyms", "strength": 1}), "attack.strength"),
        ] {
            let error = Attack::read("attack", value).expect_err(field);
            assert_eq!(error.field, field, "{error}");
        }
    }
}
