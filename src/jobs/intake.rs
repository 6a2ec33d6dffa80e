//! From a request body to a job: everything is checked before the job is accepted, and the job is durable before that
//! is said.

use std::sync::Arc;

use cauldron_checkpoint::Digest;
use cauldron_merge::{Parents, Recipe, RecipeError, parse_recipe};
use rand::TryRng;

use super::runner::DISK_RESERVE;
use super::store::{JobStore, NewJob, StoreError, Submission};
use super::{Job, JobStatus};
use crate::cache::Cache;
use crate::config::ModelName;
use crate::sources::ModelSources;

/// Takes recipes in.
#[derive(Debug, Clone)]
pub struct Intake {
    pub store: Arc<dyn JobStore>,
    pub sources: Arc<ModelSources>,
    pub cache: Cache,
    pub max_queued: u32,
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
    Store(#[from] StoreError),
    #[error("the result needs {needed} bytes and {free} are free")]
    Storage { needed: u64, free: u64 },
    #[error("the check of the recipe was interrupted")]
    Interrupted,
}

impl Intake {
    /// Checks a recipe against its models and queues it, or finds the job that does the same.
    pub async fn submit(&self, body: Vec<u8>, idempotency_key: Option<String>) -> Result<Taken, IntakeError> {
        let body_digest = Digest::of(&body).to_string();
        let this = self.clone();
        let mut job = tokio::task::spawn_blocking(move || this.check(&body))
            .await
            .map_err(|_| IntakeError::Interrupted)??;
        job.idempotency = idempotency_key.map(|key| (key, body_digest));
        for _ in 0..3 {
            let submission = self.store.submit(job.clone()).await?;
            match &submission {
                Submission::Existing(done) if self.is_gone(done) => self.store.retire(done.id).await?,
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

    /// A succeeded job whose result was deleted or damaged.
    fn is_gone(&self, job: &Job) -> bool {
        job.status == JobStatus::Succeeded
            && job
                .digest
                .is_none_or(|digest| self.cache.lookup(&digest).is_none())
    }

    fn check(&self, body: &[u8]) -> Result<NewJob, IntakeError> {
        let spec = parse_recipe(body)?;
        let recipe = Recipe::from_spec(&spec, &mut fresh_seed)?;
        if let Some(name) = recipe.serve_as() {
            name.parse::<ModelName>()
                .map_err(|e| RecipeError::new("serve_as", e.to_string()))?;
        }
        let parents = Parents::open(&recipe, &*self.sources)?;
        let identity = parents
            .identity()
            .map_err(|e| RecipeError::new("models", e.to_string()))?;
        let needed = parents.output_bytes(&recipe) + DISK_RESERVE;
        let free = self.cache.free_bytes().unwrap_or(u64::MAX);
        if free < needed {
            return Err(IntakeError::Storage { needed, free });
        }
        let key = format!("{}\n{identity}", recipe.canonical());
        Ok(NewJob {
            recipe: recipe.to_json(),
            lambda: recipe.lambda(),
            dedupe_key: Digest::of(key.as_bytes()).to_string(),
            bytes_total: parents.bytes_total(&recipe),
            serve_as: recipe.serve_as().map(str::to_owned),
            idempotency: None,
            max_queued: self.max_queued,
        })
    }
}

/// From the operating system, so that two servers never draw the same.
fn fresh_seed() -> u64 {
    rand::rngs::SysRng.try_next_u64().unwrap_or_else(|_| {
        let id = uuid::Uuid::now_v7().as_u128();
        (id ^ (id >> 64)) as u64
    })
}
