//! Rendering in a process of its own, under limits of memory and time: whatever a template does to that process, this
//! one goes on. Starting it takes a few milliseconds, little beside what answers a conversation.
//!
//! A library cannot know a program to start, so all is rendered in this process until [`set`] names one. The program
//! limits itself to [`MEMORY_BYTES`] and [`SECONDS`] and hands standard input and output to [`serve`].

use std::io::{Error as IoError, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ChatMessage, ChatTemplate};
use crate::LmError;
use crate::tokenizer::SpecialTokens;

/// Address space of one process.
pub const MEMORY_BYTES: u64 = 768 << 20;
/// Processor time of one process; an honest one takes milliseconds.
pub const SECONDS: u64 = 2;
/// How long it is waited for where the machine is busy.
const PATIENCE: Duration = Duration::from_secs(20);
/// Processes at once: what hostile templates can take of the machine is so many times the memory of one.
const PROCESSES: usize = 4;

static PROGRAM: OnceLock<(PathBuf, &'static str)> = OnceLock::new();
static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// One rendering, as JSON on standard input. The answer is a `Result<String, String>` on standard output.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    source: String,
    messages: Vec<ChatMessage>,
    add_generation_prompt: bool,
    special: SpecialTokens,
}

/// From now on templates are rendered by `program command`. The first call of a process holds.
pub fn set(program: PathBuf, command: &'static str) {
    let _ = PROGRAM.set((program, command));
}

/// What the program does with its input and output.
pub fn serve(mut input: impl Read, output: impl Write) -> Result<(), IoError> {
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes)?;
    let task: Task = serde_json::from_slice(&bytes)?;
    let rendered = ChatTemplate::here(&task.source)
        .and_then(|template| template.render(&task.messages, task.add_generation_prompt, &task.special))
        .map_err(|error| match error {
            LmError::Template { detail } => detail,
            other => other.to_string(),
        });
    Ok(serde_json::to_writer(output, &rendered)?)
}

pub(super) fn is_set() -> bool {
    PROGRAM.get().is_some()
}

/// Renders a short conversation. A refusal is the template's right, if it compiles; not coming back is not.
pub(super) fn try_out(source: &str) -> Result<(), LmError> {
    let turn = |role: &str, content: &str| ChatMessage {
        role: role.into(),
        content: content.into(),
    };
    let talk = [
        turn("user", "Hi"),
        turn("assistant", "Hello."),
        turn("user", "Is 7 a prime number?"),
    ];
    let special = SpecialTokens {
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..SpecialTokens::default()
    };
    ask(source, &talk, true, &special).map(drop)
}

pub(super) fn render(
    source: &str,
    messages: &[ChatMessage],
    add_generation_prompt: bool,
    special: &SpecialTokens,
) -> Result<String, LmError> {
    ask(source, messages, add_generation_prompt, special)?.map_err(LmError::template)
}

/// The inner error is the template's own.
fn ask(
    source: &str,
    messages: &[ChatMessage],
    add_generation_prompt: bool,
    special: &SpecialTokens,
) -> Result<Result<String, String>, LmError> {
    let task = Task {
        source: source.to_owned(),
        messages: messages.to_vec(),
        add_generation_prompt,
        special: SpecialTokens {
            chat_template: None,
            ..special.clone()
        },
    };
    let task = serde_json::to_vec(&task).map_err(|e| LmError::template(e.to_string()))?;
    let (program, command) = PROGRAM
        .get()
        .ok_or_else(|| LmError::template("there is no program to render it"))?;
    let _turn = Turn::take();
    let child = Command::new(program)
        .arg(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| LmError::template(format!("its process cannot be started: {}", e.kind())))?;
    let answer = exchange(child, &task)?;
    serde_json::from_slice(&answer)
        .map_err(|_| LmError::template("rendering it took too much memory or time"))
}

/// Writes the task and reads the answer, which is empty if the process died of it.
fn exchange(mut child: Child, task: &[u8]) -> Result<Vec<u8>, LmError> {
    let (Some(mut input), Some(mut output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(LmError::template("its process has no input or output"));
    };
    std::thread::scope(|scope| {
        let (sender, receiver) = channel();
        scope.spawn(move || {
            // A process that has died reads nothing; the empty answer says so.
            let _ = input.write_all(task);
            drop(input);
            let mut answer = Vec::new();
            let _ = output.read_to_end(&mut answer);
            let _ = sender.send(answer);
        });
        let answer = receiver.recv_timeout(PATIENCE);
        // Ended already, or to be ended: only then does the thread above come back.
        let _ = child.kill();
        let _ = child.wait();
        Ok(answer.unwrap_or_default())
    })
}

/// One of the processes that may run.
struct Turn;

impl Turn {
    fn take() -> Self {
        let running = RUNNING.0.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |running: &mut usize| *running >= PROCESSES;
        let mut running = RUNNING
            .1
            .wait_while(running, full)
            .unwrap_or_else(PoisonError::into_inner);
        *running += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        RUNNING.1.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_answers_with_the_text_or_the_refusal() {
        let answer = |source: &str| -> Result<String, String> {
            let task = Task {
                source: source.into(),
                messages: vec![ChatMessage {
                    role: "user".into(),
                    content: "Hi".into(),
                }],
                add_generation_prompt: true,
                special: SpecialTokens::default(),
            };
            let mut out = Vec::new();
            let task = serde_json::to_vec(&task).expect("JSON");
            serve(task.as_slice(), &mut out).expect("an answer");
            serde_json::from_slice(&out).expect("a result")
        };
        assert_eq!(answer("<{{ messages[0].content }}>"), Ok("<Hi>".into()));
        assert_eq!(answer("{{ raise_exception('no') }}"), Err("no (line 1)".into()));
    }
}
