//! The program as an operator sees it: its exit, its signals, its first error.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::program::{Program, command, write_large_model};

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

/// The inode of the first shard of the only folder under this one.
fn first_shard(root: &Path) -> Option<(PathBuf, u64)> {
    let folder = fs::read_dir(root).ok()?.next()?.ok()?.path();
    let shard = folder.join("model-00001-of-00040.safetensors");
    Some((folder, fs::metadata(shard).ok()?.ino()))
}

#[test]
fn a_killed_merge_goes_on_with_its_finished_shards() {
    let dir = tempfile::tempdir().unwrap();
    write_large_model(&dir.path().join("a"), 0x3c);
    write_large_model(&dir.path().join("b"), 0x3d);
    let shards = ["--max-shard-bytes", "5000000"];
    let program = Program::start_in(dir, &shards, &[]);
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
    let program = Program::start_in(program.kill(), &shards, &[]);
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

/// Whether a command ended well, and what it printed: its errors too, if it did not.
fn run(arguments: &[&str]) -> (bool, String) {
    let out = command().args(arguments).output().unwrap();
    let (well, mut text) = (out.status.success(), String::from_utf8(out.stdout).unwrap());
    if !well {
        text += &String::from_utf8(out.stderr).unwrap();
    }
    (well, text)
}

#[test]
fn an_operator_asks_a_server_or_a_data_folder() {
    let dir = tempfile::tempdir().unwrap();
    write_large_model(&dir.path().join("a"), 0x3c);
    write_large_model(&dir.path().join("b"), 0x3d);
    let program = Program::start_in(dir, &[], &[]);
    let server = format!("http://{}", program.address);
    let recipe = r#"{"method": "average", "models": ["a", "b"]}"#;
    let id = program.json("POST", "/merge", recipe)["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let digest = program.finished(&id, Duration::from_secs(60))["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    let (well, text) = run(&["jobs", "list", "--server", &server]);
    assert!(well && text.contains(&id) && text.contains("succeeded"), "{text}");
    let (well, text) = run(&["jobs", "show", &id, "--server", &server]);
    let shown: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(well && shown["timings"]["merge_ms"].is_u64(), "{text}");
    let (well, text) = run(&["jobs", "cancel", &id, "--server", &server]);
    assert!(!well && text.contains("the merge is succeeded"), "{text}");
    assert!(run(&["checkpoints", "pin", &digest, "--server", &server]).0);
    // A folder in use is not opened twice.
    let data = program.dir.as_ref().unwrap().path().join("data");
    let data = data.to_str().unwrap();
    let (well, text) = run(&["checkpoints", "list", "--data-dir", data]);
    assert!(!well && text.contains("in use"), "{text}");
    let dir = program.kill();
    let (well, text) = run(&["checkpoints", "list", "--json", "--data-dir", data]);
    let listed: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(well && listed["checkpoints"][0]["pinned"] == true, "{text}");
    let (well, text) = run(&["checkpoints", "delete", &digest, "--data-dir", data]);
    assert!(!well && text.contains("pinned"), "{text}");
    assert!(run(&["checkpoints", "unpin", &digest, "--data-dir", data]).0);
    let shard = dir
        .path()
        .join("data/checkpoints")
        .join(&digest)
        .join("model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    let (well, text) = run(&["checkpoints", "verify", "--data-dir", data]);
    assert!(
        !well && text.contains("false") && text.contains("damaged"),
        "{text}"
    );
    let (well, text) = run(&["checkpoints", "gc", "--budget", "0", "--data-dir", data]);
    assert!(well && text.contains("0 bytes are left"), "{text}");
    let (well, text) = run(&["jobs", "list", "--server", "https://x"]);
    assert!(!well && text.contains("--server takes http://"), "{text}");
}
