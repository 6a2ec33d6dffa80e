//! In place of a GPU the CPU, which runs the kernels of the merge one thread after the other: for tests of what they compute.

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};

/// `kernels/emulated/cuda_fp16.h`.
mod kernels {
    type Passes = unsafe extern "C" fn(at: u64, tiles: u64, count: i32);

    unsafe extern "C" {
        pub fn emulated_place(block: u32, thread: u32, blocks: u32, threads: u32);
        pub fn keep_bits(bits: u64, length: u64, key0: u32, key1: u32, threshold: u32);
    }

    macro_rules! passes {
        ($($name:ident)*) => {
            unsafe extern "C" {
                $(fn $name(at: u64, tiles: u64, count: i32);)*
            }

            /// The kernel of that name.
            pub fn passes(name: &str) -> Option<Passes> {
                match name {
                    $(stringify!($name) => Some($name),)*
                    _ => None,
                }
            }
        };
    }
    passes! {
        weighted_sum_fast_2 weighted_sum_fast_3 deltas_fast_2 deltas_fast_3 deltas_fast_sparse_2 deltas_fast_sparse_3
        ties_fast_2 ties_fast_3 ties_fast_sparse_2 ties_fast_sparse_3 weighted_sum deltas ties sparse_sum
    }
}

/// What stands for a GPU.
#[derive(Debug, Clone)]
pub struct Gpu {
    pub(crate) device: Device,
}

impl Gpu {
    pub fn new(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self {
                device: device.clone(),
            }),
            _ => bail!("the kernels are compiled for the CPU"),
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        Tensor::zeros(shape, dtype, &self.device)
    }

    /// # Safety
    /// Both have as many bytes.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    /// # Safety
    /// `at` are passes whose pointers reach as far as the tiles say.
    pub(crate) unsafe fn launch_passes(
        &self,
        name: &str,
        blocks: usize,
        threads: usize,
        at: u64,
        tiles: u64,
        count: i32,
    ) -> Result<()> {
        let Some(kernel) = kernels::passes(name) else {
            bail!("there is no kernel {name}");
        };
        // SAFETY: the caller's.
        each_thread(blocks, threads, || unsafe { kernel(at, tiles, count) });
        Ok(())
    }

    /// # Safety
    /// There is room for a bit an element.
    pub(crate) unsafe fn launch_keep_bits(
        &self,
        blocks: usize,
        threads: usize,
        bits: u64,
        elements: u64,
        key: [u32; 2],
        threshold: u32,
    ) -> Result<()> {
        // SAFETY: the caller's.
        each_thread(blocks, threads, || unsafe {
            kernels::keep_bits(bits, elements, key[0], key[1], threshold);
        });
        Ok(())
    }
}

fn each_thread(blocks: usize, threads: usize, run: impl Fn()) {
    for block in 0..blocks {
        for thread in 0..threads {
            // SAFETY: it sets numbers of this thread.
            unsafe { kernels::emulated_place(block as u32, thread as u32, blocks as u32, threads as u32) };
            run();
        }
    }
}

/// Where a contiguous tensor lies.
pub(crate) fn pointer(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("a tensor is not on the CPU");
    };
    if !layout.is_contiguous() {
        bail!("a tensor is not contiguous");
    }
    let start = match storage {
        CpuStorage::U8(values) => values.as_ptr() as u64,
        CpuStorage::U32(values) => values.as_ptr() as u64,
        CpuStorage::BF16(values) => values.as_ptr() as u64,
        CpuStorage::F16(values) => values.as_ptr() as u64,
        CpuStorage::F32(values) => values.as_ptr() as u64,
        _ => bail!("tensors of {:?} are not used by kernels", tensor.dtype()),
    };
    Ok(start + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}
