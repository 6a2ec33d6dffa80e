use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::testing::{EOS, changed, tiny};
use super::{MAX_PROMPT_BYTES, SpecialTokens, TextTokenizer};

fn refusal(change: impl FnOnce(&mut Value)) -> String {
    changed(change).expect_err("a refusal").to_string()
}

#[test]
fn text_round_trips_and_special_tokens_are_asked_for() {
    let tokenizer = tiny();
    for text in ["the theory", "Crème brûlée 🙂\n\t", "", "\u{0}\u{ffff}"] {
        let ids = tokenizer.encode(text, false).expect("ids");
        assert_eq!(tokenizer.decode(&ids, true).expect("text"), text);
    }
    assert_eq!(tokenizer.encode("the", true).expect("ids"), [260, 257]);
    assert_eq!(tokenizer.decode(&[260, 257, EOS], true).expect("text"), "the");
    assert_eq!(tokenizer.decode(&[257, EOS], false).expect("text"), "the</s>");
    assert_eq!(tokenizer.eos_ids(), [EOS]);
    assert!(tokenizer.is_special(EOS) && !tokenizer.is_special(257));
}

#[test]
fn each_token_has_a_text_of_its_own() {
    let tokenizer = tiny();
    assert_eq!(tokenizer.token_text(258), " the");
    assert_eq!(tokenizer.token_text(0xe2), "bytes:\\xe2");
    assert_eq!(tokenizer.token_text(EOS), "</s>");
    assert_eq!(tokenizer.token_text(299), "");
    assert_eq!(tokenizer.token_bytes(0xff), [0xff]);
}

type Damage = Box<dyn FnOnce(&mut Value)>;

#[test]
fn a_file_that_would_hurt_the_process_is_refused_by_name() {
    let cases: [(&str, Damage); 12] = [
        (
            "merge 4",
            Box::new(|f| push(&mut f["model"]["merges"], json!(["zz", "q"]))),
        ),
        (
            "merge 0",
            Box::new(|f| f["model"]["continuing_subword_prefix"] = json!("####")),
        ),
        (
            "id 4000000000",
            Box::new(|f| f["model"]["vocab"]["th"] = json!(4_000_000_000u64)),
        ),
        ("id 300", Box::new(|f| f["added_tokens"][1]["id"] = json!(300))),
        ("not a count", Box::new(|f| f["model"]["vocab"]["th"] = json!(-1))),
        (
            "id 999",
            Box::new(|f| f["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([999])),
        ),
        (
            "pattern",
            Box::new(|f| f["normalizer"] = replace(&"x".repeat(1_000_000), "y")),
        ),
        (
            "too long",
            Box::new(|f| f["normalizer"] = replace("x", &"y".repeat(1_000_000))),
        ),
        (
            "too long",
            Box::new(|f| {
                f["normalizer"] = json!({"type": "Sequence",
                "normalizers": [replace("x", "xxxxxxxx"), replace("x", "xxxxxxxx"), replace("x", "xx")]});
            }),
        ),
        (
            "charsmap",
            Box::new(|f| {
                f["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "A".repeat(3 << 20)});
            }),
        ),
        (
            "component Magic",
            Box::new(|f| f["decoder"] = json!({"type": "Magic"})),
        ),
        ("no model", Box::new(|f| f["model"] = json!([]))),
    ];
    for (expected, change) in cases {
        let text = refusal(change);
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let garbage = TextTokenizer::build(b"{", 300, SpecialTokens::default(), None);
    assert!(garbage.is_err());
}

#[test]
fn a_panic_inside_the_library_is_an_error() {
    let result =
        changed(|f| f["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}));
    if let Ok(tokenizer) = result {
        // Whether it is found at load or here, the process lives.
        let _ = tokenizer.encode("a text", false);
    }
}

#[test]
fn padding_truncation_and_dropout_are_dropped() {
    let tokenizer = changed(|f| {
        f["padding"] = json!({"strategy": {"Fixed": 2_000_000_000u64}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
        f["truncation"] =
            json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
        f["model"]["dropout"] = json!(1.0);
    })
    .expect("a tokenizer");
    assert_eq!(tokenizer.encode("the ab", false).expect("ids"), [257, 32, 259]);
}

#[test]
fn long_prompts_are_capped_and_one_repeated_character_is_quick() {
    let tokenizer = tiny();
    let too_long = tokenizer.encode(&"a".repeat(MAX_PROMPT_BYTES + 1), false);
    assert!(too_long.is_err_and(|e| e.to_string().starts_with("prompt")));
    let start = Instant::now();
    for text in ["a", "ab", " ", "\n"] {
        let text = text.repeat((1 << 20) / text.len());
        let ids = tokenizer.encode(&text, false).expect("ids");
        assert_eq!(tokenizer.decode(&ids, true).expect("text"), text);
    }
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn special_tokens_are_strings_or_dicts_and_templates_may_be_named() {
    let config = json!({"bos_token": {"content": "<b>", "lstrip": false}, "eos_token": "<e>", "pad_token": null,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]});
    let map = json!({"pad_token": {"content": "<p>"}});
    let (config, map) = (
        config.as_object().expect("object"),
        map.as_object().expect("object"),
    );
    let special = SpecialTokens::read(config, map, None).expect("special tokens");
    assert_eq!(special.bos_token.as_deref(), Some("<b>"));
    assert_eq!(special.eos_token.as_deref(), Some("<e>"));
    assert_eq!(special.pad_token.as_deref(), Some("<p>"));
    assert_eq!(special.chat_template.as_deref(), Some("D"));
    let file = SpecialTokens::read(config, map, Some(b"F".to_vec())).expect("special tokens");
    assert_eq!(file.chat_template.as_deref(), Some("F"));
}

fn push(list: &mut Value, item: Value) {
    list.as_array_mut().expect("a list").push(item);
}

fn replace(pattern: &str, content: &str) -> Value {
    json!({"type": "Replace", "pattern": {"String": pattern}, "content": content})
}
