//! The program as an operator sees it: its exit, its signals, its first error.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Program {
    child: Child,
    address: String,
    dir: Option<tempfile::TempDir>,
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
        Self::start_in(tempfile::tempdir().unwrap(), &[])
    }

    fn start_in(dir: tempfile::TempDir, more: &[&str]) -> Self {
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
            .args(more)
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
            dir: Some(dir),
        }
    }

    /// Ends at once, as in a power cut. Gives the folder back.
    fn kill(mut self) -> tempfile::TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.dir.take().unwrap()
    }

    /// The JSON that a request is answered with.
    fn json(&self, method: &str, path: &str, body: &str) -> serde_json::Value {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        let mut answer = String::new();
        self.open(&request).read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"))
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

/// A model of 40 tensors of 4 MB.
fn write_model(dir: &Path, byte: u8) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let (bytes, count) = (4usize << 20, 40);
    let tensors = (0..count).map(|i| {
        let offsets = [i * bytes, (i + 1) * bytes];
        let entry = serde_json::json!({"dtype": "F32", "shape": [1024, 1024], "data_offsets": offsets});
        (format!("t{i:02}"), entry)
    });
    let header = serde_json::Value::Object(tensors.collect()).to_string();
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // 0x3c and its like make small numbers.
    file.write_all(&vec![byte; bytes * count]).unwrap();
}

/// The inode of the first shard of the only folder under this one.
fn first_shard(root: &Path) -> Option<(PathBuf, u64)> {
    let folder = fs::read_dir(root).ok()?.next()?.ok()?.path();
    let shard = folder.join("model-00001-of-00040.safetensors");
    Some((folder, fs::metadata(shard).ok()?.ino()))
}

#[test]
fn a_killed_merge_goes_on_with_its_finished_shards() {
    let dir = tempfile::tempdir().unwrap();
    write_model(&dir.path().join("a"), 0x3c);
    write_model(&dir.path().join("b"), 0x3d);
    let shards = ["--max-shard-bytes", "5000000"];
    let program = Program::start_in(dir, &shards);
    let recipe = r#"{"method": "average", "models": ["a", "b"]}"#;
    let job = program.json("POST", "/merge", recipe)["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let data = program.dir.as_ref().unwrap().path().join("data");
    let finished = |folder: &Path| {
        let journal = fs::read_to_string(folder.join("merge.journal")).unwrap_or_default();
        journal.lines().count() > 3
    };
    let start = Instant::now();
    let inode = loop {
        match first_shard(&data.join("tmp")) {
            Some((folder, inode)) if finished(&folder) => break inode,
            _ => assert!(start.elapsed().as_secs() < 60, "no shard was finished"),
        }
    };
    let program = Program::start_in(program.kill(), &shards);
    let start = Instant::now();
    loop {
        let state = program.json("GET", &format!("/merge/{job}"), "");
        match state["status"].as_str().unwrap() {
            "succeeded" => break,
            "queued" | "running" => assert!(start.elapsed().as_secs() < 120, "{state}"),
            _ => panic!("{state}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let (_, published) = first_shard(&data.join("checkpoints")).unwrap();
    assert_eq!(published, inode, "the shard was made again");
    assert_eq!(fs::read_dir(data.join("tmp")).unwrap().count(), 0);
}
