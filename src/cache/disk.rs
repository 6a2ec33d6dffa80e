//! What the cache asks of the file system.

use std::collections::HashSet;
use std::fmt::Write;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use cauldron_checkpoint::Digest;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use tracing::warn;

/// Makes what was created, renamed or removed in a folder survive a power cut.
pub fn sync_folder(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

/// Swaps two folders in one step.
pub(super) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

/// What tells whether the files of a folder were touched; None if there is no such folder.
pub(super) fn identity(dir: &Path) -> io::Result<Option<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut lines = Vec::new();
    for entry in entries {
        let entry = entry?;
        let m = match entry.metadata() {
            Ok(metadata) => metadata,
            // Gone between the listing and the look: the check of the folder will say so.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let mut line = format!("{:?} {} {} {}", entry.file_name(), m.dev(), m.ino(), m.size());
        let _ = write!(
            line,
            " {}.{} {}.{}",
            m.mtime(),
            m.mtime_nsec(),
            m.ctime(),
            m.ctime_nsec()
        );
        lines.push(line);
    }
    lines.sort();
    Ok(Some(lines.join("\n")))
}

/// Notes that a folder is used now. Only the order in which entries are evicted depends on it.
pub(super) fn touch(dir: &Path) {
    let touched = fs::File::open(dir).and_then(|dir| dir.set_modified(SystemTime::now()));
    if let Err(e) = touched
        && e.kind() != io::ErrorKind::NotFound
    {
        warn!(error = %e, "the use of a checkpoint is not noted");
    }
}

/// When a folder was last used; None if it is gone.
pub(super) fn last_use(dir: &Path) -> io::Result<Option<SystemTime>> {
    match fs::metadata(dir).and_then(|metadata| metadata.modified()) {
        Ok(used) => Ok(Some(used)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Digests that have a folder.
pub(super) fn entries(root: &Path) -> io::Result<impl Iterator<Item = Digest>> {
    let names = fs::read_dir(root)?;
    Ok(names.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// Removes what lies in a folder and is not named.
pub(super) fn remove_others(dir: &Path, names: &HashSet<&str>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let named = entry
            .file_name()
            .to_str()
            .is_some_and(|name| names.contains(name));
        if !named && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else if !named {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Bytes of the files directly in a folder; 0 if it is gone.
pub(super) fn folder_bytes(dir: &Path) -> io::Result<u64> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(e),
    };
    let sizes = entries.filter_map(|entry| entry.ok()?.metadata().ok());
    Ok(sizes.map(|metadata| metadata.len()).sum())
}
