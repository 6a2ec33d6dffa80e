//! Nodes that share results through a bucket, and what goes wrong on the way.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::postgres::Postgres;
use crate::common::program::{Program, write_large_model};
use crate::common::s3::S3;
use crate::common::{Shape, write_model};
use crate::common::{invariants, names_in};

const MINUTE: Duration = Duration::from_secs(60);

/// A node with data and models of its own below `dir`, and the bucket behind it.
struct Node {
    data: PathBuf,
    models: PathBuf,
    more: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

impl Node {
    fn new(dir: &Path, name: &str, s3: &S3) -> Self {
        let remote = ["--cache-remote", "s3://shared/some/results"].map(str::to_owned);
        Self {
            data: dir.join(name),
            models: dir.join("models"),
            more: remote.into(),
            environment: s3.variables(),
        }
    }

    fn with(mut self, more: &[&str]) -> Self {
        self.more.extend(more.iter().map(|&text| text.to_owned()));
        self
    }

    fn start(&self) -> Program {
        self.start_with(&[])
    }

    fn start_with(&self, environment: &[(&str, &str)]) -> Program {
        let more: Vec<&str> = self.more.iter().map(String::as_str).collect();
        let own = self
            .environment
            .iter()
            .map(|(name, value)| (*name, value.as_str()));
        let all: Vec<(&str, &str)> = own.chain(environment.iter().copied()).collect();
        Program::start_on(&self.data, &self.models, &more, &all)
    }
}

/// The small models a and b, which can be served.
fn small_models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name) in [(1, "a"), (2, "b")] {
        write_model(&dir.path().join("models").join(name), seed, &Shape::default());
    }
    dir
}

fn large_models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (byte, name) in [(0x3c, "a"), (0x3d, "b")] {
        write_large_model(&dir.path().join("models").join(name), byte);
    }
    dir
}

fn average(lambda: f64) -> String {
    json!({"method": "average", "models": ["a", "b"], "mixup": {"lambda": lambda}}).to_string()
}

fn merged(program: &Program, recipe: &str) -> Value {
    let (status, job) = program.ask("POST", "/merge", recipe).unwrap();
    assert!([200, 202].contains(&status), "{status} {job}");
    let job = program.finished(job["id"].as_str().unwrap(), MINUTE);
    assert_eq!(job["status"], "succeeded", "{job}");
    job
}

fn digest_of(job: &Value) -> String {
    job["digest"].as_str().unwrap().to_owned()
}

fn key(digest: &str, file: &str) -> String {
    format!("some/results/{digest}/{file}")
}

/// The key of a file of the entry that is there.
fn file(s3: &S3, digest: &str, name: &str) -> String {
    let keys = s3.keys(&key(digest, ""));
    let found = keys.into_iter().find(|key| key.ends_with(&format!("/{name}")));
    found.unwrap_or_else(|| panic!("no {name} of {digest} in the bucket"))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < MINUTE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the whole entry is in the bucket.
fn sent(s3: &S3, digest: &str) {
    until("an entry in the bucket", || {
        s3.keys(&key(digest, "")).contains(&key(digest, "manifest.json"))
    });
}

fn metric(program: &Program, name: &str) -> f64 {
    let metrics = program.text("/metrics");
    let line = metrics.lines().find(|line| line.starts_with(name));
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

fn here(node: &Node, digest: &str) -> bool {
    node.data.join("checkpoints").join(digest).is_dir()
}

/// Asks until it is no longer on its way.
fn ask(program: &Program, method: &str, path: &str, body: &str) -> (u16, Value) {
    let start = Instant::now();
    loop {
        let (status, answer) = program.ask(method, path, body).unwrap();
        if answer["type"] != "checkpoint-coming" {
            return (status, answer);
        }
        assert!(start.elapsed() < MINUTE, "{answer}");
    }
}

#[test]
fn what_one_node_merged_another_serves() {
    let Some(s3) = S3::start_new() else { return };
    let dir = small_models();
    let (one, two) = (
        Node::new(dir.path(), "one", &s3),
        Node::new(dir.path(), "two", &s3),
    );
    let (a, b) = (one.start(), two.start());
    let digest = digest_of(&merged(&a, &average(0.3)));
    sent(&s3, &digest);
    // Its manifest can be read without its bytes.
    assert_eq!(
        b.json("GET", &format!("/checkpoints/{digest}"), "")["digest"],
        digest
    );
    assert!(!here(&two, &digest));
    // Served there, and the first one's bytes.
    let load = json!({"name": "m", "source": format!("checkpoint:{digest}")}).to_string();
    let (status, answer) = ask(&b, "POST", "/models", &load);
    assert_eq!(status, 202, "{answer}");
    until("a model", || b.json("GET", "/models/m", "")["status"] == "ready");
    let completion = b.json(
        "POST",
        "/v1/completions",
        r#"{"model": "m", "prompt": "hello", "max_tokens": 3}"#,
    );
    assert_eq!(completion["system_fingerprint"], digest, "{completion}");
    for name in names_in(&one.data.join("checkpoints").join(&digest)) {
        let [x, y] = [&one, &two]
            .map(|node| std::fs::read(node.data.join("checkpoints").join(&digest).join(&name)).unwrap());
        assert!(x == y, "{name} differs");
        assert!(
            s3.read(&file(&s3, &digest, &name)) == x,
            "{name} differs in the bucket"
        );
    }
    assert_eq!(metric(&b, "cauldron_remote_fetched_total"), 1.0);
    // A parent from the bucket.
    let other = digest_of(&merged(&a, &average(0.6)));
    sent(&s3, &other);
    let recipe = json!({"method": "average", "models": [format!("checkpoint:{other}"), "b"], "mixup": {"lambda": 0.5}});
    merged(&b, &recipe.to_string());
    assert!(here(&two, &other));
    // What is there already is not sent twice.
    let before = metric(&b, "cauldron_remote_bytes_total{direction=\"sent\"}");
    let again = digest_of(&merged(&b, &average(0.8)));
    sent(&s3, &again);
    let one_entry = metric(&b, "cauldron_remote_bytes_total{direction=\"sent\"}") - before;
    assert!(one_entry > 0.0);
    assert_eq!(digest_of(&merged(&a, &average(0.8))), again);
    until("the queue of entries", || {
        metric(&a, "cauldron_remote_waiting") == 0.0
    });
    // Gone from here and from the bucket.
    let path = format!("/checkpoints/{again}");
    assert_eq!(
        b.ask("DELETE", &format!("{path}?remote=maybe"), "").unwrap().0,
        422
    );
    assert_eq!(
        b.ask("DELETE", &format!("{path}?remote=true"), "").unwrap().0,
        204
    );
    assert_eq!(b.ask("GET", &path, "").unwrap().0, 404);
    assert!(s3.keys(&key(&again, "")).is_empty());
    assert_eq!(a.ask("GET", &path, "").unwrap().0, 200);
    invariants::check(b, &two.data, &BTreeSet::new(), |_| false);
}

#[test]
fn nodes_of_one_queue_share_results() {
    let (Some(s3), Some(server)) = (S3::start_new(), Postgres::shared()) else {
        return;
    };
    let dir = small_models();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let url = runtime.block_on(server.database());
    let [one, two] =
        ["one", "two"].map(|name| Node::new(dir.path(), name, &s3).with(&["--database-url", &url]));
    let a = one.start();
    let job = merged(&a, &average(0.3));
    let digest = digest_of(&job);
    sent(&s3, &digest);
    // The first node need not be there any more.
    drop(a);
    let b = two.start();
    let mut recipe: Value = serde_json::from_str(&average(0.3)).unwrap();
    recipe["serve_as"] = json!("m");
    let (status, same) = ask(&b, "POST", "/merge", &recipe.to_string());
    assert_eq!((status, &same["id"]), (200, &job["id"]), "{same}");
    until("a model", || b.json("GET", "/models/m", "")["status"] == "ready");
    assert_eq!(b.json("GET", "/models/m", "")["system_fingerprint"], digest);
    let reference = json!({"name": "n", "source": format!("merge:{}", job["id"].as_str().unwrap())});
    assert_eq!(ask(&b, "POST", "/models", &reference.to_string()).0, 202);
    assert_eq!(metric(&b, "cauldron_remote_fetched_total"), 1.0);
}

#[test]
fn a_fetch_goes_on_where_it_was() {
    let Some(s3) = S3::start_new() else { return };
    let dir = large_models();
    let (one, two) = (
        Node::new(dir.path(), "one", &s3),
        Node::new(dir.path(), "two", &s3),
    );
    let a = one.start();
    let digest = digest_of(&merged(&a, &average(0.3)));
    sent(&s3, &digest);
    let path = format!("/checkpoints/{digest}/files/config.json");
    let b = two.start_with(&[("CAULDRON_FAILPOINT", "fetched-part:7")]);
    assert!(b.ask("GET", &path, "").is_none(), "it was to die");
    drop(b);
    let b = two.start();
    assert_eq!(ask(&b, "GET", &path, "").1["model_type"], "llama");
    let size = b.json("GET", &format!("/checkpoints/{digest}"), "")["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file["size"].as_f64().unwrap())
        .sum::<f64>();
    let fetched = metric(&b, "cauldron_remote_bytes_total{direction=\"fetched\"}");
    assert!(fetched > 0.0 && fetched < 0.8 * size, "{fetched} of {size}");
    invariants::check(b, &two.data, &BTreeSet::new(), |_| false);
}

#[test]
fn damage_in_the_bucket_is_found_and_mended() {
    let Some(s3) = S3::start_new() else { return };
    let dir = small_models();
    let (one, two) = (
        Node::new(dir.path(), "one", &s3),
        Node::new(dir.path(), "two", &s3),
    );
    let (a, b) = (one.start(), two.start());
    let other = digest_of(&merged(&a, &average(0.9)));
    sent(&s3, &other);
    type Damage = fn(&S3, &str, &str);
    let kinds: [(&str, Damage); 7] = [
        ("a bit", |s3, digest, _| {
            let key = file(s3, digest, "model.safetensors");
            let mut bytes = s3.read(&key);
            *bytes.last_mut().unwrap() ^= 1;
            s3.write(&key, bytes);
        }),
        ("cut", |s3, digest, _| {
            let key = file(s3, digest, "model.safetensors");
            let bytes = s3.read(&key);
            s3.write(&key, bytes[..bytes.len() / 2].to_vec());
        }),
        ("longer", |s3, digest, _| {
            let key = file(s3, digest, "config.json");
            let mut bytes = s3.read(&key);
            bytes.push(b' ');
            s3.write(&key, bytes);
        }),
        ("gone", |s3, digest, _| {
            s3.delete(&file(s3, digest, "tokenizer.json"))
        }),
        ("its manifest cut", |s3, digest, _| {
            let key = key(digest, "manifest.json");
            let bytes = s3.read(&key);
            s3.write(&key, bytes[..bytes.len() / 2].to_vec());
        }),
        ("another's manifest", |s3, digest, other| {
            s3.write(
                &key(digest, "manifest.json"),
                s3.read(&key(other, "manifest.json")),
            );
        }),
        ("a manifest that leads elsewhere", |s3, digest, _| {
            let key = key(digest, "manifest.json");
            let text = String::from_utf8(s3.read(&key)).unwrap();
            s3.write(
                &key,
                text.replace("tokenizer.json", "../escaped.json").into_bytes(),
            );
        }),
    ];
    for (index, (kind, damage)) in kinds.into_iter().enumerate() {
        let recipe = average(index as f64 / 16.0);
        let digest = digest_of(&merged(&a, &recipe));
        sent(&s3, &digest);
        let whole = s3.read(&key(&digest, "manifest.json"));
        damage(&s3, &digest, &other);
        let load = json!({"name": "m", "source": format!("checkpoint:{digest}")}).to_string();
        let (status, answer) = ask(&b, "POST", "/models", &load);
        assert_eq!(
            (status, &answer["type"]),
            (422, &json!("unknown-model")),
            "{kind}: {answer}"
        );
        assert!(!here(&two, &digest), "{kind}");
        // Made again, it is whole for all.
        assert_eq!(digest_of(&merged(&b, &recipe)), digest, "{kind}");
        until("a whole manifest", || {
            s3.keys(&key(&digest, ""))
                .contains(&key(&digest, "manifest.json"))
                && s3.read(&key(&digest, "manifest.json")) == whole
        });
        for name in names_in(&two.data.join("checkpoints").join(&digest)) {
            let local = two.data.join("checkpoints").join(&digest).join(&name);
            assert!(
                s3.read(&file(&s3, &digest, &name)) == std::fs::read(local).unwrap(),
                "{kind}: {name}"
            );
        }
    }
    assert!(!two.data.join("escaped.json").exists() && !two.data.join("tmp/escaped.json").exists());
    invariants::check(b, &two.data, &BTreeSet::new(), |_| false);
}

#[test]
fn without_its_bucket_a_node_goes_on() {
    let Some(s3) = S3::new() else { return };
    let dir = small_models();
    let one = Node::new(dir.path(), "one", &s3);
    let a = one.start();
    let job = merged(&a, &average(0.3));
    let digest = digest_of(&job);
    assert_eq!(merged(&a, &average(0.3))["id"], job["id"]);
    // What only the bucket could tell is not known now.
    let nowhere = "0".repeat(64);
    let (status, answer) = a.ask("GET", &format!("/checkpoints/{nowhere}"), "").unwrap();
    assert_eq!(
        (status, &answer["type"]),
        (503, &json!("remote-cache-unavailable")),
        "{answer}"
    );
    until("an error", || metric(&a, "cauldron_remote_errors_total") > 0.0);
    s3.start();
    sent(&s3, &digest);
    assert_eq!(
        a.ask("GET", &format!("/checkpoints/{nowhere}"), "").unwrap().0,
        404
    );
    // Entries from before the bucket was there are sent too.
    drop(a);
    s3.delete(&key(&digest, "manifest.json"));
    let _a = one.start();
    sent(&s3, &digest);
}

#[test]
fn what_is_fetched_keeps_to_the_budget() {
    let Some(s3) = S3::start_new() else { return };
    let dir = small_models();
    let one = Node::new(dir.path(), "one", &s3);
    let a = one.start();
    let digests = [0.1, 0.2, 0.3].map(|lambda| digest_of(&merged(&a, &average(lambda))));
    digests.iter().for_each(|digest| sent(&s3, digest));
    let collected = a.json("POST", "/checkpoints/gc", "{}");
    let size = collected["bytes_left"].as_u64().unwrap() / 3;
    let budget = (2 * size + size / 2).to_string();
    let two = Node::new(dir.path(), "two", &s3).with(&["--cache-budget", &budget]);
    let b = two.start();
    for digest in &digests {
        let (status, _) = ask(&b, "GET", &format!("/checkpoints/{digest}/files/config.json"), "");
        assert_eq!(status, 200);
    }
    until("room", || !here(&two, &digests[0]));
    assert!(here(&two, &digests[1]) && here(&two, &digests[2]));
    // One that never fits is not fetched.
    let three = Node::new(dir.path(), "three", &s3).with(&["--cache-budget", &(size / 2).to_string()]);
    let c = three.start();
    let (status, answer) = c
        .ask(
            "GET",
            &format!("/checkpoints/{}/files/config.json", digests[0]),
            "",
        )
        .unwrap();
    assert_eq!(status, 507, "{answer}");
    assert!(!here(&three, &digests[0]));
}

#[test]
fn a_remote_cache_must_be_a_bucket() {
    let dir = tempfile::tempdir().unwrap();
    let output = crate::common::program::command()
        .args(["serve", "--cache-remote", "/some/folder", "--data-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("--cache-remote") && text.contains("s3://"),
        "{text}"
    );
}
