//! `cauldron serve`: open everything, listen, and drain when told to stop.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::api;
use crate::app::{App, AppState};
use crate::config::Config;
use crate::telemetry;

/// How long running requests and the running merge have to end.
const DRAIN: Duration = Duration::from_secs(25);

pub fn run(config: Config) -> anyhow::Result<()> {
    telemetry::init_logs(&config.log)?;
    telemetry::metrics_handle()?;
    super::render_template::enable()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve(config));
    // A merge that does not stop in time is not waited for: it starts again after the next start.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let http = config.http.clone();
    if !http.listen.ip().is_loopback() && http.api_key_file.is_none() && !http.allow_unauthenticated {
        bail!(
            "--listen {}: beyond loopback the service needs --api-key-file (or --allow-unauthenticated)",
            http.listen
        );
    }
    let app = App::open(config).await?;
    let listener = TcpListener::bind(http.listen)
        .await
        .with_context(|| format!("listening on {}", http.listen))?;
    let address = listener.local_addr()?;
    let router = api::router(AppState(app.clone()))?;
    let worker = app.start_worker();
    info!(%address, version = env!("CARGO_PKG_VERSION"), "cauldron listens");

    let stop = app.shutdown.clone();
    let server = axum::serve(listener, router).with_graceful_shutdown(async move {
        wait_for_signal().await;
        info!("draining");
        stop.cancel();
    });
    let mut server = tokio::spawn(server.into_future());
    tokio::select! {
        ended = &mut server => ended.context("the HTTP server panicked")?.context("serving")?,
        () = drained_too_long(&app) => {
            warn!("some requests did not end in time");
            server.abort();
        }
    }
    if tokio::time::timeout(DRAIN, worker).await.is_err() {
        warn!("the running merge did not stop in time");
    }
    let serving = app.serving.clone();
    tokio::task::spawn_blocking(move || serving.shutdown()).await?;
    info!("stopped");
    Ok(())
}

async fn drained_too_long(app: &Arc<App>) {
    app.shutdown.cancelled().await;
    tokio::time::sleep(DRAIN).await;
}

/// Ctrl-C or SIGTERM.
async fn wait_for_signal() {
    let interrupt = tokio::signal::ctrl_c();
    match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
        }
        Err(e) => {
            warn!(error = %e, "SIGTERM cannot be watched");
            let _ = interrupt.await;
        }
    }
}
