//! The memory that loaded models may take: weights, and room for keys and values. What is not reserved here is not
//! loaded, so no model and no request can take more than there is.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use cauldron_lm::{Engine, ModelConfig};

/// Unless the operator says otherwise, one model's keys and values take at most this share of what is free when the
/// service starts.
const KV_SHARE: u64 = 4;
const LEAST_KV: u64 = 256 << 20;
const MOST_KV: u64 = 4 << 30;
/// Points of a family that should find room beside each other.
const POINTS: u64 = 4;

/// Bytes that models may take, and how many they have.
#[derive(Debug)]
pub(super) struct Memory {
    limit: Option<u64>,
    /// What a model's keys and values may take if the operator said so.
    kv_given: Option<u64>,
    kv_default: u64,
    taken: Mutex<Taken>,
    freed: Condvar,
}

/// Bytes that are reserved, and how many of them come back once some requests have ended.
#[derive(Debug, Default)]
struct Taken {
    used: u64,
    leaving: u64,
    /// Points of families.
    points: usize,
    /// Bytes of families' parents.
    parents: u64,
}

/// What a share of the memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Model,
    /// Of a family.
    Point,
    /// Weights that families read.
    Parents,
}

/// The most that may be taken once parents have theirs, and that parents may take, in eighths of the limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ample {
    used: u64,
    parents: u64,
}

impl Ample {
    /// What is read again where it is not held is in the page cache, as likely as not.
    pub const ON_CPU: Self = Self { used: 4, parents: 2 };
    /// There it is the weights of a point that come through the bus otherwise.
    pub const ON_GPU: Self = Self { used: 7, parents: 5 };
}

/// What a model needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    pub weights: u64,
    pub least_kv: u64,
    pub most_kv: u64,
    pub what: Use,
}

/// A model's share; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    memory: Arc<Memory>,
    weights: u64,
    pub kv_bytes: u64,
    what: Use,
    /// Changed under the memory's lock.
    leaving: AtomicBool,
}

impl Memory {
    /// `free`: bytes that nobody has where models lie. `limit` None: four fifths of them, or none at all where they are not known.
    pub(super) fn new(limit: Option<u64>, kv_bytes: Option<u64>, free: Option<u64>) -> Self {
        Self {
            limit: limit.or(free.map(|free| free / 5 * 4)),
            kv_given: kv_bytes,
            kv_default: free.map_or(LEAST_KV, |free| (free / KV_SHARE).clamp(LEAST_KV, MOST_KV)),
            taken: Mutex::default(),
            freed: Condvar::new(),
        }
    }

    /// `weights` are bytes.
    pub(super) fn need(&self, config: &ModelConfig, weights: u64) -> Need {
        let useful = Engine::most_kv_bytes(config) as u64;
        match self.kv_given {
            Some(given) => Need {
                weights,
                least_kv: given.min(useful),
                most_kv: given.min(useful),
                what: Use::Model,
            },
            None => {
                let most_kv = self.kv_default.min(useful);
                let longest = Engine::longest_kv_bytes(config) as u64;
                Need {
                    weights,
                    least_kv: longest.max(LEAST_KV).min(most_kv),
                    most_kv,
                    what: Use::Model,
                }
            }
        }
    }

    /// As [`Self::need`], of a model that others of its family stand beside: it takes less room for keys and values.
    pub(super) fn need_of_point(&self, config: &ModelConfig, weights: u64) -> Need {
        let need = self.need(config, weights);
        Need {
            most_kv: need.least_kv.max(need.most_kv / POINTS),
            what: Use::Point,
            ..need
        }
    }

    /// An error if it would not fit even alone.
    pub(super) fn check(&self, need: Need) -> Result<(), String> {
        match self.limit {
            Some(limit) if need.least() > limit => Err(format!(
                "it needs {} MiB, and all models together may take {} MiB (--model-memory-bytes)",
                need.least() >> 20,
                limit >> 20
            )),
            _ => Ok(()),
        }
    }

    /// As much as is needed and left; None if that is too little.
    pub(super) fn reserve(self: &Arc<Self>, need: Need) -> Option<Reservation> {
        let mut taken = self.taken();
        let left = self
            .limit
            .map_or(u64::MAX, |limit| limit.saturating_sub(taken.used));
        let kv_bytes = need.most_kv.min(left.checked_sub(need.weights)?);
        if kv_bytes < need.least_kv {
            return None;
        }
        Some(self.give(&mut taken, need.weights, kv_bytes, need.what))
    }

    /// Whether it cannot fit beside what parents have, whatever else goes.
    pub(super) fn needs_that_of_parents(&self, need: Need) -> bool {
        let parents = self.taken().parents;
        let beside = |limit: u64| need.least() > limit.saturating_sub(parents);
        parents > 0 && self.limit.is_some_and(beside)
    }

    /// For parents, which families can do without: None where too little would be left to models, or if there is no limit to
    /// tell by.
    pub(super) fn reserve_for_parents(self: &Arc<Self>, bytes: u64, ample: Ample) -> Option<Reservation> {
        let mut taken = self.taken();
        let limit = self.limit?;
        let is_ample = |used: u64, eighths: u64| {
            let most = (u128::from(limit) * u128::from(eighths) / 8) as u64;
            used.checked_add(bytes).is_some_and(|used| used <= most)
        };
        match is_ample(taken.used, ample.used) && is_ample(taken.parents, ample.parents) {
            true => Some(self.give(&mut taken, bytes, 0, Use::Parents)),
            false => None,
        }
    }

    fn give(self: &Arc<Self>, taken: &mut Taken, weights: u64, kv_bytes: u64, what: Use) -> Reservation {
        taken.used += weights + kv_bytes;
        match what {
            Use::Model => {}
            Use::Point => taken.points += 1,
            Use::Parents => taken.parents += weights,
        }
        Reservation {
            memory: self.clone(),
            weights,
            kv_bytes,
            what,
            leaving: AtomicBool::new(false),
        }
    }

    /// Whether it would fit once all that leaves has gone.
    pub(super) fn will_fit(&self, need: Need) -> bool {
        let taken = self.taken();
        let used = taken.used.saturating_sub(taken.leaving);
        self.limit
            .is_none_or(|limit| need.least() <= limit.saturating_sub(used))
    }

    /// Bytes that nobody has; none where there is no limit to tell by.
    pub(super) fn left(&self) -> u64 {
        let used = self.taken().used;
        self.limit.map_or(0, |limit| limit.saturating_sub(used))
    }

    /// Bytes that may be taken, if there is a limit.
    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Points of families that are in memory, named or not.
    pub(super) fn points(&self) -> usize {
        self.taken().points
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.taken().used
    }

    /// Waits until something comes back, or for a while.
    pub(super) fn wait(&self, most: Duration) {
        drop(self.freed.wait_timeout(self.taken(), most));
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Need {
    fn least(self) -> u64 {
        self.weights.saturating_add(self.least_kv)
    }
}

impl Reservation {
    pub(super) fn bytes(&self) -> u64 {
        self.weights + self.kv_bytes
    }

    /// Puts what the weights take in truth in the estimate's place.
    pub(super) fn correct(&mut self, weights: u64) {
        let mut taken = self.memory.taken();
        taken.used = (taken.used + weights).saturating_sub(self.weights);
        if self.what == Use::Parents {
            taken.parents = (taken.parents + weights).saturating_sub(self.weights);
        }
        drop(taken);
        self.weights = weights;
        self.memory.freed.notify_all();
    }

    /// Whether it comes back once the requests of its model have ended.
    pub(super) fn set_leaving(&self, leaving: bool) {
        let mut taken = self.memory.taken();
        if self.leaving.swap(leaving, Ordering::Relaxed) != leaving {
            taken.leaving = match leaving {
                true => taken.leaving + self.bytes(),
                false => taken.leaving.saturating_sub(self.bytes()),
            };
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.set_leaving(false);
        let bytes = self.bytes();
        let mut taken = self.memory.taken();
        taken.used = taken.used.saturating_sub(bytes);
        match self.what {
            Use::Model => {}
            Use::Point => taken.points -= 1,
            Use::Parents => taken.parents = taken.parents.saturating_sub(self.weights),
        }
        drop(taken);
        self.memory.freed.notify_all();
    }
}

/// What this process can still take: of the machine, and of its container if that has a limit.
pub(super) fn free_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let container = free_in_group(Path::new("/sys/fs/cgroup"), &groups);
    match (machine, container) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (machine, container) => machine.or(container),
    }
}

/// Bytes that the control groups of this process leave it, of version 1 or 2; None if they set no limit. `groups` is
/// /proc/self/cgroup. Pages of files that have not been used lately are as good as free.
fn free_in_group(root: &Path, groups: &str) -> Option<u64> {
    let mut free = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (root, limit, usage, pages) = match controllers {
            "" => (root.to_owned(), "memory.max", "memory.current", "inactive_file"),
            "memory" => (
                root.join("memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            ),
            _ => continue,
        };
        // A limit of any group above counts too. In a container the path may be one that is not seen from inside.
        let own = root.join(path.trim_start_matches('/'));
        for group in own.ancestors().take_while(|group| group.starts_with(&root)) {
            let read = |name: &str| fs::read_to_string(group.join(name)).ok();
            let number = |name: &str| -> Option<u64> { read(name)?.trim().parse().ok() };
            let Some(limit) = number(limit) else { continue };
            let stat = read("memory.stat").unwrap_or_default();
            let idle = stat
                .lines()
                .find_map(|line| line.strip_prefix(pages)?.trim().parse().ok());
            let used = number(usage).unwrap_or(0).saturating_sub(idle.unwrap_or(0));
            let left = limit.saturating_sub(used);
            free = Some(free.map_or(left, |free: u64| free.min(left)));
        }
    }
    free
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_read() {
        let text = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n";
        assert_eq!(available(text), Some(8_000_000 * 1024));
        assert_eq!(available("nothing"), None);
        assert!(free_bytes().is_some_and(|free| free > 0));
    }

    #[test]
    fn the_tightest_control_group_counts_and_idle_pages_are_free() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        let group = |path: &str, files: &[(&str, &str)]| {
            let dir = root.join(path);
            fs::create_dir_all(&dir).expect("a folder");
            for (name, text) in files {
                fs::write(dir.join(name), text).expect("a file");
            }
        };
        group("pod", &[("memory.max", "1000\n"), ("memory.current", "900\n")]);
        group(
            "pod/own",
            &[
                ("memory.max", "500\n"),
                ("memory.current", "450\n"),
                ("memory.stat", "anon 100\ninactive_file 300\n"),
            ],
        );
        assert_eq!(free_in_group(root, "0::/pod/own\n"), Some(100), "the pod's");
        group("pod", &[("memory.max", "max\n")]);
        assert_eq!(free_in_group(root, "0::/pod/own\n"), Some(350));
        assert_eq!(free_in_group(root, "0::/elsewhere\n"), None);
        group(
            "memory/docker/x",
            &[
                ("memory.limit_in_bytes", "800\n"),
                ("memory.usage_in_bytes", "500\n"),
            ],
        );
        let old = "5:cpu:/docker/x\n4:memory:/docker/x\n";
        assert_eq!(free_in_group(root, old), Some(300));
        assert_eq!(free_in_group(root, ""), None);
    }

    #[test]
    fn no_more_is_reserved_than_there_is_and_it_comes_back() {
        let memory = Arc::new(Memory::new(Some(100), None, None));
        let need = |weights, least_kv, most_kv| Need {
            weights,
            least_kv,
            most_kv,
            what: Use::Model,
        };
        let first = memory.reserve(need(40, 10, 20)).expect("room");
        assert_eq!((first.bytes(), first.kv_bytes), (60, 20));
        let second = memory
            .reserve(need(25, 10, 20))
            .expect("room for less than it wants");
        assert_eq!((second.bytes(), second.kv_bytes), (40, 15));
        assert!(memory.reserve(need(1, 0, 0)).is_none() && memory.reserve(need(0, 1, 1)).is_none());
        second.set_leaving(true);
        second.set_leaving(true);
        assert!(memory.will_fit(need(30, 10, 20)) && !memory.will_fit(need(31, 10, 20)));
        second.set_leaving(false);
        assert!(!memory.will_fit(need(1, 0, 0)));
        first.set_leaving(true);
        drop(first);
        assert!(memory.will_fit(need(50, 10, 20)) && !memory.will_fit(need(51, 10, 20)));
        let mut third = memory.reserve(need(50, 0, 0)).expect("room again");
        third.correct(30);
        assert_eq!(memory.used_bytes(), 70);
        drop((second, third));
        assert_eq!(memory.used_bytes(), 0);
        assert!(memory.check(need(90, 10, 50)).is_ok());
        let model = memory.reserve(need(30, 0, 0)).expect("room");
        assert!(
            memory.reserve_for_parents(21, Ample::ON_CPU).is_none(),
            "half is left"
        );
        let parents = memory.reserve_for_parents(20, Ample::ON_CPU).expect("it is");
        assert!(
            !memory.needs_that_of_parents(need(80, 0, 0)) && memory.needs_that_of_parents(need(80, 1, 1))
        );
        drop(model);
        assert!(
            memory.reserve_for_parents(6, Ample::ON_CPU).is_none(),
            "more than a quarter"
        );
        let others = memory.reserve_for_parents(5, Ample::ON_CPU).expect("a quarter");
        drop((parents, others));
        assert!(memory.reserve_for_parents(25, Ample::ON_CPU).is_some());
        let error = memory.check(need(90, 11, 50)).expect_err("too large");
        assert!(error.contains("--model-memory-bytes"), "{error}");
        assert!(memory.check(need(u64::MAX, 11, 50)).is_err());
    }
}
