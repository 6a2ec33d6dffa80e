//! Evaluations as they are kept, and the scores that follow from what models did.

use cauldron_checkpoint::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::attack::Attack;
use super::metric::{self, Metric, Outcome, drop_rate, measure};
use super::task::{Answer, Item, Kind, Task};

/// How items are parted: dev items choose, test items tell.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Split {
    pub seed: u64,
    /// Share of the items that are dev.
    pub dev: f64,
}

/// An evaluation as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub id: Digest,
    pub model: String,
    pub system_fingerprint: String,
    pub split: Option<Split>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attack: Option<Attack>,
    pub tasks: Vec<TaskRecord>,
    /// By task, where another program asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<Vec<TaskScores>>,
}

/// What is kept of a task without its items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    pub name: String,
    pub digest: Digest,
    pub kind: Kind,
    /// The metric that selects, and all that there are.
    pub metric: String,
    pub metrics: Vec<String>,
    /// Of the metric that selects; None: as its name says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub less_is_better: Option<bool>,
    /// The attack that the task is under by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attack: Option<Attack>,
    pub items: usize,
    /// By item, in the order of the task: `1` is a dev item, `0` one that tells.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub parts: String,
    /// The same task under the evaluation's attack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attacked: Option<AttackedRecord>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AttackedRecord {
    pub digest: Digest,
    /// Items whose prompt the attack changed.
    pub changed: usize,
}

/// Metrics by name, of all items and of each part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskScores {
    pub all: Scores,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dev: Option<Scores>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<Scores>,
}

/// A task under attack.
#[derive(Debug, Clone, Serialize)]
pub struct AttackedScores {
    /// Items whose prompt the attack changed.
    pub changed: usize,
    pub scores: TaskScores,
    /// The performance drop rate of each metric.
    pub drop_rate: TaskScores,
}

/// Metrics in the order of their kind.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores(pub Vec<(String, Metric)>);

impl Scores {
    pub fn get(&self, metric: &str) -> Option<Metric> {
        self.0
            .iter()
            .find(|(name, _)| name == metric)
            .map(|(_, metric)| *metric)
    }
}

impl Serialize for Scores {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, metric)| (name, metric)))
    }
}

impl<'de> Deserialize<'de> for Scores {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = serde_json::Map::<String, Value>::deserialize(deserializer)?;
        let entries = map
            .into_iter()
            .map(|(name, value)| Ok((name, serde_json::from_value(value)?)));
        let entries: Result<Vec<_>, serde_json::Error> = entries.collect();
        entries.map(Self).map_err(serde::de::Error::custom)
    }
}

impl Split {
    /// Whether each item is a dev item. That follows from its prompt: the same prompt is on the same side, in whatever task and
    /// however often, whatever the model.
    pub fn of(self, task: &Task) -> Vec<bool> {
        let rank =
            |prompt: &str| Digest::of(format!("cauldron split v1\n{}\n{prompt}", self.seed).as_bytes());
        // A share of all prompts that there could be: the count of dev items is near that share of the items.
        let below = (self.dev * 2f64.powi(64)) as u128;
        let is_dev = |item: &Item| {
            let prompt = item.unattacked.as_ref().unwrap_or(&item.prompt);
            let text = match (&item.answer, prompt.as_str()) {
                (Answer::Continuation(text), "") => text,
                (_, prompt) => prompt,
            };
            let rank = rank(text);
            let first: [u8; 8] = std::array::from_fn(|byte| rank.as_bytes()[byte]);
            u128::from(u64::from_be_bytes(first)) < below
        };
        task.items.iter().map(is_dev).collect()
    }
}

impl TaskRecord {
    pub fn of(task: &Task) -> Self {
        Self {
            name: task.name.clone(),
            digest: task.digest,
            kind: task.kind,
            metric: task.metric.to_owned(),
            metrics: metric::names(task.kind, &task.matching)
                .iter()
                .map(|&name| name.to_owned())
                .collect(),
            less_is_better: None,
            attack: task.attack.clone(),
            items: task.items.len(),
            parts: String::new(),
            attacked: None,
        }
    }

    /// 1 where more of the metric that selects is better, otherwise -1.
    pub fn sign(&self) -> f64 {
        let by_name = || !metric::is_better_higher(&self.metric);
        match self.less_is_better.unwrap_or_else(by_name) {
            true => -1.0,
            false => 1.0,
        }
    }

    /// With the side of each item.
    pub fn parted(task: &Task, split: Split) -> Self {
        let part = |is_dev: bool| if is_dev { '1' } else { '0' };
        Self {
            parts: split.of(task).into_iter().map(part).collect(),
            ..Self::of(task)
        }
    }

    /// Its metrics from what a model did with its items.
    pub fn scores(&self, outcomes: &[Outcome]) -> TaskScores {
        self.by_part(outcomes.len(), &|name, which| {
            let chosen: Vec<&Outcome> = which.iter().map(|index| &outcomes[*index]).collect();
            measure(name, &chosen)
        })
    }

    /// The same from what it did with them under attack.
    pub(super) fn attacked_scores(
        &self,
        changed: usize,
        plain: &[Outcome],
        attacked: &[Outcome],
    ) -> AttackedScores {
        let drops = self.by_part(plain.len().min(attacked.len()), &|name, which| {
            let before: Vec<&Outcome> = which.iter().map(|index| &plain[*index]).collect();
            let after: Vec<&Outcome> = which.iter().map(|index| &attacked[*index]).collect();
            drop_rate(name, &before, &after)
        });
        AttackedScores {
            changed,
            scores: self.scores(attacked),
            drop_rate: drops,
        }
    }

    /// A number for each metric, over all items and those of each part.
    fn by_part(&self, items: usize, number: &dyn Fn(&str, &[usize]) -> Option<Metric>) -> TaskScores {
        let of = |which: &dyn Fn(usize) -> bool| {
            let chosen: Vec<usize> = (0..items).filter(|index| which(*index)).collect();
            let named = |name: &String| Some((name.clone(), number(name, &chosen)?));
            Scores(self.metrics.iter().filter_map(named).collect())
        };
        let is_dev: Vec<bool> = self.parts.bytes().map(|part| part == b'1').collect();
        let parts = (is_dev.len() == items && !is_dev.is_empty()).then_some(is_dev);
        TaskScores {
            all: of(&|_| true),
            dev: parts.as_ref().map(|is_dev| of(&|index| is_dev[index])),
            test: parts.as_ref().map(|is_dev| of(&|index| !is_dev[index])),
        }
    }
}

impl Record {
    /// Items that are asked.
    pub fn items(&self) -> usize {
        let times = if self.attack.is_some() { 2 } else { 1 };
        times * self.tasks.iter().map(|task| task.items).sum::<usize>()
    }
}
