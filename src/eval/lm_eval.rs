//! Results that lm-eval wrote, as scores.

use cauldron_checkpoint::Digest;
use serde_json::{Map, Value};

use super::metric::{Metric, is_better_higher};
use super::task::{Kind, TaskError};
use super::{MAX_TASKS, Scores, TaskRecord, TaskScores};

/// Metrics of a task, and bytes of the name of one.
const MAX_METRICS: usize = 256;
const MAX_KEY_BYTES: usize = 100;

/// A task of lm-eval with what it found.
#[derive(Debug, Clone)]
pub struct Imported {
    pub record: TaskRecord,
    pub scores: TaskScores,
}

impl Imported {
    /// Of the metric that selects.
    pub fn selecting(&self) -> Option<Metric> {
        self.scores.all.get(&self.record.metric)
    }
}

/// Reads `results_*.json`: every task in it, groups left aside (their tasks are there too). `metric` selects, as
/// `acc_norm` or `acc_norm,none`; without it the first that a task has. `field` is the file's place in the request.
pub fn read_results(field: &str, file: &Value, metric: Option<&str>) -> Result<Vec<Imported>, TaskError> {
    let bad = |path: &str, detail: String| TaskError::new(format!("{field}{path}"), detail);
    let results = file.get("results").and_then(Value::as_object);
    let results = results.ok_or_else(|| {
        bad(
            ".results",
            "is missing: this is no results file of lm-eval".into(),
        )
    })?;
    let groups = file.get("groups").and_then(Value::as_object);
    // Groups are among the results; those without a number of their own are told by their tasks alone.
    let has_tasks = |name: &String| {
        let tasks = file
            .get("group_subtasks")
            .and_then(|all| all.get(name)?.as_array());
        tasks.is_some_and(|tasks| !tasks.is_empty())
    };
    let is_group = |name: &String| groups.is_some_and(|groups| groups.contains_key(name)) || has_tasks(name);
    let own = results.iter().filter(|(name, _)| !is_group(name));
    let mut found = Vec::new();
    for (name, numbers) in own {
        let shown: String = name.chars().take(100).collect();
        let path = format!(".results.{shown}");
        let numbers = numbers
            .as_object()
            .ok_or_else(|| bad(&path, "must be an object".into()))?;
        let items = file
            .get("n-samples")
            .and_then(|n| n.get(name)?.get("effective")?.as_u64());
        let items = items.unwrap_or(0).min(u64::from(u32::MAX)) as usize;
        let scores = scores(numbers, items);
        let selecting = scores.0.iter().find(|(name, _)| {
            metric.is_none_or(|metric| name == metric || name.split(',').next() == Some(metric))
        });
        let Some((selecting, _)) = selecting else {
            let names: Vec<&str> = scores.0.iter().map(|(name, _)| name.as_str()).take(20).collect();
            let detail = match (metric, names.as_slice()) {
                (Some(metric), [_, ..]) => format!("has no {metric}, but {}", names.join(" ")),
                _ => "has no metric with a finite value".to_owned(),
            };
            return Err(bad(&path, detail));
        };
        let bare = selecting.split(',').next().unwrap_or_default();
        let direction = file
            .get("higher_is_better")
            .and_then(|all| all.get(name)?.get(bare)?.as_bool());
        found.push(Imported {
            record: TaskRecord {
                name: shown,
                digest: identity(file, name, numbers),
                kind: Kind::Imported,
                metric: selecting.clone(),
                metrics: scores.0.iter().map(|(name, _)| name.clone()).collect(),
                less_is_better: Some(!direction.unwrap_or_else(|| is_better_higher(bare))),
                attack: None,
                items,
                parts: String::new(),
                attacked: None,
            },
            scores: TaskScores {
                all: scores,
                dev: None,
                test: None,
            },
        });
    }
    match found.len() {
        0 => Err(bad(".results", "has no task".into())),
        1..=MAX_TASKS => Ok(found),
        _ => Err(bad(".results", format!("has more than {MAX_TASKS} tasks"))),
    }
}

/// `acc,none` with `acc_stderr,none`.
fn scores(numbers: &Map<String, Value>, items: usize) -> Scores {
    let named = numbers.iter().filter_map(|(key, value)| {
        let (name, filter) = key.split_once(',')?;
        let value = value
            .as_f64()
            .filter(|value| value.is_finite() && !name.ends_with("_stderr"))?;
        let stderr = numbers
            .get(&format!("{name}_stderr,{filter}"))
            .and_then(Value::as_f64);
        let metric = Metric {
            value,
            stderr: stderr.filter(|stderr| stderr.is_finite() && *stderr >= 0.0),
            items,
        };
        Some((key.clone(), metric)).filter(|_| key.len() <= MAX_KEY_BYTES)
    });
    Scores(named.take(MAX_METRICS).collect())
}

/// What was asked, as far as the file tells, and what was found.
fn identity(file: &Value, name: &str, numbers: &Map<String, Value>) -> Digest {
    let of = |key: &str| {
        file.get(key)
            .and_then(|all| all.get(name))
            .cloned()
            .unwrap_or_default()
    };
    let all = Value::Array(vec![
        name.into(),
        of("task_hashes"),
        of("versions"),
        of("configs"),
        of("n-shot"),
        Value::Object(numbers.clone()),
    ]);
    Digest::of(all.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file() -> Value {
        json!({
            "results": {
                "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.05, "acc_norm,none": 0.4,
                    "acc_norm_stderr,none": "N/A"},
                "wikitext": {"alias": "wikitext", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
                "both": {"alias": "both", "acc,none": 0.5},
                "all": {"alias": "all", " ": " "},
            },
            "groups": {"both": {"acc,none": 0.5}},
            "group_subtasks": {"arc_easy": [], "all": ["arc_easy"]},
            "higher_is_better": {"arc_easy": {"acc": true, "acc_norm": true}, "wikitext": {"word_perplexity": false}},
            "n-samples": {"arc_easy": {"original": 200, "effective": 100}},
        })
    }

    #[test]
    fn tasks_come_with_their_metrics_and_directions() {
        let found = read_results("lm_eval", &file(), None).expect("results");
        let names: Vec<(&str, &str, bool)> = found
            .iter()
            .map(|one| {
                (
                    one.record.name.as_str(),
                    one.record.metric.as_str(),
                    one.record.sign() < 0.0,
                )
            })
            .collect();
        assert_eq!(
            names,
            [
                ("arc_easy", "acc,none", false),
                ("wikitext", "word_perplexity,none", true)
            ]
        );
        let metric = found[0].selecting().expect("a metric");
        assert_eq!(
            (metric.value, metric.stderr, metric.items),
            (0.5, Some(0.05), 100)
        );
        assert_eq!(
            found[0].scores.all.get("acc_norm,none").and_then(|m| m.stderr),
            None
        );
        let mut one = file();
        one["results"]
            .as_object_mut()
            .expect("an object")
            .remove("wikitext");
        let found = read_results("lm_eval", &one, Some("acc_norm")).expect("results");
        assert_eq!(found[0].record.metric, "acc_norm,none");
        assert_ne!(found[0].record.digest, Digest::of(b""));
    }

    #[test]
    fn a_record_that_does_not_tell_the_direction_goes_by_its_metric() {
        let record = &read_results("lm_eval", &file(), None).expect("results")[1].record;
        assert_eq!(record.sign(), -1.0);
        let mut kept = serde_json::to_value(record).expect("JSON");
        kept.as_object_mut().expect("an object").remove("less_is_better");
        let record: TaskRecord = serde_json::from_value(kept).expect("a record");
        assert_eq!((record.less_is_better, record.sign()), (None, -1.0));
    }

    #[test]
    fn what_lm_eval_did_not_write_is_named() {
        for (file, metric, field) in [
            (json!({}), None, "lm_eval.results"),
            (json!({"results": {}}), None, "lm_eval.results"),
            (json!({"results": {"a": 1}}), None, "lm_eval.results.a"),
            (
                json!({"results": {"a": {"acc,none": "x"}}}),
                None,
                "lm_eval.results.a",
            ),
            (file(), Some("f1"), "lm_eval.results.arc_easy"),
        ] {
            assert_eq!(
                read_results("lm_eval", &file, metric).expect_err(field).field,
                field
            );
        }
    }
}
