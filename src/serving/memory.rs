//! How much memory there is for keys and values.

use std::fs;

/// Unless the operator says otherwise, a model's keys and values take at most this share of what is free when the
/// service starts.
const SHARE: u64 = 4;
const LEAST: u64 = 256 << 20;
const MOST: u64 = 4 << 30;

/// Bytes of keys and values that a model may hold by default.
pub fn default_kv_bytes() -> u64 {
    free_bytes().map_or(LEAST, |free| (free / SHARE).clamp(LEAST, MOST))
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
        assert!((LEAST..=MOST).contains(&default_kv_bytes()));
    }
}
