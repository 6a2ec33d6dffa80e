//! Logs to standard error and the Prometheus registry. Each metric name is written once, here.

use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

pub const REQUESTS_RUNNING: &str = "cauldron_num_requests_running";
pub const REQUESTS_WAITING: &str = "cauldron_num_requests_waiting";
pub const PROMPT_TOKENS: &str = "cauldron_prompt_tokens";
pub const GENERATION_TOKENS: &str = "cauldron_generation_tokens";
pub const TIME_TO_FIRST_TOKEN: &str = "cauldron_time_to_first_token_seconds";
pub const INTER_TOKEN_LATENCY: &str = "cauldron_inter_token_latency_seconds";
pub const E2E_LATENCY: &str = "cauldron_e2e_request_latency_seconds";
pub const HTTP_REQUESTS: &str = "cauldron_http_requests_total";
pub const MERGES: &str = "cauldron_merges_total";
pub const JOBS: &str = "cauldron_jobs";
/// Merges whose lease another worker took, or that ended otherwise while they ran.
pub const LEASES_LOST: &str = "cauldron_leases_lost_total";
/// Merges whose result was in the cache, and those that had to be made.
pub const CACHE_HITS: &str = "cauldron_cache_hits_total";
pub const CACHE_MISSES: &str = "cauldron_cache_misses_total";
/// Entries that gave way to the budget, and what was taken out because it was damaged.
pub const CACHE_EVICTIONS: &str = "cauldron_cache_evictions_total";
pub const CACHE_DAMAGED: &str = "cauldron_cache_damaged_total";
pub const CACHE_ENTRIES: &str = "cauldron_cache_entries";
pub const CACHE_BYTES: &str = "cauldron_cache_bytes";
/// Checkpoints that were sent to the remote cache and fetched from it, tries that failed, and bytes of both.
pub const REMOTE_SENT: &str = "cauldron_remote_sent_total";
pub const REMOTE_FETCHED: &str = "cauldron_remote_fetched_total";
pub const REMOTE_ERRORS: &str = "cauldron_remote_errors_total";
pub const REMOTE_BYTES: &str = "cauldron_remote_bytes_total";
/// Checkpoints that wait to be sent.
pub const REMOTE_WAITING: &str = "cauldron_remote_waiting";
pub const MODELS: &str = "cauldron_models";
pub const MODEL_MEMORY_BYTES: &str = "cauldron_model_memory_bytes";
/// Devices that failed for good and were opened anew, and models that were unloaded because one had no memory left.
pub const DEVICE_FAILURES: &str = "cauldron_device_failures_total";
pub const DEVICE_RELIEVED: &str = "cauldron_device_relieved_total";
/// Merges to disk that were computed on a GPU to their end.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub const GPU_MERGES: &str = "cauldron_gpu_merges_total";
/// From POST /models or POST /merge to the first token of the model.
pub const MODEL_FIRST_TOKEN: &str = "cauldron_model_first_token_seconds";
/// From the moment a point of a family was begun until its weights were there, and bytes of parents and result by second of
/// the last pass.
pub const POINT_SECONDS: &str = "cauldron_point_seconds";
pub const POINT_BYTES_PER_SECOND: &str = "cauldron_point_bytes_per_second";
/// Share of the blocks of keys and values that requests hold, over all models.
pub const KV_CACHE_USAGE: &str = "cauldron_kv_cache_usage_perc";

const UPKEEP: Duration = Duration::from_secs(5);

/// Starts logging. A second call leaves the first in place.
pub fn init_logs(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let started = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    // Already started: by an embedding program or another test.
    drop(started);
    Ok(())
}

/// The process's registry, installed on first use.
pub fn metrics_handle() -> anyhow::Result<&'static PrometheusHandle> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    HANDLE
        .get_or_init(|| install().ok())
        .as_ref()
        .ok_or_else(|| anyhow::anyhow!("the metrics registry cannot be installed"))
}

/// Moves what histograms hold out of their buffers now and then: otherwise these grow until somebody scrapes.
pub async fn upkeep() {
    let mut tick = tokio::time::interval(UPKEEP);
    loop {
        tick.tick().await;
        if let Ok(handle) = metrics_handle() {
            handle.run_upkeep();
        }
    }
}

fn install() -> anyhow::Result<PrometheusHandle> {
    let seconds = [
        0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    ];
    let builder = PrometheusBuilder::new();
    let builder = builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &seconds)?;
    Ok(builder.install_recorder()?)
}
