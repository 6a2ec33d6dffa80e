//! From a request body to a job: everything is checked before the job is accepted, and the job is durable before that
//! is said.

use std::sync::Arc;

use cauldron_checkpoint::Digest;
use cauldron_merge::{MergeError, Recipe, RecipeError, RecipeSpec, parse_mergekit, parse_recipe};
use rand::TryRng;

use super::runner::DISK_RESERVE;
use super::store::{JobStore, NewJob, StoreError, Submission};
use super::{Job, JobStatus};
use crate::cache::{Cache, CacheError};
use crate::config::ModelName;
use crate::sources::{Care, ModelSources, Outage, SourceError};

/// Takes recipes in.
#[derive(Debug, Clone)]
pub struct Intake {
    pub store: Arc<dyn JobStore>,
    pub sources: Arc<ModelSources>,
    pub cache: Cache,
    pub max_queued: u32,
    pub cache_budget: Option<u64>,
    /// This node's name in the queue.
    pub node: String,
}

/// What a request says beside its recipe.
#[derive(Debug, Clone, Default)]
pub struct Submit {
    pub idempotency_key: Option<String>,
    /// Higher first among what waits.
    pub priority: i64,
}

/// What became of a request.
#[derive(Debug, Clone)]
pub struct Taken {
    pub submission: Submission,
    /// The name that this request wants the result under.
    pub serve_as: Option<String>,
}

/// Why no job was made.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Outage(#[from] Outage),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("the check of the recipe was interrupted")]
    Interrupted,
}

/// Why a result would not fit.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NoRoom {
    #[error("the result needs {needed} bytes and {free} are free")]
    Disk { needed: u64, free: u64 },
    #[error("the result has {needed} bytes and the cache keeps {budget} (--cache-budget)")]
    Budget { needed: u64, budget: u64 },
}

/// A recipe as it was sent.
#[derive(Debug, Clone)]
pub enum RecipeBody {
    Json(Vec<u8>),
    /// A mergekit configuration.
    Yaml(Vec<u8>),
}

impl RecipeBody {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Json(bytes) | Self::Yaml(bytes) => bytes,
        }
    }

    fn parse(&self) -> Result<RecipeSpec, RecipeError> {
        match self {
            Self::Json(bytes) => parse_recipe(bytes),
            Self::Yaml(bytes) => parse_mergekit(bytes),
        }
    }
}

impl Intake {
    /// Checks a recipe against its models and queues it, or finds the job that does the same.
    pub async fn submit(&self, body: RecipeBody, options: Submit) -> Result<Taken, IntakeError> {
        let idempotency = options
            .idempotency_key
            .map(|key| (key, Digest::of(body.bytes()).to_string()));
        // First of all: what was accepted once is answered the same, even if its models have gone since.
        if let Some((key, body)) = &idempotency
            && let Some(submission) = self.store.recall(key, body).await?
        {
            return Ok(Taken {
                submission,
                serve_as: None,
            });
        }
        if self.cache.is_shared() {
            self.bring(&body).await?;
        }
        let this = self.clone();
        // Nothing that the recipe names is evicted before its job says that it is needed.
        let _no_eviction = self.cache.no_eviction().await;
        let (mut job, no_room) = blocking(move || this.check(&body)).await?;
        job.idempotency = idempotency;
        job.priority = options.priority;
        for _ in 0..3 {
            match self.store.find(&job.dedupe_key).await? {
                Some(known) if self.is_gone(&known).await? => {
                    no_room.as_ref().map_or(Ok(()), |refusal| Err(refusal.clone()))?;
                    self.store.retire(known.id, None).await?;
                    // Whoever asks for it again here wants it here.
                    job.node = Some(self.node.clone());
                }
                Some(_) => {}
                // What is there or on its way needs no room.
                None => no_room.as_ref().map_or(Ok(()), |refusal| Err(refusal.clone()))?,
            }
            let submission = self.store.submit(job.clone()).await?;
            match &submission {
                Submission::Existing(done) if self.is_gone(done).await? => {
                    let key = job.idempotency.as_ref().map(|(key, _)| key.as_str());
                    self.store.retire(done.id, key).await?;
                }
                _ => {
                    return Ok(Taken {
                        submission,
                        serve_as: job.serve_as,
                    });
                }
            }
        }
        Err(IntakeError::Interrupted)
    }

    /// Fetches what the recipe names and what its job gave, before anything is held up.
    async fn bring(&self, body: &RecipeBody) -> Result<(), IntakeError> {
        let (this, body) = (self.clone(), body.clone());
        let (job, _) = blocking(move || this.check(&body)).await?;
        if let Some(known) = self.store.find(&job.dedupe_key).await? {
            self.is_gone(&known).await?;
        }
        Ok(())
    }

    /// A succeeded job whose result was deleted or damaged, here and in the remote cache.
    async fn is_gone(&self, job: &Job) -> Result<bool, IntakeError> {
        let (JobStatus::Succeeded, Some(digest)) = (job.status, job.digest) else {
            return Ok(job.status == JobStatus::Succeeded);
        };
        let cache = self.cache.clone();
        blocking(move || match cache.lookup_or_fetch(&digest) {
            // Making it again needs no remote cache.
            Err(CacheError::Remote | CacheError::NoRoom(_) | CacheError::Coming { total: 0, .. }) => Ok(true),
            found => Ok(found?.is_none()),
        })
        .await
    }

    /// The job, and why there would be no room for its result.
    fn check(&self, body: &RecipeBody) -> Result<(NewJob, Option<NoRoom>), IntakeError> {
        let recipe = Recipe::from_spec(&body.parse()?, &mut fresh_seed)?;
        if let Some(name) = recipe.serve_as() {
            name.parse::<ModelName>()
                .map_err(|e| RecipeError::new("serve_as", e.to_string()))?;
        }
        let (parents, _held) = self.sources.open(&recipe, Care::Look)?;
        let identity = parents.identity().map_err(|e| match e {
            MergeError::Parent { source, .. } => SourceError::of_files("models", source),
            other => RecipeError::new("models", other.to_string()).into(),
        })?;
        let result = parents.output_bytes();
        let (needed, free) = (result + DISK_RESERVE, self.cache.free_bytes().unwrap_or(u64::MAX));
        let no_room = match self.cache_budget {
            Some(budget) if result > budget => Some(NoRoom::Budget {
                needed: result,
                budget,
            }),
            // With a budget the cache gives way when the merge runs.
            None if free < needed => Some(NoRoom::Disk { needed, free }),
            _ => None,
        };
        let cached = |part: &str| part.starts_with("checkpoint:") || part.starts_with("merge:");
        let names_cached = recipe.references().any(|(_, reference)| {
            cached(&reference.source) || reference.adapter.as_deref().is_some_and(cached)
        });
        let key = format!("{}\n{identity}", recipe.canonical());
        let job = NewJob {
            recipe: recipe.to_json(),
            lambda: recipe.lambda(),
            dedupe_key: Digest::of(key.as_bytes()).to_string(),
            bytes_total: parents.bytes_total(&recipe),
            priority: 0,
            node: names_cached.then(|| self.node.clone()),
            serve_as: recipe.serve_as().map(str::to_owned),
            idempotency: None,
            max_queued: self.max_queued,
        };
        Ok((job, no_room))
    }
}

async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, IntakeError> + Send + 'static,
) -> Result<T, IntakeError> {
    let done = tokio::task::spawn_blocking(run).await;
    done.map_err(|_| IntakeError::Interrupted)?
}

impl From<SourceError> for IntakeError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Refused(e) => e.into(),
            SourceError::Outage(e) => e.into(),
        }
    }
}

impl From<StoreError> for IntakeError {
    fn from(error: StoreError) -> Self {
        Self::Outage(error.into())
    }
}

impl From<CacheError> for IntakeError {
    fn from(error: CacheError) -> Self {
        Self::Outage(error.into())
    }
}

/// From the operating system, so that two servers never draw the same.
fn fresh_seed() -> u64 {
    rand::rngs::SysRng.try_next_u64().unwrap_or_else(|_| {
        let id = uuid::Uuid::now_v7().as_u128();
        (id ^ (id >> 64)) as u64
    })
}
