//! The devices that models are served on, each opened once and shared: each opening would be a device of its own to candle.

use candle_core::Device;
use tracing::warn;

use crate::config::DeviceChoice;

/// An opened device, and which one it is: the CPU or a GPU by number.
pub type Opened = (DeviceChoice, Device);

/// Opens what `--device` names. `auto` takes the first GPU that this build and machine have, else the CPU; a GPU that is
/// asked for by name and is not there is an error, not a silent fallback.
pub fn open(choice: DeviceChoice) -> anyhow::Result<Vec<Opened>> {
    let refused = |e: String| anyhow::anyhow!("--device {choice}: {e}");
    let gpu = |index: usize| Ok((DeviceChoice::Cuda(index), cuda(index)?));
    let on_cpu = (DeviceChoice::Cpu, Device::Cpu);
    match choice {
        DeviceChoice::Cpu => Ok(vec![on_cpu]),
        DeviceChoice::Auto => Ok(vec![gpu(0).unwrap_or_else(|reason: String| {
            if cfg!(feature = "cuda") {
                warn!(reason, "no GPU: models are computed on the CPU");
            }
            on_cpu
        })]),
        DeviceChoice::Cuda(index) => Ok(vec![gpu(index).map_err(refused)?]),
        DeviceChoice::AllCuda => {
            let count = count().map_err(refused)?;
            (0..count).map(|index| gpu(index).map_err(refused)).collect()
        }
    }
}

/// Opens a device anew that failed. What was made on it before is gone.
pub(super) fn reopen(choice: DeviceChoice) -> Result<Device, String> {
    match choice {
        DeviceChoice::Cuda(index) => {
            reset(index)?;
            cuda(index)
        }
        _ => Ok(Device::Cpu),
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

#[cfg(feature = "cuda")]
use with_cuda::{count, cuda, reset};

#[cfg(feature = "cuda")]
mod with_cuda {
    use candle_core::Device;

    /// With a stream of its own, so that the thread that loads a model and the engine thread may share it.
    pub fn cuda(index: usize) -> Result<Device, String> {
        check()?;
        Device::new_cuda_with_stream(index).map_err(|e| e.to_string())
    }

    /// GPUs of this machine.
    pub fn count() -> Result<usize, String> {
        check()?;
        match cauldron_gpu::count().map_err(|e| e.to_string())? {
            0 => Err("there is no GPU".to_owned()),
            count => Ok(count),
        }
    }

    pub fn reset(index: usize) -> Result<(), String> {
        cauldron_gpu::reset(index).map_err(|e| e.to_string())
    }

    fn check() -> Result<(), String> {
        match cauldron_gpu::is_available() {
            true => Ok(()),
            false => Err("the CUDA libraries (libcuda, libcublas, libcurand) cannot be loaded".to_owned()),
        }
    }
}

#[cfg(not(feature = "cuda"))]
use without_cuda::{count, cuda, reset};

#[cfg(not(feature = "cuda"))]
mod without_cuda {
    use candle_core::Device;

    use crate::failpoint::pretended_gpus;

    const NONE: &str = "this build has no CUDA support (feature `cuda`)";

    pub fn cuda(index: usize) -> Result<Device, String> {
        match index < pretended_gpus() {
            true => Ok(Device::Cpu),
            false => Err(NONE.to_owned()),
        }
    }

    pub fn count() -> Result<usize, String> {
        match pretended_gpus() {
            0 => Err(NONE.to_owned()),
            count => Ok(count),
        }
    }

    pub fn reset(_: usize) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_that_names_the_flag() {
        let cpu = open(DeviceChoice::Cpu).expect("the CPU");
        assert!(matches!(cpu.as_slice(), [(DeviceChoice::Cpu, Device::Cpu)]));
        let refused = open(DeviceChoice::Cuda(99)).unwrap_err().to_string();
        assert!(refused.starts_with("--device cuda:99"), "{refused}");
        if !cfg!(feature = "cuda") {
            let refused = open("cuda:all".parse().expect("a device"))
                .unwrap_err()
                .to_string();
            assert!(refused.starts_with("--device cuda:all"), "{refused}");
        }
    }
}
