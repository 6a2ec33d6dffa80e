//! What a model reference means: a folder under the models directory, a finished job's result, or a cached checkpoint.
//! The only place where a name from a request becomes a path, and only through typed names.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cauldron_checkpoint::{Adapter, Checkpoint, CheckpointError, Digest};
use cauldron_merge::{ModelRef, ParentResolver, Parents, Recipe, RecipeError};
use rustix::io::Errno;
use tokio::runtime::Handle;
use uuid::Uuid;

use crate::cache::{Cache, CacheError, Pin};
use crate::config::ModelName;
use crate::jobs::{JobStatus, JobStore, StoreError};

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
    /// The cache entry that `folder` is, if it is one.
    pub cached: Option<Digest>,
}

/// Why a reference cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Refused(#[from] RecipeError),
    #[error(transparent)]
    Outage(#[from] Outage),
}

impl SourceError {
    /// An error of a model's files, seen while `field` was looked at.
    pub fn of_files(field: &str, error: CheckpointError) -> Self {
        match is_outage(&error) {
            true => Outage::Files(error).into(),
            false => RecipeError::new(field, error.to_string()).into(),
        }
    }
}

/// What a reference means cannot be found out now: the reference may be right.
#[derive(Debug, thiserror::Error)]
pub enum Outage {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("a model's files cannot be read now: {0}")]
    Files(CheckpointError),
}

/// How far entries of the cache are checked before they are parents.
#[derive(Clone, Copy)]
pub enum Care<'a> {
    /// Files and their sizes.
    Look,
    /// Every byte, as long as this says so; and they stay in the cache while the [`Held`] lives.
    Verify(&'a (dyn Fn() -> bool + Sync)),
}

/// Keeps the cached parents of a merge.
#[derive(Debug)]
pub struct Held {
    _pins: Vec<Pin>,
}

/// Why a part of a reference gives no folder. The detail is for the client: it shows no paths.
enum Miss {
    Detail(String),
    Outage(Outage),
}

impl From<String> for Miss {
    fn from(detail: String) -> Self {
        Self::Detail(detail)
    }
}

impl From<CacheError> for Miss {
    fn from(error: CacheError) -> Self {
        Self::Outage(error.into())
    }
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
    pub fn locate(&self, field: &str, reference: &str) -> Result<Located, SourceError> {
        let parsed = ModelRef::parse(field, reference)?;
        let failed = |miss: Miss| match miss {
            Miss::Detail(detail) => SourceError::Refused(RecipeError::new(field, detail)),
            Miss::Outage(outage) => SourceError::Outage(outage),
        };
        let (folder, cached) = self.find(&parsed.source).map_err(failed)?;
        if let Some(digest) = cached
            && self
                .cache
                .lookup_or_fetch(&digest)
                .map_err(Outage::from)?
                .is_none()
        {
            return Err(failed(absent(&digest)));
        }
        let adapter = match parsed.adapter.as_deref() {
            Some(name) => Some(self.find(name).map_err(failed)?.0),
            None => None,
        };
        Ok(Located {
            folder,
            adapter,
            cached,
        })
    }

    /// Opens a recipe's models.
    pub fn open(&self, recipe: &Recipe, care: Care<'_>) -> Result<(Parents, Held), SourceError> {
        let resolution = Resolution {
            sources: self,
            care,
            seen: Mutex::default(),
        };
        let opened = Parents::open(recipe, &resolution);
        let seen = resolution
            .seen
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        match opened {
            Ok(parents) => Ok((parents, Held { _pins: seen.pins })),
            Err(refusal) => Err(seen.cause(refusal)),
        }
    }

    /// Entries of the cache that jobs name which wait or run.
    pub fn live_references(&self) -> Result<HashSet<Digest>, Outage> {
        let recipes = self.runtime.block_on(self.jobs.live())?;
        let mut digests = HashSet::new();
        for recipe in recipes {
            // It was checked when it was accepted.
            let Ok(recipe) = Recipe::from_json(recipe) else {
                continue;
            };
            let references = recipe.references().map(|(_, reference)| reference);
            for part in references
                .flat_map(|r| [Some(&r.source), r.adapter.as_ref()])
                .flatten()
            {
                match self.cached_digest(part) {
                    Ok(Some(digest)) => _ = digests.insert(digest),
                    Err(Miss::Outage(outage)) => return Err(outage),
                    Ok(None) | Err(Miss::Detail(_)) => {}
                }
            }
        }
        Ok(digests)
    }

    /// The folder of one part, and the cache entry it should be.
    fn find(&self, name: &str) -> Result<(PathBuf, Option<Digest>), Miss> {
        match self.cached_digest(name)? {
            Some(digest) => Ok((self.cache.path(&digest), Some(digest))),
            None => Ok((self.model_folder(name)?, None)),
        }
    }

    /// The cache entry that a part names, if it names one.
    fn cached_digest(&self, name: &str) -> Result<Option<Digest>, Miss> {
        if let Some(digest) = name.strip_prefix("checkpoint:") {
            let digest = digest.parse();
            return Ok(Some(
                digest.map_err(|_| "checkpoint: takes 64 lower-case hex digits".to_owned())?,
            ));
        }
        let Some(id) = name.strip_prefix("merge:") else {
            return Ok(None);
        };
        let id: Uuid = id.parse().map_err(|_| "merge: takes a job id".to_owned())?;
        self.result_of(id).map(Some)
    }

    /// One folder directly under the models directory. A link may lead elsewhere only inside that directory.
    fn model_folder(&self, name: &str) -> Result<PathBuf, String> {
        if name.starts_with("hf:") {
            return Err("hub references are not enabled on this server".to_owned());
        }
        let name: ModelName = name
            .parse()
            .map_err(|e| format!("{e}; other references start with merge: or checkpoint:"))?;
        let unknown = || format!("no model named {name}");
        let root = self.models_dir.canonicalize().map_err(|_| unknown())?;
        let folder = root.join(name.as_str()).canonicalize().map_err(|_| unknown())?;
        match folder.starts_with(&root) && folder != root && folder.is_dir() {
            true => Ok(folder),
            false => Err(unknown()),
        }
    }

    fn result_of(&self, id: Uuid) -> Result<Digest, Miss> {
        let job = self
            .runtime
            .block_on(self.jobs.get(id))
            .map_err(|e| Miss::Outage(e.into()))?
            .ok_or_else(|| format!("no merge {id}"))?;
        match (job.status, job.digest) {
            (JobStatus::Succeeded, Some(digest)) => Ok(digest),
            (status, _) => Err(format!("merge {id} is {}", status.as_str()).into()),
        }
    }
}

fn absent(digest: &Digest) -> Miss {
    Miss::Detail(format!("no checkpoint {digest} in the cache"))
}

/// Resolves the references of one recipe and remembers what it met: the merge crate's refusals are all the recipe's
/// fault, and some of them are ours.
struct Resolution<'a> {
    sources: &'a ModelSources,
    care: Care<'a>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    pins: Vec<Pin>,
    folders: Vec<PathBuf>,
    outage: Option<Outage>,
}

impl Resolution<'_> {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Result<PathBuf, Miss> {
        let (folder, cached) = self.sources.find(name)?;
        let cache = &self.sources.cache;
        match (cached, self.care) {
            (None, _) => {}
            (Some(digest), Care::Look) => {
                cache.lookup_or_fetch(&digest)?.ok_or_else(|| absent(&digest))?;
            }
            (Some(digest), Care::Verify(go_on)) => {
                let (_, pin) = cache
                    .verify_or_fetch(&digest, go_on)?
                    .ok_or_else(|| absent(&digest))?;
                self.seen().pins.push(pin);
            }
        }
        self.seen().folders.push(folder.clone());
        Ok(folder)
    }
}

impl ParentResolver for Resolution<'_> {
    fn folder(&self, name: &str) -> Result<PathBuf, String> {
        self.find(name).map_err(|miss| match miss {
            Miss::Detail(detail) => detail,
            Miss::Outage(outage) => self.seen().outage.insert(outage).to_string(),
        })
    }
}

impl Seen {
    /// Whether a refusal is the recipe's or the machine's. The refusal does not say, so the folders are opened again,
    /// all at once, as the merge would have them.
    fn cause(self, refusal: RecipeError) -> SourceError {
        if let Some(outage) = self.outage {
            return outage.into();
        }
        let mut open = Vec::new();
        for folder in &self.folders {
            let model = Checkpoint::open(folder);
            let adapter = Adapter::open(folder);
            let failures = [model.as_ref().err(), adapter.as_ref().err()];
            if failures.into_iter().flatten().any(is_outage) {
                let error = model.err().filter(is_outage).or(adapter.err());
                return error.map_or(refusal.into(), |e| Outage::Files(e).into());
            }
            open.push((model, adapter));
        }
        refusal.into()
    }
}

/// Errors of the file system that say nothing about the file.
pub fn is_outage(error: &CheckpointError) -> bool {
    let CheckpointError::Io { source, .. } = error else {
        return false;
    };
    let passing = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::IO,
        Errno::STALE,
        Errno::TIMEDOUT,
    ];
    Errno::from_io_error(source).is_some_and(|errno| passing.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_machine_is_told_from_one_of_the_files() {
        let of = |errno: Errno| {
            SourceError::of_files(
                "models[0]",
                CheckpointError::Io {
                    file: "config.json".into(),
                    source: errno.into(),
                },
            )
        };
        assert!(matches!(of(Errno::MFILE), SourceError::Outage(_)));
        assert!(matches!(of(Errno::IO), SourceError::Outage(_)));
        assert!(matches!(of(Errno::ACCESS), SourceError::Refused(e) if e.field == "models[0]"));
        assert!(matches!(of(Errno::LOOP), SourceError::Refused(_)));
    }
}
