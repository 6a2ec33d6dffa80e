//! A device that models are served on, with all that belongs to it: its engine thread, its memory, and the parents that
//! families hold there. A device that failed is opened anew when it is next needed; the others go on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Device;
use tracing::{info, warn};

use super::ServingLimits;
use super::device;
use super::engine::{EngineThread, Faults};
use super::memory::Memory;
use super::parents::ParentWeights;
use crate::config::DeviceChoice;
use crate::telemetry;

/// How long what is to go from a device may take.
const LEAVE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Station {
    /// Which device it is.
    choice: DeviceChoice,
    /// None since it failed.
    opened: Mutex<Option<Device>>,
    /// How often it failed.
    failures: AtomicU64,
    pub engine: EngineThread,
    pub memory: Arc<Memory>,
    pub parents: Arc<ParentWeights>,
}

impl Station {
    pub fn start(
        choice: DeviceChoice,
        device: Device,
        limits: ServingLimits,
        faults: Arc<dyn Faults>,
    ) -> std::io::Result<Self> {
        let on_cpu = matches!(device, Device::Cpu);
        let free = device::free_bytes(&device);
        let memory = Arc::new(Memory::new(limits.memory_bytes, limits.kv_bytes, free));
        Ok(Self {
            choice,
            opened: Mutex::new(Some(device)),
            failures: AtomicU64::new(0),
            engine: EngineThread::start(choice, faults)?,
            parents: Arc::new(ParentWeights::new(memory.clone(), on_cpu)),
            memory,
        })
    }

    pub fn choice(&self) -> DeviceChoice {
        self.choice
    }

    /// Grows when the device fails: what was opened on it before is of no use.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The device; opened anew if it failed. Blocks.
    pub fn device(&self) -> Result<Device, String> {
        if let Some(device) = &*self.opened() {
            return Ok(device.clone());
        }
        // What families and models have there goes by itself.
        self.wait_below(1);
        let mut opened = self.opened();
        if let Some(device) = &*opened {
            return Ok(device.clone());
        }
        let device = device::reopen(self.choice)?;
        info!(device = %self.choice, "a device that failed is open again");
        Ok(opened.insert(device).clone())
    }

    /// The device failed: nothing that lies there can be used any more.
    pub fn fail(&self) {
        if self.opened().take().is_some() {
            warn!(device = %self.choice, "a device failed; it is opened anew when it is next needed");
            self.failures.fetch_add(1, Ordering::Relaxed);
            metrics::counter!(telemetry::DEVICE_FAILURES, "device" => self.choice.to_string()).increment(1);
            self.parents.let_go();
        }
    }

    fn opened(&self) -> MutexGuard<'_, Option<Device>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until less than this is taken, or for a while.
    pub fn wait_below(&self, bytes: u64) {
        let deadline = Instant::now() + LEAVE;
        while self.memory.used_bytes() >= bytes && Instant::now() < deadline {
            self.memory.wait(LOOK);
        }
    }
}
