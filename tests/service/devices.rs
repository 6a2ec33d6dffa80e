//! Devices: several of them, and what becomes of their models when one has no memory left or fails for good. No GPU is here:
//! what one would say is put in the computation's place (`CAULDRON_FAULT`, src/failpoint.rs).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Device;
use cauldron::cache::Cache;
use cauldron::config::{DeviceChoice, ModelName};
use cauldron::serving::{LoadRequest, Serving, ServingLimits, WeightsFrom};
use cauldron_lm::Arithmetic;
use serde_json::{Value, json};

use crate::common::program::Program;
use crate::common::{Shape, write_adapter, write_model};

const MIB: u64 = 1 << 20;

/// The models `one` and `two`, and an adapter.
fn models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_model(&dir.path().join("one"), 1, &Shape::default());
    write_model(&dir.path().join("two"), 2, &Shape::default());
    write_adapter(&dir.path().join("lora"), 3, &Shape::default());
    dir
}

/// The program with a fault.
fn with(fault: &str) -> Program {
    Program::start_in(models(), &["--device", "cpu"], &[("CAULDRON_FAULT", fault)])
}

fn load(program: &Program, body: &Value) {
    let (status, slot) = program.ask("POST", "/models", &body.to_string()).unwrap();
    assert_eq!(status, 202, "{slot}");
    let name = body["name"].as_str().unwrap();
    let start = Instant::now();
    while slot_of(program, name)["status"] == "loading" {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn load_both(program: &Program) {
    for name in ["one", "two"] {
        load(program, &json!({"name": name, "source": name}));
    }
}

fn slot_of(program: &Program, name: &str) -> Value {
    program.json("GET", &format!("/models/{name}"), "")
}

fn ask(program: &Program, model: &str) -> (u16, Value) {
    let body =
        json!({"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    program.ask("POST", "/v1/completions", &body.to_string()).unwrap()
}

fn is_answered(program: &Program, model: &str) -> Value {
    let (status, answer) = ask(program, model);
    assert_eq!(status, 200, "{answer}");
    json!([answer["system_fingerprint"], answer["choices"][0]["text"]])
}

/// The code of a refusal that clients may try again.
fn is_refused(program: &Program, model: &str) -> String {
    let (status, answer) = ask(program, model);
    assert_eq!(status, 503, "{answer}");
    answer["error"]["code"].as_str().unwrap().to_owned()
}

#[test]
fn a_step_without_memory_takes_that_of_an_idle_model_and_is_done_once_more() {
    let unharmed = with("nowhere:nothing");
    load_both(&unharmed);
    let expected = is_answered(&unharmed, "one");
    let program = with("compute:CUDA_ERROR_OUT_OF_MEMORY");
    load_both(&program);
    assert_eq!(is_answered(&program, "one"), expected);
    assert_eq!(slot_of(&program, "two")["status"], "unloaded");
    assert_eq!(slot_of(&program, "one")["status"], "ready");
    is_answered(&program, "two");
}

#[test]
fn a_step_that_finds_no_memory_either_way_fails_its_request_only() {
    let program = with("compute:CUBLAS_STATUS_ALLOC_FAILED:1:2");
    load_both(&program);
    assert_eq!(is_refused(&program, "one"), "gpu-out-of-memory");
    let answer = is_answered(&program, "one");
    assert_eq!(is_answered(&program, "one"), answer);
    // Alone there is nobody who could make room.
    let program = with("compute:CUDA_ERROR_OUT_OF_MEMORY");
    load(&program, &json!({"name": "one", "source": "one"}));
    assert_eq!(is_refused(&program, "one"), "gpu-out-of-memory");
    is_answered(&program, "one");
}

/// How often devices failed, as the metrics say.
fn failures(program: &Program) -> Vec<String> {
    let metrics = program.text("/metrics");
    let lines = metrics.lines();
    lines
        .filter(|line| line.starts_with("cauldron_device_failures_total"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_device_that_fails_for_good_is_opened_anew_and_its_models_come_back() {
    let unharmed = with("nowhere:nothing");
    load_both(&unharmed);
    let expected = ["one", "two"].map(|name| is_answered(&unharmed, name));
    // The second computation of the first request.
    let program = with("compute:CUDA_ERROR_ILLEGAL_ADDRESS:2");
    load_both(&program);
    assert_eq!(is_refused(&program, "one"), "gpu-failed");
    for name in ["one", "two"] {
        let slot = slot_of(&program, name);
        assert_eq!(
            (&slot["status"], &slot["error"]),
            (&json!("unloaded"), &json!("its device failed"))
        );
    }
    assert_eq!(["one", "two"].map(|name| is_answered(&program, name)), expected);
    assert_eq!(
        failures(&program),
        [r#"cauldron_device_failures_total{device="cpu"} 1"#]
    );
}

#[test]
fn requests_of_a_device_that_failed_are_all_told_and_those_of_another_go_on() {
    let pretended = |fault: &str| {
        let program = Program::start_in(
            models(),
            &["--device", "cuda:all"],
            &[("CAULDRON_FAULT", fault), ("CAULDRON_PRETENDED_GPUS", "2")],
        );
        load_both(&program);
        program
    };
    let device = |program: &Program, name: &str| slot_of(program, name)["device"].as_str().map(str::to_owned);
    let unharmed = pretended("nowhere:nothing");
    let expected = ["one", "two"].map(|name| is_answered(&unharmed, name));
    let program = pretended("compute@1:CUDA_ERROR_ECC_UNCORRECTABLE");
    let (one, two) = (device(&program, "one").unwrap(), device(&program, "two").unwrap());
    assert_eq!([one.as_str(), two.as_str()], ["cuda:0", "cuda:1"]);
    assert_eq!(is_answered(&program, "one"), expected[0]);
    assert_eq!(is_refused(&program, "two"), "gpu-failed");
    assert_eq!(slot_of(&program, "one")["status"], "ready");
    assert_eq!(slot_of(&program, "two")["status"], "unloaded");
    assert_eq!(["one", "two"].map(|name| is_answered(&program, name)), expected);
    assert_eq!(
        failures(&program),
        [r#"cauldron_device_failures_total{device="cuda:1"} 1"#]
    );
}

#[test]
fn a_family_goes_on_after_its_device_failed() {
    let family = json!({"name": "lm", "source":
        {"method": "task_arithmetic", "base": "one", "models": ["two", "one+lora"]}});
    let unharmed = with("nowhere:nothing");
    load(&unharmed, &family);
    let expected = ["lm@0.25", "lm@0.5"].map(|point| is_answered(&unharmed, point));
    let program = with("compute:CUDA_ERROR_LAUNCH_FAILED");
    load(&program, &family);
    assert_eq!(is_refused(&program, "lm@0.25"), "gpu-failed");
    assert_eq!(
        ["lm@0.25", "lm@0.5"].map(|point| is_answered(&program, point)),
        expected
    );
}

#[test]
fn what_a_models_files_say_is_not_taken_for_a_device() {
    let program = with("nowhere:nothing");
    load_both(&program);
    let tokenizer = program.models().join("two/tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&tokenizer).unwrap()).unwrap();
    json["normalizer"] = json!({"type": "CUDA_ERROR_ASSERT"});
    std::fs::write(&tokenizer, json.to_string()).unwrap();
    load(&program, &json!({"name": "bad", "source": "two"}));
    assert_eq!(slot_of(&program, "bad")["status"], "failed");
    assert_eq!(slot_of(&program, "one")["status"], "ready");
    assert_eq!(failures(&program), [] as [&str; 0]);
}

#[test]
fn a_load_is_tried_once_more_after_a_fault() {
    let program = with("load:CUDA_ERROR_OUT_OF_MEMORY:2");
    load_both(&program);
    assert_eq!(slot_of(&program, "two")["status"], "ready");
    assert_eq!(slot_of(&program, "one")["status"], "unloaded", "it made room");
    is_answered(&program, "one");
    let program = with("load:CUDA_ERROR_LAUNCH_FAILED:2");
    load_both(&program);
    assert_eq!(slot_of(&program, "two")["status"], "ready");
    is_answered(&program, "one");
    is_answered(&program, "two");
    // Not for ever; and whoever asks later may find it mended.
    let program = with("load:CUDA_ERROR_LAUNCH_FAILED:1:2");
    load(&program, &json!({"name": "one", "source": "one"}));
    assert_eq!(slot_of(&program, "one")["status"], "unloaded");
    is_answered(&program, "one");
}

fn limits() -> ServingLimits {
    ServingLimits {
        max_batch_tokens: 256,
        max_running: 4,
        max_waiting: 4,
        memory_bytes: Some(MIB + MIB / 2),
        kv_bytes: Some(MIB),
        max_models: 8,
        max_points: 2,
        hold: Duration::from_secs(20),
        fixed_shapes: false,
    }
}

fn request(folder: PathBuf) -> LoadRequest {
    LoadRequest {
        weights: WeightsFrom::Folder {
            folder,
            adapter: None,
            cached: None,
        },
        source: "a folder".to_owned(),
        arithmetic: Arithmetic::F32,
        asked: Instant::now(),
    }
}

/// Two devices of the same kind stand for two GPUs: there is room for one model on each.
#[tokio::test]
async fn models_go_to_the_device_with_the_most_room() {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<ModelName> = ["a", "b", "c"].map(|name| name.parse().unwrap()).to_vec();
    let devices = [DeviceChoice::Cuda(0), DeviceChoice::Cuda(1)].map(|choice| (choice, Device::Cpu));
    let cache = Cache::open(dir.path()).unwrap();
    let serving: Arc<Serving> = Serving::start(cache, devices.to_vec(), limits()).unwrap();
    let mut where_they_are = Vec::new();
    for (seed, name) in names.iter().enumerate() {
        let folder = dir.path().join(name.to_string());
        write_model(&folder, seed as u32, &Shape::default());
        serving.load(name.clone(), request(folder), None).unwrap();
        where_they_are.push(serving.get(&name.to_string()).await.unwrap().device());
    }
    assert_eq!(
        where_they_are[..2],
        [DeviceChoice::Cuda(0), DeviceChoice::Cuda(1)]
    );
    let status = |name: &ModelName| serving.info(name).unwrap().status;
    let (a, b) = (status(&names[0]), status(&names[1]));
    let third = where_they_are[2];
    let expected = match third == DeviceChoice::Cuda(0) {
        true => ("unloaded", "ready"),
        false => ("ready", "unloaded"),
    };
    assert_eq!((a, b), expected, "only its own device makes room for c");
    assert!(serving.memory_used() > 2 * MIB);
    serving.shutdown();
}
