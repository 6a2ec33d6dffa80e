//! What a model reference means: a folder under the models directory, a finished job's result, or a cached checkpoint.
//! The only place where a name from a request becomes a path, and only through typed names.

use std::path::PathBuf;
use std::sync::Arc;

use cauldron_checkpoint::Digest;
use cauldron_merge::{ModelRef, ParentResolver, RecipeError};
use tokio::runtime::Handle;
use uuid::Uuid;

use crate::cache::Cache;
use crate::config::ModelName;
use crate::jobs::{JobStatus, JobStore};

/// Resolves references. Its methods block: call them on threads that may.
#[derive(Debug, Clone)]
pub struct ModelSources {
    models_dir: PathBuf,
    cache: Cache,
    jobs: Arc<dyn JobStore>,
    runtime: Handle,
}

/// A reference that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    pub folder: PathBuf,
    pub adapter: Option<PathBuf>,
    /// The cache entry it is, if it is one and has no adapter.
    pub cached: Option<Digest>,
}

impl ModelSources {
    pub fn new(models_dir: PathBuf, cache: Cache, jobs: Arc<dyn JobStore>, runtime: Handle) -> Self {
        Self {
            models_dir,
            cache,
            jobs,
            runtime,
        }
    }

    /// Finds `source[+adapter]`; `field` names it in errors.
    pub fn locate(&self, field: &str, reference: &str) -> Result<Located, RecipeError> {
        let parsed = ModelRef::parse(field, reference)?;
        let bad = |detail: String| RecipeError::new(field, detail);
        let (folder, cached) = self.find(&parsed.source).map_err(bad)?;
        let adapter = parsed
            .adapter
            .as_deref()
            .map(|name| self.folder(name))
            .transpose()
            .map_err(bad)?;
        Ok(Located {
            folder,
            cached: cached.filter(|_| adapter.is_none()),
            adapter,
        })
    }

    fn find(&self, name: &str) -> Result<(PathBuf, Option<Digest>), String> {
        if let Some(digest) = name.strip_prefix("checkpoint:") {
            let digest: Digest = digest
                .parse()
                .map_err(|_| "checkpoint: takes 64 lower-case hex digits")?;
            return self.cached(digest);
        }
        if let Some(id) = name.strip_prefix("merge:") {
            let id: Uuid = id.parse().map_err(|_| "merge: takes a job id")?;
            return self.cached(self.result_of(id)?);
        }
        if name.starts_with("hf:") {
            return Err("hub references are not enabled on this server".to_owned());
        }
        let folder: ModelName = name
            .parse()
            .map_err(|e| format!("{e}; other references start with merge: or checkpoint:"))?;
        Ok((self.model_folder(&folder)?, None))
    }

    /// One folder directly under the models directory. A link may lead elsewhere only inside that directory.
    fn model_folder(&self, name: &ModelName) -> Result<PathBuf, String> {
        let unknown = || format!("no model named {name}");
        let root = self.models_dir.canonicalize().map_err(|_| unknown())?;
        let folder = root.join(name.as_str()).canonicalize().map_err(|_| unknown())?;
        match folder.starts_with(&root) && folder != root && folder.is_dir() {
            true => Ok(folder),
            false => Err(unknown()),
        }
    }

    fn cached(&self, digest: Digest) -> Result<(PathBuf, Option<Digest>), String> {
        match self.cache.lookup(&digest) {
            Some(_) => Ok((self.cache.path(&digest), Some(digest))),
            None => Err(format!("no checkpoint {digest} in the cache")),
        }
    }

    fn result_of(&self, id: Uuid) -> Result<Digest, String> {
        let job = self
            .runtime
            .block_on(self.jobs.get(id))
            .map_err(|e| e.to_string())?
            .ok_or_else(|| format!("no merge {id}"))?;
        match (job.status, job.digest) {
            (JobStatus::Succeeded, Some(digest)) => Ok(digest),
            (status, _) => Err(format!("merge {id} is {}", status.as_str())),
        }
    }
}

impl ParentResolver for ModelSources {
    fn folder(&self, name: &str) -> Result<PathBuf, String> {
        self.find(name).map(|(folder, _)| folder)
    }
}
