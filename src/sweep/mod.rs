//! The search over shares (arXiv 2502.15434): trials of one family, scored on dev items; the winner is told of on test items,
//! beside the baselines. What a trial found is on disk before the next begins. Knows nothing of HTTP.

mod cma;
mod judge;
mod linear;
mod plan;
mod plot;
mod report;
mod run;
mod store;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cauldron_merge::RecipeSpec;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use uuid::Uuid;

use crate::eval::{Evals, Metric, Split, Task, TaskRecord};
use crate::serving::{OpenRecipe, Parentage, Serving, Shares};
use store::Store;

pub use plan::{ALPHAS, Origin, Scalings, Search, baselines, total};
pub use plot::plot;
pub use report::{card, csv, markdown};

/// Sweeps that wait or run at most.
const MOST_OPEN: usize = 64;

/// The sweeps of this process, worked off one after the other.
#[derive(Debug)]
pub struct Sweeps {
    store: Store,
    serving: Arc<Serving>,
    evals: Arc<Evals>,
    parentage: Parentage,
    open: Mutex<Open>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Open {
    waiting: VecDeque<Uuid>,
    live: HashMap<Uuid, Live>,
}

/// A sweep that waits or runs.
#[derive(Debug)]
struct Live {
    told: watch::Sender<Arc<Sweep>>,
    cancel: CancellationToken,
    given: watch::Sender<Option<(usize, Given)>>,
}

/// How scores of several tasks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// Their mean.
    Mean,
    /// The worst of them.
    Min,
}

/// A sweep as it is kept and shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sweep {
    pub id: Uuid,
    /// Milliseconds since the Unix epoch.
    pub created_at: i64,
    pub recipe: RecipeSpec,
    pub parents: usize,
    pub search: Search,
    pub seed: u64,
    pub split: Split,
    pub select: Select,
    /// Whether trials that are clearly worse on a third of the dev items are dropped.
    pub race: bool,
    /// Whether scores come from outside; then the tasks are those of the first results of lm-eval, or there are none.
    #[serde(default)]
    pub external: bool,
    pub tasks: Vec<TaskRecord>,
    pub status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Of the trials that the search makes.
    pub total: usize,
    pub trials: Vec<Trial>,
    /// A trial that waits for its score from outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Queued,
    Running,
    Done,
    Failed,
    Cancelled,
}

impl Status {
    pub fn is_open(self) -> bool {
        matches!(self, Self::Queued | Self::Running)
    }
}

/// One model of the family, and how it did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trial {
    pub n: usize,
    pub shares: Shares,
    pub origin: Origin,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    /// By task: the metric that selects.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dev: Vec<Metric>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub test: Vec<Metric>,
    /// Of the dev items, by the sweep's selection; higher is better.
    pub score: Option<f64>,
    pub stderr: Option<f64>,
    /// Given up after a third of the dev items.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dropped: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    pub seconds: f64,
}

impl Trial {
    /// As requests name it after `family@`.
    pub fn label(&self) -> String {
        self.shares.to_string()
    }
}

/// A trial that is served, and whose score is wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Waiting {
    pub trial: usize,
    pub shares: Shares,
    /// What requests name.
    pub model: String,
}

/// What came from outside for a trial: a score, of which higher is better, or why there is none.
#[derive(Debug, Clone, PartialEq)]
pub enum Given {
    Score {
        score: f64,
        stderr: Option<f64>,
    },
    /// By task, of which the sweep makes its score.
    Tasks(Vec<(TaskRecord, Metric)>),
    Failed(String),
}

impl Given {
    /// Puts its tasks in the order of the sweep's, or says why they are not the same: what one trial is judged by, all are.
    fn fit(&mut self, sweep: &Sweep) -> Result<(), String> {
        let has_scores = sweep.trials.iter().any(|trial| trial.score.is_some());
        match self {
            Self::Failed(_) => Ok(()),
            Self::Score { .. } if sweep.tasks.is_empty() => Ok(()),
            Self::Score { .. } => Err("the trials before have the results of tasks".into()),
            Self::Tasks(_) if sweep.tasks.is_empty() && has_scores => {
                Err("the trials before have one score each".into())
            }
            Self::Tasks(_) if sweep.tasks.is_empty() => Ok(()),
            Self::Tasks(given) => {
                let place = |(task, _): &(TaskRecord, Metric)| {
                    let is_it = |other: &TaskRecord| other.name == task.name && other.metric == task.metric;
                    sweep.tasks.iter().position(is_it)
                };
                if given.len() != sweep.tasks.len() || given.iter().any(|one| place(one).is_none()) {
                    let each = sweep
                        .tasks
                        .iter()
                        .map(|task| format!("{} {}", task.name, task.metric));
                    let expected: Vec<String> = each.collect();
                    return Err(format!("the trials before have {}", expected.join(", ")));
                }
                given.sort_by_key(place);
                Ok(())
            }
        }
    }
}

/// What the sweep found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// The trial of the best dev score.
    pub winner: usize,
    /// The best of the baselines on the same items.
    pub baseline: usize,
    /// Of the winner over that baseline, on test items; with scores from outside, in these scores: the best of several is
    /// better there than it will be elsewhere.
    pub test_gain: f64,
    pub test_gain_stderr: Option<f64>,
    /// Whether the gain, or the loss, is less than twice its standard error.
    pub within_noise: bool,
    /// Trials that no other one beats on every task, by their dev scores.
    pub pareto: Vec<usize>,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct NewSweep {
    pub recipe: OpenRecipe,
    pub search: Search,
    pub seed: u64,
    pub split: Split,
    pub select: Select,
    pub race: bool,
    pub external: bool,
    pub tasks: Vec<Arc<Task>>,
}

/// Why a sweep was not taken or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error("there are {MOST_OPEN} sweeps already that wait or run")]
    TooMany,
    #[error("no such sweep")]
    Unknown,
    #[error("trial {0} does not wait for a score")]
    NotWaiting(usize),
    /// The trial waits on.
    #[error("{0}")]
    OtherTasks(String),
    #[error("the folder of sweeps: {0}")]
    Io(#[from] io::Error),
}

impl Sweeps {
    pub fn open(
        data_dir: &Path,
        serving: Arc<Serving>,
        evals: Arc<Evals>,
        parentage: Parentage,
    ) -> io::Result<Arc<Self>> {
        let store = Store::open(data_dir)?;
        let sweeps = Arc::new(Self {
            serving,
            evals,
            parentage,
            open: Mutex::default(),
            more: Notify::new(),
            store,
        });
        // What the last run left goes on where it was, in its order.
        let mut left: Vec<Sweep> = sweeps
            .store
            .all()?
            .into_iter()
            .filter(|sweep| sweep.status.is_open())
            .collect();
        left.sort_by_key(|sweep| sweep.id);
        for mut sweep in left {
            sweep.waiting = None;
            sweeps.enqueue(sweep);
        }
        Ok(sweeps)
    }

    fn opened(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enqueue(&self, sweep: Sweep) {
        let mut open = self.opened();
        open.waiting.push_back(sweep.id);
        let (told, _) = watch::channel(Arc::new(sweep.clone()));
        let cancel = CancellationToken::new();
        let (given, _) = watch::channel(None);
        open.live.insert(sweep.id, Live { told, cancel, given });
        drop(open);
        self.more.notify_one();
    }

    /// Takes a sweep; it is durable when this returns.
    pub async fn create(self: &Arc<Self>, new: NewSweep) -> Result<Arc<Sweep>, SweepError> {
        // A client that hangs up leaves nothing half made.
        let this = self.clone();
        let made = tokio::spawn(async move { this.create_now(new).await });
        made.await.map_err(io::Error::other)?
    }

    async fn create_now(self: &Arc<Self>, new: NewSweep) -> Result<Arc<Sweep>, SweepError> {
        if self.opened().live.len() >= MOST_OPEN {
            return Err(SweepError::TooMany);
        }
        let sweep = Sweep {
            id: Uuid::now_v7(),
            created_at: jiff::Timestamp::now().as_millisecond(),
            recipe: new.recipe.spec().clone(),
            parents: new.recipe.models(),
            total: total(&new.search, new.recipe.spec()),
            search: new.search,
            seed: new.seed,
            split: new.split,
            select: new.select,
            race: new.race,
            external: new.external,
            tasks: new
                .tasks
                .iter()
                .map(|task| TaskRecord::parted(task, new.split))
                .collect(),
            status: Status::Queued,
            error: None,
            trials: Vec::new(),
            waiting: None,
            verdict: None,
        };
        let (this, kept) = (self.clone(), sweep.clone());
        let put = tokio::task::spawn_blocking(move || {
            this.store.put_tasks(kept.id, &new.tasks)?;
            this.store.put(&kept)
        });
        put.await.map_err(io::Error::other)??;
        self.enqueue(sweep.clone());
        Ok(Arc::new(sweep))
    }

    /// A sweep as it is now.
    pub async fn get(self: &Arc<Self>, id: Uuid) -> Result<Arc<Sweep>, SweepError> {
        if let Some(live) = self.opened().live.get(&id) {
            return Ok(live.told.borrow().clone());
        }
        let this = self.clone();
        let found = tokio::task::spawn_blocking(move || this.store.get(id));
        let found = found.await.map_err(io::Error::other)?;
        found.map(Arc::new).ok_or(SweepError::Unknown)
    }

    /// All sweeps, the newest first.
    pub async fn list(self: &Arc<Self>) -> Result<Vec<Arc<Sweep>>, SweepError> {
        let this = self.clone();
        let all = tokio::task::spawn_blocking(move || this.store.all());
        let mut all = all.await.map_err(io::Error::other)??;
        all.sort_by_key(|sweep| std::cmp::Reverse(sweep.id));
        let open = self.opened();
        let now = |sweep: Sweep| match open.live.get(&sweep.id) {
            Some(live) => live.told.borrow().clone(),
            None => Arc::new(sweep),
        };
        Ok(all.into_iter().map(now).collect())
    }

    /// Follows a sweep that is open; None if it has ended.
    pub fn follow(&self, id: Uuid) -> Option<watch::Receiver<Arc<Sweep>>> {
        self.opened().live.get(&id).map(|live| live.told.subscribe())
    }

    /// Takes a score from outside for the trial that waits for it; it is durable when this returns.
    pub async fn give(&self, id: Uuid, trial: usize, mut given: Given) -> Result<(), SweepError> {
        let mut told = {
            let open = self.opened();
            let live = open.live.get(&id).ok_or(SweepError::NotWaiting(trial))?;
            let mut taken = Err(SweepError::NotWaiting(trial));
            // Once: it waits no more, whatever the next look says.
            live.told.send_if_modified(|sweep| {
                let waits = sweep
                    .waiting
                    .as_ref()
                    .is_some_and(|waiting| waiting.trial == trial);
                if waits {
                    taken = given.fit(sweep).map_err(SweepError::OtherTasks);
                }
                if taken.is_ok() {
                    Arc::make_mut(sweep).waiting = None;
                }
                taken.is_ok()
            });
            taken?;
            live.given.send_replace(Some((trial, given)));
            live.told.subscribe()
        };
        // An end without the trial is that of a sweep that was cancelled.
        let _ = told.wait_for(|sweep| sweep.trials.len() > trial).await;
        Ok(())
    }

    /// Waits for the score of a trial.
    async fn given(&self, id: Uuid, trial: usize) -> Option<Given> {
        let mut given = self.opened().live.get(&id).map(|live| live.given.subscribe())?;
        let found = given
            .wait_for(|given| given.as_ref().is_some_and(|(of, _)| *of == trial))
            .await;
        found.ok()?.as_ref().map(|(_, given)| given.clone())
    }

    /// Ends a sweep after what it does now; what it found stays. One that has ended stays as it is.
    pub async fn cancel(self: &Arc<Self>, id: Uuid) -> Result<Arc<Sweep>, SweepError> {
        let queued = {
            let mut open = self.opened();
            if let Some(live) = open.live.get(&id) {
                live.cancel.cancel();
            }
            let before = open.waiting.len();
            open.waiting.retain(|waiting| *waiting != id);
            open.waiting.len() < before
        };
        if queued {
            let mut sweep = (*self.get(id).await?).clone();
            sweep.status = Status::Cancelled;
            self.save(&sweep).await?;
            self.opened().live.remove(&id);
        }
        self.get(id).await
    }

    /// Works sweeps off until `stop`; what runs then goes on after the next start.
    pub async fn work(self: Arc<Self>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let next = self.opened().waiting.pop_front();
            let Some(id) = next else {
                tokio::select! {
                    () = self.more.notified() => continue,
                    () = stop.cancelled() => return,
                }
            };
            let live = self
                .opened()
                .live
                .get(&id)
                .map(|live| (live.told.borrow().clone(), live.cancel.clone()));
            let Some((sweep, cancel)) = live else { continue };
            info!(sweep = %id, trials = sweep.total, "sweep starts");
            let (this, until) = (self.clone(), stop.clone());
            let external = sweep.external;
            let running = tokio::spawn(async move {
                // What is not done goes on after the next start.
                if let Some(ended) = until
                    .run_until_cancelled(this.run((*sweep).clone(), &cancel))
                    .await
                {
                    this.end(ended).await;
                }
            });
            // One whose scores come from outside waits for others most of the time.
            if !external && let Err(e) = running.await {
                error!(sweep = %id, error = %e, "a sweep was lost; it goes on after the next start");
            }
        }
    }

    async fn end(&self, ended: Sweep) {
        info!(sweep = %ended.id, status = ?ended.status, "sweep ends");
        if let Err(e) = self.save(&ended).await {
            error!(sweep = %ended.id, error = %e, "a sweep's end cannot be written");
        }
        self.opened().live.remove(&ended.id);
    }

    /// Durable first, then told.
    async fn save(&self, sweep: &Sweep) -> io::Result<()> {
        let (store, kept) = (self.store.clone(), sweep.clone());
        let put = tokio::task::spawn_blocking(move || store.put(&kept));
        put.await.map_err(io::Error::other)??;
        if let Some(live) = self.opened().live.get(&sweep.id) {
            live.told.send_replace(Arc::new(sweep.clone()));
        }
        Ok(())
    }
}
