//! `cauldron jobs` and `cauldron checkpoints`: what an operator does to the queue and the cache, of a server that runs or of a
//! data folder that no server uses. Both are asked the same way: a data folder through the router of a service that is
//! opened for it, without a socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Method, Request, Response, StatusCode, Uri, header};
use clap::{Args, Subcommand};
use futures_util::StreamExt;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tower::ServiceExt;

use crate::api;
use crate::app::{App, AppState};
use crate::config::{Config, DeviceChoice, LogConfig, StorageConfig};
use crate::telemetry;

/// Largest answer that is read.
const MOST_BYTES: usize = 256 << 20;
/// How long a server may take to accept the connection.
const CONNECT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub struct Target {
    /// Server to ask, as http://HOST:PORT; without it the data folder is opened, which no server may use then.
    #[arg(long, env = "CAULDRON_SERVER", global = true)]
    server: Option<Uri>,
    /// The server's API key.
    #[arg(long, env = "CAULDRON_API_KEY", global = true, hide_env_values = true)]
    api_key: Option<String>,
    /// Print the answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    storage: StorageConfig,
    #[command(flatten)]
    log: LogConfig,
}

impl Target {
    pub(super) fn has_server(&self) -> bool {
        self.server.is_some()
    }
}

#[derive(Debug, Args)]
pub struct JobsArgs {
    #[command(subcommand)]
    command: JobsCommand,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum JobsCommand {
    /// Newest first.
    List {
        /// queued, running, succeeded, failed or cancelled.
        #[arg(long)]
        status: Option<String>,
        /// At most so many, 1 to 200.
        #[arg(long, default_value_t = 50)]
        limit: u32,
        /// The id that the page before ended with.
        #[arg(long)]
        after: Option<String>,
    },
    /// All that is known of one job.
    Show { id: String },
    /// Cancel jobs that wait or run.
    Cancel { ids: Vec<String> },
}

#[derive(Debug, Args)]
pub struct CheckpointsArgs {
    #[command(subcommand)]
    command: CheckpointsCommand,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum CheckpointsCommand {
    /// All merged checkpoints.
    List,
    /// The manifest of one.
    Show { digest: String },
    /// Keep them, whatever the budget of the cache.
    Pin { digests: Vec<String> },
    /// No longer keep them.
    Unpin { digests: Vec<String> },
    /// Read every byte again; without digests of all. Damaged ones are taken out of the cache.
    Verify { digests: Vec<String> },
    /// Delete them.
    Delete { digests: Vec<String> },
    /// Remove what interrupted merges left; with a budget also the least recently used checkpoints.
    Gc {
        /// Bytes that may stay; default: --cache-budget.
        #[arg(long)]
        budget: Option<u64>,
    },
}

pub fn jobs(args: JobsArgs) -> anyhow::Result<()> {
    let JobsArgs { command, target } = args;
    with_service(target, async |service| match command {
        JobsCommand::List { status, limit, after } => {
            let given = [("status", status), ("after", after)];
            let given = given.into_iter().filter_map(|(name, value)| Some((name, value?)));
            let rest: String = given
                .map(|(name, value)| format!("&{name}={}", escape(&value)))
                .collect();
            let path = format!("/merge?limit={limit}{rest}");
            let listed = service.get(&path).await?;
            service.show(&listed, &|listed| {
                rows(
                    &listed["jobs"],
                    &["id", "status", "attempt", "created_at", "digest"],
                )
            });
            Ok(())
        }
        JobsCommand::Show { id } => {
            let job = service.get(&format!("/merge/{}", escape(&id))).await?;
            service.show(&job, &pretty);
            Ok(())
        }
        JobsCommand::Cancel { ids } => {
            each(&ids, async |id| {
                let path = format!("/merge/{}", escape(id));
                let job = service.call(Method::DELETE, &path, None).await?;
                service.show(&job, &|job| rows(&json!([job]), &["id", "status"]));
                Ok(())
            })
            .await
        }
    })
}

pub fn checkpoints(args: CheckpointsArgs) -> anyhow::Result<()> {
    let CheckpointsArgs { command, target } = args;
    with_service(target, async |service| {
        let path = |digest: &str, rest: &str| format!("/checkpoints/{}{rest}", escape(digest));
        match command {
            CheckpointsCommand::List => {
                let listed = service.get("/checkpoints").await?;
                service.show(&listed, &|listed| {
                    rows(
                        &listed["checkpoints"],
                        &["digest", "bytes", "pinned", "used_at", "lambda"],
                    )
                });
                Ok(())
            }
            CheckpointsCommand::Show { digest } => {
                let manifest = service.get(&path(&digest, "")).await?;
                service.show(&manifest, &pretty);
                Ok(())
            }
            CheckpointsCommand::Pin { digests } => {
                each(&digests, async |digest| {
                    service.call(Method::PUT, &path(digest, "/pin"), None).await?;
                    Ok(())
                })
                .await
            }
            CheckpointsCommand::Unpin { digests } => {
                each(&digests, async |digest| {
                    service.call(Method::DELETE, &path(digest, "/pin"), None).await?;
                    Ok(())
                })
                .await
            }
            CheckpointsCommand::Verify { digests } => {
                let digests = match digests.is_empty() {
                    false => digests,
                    true => digests_of(&service.get("/checkpoints").await?),
                };
                each(&digests, async |digest| {
                    let body = Some(json!({}));
                    let found = service.call(Method::POST, &path(digest, "/verify"), body).await?;
                    let whole = found["whole"] == true;
                    let found = json!({"digest": digest, "whole": whole});
                    service.show(&found, &|found| rows(&json!([found]), &["digest", "whole"]));
                    match whole {
                        true => Ok(()),
                        false => bail!("damaged: taken out of the cache, or of use where it is loaded"),
                    }
                })
                .await
            }
            CheckpointsCommand::Delete { digests } => {
                each(&digests, async |digest| {
                    service.call(Method::DELETE, &path(digest, ""), None).await?;
                    Ok(())
                })
                .await
            }
            CheckpointsCommand::Gc { budget } => {
                let body = Some(json!({"budget": budget}));
                let collected = service.call(Method::POST, "/checkpoints/gc", body).await?;
                service.show(&collected, &|collected| {
                    let evicted = collected["evicted"].as_array().map_or(0, Vec::len);
                    let (bytes, left) = (&collected["bytes"], &collected["bytes_left"]);
                    format!("{evicted} checkpoints of {bytes} bytes are gone, {left} bytes are left")
                });
                Ok(())
            }
        }
    })
}

fn with_service(target: Target, run: impl AsyncFnOnce(&Service) -> anyhow::Result<()>) -> anyhow::Result<()> {
    telemetry::init_logs(&target.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        let service = Service::open(target).await?;
        run(&service).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

/// Does it for each, whatever becomes of the others.
async fn each(names: &[String], run: impl AsyncFn(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if names.is_empty() {
        bail!("none is named");
    }
    let mut failed = 0;
    for name in names {
        if let Err(e) = run(name).await {
            eprintln!("{name}: {e:#}");
            failed += 1;
        }
    }
    match failed {
        0 => Ok(()),
        n => bail!("{n} of {} failed", names.len()),
    }
}

/// Who answers.
pub(super) struct Service {
    reach: Reach,
    json: bool,
}

enum Reach {
    Server {
        authority: String,
        key: Option<String>,
    },
    /// The service of a data folder.
    Here(Router),
}

impl Service {
    pub(super) async fn open(target: Target) -> anyhow::Result<Self> {
        let reach = match target.server {
            Some(server) => {
                if server.scheme_str() != Some("http") {
                    bail!("--server takes http://HOST:PORT");
                }
                let host = server.host().context("--server takes http://HOST:PORT")?;
                Reach::Server {
                    authority: format!("{host}:{}", server.port_u16().unwrap_or(80)),
                    key: target.api_key,
                }
            }
            None => {
                if !target.storage.data_dir.is_dir() {
                    bail!("--data-dir: no such folder; --server asks a running one");
                }
                let mut config = Config::for_storage(target.storage, target.log);
                config.engine.device = DeviceChoice::Cpu;
                let app = App::open(config).await?;
                Reach::Here(api::router(AppState(app))?)
            }
        };
        Ok(Self {
            reach,
            json: target.json,
        })
    }

    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path, None).await
    }

    /// What evaluation clients take for a base URL.
    pub(super) fn base_url(&self) -> String {
        match &self.reach {
            Reach::Server { authority, .. } => format!("http://{authority}/v1"),
            Reach::Here(_) => "http://localhost/v1".to_owned(),
        }
    }

    /// A text that is no JSON.
    pub(super) async fn text(&self, path: &str) -> anyhow::Result<String> {
        let (status, bytes) = self.send(Method::GET, path, None).await?;
        match status.is_success() {
            true => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            false => bail!("{status}"),
        }
    }

    /// The answer's JSON; a refusal is an error.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Value> {
        let (status, bytes) = self.send(method, path, body).await?;
        if status == StatusCode::NO_CONTENT {
            return Ok(Value::Null);
        }
        let answer: Value =
            serde_json::from_slice(&bytes).with_context(|| format!("the answer, {status}, is no JSON"))?;
        match status.is_success() {
            true => Ok(answer),
            false => {
                let detail = answer["detail"].as_str().or(answer["error"]["message"].as_str());
                let field = answer["field"]
                    .as_str()
                    .map(|field| format!("{field}: "))
                    .unwrap_or_default();
                bail!("{field}{}", detail.unwrap_or(status.as_str()))
            }
        }
    }

    /// Writes what a path answers, so many bytes, into a file, as it comes.
    pub(super) async fn download(&self, path: &str, file: &Path, bytes: u64) -> anyhow::Result<()> {
        let response = self.respond(Method::GET, path, None).await?;
        if !response.status().is_success() {
            bail!("{path}: {}", response.status());
        }
        let mut out = tokio::fs::File::create(file)
            .await
            .with_context(|| format!("writing {}", file.display()))?;
        let mut pieces = response.into_body().into_data_stream();
        let mut written = 0;
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            out.write_all(&piece).await?;
            written += piece.len() as u64;
        }
        // What is still on its way may fail.
        out.flush().await?;
        out.sync_all().await?;
        match written == bytes {
            true => Ok(()),
            false => bail!("{path}: {written} of {bytes} bytes came"),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let response = self.respond(method, path, body).await?;
        let status = response.status();
        Ok((status, to_bytes(response.into_body(), MOST_BYTES).await?))
    }

    async fn respond(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Response<Body>> {
        let host = match &self.reach {
            Reach::Server { authority, .. } => authority,
            Reach::Here(_) => "localhost",
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host);
        if let Reach::Server { key: Some(key), .. } = &self.reach {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(body.map_or(Body::empty(), |body| Body::from(body.to_string())))?;
        Ok(match &self.reach {
            Reach::Here(router) => router.clone().oneshot(request).await?,
            Reach::Server { authority, .. } => {
                let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(authority.as_str()));
                let stream = connecting
                    .await
                    .map_err(|_| anyhow!("it does not answer"))
                    .and_then(|stream| Ok(stream?))
                    .with_context(|| format!("connecting to {authority}"))?;
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                sender.send_request(request).await?.map(Body::new)
            }
        })
    }

    pub(super) fn show(&self, answer: &Value, as_text: &dyn Fn(&Value) -> String) {
        match self.json {
            true => println!("{}", pretty(answer)),
            false => println!("{}", as_text(answer).trim_end()),
        }
    }
}

fn digests_of(listed: &Value) -> Vec<String> {
    let checkpoints = listed["checkpoints"].as_array().map_or(&[][..], Vec::as_slice);
    let digests = checkpoints.iter().filter_map(|c| c["digest"].as_str());
    digests.map(str::to_owned).collect()
}

fn pretty(answer: &Value) -> String {
    serde_json::to_string_pretty(answer).unwrap_or_default()
}

/// One line an item, in columns.
fn rows(items: &Value, columns: &[&str]) -> String {
    let items = items.as_array().map_or(&[][..], Vec::as_slice);
    let text = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let head = columns.iter().map(|column| (*column).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(head)
        .chain(
            items
                .iter()
                .map(|item| columns.iter().map(|column| text(&item[*column])).collect()),
        )
        .collect();
    let width = |column: usize| lines.iter().map(|line: &Vec<String>| line[column].len()).max();
    let widths: Vec<usize> = (0..columns.len()).map(|c| width(c).unwrap_or(0)).collect();
    let mut out = String::new();
    for line in &lines {
        let cells = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}

/// What stands for itself in a path or a query; everything else is escaped.
pub(super) fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes()
        .map(|byte| match plain(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}
