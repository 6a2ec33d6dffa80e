//! The way through a GPU for what does not stay there: filled on the host, taken over, merged, brought back. What one lane does
//! goes on while another is filled, and beside all else that the GPU computes.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, bail};

use crate::device::{DeviceBytes, Gpu, HostBytes};
use crate::merge::{ALIGNMENT, Bytes, Draw, Pass, Plain, as_bytes, groups};

/// Memory on both sides, of the same size.
#[derive(Debug)]
struct Room {
    host: HostBytes,
    device: Arc<DeviceBytes>,
}

/// One way. It is used in turns: fill [`Lane::host`], [`Lane::start`], [`Lane::finish`].
#[derive(Debug)]
pub struct Lane {
    /// With a stream of its own.
    gpu: Gpu,
    inputs: Room,
    outs: Room,
    /// Passes and tiles, and first the flag.
    orders: Room,
    /// Bytes that come back; None while nothing is on its way.
    started: Option<usize>,
}

impl Gpu {
    pub fn lane(&self) -> Result<Lane> {
        let gpu = self.fork()?;
        Ok(Lane {
            inputs: Room::new(&gpu, 0)?,
            outs: Room::new(&gpu, 0)?,
            orders: Room::new(&gpu, 0)?,
            gpu,
            started: None,
        })
    }
}

impl Room {
    fn new(gpu: &Gpu, len: usize) -> Result<Self> {
        let len = len.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        Ok(Self {
            host: gpu.host_bytes(len)?,
            device: Arc::new(gpu.device_bytes(len)?),
        })
    }

    /// Makes it no smaller than this; what was in it is lost where it grows.
    fn grow(&mut self, gpu: &Gpu, len: usize) -> Result<()> {
        if self.device.len() < len {
            // What it has goes first.
            *self = Self::new(gpu, 0)?;
            *self = Self::new(gpu, len)?;
        }
        Ok(())
    }

    fn send(&self, gpu: &Gpu, len: usize) -> Result<()> {
        let from = &self.host.as_slice()[..len];
        // SAFETY: both have as many bytes, and neither is used before the lane has finished.
        unsafe { gpu.copy_to_device(self.device.address(), from) }
    }

    fn fetch(&mut self, gpu: &Gpu, len: usize) -> Result<()> {
        let to = &mut self.host.as_mut_slice()[..len];
        // SAFETY: as above.
        unsafe { gpu.copy_to_host(to, self.device.address()) }
    }
}

impl Lane {
    /// Room for so many bytes on the way there, of which the host fills the first, and back. What was in it is lost.
    pub fn reserve(&mut self, inputs: usize, outs: usize) -> Result<()> {
        self.idle()?;
        self.inputs.grow(&self.gpu, inputs)?;
        self.outs.grow(&self.gpu, outs)
    }

    /// What the host fills.
    pub fn host(&mut self) -> Result<&mut [u8]> {
        self.idle()?;
        Ok(self.inputs.host.as_mut_slice())
    }

    /// A part of it as it will lie on the GPU.
    pub fn input(&self, range: Range<usize>) -> Result<Bytes> {
        Bytes::part(&self.inputs.device, range)
    }

    /// A part of what comes back.
    pub fn out(&self, range: Range<usize>) -> Result<Bytes> {
        Bytes::part(&self.outs.device, range)
    }

    /// Takes the first `filled` bytes over, draws, merges, and brings the first `back` bytes back: all of it goes on by itself.
    /// What is drawn and where results go are parts of this lane.
    pub fn start(
        &mut self,
        filled: usize,
        draws: &[Draw<'_>],
        passes: &[(Pass<'_>, Bytes)],
        back: usize,
    ) -> Result<()> {
        self.idle()?;
        if filled > self.inputs.device.len() || back > self.outs.device.len() {
            bail!("{filled} bytes there and {back} back are more than there is room for");
        }
        let (passes, outs): (Vec<&Pass<'_>>, Vec<&Bytes>) =
            passes.iter().map(|(pass, out)| (pass, out)).unzip();
        let groups = groups(&passes)?;
        let tiles = groups
            .iter()
            .map(|(_, tiles)| part_of(tiles.len() * size_of::<u32>()));
        let raw_bytes = part_of(passes.len() * Pass::RAW_BYTES);
        let len = ALIGNMENT + raw_bytes + tiles.sum::<usize>();
        self.orders.grow(&self.gpu, len)?;
        let at = self.orders.device.address();
        let mut raw = Vec::with_capacity(passes.len());
        for (pass, out) in passes.iter().zip(outs) {
            raw.push(pass.raw(out, at)?);
        }
        let orders = self.orders.host.as_mut_slice();
        orders[..ALIGNMENT].fill(0);
        let mut end = ALIGNMENT;
        put(orders, &mut end, &raw);
        let mut launches = Vec::with_capacity(groups.len());
        for (kernel, tiles) in &groups {
            launches.push((kernel, at + end as u64, (tiles.len() / 2) as i32));
            put(orders, &mut end, tiles);
        }
        // From here on the memory is in use, whatever comes.
        self.started = Some(back);
        self.orders.send(&self.gpu, end)?;
        self.inputs.send(&self.gpu, filled)?;
        for draw in draws {
            self.gpu.draw(draw)?;
        }
        for (kernel, tiles, count) in launches {
            // SAFETY: every run of elements was found to hold them, and the tiles are those of the passes.
            unsafe {
                self.gpu
                    .launch_tiles(kernel, at + ALIGNMENT as u64, tiles, count)?
            };
        }
        self.outs.fetch(&self.gpu, back)?;
        self.orders.fetch(&self.gpu, ALIGNMENT)
    }

    /// Waits for what was started, and gives what came back; None if a result is not finite.
    pub fn finish(&mut self) -> Result<Option<&[u8]>> {
        let Some(back) = self.started else {
            bail!("nothing was started");
        };
        self.gpu.synchronize()?;
        self.started = None;
        let is_finite = self.orders.host.as_slice()[..ALIGNMENT]
            .iter()
            .all(|byte| *byte == 0);
        Ok(is_finite.then(|| &self.outs.host.as_slice()[..back]))
    }

    fn idle(&self) -> Result<()> {
        match self.started {
            None => Ok(()),
            Some(_) => bail!("the lane is in use"),
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.started.is_some() {
            // The memory goes only when nothing uses it any more; a device that failed uses none.
            let _ = self.gpu.synchronize();
        }
    }
}

/// Where the next part may begin after so many bytes.
fn part_of(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

fn put<T: Plain>(orders: &mut [u8], end: &mut usize, values: &[T]) {
    let bytes = as_bytes(values);
    orders[*end..*end + bytes.len()].copy_from_slice(bytes);
    *end += part_of(bytes.len());
}
