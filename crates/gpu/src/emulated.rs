//! In place of a GPU the CPU, which runs the kernels of the merge one thread after the other: for tests of what they compute.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};

/// `kernels/emulated/cuda_fp16.h`.
mod kernels {
    type Passes = unsafe extern "C" fn(at: u64, tiles: u64, count: i32);

    unsafe extern "C" {
        pub fn emulated_place(block: u32, thread: u32, blocks: u32, threads: u32);
        pub fn draw_tokens(logits: u64, chances: u64, vocab: i32, tokens: u64);
        pub fn keep_bits(bits: u64, first: u64, length: u64, key0: u32, key1: u32, threshold: u32);
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
        weighted_sum_fast_2 deltas_fast_2 deltas_fast_sparse_2 ties_sum_fast_2
        ties_sum_fast_sparse_2 ties_mean_fast_2 ties_mean_fast_sparse_2 ties_mixup_fast_2
        ties_mixup_fast_sparse_2 weighted_sum_fast_3 deltas_fast_3 deltas_fast_sparse_3
        ties_sum_fast_3 ties_sum_fast_sparse_3 ties_mean_fast_3 ties_mean_fast_sparse_3
        ties_mixup_fast_3 ties_mixup_fast_sparse_3 weighted_sum deltas ties sparse_sum
    }
}

/// What stands for a GPU.
#[derive(Debug, Clone)]
pub struct Gpu {
    pub(crate) device: Device,
    /// That its lanes have begun, and may begin; after them all fail.
    copies: Arc<AtomicUsize>,
    most_copies: usize,
}

impl Gpu {
    pub fn new(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self {
                device: device.clone(),
                copies: Arc::default(),
                most_copies: usize::MAX,
            }),
            _ => bail!("the kernels are compiled for the CPU"),
        }
    }

    /// One that breaks when its lanes have begun so many copies.
    pub fn breaking_after(mut self, copies: usize) -> Self {
        self.most_copies = copies;
        self
    }

    /// Whether its lanes have begun any.
    pub fn has_copied(&self) -> bool {
        self.copies.load(Ordering::Relaxed) > 0
    }

    fn begin_copy(&self) -> Result<()> {
        match self.copies.fetch_add(1, Ordering::Relaxed) < self.most_copies {
            true => Ok(()),
            false => bail!("the device is broken"),
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

    pub(crate) fn fork(&self) -> Result<Self> {
        Ok(self.clone())
    }

    pub(crate) fn host_bytes(&self, len: usize) -> Result<HostBytes> {
        Ok(HostBytes(vec![0; len]))
    }

    pub(crate) fn device_bytes(&self, len: usize) -> Result<DeviceBytes> {
        let tensor = self.empty(len, DType::U8)?;
        let address = pointer(&tensor)?;
        Ok(DeviceBytes { tensor, address })
    }

    /// # Safety
    /// There is room for as many bytes.
    pub(crate) unsafe fn copy_to_device(&self, to: u64, from: &[u8]) -> Result<()> {
        self.begin_copy()?;
        // SAFETY: the caller's.
        unsafe { self.copy(to, from.as_ptr() as u64, from.len()) }
    }

    /// # Safety
    /// There are as many bytes.
    pub(crate) unsafe fn copy_to_host(&self, to: &mut [u8], from: u64) -> Result<()> {
        self.begin_copy()?;
        // SAFETY: the caller's.
        unsafe { self.copy(to.as_mut_ptr() as u64, from, to.len()) }
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
        each_block(rows, || unsafe {
            kernels::draw_tokens(logits, chances, vocab, tokens)
        });
        Ok(())
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
        each_thread(blocks, threads, || unsafe {
            kernels::keep_bits(bits, first, elements, key[0], key[1], threshold);
        });
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct HostBytes(Vec<u8>);

impl HostBytes {
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[derive(Debug)]
pub(crate) struct DeviceBytes {
    tensor: Tensor,
    address: u64,
}

impl DeviceBytes {
    pub fn len(&self) -> usize {
        self.tensor.elem_count()
    }

    pub fn address(&self) -> u64 {
        self.address
    }
}

/// Threads of a block whose threads wait for each other: a few will do.
const WAITING_THREADS: usize = 5;

thread_local! {
    static BLOCK: RefCell<Option<Arc<Barrier>>> = const { RefCell::new(None) };
}

/// `__syncthreads`.
#[unsafe(no_mangle)]
extern "C" fn emulated_wait() {
    let block = BLOCK.with_borrow(Clone::clone);
    if let Some(block) = block {
        block.wait();
    }
}

/// What blocks have in common is static, so that one runs at a time.
static ONE_BLOCK: Mutex<()> = Mutex::new(());

/// As [`each_thread`], with threads that run at the same time.
fn each_block(blocks: usize, run: impl Fn() + Sync) {
    let _one = ONE_BLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    for block in 0..blocks {
        let barrier = Arc::new(Barrier::new(WAITING_THREADS));
        std::thread::scope(|scope| {
            for thread in 0..WAITING_THREADS {
                let (barrier, run) = (barrier.clone(), &run);
                scope.spawn(move || {
                    BLOCK.set(Some(barrier));
                    let (threads, blocks) = (WAITING_THREADS as u32, blocks as u32);
                    // SAFETY: it sets numbers of this thread.
                    unsafe { kernels::emulated_place(block as u32, thread as u32, blocks, threads) };
                    run();
                });
            }
        });
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
