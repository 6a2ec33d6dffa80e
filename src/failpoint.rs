//! Places where a test may kill this process, to see what it leaves behind: `CAULDRON_FAILPOINT=name` aborts it there, as a
//! power cut would, and `name:3` the third time. Builds without debug assertions have none.

use crate::config::DeviceChoice;

/// What places do in this build.
#[cfg(debug_assertions)]
pub fn reach(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static REACHED: AtomicU64 = AtomicU64::new(0);
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("CAULDRON_FAILPOINT").ok()?;
        let (name, time) = text.split_once(':').unwrap_or((&text, "1"));
        Some((name.to_owned(), time.parse().ok()?))
    });
    if let Some((wanted, time)) = wanted
        && wanted == name
        && REACHED.fetch_add(1, Ordering::Relaxed) + 1 == *time
    {
        std::process::abort();
    }
}

/// What a device is to say in a computation's stead: `CAULDRON_FAULT=place:text`, once, or the third time (`place:text:3`), or
/// twice from then on (`place:text:3:2`). A place is one on every device, or `place@1` on the GPU with that number.
#[cfg(debug_assertions)]
pub fn fault(place: &str, device: DeviceChoice) -> Option<&'static str> {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Wanted {
        place: String,
        text: String,
        times: std::ops::Range<u64>,
    }
    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
    static REACHED: AtomicU64 = AtomicU64::new(0);
    let wanted = WANTED.get_or_init(|| {
        let all = std::env::var("CAULDRON_FAULT").ok()?;
        let mut parts = all.split(':');
        let (place, text) = (parts.next()?.to_owned(), parts.next()?.to_owned());
        let mut number = || parts.next().map_or(Some(1), |part| part.parse::<u64>().ok());
        let (first, count) = (number()?, number()?);
        let times = first..first + count;
        Some(Wanted { place, text, times })
    });
    let wanted = wanted.as_ref()?;
    let is_here = match (wanted.place.split_once('@'), device) {
        (None, _) => wanted.place == place,
        (Some((wanted, number)), DeviceChoice::Cuda(index)) => wanted == place && number.parse() == Ok(index),
        _ => false,
    };
    if !is_here {
        return None;
    }
    let time = REACHED.fetch_add(1, Ordering::Relaxed) + 1;
    wanted.times.contains(&time).then_some(wanted.text.as_str())
}

/// Nothing is.
#[cfg(not(debug_assertions))]
pub fn fault(_place: &str, _device: DeviceChoice) -> Option<&'static str> {
    None
}

/// How many GPUs a build without CUDA is to have, for tests of several: the CPU stands for each.
#[cfg(not(feature = "cuda"))]
pub fn pretended_gpus() -> usize {
    let told = || std::env::var("CAULDRON_PRETENDED_GPUS").ok()?.parse().ok();
    match cfg!(debug_assertions) {
        true => told().unwrap_or(0),
        false => 0,
    }
}

/// Nothing happens.
#[cfg(not(debug_assertions))]
pub fn reach(_name: &str) {}
