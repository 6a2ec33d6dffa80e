//! Families whose parents lie on the GPU that models are computed on: a point is made there by one pass, and its matrices never
//! leave it.

use candle_core::Device;
use cauldron_lm::WeightSource;
use cauldron_merge::{Family, MergeError, Observer, Parents, Point};

use super::parents::ParentWeights;

/// Makes points where the parents lie.
pub(super) trait OnGpu {
    /// What the parents, their masks and a point take of the GPU's memory.
    fn bytes(&self) -> u64;
    /// Whether a model needs that memory.
    fn is_wanted_back(&self) -> bool;
    /// The weights of a point, until the next is made.
    fn compute(&mut self, point: &Point<'_, '_>) -> Result<Box<dyn WeightSource + '_>, MergeError>;
}

/// None where the device is no GPU, has no room, or its kernels do not compute this recipe: then points are made on the CPU.
#[cfg(not(feature = "cuda"))]
pub(super) fn open<'f>(
    _: &'f Family<'_>,
    _: &'f Parents,
    _: &Device,
    _: &ParentWeights,
    _: &dyn Fn() -> bool,
    _: &dyn Observer,
) -> Option<Box<dyn OnGpu + 'f>> {
    None
}

#[cfg(feature = "cuda")]
pub(super) use cuda::open;

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::Tensor;
    use cauldron_gpu::Gpu;
    use cauldron_lm::LmError;
    use cauldron_merge::{Resident, Written};
    use tracing::info;

    use super::super::parents::GpuRoom;
    use super::super::point::Shapes;
    use super::*;

    struct Loaded<'f, 'a> {
        parents: &'f Parents,
        resident: Resident<'f, 'a>,
        written: Written,
        room: GpuRoom,
        bytes: u64,
    }

    pub(in super::super) fn open<'f>(
        family: &'f Family<'_>,
        parents: &'f Parents,
        device: &Device,
        weights: &ParentWeights,
        is_open: &dyn Fn() -> bool,
        obs: &dyn Observer,
    ) -> Option<Box<dyn OnGpu + 'f>> {
        if matches!(device, Device::Cpu) {
            return None;
        }
        let bytes = Resident::bytes_needed(family) + parents.output_bytes();
        let Some(room) = weights.room_on_gpu(bytes) else {
            info!("a family's parents find no ample room on the GPU: its points are made on the CPU");
            return None;
        };
        // From here on the room keeps the device from being opened anew.
        if !is_open() {
            return None;
        }
        let load = || {
            let until = WhileRoom { obs, room: &room };
            let resident = Resident::load(family, Gpu::new(device).map_err(failed)?, &until)?;
            let written = resident.room()?;
            Ok((resident, written))
        };
        match load() {
            Ok((resident, written)) => Some(Box::new(Loaded {
                parents,
                resident,
                written,
                room,
                bytes,
            })),
            Err(error) => {
                let error: MergeError = error;
                info!(%error, "a family's points are made on the CPU");
                None
            }
        }
    }

    /// Ends the reading where a model needs the room.
    struct WhileRoom<'a> {
        obs: &'a dyn Observer,
        room: &'a GpuRoom,
    }

    impl Observer for WhileRoom<'_> {
        fn advance(&self, bytes: u64) {
            self.obs.advance(bytes);
        }

        fn cancelled(&self) -> bool {
            self.obs.cancelled() || self.room.is_wanted_back()
        }
    }

    fn failed(error: candle_core::Error) -> MergeError {
        MergeError::Gpu {
            detail: error.to_string(),
        }
    }

    impl OnGpu for Loaded<'_, '_> {
        fn bytes(&self) -> u64 {
            self.bytes
        }

        fn is_wanted_back(&self) -> bool {
            self.room.is_wanted_back()
        }

        fn compute(&mut self, point: &Point<'_, '_>) -> Result<Box<dyn WeightSource + '_>, MergeError> {
            self.resident.write(point, &mut self.written)?;
            self.resident.finish(&self.written)?;
            Ok(Box::new(Made {
                tensors: Shapes::of(self.parents),
                resident: &self.resident,
                written: &self.written,
            }))
        }
    }

    /// A point that was written.
    struct Made<'p, 'f, 'a> {
        tensors: Shapes<'p>,
        resident: &'p Resident<'f, 'a>,
        written: &'p Written,
    }

    impl WeightSource for Made<'_, '_, '_> {
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            self.tensors.shape(name)
        }

        fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
            let place = self.tensors.place(name)?;
            let bytes = self
                .resident
                .tensor(self.written, place.index)
                .map_err(|e| lm_error(name, &e))?;
            Ok(place.widen(&bytes))
        }

        fn on_gpu(&self, name: &str) -> Result<Option<Tensor>, LmError> {
            let place = self.tensors.place(name)?;
            let tensor = self.resident.on_device(self.written, place.index);
            tensor.map(Some).map_err(|e| lm_error(name, &e))
        }
    }

    fn lm_error(name: &str, error: &MergeError) -> LmError {
        LmError::Tensor {
            tensor: name.to_owned(),
            detail: error.to_string(),
        }
    }
}
