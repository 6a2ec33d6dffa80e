//! Content digests of checkpoints that were read before, by the identity of their files: parents that did not change are
//! not read again for their digest, in this run or a later one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use cauldron_checkpoint::Digest;
use tracing::warn;
use uuid::Uuid;

/// A folder with one small file for each identity. It is only ever a shortcut: what cannot be read counts as unknown.
#[derive(Debug, Clone)]
pub struct KnownContents {
    folder: PathBuf,
}

/// Checkpoints that are remembered.
const MOST: usize = 4096;

impl KnownContents {
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let folder = data_dir.join("contents");
        fs::create_dir_all(&folder)?;
        trim(&folder, MOST)?;
        Ok(Self { folder })
    }

    pub fn get(&self, identity: &str) -> Option<Digest> {
        let text = fs::read_to_string(self.path(identity)).ok()?;
        let (digest, check) = text.trim_end().split_once(' ')?;
        let digest: Digest = digest.parse().ok()?;
        (check == checked(identity, &digest)).then_some(digest)
    }

    pub fn put(&self, identity: &str, digest: Digest) {
        let path = self.path(identity);
        let draft = self.folder.join(format!("{}.draft", Uuid::new_v4()));
        let text = format!("{digest} {}\n", checked(identity, &digest));
        // Not synced: a file that a power cut emptied fails its check.
        if let Err(e) = fs::write(&draft, text).and_then(|()| fs::rename(&draft, path)) {
            warn!(error = %e, "the content digest of a parent is not remembered");
            let _ = fs::remove_file(&draft);
        }
    }

    fn path(&self, identity: &str) -> PathBuf {
        self.folder.join(Digest::of(identity.as_bytes()).to_string())
    }
}

/// Ties a digest to its identity, so that neither a flipped bit nor a file under another's name is believed.
fn checked(identity: &str, digest: &Digest) -> String {
    Digest::of(format!("cauldron known content v1\n{identity}\n{digest}").as_bytes()).to_string()
}

/// Removes drafts, and of the rest the oldest beyond `most`.
fn trim(folder: &Path, most: usize) -> io::Result<()> {
    let mut kept: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        match name.to_str().and_then(|name| name.parse::<Digest>().ok()) {
            Some(_) => kept.push((entry.metadata()?.modified()?, entry.path())),
            None => fs::remove_file(entry.path())?,
        }
    }
    kept.sort();
    let beyond = kept.len().saturating_sub(most);
    kept.iter()
        .take(beyond)
        .try_for_each(|(_, path)| fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_known_by_its_identity_in_later_runs() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let digest = Digest::of(b"content");
        let known = KnownContents::open(dir.path())?;
        assert_eq!(known.get("a"), None);
        known.put("a", digest);
        assert_eq!(KnownContents::open(dir.path())?.get("a"), Some(digest));
        assert_eq!(known.get("b"), None);
        Ok(())
    }

    #[test]
    fn a_damaged_or_misplaced_file_is_not_believed() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let known = KnownContents::open(dir.path())?;
        known.put("a", Digest::of(b"content"));
        let good = fs::read_to_string(known.path("a"))?;
        fs::write(known.path("b"), &good)?;
        assert_eq!(known.get("b"), None);
        let flipped = good.replacen(good.chars().next().unwrap_or('0'), "x", 1);
        for bad in ["", "0", &good[..70], &flipped] {
            fs::write(known.path("a"), bad)?;
            assert_eq!(known.get("a"), None, "{bad}");
        }
        Ok(())
    }

    #[test]
    fn the_oldest_are_forgotten_first() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let known = KnownContents::open(dir.path())?;
        for (age, identity) in ["a", "b", "c"].into_iter().enumerate() {
            known.put(identity, Digest::of(identity.as_bytes()));
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(age as u64);
            fs::File::options()
                .write(true)
                .open(known.path(identity))?
                .set_modified(time)?;
        }
        trim(&known.folder, 2)?;
        let left = ["a", "b", "c"].map(|identity| known.get(identity).is_some());
        assert_eq!(left, [false, true, true]);
        Ok(())
    }
}
