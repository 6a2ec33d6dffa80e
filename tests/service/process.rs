//! The program as an operator sees it: its exit, its signals, its first error.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Program {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cauldron"));
    command.env("RUST_BACKTRACE", "1").stderr(Stdio::piped());
    command
}

impl Program {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = command()
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
                "--data-dir",
            ])
            .arg(dir.path().join("data"))
            .arg("--models-dir")
            .arg(dir.path())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            if let Some(address) = line["fields"]["address"].as_str() {
                break address.to_owned();
            }
        };
        // Read on, so that the pipe is never full.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            child,
            address,
            _dir: dir,
        }
    }

    fn open(&self, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    fn status_line(&self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        self.open(&request).read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    }

    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Seconds until the program has ended, well.
    fn ended(&mut self) -> f64 {
        let start = Instant::now();
        assert!(self.child.wait().unwrap().success());
        start.elapsed().as_secs_f64()
    }
}

#[test]
fn a_term_signal_drains_and_half_a_header_does_not_hold_it_up() {
    let mut program = Program::start();
    assert_eq!(program.status_line("/readyz"), "HTTP/1.1 200 OK");
    let _half = program.open("GET /livez HTTP/1.1\r\nhost: loc");
    program.terminate();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(program.status_line("/readyz"), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(program.status_line("/livez"), "HTTP/1.1 200 OK");
    let seconds = program.ended();
    assert!(seconds < 5.0, "{seconds}");
}

#[test]
fn a_second_signal_ends_the_drain() {
    let mut program = Program::start();
    program.terminate();
    std::thread::sleep(Duration::from_millis(200));
    program.terminate();
    let seconds = program.ended();
    assert!(seconds < 1.5, "{seconds}");
}

#[test]
fn an_error_at_the_start_is_one_line_with_its_causes() {
    let dir = tempfile::tempdir().unwrap();
    let out = command()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--api-key-file",
            "/nowhere/keys",
        ])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.contains("--api-key-file") && text.contains("No such file"),
        "{text}"
    );
}
