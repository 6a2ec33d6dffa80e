//! Text of an answer while its tokens arrive: never half a character, and never text that may turn out to be
//! the beginning of a stop string.

use std::sync::Arc;

use crate::{LmError, TextTokenizer};

/// Tokens that may wait for the rest of a character; more than any character takes.
const MAX_PENDING: usize = 24;

/// What became certain with a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Text that may be emitted now.
    pub text: String,
    /// A stop string was met; it is not in any text, and nothing follows.
    pub stopped: bool,
}

/// Incremental detokeniser of one answer. Special tokens have no text.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Arc<TextTokenizer>,
    stops: Vec<String>,
    /// The latest tokens: those up to `read` are out already and give the rest its context.
    ids: Vec<u32>,
    read: usize,
    /// Text that might begin a stop string.
    held: String,
    stopped: bool,
    /// Tokens to come before stop strings count.
    free: usize,
}

impl TextStream {
    /// Empty stop strings are ignored.
    pub fn new(tokenizer: Arc<TextTokenizer>, stops: Vec<String>) -> Self {
        Self {
            tokenizer,
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            ids: Vec::new(),
            read: 0,
            held: String::new(),
            stopped: false,
            free: 0,
        }
    }

    /// Lets the text of the first tokens through whatever it is; stop strings are looked for in what follows.
    #[must_use]
    pub fn with_min_tokens(mut self, tokens: usize) -> Self {
        self.free = tokens;
        self
    }

    /// Takes the next token. After a stop, further tokens have no text.
    pub fn push(&mut self, token: u32) -> Result<Chunk, LmError> {
        let free = self.free > 0;
        self.free = self.free.saturating_sub(1);
        if self.stopped || self.tokenizer.is_special(token) {
            return Ok(self.chunk(String::new()));
        }
        self.ids.push(token);
        let pending = self.pending_text()?;
        let whole = !pending.is_empty() && !pending.ends_with('\u{fffd}');
        if !whole && self.ids.len() - self.read < MAX_PENDING {
            return Ok(self.chunk(String::new()));
        }
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        let text = match free {
            true => pending,
            false => self.pass(&pending),
        };
        Ok(self.chunk(text))
    }

    /// The text that was still held back. Nothing may be pushed after it.
    pub fn finish(&mut self) -> Result<String, LmError> {
        if self.stopped {
            return Ok(String::new());
        }
        let pending = self.pending_text()?;
        self.read = self.ids.len();
        let mut text = self.pass(&pending);
        if !self.stopped {
            text.push_str(&std::mem::take(&mut self.held));
        }
        Ok(text)
    }

    /// Whether a stop string was met, also by [`TextStream::finish`].
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    fn chunk(&self, text: String) -> Chunk {
        Chunk {
            text,
            stopped: self.stopped,
        }
    }

    /// Text of the tokens after `read`, decoded with those before as context: decoders treat the first token
    /// of a text differently.
    fn pending_text(&self) -> Result<String, LmError> {
        let before = self.tokenizer.decode(&self.ids[..self.read], true)?;
        let all = self.tokenizer.decode(&self.ids, true)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_owned())
    }

    /// Adds text and returns what can no longer become part of a stop string.
    fn pass(&mut self, text: &str) -> String {
        self.held.push_str(text);
        let met = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(at) = met {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max();
        let rest = self.held.split_off(self.held.len() - keep.unwrap_or(0));
        std::mem::replace(&mut self.held, rest)
    }
}

/// Length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len())
        .rev()
        .filter(|len| stop.is_char_boundary(*len))
        .find(|len| text.ends_with(&stop[..*len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::testing::{EOS, tiny};

    fn run(stops: &[&str], ids: &[u32]) -> (Vec<String>, bool) {
        let stops = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut stream = TextStream::new(Arc::new(tiny()), stops);
        let mut texts: Vec<String> = ids
            .iter()
            .map(|id| stream.push(*id).expect("a chunk").text)
            .collect();
        texts.push(stream.finish().expect("text"));
        (texts, stream.is_stopped())
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn characters_come_whole() {
        let (texts, _) = run(&[], &bytes("a🙂é"));
        assert_eq!(texts, ["a", "", "", "", "🙂", "", "é", ""]);
    }

    #[test]
    fn a_stop_string_is_held_back_and_never_emitted() {
        let (texts, stopped) = run(&["stop"], &bytes("no sto! stop it"));
        assert!(stopped);
        assert_eq!(texts.concat(), "no sto! ");
        assert_eq!(texts[3..7], ["", "", "", "sto!"]);
        let (texts, stopped) = run(&["\n\n", "Question:"], &bytes("4\nQuest"));
        assert_eq!((texts.concat().as_str(), stopped), ("4\nQuest", false));
        assert_eq!(texts.last().map(String::as_str), Some("Quest"));
    }

    #[test]
    fn stop_strings_count_from_the_first_token_after_the_least() {
        for (least, expected) in [(0, "a"), (3, "abca"), (5, "abcabca"), (8, "abcabcabc")] {
            let mut stream = TextStream::new(Arc::new(tiny()), vec!["bc".into()]).with_min_tokens(least);
            let mut text = String::new();
            for id in bytes("abcabcabc") {
                text += &stream.push(id).expect("a chunk").text;
            }
            text += &stream.finish().expect("text");
            assert_eq!(text, expected, "{least}");
        }
    }

    #[test]
    fn the_earliest_stop_wins_and_overlapping_starts_are_found() {
        assert_eq!(run(&["c", "bc"], &bytes("abcd")).0.concat(), "a");
        assert_eq!(run(&["aab"], &bytes("aaab")).0.concat(), "a");
        assert_eq!(run(&["é"], &bytes("aéb")).0.concat(), "a");
        assert_eq!(
            run(&[""], &bytes("ab")),
            (vec!["a".into(), "b".into(), String::new()], false)
        );
    }

    #[test]
    fn special_tokens_have_no_text_and_broken_bytes_do_not_stall() {
        assert_eq!(run(&[], &[257, EOS]).0.concat(), "the");
        let (texts, _) = run(&[], &[0xff; 100]);
        assert!(texts[..60].iter().any(|text| !text.is_empty()));
        assert_eq!(texts.concat(), "\u{fffd}".repeat(100));
        assert_eq!(run(&[], &[0xf0, 0x9f]).0.concat(), "\u{fffd}");
    }
}
