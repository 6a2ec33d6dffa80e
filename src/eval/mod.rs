//! Scores of served models on tasks: what a model did with each item is kept by (weights, task), so nothing is asked twice.
//! Knows nothing of HTTP.

mod ask;
mod attack;
mod lm_eval;
mod metric;
mod record;
mod store;
mod task;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cauldron_checkpoint::Digest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{info, warn};

pub use ask::AskError;
pub use attack::{Attack, AttackKind};
pub use lm_eval::{Imported, read_results};
pub use metric::{Metric, Outcome, drop_rate, mean, measure, value};
pub use record::{AttackedRecord, AttackedScores, Record, Scores, Split, TaskRecord, TaskScores};
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
    masked: Arc<Semaphore>,
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

/// Where an evaluation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    Running,
    Done,
    Failed(String),
    /// The process ended before it was done; asking again goes on with the tasks that are left.
    Interrupted,
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

impl Evals {
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        Ok(Self {
            store: Store::open(data_dir)?,
            running: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
            masked: Arc::new(Semaphore::new(1)),
        })
    }

    /// Waits until no other request has a masked language model in memory.
    pub async fn masked_turn(&self) -> Option<OwnedSemaphorePermit> {
        // Never closed.
        self.masked.clone().acquire_owned().await.ok()
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
