//! Faults, and the promises that hold through them (docs/RELIABILITY.md). The small versions run with all tests; variables make
//! them long: CAULDRON_KILLS, CAULDRON_CANCELS, CAULDRON_POSTGRES_SECONDS. After each, `invariants::check`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::common::postgres::Postgres;
use crate::common::program::{Program, write_large_model};
use crate::common::{TestApp, invariants, names_in};

/// Files that one merge of the large models writes in several shards.
const SHARDS: [&str; 2] = ["--max-shard-bytes", "20000000"];
const MINUTE: Duration = Duration::from_secs(60);

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// A generator whose seed is told when the test fails.
fn random() -> ChaCha8Rng {
    let seed = number("CAULDRON_SEED", u64::from(uuid::Uuid::new_v4().as_fields().0));
    eprintln!("CAULDRON_SEED={seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// A folder with the large models a and b.
fn models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_large_model(&dir.path().join("a"), 0x3c);
    write_large_model(&dir.path().join("b"), 0x3d);
    dir
}

fn average(lambda: f64) -> String {
    json!({"method": "average", "models": ["a", "b"], "mixup": {"lambda": lambda}}).to_string()
}

/// A merge of some seconds.
fn slow(seed: u32) -> String {
    json!({"method": "task_arithmetic", "base": "a", "models": ["b", {"model": "b", "weight": 0.5}],
        "sparsify": {"kind": "della", "drop_rate": 0.5, "epsilon": 0.2, "seed": seed}})
    .to_string()
}

fn post(program: &Program, recipe: &str) -> Option<(u16, Value)> {
    program.ask("POST", "/merge", recipe)
}

/// The id of a job that was acknowledged.
fn acknowledged(program: &Program, recipe: &str) -> String {
    let (status, job) = post(program, recipe).expect("an answer");
    assert!(status == 202 || status == 200, "{status} {job}");
    job["id"].as_str().unwrap().to_owned()
}

fn until(what: &str, longest: Duration, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < longest, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// No result may be missing.
fn none(_: &str) -> bool {
    false
}

#[test]
fn kills_at_random_moments_lose_nothing() {
    let mut random = random();
    let dir = models();
    let data = dir.path().join("data");
    let start = || Program::start_on(&data, dir.path(), &SHARDS, &[]);
    let (mut ledger, mut deleted) = (BTreeSet::new(), BTreeSet::new());
    let rounds = number("CAULDRON_KILLS", 6);
    let mut busy = 0;
    for _ in 0..rounds {
        let program = start();
        let pid = program.child.id().to_string();
        let after = Duration::from_millis(random.random_range(0..1500));
        // From another thread: in the middle of requests too.
        let killer = std::thread::spawn(move || {
            std::thread::sleep(after);
            Command::new("kill").args(["-9", &pid]).status().unwrap();
        });
        let mut waits = false;
        // Mostly new work, now and then what was asked for before.
        let mut lambda = || f64::from(random.random_range(0..2000u32)) / 2000.0;
        while let Some((status, job)) = post(&program, &average(lambda())) {
            if status == 200 || status == 202 {
                waits = job["status"] != "succeeded";
                ledger.insert(job["id"].as_str().unwrap().to_owned());
            }
            if lambda() < 0.12 && !ledger.is_empty() {
                let at = (lambda() * ledger.len() as f64) as usize;
                let known = ledger.iter().nth(at).unwrap();
                program.ask("DELETE", &format!("/merge/{known}"), "");
            }
            // The disk is not to fill up with results.
            if let Some((_, listed)) = program.ask("GET", "/checkpoints", "") {
                for entry in listed["checkpoints"].as_array().unwrap().iter().skip(4) {
                    let digest = entry["digest"].as_str().unwrap();
                    deleted.insert(digest.to_owned());
                    program.ask("DELETE", &format!("/checkpoints/{digest}"), "");
                }
            }
            std::thread::sleep(Duration::from_secs_f64(lambda() / 5.0));
        }
        killer.join().unwrap();
        busy += u32::from(waits);
    }
    let program = start();
    for id in &ledger {
        program.finished(id, 4 * MINUTE);
    }
    let acknowledged = ledger.len();
    let succeeded = invariants::check(program, &data, &ledger, |digest| deleted.contains(digest));
    eprintln!("{rounds} kills, {busy} with work at hand; {acknowledged} acknowledged, {succeeded} succeeded");
    assert!(busy > 0 && succeeded > 0);
}

#[test]
fn a_kill_at_each_step_of_a_publish_loses_nothing() {
    let dir = models();
    let data = dir.path().join("data");
    let start = |environment: &[(&str, &str)]| Program::start_on(&data, dir.path(), &SHARDS, environment);
    let mut ledger = BTreeSet::new();
    let steps = [
        "merge-started",
        "merge-first-shard",
        "merge-weights-written",
        "merge-manifest-written",
        "merged",
        "publish",
        "published",
        "publish-synced",
        "finished",
    ];
    for (index, step) in steps.into_iter().enumerate() {
        let mut program = start(&[("CAULDRON_FAILPOINT", step)]);
        let recipe = average(index as f64 / 10.0);
        // It may be gone before it can answer.
        let answer = post(&program, &recipe).map(|(_, job)| job["id"].as_str().unwrap().to_owned());
        let ended = program.child.wait().unwrap();
        assert!(!ended.success(), "{step} was not reached");
        drop(program);
        let program = start(&[]);
        let id = answer.unwrap_or_else(|| acknowledged(&program, &recipe));
        ledger.insert(id.clone());
        let job = program.finished(&id, MINUTE);
        assert_eq!(job["status"], "succeeded", "{step}: {job}");
    }
    assert_eq!(invariants::check(start(&[]), &data, &ledger, none), steps.len());
}

/// Two nodes of one queue.
fn node(dir: &Path, name: &str, url: &str) -> (Program, PathBuf) {
    let data = dir.join(name);
    let flags = [&SHARDS[..], &["--database-url", url, "--lease-seconds", "3"]].concat();
    (Program::start_on(&data, dir, &flags, &[]), data)
}

fn database(server: &Postgres) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(server.database())
}

#[test]
fn two_nodes_race_and_a_zombie_is_fenced() {
    let Some(server) = Postgres::shared() else { return };
    let dir = models();
    let url = database(server);
    let ((a, data_a), (b, data_b)) = (node(dir.path(), "one", &url), node(dir.path(), "two", &url));
    let ids: BTreeSet<String> = std::thread::scope(|scope| {
        let posts: Vec<_> = (0..64)
            .map(|i| {
                let node = if i % 2 == 0 { &a } else { &b };
                scope.spawn(|| acknowledged(node, &slow(1)))
            })
            .collect();
        posts.into_iter().map(|post| post.join().unwrap()).collect()
    });
    assert_eq!(ids.len(), 1);
    let first = ids.first().unwrap();
    assert_eq!(b.finished(first, MINUTE)["attempt"], 1);
    drop(b);
    // Alone, a has the next merge; it is stopped past its lease, and wakes when another has finished.
    let id = acknowledged(&a, &slow(2));
    until("a merge that runs", MINUTE, || {
        a.json("GET", &format!("/merge/{id}"), "")["status"] == "running"
    });
    a.signal("STOP");
    let (b, _) = node(dir.path(), "two", &url);
    let job = b.finished(&id, MINUTE);
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("succeeded"), &json!(2)),
        "{job}"
    );
    a.signal("CONT");
    until("the zombie to hear of it", MINUTE, || {
        a.text("/metrics")
            .lines()
            .any(|line| line == "cauldron_leases_lost_total 1")
    });
    let same = |job: &Value| {
        (
            job["status"].clone(),
            job["attempt"].clone(),
            job["finished_at"].clone(),
        )
    };
    assert_eq!(same(&a.json("GET", &format!("/merge/{id}"), "")), same(&job));
    drop(a);
    let ledger = ids.into_iter().chain([id]).collect();
    assert_eq!(
        invariants::check(b, &data_b, &ledger, |digest| data_a
            .join("checkpoints")
            .join(digest)
            .is_dir()),
        2
    );
}

#[test]
fn a_database_that_stops_and_starts_loses_nothing() {
    let Some(server) = Postgres::start_new() else {
        return;
    };
    let dir = models();
    let url = database(&server);
    let (program, data) = node(dir.path(), "one", &url);
    let mut ledger = BTreeSet::from([acknowledged(&program, &average(0.1))]);
    server.stop();
    // What cannot be made durable is not accepted; what needs no database goes on.
    until("a refusal", MINUTE, || {
        matches!(post(&program, &average(0.2)), Some((503, _)))
    });
    assert_eq!(program.status_line("/readyz"), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(program.status_line("/livez"), "HTTP/1.1 200 OK");
    assert_eq!(program.ask("GET", "/v1/models", "").unwrap().0, 200);
    std::thread::sleep(Duration::from_secs(1));
    server.start();
    let back = Instant::now();
    let mut accepted = None;
    until("work again", Duration::from_secs(10), || {
        accepted = post(&program, &average(0.2)).filter(|(status, _)| *status == 202);
        accepted.is_some()
    });
    eprintln!(
        "accepted {:.1} s after the database was back",
        back.elapsed().as_secs_f64()
    );
    ledger.insert(accepted.unwrap().1["id"].as_str().unwrap().to_owned());
    assert_eq!(invariants::check(program, &data, &ledger, none), 2);
}

#[test]
fn database_connections_that_are_killed_lose_nothing() {
    let Some(server) = Postgres::start_new() else {
        return;
    };
    let dir = models();
    let url = database(&server);
    let (program, data) = node(dir.path(), "one", &url);
    let end = Instant::now() + Duration::from_secs(number("CAULDRON_POSTGRES_SECONDS", 4));
    let mut ledger = BTreeSet::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cauldron'";
    for lambda in 0.. {
        if Instant::now() > end {
            break;
        }
        if let Some((200 | 202, job)) = post(&program, &average(f64::from(lambda / 8 % 40) / 40.0)) {
            ledger.insert(job["id"].as_str().unwrap().to_owned());
        }
        std::thread::sleep(Duration::from_millis(150));
        runtime.block_on(server.execute(kill));
    }
    assert!(!ledger.is_empty());
    assert_eq!(invariants::check(program, &data, &ledger, none), ledger.len());
}

/// A file system in memory of its own, gone with this value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None where this may not be done; it says so.
    fn mount(at: PathBuf, megabytes: u32) -> Option<Self> {
        fs::create_dir_all(&at).unwrap();
        let size = format!("size={megabytes}m");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&at)
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            eprintln!("\n*** SKIPPED: file systems cannot be mounted here (needs root) ***\n");
            return None;
        }
        Some(Self(at))
    }

    /// Takes all space but so many bytes.
    fn fill(&self, but: u64) -> PathBuf {
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        let file = self.0.join("filler");
        let zeros = vec![0u8; (stat.f_bavail * stat.f_frsize).saturating_sub(but) as usize];
        // Another writer may have taken some of it meanwhile: then it is full too.
        if let Err(e) = fs::write(&file, zeros) {
            assert_eq!(e.kind(), std::io::ErrorKind::StorageFull);
        }
        file
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_fails_jobs_and_nothing_else() {
    let dir = models();
    let data = dir.path().join("data");
    // Room for one result of 168 MB and the reserve.
    let Some(disk) = SmallDisk::mount(data.clone(), 500) else {
        return;
    };
    let program = Program::start_on(&data, dir.path(), &SHARDS, &[]);
    // Slow enough to fill the disk meanwhile.
    let slow = slow(1);
    let id = acknowledged(&program, &slow);
    let draft = || names_in(&data.join("tmp")).into_iter().next();
    until("a draft", MINUTE, || draft().is_some());
    let filler = disk.fill(8 << 20);
    let job = program.finished(&id, MINUTE);
    assert_eq!(job["status"], "failed", "{job}");
    assert_eq!(job["error"]["type"], "insufficient-storage", "{job}");
    let (status, refused) = post(&program, &average(0.6)).unwrap();
    assert_eq!((status, &refused["type"]), (507, &json!("insufficient-storage")));
    assert!(names_in(&data.join("tmp")).is_empty());
    assert_eq!(program.status_line("/readyz"), "HTTP/1.1 200 OK");
    fs::remove_file(filler).unwrap();
    let again = acknowledged(&program, &slow);
    assert_eq!(
        invariants::check(program, &data, &BTreeSet::from([id, again]), none),
        1
    );
    drop(disk);
}

#[test]
fn a_full_database_accepts_nothing_that_it_cannot_keep() {
    let dir = models();
    let Some(disk) = SmallDisk::mount(dir.path().join("small"), 2) else {
        return;
    };
    let url = format!("sqlite://{}", disk.0.join("jobs.db").display());
    let flags = ["--database-url", &url];
    let data = dir.path().join("data");
    let program = Program::start_on(&data, dir.path(), &flags, &[]);
    let mut ledger = BTreeSet::from([acknowledged(&program, &average(0.5))]);
    let filler = disk.fill(64 << 10);
    let mut refused = 0;
    for index in 0..60 {
        match post(&program, &average(f64::from(index) / 60.0)).unwrap() {
            (200 | 202, job) => _ = ledger.insert(job["id"].as_str().unwrap().to_owned()),
            (503 | 507, _) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(refused > 0, "60 jobs fit into what was left");
    assert_eq!(program.status_line("/livez"), "HTTP/1.1 200 OK");
    fs::remove_file(filler).unwrap();
    let id = acknowledged(&program, &average(0.123));
    ledger.insert(id);
    // Jobs whose end could not be written run again when it can.
    assert_eq!(invariants::check(program, &data, &ledger, none), ledger.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_damage_is_found_and_mended() {
    type Damage = fn(&Path);
    let flip: Damage = |dir| {
        let shard = dir.join("model.safetensors");
        let mut bytes = fs::read(&shard).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(shard, bytes).unwrap();
    };
    let cut: Damage = |dir| {
        let file = fs::File::options()
            .write(true)
            .open(dir.join("model.safetensors"))
            .unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    };
    let lengthen: Damage = |dir| {
        let path = dir.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        bytes.push(0);
        fs::write(path, bytes).unwrap();
    };
    let delete: Damage = |dir| fs::remove_file(dir.join("model.safetensors")).unwrap();
    let swap: Damage = |dir| {
        fs::rename(dir.join("config.json"), dir.join("aside")).unwrap();
        fs::rename(dir.join("tokenizer.json"), dir.join("config.json")).unwrap();
        fs::rename(dir.join("aside"), dir.join("tokenizer.json")).unwrap();
    };
    let config: Damage = |dir| {
        let text = fs::read_to_string(dir.join("config.json")).unwrap();
        fs::write(dir.join("config.json"), text.replacen("10000.0", "10000.1", 1)).unwrap();
    };
    let no_manifest: Damage = |dir| fs::remove_file(dir.join("manifest.json")).unwrap();
    let cut_manifest: Damage = |dir| {
        let text = fs::read(dir.join("manifest.json")).unwrap();
        fs::write(dir.join("manifest.json"), &text[..text.len() / 2]).unwrap();
    };
    let other_manifest: Damage = |dir| {
        let text = fs::read_to_string(dir.join("manifest.json")).unwrap();
        let digest = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let other = format!("{}{}", &digest[1..], &digest[..1]);
        fs::write(dir.join("manifest.json"), text.replace(&digest, &other)).unwrap();
    };
    let empty: Damage = |dir| {
        for entry in fs::read_dir(dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    };
    let all = [
        flip,
        cut,
        lengthen,
        delete,
        swap,
        config,
        no_manifest,
        cut_manifest,
        other_manifest,
        empty,
    ];
    let app = TestApp::start().await;
    for (index, damage) in all.into_iter().enumerate() {
        let recipe = json!({"method": "average", "models": ["math", "code"], "mixup": {"lambda": index as f64 / 20.0}});
        let first = app.merge(recipe.clone()).await;
        let digest = first["digest"].as_str().unwrap();
        let dir = app.data_dir().join("checkpoints").join(digest);
        let whole: Vec<_> = names_in(&dir)
            .iter()
            .map(|name| fs::read(dir.join(name)).unwrap())
            .collect();
        damage(&dir);
        let load = json!({"name": format!("m{index}"), "source": format!("checkpoint:{digest}")});
        let answer = app.post("/models", load).await;
        if answer.status.is_success() {
            let slot = app
                .eventually(&format!("/models/m{index}"), |slot| slot["status"] != "loading")
                .await;
            assert_eq!(slot["status"], "failed", "damage {index} is served: {slot}");
        }
        let second = app.merge(recipe).await;
        assert_eq!(
            (&second["status"], &second["digest"]),
            (&json!("succeeded"), &json!(digest))
        );
        assert_ne!(second["id"], first["id"], "damage {index} was not seen");
        let mended: Vec<_> = names_in(&dir)
            .iter()
            .map(|name| fs::read(dir.join(name)).unwrap())
            .collect();
        assert!(mended == whole, "damage {index} was not mended");
    }
}

#[test]
fn cancellations_at_random_moments_take_effect_in_two_seconds() {
    let mut random = random();
    let dir = models();
    let data = dir.path().join("data");
    let program = Program::start_on(&data, dir.path(), &SHARDS, &[]);
    let mut ledger = BTreeSet::new();
    let (mut cancelled, mut slowest) = (0, 0f64);
    for index in 0..number("CAULDRON_CANCELS", 25) {
        let id = acknowledged(&program, &average(index as f64 / 1000.0));
        std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
        let start = Instant::now();
        let (status, answer) = program.ask("DELETE", &format!("/merge/{id}"), "").unwrap();
        assert!([200, 202, 409].contains(&status), "{answer}");
        let job = program.finished(&id, Duration::from_secs(2));
        slowest = slowest.max(start.elapsed().as_secs_f64());
        match job["status"].as_str().unwrap() {
            "cancelled" => cancelled += 1,
            status => assert_eq!(status, "succeeded"),
        }
        if let Some(digest) = job["digest"].as_str().filter(|_| job["status"] == "succeeded") {
            program
                .ask("DELETE", &format!("/checkpoints/{digest}"), "")
                .unwrap();
        }
        until("the draft to go", Duration::from_secs(2), || {
            names_in(&data.join("tmp")).is_empty()
        });
        ledger.insert(id);
    }
    eprintln!(
        "{cancelled} of {} cancelled, the slowest after {slowest:.2} s",
        ledger.len()
    );
    assert!(cancelled > 0);
    invariants::check(program, &data, &ledger, |_| true);
}
