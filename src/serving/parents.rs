//! The weights of families' parents in memory: read once, however many families share them, as long as there is ample room, and
//! let go where a model needs theirs. What is not there is read from its files at every point.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::Duration;

use cauldron_checkpoint::{CheckpointError, HeldWeights, Hold, LetGo, Place};
use tracing::info;

use super::memory::{Ample, Memory, Reservation};

/// How often a family that waits for another's reading looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(20);

/// What all families of this process hold.
#[derive(Debug)]
pub(super) struct ParentWeights {
    memory: Arc<Memory>,
    /// Whether what `memory` counts is the CPU's.
    on_cpu: bool,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// By the identity of a checkpoint's files, or of an expert's with its adapter. Locked while they are read.
    weights: HashMap<String, Arc<Mutex<Weak<HeldWeights>>>>,
    /// Those that hold weights, or did.
    holders: Vec<Weak<dyn LetGo>>,
    /// Those of families whose parents lie on the GPU.
    rooms: Vec<Weak<Room>>,
}

impl ParentWeights {
    pub(super) fn new(memory: Arc<Memory>, on_cpu: bool) -> Self {
        Self {
            memory,
            on_cpu,
            known: Mutex::default(),
        }
    }

    /// Has a checkpoint or an expert hold its weights, if there is room. Who has the same files waits until they are read.
    pub(super) fn hold(
        &self,
        identity: Option<&str>,
        owner: Arc<dyn Hold>,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), CheckpointError> {
        if !self.on_cpu {
            return Ok(());
        }
        // Files that may change without their identity are read by each family for itself.
        let place = match identity {
            None => Arc::default(),
            Some(identity) => self
                .known()
                .weights
                .entry(identity.to_owned())
                .or_default()
                .clone(),
        };
        let mut place = loop {
            match place.try_lock() {
                Ok(place) => break place,
                Err(TryLockError::Poisoned(place)) => break place.into_inner(),
                Err(TryLockError::WouldBlock) if go_on() => std::thread::sleep(LOOK),
                Err(TryLockError::WouldBlock) => return Err(CheckpointError::Cancelled),
            }
        };
        let weights = match place.upgrade() {
            Some(weights) => weights,
            None => {
                let Some(reservation) = self
                    .memory
                    .reserve_for_parents(owner.bytes_to_hold(), Ample::ON_CPU)
                else {
                    return Ok(());
                };
                let weights = Arc::new(owner.read_all(go_on, Box::new(reservation))?);
                // Files that changed while they were read belong to nobody else.
                if identity.is_some_and(|identity| owner.identity().is_ok_and(|now| now == identity)) {
                    *place = Arc::downgrade(&weights);
                }
                weights
            }
        };
        let mut known = self.known();
        known.holders.retain(|holder| holder.strong_count() > 0);
        let holder: Arc<dyn LetGo> = owner.clone();
        known.holders.push(Arc::downgrade(&holder));
        known.weights.retain(|_, place| {
            Arc::strong_count(place) > 1 || place.try_lock().is_ok_and(|w| w.strong_count() > 0)
        });
        owner.hold(weights);
        Ok(())
    }

    /// Room for what one family forms of its parents, if it is ample.
    pub(super) fn room(&self, bytes: u64) -> Option<Reservation> {
        let memory = self.on_cpu.then_some(&self.memory)?;
        memory.reserve_for_parents(bytes, Ample::ON_CPU)
    }

    /// Weights will be held in a place until a model needs their room.
    pub(super) fn is_for(&self, place: &Arc<Place>) {
        let holder: Arc<dyn LetGo> = place.clone();
        self.known().holders.push(Arc::downgrade(&holder));
    }

    /// Room on the GPU for one family's parents, if it is ample.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) fn room_on_gpu(&self, bytes: u64) -> Option<GpuRoom> {
        self.room_for(bytes, false)
    }

    /// As [`Self::room_on_gpu`], for a merge to disk that passes through.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) fn room_for_merge(&self, bytes: u64) -> Option<GpuRoom> {
        self.room_for(bytes, true)
    }

    fn room_for(&self, bytes: u64, is_of_merge: bool) -> Option<GpuRoom> {
        let room = Arc::new(Room {
            reservation: self.memory.reserve_for_parents(bytes, Ample::ON_GPU)?,
            is_wanted_back: AtomicBool::new(false),
            is_of_merge,
        });
        let mut known = self.known();
        known.rooms.retain(|room| room.strong_count() > 0);
        known.rooms.push(Arc::downgrade(&room));
        Some(GpuRoom(room))
    }

    /// Whether families hold anything; what merges are lent is little.
    pub(super) fn holds_parents(&self) -> bool {
        let known = self.known();
        let mut rooms = known.rooms.iter().filter_map(Weak::upgrade);
        let mut holders = known.holders.iter().filter_map(Weak::upgrade);
        rooms.any(|room| !room.is_of_merge) || holders.any(|owner| owner.held().is_some())
    }

    /// Gives the memory back, once the passes that run have ended; false if nothing was held. Families go on with their files.
    pub(super) fn let_go(&self) -> bool {
        let (holders, rooms) = {
            let mut known = self.known();
            (
                std::mem::take(&mut known.holders),
                std::mem::take(&mut known.rooms),
            )
        };
        let mut any = false;
        for room in rooms.iter().filter_map(Weak::upgrade) {
            room.is_wanted_back.store(true, Ordering::Relaxed);
            // Who asked for it waits instead of taking from others too.
            room.reservation.set_leaving(true);
            any = true;
        }
        for owner in holders.iter().filter_map(Weak::upgrade) {
            any |= owner.held().is_some();
            owner.let_go();
        }
        if any {
            info!("families' parents are read from their files from now on: a model needs the memory");
        }
        any
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One family's share of the GPU's memory; given back when it is dropped.
#[derive(Debug)]
pub(super) struct GpuRoom(Arc<Room>);

#[derive(Debug)]
struct Room {
    reservation: Reservation,
    is_wanted_back: AtomicBool,
    is_of_merge: bool,
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
impl GpuRoom {
    /// Whether a model needs it.
    pub(super) fn is_wanted_back(&self) -> bool {
        self.0.is_wanted_back.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use cauldron_checkpoint::Checkpoint;

    use super::super::memory::{Need, Use};
    use super::*;

    fn checkpoint(dir: &std::path::Path) -> Arc<Checkpoint> {
        let header = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  "#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.extend([1.0f32, 2.0].iter().flat_map(|v| v.to_le_bytes()));
        std::fs::write(dir.join("model.safetensors"), file).expect("a file");
        std::fs::write(dir.join("config.json"), "{}").expect("a file");
        open(dir)
    }

    fn open(dir: &std::path::Path) -> Arc<Checkpoint> {
        Arc::new(Checkpoint::open(dir).expect("a checkpoint"))
    }

    #[test]
    fn weights_are_read_once_for_all_and_go_with_the_last_family_or_when_they_must() {
        let dir = tempfile::tempdir().expect("a folder");
        let (one, two) = (checkpoint(dir.path()), open(dir.path()));
        let identity = one.identity().expect("an identity");
        let bytes = one.bytes_to_hold();
        let memory = Arc::new(Memory::new(Some(8 * bytes), None, None));
        let parents = ParentWeights::new(memory.clone(), true);
        let hold = |identity: Option<&str>, model: &Arc<Checkpoint>| {
            parents.hold(identity, model.clone(), &|| true).expect("no error");
        };
        hold(Some(&identity), &one);
        hold(Some(&identity), &two);
        let same = one
            .held()
            .zip(two.held())
            .is_some_and(|(a, b)| Arc::ptr_eq(&a, &b));
        assert!(same && memory.used_bytes() == bytes);
        // Files that may still change are read by each family for itself.
        let own = open(dir.path());
        hold(None, &own);
        assert_eq!(memory.used_bytes(), 2 * bytes);
        let beyond = open(dir.path());
        hold(None, &beyond);
        assert!(beyond.held().is_none(), "more than a quarter");
        drop((one, own));
        assert_eq!(memory.used_bytes(), bytes);
        let running = two.held();
        assert!(parents.let_go() && two.held().is_none() && memory.used_bytes() == bytes);
        drop(running);
        assert_eq!(memory.used_bytes(), 0);
        assert!(!parents.let_go());
        let cancelled = parents.hold(None, two.clone(), &|| false);
        assert!(matches!(cancelled, Err(CheckpointError::Cancelled)));
        assert_eq!(memory.used_bytes(), 0);
        let nowhere = ParentWeights::new(memory.clone(), false);
        nowhere.hold(None, two.clone(), &|| true).expect("no error");
        assert!(two.held().is_none());
        let lent = nowhere.room_for_merge(bytes).expect("a little");
        assert!(!nowhere.holds_parents() && nowhere.let_go() && lent.is_wanted_back());
        drop(lent);
        let room = nowhere.room_on_gpu(4 * bytes).expect("half");
        assert!(nowhere.holds_parents());
        assert!(nowhere.room_on_gpu(2 * bytes).is_none() && !room.is_wanted_back());
        assert_eq!(memory.used_bytes(), 4 * bytes);
        let need = Need {
            weights: 8 * bytes,
            least_kv: 0,
            most_kv: 0,
            what: Use::Model,
        };
        assert!(!memory.will_fit(need) && memory.reserve(need).is_none());
        assert!(nowhere.let_go() && room.is_wanted_back() && !nowhere.let_go());
        assert!(
            memory.will_fit(need) && memory.reserve(need).is_none(),
            "it is leaving"
        );
        drop(room);
        assert_eq!(memory.used_bytes(), 0);
    }

    #[test]
    fn what_is_held_is_what_was_read() {
        let dir = tempfile::tempdir().expect("a folder");
        let model = checkpoint(dir.path());
        model.hold(Arc::new(
            model.read_all(&|| true, Box::new(())).expect("the weights"),
        ));
        std::fs::write(dir.path().join("model.safetensors"), b"gone").expect("a file");
        assert_eq!(model.read_f32("w").expect("values"), [1.0, 2.0]);
        model.let_go();
        assert!(model.read_f32("w").is_err());
    }
}
