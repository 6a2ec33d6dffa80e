//! The program itself, over its port.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A running `cauldron serve`, killed with this value.
pub struct Program {
    pub child: Child,
    pub address: String,
    pub dir: Option<tempfile::TempDir>,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cauldron"));
    command.env("RUST_BACKTRACE", "1").stderr(Stdio::piped());
    command
}

impl Program {
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), &[], &[])
    }

    /// On the data folder `data` and the models in `dir`.
    pub fn start_in(dir: tempfile::TempDir, more: &[&str], environment: &[(&str, &str)]) -> Self {
        let data = dir.path().join("data");
        let mut program = Self::start_on(&data, dir.path(), more, environment);
        program.dir = Some(dir);
        program
    }

    /// The folder of the models, of one that was started in a folder of its own.
    pub fn models(&self) -> &Path {
        self.dir.as_ref().expect("its own folder").path()
    }

    pub fn start_on(data: &Path, models: &Path, more: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut child = command()
            .envs(environment.iter().copied())
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
                "--data-dir",
            ])
            .arg(data)
            .arg("--models-dir")
            .arg(models)
            .args(more)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            if let Some(address) = line["fields"]["address"].as_str() {
                break address.to_owned();
            }
        };
        // Read on, so that the pipe is never full.
        let shown = std::env::var_os("CAULDRON_TEST_LOGS").is_some();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|_| shown) {
                eprintln!("{line}");
            }
        });
        Self {
            child,
            address,
            dir: None,
        }
    }

    /// Ends at once, as in a power cut. Gives the folder back.
    pub fn kill(mut self) -> tempfile::TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.dir.take().unwrap()
    }

    /// The JSON that a request is answered with.
    pub fn json(&self, method: &str, path: &str, body: &str) -> Value {
        let answer = self.ask(method, path, body);
        answer
            .unwrap_or_else(|| panic!("{method} {path} was not answered"))
            .1
    }

    /// The status and JSON that a request is answered with; None if the program went away, or answered in part only.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> Option<(u16, Value)> {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        let mut stream = TcpStream::connect(&self.address).ok()?;
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let body = if body.is_empty() { "null" } else { body };
        Some((status, serde_json::from_str(body).ok()?))
    }

    /// Waits until a job has ended.
    pub fn finished(&self, id: &str, longest: Duration) -> Value {
        let start = Instant::now();
        loop {
            let job = self.json("GET", &format!("/merge/{id}"), "");
            if ["succeeded", "failed", "cancelled"]
                .iter()
                .any(|end| job["status"] == *end)
            {
                return job;
            }
            assert!(start.elapsed() < longest, "{job} has not ended");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(sent.unwrap().success());
    }

    pub fn open(&self, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// A body that is no JSON.
    pub fn text(&self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        self.open(&request).read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    pub fn status_line(&self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        self.open(&request).read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    }

    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Seconds until the program has ended, well.
    pub fn ended(&mut self) -> f64 {
        let start = Instant::now();
        assert!(self.child.wait().unwrap().success());
        start.elapsed().as_secs_f64()
    }
}

/// A model of 40 tensors of 4 MB.
pub fn write_large_model(dir: &Path, byte: u8) {
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
