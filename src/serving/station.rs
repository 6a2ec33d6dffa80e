//! A device that models are served on, with all that belongs to it: its engine thread, its memory, and the parents that
//! families hold there. A device that failed is opened anew when it is next needed; the others go on.
//!
//! Each opening has a number. What was made on a device keeps the number, so that a report of its failure, or a model that
//! is still on its way, is not taken for one of a later opening.

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
/// How long a device that failed or could not be opened is left alone if there are others.
const ALONE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Station {
    /// Which device it is.
    choice: DeviceChoice,
    state: Mutex<State>,
    /// Held while it is opened anew.
    opening: Mutex<()>,
    pub engine: EngineThread,
    pub memory: Arc<Memory>,
    pub parents: Arc<ParentWeights>,
}

#[derive(Debug)]
struct State {
    /// None since it failed.
    device: Option<Device>,
    /// Of the last opening.
    number: u64,
    /// When it last failed, or could not be opened.
    out_since: Option<Instant>,
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
            state: Mutex::new(State {
                device: Some(device),
                number: 1,
                out_since: None,
            }),
            opening: Mutex::default(),
            engine: EngineThread::start(choice, faults)?,
            parents: Arc::new(ParentWeights::new(memory.clone(), on_cpu)),
            memory,
        })
    }

    pub fn choice(&self) -> DeviceChoice {
        self.choice
    }

    /// Whether what was made under an opening can still be used.
    pub fn is_open(&self, number: u64) -> bool {
        let state = self.state();
        state.number == number && state.device.is_some()
    }

    /// Whether it failed or could not be opened lately.
    pub fn is_out(&self) -> bool {
        self.state().out_since.is_some_and(|when| when.elapsed() < ALONE)
    }

    /// The device with the number of its opening; opened anew if it failed. Blocks. An error may pass.
    pub fn device(&self) -> Result<(Device, u64), String> {
        if let Some(there) = self.there() {
            return Ok(there);
        }
        let _turn = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = self.there() {
            return Ok(there);
        }
        // What families and models have there goes by itself. Nothing may be freed once the device is another.
        self.wait_below(1);
        let opened = match self.memory.used_bytes() {
            0 => device::reopen(self.choice),
            _ => Err("what was there has not gone yet".to_owned()),
        };
        let mut state = self.state();
        match opened {
            Ok(device) => {
                info!(device = %self.choice, "a device that failed is open again");
                state.number += 1;
                Ok((state.device.insert(device).clone(), state.number))
            }
            Err(detail) => {
                warn!(device = %self.choice, detail, "a device that failed cannot be opened");
                state.out_since = Some(Instant::now());
                Err(format!("{} failed and cannot be opened: {detail}", self.choice))
            }
        }
    }

    /// The device with the number of its opening, if it is open.
    pub fn there(&self) -> Option<(Device, u64)> {
        let state = self.state();
        Some((state.device.clone()?, state.number))
    }

    /// The device failed under an opening: nothing that lies there can be used any more. False if that is known, or long ago.
    pub fn fail(&self, number: u64) -> bool {
        let mut state = self.state();
        if state.number != number {
            return false;
        }
        let Some(device) = state.device.take() else {
            return false;
        };
        state.out_since = Some(Instant::now());
        drop(state);
        // The last copy would close libraries whose context is broken, which panics.
        Box::leak(Box::new(device));
        warn!(device = %self.choice, "a device failed; it is opened anew when it is next needed");
        metrics::counter!(telemetry::DEVICE_FAILURES, "device" => self.choice.to_string()).increment(1);
        self.parents.let_go();
        true
    }

    /// Waits until less than this is taken, or for a while.
    pub fn wait_below(&self, bytes: u64) {
        let deadline = Instant::now() + LEAVE;
        while self.memory.used_bytes() >= bytes && Instant::now() < deadline {
            self.memory.wait(LOOK);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
