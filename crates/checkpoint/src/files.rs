//! Opening files of a model folder: regular files only, without blocking on a FIFO, and never through a
//! symlink that leaves the folder's own tree of links made by the user who owns it.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::CheckpointError;

/// Opens `dir/name` for reading. `name` is one path component; the file must be a regular one.
/// O_NONBLOCK keeps a FIFO from holding the caller until a writer shows up.
pub(crate) fn open_regular(dir: &Path, name: &str) -> Result<File, CheckpointError> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
        return Err(CheckpointError::malformed(name, "not a plain file name"));
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(dir.join(name), flags, Mode::empty())
        .map_err(|errno| CheckpointError::io(name, errno.into()))?;
    let file = File::from(fd);
    let metadata = file.metadata().map_err(|e| CheckpointError::io(name, e))?;
    if !metadata.is_file() {
        return Err(CheckpointError::NotAFile {
            file: name.to_owned(),
        });
    }
    Ok(file)
}

/// The whole of a small file, or None if it does not exist.
pub(crate) fn read_small(dir: &Path, name: &str, cap: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    let file = match open_regular(dir, name) {
        Ok(file) => file,
        Err(CheckpointError::Missing { .. }) => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(cap + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| CheckpointError::io(name, e))?;
    if bytes.len() as u64 > cap {
        return Err(CheckpointError::malformed(
            name,
            format!("larger than {cap} bytes"),
        ));
    }
    Ok(Some(bytes))
}

/// pread of exactly `buf.len()` bytes; a file cut since it was opened is `Truncated`, not a signal.
pub(crate) fn read_exact_at(file: &File, name: &str, buf: &mut [u8], at: u64) -> Result<(), CheckpointError> {
    file.read_exact_at(buf, at).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => CheckpointError::Truncated {
            file: name.to_owned(),
        },
        _ => CheckpointError::io(name, e),
    })
}

/// Device, inode, size and mtime: equal identities mean the file was not touched in between.
pub(crate) fn identity(file: &File, name: &str) -> Result<String, CheckpointError> {
    let m = file.metadata().map_err(|e| CheckpointError::io(name, e))?;
    Ok(format!(
        "{name}:{}:{}:{}:{}.{:09}",
        m.dev(),
        m.ino(),
        m.size(),
        m.mtime(),
        m.mtime_nsec()
    ))
}
