//! The device that models are served on, opened once and shared: each opening would be a device of its own to candle.

use candle_core::Device;
use tracing::warn;

use crate::config::DeviceChoice;

/// Opens what `--device` names. `auto` takes the first GPU that this build and machine have, else the CPU; a GPU that is
/// asked for by name and is not there is an error, not a silent fallback.
pub fn open(choice: DeviceChoice) -> anyhow::Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(cuda(0).unwrap_or_else(|reason| {
            if cfg!(feature = "cuda") {
                warn!(reason, "no GPU: models are computed on the CPU");
            }
            Device::Cpu
        })),
        DeviceChoice::Cuda(index) => cuda(index).map_err(|e| anyhow::anyhow!("--device {choice}: {e}")),
    }
}

/// Bytes that models may still take where they are computed; None where that is not known.
pub(super) fn free_bytes(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => super::memory::free_bytes(),
        #[cfg(feature = "cuda")]
        device => cauldron_gpu::free_bytes(device).ok(),
        #[cfg(not(feature = "cuda"))]
        _ => None,
    }
}

/// With a stream of its own, so that the thread that loads a model and the engine thread may share it.
#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<Device, String> {
    if !cauldron_gpu::is_available() {
        return Err("the CUDA libraries (libcuda, libcublas, libcurand) cannot be loaded".to_owned());
    }
    Device::new_cuda_with_stream(index).map_err(|e| e.to_string())
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device, String> {
    Err("this build has no CUDA support (feature `cuda`)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_that_names_the_flag() {
        assert!(matches!(open(DeviceChoice::Cpu), Ok(Device::Cpu)));
        let refused = open(DeviceChoice::Cuda(99)).unwrap_err().to_string();
        assert!(refused.starts_with("--device cuda:99"), "{refused}");
    }
}
