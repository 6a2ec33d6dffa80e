//! Opening files of a model folder: regular files only, without blocking on a FIFO, and never through a symlink
//! that leaves the place where model folders lie.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    match stays_inside(dir, &file) {
        Ok(true) => Ok(file),
        Ok(false) => Err(CheckpointError::malformed(
            name,
            "is a link that leaves the models folder",
        )),
        Err(e) => Err(CheckpointError::io(name, e)),
    }
}

/// Whether an opened file lies beside or below its model folder. Links among the folders of one directory are taken,
/// as are those of the Hugging Face cache, whose `snapshots/<revision>` links to `blobs`; nothing else is, so that a
/// folder from a stranger cannot make another file of this machine a tokenizer. The kernel is asked where what was
/// opened is: a link that is changed meanwhile changes nothing.
fn stays_inside(dir: &Path, file: &File) -> io::Result<bool> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = path_of(&rustix::fs::open(dir, flags, Mode::empty())?)?;
    let file = path_of(file)?;
    let Some(parent) = folder.parent() else {
        return Ok(false);
    };
    let blobs = match parent.ends_with("snapshots") {
        true => Some(parent.with_file_name("blobs")),
        false => None,
    };
    Ok(file.starts_with(parent) || blobs.is_some_and(|blobs| file.starts_with(blobs)))
}

fn path_of(fd: &impl AsFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
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

/// Whether the byte at `offset` can be read without waiting for the disk.
pub(crate) fn is_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0u8];
    let mut parts = [std::io::IoSliceMut::new(&mut byte)];
    let now = rustix::io::ReadWriteFlags::NOWAIT;
    rustix::io::preadv2(file, &mut parts, offset, now).is_ok_and(|read| read == 1)
}

/// pread of exactly `buf.len()` bytes; a file cut since it was opened is `Truncated`, not a signal.
pub(crate) fn read_exact_at(file: &File, name: &str, buf: &mut [u8], at: u64) -> Result<(), CheckpointError> {
    file.read_exact_at(buf, at).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => CheckpointError::Truncated {
            file: name.to_owned(),
        },
        _ => CheckpointError::io(name, e),
    })
}

/// Device, inode, size, mtime and ctime: equal identities mean the file was not touched in between. An mtime can be set
/// back by who writes a file, a ctime cannot.
pub(crate) fn identity(file: &File, name: &str) -> Result<String, CheckpointError> {
    let m = file.metadata().map_err(|e| CheckpointError::io(name, e))?;
    Ok(format!(
        "{name}:{}:{}:{}:{}.{:09}:{}.{:09}",
        m.dev(),
        m.ino(),
        m.size(),
        m.mtime(),
        m.mtime_nsec(),
        m.ctime(),
        m.ctime_nsec()
    ))
}

/// How long a file must lie untouched before its [`identity`] is trusted later: file systems count times in ticks, and two
/// writes in one tick give one identity.
const SETTLED: Duration = Duration::from_secs(2);

/// Whether any later write to the file gives it another identity.
pub(crate) fn is_settled(file: &File) -> bool {
    let Ok(m) = file.metadata() else {
        return false;
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let changed = Duration::from_secs(m.ctime().max(m.mtime()).try_into().unwrap_or(0));
    now.saturating_sub(changed) > SETTLED
}
