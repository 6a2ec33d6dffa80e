//! Scores of served models on tasks: what a model did with each item is kept by (weights, task), so nothing is asked twice.
//! Knows nothing of HTTP.

mod ask;
mod attack;
mod lm_eval;
mod metric;
mod store;
mod task;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cauldron_checkpoint::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};
use tracing::{info, warn};

pub use ask::AskError;
pub use attack::{Attack, AttackKind};
pub use lm_eval::{Imported, read_results};
pub use metric::{Metric, Outcome, drop_rate, mean, measure, value};
pub use store::{read_json, read_task_file, remove_drafts, write_json};
pub use task::{
    Answer, Item, Kind, MAX_FILE_BYTES, MAX_ITEMS, Match, Task, TaskError, TaskSettings, parse_lines,
};

use crate::serving::Served;
use store::Store;

/// Evaluations that may be under way; more are refused.
const MOST_RUNNING: usize = 64;
/// Evaluations that ask at the same time.
const AT_ONCE: usize = 2;
/// Tasks of one evaluation.
pub const MAX_TASKS: usize = 64;

/// The evaluations of this process.
#[derive(Debug)]
pub struct Evals {
    store: Store,
    running: Mutex<HashMap<Digest, Arc<Progress>>>,
    turns: Semaphore,
    /// Of requests with a masked language model.
    masked: Semaphore,
}

/// How items are parted: dev items choose, test items tell.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Split {
    pub seed: u64,
    /// Share of the items that are dev.
    pub dev: f64,
}

/// What is asked of a model.
#[derive(Debug, Clone)]
pub struct Evaluation {
    pub tasks: Vec<Arc<Task>>,
    pub split: Option<Split>,
    pub under: Option<UnderAttack>,
}

/// The same tasks under an attack.
#[derive(Debug, Clone)]
pub struct UnderAttack {
    pub attack: Attack,
    /// By task: with how many prompts that are others.
    pub tasks: Vec<(Arc<Task>, usize)>,
}

/// How far an evaluation is.
#[derive(Debug, Default)]
struct Progress {
    done: AtomicUsize,
    failed: Mutex<Option<String>>,
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

/// An evaluation as others see it.
#[derive(Debug, Clone)]
pub struct View {
    pub record: Record,
    pub status: Status,
    pub done: usize,
    /// By task; empty until it is done.
    pub scores: Vec<TaskScores>,
    /// By task, where there is an attack; empty until it is done.
    pub attacked: Vec<AttackedScores>,
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

/// Where an evaluation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    Running,
    Done,
    Failed(String),
    /// The process ended before it was done; asking again goes on with the tasks that are left.
    Interrupted,
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

/// Why an evaluation was not begun or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    #[error("there are {MOST_RUNNING} evaluations already")]
    TooMany,
    #[error("no such evaluation")]
    Unknown,
    #[error("the folder of evaluations: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Ask(#[from] AskError),
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
    fn attacked_scores(&self, changed: usize, plain: &[Outcome], attacked: &[Outcome]) -> AttackedScores {
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

impl Evaluation {
    fn record(&self, served: &Served) -> Record {
        let of_task = |task: &Arc<Task>| match self.split {
            Some(split) => TaskRecord::parted(task, split),
            None => TaskRecord::of(task),
        };
        let mut tasks: Vec<TaskRecord> = self.tasks.iter().map(of_task).collect();
        let under = self.under.iter().flat_map(|under| &under.tasks);
        for (task, (attacked, changed)) in tasks.iter_mut().zip(under) {
            task.attacked = Some(AttackedRecord {
                digest: attacked.digest,
                changed: *changed,
            });
        }
        let mut text = format!(
            "cauldron evaluation v1\n{}\n{}\n",
            served.name, served.fingerprint
        );
        for task in &tasks {
            text += &format!("{} {} {}\n", task.digest, task.metric, task.name);
            if !task.parts.is_empty() {
                text += &format!("parts {}\n", task.parts);
            }
            if let Some(attacked) = task.attacked {
                text += &format!("attacked {}\n", attacked.digest);
            }
        }
        if let Some(split) = self.split {
            text += &format!("{} {}\n", split.seed, split.dev);
        }
        if let Some(under) = &self.under {
            text += &format!("attack {}\n", serde_json::json!(under.attack));
        }
        Record {
            id: Digest::of(text.as_bytes()),
            model: served.name.to_string(),
            system_fingerprint: served.fingerprint.clone(),
            split: self.split,
            attack: self.under.as_ref().map(|under| under.attack.clone()),
            tasks,
            imported: None,
        }
    }

    /// All that is asked: each task, and where there is an attack the same task under it.
    fn asked(&self) -> impl Iterator<Item = &Arc<Task>> {
        let under = self.under.iter().flat_map(|under| &under.tasks);
        self.tasks.iter().chain(under.map(|(task, _)| task))
    }
}

impl Record {
    /// Items that are asked.
    pub fn items(&self) -> usize {
        let times = if self.attack.is_some() { 2 } else { 1 };
        times * self.tasks.iter().map(|task| task.items).sum::<usize>()
    }
}

impl Evals {
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        Ok(Self {
            store: Store::open(data_dir)?,
            running: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
            masked: Semaphore::new(1),
        })
    }

    /// Waits until no other request has a masked language model in memory.
    pub async fn masked_turn(&self) -> Option<SemaphorePermit<'_>> {
        // Never closed.
        self.masked.acquire().await.ok()
    }

    fn running(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Progress>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an evaluation, or finds the one that is under way or done. The model stays in memory until it ends.
    pub async fn begin(
        self: &Arc<Self>,
        served: Arc<Served>,
        evaluation: Evaluation,
    ) -> Result<View, EvalError> {
        let record = evaluation.record(&served);
        let id = record.id;
        if !self.take_turn(id)? {
            return self.view(id).await;
        }
        let (this, kept) = (self.clone(), record.clone());
        let written = tokio::task::spawn_blocking(move || this.store.put_record(&kept)).await;
        if let Err(e) = written.map_err(io::Error::other).and_then(|written| written) {
            self.running().remove(&id);
            return Err(e.into());
        }
        let view = match self.view(id).await {
            Ok(view) if view.status != Status::Done => view,
            ended => {
                self.running().remove(&id);
                return ended;
            }
        };
        let (this, watched) = (self.clone(), self.clone());
        let run = tokio::spawn(async move { this.run(id, &served, &evaluation).await });
        tokio::spawn(async move {
            if run.await.is_err()
                && let Some(progress) = watched.running().get(&id)
            {
                progress.fail("the evaluation panicked".to_owned());
            }
        });
        Ok(view)
    }

    /// Keeps what another program found of a model.
    pub async fn import(
        self: &Arc<Self>,
        model: &str,
        fingerprint: &str,
        imported: Vec<Imported>,
    ) -> Result<View, EvalError> {
        let whose = serde_json::json!([model, fingerprint]);
        let mut text = format!("cauldron imported evaluation v1\n{whose}\n");
        for one in &imported {
            text += &format!("{} {}\n", one.record.digest, one.record.metric);
        }
        let (tasks, scores) = imported.into_iter().map(|one| (one.record, one.scores)).unzip();
        let record = Record {
            id: Digest::of(text.as_bytes()),
            model: model.to_owned(),
            system_fingerprint: fingerprint.to_owned(),
            split: None,
            attack: None,
            tasks,
            imported: Some(scores),
        };
        let (id, store) = (record.id, self.store.clone());
        let put = tokio::task::spawn_blocking(move || store.put_record(&record));
        put.await.map_err(io::Error::other)??;
        self.view(id).await
    }

    /// False if it is under way.
    fn take_turn(&self, id: Digest) -> Result<bool, EvalError> {
        let mut running = self.running();
        let is_under_way = |progress: &Arc<Progress>| progress.failure().is_none();
        if running.get(&id).is_some_and(is_under_way) {
            return Ok(false);
        }
        if running.values().filter(|progress| is_under_way(progress)).count() >= MOST_RUNNING {
            return Err(EvalError::TooMany);
        }
        // Failures are told until there are many.
        if running.len() >= 2 * MOST_RUNNING {
            running.retain(|_, progress| is_under_way(progress));
        }
        running.insert(id, Arc::new(Progress::default()));
        Ok(true)
    }

    /// Outcomes of all tasks, asked or known; for callers that wait.
    pub async fn outcomes(
        &self,
        served: &Arc<Served>,
        task: &Arc<Task>,
        done: &AtomicUsize,
    ) -> Result<Arc<Vec<Outcome>>, EvalError> {
        if let Some(known) = self
            .known(&served.fingerprint, task.digest, task.items.len())
            .await?
        {
            done.fetch_add(known.len(), Ordering::Relaxed);
            return Ok(known);
        }
        let found = Arc::new(ask::ask(served, task, done).await?);
        let (store, fingerprint, digest, kept) = (
            self.store.clone(),
            served.fingerprint.clone(),
            task.digest,
            found.clone(),
        );
        let put = tokio::task::spawn_blocking(move || store.put_outcomes(&fingerprint, digest, &kept));
        put.await.map_err(io::Error::other)??;
        Ok(found)
    }

    /// What weights did with a task's items, if they were asked before.
    pub async fn known(
        &self,
        fingerprint: &str,
        task: Digest,
        items: usize,
    ) -> io::Result<Option<Arc<Vec<Outcome>>>> {
        let (store, fingerprint) = (self.store.clone(), fingerprint.to_owned());
        let found = tokio::task::spawn_blocking(move || store.outcomes(&fingerprint, task));
        let found = found.await.map_err(io::Error::other)?;
        Ok(found.filter(|found| found.len() == items).map(Arc::new))
    }

    async fn run(&self, id: Digest, served: &Arc<Served>, evaluation: &Evaluation) {
        let Some(progress) = self.running().get(&id).cloned() else {
            return;
        };
        // Never closed.
        let _turn = self.turns.acquire().await;
        for task in evaluation.asked() {
            if let Err(error) = self.outcomes(served, task, &progress.done).await {
                warn!(evaluation = %id, model = %served.name, task = task.name, %error, "an evaluation failed");
                progress.fail(error.to_string());
                return;
            }
        }
        info!(evaluation = %id, model = %served.name, "an evaluation is done");
        self.running().remove(&id);
    }

    pub async fn view(&self, id: Digest) -> Result<View, EvalError> {
        let progress = self.running().get(&id).cloned();
        let store = self.store.clone();
        let read = tokio::task::spawn_blocking(move || {
            let record = store.record(id)?;
            let of = |digest| store.outcomes(&record.system_fingerprint, digest);
            let scores = || {
                if let Some(imported) = &record.imported {
                    return Some((imported.clone(), Vec::new()));
                }
                let (mut scores, mut attacked) = (Vec::new(), Vec::new());
                for task in &record.tasks {
                    let plain = of(task.digest)?;
                    scores.push(task.scores(&plain));
                    if let Some(under) = task.attacked {
                        attacked.push(task.attacked_scores(under.changed, &plain, &of(under.digest)?));
                    }
                }
                Some((scores, attacked))
            };
            let scores = scores();
            Some((record, scores))
        });
        let found = read.await.map_err(io::Error::other)?;
        let (record, scores) = found.ok_or(EvalError::Unknown)?;
        let (status, done) = match (&scores, progress) {
            (Some(_), _) => (Status::Done, record.items()),
            (None, Some(progress)) => {
                let done = progress.done.load(Ordering::Relaxed);
                (progress.failure().map_or(Status::Running, Status::Failed), done)
            }
            (None, None) => (Status::Interrupted, 0),
        };
        let (scores, attacked) = scores.unwrap_or_default();
        Ok(View {
            record,
            status,
            done,
            scores,
            attacked,
        })
    }

    /// What the model did with each item of one of the tasks, as it is or under the attack.
    pub async fn items(&self, id: Digest, task: usize, attacked: bool) -> Result<Vec<Outcome>, EvalError> {
        let store = self.store.clone();
        let read = tokio::task::spawn_blocking(move || {
            let record = store.record(id)?;
            let task = record.tasks.get(task)?;
            let digest = match attacked {
                true => task.attacked?.digest,
                false => task.digest,
            };
            store.outcomes(&record.system_fingerprint, digest)
        });
        read.await.map_err(io::Error::other)?.ok_or(EvalError::Unknown)
    }
}

impl Progress {
    fn failure(&self) -> Option<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fail(&self, detail: String) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(detail);
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed(_) => "failed",
            Self::Interrupted => "interrupted",
        })
    }
}
