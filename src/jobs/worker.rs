//! The worker of this process's device: claims jobs one at a time, keeps their lease alive, and hands results on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, info_span, warn};
use uuid::Uuid;

use super::runner::{Progress, Runner};
use super::store::{Beat, JobStore, Lease, Outcome, StoreError};
use super::{Job, JobError, MAX_ATTEMPTS};
use crate::cache::{Cache, Pin};
use crate::{failpoint, telemetry};

/// How often the lease is renewed and a cancellation noticed.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often an idle worker looks by itself.
const POLL: Duration = Duration::from_secs(2);

/// How soon an outcome that could not be recorded is tried again, and how often once the service drains.
const RECORD_AGAIN: Duration = Duration::from_millis(500);
const DRAINING_TRIES: u32 = 10;

/// Called with a job that succeeded and the names to load it under.
pub type OnSuccess = Box<dyn Fn(&Job, Vec<String>) + Send + Sync>;

/// The worker and what others may see of it.
pub struct Worker {
    store: Arc<dyn JobStore>,
    cache: Cache,
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
    /// `node` is the name under which this node's jobs are recovered when it starts again.
    pub fn new(
        node: &str,
        store: Arc<dyn JobStore>,
        cache: Cache,
        runner: Runner,
        on_success: OnSuccess,
    ) -> Self {
        Self {
            store,
            cache,
            runner,
            owner: format!("{node}/{}", Uuid::now_v7()),
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
        let mut tidy = false;
        while !shutdown.is_cancelled() {
            match self.store.claim(&self.owner).await {
                Ok(Some((job, lease))) => {
                    tidy = false;
                    let span = info_span!("merge", job = %job.id);
                    if self.work(job, lease, &shutdown).instrument(span).await {
                        self.idle(&shutdown, POLL).await;
                    }
                }
                Ok(None) => {
                    if !tidy {
                        tidy = self.tidy().await;
                    }
                    self.idle(&shutdown, POLL).await;
                }
                Err(e) => {
                    warn!(error = %e, "the queue cannot be read; trying again");
                    self.idle(&shutdown, POLL).await;
                }
            }
        }
    }

    /// Once no job waits or runs, nobody comes back to what cancelled and given-up merges left. False if some do.
    async fn tidy(&self) -> bool {
        if !self.store.live().await.is_ok_and(|live| live.is_empty()) {
            return false;
        }
        let cache = self.cache.clone();
        match tokio::task::spawn_blocking(move || cache.remove_drafts_of_merges()).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => warn!(error = %e, "drafts cannot be removed"),
            Err(e) => warn!(error = %e, "drafts were not removed"),
        }
        true
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
        info!(attempt = job.attempt, "merge starts");
        let progress = Arc::new(Progress::new(job.id, job.bytes_total));
        self.set_running(Some(progress.clone()));
        let (mut outcome, mut result) = self.supervise(&job, &lease, progress.clone(), shutdown).await;
        let retry = matches!(outcome, Some(Outcome::Retry(_)));
        if let Some(Outcome::Retry(last)) = &outcome
            && job.attempt >= MAX_ATTEMPTS
        {
            outcome = Some(Outcome::Failed(JobError::too_many_attempts(&last.detail)));
        }
        match outcome {
            Some(outcome) => {
                // Only what is to be loaded has to stay until then: others may delete it once they see that it is there.
                if self.store.names(job.id).await.is_ok_and(|names| names.is_empty()) {
                    result = None;
                }
                self.leave(job, &lease, outcome, shutdown).await;
            }
            None => metrics::counter!(telemetry::LEASES_LOST).increment(1),
        }
        drop(result);
        self.set_running(None);
        retry
    }

    /// Runs the merge on a thread of its own beside the heartbeat. No outcome if the lease was lost.
    async fn supervise(
        &self,
        job: &Job,
        lease: &Lease,
        progress: Arc<Progress>,
        shutdown: &CancellationToken,
    ) -> (Option<Outcome>, Option<Pin>) {
        let lost = Arc::new(AtomicBool::new(false));
        let hold = Hold {
            store: self.store.clone(),
            lease: lease.clone(),
            progress: progress.clone(),
            lost: lost.clone(),
        };
        let (runner, owned, seen, span) = (
            self.runner.clone(),
            job.clone(),
            progress.clone(),
            tracing::Span::current(),
        );
        let (held, runtime) = (hold.clone(), Handle::current());
        let mut merge = tokio::task::spawn_blocking(move || {
            let _in_job = span.enter();
            runner.run(&owned, &seen, &|| runtime.block_on(held.sure()))
        });
        let mut tick = tokio::time::interval(HEARTBEAT);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut draining = false;
        let outcome = loop {
            tokio::select! {
                done = &mut merge => break done,
                () = shutdown.cancelled(), if !draining => {
                    draining = true;
                    progress.pause();
                }
                _ = tick.tick() => {
                    hold.beat().await;
                }
            }
        };
        if lost.load(Ordering::Acquire) {
            return (None, None);
        }
        match outcome {
            Ok((Outcome::Cancelled, _)) if draining => (Some(Outcome::Released), None),
            Ok((outcome, result)) => (Some(outcome), result),
            Err(_) => (Some(Outcome::Released), None),
        }
    }

    /// Records the outcome, however long the database is away; a service that drains does not wait for it.
    async fn leave(&self, job: Job, lease: &Lease, outcome: Outcome, shutdown: &CancellationToken) {
        let mut tries_left = DRAINING_TRIES;
        let mut unsure = false;
        while tries_left > 0 {
            match self.store.finish(lease, outcome.clone()).await {
                Ok(true) => {
                    failpoint::reach("finished");
                    return self.announce(job, outcome).await;
                }
                // The answer to an earlier try may have been lost on its way.
                Ok(false) if unsure && self.is_recorded(lease, &outcome).await => {
                    return self.announce(job, outcome).await;
                }
                Ok(false) => {
                    metrics::counter!(telemetry::LEASES_LOST).increment(1);
                    warn!("the lease was lost before the outcome was recorded");
                    return;
                }
                Err(e @ StoreError::Row(_)) => {
                    error!(error = %e, "the outcome cannot be written");
                    return;
                }
                Err(e) => {
                    unsure = true;
                    warn!(error = %e, "the outcome cannot be recorded; trying again");
                    tokio::time::sleep(RECORD_AGAIN).await;
                }
            }
            tries_left -= u32::from(shutdown.is_cancelled());
        }
        error!("the outcome was not recorded; the job will be run again");
    }

    async fn is_recorded(&self, lease: &Lease, outcome: &Outcome) -> bool {
        let found = self.store.get(lease.job).await;
        found.is_ok_and(|job| {
            job.is_some_and(|job| job.epoch == lease.epoch && job.status == outcome.status())
        })
    }

    async fn announce(&self, mut job: Job, outcome: Outcome) {
        let status = outcome.status();
        metrics::counter!(telemetry::MERGES, "status" => status.as_str()).increment(1);
        match outcome {
            Outcome::Succeeded(merged) => {
                info!(digest = %merged.digest, "merge succeeded");
                job.digest = Some(merged.digest);
                job.status = status;
                match self.store.names(job.id).await {
                    Ok(names) => (self.on_success)(&job, names),
                    Err(e) => error!(error = %e, "the names to serve it under cannot be read"),
                }
            }
            Outcome::Failed(error) => {
                warn!(kind = error.kind, error = error.detail, "merge failed")
            }
            Outcome::Retry(error) => {
                warn!(
                    kind = error.kind,
                    error = error.detail,
                    "merge will be tried again"
                )
            }
            Outcome::Cancelled | Outcome::Released => {
                info!(status = status.as_str(), "merge stopped")
            }
        }
    }

    fn set_running(&self, progress: Option<Arc<Progress>>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }
}

/// A worker's hold on the job that it runs.
#[derive(Debug, Clone)]
struct Hold {
    store: Arc<dyn JobStore>,
    lease: Lease,
    progress: Arc<Progress>,
    /// Once another worker has the job, or may have it.
    lost: Arc<AtomicBool>,
}

impl Hold {
    /// Renews the lease, records progress and hears of a cancellation. None if the database did not answer.
    async fn beat(&self) -> Option<Beat> {
        let (done, total) = self.progress.bytes();
        let beat = self
            .store
            .heartbeat(&self.lease, done, total, self.progress.digest())
            .await;
        match beat {
            Ok(Beat::Held) => {}
            Ok(Beat::CancelRequested) => self.progress.stop(),
            Ok(Beat::Lost) => {
                if !self.lost.swap(true, Ordering::AcqRel) {
                    warn!("the lease was lost");
                }
                self.progress.stop();
            }
            Err(e) => {
                warn!(error = %e, "heartbeat failed");
                return None;
            }
        }
        beat.ok()
    }

    /// Whether the job is this worker's: asks until there is an answer or the merge is to stop.
    async fn sure(&self) -> bool {
        loop {
            match self.beat().await {
                Some(beat) => return beat == Beat::Held,
                None if self.progress.is_stopped() => return false,
                None => tokio::time::sleep(RECORD_AGAIN).await,
            }
        }
    }
}
