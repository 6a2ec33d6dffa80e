//! The weights of families' parents in memory: read once, however many families share them, as long as there is ample room.
//! What finds none is read from its files at every point.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cauldron_checkpoint::{Checkpoint, CheckpointError, HeldWeights};

use super::memory::{Memory, Reservation};

/// What all families of this process hold.
#[derive(Debug)]
pub(super) struct ParentWeights {
    /// None where points are not computed in the memory that it counts.
    memory: Option<Arc<Memory>>,
    /// By the identity of a checkpoint's files.
    kept: Mutex<HashMap<String, Weak<Kept>>>,
}

/// The weights of one checkpoint, with their share of the memory.
#[derive(Debug)]
pub(super) struct Kept {
    pub weights: Arc<HeldWeights>,
    _memory: Reservation,
}

impl ParentWeights {
    pub(super) fn new(memory: Option<Arc<Memory>>) -> Self {
        Self {
            memory,
            kept: Mutex::default(),
        }
    }

    /// The weights of a checkpoint; None where there is no room. Families wait for each other, so that what they share is read
    /// by one.
    pub(super) fn of(
        &self,
        identity: Option<&str>,
        checkpoint: &Checkpoint,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Arc<Kept>>, CheckpointError> {
        let Some(memory) = &self.memory else {
            return Ok(None);
        };
        let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, kept| kept.strong_count() > 0);
        if let Some(kept) = identity.and_then(|identity| all.get(identity)?.upgrade()) {
            return Ok(Some(kept));
        }
        let Some(reservation) = memory.reserve_for_parents(checkpoint.total_bytes()) else {
            return Ok(None);
        };
        let weights = checkpoint.read_all(go_on)?;
        let kept = Arc::new(Kept {
            weights: Arc::new(weights),
            _memory: reservation,
        });
        // Files that changed while they were read belong to nobody else.
        if let Some(identity) = identity
            && checkpoint.identity()? == identity
        {
            all.insert(identity.to_owned(), Arc::downgrade(&kept));
        }
        Ok(Some(kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(dir: &std::path::Path) -> Checkpoint {
        let header = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  "#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.extend([1.0f32, 2.0].iter().flat_map(|v| v.to_le_bytes()));
        std::fs::write(dir.join("model.safetensors"), file).expect("a file");
        std::fs::write(dir.join("config.json"), "{}").expect("a file");
        Checkpoint::open(dir).expect("a checkpoint")
    }

    #[test]
    fn weights_are_read_once_for_all_and_go_with_the_last_family() {
        let dir = tempfile::tempdir().expect("a folder");
        let model = checkpoint(dir.path());
        let identity = model.identity().expect("an identity");
        let memory = Arc::new(Memory::new(Some(64), None, true));
        let parents = ParentWeights::new(Some(memory.clone()));
        let of = |identity: Option<&str>| parents.of(identity, &model, &|| true).expect("no error");
        let first = of(Some(&identity)).expect("room");
        let second = of(Some(&identity)).expect("the same");
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(memory.used_bytes(), 8);
        // Files that may still change are read by each family for itself.
        let own = of(None).expect("room");
        assert_eq!(memory.used_bytes(), 16);
        assert!(of(None).is_none(), "more than a quarter");
        drop((first, own));
        assert_eq!(memory.used_bytes(), 8);
        drop(second);
        assert_eq!(memory.used_bytes(), 0);
        assert!(
            ParentWeights::new(None)
                .of(None, &model, &|| true)
                .expect("no error")
                .is_none()
        );
        let cancelled = parents.of(None, &model, &|| false);
        assert!(matches!(cancelled, Err(CheckpointError::Cancelled)));
        assert_eq!(memory.used_bytes(), 0);
    }

    #[test]
    fn what_is_held_is_what_was_read() {
        let dir = tempfile::tempdir().expect("a folder");
        let model = checkpoint(dir.path());
        model.hold(Arc::new(model.read_all(&|| true).expect("the weights")));
        std::fs::write(dir.path().join("model.safetensors"), b"gone").expect("a file");
        assert_eq!(model.read_f32("w").expect("values"), [1.0, 2.0]);
        assert_eq!(model.held("w", 4..8), Some(2.0f32.to_le_bytes().as_slice()));
        assert!(model.held("w", 4..9).is_none() && model.held("v", 0..1).is_none());
    }
}
