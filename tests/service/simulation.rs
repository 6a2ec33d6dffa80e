//! A seeded simulation of the queue: nodes that claim, beat, pause, die and come back, clients that post and cancel, clocks
//! that jump, in random order, beside a model of what must happen. Every answer of the store is compared with the model's, and
//! the promises are checked on their own.
//!
//! `CAULDRON_SCHEDULES=100000 CAULDRON_SEED=7 cargo test --test service simulation` runs more of them, or the one that failed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cauldron::jobs::{
    BACKOFF, Beat, Cancelled, Clock, JobError, JobStatus, JobStore, LEASE, Lease, MAX_ATTEMPTS, Outcome,
    SqliteJobs, Submission,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use uuid::Uuid;

use crate::store::{HandClock, job, merged};

const NODES: usize = 3;
const KEYS: usize = 5;
const QUEUE: u32 = 4;
const STEPS: usize = 40;

/// What the model knows of a job.
#[derive(Debug, Clone)]
struct Known {
    key: usize,
    status: JobStatus,
    retired: bool,
    cancel: bool,
    priority: i64,
    attempt: i64,
    epoch: i64,
    owner: Option<String>,
    lease_until: i64,
    leased_at: i64,
    not_before: i64,
}

impl Known {
    /// Whether a submission of its key finds it.
    fn is_live(&self) -> bool {
        let counts = matches!(
            self.status,
            JobStatus::Queued | JobStatus::Running | JobStatus::Succeeded
        );
        counts && !self.retired && !self.cancel
    }

    fn holds(&self, lease: &Lease) -> bool {
        self.status == JobStatus::Running
            && self.epoch == lease.epoch
            && self.owner.as_deref() == Some(&*lease.owner)
    }
}

struct World {
    store: Arc<SqliteJobs>,
    clock: Arc<HandClock>,
    random: ChaCha8Rng,
    /// In order of submission, which is that of ids.
    jobs: Vec<(Uuid, Known)>,
    /// By node: what it works on.
    working: Vec<Option<Lease>>,
    /// Workers that were paused, and may come back to life.
    zombies: Vec<Lease>,
    /// States that were seen to be final.
    ended: HashMap<Uuid, JobStatus>,
}

fn ms(duration: Duration) -> i64 {
    duration.as_millis() as i64
}

impl World {
    fn known(&mut self, id: Uuid) -> &mut Known {
        &mut self.jobs.iter_mut().find(|(known, _)| *known == id).unwrap().1
    }

    async fn step(&mut self) {
        match self.random.random_range(0..100) {
            0..22 => self.submit().await,
            22..30 => self.cancel().await,
            30..52 => self.claim().await,
            52..64 => self.beat().await,
            64..80 => self.finish().await,
            80..84 => self.crash().await,
            84..88 => self.pause(),
            88..90 => self.retire().await,
            90..97 => {
                let by = self.random.random_range(0..45_000);
                self.clock.advance(Duration::from_millis(by));
            }
            97..99 => self
                .clock
                .jump_wall(self.random.random_range(-3_600_000..3_600_000)),
            // A restart after the wall clock was put back or forth.
            _ => self
                .clock
                .jump_steady(self.random.random_range(-3_600_000..3_600_000)),
        }
    }

    async fn submit(&mut self) {
        let key = self.random.random_range(0..KEYS);
        let mut new = job(&format!("k{key}"));
        new.max_queued = QUEUE;
        new.priority = self.random.random_range(-1..=1);
        let priority = new.priority;
        let answer = self.store.submit(new).await.unwrap();
        let live = self
            .jobs
            .iter_mut()
            .find(|(_, known)| known.key == key && known.is_live());
        if let Some((id, known)) = live {
            let Submission::Existing(job) = answer else {
                panic!("{answer:?} for a live key")
            };
            assert_eq!((job.id, job.status), (*id, known.status));
            if known.status == JobStatus::Queued {
                known.priority = known.priority.max(priority);
            }
            return;
        }
        let queued = self
            .jobs
            .iter()
            .filter(|(_, known)| known.status == JobStatus::Queued);
        if queued.count() >= QUEUE as usize {
            assert_eq!(answer, Submission::QueueFull);
            return;
        }
        let Submission::Created(job) = answer else {
            panic!("{answer:?} for a new key")
        };
        for (_, known) in self
            .jobs
            .iter_mut()
            .filter(|(_, known)| known.key == key && known.cancel)
        {
            known.retired = true;
        }
        let known = Known {
            key,
            status: JobStatus::Queued,
            retired: false,
            cancel: false,
            priority,
            attempt: 0,
            epoch: 0,
            owner: None,
            lease_until: 0,
            leased_at: 0,
            not_before: 0,
        };
        self.jobs.push((job.id, known));
    }

    fn some_job(&mut self) -> Option<Uuid> {
        let count = self.jobs.len();
        (count > 0).then(|| self.jobs[self.random.random_range(0..count)].0)
    }

    async fn cancel(&mut self) {
        let Some(id) = self.some_job() else { return };
        let answer = self.store.cancel(id).await.unwrap();
        let known = self.known(id);
        match known.status {
            JobStatus::Queued => {
                assert!(matches!(answer, Cancelled::Done(_)), "{answer:?}");
                known.status = JobStatus::Cancelled;
                known.cancel = true;
            }
            JobStatus::Running => {
                assert!(matches!(answer, Cancelled::Requested(_)), "{answer:?}");
                known.cancel = true;
            }
            _ => assert!(matches!(answer, Cancelled::TooLate(_)), "{answer:?}"),
        }
    }

    async fn claim(&mut self) {
        let node = self.random.random_range(0..NODES);
        if self.working[node].is_some() {
            return;
        }
        let owner = format!("n{node}/{}", self.random.random_range(0..1_000_000));
        let now = self.clock.steady();
        let expected = loop {
            let mut free: Vec<&mut (Uuid, Known)> = self
                .jobs
                .iter_mut()
                .filter(|(_, known)| match known.status {
                    JobStatus::Queued => known.not_before <= now || known.not_before > now + 60_000,
                    JobStatus::Running => known.lease_until < now || known.leased_at > now + 5_000,
                    _ => false,
                })
                .collect();
            free.sort_by_key(|(id, known)| (-known.priority, *id));
            let Some((id, known)) = free.into_iter().next() else {
                break None;
            };
            known.status = JobStatus::Running;
            known.owner = Some(owner.clone());
            known.epoch += 1;
            known.attempt += 1;
            known.lease_until = now + ms(LEASE);
            known.leased_at = now;
            if known.cancel {
                known.status = JobStatus::Cancelled;
            } else if known.attempt > MAX_ATTEMPTS {
                known.status = JobStatus::Failed;
            } else {
                break Some((*id, known.epoch, known.attempt));
            }
        };
        let claimed = self.store.claim(&owner).await.unwrap();
        let found = claimed
            .as_ref()
            .map(|(job, lease)| (job.id, lease.epoch, job.attempt));
        assert_eq!(found, expected);
        self.working[node] = claimed.map(|(_, lease)| lease);
    }

    /// A lease that somebody believes to hold.
    fn some_lease(&mut self) -> Option<Lease> {
        let held: Vec<Lease> = self
            .working
            .iter()
            .flatten()
            .chain(&self.zombies)
            .cloned()
            .collect();
        (!held.is_empty()).then(|| held[self.random.random_range(0..held.len())].clone())
    }

    fn drop_lease(&mut self, lease: &Lease) {
        self.zombies.retain(|zombie| zombie != lease);
        for working in &mut self.working {
            if working.as_ref() == Some(lease) {
                *working = None;
            }
        }
    }

    async fn beat(&mut self) {
        let Some(lease) = self.some_lease() else { return };
        let beat = self.store.heartbeat(&lease, 1, 2, None).await.unwrap();
        let until = self.clock.steady() + ms(LEASE);
        let known = self.known(lease.job);
        match (known.holds(&lease), known.cancel) {
            (false, _) => {
                assert_eq!(beat, Beat::Lost);
                self.drop_lease(&lease);
            }
            (true, cancel) => {
                known.lease_until = until;
                known.leased_at = until - ms(LEASE);
                let expected = if cancel { Beat::CancelRequested } else { Beat::Held };
                assert_eq!(beat, expected);
            }
        }
    }

    async fn finish(&mut self) {
        let Some(lease) = self.some_lease() else { return };
        let error = JobError {
            kind: "io".into(),
            detail: "passes".into(),
        };
        let outcome = match self.random.random_range(0..6) {
            0 | 1 => Outcome::Succeeded(merged("m")),
            2 => Outcome::Failed(error),
            3 => Outcome::Retry(error),
            4 => Outcome::Cancelled,
            _ => Outcome::Released,
        };
        let written = self.store.finish(&lease, outcome.clone()).await.unwrap();
        let now = self.clock.steady();
        let known = self.known(lease.job);
        assert_eq!(written, known.holds(&lease), "{outcome:?}");
        if written {
            known.status = match outcome.status() {
                JobStatus::Queued if known.cancel => JobStatus::Cancelled,
                status => status,
            };
            known.owner = None;
            known.not_before = 0;
            match outcome {
                Outcome::Retry(_) => known.not_before = now + ms(BACKOFF) * known.attempt * known.attempt,
                Outcome::Released => known.attempt -= 1,
                _ => {}
            }
        }
        self.drop_lease(&lease);
    }

    /// A node dies with all its workers, paused ones too, and starts again.
    async fn crash(&mut self) {
        let node = self.random.random_range(0..NODES);
        let name = format!("n{node}");
        let prefix = format!("{name}/");
        self.working[node] = None;
        self.zombies.retain(|lease| !lease.owner.starts_with(&prefix));
        let back = self.store.recover(&name).await.unwrap();
        let mut expected = 0;
        for (_, known) in &mut self.jobs {
            let own = known
                .owner
                .as_deref()
                .is_some_and(|owner| owner.starts_with(&prefix));
            if known.status == JobStatus::Running && own {
                known.status = JobStatus::Queued;
                known.owner = None;
                expected += 1;
            }
        }
        assert_eq!(back, expected);
    }

    /// A worker is stopped; its node goes on with another.
    fn pause(&mut self) {
        let node = self.random.random_range(0..NODES);
        self.zombies.extend(self.working[node].take());
    }

    async fn retire(&mut self) {
        let Some(id) = self.some_job() else { return };
        self.store.retire(id, None).await.unwrap();
        let known = self.known(id);
        known.retired |= known.status == JobStatus::Succeeded;
    }

    /// What must hold at any time, whatever the model says.
    async fn check(&mut self) {
        let mut held: HashMap<Uuid, usize> = HashMap::new();
        let page = self.store.list(None, None, 1000).await.unwrap();
        assert_eq!(page.jobs.len(), self.jobs.len(), "an acknowledged job is gone");
        for job in &page.jobs {
            let known = self.known(job.id).clone();
            assert_eq!(
                (job.status, job.attempt, job.epoch),
                (known.status, known.attempt, known.epoch)
            );
            assert!(job.attempt <= MAX_ATTEMPTS + 1);
            if let Some(ended) = self.ended.get(&job.id) {
                assert_eq!(job.status, *ended, "a final state changed");
            } else if job.status.is_terminal() {
                self.ended.insert(job.id, job.status);
            }
        }
        for lease in self.working.iter().flatten().chain(&self.zombies) {
            let row = page.jobs.iter().find(|job| job.id == lease.job).unwrap();
            let holds = row.status == JobStatus::Running
                && row.epoch == lease.epoch
                && row.owner.as_deref() == Some(&*lease.owner);
            *held.entry(lease.job).or_default() += usize::from(holds);
        }
        assert!(held.values().all(|count| *count <= 1), "two workers hold one job");
        for key in 0..KEYS {
            let live = page.jobs.iter().filter(|job| {
                let retired = self.jobs.iter().any(|(id, known)| *id == job.id && known.retired);
                let counts = matches!(
                    job.status,
                    JobStatus::Queued | JobStatus::Running | JobStatus::Succeeded
                );
                job.recipe["key"] == format!("k{key}") && counts && !retired && !job.cancel_requested
            });
            assert!(live.count() <= 1, "two live jobs do the same");
        }
    }

    /// Lets everything end: no job may be stuck.
    async fn settle(&mut self) {
        self.working.fill(None);
        self.zombies.clear();
        let mut idle = 0;
        while idle < 2 {
            self.clock.advance(LEASE * 2);
            // A wait that was written before the clock was put back may take its time.
            match self.store.claim("last").await.unwrap() {
                None => idle += 1,
                Some((_, lease)) => {
                    let outcome = Outcome::Succeeded(merged("m"));
                    self.store.finish(&lease, outcome).await.unwrap();
                }
            }
        }
        for (id, _) in &self.jobs {
            let job = self.store.get(*id).await.unwrap().unwrap();
            assert!(job.status.is_terminal(), "{job:?} is stuck");
        }
        // Both clocks show the same again, later than anything that was written.
        let ahead = self.clock.wall() - self.clock.steady();
        self.clock.jump_steady(ahead.max(0));
        self.clock.jump_wall((-ahead).max(0));
        self.clock.advance(Duration::from_secs(7200 * STEPS as u64));
        assert_eq!(
            self.store.forget(Duration::ZERO).await.unwrap(),
            self.jobs.len() as u64
        );
    }
}

fn number(variable: &str) -> Option<u64> {
    Some(std::env::var(variable).ok()?.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn random_schedules_keep_every_promise() {
    let schedules = number("CAULDRON_SCHEDULES").unwrap_or(150);
    let first = number("CAULDRON_SEED").unwrap_or_else(|| u64::from(Uuid::new_v4().as_fields().0));
    // Where syncs cost nothing, if there is such a place.
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let clock = Arc::new(HandClock::default());
    let store = SqliteJobs::open_with(&dir.path().join("jobs.db"), clock.clone()).await;
    let store = Arc::new(store.unwrap());
    for seed in first..first + schedules {
        let mut world = World {
            store: store.clone(),
            clock: clock.clone(),
            random: ChaCha8Rng::seed_from_u64(seed),
            jobs: Vec::new(),
            working: vec![None; NODES],
            zombies: Vec::new(),
            ended: HashMap::new(),
        };
        let named = Named(seed);
        for step in 1..=STEPS {
            world.step().await;
            if step % 5 == 0 {
                world.check().await;
            }
        }
        world.settle().await;
        drop(named);
        if schedules > 1000 && (seed - first) % 1000 == 999 {
            eprintln!("{} of {schedules} schedules", seed - first + 1);
        }
    }
}

/// Says which schedule failed.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("\n*** the schedule of CAULDRON_SEED={} failed ***", self.0);
        }
    }
}
