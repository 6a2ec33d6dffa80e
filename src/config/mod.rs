//! What an operator may set: one documented struct a concern, each value a flag and a `CAULDRON_*` variable.

mod keys;
mod names;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

pub use keys::{ApiKeys, Scope};
pub use names::{ModelName, NameError};

const CPU_BATCH_TOKENS: u32 = 256;
const GPU_BATCH_TOKENS: u32 = 2048;
const DEFAULT_RUNNING: u32 = 64;
const DEFAULT_WAITING: u32 = 4096;
const DEFAULT_MODELS: u32 = 32;
const DEFAULT_POINTS: u32 = 8;
const DEFAULT_CONNECTIONS: u32 = 1024;
const DEFAULT_HOLD_SECONDS: u64 = 60;

/// Everything `cauldron serve` needs.
#[derive(Debug, Clone, Args)]
pub struct Config {
    #[command(flatten)]
    pub http: HttpConfig,
    #[command(flatten)]
    pub storage: StorageConfig,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub log: LogConfig,
}

impl Config {
    /// For commands without a server: the defaults of everything that listens or serves.
    pub fn for_storage(storage: StorageConfig, log: LogConfig) -> Self {
        Self {
            http: HttpConfig {
                listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
                api_key_file: None,
                allowed_hosts: Vec::new(),
                allow_unauthenticated: false,
                max_connections: DEFAULT_CONNECTIONS,
            },
            storage,
            engine: EngineArgs {
                device: DeviceChoice::Auto,
                deterministic: false,
                max_batch_tokens: None,
                max_running: DEFAULT_RUNNING,
                max_waiting: DEFAULT_WAITING,
                kv_cache_bytes: None,
                model_memory_bytes: None,
                load_on_first_use: false,
                max_models: DEFAULT_MODELS,
                max_points: DEFAULT_POINTS,
                hold_seconds: DEFAULT_HOLD_SECONDS,
            },
            log,
        }
    }
}

/// Where the service listens and whom it answers.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpConfig {
    /// Address to listen on. Anything but loopback needs --api-key-file.
    #[arg(long, env = "CAULDRON_LISTEN", default_value_t = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080))]
    pub listen: SocketAddr,
    /// File of API keys, one a line: `KEY`, `admin KEY` or `inference KEY`. Empty lines and # comments are skipped.
    #[arg(long, env = "CAULDRON_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Host names that requests may carry besides loopback names and, beyond loopback, IP addresses (beyond loopback with
    /// keys set: none given means any).
    #[arg(long = "allowed-host", env = "CAULDRON_ALLOWED_HOSTS", value_delimiter = ',')]
    pub allowed_hosts: Vec<String>,
    /// Listen beyond loopback without API keys, for networks where something else keeps strangers out.
    #[arg(long, env = "CAULDRON_ALLOW_UNAUTHENTICATED")]
    pub allow_unauthenticated: bool,
    /// Connections at the same time; more wait to be accepted.
    #[arg(long, env = "CAULDRON_MAX_CONNECTIONS", default_value_t = DEFAULT_CONNECTIONS, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub max_connections: u32,
}

/// Where models, results and the queue lie.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Storage")]
pub struct StorageConfig {
    /// Folder of the queue and of merged checkpoints; created if missing, used by one process at a time.
    #[arg(long, global = true, env = "CAULDRON_DATA_DIR", default_value = "data")]
    pub data_dir: PathBuf,
    /// Folder whose subfolders are the models and adapters that recipes may name.
    #[arg(long, global = true, env = "CAULDRON_MODELS_DIR", default_value = "models")]
    pub models_dir: PathBuf,
    /// Folder whose files are the tasks that evaluations may name: JSON lines.
    #[arg(long, global = true, env = "CAULDRON_TASKS_DIR", default_value = "tasks")]
    pub tasks_dir: PathBuf,
    /// The queue's database, `sqlite:` or `postgres:`; default: sqlite file cauldron.db in the data folder. Nodes that share
    /// a postgres database share its queue.
    #[arg(long, global = true, env = "CAULDRON_DATABASE_URL")]
    pub database_url: Option<String>,
    /// Merged checkpoints are cut into files of at most this many bytes.
    #[arg(long, global = true, env = "CAULDRON_MAX_SHARD_BYTES", default_value_t = 5_000_000_000, value_parser = clap::value_parser!(u64).range(1 << 20..))]
    pub max_shard_bytes: u64,
    /// Where merges are computed; the bytes are the same. `gpu`: their values stream through the GPU that models are served on,
    /// of several the one with the most room, without a server the first; what its kernels do not compute, finds no room or
    /// fails there is computed on the CPU.
    #[arg(long, global = true, env = "CAULDRON_MERGE_ON", default_value = "cpu")]
    pub merge_on: MergeOn,
    /// Bytes that merged checkpoints may take. The least recently used give way; what is loaded, pinned, being read or
    /// named by a merge that waits stays. Default: nothing is deleted unasked.
    #[arg(long, global = true, env = "CAULDRON_CACHE_BUDGET")]
    pub cache_budget: Option<u64>,
    /// A bucket that nodes share results through, `s3://bucket/prefix`: what is merged here is stored there, and what is
    /// missing here fetched from there. Credentials, region and endpoint come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    /// AWS_REGION, AWS_ENDPOINT_URL and their like; AWS_ALLOW_HTTP=true allows an endpoint without TLS.
    #[arg(long, global = true, env = "CAULDRON_CACHE_REMOTE")]
    pub cache_remote: Option<String>,
    /// Days after which jobs that have ended are forgotten; their checkpoints stay.
    #[arg(long, global = true, env = "CAULDRON_JOB_RETENTION_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub job_retention_days: u32,
    /// Seconds that the node of a running merge may be silent before another takes the merge over.
    #[arg(long, global = true, env = "CAULDRON_LEASE_SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(3..=3600))]
    pub lease_seconds: u32,
    /// Jobs that may wait; more are answered 429.
    #[arg(long, global = true, env = "CAULDRON_MAX_QUEUED_JOBS", default_value_t = 1000)]
    pub max_queued_jobs: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MergeOn {
    Cpu,
    Gpu,
}

impl StorageConfig {
    pub fn lease(&self) -> Duration {
        Duration::from_secs(u64::from(self.lease_seconds))
    }
}

/// How models are served.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Serving")]
pub struct EngineArgs {
    /// Where models are served: `cpu`, `cuda:N`, or `cuda:all`, each model on the GPU with the most room. `auto` takes the first
    /// GPU if this build and machine have one.
    #[arg(long, env = "CAULDRON_DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// On a GPU, compute every product with weights in pieces of 128 rows, so that a score does not depend on what else is
    /// in the batch; slower for few rows. On the CPU that holds anyway.
    #[arg(long, env = "CAULDRON_DETERMINISTIC")]
    pub deterministic: bool,
    /// Tokens of one forward pass over all its sequences. A pass is not interrupted: it is what a stream waits for
    /// beside a long prompt, and a request that is cancelled. Default: 256 on a CPU, 2048 on a GPU.
    #[arg(long, env = "CAULDRON_MAX_BATCH_TOKENS", value_parser = clap::value_parser!(u32).range(16..=1 << 20))]
    pub max_batch_tokens: Option<u32>,
    /// Sequences that generate at the same time, a model.
    #[arg(long, env = "CAULDRON_MAX_RUNNING", default_value_t = DEFAULT_RUNNING, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_running: u32,
    /// Sequences that may wait, a model; more are answered 429.
    #[arg(long, env = "CAULDRON_MAX_WAITING", default_value_t = DEFAULT_WAITING)]
    pub max_waiting: u32,
    /// Bytes of keys and values that a model may hold, of the sequences that run and of texts that may come again. Longer
    /// requests than fit are refused. Default: a quarter of the memory that is free at the start, at most 4 GiB, or less
    /// where other models have left less.
    #[arg(long, env = "CAULDRON_KV_CACHE_BYTES", value_parser = clap::value_parser!(u64).range(1 << 20..))]
    pub kv_cache_bytes: Option<u64>,
    /// Bytes that all loaded models of a device may take, weights and keys and values. A model that needs more than is left takes the
    /// place of those that were not asked for longest; they come back when they are asked for. Default: four fifths of
    /// the memory that is free at the start, on a GPU of its own.
    #[arg(long, env = "CAULDRON_MODEL_MEMORY_BYTES", value_parser = clap::value_parser!(u64).range(1 << 20..))]
    pub model_memory_bytes: Option<u64>,
    /// Load a model of --models-dir under its own name when it is first asked for.
    #[arg(long, env = "CAULDRON_LOAD_ON_FIRST_USE")]
    pub load_on_first_use: bool,
    /// Names that models may have at the same time; more are answered 429.
    #[arg(long, env = "CAULDRON_MAX_MODELS", default_value_t = DEFAULT_MODELS, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_models: u32,
    /// Points of families (`name@lambda`) that are in memory at the same time; the one not asked for longest makes room.
    #[arg(long, env = "CAULDRON_MAX_POINTS", default_value_t = DEFAULT_POINTS, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_points: u32,
    /// Seconds that requests for a model that is loading are held.
    #[arg(long, env = "CAULDRON_HOLD_SECONDS", default_value_t = DEFAULT_HOLD_SECONDS, value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub hold_seconds: u64,
}

impl EngineArgs {
    pub fn batch_tokens(&self, on_gpu: bool) -> u32 {
        self.max_batch_tokens.unwrap_or(match on_gpu {
            true => GPU_BATCH_TOKENS,
            false => CPU_BATCH_TOKENS,
        })
    }

    pub fn hold(&self) -> Duration {
        Duration::from_secs(self.hold_seconds)
    }
}

/// What is written to standard error.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logs")]
pub struct LogConfig {
    /// `text` or `json`.
    #[arg(long, global = true, env = "CAULDRON_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Filter in the syntax of tracing's EnvFilter.
    #[arg(long, global = true, env = "CAULDRON_LOG", default_value = "info,sqlx=warn")]
    pub log: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// A device: the CPU, or a GPU by number; or all GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
    AllCuda,
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "cuda:all" => Ok(Self::AllCuda),
            other => other
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "must be auto, cpu, cuda:N or cuda:all".to_owned()),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::AllCuda => f.write_str("cuda:all"),
        }
    }
}
