//! Places where a test may kill this process, to see what it leaves behind: `CAULDRON_FAILPOINT=name` aborts it there, as a
//! power cut would, and `name:3` the third time. Builds without debug assertions have none.

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

/// Nothing happens.
#[cfg(not(debug_assertions))]
pub fn reach(_name: &str) {}
