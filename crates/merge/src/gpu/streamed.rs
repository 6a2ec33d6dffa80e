//! Merges that stream through a GPU: models larger than its memory, and results that go to a folder. While the GPU takes one window
//! over, merges it and gives it back, the CPU reads the next one and hashes it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cauldron_checkpoint::{Chunks, Dtype, narrow};
use cauldron_gpu::{Bytes, Draw, Gpu, Lane, Pass};
use rayon::prelude::*;

use super::placement::{Kept, OnGpu, Placed, Placement};
use super::{BitRun, Inputs, check, copy, number, pass};
use crate::layout::{OutTensor, Role};
use crate::output::{Consume, MergesWindows};
use crate::point::{ChunkStats, Point};
use crate::recipe::Recipe;
use crate::stream::{Chunk, Scratch, Stream, Work};
use crate::{MergeError, Observer, Parents};

/// A merge through a GPU that is lent for as long as there is something to compute.
#[derive(Debug)]
pub struct Streamed<'l> {
    lender: &'l dyn Lender,
    state: Arc<Mutex<State>>,
    has_merged: bool,
    is_whole: bool,
}

/// Lends a GPU to a merge, once.
pub trait Lender: std::fmt::Debug + Sync {
    /// None: all is merged on the CPU.
    fn lend(&self) -> Option<(Gpu, Box<dyn Lease>)>;

    /// What the GPU said when it failed; nothing of the merge is left there.
    fn failed(&self, detail: &str);
}

/// The memory of a GPU that a merge was lent; given back when it is dropped.
pub trait Lease: std::fmt::Debug + Send {
    /// Whether somebody needs it more: then the rest is merged on the CPU.
    fn is_wanted_back(&self) -> bool;
}

#[derive(Debug)]
enum State {
    /// Nothing was computed yet.
    Before,
    /// Nothing is on its way.
    Idle(Box<Open>),
    InUse,
    /// The rest is computed on the CPU.
    Over,
}

#[derive(Debug)]
struct Open {
    /// One is filled while the other one's work goes on.
    lanes: [Lane; 2],
    /// Goes after them.
    lease: Box<dyn Lease>,
}

/// A window whose results may still be on their way.
struct Begun {
    window: Vec<Chunk>,
    stats: Vec<ChunkStats>,
    bytes: Vec<u8>,
    /// None: they are there.
    on_gpu: Option<(usize, Placement)>,
}

/// What became of a window that a lane was filled with.
enum Filled {
    Stats(Vec<ChunkStats>),
    /// A parent has a value that is not finite: the CPU says which.
    Doubtful,
}

impl<'l> Streamed<'l> {
    pub fn new(lender: &'l dyn Lender) -> Self {
        Self {
            lender,
            state: Arc::new(Mutex::new(State::Before)),
            has_merged: false,
            is_whole: true,
        }
    }

    /// Whether the kernels compute what a recipe asks for.
    pub(crate) fn computes(recipe: &Recipe) -> bool {
        check(&recipe.method).is_ok()
    }

    /// What a merge takes of the GPU's memory, at most: `window` output elements (or one chunk) at a time, twice.
    pub fn bytes_needed(recipe: &Recipe, parents: &Parents, window: usize) -> u64 {
        let tensors = &parents.layout.tensors;
        let of = |tensor: &OutTensor| {
            let inputs = tensor.members.len() + usize::from(tensor.base.is_some());
            // f32 and a bit, where a value is wider than in its file.
            (inputs * 4 + tensor.members.len() / 8 + 1 + tensor.plan.item_bytes()) as u64
        };
        let element = tensors.iter().map(of).max().unwrap_or(0);
        let chunk = |tensor: &OutTensor| match recipe.is_by_row() && tensor.plan.shape.len() < 2 {
            true => tensor.plan.numel(),
            false => Chunks::of(&tensor.plan.shape).range(0).len(),
        };
        let largest = tensors.iter().map(chunk).max().unwrap_or(0);
        // Parts begin at multiples of a few bytes, and there are orders.
        2 * (largest.max(window) as u64 * element + (8 << 20))
    }

    /// Whether all that the kernels compute of a merge went through the GPU, and there was some.
    pub fn has_merged(&self) -> bool {
        self.has_merged && self.is_whole
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The GPU, if there is one.
    fn take_up(&mut self) -> Option<Open> {
        let state = std::mem::replace(&mut *self.state(), State::InUse);
        match state {
            State::Idle(open) => Some(*open),
            State::Before => {
                let (gpu, lease) = self.lender.lend()?;
                let lanes = gpu.lane().and_then(|one| Ok([one, gpu.lane()?]));
                match lanes {
                    Ok(lanes) => Some(Open { lanes, lease }),
                    Err(error) => {
                        drop(gpu);
                        drop(lease);
                        self.lender.failed(&error.to_string());
                        None
                    }
                }
            }
            State::InUse | State::Over => None,
        }
    }

    /// The GPU failed: what is there is let go of first.
    fn fail(&mut self, open: &mut Option<Open>, error: &candle_core::Error) {
        *open = None;
        self.is_whole = false;
        self.lender.failed(&error.to_string());
    }

    /// Fills a lane and starts it, or computes the window on the CPU.
    fn begin(
        &mut self,
        open: &mut Option<Open>,
        turn: usize,
        to: &To<'_>,
        [window, next]: [&[Chunk]; 2],
        mut bytes: Vec<u8>,
    ) -> Result<Begun, MergeError> {
        let To { point, stream, obs } = to;
        let begun = |stats, bytes, on_gpu| Begun {
            window: window.to_vec(),
            stats,
            bytes,
            on_gpu,
        };
        let factors = stream.factors(window)?;
        let work = stream.work(&factors);
        let placement = Placement::of(point, stream, &work, window);
        bytes.resize(window.iter().map(|chunk| stream.out_bytes(chunk)).sum(), 0);
        let lane = open.as_mut().filter(|_| placement.outs > 0);
        let Some(lane) = lane.map(|open| &mut open.lanes[turn]) else {
            let (stats, bytes) = to.on_cpu(window, next, bytes, *obs)?;
            return Ok(begun(stats, bytes, None));
        };
        let reserved = lane.reserve(placement.inputs, placement.outs);
        let filled = match reserved.and_then(|()| lane.host()) {
            Ok(host) => {
                let fill = || to.fill(&work, &placement, host, &mut bytes);
                let ((), filled) = rayon::join(|| stream.prefetch(next), fill);
                filled?
            }
            Err(error) => {
                self.fail(open, &error);
                let (stats, bytes) = to.on_cpu(window, next, bytes, *obs)?;
                return Ok(begun(stats, bytes, None));
            }
        };
        let Filled::Stats(stats) = filled else {
            let (stats, bytes) = to.on_cpu(window, &[], bytes, &Quiet(*obs))?;
            return Ok(begun(stats, bytes, None));
        };
        match to.start(lane, &placement) {
            Ok(()) => Ok(begun(stats, bytes, Some((turn, placement)))),
            Err(error) => {
                self.fail(open, &error);
                let (stats, bytes) = to.on_cpu(window, &[], bytes, &Quiet(*obs))?;
                Ok(begun(stats, bytes, None))
            }
        }
    }

    /// Waits for a window and hands it over.
    fn end(
        &mut self,
        open: &mut Option<Open>,
        to: &To<'_>,
        begun: Begun,
        consume: &mut Consume<'_>,
    ) -> Result<(), MergeError> {
        let Begun {
            window,
            mut stats,
            mut bytes,
            on_gpu,
        } = begun;
        let Some((turn, placement)) = on_gpu else {
            return consume(&window, stats, bytes);
        };
        // Without the GPU it is lost.
        let finished = open.as_mut().map(|open| open.lanes[turn].finish());
        let failure = match finished {
            Some(Ok(Some(outs))) => {
                let parts = to.parts_of(&placement, &mut bytes);
                parts.into_par_iter().for_each(|(placed, part)| {
                    if let Some(on_gpu) = &placed.on_gpu {
                        part.copy_from_slice(&outs[on_gpu.out.clone()]);
                    }
                });
                self.has_merged = true;
                return consume(&window, stats, bytes);
            }
            Some(Err(error)) => Some(error),
            // The CPU says which result is not finite.
            Some(Ok(None)) | None => None,
        };
        if let Some(error) = failure {
            self.fail(open, &error);
        }
        (stats, bytes) = to.on_cpu(&window, &[], bytes, &Quiet(to.obs))?;
        consume(&window, stats, bytes)
    }
}

impl MergesWindows for Streamed<'_> {
    fn waits_at_the_end(&self) -> bool {
        true
    }

    fn meanwhile(&self) -> Option<Arc<dyn Fn() + Send + Sync>> {
        let state = self.state.clone();
        Some(Arc::new(move || {
            if let Ok(mut state) = state.try_lock()
                && matches!(&*state, State::Idle(open) if open.lease.is_wanted_back())
            {
                *state = State::Over;
            }
        }))
    }

    fn write_each(
        &mut self,
        point: &Point<'_, '_>,
        which: &[usize],
        obs: &dyn Observer,
        spare: &mut dyn FnMut() -> Vec<u8>,
        consume: &mut Consume<'_>,
    ) -> Result<(), MergeError> {
        let mut open = self.take_up();
        self.is_whole &= open.is_some();
        point.stream(|stream| {
            let to = To { point, stream, obs };
            let (mut before, mut turn) = (None, 0);
            stream.windows(which, |window, next| {
                if open.as_ref().is_some_and(|open| open.lease.is_wanted_back()) {
                    if let Some(begun) = before.take() {
                        self.end(&mut open, &to, begun, consume)?;
                    }
                    open = None;
                    self.is_whole = false;
                }
                let begun = self.begin(&mut open, turn, &to, [window, next], spare());
                turn = 1 - turn;
                // The one before comes first, also if this one failed.
                if let Some(begun) = before.take() {
                    self.end(&mut open, &to, begun, consume)?;
                }
                before = Some(begun?);
                Ok(())
            })?;
            match before {
                Some(begun) => self.end(&mut open, &to, begun, consume),
                None => Ok(()),
            }
        })?;
        *self.state() = open.map_or(State::Over, |open| State::Idle(Box::new(open)));
        Ok(())
    }

    fn done(&mut self) {
        *self.state() = State::Over;
    }
}

/// What is merged, and who hears of it.
struct To<'a> {
    point: &'a Point<'a, 'a>,
    stream: &'a Stream<'a>,
    obs: &'a dyn Observer,
}

impl To<'_> {
    /// A window on the CPU.
    fn on_cpu(
        &self,
        window: &[Chunk],
        next: &[Chunk],
        bytes: Vec<u8>,
        obs: &dyn Observer,
    ) -> Result<(Vec<ChunkStats>, Vec<u8>), MergeError> {
        let merge = |work: &Work<'_>, scratch: &mut Scratch, chunk: Chunk, out: &mut [u8]| {
            self.point.merge(work, scratch, chunk, out)
        };
        self.stream.write_window(window, next, bytes, obs, &merge)
    }

    /// The window's chunks with their bytes of the output.
    fn parts_of<'p>(&self, placement: &'p Placement, bytes: &'p mut [u8]) -> Vec<(&'p Placed, &'p mut [u8])> {
        let mut rest = bytes;
        let parts = placement.chunks.iter().map(|placed| {
            let (part, later) = std::mem::take(&mut rest).split_at_mut(self.stream.out_bytes(&placed.chunk));
            rest = later;
            (placed, part)
        });
        parts.collect()
    }

    /// Reads a window: what goes to the GPU into `host`, what the CPU computes into its results.
    fn fill(
        &self,
        work: &Work<'_>,
        placement: &Placement,
        host: &mut [u8],
        bytes: &mut [u8],
    ) -> Result<Filled, MergeError> {
        let mut rest = host;
        let mut jobs = Vec::with_capacity(placement.chunks.len());
        for (placed, out) in self.parts_of(placement, bytes) {
            let (span, later) = std::mem::take(&mut rest).split_at_mut(placed.span.len());
            rest = later;
            jobs.push((placed, span, out));
        }
        let doubtful = AtomicBool::new(false);
        let run = |(placed, span, out): (&Placed, &mut [u8], &mut [u8])| {
            if self.obs.cancelled() {
                return Err(MergeError::Cancelled);
            }
            let chunk = placed.chunk;
            let role = self.point.family.tensors()[chunk.tensor].role;
            let stats = self.stream.scratches.with(Scratch::default, |scratch| {
                if role != Role::Copied {
                    work.load(scratch, chunk)?;
                }
                match &placed.on_gpu {
                    None => self.point.merge(work, scratch, chunk, out),
                    Some(on_gpu) => {
                        if !copy_inputs(work, scratch, placed, on_gpu, span) {
                            doubtful.store(true, Ordering::Relaxed);
                            return Ok(ChunkStats::default());
                        }
                        self.fill_tiles(work, scratch, placed, on_gpu, span)
                    }
                }
            })?;
            self.stream.advance(&chunk, self.obs);
            Ok(stats)
        };
        let stats: Vec<ChunkStats> = jobs.into_par_iter().map(run).collect::<Result<_, MergeError>>()?;
        Ok(match doubtful.into_inner() {
            true => Filled::Doubtful,
            false => Filled::Stats(stats),
        })
    }

    /// What is made tile by tile: values that an adapter changes, bits that were noted, statistics.
    fn fill_tiles(
        &self,
        work: &Work<'_>,
        scratch: &mut Scratch,
        placed: &Placed,
        on_gpu: &OnGpu,
        span: &mut [u8],
    ) -> Result<ChunkStats, MergeError> {
        let chunk = placed.chunk;
        let tensor = &self.point.family.tensors()[chunk.tensor];
        let masks = &self.point.family.prepared[chunk.tensor].masks;
        let mut bits: Vec<BitRun> = masks.iter().map(|_| BitRun::default()).collect();
        let changes = on_gpu.base_changed || on_gpu.changed.contains(&true);
        let together = if changes { 1 } else { UNSEEN_TOGETHER };
        let mut stats = ChunkStats::default();
        work.unread_tiles(scratch, chunk, together, |mut unread| {
            for (bits, mask) in bits.iter_mut().zip(masks) {
                let tile = unread.tile();
                if let Some(known) = mask.of(tile) {
                    bits.extend(known, tile.len);
                }
            }
            if !changes && !unread.tile().observed {
                return Ok(());
            }
            let tile = unread.fill()?;
            let from = 4 * (tile.start - chunk.start);
            let mut put = |range: &Range<usize>, values: &[f32]| {
                let at = range.start - placed.span.start + from;
                narrow(Dtype::F32, &values[..tile.len], &mut span[at..at + 4 * tile.len]);
            };
            for (k, _) in on_gpu.changed.iter().enumerate().filter(|(_, changed)| **changed) {
                let values = if self.stream.deltas {
                    &tile.deltas
                } else {
                    &tile.thetas
                };
                put(&on_gpu.inputs[k].0, &values[k]);
            }
            if let Some((range, _)) = on_gpu.inputs.last().filter(|_| on_gpu.base_changed) {
                put(range, &tile.theta0);
            }
            if tile.observed {
                self.point.compute(chunk.tensor, tensor, tile, &mut stats);
            }
            Ok(())
        })?;
        for (kept, bits) in on_gpu.kept.iter().zip(&bits) {
            if let Some(Kept::Noted(range)) = kept {
                let bytes = bits.bytes();
                span[range.start - placed.span.start..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        Ok(stats)
    }

    fn start(&self, lane: &mut Lane, placement: &Placement) -> candle_core::Result<()> {
        struct There<'p> {
            placed: &'p Placed,
            members: Vec<(Bytes, cauldron_gpu::Number)>,
            base: Option<(Bytes, cauldron_gpu::Number)>,
            kept: Vec<Option<Bytes>>,
            out: Bytes,
        }
        let refused = |error: MergeError| candle_core::Error::Msg(error.to_string());
        let mut all = Vec::new();
        for placed in &placement.chunks {
            let Some(on_gpu) = &placed.on_gpu else {
                continue;
            };
            let mut members = Vec::new();
            for (range, dtype) in &on_gpu.inputs {
                members.push((lane.input(range.clone())?, number(*dtype).map_err(refused)?));
            }
            let base = if on_gpu.has_base { members.pop() } else { None };
            let bits = on_gpu.kept.iter().map(|kept| match kept {
                None => Ok(None),
                Some(Kept::Noted(range) | Kept::Drawn { bits: range, .. }) => {
                    lane.input(range.clone()).map(Some)
                }
            });
            all.push(There {
                placed,
                members,
                base,
                kept: bits.collect::<candle_core::Result<_>>()?,
                out: lane.out(on_gpu.out.clone())?,
            });
        }
        let (mut draws, mut passes): (Vec<Draw<'_>>, Vec<(Pass<'_>, Bytes)>) = (Vec::new(), Vec::new());
        for there in &all {
            let Some(on_gpu) = &there.placed.on_gpu else {
                continue;
            };
            let chunk = there.placed.chunk;
            for (kept, bits) in on_gpu.kept.iter().zip(&there.kept) {
                if let (Some(Kept::Drawn { key, threshold, .. }), Some(bits)) = (kept, bits) {
                    draws.push(Draw {
                        bits,
                        first: chunk.start,
                        elements: chunk.len,
                        key: *key,
                        threshold: *threshold,
                    });
                }
            }
            let inputs = Inputs {
                first: chunk.start,
                elements: chunk.len,
                base: there.base.as_ref().map(|(bytes, number)| (bytes, *number)),
                members: &there.members,
                are_deltas: on_gpu
                    .changed
                    .iter()
                    .map(|changed| *changed && self.stream.deltas)
                    .collect(),
                are_thinned: false,
                kept: &there.kept,
            };
            let pass = pass(self.point.family, self.point, chunk.tensor, inputs).map_err(refused)?;
            passes.push((pass, there.out.clone()));
        }
        lane.start(placement.filled, &draws, &passes, placement.outs)
    }
}

/// Tiles that nobody has to look at come in runs of so many.
const UNSEEN_TOGETHER: usize = 64;

/// Copies what a chunk's inputs have as it lies. False if something of it is not finite.
fn copy_inputs(work: &Work<'_>, scratch: &Scratch, placed: &Placed, on_gpu: &OnGpu, span: &mut [u8]) -> bool {
    let mut finite = true;
    work.each_input(scratch, placed.chunk, |member, read| {
        let place = member.unwrap_or(on_gpu.inputs.len() - 1);
        let (range, there) = &on_gpu.inputs[place];
        let to = &mut span[range.start - placed.span.start..range.end - placed.span.start];
        finite &= copy(read, *there, to);
    });
    finite
}

/// Hears of no progress.
struct Quiet<'a>(&'a dyn Observer);

impl Observer for Quiet<'_> {
    fn advance(&self, _: u64) {}

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}
