//! A device with its kernels loaded.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::result::{
    memcpy_dtod_async, memcpy_dtoh_async, memcpy_htod_async,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchArgs, LaunchConfig, PinnedHostSlice, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, DType, Device, Result, Shape, Storage, Tensor, bail};

const MERGE: (&[u8], &[&str]) = (
    include_bytes!(concat!(env!("OUT_DIR"), "/merge.fatbin")),
    &[
        "weighted_sum_fast_2",
        "deltas_fast_2",
        "deltas_fast_sparse_2",
        "ties_sum_fast_2",
        "ties_sum_fast_sparse_2",
        "ties_mean_fast_2",
        "ties_mean_fast_sparse_2",
        "ties_mixup_fast_2",
        "ties_mixup_fast_sparse_2",
        "weighted_sum_fast_3",
        "deltas_fast_3",
        "deltas_fast_sparse_3",
        "ties_sum_fast_3",
        "ties_sum_fast_sparse_3",
        "ties_mean_fast_3",
        "ties_mean_fast_sparse_3",
        "ties_mixup_fast_3",
        "ties_mixup_fast_sparse_3",
        "weighted_sum",
        "deltas",
        "ties",
        "sparse_sum",
        "keep_bits",
    ],
);
const DECODER: (&[u8], &[&str]) = (
    include_bytes!(concat!(env!("OUT_DIR"), "/decoder.fatbin")),
    &[
        "rms_norm_f32",
        "rms_norm_bf16",
        "gate_f32",
        "gate_bf16",
        "rotate_and_store_f32",
        "rotate_and_store_bf16",
        "attend_64_f32",
        "attend_64_bf16",
        "attend_128_f32",
        "attend_128_bf16",
        "attend_256_f32",
        "attend_256_bf16",
        "softcap",
        "summarize",
    ],
);

const DRAW: (&[u8], &[&str]) = (
    include_bytes!(concat!(env!("OUT_DIR"), "/draw.fatbin")),
    &["draw_tokens"],
);
/// Threads that draw from one row.
const DRAW_THREADS: usize = 512;

/// A GPU with its kernels. Copies share everything.
#[derive(Clone)]
pub struct Gpu {
    pub(crate) device: Device,
    pub(crate) cuda: CudaDevice,
    pub(crate) stream: Arc<CudaStream>,
    /// See [`Gpu::with_fixed_shapes`].
    pub(crate) fixed_shapes: bool,
    functions: Arc<HashMap<&'static str, CudaFunction>>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("device", &self.cuda)
            .finish_non_exhaustive()
    }
}

/// Whether the libraries that candle needs on a GPU can be loaded. (Opening a device without them is a panic.)
pub fn is_available() -> bool {
    use candle_core::cuda_backend::cudarc::{cublas, curand, driver};
    // SAFETY: these look for a shared library and close it again.
    unsafe {
        driver::sys::is_culib_present() && cublas::sys::is_culib_present() && curand::sys::is_culib_present()
    }
}

/// GPUs of this machine.
pub fn count() -> Result<usize> {
    use candle_core::cuda_backend::cudarc::driver::CudaContext;
    Ok(usize::try_from(CudaContext::device_count().w()?).unwrap_or(0))
}

/// Destroys what this process has on a GPU, after an error that all later calls would repeat. Tensors that are still there
/// can only be dropped. A device that is opened afterwards works again, unless the GPU itself is broken.
pub fn reset(index: usize) -> Result<()> {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    let Ok(index) = i32::try_from(index) else {
        bail!("no GPU has the number {index}");
    };
    let device = result::device::get(index).w()?;
    // SAFETY: the driver allows it while others hold the context: their calls fail, and they may release it.
    unsafe { sys::cuDevicePrimaryCtxReset_v2(device) }.result().w()
}

/// Bytes of a device's memory that nobody has.
pub fn free_bytes(device: &Device) -> Result<u64> {
    let Device::Cuda(cuda) = device else {
        bail!("not a CUDA device");
    };
    let (free, _) = cuda.cuda_stream().context().mem_get_info().w()?;
    Ok(free as u64)
}

impl Gpu {
    /// Loads the kernels onto an opened device. Tensors that are made before are used more slowly (their uses are tracked).
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(cuda) = device else {
            bail!("not a CUDA device");
        };
        let stream = cuda.cuda_stream();
        // SAFETY: everything on this device runs on its one stream, in order, so nothing has to be waited for.
        unsafe { cuda.disable_event_tracking() };
        let mut functions = HashMap::new();
        for (image, names) in [MERGE, DECODER, DRAW] {
            let module = stream
                .context()
                .load_module(Ptx::from_binary(image.to_vec()))
                .w()?;
            for name in names {
                functions.insert(*name, module.load_function(name).w()?);
            }
        }
        Ok(Self {
            device: device.clone(),
            cuda: cuda.clone(),
            stream,
            fixed_shapes: false,
            functions: Arc::new(functions),
        })
    }

    /// The library of products takes other kernels for other numbers of rows, which changes last bits. With fixed shapes all
    /// products have the same number, so that a row does not depend on its company; few rows cost as much as many.
    pub fn with_fixed_shapes(mut self, fixed: bool) -> Self {
        self.fixed_shapes = fixed;
        self
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Waits until all that was asked for is done.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().w()
    }

    /// A tensor whose numbers are whatever was there.
    pub(crate) fn empty(&self, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
        // SAFETY: plain numbers, of which every bit pattern is one. Callers fill them.
        unsafe { Tensor::empty(shape, dtype, &self.device) }
    }

    /// Runs a kernel; `arguments` gives it what its signature says.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and their pointers reach as far as it goes.
    pub(crate) unsafe fn launch<'a>(
        &'a self,
        name: &str,
        grid: (usize, usize),
        threads: usize,
        arguments: impl FnOnce(&mut LaunchArgs<'a>),
    ) -> Result<()> {
        let (Ok(x), Ok(y)) = (u32::try_from(grid.0), u16::try_from(grid.1)) else {
            bail!("{name}: too large a grid {grid:?}");
        };
        if x == 0 || y == 0 {
            return Ok(());
        }
        let Some(function) = self.functions.get(name) else {
            bail!("there is no kernel {name}");
        };
        let mut builder = self.stream.launch_builder(function);
        arguments(&mut builder);
        let config = LaunchConfig {
            grid_dim: (x, u32::from(y), 1),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the caller's.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

impl Gpu {
    /// # Safety
    /// Both have as many bytes.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's; everything runs on one stream.
        unsafe { memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }.w()
    }

    /// The same kernels on a stream of its own. Only what is said of a [`Lane`](crate::Lane) may run there: candle's tensors belong
    /// to the device's stream.
    pub(crate) fn fork(&self) -> Result<Self> {
        Ok(Self {
            stream: self.stream.context().new_stream().w()?,
            ..self.clone()
        })
    }

    /// Memory that the device reads and writes by itself.
    pub(crate) fn host_bytes(&self, len: usize) -> Result<HostBytes> {
        // The processor reads it too, so it is not write-combined.
        // SAFETY: it is filled below.
        let mut pinned = unsafe { self.stream.context().alloc_pinned_with_flags::<u8>(len, 0) }.w()?;
        let at = pinned.as_mut_ptr().w()?;
        // SAFETY: there are as many bytes.
        unsafe { at.write_bytes(0, len) };
        Ok(HostBytes { pinned, at })
    }

    pub(crate) fn device_bytes(&self, len: usize) -> Result<DeviceBytes> {
        let slice = self.stream.alloc_zeros::<u8>(len).w()?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(DeviceBytes { slice, address })
    }

    /// # Safety
    /// There is room for as many bytes, and nobody writes `from` before the stream has done it.
    pub(crate) unsafe fn copy_to_device(&self, to: u64, from: &[u8]) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the caller's.
        unsafe { memcpy_htod_async(to, from, self.stream.cu_stream()) }.w()
    }

    /// # Safety
    /// There are as many bytes, and nobody uses `to` before the stream has done it.
    pub(crate) unsafe fn copy_to_host(&self, to: &mut [u8], from: u64) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the caller's.
        unsafe { memcpy_dtoh_async(to, from, self.stream.cu_stream()) }.w()
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
        // SAFETY: the caller's.
        unsafe {
            self.launch(name, (blocks, 1), threads, |launch| {
                launch.arg(&at).arg(&tiles).arg(&count);
            })
        }
    }

    /// # Safety
    /// There is a row of logits, a chance, and room for a token, for each of the rows.
    pub(crate) unsafe fn launch_draw(
        &self,
        rows: usize,
        logits: u64,
        chances: u64,
        vocab: i32,
        tokens: u64,
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe {
            self.launch("draw_tokens", (rows, 1), DRAW_THREADS, |launch| {
                launch.arg(&logits).arg(&chances).arg(&vocab).arg(&tokens);
            })
        }
    }

    /// # Safety
    /// There is room for a bit an element.
    pub(crate) unsafe fn launch_keep_bits(
        &self,
        blocks: usize,
        threads: usize,
        bits: u64,
        [first, elements]: [u64; 2],
        key: [u32; 2],
        threshold: u32,
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe {
            self.launch("keep_bits", (blocks, 1), threads, |launch| {
                launch
                    .arg(&bits)
                    .arg(&first)
                    .arg(&elements)
                    .arg(&key[0])
                    .arg(&key[1])
                    .arg(&threshold);
            })
        }
    }
}

/// Page-locked memory of the host.
#[derive(Debug)]
pub(crate) struct HostBytes {
    pinned: PinnedHostSlice<u8>,
    at: *mut u8,
}

// SAFETY: it is memory that belongs to nobody else.
unsafe impl Send for HostBytes {}
// SAFETY: as above.
unsafe impl Sync for HostBytes {}

impl HostBytes {
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory lives as long as this, and a lane looks at it when the stream is done.
        unsafe { std::slice::from_raw_parts(self.at, self.pinned.len()) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.pinned.len()) }
    }
}

#[derive(Debug)]
pub(crate) struct DeviceBytes {
    slice: CudaSlice<u8>,
    address: u64,
}

impl DeviceBytes {
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    pub fn address(&self) -> u64 {
        self.address
    }
}

/// Where a contiguous tensor lies on its device.
pub(crate) fn pointer(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a tensor is not on the GPU");
    };
    if !layout.is_contiguous() {
        bail!("a tensor is not contiguous");
    }
    let stream = storage.device.cuda_stream();
    let start = match &storage.slice {
        CudaStorageSlice::U8(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::U32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F32(slice) => slice.device_ptr(&stream).0,
        CudaStorageSlice::F64(slice) => slice.device_ptr(&stream).0,
        _ => bail!("tensors of {:?} are not used on the GPU", tensor.dtype()),
    };
    Ok(start + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}
