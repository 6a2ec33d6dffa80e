//! `cauldron serve`: open everything, listen, and drain when told to stop.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{info, warn};

use crate::api;
use crate::app::{App, AppState};
use crate::config::Config;
use crate::server::{Limits, Server};
use crate::telemetry;

/// How long running requests and the running merge have to end.
const DRAIN: Duration = Duration::from_secs(25);
/// The end of that: what still runs is stopped, and its client hears of it.
const LAST_WORD: Duration = Duration::from_secs(2);
/// How long /readyz says no at least, so that who sends requests here can hear it.
const LINGER: Duration = Duration::from_secs(2);

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
    let mut signals = Signals::watch().context("watching for signals")?;
    let app = App::open(config).await?;
    let listener = TcpListener::bind(http.listen)
        .await
        .with_context(|| format!("listening on {}", http.listen))?;
    let address = listener.local_addr()?;
    let router = api::router(AppState(app.clone()))?;
    let worker = app.start_worker();
    app.start_upkeep();
    app.start_sending();
    app.start_sweeps();
    tokio::spawn(telemetry::upkeep());
    let server = Server::start(listener, router, Limits::new(http.max_connections as usize));
    info!(%address, version = env!("CARGO_PKG_VERSION"), "cauldron listens");

    signals.next().await;
    info!("draining");
    app.shutdown.cancel();
    server.drain();
    tokio::select! {
        () = drain(&app, &server, worker) => info!("stopped"),
        () = signals.next() => warn!("stopped at once"),
    }
    Ok(())
}

/// Lets everything end; what has not by the deadline is ended.
async fn drain(app: &App, server: &Server, worker: JoinHandle<()>) {
    let begun = Instant::now();
    let ended = async {
        if worker.await.is_err() {
            warn!("the worker had panicked");
        }
        sleep_until(begun + LINGER).await;
        server.idle().await;
    };
    if timeout(DRAIN - LAST_WORD, ended).await.is_err() {
        warn!("some work did not end in time");
    }
    let serving = app.serving.clone();
    let stopping = tokio::task::spawn_blocking(move || serving.shutdown());
    let deadline = begun + DRAIN;
    // Streams end with an error event now; those that are read are read to it.
    let told = timeout_at(deadline, async {
        let _ = stopping.await;
        server.idle().await;
    });
    if told.await.is_err() {
        warn!("some requests did not end in time");
    }
    server.stop(LAST_WORD / 4).await;
}

/// Ctrl-C and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn watch() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
