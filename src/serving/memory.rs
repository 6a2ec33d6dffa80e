//! The memory that loaded models may take: weights, and room for keys and values. What is not reserved here is not
//! loaded, so no model and no request can take more than there is.

use std::fs;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use cauldron_lm::{Engine, ModelConfig};

/// Unless the operator says otherwise, one model's keys and values take at most this share of what is free when the
/// service starts.
const KV_SHARE: u64 = 4;
const LEAST_KV: u64 = 256 << 20;
const MOST_KV: u64 = 4 << 30;

/// Bytes that models may take, and how many they have.
#[derive(Debug)]
pub(super) struct Memory {
    limit: Option<u64>,
    /// What a model's keys and values may take if the operator said so.
    kv_given: Option<u64>,
    kv_default: u64,
    used: Mutex<u64>,
    freed: Condvar,
}

/// What a model needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    pub weights: u64,
    pub least_kv: u64,
    pub most_kv: u64,
}

/// A model's share; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    memory: Arc<Memory>,
    weights: u64,
    pub kv_bytes: u64,
}

impl Memory {
    /// `limit` None: four fifths of what is free, or none at all where models are not in the machine's memory.
    pub(super) fn new(limit: Option<u64>, kv_bytes: Option<u64>, on_cpu: bool) -> Self {
        let free = free_bytes();
        Self {
            limit: limit.or(free.filter(|_| on_cpu).map(|free| free / 5 * 4)),
            kv_given: kv_bytes,
            kv_default: free.map_or(LEAST_KV, |free| (free / KV_SHARE).clamp(LEAST_KV, MOST_KV)),
            used: Mutex::new(0),
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
            },
            None => {
                let most_kv = self.kv_default.min(useful);
                let longest = Engine::longest_kv_bytes(config) as u64;
                Need {
                    weights,
                    least_kv: longest.max(LEAST_KV).min(most_kv),
                    most_kv,
                }
            }
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
        let mut used = self.used();
        let left = self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(*used));
        let kv_bytes = need.most_kv.min(left.checked_sub(need.weights)?);
        if kv_bytes < need.least_kv {
            return None;
        }
        *used += need.weights + kv_bytes;
        Some(Reservation {
            memory: self.clone(),
            weights: need.weights,
            kv_bytes,
        })
    }

    /// Whether it would fit once `leaving` bytes have come back.
    pub(super) fn fits_after(&self, leaving: u64, need: Need) -> bool {
        let used = self.used().saturating_sub(leaving);
        self.limit
            .is_none_or(|limit| need.least() <= limit.saturating_sub(used))
    }

    pub(super) fn used_bytes(&self) -> u64 {
        *self.used()
    }

    /// Waits until something comes back, or for a while.
    pub(super) fn wait(&self, most: Duration) {
        drop(self.freed.wait_timeout(self.used(), most));
    }

    fn used(&self) -> std::sync::MutexGuard<'_, u64> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut used = self.memory.used();
        *used = (*used + weights).saturating_sub(self.weights);
        drop(used);
        self.weights = weights;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let bytes = self.bytes();
        let mut used = self.memory.used();
        *used = used.saturating_sub(bytes);
        drop(used);
        self.memory.freed.notify_all();
    }
}

/// What this process can still take: of the machine, and of its container if that has a limit.
fn free_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available(&text));
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let container =
        number("memory.max").map(|most| most.saturating_sub(number("memory.current").unwrap_or(0)));
    match (machine, container) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (machine, container) => machine.or(container),
    }
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
    fn no_more_is_reserved_than_there_is_and_it_comes_back() {
        let memory = Arc::new(Memory::new(Some(100), None, true));
        let need = |weights, least_kv, most_kv| Need {
            weights,
            least_kv,
            most_kv,
        };
        let first = memory.reserve(need(40, 10, 20)).expect("room");
        assert_eq!((first.bytes(), first.kv_bytes), (60, 20));
        let second = memory
            .reserve(need(25, 10, 20))
            .expect("room for less than it wants");
        assert_eq!((second.bytes(), second.kv_bytes), (40, 15));
        assert!(memory.reserve(need(1, 0, 0)).is_none() && memory.reserve(need(0, 1, 1)).is_none());
        assert!(memory.fits_after(40, need(30, 10, 20)) && !memory.fits_after(40, need(31, 10, 20)));
        drop(first);
        let mut third = memory.reserve(need(50, 0, 0)).expect("room again");
        third.correct(30);
        assert_eq!(*memory.used(), 70);
        drop((second, third));
        assert_eq!(*memory.used(), 0);
        assert!(memory.check(need(90, 10, 50)).is_ok());
        let error = memory.check(need(90, 11, 50)).expect_err("too large");
        assert!(error.contains("--model-memory-bytes"), "{error}");
        assert!(memory.check(need(u64::MAX, 11, 50)).is_err());
    }
}
