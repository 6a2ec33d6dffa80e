//! An S3 server of one test on a loopback port, with one bucket: moto, which scripts/s3_server.sh installs. It ends with
//! this value.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, path::Path};
use tokio::runtime::Runtime;

/// Set where a missing server is an error, not a reason to skip.
const REQUIRED: &str = "CAULDRON_REQUIRE_S3";
const BUCKET: &str = "shared";

pub struct S3 {
    program: PathBuf,
    port: u16,
    running: Mutex<Option<Child>>,
    runtime: Runtime,
    pub bucket: AmazonS3,
}

impl S3 {
    /// None where it is not installed. Then it says so, and loudly.
    pub fn start_new() -> Option<Self> {
        let server = Self::new()?;
        server.start();
        Some(server)
    }

    /// One that does not answer yet.
    pub fn new() -> Option<Self> {
        let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/oracle/s3/bin/moto_server");
        if !program.exists() {
            assert!(
                std::env::var_os(REQUIRED).is_none(),
                "{REQUIRED} is set, and there is no S3 server"
            );
            eprintln!("\n*** SKIPPED: no S3 server here (scripts/s3_server.sh installs it) ***\n");
            return None;
        }
        // Free a moment ago.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = AmazonS3Builder::new().with_bucket_name(BUCKET);
        for (name, value) in variables(port) {
            let key = name.to_ascii_lowercase().parse().unwrap();
            builder = builder.with_config(key, value);
        }
        Some(Self {
            program,
            port,
            running: Mutex::new(None),
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap(),
            bucket: builder.build().unwrap(),
        })
    }

    /// Starts it with an empty bucket, and returns when it answers.
    pub fn start(&self) {
        let child = Command::new(&self.program)
            .args(["-H", "127.0.0.1", "-p", &self.port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        *self.running.lock().unwrap() = Some(child);
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the S3 server does not start"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        let url = format!("http://127.0.0.1:{}/{BUCKET}", self.port);
        let made = self.runtime.block_on(reqwest::Client::new().put(url).send());
        assert!(made.unwrap().status().is_success());
    }

    /// What a program needs to use it, beside `--cache-remote s3://shared/...`.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        variables(self.port)
    }

    /// The objects below a folder.
    pub fn keys(&self, folder: &str) -> Vec<String> {
        let folder = Path::from(folder);
        let listed = self
            .runtime
            .block_on(self.bucket.list(Some(&folder)).try_collect::<Vec<_>>());
        listed
            .unwrap()
            .into_iter()
            .map(|object| object.location.to_string())
            .collect()
    }

    pub fn read(&self, key: &str) -> Vec<u8> {
        let key = Path::from(key);
        self.runtime.block_on(async {
            self.bucket
                .get(&key)
                .await
                .unwrap()
                .bytes()
                .await
                .unwrap()
                .to_vec()
        })
    }

    pub fn write(&self, key: &str, bytes: Vec<u8>) {
        self.runtime
            .block_on(self.bucket.put(&Path::from(key), PutPayload::from(bytes)))
            .unwrap();
    }

    pub fn delete(&self, key: &str) {
        self.runtime
            .block_on(self.bucket.delete(&Path::from(key)))
            .unwrap();
    }
}

fn variables(port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
    ]
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Some(mut child) = self.running.lock().unwrap().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
