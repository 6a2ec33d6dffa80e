//! What handlers and workers share, and how it is put together.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use candle_core::Device;
use cauldron_lm::Arithmetic;
use cauldron_merge::MergeOptions;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::cache::{Cache, KnownContents, Limits, Remote, sync_folder};
use crate::config::{ApiKeys, Config, MergeOn, ModelName};
use crate::eval::Evals;
use crate::jobs::{
    DISK_RESERVE, Intake, Job, JobStore, Keeper, OnCpu, PostgresJobs, Runner, SqliteJobs, Worker,
};
use crate::serving::{
    self, LoadRequest, OnServingGpus, Parentage, Served, Serving, ServingError, ServingLimits, WeightsFrom,
    check_model,
};
use crate::sources::ModelSources;
use crate::sweep::Sweeps;

/// How often the queue and the cache are looked after.
const UPKEEP: Duration = Duration::from_secs(600);

/// The state of every handler.
#[derive(Debug, Clone)]
pub struct AppState(pub Arc<App>);

/// The service without its HTTP side.
#[derive(Debug)]
pub struct App {
    pub config: Config,
    pub keys: ApiKeys,
    pub jobs: Arc<dyn JobStore>,
    pub cache: Cache,
    pub keeper: Keeper,
    pub sources: Arc<ModelSources>,
    /// Where families get their parents.
    pub parentage: Parentage,
    pub intake: Intake,
    pub worker: Arc<Worker>,
    pub serving: Arc<Serving>,
    pub evals: Arc<Evals>,
    pub sweeps: Arc<Sweeps>,
    /// Cancelled once the service begins to drain.
    pub shutdown: CancellationToken,
    _lock: File,
}

impl App {
    /// Opens everything. Nothing runs yet.
    pub async fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let devices = serving::open_devices(config.engine.device)?;
        let keys = match &config.http.api_key_file {
            Some(path) => ApiKeys::read(path)?,
            None => ApiKeys::default(),
        };
        let data_dir = config.storage.data_dir.clone();
        std::fs::create_dir_all(&data_dir).context("creating --data-dir")?;
        if let Some(parent) = data_dir.canonicalize().ok().as_deref().and_then(Path::parent) {
            // A read-only or foreign parent cannot be synced, and then the folder was not made here either.
            let _ = sync_folder(parent);
        }
        let lock = lock(&data_dir)?;
        let jobs = open_jobs(&config, &data_dir).await?;
        let node = node_name(&data_dir).context("naming this node in --data-dir")?;
        let recovered = jobs.recover(&node).await?;
        if recovered > 0 {
            info!(jobs = recovered, "jobs of the last run are back in the queue");
        }
        let shutdown = CancellationToken::new();
        let mut cache = Cache::open(&data_dir).context("opening the cache in --data-dir")?;
        if let Some(url) = &config.storage.cache_remote {
            let limits = Limits {
                reserve: DISK_RESERVE,
                budget: config.storage.cache_budget,
            };
            let remote = Remote::open(url).context("--cache-remote")?;
            cache = cache.shared_through(remote, limits, Handle::current(), shutdown.clone())?;
        }
        let models_dir = config.storage.models_dir.clone();
        let sources = Arc::new(ModelSources::new(
            models_dir,
            cache.clone(),
            jobs.clone(),
            Handle::current(),
        ));
        let on_gpu = devices.iter().any(|(_, device)| !matches!(device, Device::Cpu));
        if config.storage.merge_on == MergeOn::Gpu && !on_gpu {
            warn!("--merge-on gpu: there is no GPU, merges are computed on the CPU");
        }
        let limits = ServingLimits {
            max_batch_tokens: config.engine.batch_tokens(on_gpu) as usize,
            max_running: config.engine.max_running as usize,
            max_waiting: config.engine.max_waiting as usize,
            memory_bytes: config.engine.model_memory_bytes,
            kv_bytes: config.engine.kv_cache_bytes,
            max_models: config.engine.max_models as usize,
            max_points: config.engine.max_points as usize,
            hold: config.engine.hold(),
            fixed_shapes: config.engine.deterministic,
        };
        let serving = Serving::start(cache.clone(), devices, limits).context("starting the engine thread")?;
        let keeper = Keeper {
            cache: cache.clone(),
            sources: sources.clone(),
            budget: config.storage.cache_budget,
        };
        let known = KnownContents::open(&data_dir).context("opening the contents in --data-dir")?;
        let runner = Runner {
            sources: sources.clone(),
            cache: cache.clone(),
            keeper: keeper.clone(),
            known: known.clone(),
            merges: match config.storage.merge_on {
                MergeOn::Cpu => Arc::new(OnCpu),
                MergeOn::Gpu => Arc::new(OnServingGpus(serving.clone())),
            },
            options: MergeOptions {
                max_shard_bytes: config.storage.max_shard_bytes,
                ..MergeOptions::default()
            },
        };
        let (to_load, from) = (serving.clone(), cache.clone());
        let on_success = Box::new(move |job: &Job, names: Vec<String>| {
            for name in names {
                load_result(&to_load, &from, job, &name, posted(job));
            }
        });
        let worker = Arc::new(Worker::new(
            &node,
            jobs.clone(),
            cache.clone(),
            runner,
            on_success,
        ));
        let intake = Intake {
            store: jobs.clone(),
            sources: sources.clone(),
            cache: cache.clone(),
            max_queued: config.storage.max_queued_jobs,
            cache_budget: config.storage.cache_budget,
            node,
        };
        let evals = Arc::new(Evals::open(&data_dir).context("opening the evaluations in --data-dir")?);
        let parentage = Parentage {
            sources: sources.clone(),
            known,
        };
        Ok(Arc::new(Self {
            config,
            keys,
            jobs,
            cache,
            keeper,
            sweeps: Sweeps::open(&data_dir, serving.clone(), evals.clone(), parentage.clone())
                .context("opening the sweeps in --data-dir")?,
            parentage,
            sources,
            intake,
            worker,
            serving,
            evals,
            shutdown,
            _lock: lock,
        }))
    }

    /// Starts the worker; it ends when `shutdown` is cancelled.
    pub fn start_worker(self: &Arc<Self>) -> tokio::task::JoinHandle<()> {
        tokio::spawn(self.worker.clone().run(self.shutdown.clone()))
    }

    /// Works off sweeps until `shutdown`; the one that runs then goes on after the next start.
    pub fn start_sweeps(self: &Arc<Self>) -> tokio::task::JoinHandle<()> {
        tokio::spawn(self.sweeps.clone().work(self.shutdown.clone()))
    }

    /// Sends results to the remote cache, if there is one, until `shutdown`.
    pub fn start_sending(self: &Arc<Self>) -> tokio::task::JoinHandle<()> {
        tokio::spawn(self.cache.clone().send_entries(self.shutdown.clone()))
    }

    /// Looks after the queue and the cache until `shutdown`: old jobs are forgotten, and the cache kept within its budget.
    pub fn start_upkeep(self: &Arc<Self>) -> tokio::task::JoinHandle<()> {
        let app = self.clone();
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(UPKEEP);
            loop {
                tokio::select! {
                    _ = tick.tick() => app.upkeep().await,
                    () = app.cache.arrived() => app.keep_budget().await,
                    () = app.shutdown.cancelled() => return,
                }
            }
        })
    }

    async fn upkeep(&self) {
        let age = Duration::from_hours(24 * u64::from(self.config.storage.job_retention_days));
        match self.jobs.forget(age).await {
            Ok(0) => {}
            Ok(jobs) => info!(jobs, "old jobs are forgotten"),
            Err(e) => warn!(error = %e, "old jobs cannot be forgotten"),
        }
        self.keep_budget().await;
    }

    async fn keep_budget(&self) {
        let Some(budget) = self.config.storage.cache_budget else {
            return;
        };
        let (keeper, alone) = (self.keeper.clone(), self.cache.evicting().await);
        match tokio::task::spawn_blocking(move || keeper.shrink(budget, &alone)).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => warn!(error = %e, "the cache cannot be kept within its budget"),
            Err(e) => warn!(error = %e, "the cache was not looked after"),
        }
    }

    /// Loads the result of a job that is done under a name.
    pub fn serve_result(&self, job: &Job, name: &str) {
        load_result(&self.serving, &self.cache, job, name, Instant::now());
    }

    /// The model of a name; waits while it is loading. With --load-on-first-use a folder of --models-dir is loaded when
    /// its name is asked for.
    pub async fn model(&self, name: &str) -> Result<Arc<Served>, ServingError> {
        if let Some((family, shares)) = ModelName::split_point(name) {
            return self.serving.point_named(family, shares).await;
        }
        match self.serving.get(name).await {
            Err(ServingError::Unknown(_)) if self.config.engine.load_on_first_use => {}
            answer => return answer,
        }
        let unknown = || ServingError::Unknown(name.chars().take(100).collect());
        let key: ModelName = name.parse().map_err(|_| unknown())?;
        let (sources, reference) = (self.sources.clone(), name.to_owned());
        let located = tokio::task::spawn_blocking(move || {
            let located = sources.locate("model", &reference).ok()?;
            Some(check_model(&located.folder, located.adapter.as_deref()).map(|_| located))
        });
        let located = match located.await {
            Ok(Some(Ok(located))) => located,
            Ok(Some(Err(e))) => {
                let (name, detail) = (name.to_owned(), e.to_string());
                return Err(ServingError::Failed { name, detail });
            }
            Ok(None) | Err(_) => return Err(unknown()),
        };
        let request = LoadRequest {
            weights: located.into(),
            source: name.to_owned(),
            arithmetic: Arithmetic::F32,
            asked: Instant::now(),
        };
        self.serving.get_or_load(&key, request).await
    }
}

/// When the client posted the recipe, as far as the wall clock tells.
fn posted(job: &Job) -> Instant {
    let age = jiff::Timestamp::now().as_millisecond() - job.created_at;
    let age = Duration::from_millis(u64::try_from(age).unwrap_or_default());
    let now = Instant::now();
    now.checked_sub(age).unwrap_or(now)
}

fn load_result(serving: &Arc<Serving>, cache: &Cache, job: &Job, name: &str, asked: Instant) {
    let Some(digest) = job.digest else { return };
    let Ok(name) = name.parse::<ModelName>() else {
        error!(job = %job.id, "the job's name to serve under is no model name");
        return;
    };
    let request = LoadRequest {
        weights: WeightsFrom::Folder {
            folder: cache.path(&digest),
            adapter: None,
            cached: Some(digest),
        },
        source: format!("merge:{}", job.id),
        arithmetic: Arithmetic::F32,
        asked,
    };
    if let Err(e) = serving.load(name, request, None) {
        error!(job = %job.id, error = %e, "the result cannot be loaded");
    }
}

/// What this data folder is called among the nodes of a queue: made once.
fn node_name(data_dir: &Path) -> std::io::Result<String> {
    let path = data_dir.join("node");
    match std::fs::read_to_string(&path) {
        Ok(text) if uuid::Uuid::try_parse(text.trim()).is_ok() => return Ok(text.trim().to_owned()),
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let name = uuid::Uuid::new_v4().to_string();
    std::fs::write(&path, format!("{name}\n"))?;
    File::open(&path)?.sync_all()?;
    Ok(name)
}

/// One process a data folder: two would clean up each other's drafts.
fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(data_dir.join("lock"))
        .context("opening the lock in --data-dir")?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => anyhow::bail!("--data-dir is in use by another process"),
        Err(std::fs::TryLockError::Error(e)) => Err(e).context("locking --data-dir"),
    }
}

async fn open_jobs(config: &Config, data_dir: &Path) -> anyhow::Result<Arc<dyn JobStore>> {
    let failed = "opening the job database";
    let lease = config.storage.lease();
    let sqlite = |opened: SqliteJobs| -> Arc<dyn JobStore> { Arc::new(opened.with_lease(lease)) };
    match config.storage.database_url.as_deref() {
        None => {
            let opened = SqliteJobs::open(&data_dir.join("cauldron.db")).await;
            opened.map(sqlite).context(failed)
        }
        Some(url) if url.starts_with("sqlite:") => {
            SqliteJobs::open_url(url).await.map(sqlite).context(failed)
        }
        Some(url) if url.starts_with("postgres:") || url.starts_with("postgresql:") => {
            let opened = PostgresJobs::open_url(url).await.context(failed)?;
            Ok(Arc::new(opened.with_lease(lease)))
        }
        Some(_) => anyhow::bail!("--database-url: takes sqlite: and postgres: URLs"),
    }
}
