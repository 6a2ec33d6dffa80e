//! Weights that lie in memory, and what they are the weights of.
//!
//! A [`Place`] has them as long as there is room: whoever needs the room has it let go, and its owner goes on with the files.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::CheckpointError;

/// The bytes of a checkpoint's weight files, or numbers that follow from them: f32 that an adapter makes of the tensors it changes,
/// or deltas that a sparsifier has thinned.
#[derive(Debug)]
pub struct HeldWeights {
    buffers: Vec<Vec<u8>>,
    /// What is to live as long as they do.
    _keeper: Box<dyn Keeper>,
}

/// Something that goes when weights in memory do, such as their share of a budget.
pub trait Keeper: Debug + Send + Sync {}

impl<T: Debug + Send + Sync> Keeper for T {}

impl HeldWeights {
    pub fn new(buffers: Vec<Vec<u8>>, keeper: Box<dyn Keeper>) -> Self {
        Self {
            buffers,
            _keeper: keeper,
        }
    }

    pub fn byte_len(&self) -> u64 {
        self.buffers.iter().map(|buffer| buffer.len() as u64).sum()
    }

    /// Some bytes of a buffer.
    pub fn bytes(&self, buffer: usize, range: Range<usize>) -> Option<&[u8]> {
        self.buffers.get(buffer)?.get(range)
    }
}

/// Where an owner of weights has them while they are in memory.
#[derive(Debug, Default)]
pub struct Place {
    held: RwLock<Option<Arc<HeldWeights>>>,
    was_let_go: AtomicBool,
}

impl Place {
    /// Whether anybody has wanted the room back.
    pub fn was_let_go(&self) -> bool {
        self.was_let_go.load(Ordering::Relaxed)
    }
}

/// What can have weights in memory. All that is read of it is read from there then.
pub trait LetGo: Debug + Send + Sync {
    fn place(&self) -> &Place;

    /// From now on all reads are of these weights, which must be those of the same files.
    fn hold(&self, weights: Arc<HeldWeights>) {
        let place = &self.place().held;
        *place.write().unwrap_or_else(PoisonError::into_inner) = Some(weights);
    }

    /// From now on reads are of the files again.
    fn let_go(&self) {
        let place = self.place();
        place.was_let_go.store(true, Ordering::Relaxed);
        *place.held.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The weights that are in memory.
    fn held(&self) -> Option<Arc<HeldWeights>> {
        let place = &self.place().held;
        place.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl LetGo for Place {
    fn place(&self) -> &Place {
        self
    }
}

/// What can bring its weights into memory.
pub trait Hold: LetGo {
    /// A cheap fingerprint of the files: equal while nothing was written to them.
    fn identity(&self) -> Result<String, CheckpointError>;

    /// What [`Self::read_all`] takes of memory.
    fn bytes_to_hold(&self) -> u64;

    /// Brings all weights into memory, on all threads. `go_on` returns false to cancel; `keeper` lives as long as they do.
    fn read_all(
        &self,
        go_on: &(dyn Fn() -> bool + Sync),
        keeper: Box<dyn Keeper>,
    ) -> Result<HeldWeights, CheckpointError>;
}

/// `len` zeros, or an error where there is no memory for them.
pub(crate) fn buffer(len: u64, of: &str) -> Result<Vec<u8>, CheckpointError> {
    let no_room = |_| CheckpointError::io(of, std::io::ErrorKind::OutOfMemory.into());
    let len = usize::try_from(len).map_err(|_| CheckpointError::malformed(of, "too large"))?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(no_room)?;
    bytes.resize(len, 0);
    Ok(bytes)
}
