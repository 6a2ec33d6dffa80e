use super::dates::strftime;
use super::{ChatMessage, ChatTemplate};
use crate::tokenizer::SpecialTokens;

fn messages() -> Vec<ChatMessage> {
    [("system", "Be <brief>."), ("user", " Hi \"you\"\n")]
        .map(|(role, content)| ChatMessage {
            role: role.into(),
            content: content.into(),
        })
        .into()
}

fn special() -> SpecialTokens {
    SpecialTokens {
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..SpecialTokens::default()
    }
}

fn render(source: &str) -> Result<String, String> {
    let template = ChatTemplate::new(source).map_err(|e| e.to_string())?;
    template
        .render(&messages(), true, &special())
        .map_err(|e| e.to_string())
}

#[test]
fn chatml_renders_as_transformers_does() {
    let source = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] \
        + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let expected = "<|im_start|>system\nBe <brief>.<|im_end|>\n<|im_start|>user\n Hi \"you\"\n<|im_end|>\n\
        <|im_start|>assistant\n";
    assert_eq!(render(source).as_deref(), Ok(expected));
}

#[test]
fn python_methods_blocks_and_special_tokens_work() {
    let source = "{{ bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n[INST] \
        {{ m.content.strip() }} [/INST]{% endif %}\n{% endfor %}{{ eos_token }}{{ pad_token is defined }}";
    assert_eq!(
        render(source).as_deref(),
        Ok("<s>[INST] Hi \"you\" [/INST]</s>False")
    );
    assert_eq!(
        render("  {% if true %}\nx\n  {% endif %}\ny\n").as_deref(),
        Ok("x\ny")
    );
    assert_eq!(
        render("{{ messages[0].content.split(' ')[1].startswith('<') }}").as_deref(),
        Ok("True")
    );
    assert_eq!(
        render("{% generation %}a{% endgeneration %} {%- generation -%} b").as_deref(),
        Ok("ab")
    );
    assert_eq!(
        render("{{ tools is none }}{% for m in messages %}{% continue %}{% endfor %}").as_deref(),
        Ok("True")
    );
}

#[test]
fn tojson_writes_what_python_writes() {
    assert_eq!(
        render("{{ messages[1] | tojson }}").as_deref(),
        Ok(r#"{"role": "user", "content": " Hi \"you\"\n"}"#)
    );
    assert_eq!(render("{{ '<é>' | tojson }}").as_deref(), Ok("\"<é>\""));
    assert_eq!(
        render("{{ [1, {'a': none}] | tojson(indent=2) }}").as_deref(),
        Ok("[\n  1,\n  {\n    \"a\": null\n  }\n]")
    );
    assert_eq!(
        render("{{ [[], {}, [[1, 2]]] | tojson }}{{ [[], {}] | tojson(indent=1) }}").as_deref(),
        Ok("[[], {}, [[1, 2]]][\n [],\n {}\n]")
    );
}

#[test]
fn a_template_can_refuse_and_its_message_is_kept() {
    let refused = render("{{ raise_exception('Roles must alternate') }}");
    assert!(refused.is_err_and(|e| e.contains("Roles must alternate")));
    assert!(ChatTemplate::new("{% for %}").is_err());
    assert!(ChatTemplate::new(&"x".repeat(300_000)).is_err());
}

#[test]
fn endless_work_and_endless_output_are_cut() {
    let slow = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(render(slow).is_err_and(|e| e.contains("fuel")));
    let wide = "{% for a in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}";
    assert!(render(wide).is_err());
}

/// What fuel and the bounded writer stop by themselves; the rest is the sandbox's.
#[test]
fn doubled_and_endless_values_are_cut() {
    let shared =
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}";
    for hostile in [
        format!("{shared}{{{{ n.x | tojson | length }}}}"),
        "{% set n = namespace() %}{% set n.n = n %}{{ n | tojson }}".into(),
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}".into(),
    ] {
        assert!(render(&hostile).is_err(), "{hostile}");
    }
}

#[test]
fn the_longest_conversation_has_fuel() {
    let source = "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}\
        {{- '<|im_start|>' + m.role + '\n' + m.content.strip() + '<|im_end|>' + '\n' }}\
        {%- elif m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}{{ parts[-1].lstrip('\n') | trim }}\
        {%- endif %}{%- endfor %}";
    let turn = |i: usize| ChatMessage {
        role: ["user", "assistant"][i % 2].into(),
        content: "word ".repeat(60),
    };
    let talk: Vec<ChatMessage> = (0..4096).map(turn).collect();
    let template = ChatTemplate::new(source).expect("a template");
    assert!(
        template
            .render(&talk, true, &special())
            .is_ok_and(|text| text.len() > 1 << 20)
    );
}

#[test]
fn dates_are_formatted_as_by_strftime() {
    assert_eq!(strftime("%d %b %Y", 1_721_952_000), "26 Jul 2024");
    assert_eq!(
        strftime("%A, %B %d, %y %H:%M:%S %I%p %%", 951_827_696),
        "Tuesday, February 29, 00 12:34:56 12PM %"
    );
}
