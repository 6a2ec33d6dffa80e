//! The worker of this process's device: claims jobs one at a time, keeps their lease alive, and hands results on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::Job;
use super::runner::{Progress, Runner};
use super::store::{Beat, JobStore, Lease, Outcome};
use crate::telemetry;

/// How often the lease is renewed and a cancellation noticed.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often an idle worker looks by itself.
const POLL: Duration = Duration::from_secs(2);

/// Called with a job that succeeded and the names to load it under.
pub type OnSuccess = Box<dyn Fn(&Job, Vec<String>) + Send + Sync>;

/// The worker and what others may see of it.
pub struct Worker {
    store: Arc<dyn JobStore>,
    runner: Runner,
    owner: String,
    wake: Notify,
    running: Mutex<Option<Arc<Progress>>>,
    on_success: OnSuccess,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("owner", &self.owner)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl Worker {
    pub fn new(store: Arc<dyn JobStore>, runner: Runner, on_success: OnSuccess) -> Self {
        Self {
            store,
            runner,
            owner: format!("{}-{}", std::process::id(), Uuid::now_v7()),
            wake: Notify::new(),
            running: Mutex::new(None),
            on_success,
        }
    }

    /// Tells an idle worker that there is something to claim.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Live progress of a job that runs here.
    pub fn progress(&self, job: Uuid) -> Option<Arc<Progress>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.clone().filter(|progress| progress.job == job)
    }

    /// Tells a job that runs here to stop now; the store has the request already.
    pub fn stop(&self, job: Uuid) {
        if let Some(progress) = self.progress(job) {
            progress.stop();
        }
    }

    /// Works until `shutdown`; a job that runs then goes back to the queue.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        while !shutdown.is_cancelled() {
            match self.store.claim(&self.owner).await {
                Ok(Some((job, lease))) => {
                    if self.work(job, lease, &shutdown).await {
                        self.idle(&shutdown, POLL).await;
                    }
                }
                Ok(None) => self.idle(&shutdown, POLL).await,
                Err(e) => {
                    warn!(error = %e, "the queue cannot be read; trying again");
                    self.idle(&shutdown, POLL).await;
                }
            }
        }
    }

    async fn idle(&self, shutdown: &CancellationToken, longest: Duration) {
        tokio::select! {
            () = self.wake.notified() => {}
            () = tokio::time::sleep(longest) => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Whether something is wrong that time may mend.
    async fn work(&self, job: Job, lease: Lease, shutdown: &CancellationToken) -> bool {
        info!(job = %job.id, attempt = job.attempt, "merge starts");
        let progress = Arc::new(Progress::new(job.id, job.bytes_total));
        self.set_running(Some(progress.clone()));
        let outcome = self.supervise(&job, &lease, progress.clone(), shutdown).await;
        let retry = matches!(outcome, Some(Outcome::Retry(_)));
        if let Some(outcome) = outcome {
            self.leave(job, &lease, outcome).await;
        }
        self.set_running(None);
        retry
    }

    /// Runs the merge on a thread of its own beside the heartbeat. None if the lease was lost.
    async fn supervise(
        &self,
        job: &Job,
        lease: &Lease,
        progress: Arc<Progress>,
        shutdown: &CancellationToken,
    ) -> Option<Outcome> {
        let (runner, owned, seen) = (self.runner.clone(), job.clone(), progress.clone());
        let mut merge = tokio::task::spawn_blocking(move || runner.run(&owned, &seen));
        let mut tick = tokio::time::interval(HEARTBEAT);
        let (mut lost, mut draining) = (false, false);
        let outcome = loop {
            tokio::select! {
                done = &mut merge => break done,
                () = shutdown.cancelled(), if !draining => {
                    draining = true;
                    progress.pause();
                }
                _ = tick.tick() => {
                    let (done, total) = progress.bytes();
                    match self.store.heartbeat(lease, done, total, progress.digest()).await {
                        Ok(Beat::Held) => {}
                        Ok(Beat::CancelRequested) => progress.stop(),
                        Ok(Beat::Lost) => {
                            warn!(job = %job.id, "the lease was lost");
                            lost = true;
                            progress.stop();
                        }
                        Err(e) => warn!(job = %job.id, error = %e, "heartbeat failed"),
                    }
                }
            }
        };
        if lost {
            return None;
        }
        match outcome {
            Ok(Outcome::Cancelled) if draining => Some(Outcome::Released),
            Ok(outcome) => Some(outcome),
            Err(_) => Some(Outcome::Released),
        }
    }

    /// Records the outcome; the database may be away for a while.
    async fn leave(&self, job: Job, lease: &Lease, outcome: Outcome) {
        for _ in 0..20 {
            match self.store.finish(lease, outcome.clone()).await {
                Ok(true) => return self.announce(job, outcome).await,
                Ok(false) => {
                    warn!(job = %job.id, "the lease was lost before the outcome was recorded");
                    return;
                }
                Err(e) => {
                    warn!(job = %job.id, error = %e, "the outcome cannot be recorded; trying again");
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
        error!(job = %job.id, "the outcome was not recorded; the job will be run again");
    }

    async fn announce(&self, mut job: Job, outcome: Outcome) {
        let status = outcome.status();
        metrics::counter!(telemetry::MERGES, "status" => status.as_str()).increment(1);
        match outcome {
            Outcome::Succeeded(merged) => {
                info!(job = %job.id, digest = %merged.digest, "merge succeeded");
                job.digest = Some(merged.digest);
                job.status = status;
                match self.store.names(job.id).await {
                    Ok(names) => (self.on_success)(&job, names),
                    Err(e) => error!(job = %job.id, error = %e, "the names to serve it under cannot be read"),
                }
            }
            Outcome::Failed(error) => {
                warn!(job = %job.id, kind = error.kind, error = error.detail, "merge failed")
            }
            Outcome::Retry(error) => {
                warn!(job = %job.id, kind = error.kind, error = error.detail, "merge will be tried again")
            }
            Outcome::Cancelled | Outcome::Released => {
                info!(job = %job.id, status = status.as_str(), "merge stopped")
            }
        }
    }

    fn set_running(&self, progress: Option<Arc<Progress>>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }
}
