//! Connections, over a real port: what a client may take of time and space, and how they end.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cauldron::server::{Limits, Server};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::common::TestApp;

const SHORT: Duration = Duration::from_millis(300);

struct Served {
    app: TestApp,
    server: Server,
    address: SocketAddr,
}

async fn serve(change: impl FnOnce(&mut Limits)) -> Served {
    let app = TestApp::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut limits = Limits::new(100);
    change(&mut limits);
    let server = Server::start(listener, app.router.clone(), limits);
    Served { app, server, address }
}

impl Served {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn open(&self, text: &str) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    /// Sends text and reads to the end of the connection.
    async fn ask(&self, text: &str) -> String {
        to_end(&mut self.open(text).await).await
    }
}

/// All that comes until the server closes; fails if it does not.
async fn to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    let ended = tokio::time::timeout(Duration::from_secs(20), read).await;
    // A reset is an end too.
    let _ = ended.expect("the connection stays open");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

const LIVEZ: &str = "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";
const READYZ: &str = "GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n";

#[tokio::test]
async fn a_header_that_is_half_or_late_ends_the_connection() {
    let served = serve(|limits| limits.header = SHORT).await;
    for text in ["", "GET /livez HT", "GET /livez HTTP/1.1\r\nhost: loc"] {
        let start = Instant::now();
        let mut stream = served.open(text).await;
        to_end(&mut stream).await;
        assert!(start.elapsed() < Duration::from_secs(5), "{text:?}");
    }
    // So does silence after an answer.
    let answer = served.ask(LIVEZ).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn headers_are_bounded() {
    let served = serve(|_| {}).await;
    let large = format!(
        "GET /livez HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n",
        "a".repeat(40 << 10)
    );
    let answer = served.ask(&large).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let fits = format!(
        "GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: {}\r\n\r\n",
        "a".repeat(30 << 10)
    );
    let answer = served.ask(&fits).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let hostless = served
        .ask("GET /models HTTP/1.1\r\nconnection: close\r\n\r\n")
        .await;
    assert!(hostless.starts_with("HTTP/1.1 400"), "{hostless}");
}

#[tokio::test]
async fn a_body_that_trickles_is_given_up() {
    let served = serve(|limits| limits.body = SHORT).await;
    for path in ["/merge", "/v1/completions"] {
        let start = Instant::now();
        let whole = post(path, &" ".repeat(1000));
        let mut stream = served.open(&whole[..whole.len() - 900]).await;
        let mut answer = Vec::new();
        let mut block = [0u8; 1024];
        // A byte now and then does not help.
        loop {
            let _ = stream.write_all(b" ").await;
            match tokio::time::timeout(SHORT / 3, stream.read(&mut block)).await {
                Ok(Ok(0) | Err(_)) => break,
                Ok(Ok(n)) => answer.extend_from_slice(&block[..n]),
                Err(_) => assert!(start.elapsed() < Duration::from_secs(10)),
            }
        }
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with("HTTP/1.1 4"), "{path}: {answer}");
    }
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() {
    let served = serve(|limits| limits.stall = SHORT).await;
    let request = "GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(2000);
    let mut stream = served.connect().await;
    let (_reading, mut writing) = stream.split();
    // Answers pile up until nothing more fits between us; then the server hangs up and our writes fail.
    let start = Instant::now();
    let failed = async { while writing.write_all(request.as_bytes()).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(20), failed)
        .await
        .expect("the server waits for a client that takes nothing");
    assert!(start.elapsed() >= SHORT);
}

#[tokio::test]
async fn connections_are_bounded_and_the_next_one_waits() {
    let served = serve(|limits| {
        limits.connections = 2;
        limits.header = Duration::from_secs(1);
    })
    .await;
    let _slow = [served.open("GET").await, served.open("GET").await];
    let start = Instant::now();
    let answer = served.ask(LIVEZ).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        start.elapsed() >= Duration::from_millis(500),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn a_drain_closes_what_waits_and_still_says_that_it_drains() {
    let served = serve(|_| {}).await;
    let mut idle = served.open(LIVEZ).await;
    let mut block = [0u8; 1024];
    assert!(idle.read(&mut block).await.unwrap() > 0);
    let mut half = served.open("GET /livez HTTP/1.1\r\nhost: loc").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let start = Instant::now();
    served.app.app.shutdown.cancel();
    served.server.drain();
    to_end(&mut idle).await;
    assert!(start.elapsed() < Duration::from_millis(900));
    to_end(&mut half).await;
    assert!(start.elapsed() < Duration::from_secs(3));
    let answer = served.ask(READYZ).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let refused = served
        .ask(&post("/v1/completions", r#"{"model":"m","prompt":"x"}"#))
        .await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    served.server.idle().await;
    served.server.stop(SHORT).await;
    assert!(TcpStream::connect(served.address).await.is_err());
}

#[tokio::test]
async fn a_stream_that_outlives_the_drain_ends_with_an_error_event() {
    let served = serve(|_| {}).await;
    served.app.load("m", "math").await;
    let body =
        json!({"model": "m", "prompt": "x", "max_tokens": 250, "n": 64, "stream": true, "ignore_eos": true});
    let mut stream = served.open(&post("/v1/completions", &body.to_string())).await;
    let mut block = [0u8; 64];
    assert!(stream.read(&mut block).await.unwrap() > 0);
    served.app.app.shutdown.cancel();
    served.server.drain();
    let serving = served.app.app.serving.clone();
    tokio::task::spawn_blocking(move || serving.shutdown())
        .await
        .unwrap();
    let text = to_end(&mut stream).await;
    assert!(text.contains("\"error\""), "{text}");
    assert!(!text.contains("[DONE]"), "{text}");
    served.server.idle().await;
}
