//! JSON as Python's `json.dumps` lays it out, to a bounded depth: the writer recurses, and a value may hold itself.

use std::io::{Error as IoError, Write};

use minijinja::{Error, ErrorKind};
use serde_json::ser::Formatter;

/// Lists and objects within each other.
const MAX_DEPTH: usize = 64;
const MAX_INDENT: usize = 16;

/// On one line with spaces after separators, or indented.
pub(super) struct PythonJson {
    indent: Option<usize>,
    depth: usize,
    /// Something was written since the last opening bracket.
    filled: bool,
}

impl PythonJson {
    pub(super) fn new(indent: Option<usize>) -> Result<Self, Error> {
        if indent.is_some_and(|n| n > MAX_INDENT) {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: indent is too large",
            ));
        }
        Ok(Self {
            indent,
            depth: 0,
            filled: false,
        })
    }

    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> Result<(), IoError> {
        if self.depth == MAX_DEPTH {
            return Err(IoError::other("tojson: nested too deep"));
        }
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> Result<(), IoError> {
        self.depth -= 1;
        if self.filled {
            self.new_line(out)?;
        }
        self.filled = true;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Result<(), IoError> {
        self.filled = true;
        match (first, self.indent) {
            (true, _) => {}
            (false, None) => out.write_all(b", ")?,
            (false, Some(_)) => out.write_all(b",")?,
        }
        self.new_line(out)
    }

    fn new_line<W: ?Sized + Write>(&self, out: &mut W) -> Result<(), IoError> {
        match self.indent {
            None => Ok(()),
            Some(indent) => {
                out.write_all(b"\n")?;
                out.write_all(" ".repeat(indent * self.depth).as_bytes())
            }
        }
    }
}

impl Formatter for PythonJson {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> Result<(), IoError> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> Result<(), IoError> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Result<(), IoError> {
        self.item(out, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> Result<(), IoError> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> Result<(), IoError> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> Result<(), IoError> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> Result<(), IoError> {
        out.write_all(b": ")
    }
}
