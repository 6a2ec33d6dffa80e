//! GPUs that models are served on, lent to merges to disk: under the same memory budget, and given back where a model needs it.

use std::path::Path;
use std::sync::Arc;

use cauldron_merge::{Manifest, MergeError, MergeOptions, Observer, Parents, Recipe, merge_to_folder};

use super::Serving;
use crate::jobs::Merges;

/// Merges on the GPU with the most room, of those that are open; on the CPU where there is none.
#[derive(Debug)]
pub struct OnServingGpus(pub Arc<Serving>);

impl Merges for OnServingGpus {
    fn to_folder(
        &self,
        recipe: &Recipe,
        parents: &Parents,
        out: &Path,
        options: &MergeOptions,
        obs: &dyn Observer,
    ) -> Result<Manifest, MergeError> {
        #[cfg(feature = "cuda")]
        if let Some(merged) = cuda::merge(&self.0, recipe, parents, out, options, obs) {
            return merged;
        }
        merge_to_folder(recipe, parents, out, options, obs)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::Device;
    use cauldron_gpu::Gpu;
    use cauldron_lm::LmError;
    use cauldron_merge::{Lease, Streamed, merge_to_folder_on_gpu};
    use tracing::{info, warn};

    use super::super::parents::GpuRoom;
    use super::super::station::Station;
    use super::*;
    use crate::telemetry;

    /// None if no GPU is lent.
    pub fn merge(
        serving: &Serving,
        recipe: &Recipe,
        parents: &Parents,
        out: &Path,
        options: &MergeOptions,
        obs: &dyn Observer,
    ) -> Option<Result<Manifest, MergeError>> {
        if !Streamed::computes(recipe) {
            return None;
        }
        let station = serving.roomiest();
        let (device, opening) = station.there()?;
        let mut streamed = borrow(station, &device, opening, parents, options)?;
        let merged = merge_to_folder_on_gpu(&mut streamed, recipe, parents, out, options, obs);
        let (failure, has_merged) = (streamed.failure().map(ToOwned::to_owned), streamed.has_merged());
        // Its room keeps a device from being opened anew.
        drop(streamed);
        if let Some(detail) = failure {
            warn!(device = %station.choice(), detail, "a merge went on without its GPU");
            if let LmError::DeviceLost { .. } = LmError::of_device(&detail) {
                serving.lose(station, opening);
            }
        } else if merged.is_ok() && has_merged {
            metrics::counter!(telemetry::GPU_MERGES, "device" => station.choice().to_string()).increment(1);
        }
        Some(merged)
    }

    fn borrow(
        station: &Arc<Station>,
        device: &Device,
        opening: u64,
        parents: &Parents,
        options: &MergeOptions,
    ) -> Option<Streamed> {
        if matches!(device, Device::Cpu) {
            return None;
        }
        let bytes = Streamed::bytes_needed(parents, options.window_elements);
        let Some(room) = station.parents.room_on_gpu(bytes) else {
            info!(device = %station.choice(), "a merge finds no ample room on the GPU: it is made on the CPU");
            return None;
        };
        // From here on the room keeps the device from being opened anew.
        if !station.is_open(opening) {
            return None;
        }
        let opened = Gpu::new(device).map_err(|e| e.to_string());
        let opened = opened.and_then(|gpu| Streamed::new(&gpu, Box::new(room)).map_err(|e| e.to_string()));
        opened
            .inspect_err(|detail| warn!(device = %station.choice(), detail, "a merge is made on the CPU"))
            .ok()
    }

    impl Lease for GpuRoom {
        fn is_wanted_back(&self) -> bool {
            GpuRoom::is_wanted_back(self)
        }
    }
}
