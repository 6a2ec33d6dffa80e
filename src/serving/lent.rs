//! GPUs that models are served on, lent to merges to disk: under the same memory budget, and given back where a model needs it.

use std::sync::Arc;

use super::Serving;

/// Merges on the GPU with the most room, of those that are open; on the CPU where there is none.
#[derive(Debug)]
pub struct OnServingGpus(pub Arc<Serving>);

#[cfg(not(feature = "cuda"))]
impl crate::jobs::Merges for OnServingGpus {}

#[cfg(feature = "cuda")]
mod cuda {
    use std::path::Path;
    use std::sync::OnceLock;

    use candle_core::Device;
    use cauldron_gpu::Gpu;
    use cauldron_lm::LmError;
    use cauldron_merge::{
        Lease, Lender, Manifest, MergeError, MergeOptions, Observer, Parents, Recipe, Streamed,
        merge_to_folder_on_gpu,
    };
    use tracing::{info, warn};

    use super::super::engine::Command;
    use super::super::parents::GpuRoom;
    use super::super::station::Station;
    use super::*;
    use crate::jobs::Merges;
    use crate::telemetry;

    impl Merges for OnServingGpus {
        fn to_folder(
            &self,
            recipe: &Recipe,
            parents: &Parents,
            out: &Path,
            options: &MergeOptions,
            obs: &dyn Observer,
        ) -> Result<Manifest, MergeError> {
            let from = FromStation {
                serving: &self.0,
                bytes: Streamed::bytes_needed(recipe, parents, options.window_elements),
                lent: OnceLock::new(),
            };
            let mut streamed = Streamed::new(&from);
            let merged = merge_to_folder_on_gpu(&mut streamed, recipe, parents, out, options, obs);
            if let (true, true, Some((station, _))) = (merged.is_ok(), streamed.has_merged(), from.lent.get())
            {
                let device = station.choice().to_string();
                metrics::counter!(telemetry::GPU_MERGES, "device" => device).increment(1);
            }
            merged
        }
    }

    /// Lends the GPU with the most room.
    #[derive(Debug)]
    struct FromStation<'s> {
        serving: &'s Serving,
        bytes: u64,
        /// Which it was, and the number of its opening.
        lent: OnceLock<(Arc<Station>, u64)>,
    }

    impl Lender for FromStation<'_> {
        fn lend(&self) -> Option<(Gpu, Box<dyn Lease>)> {
            let station = self.serving.roomiest();
            let (device, opening) = station.there()?;
            if matches!(device, Device::Cpu) {
                return None;
            }
            let Some(room) = station.parents.room_for_merge(self.bytes) else {
                info!(device = %station.choice(), "a merge finds no ample room on the GPU: it is made on the CPU");
                return None;
            };
            // From here on the room keeps the device from being opened anew.
            if !station.is_open(opening) {
                return None;
            }
            let _ = self.lent.set((station.clone(), opening));
            match Gpu::new(&device) {
                Ok(gpu) => Some((gpu, Box::new(room))),
                Err(error) => {
                    drop(room);
                    self.failed(&error.to_string());
                    None
                }
            }
        }

        fn failed(&self, detail: &str) {
            let Some((station, opening)) = self.lent.get() else {
                return;
            };
            warn!(device = %station.choice(), detail, "a merge goes on without its GPU");
            if let LmError::DeviceLost { .. } = LmError::of_device(detail) {
                self.serving.lose(station, *opening);
                station.engine.send(Command::DeviceFailed { opening: *opening });
            }
        }
    }

    impl Lease for GpuRoom {
        fn is_wanted_back(&self) -> bool {
            GpuRoom::is_wanted_back(self)
        }
    }
}
