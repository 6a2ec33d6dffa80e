//! The tensors of a merge: for each the operation, its parents' bytes, and the bytes that come of them (`kernels/merge.cu`).

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};

use crate::device::{DeviceBytes, Gpu, pointer};

/// Parents that the kernels take.
pub const MOST_MEMBERS: usize = 8;
/// Bytes at whose multiples the elements of a tensor may begin.
pub const ALIGNMENT: usize = 16;
const THREADS: usize = 256;
/// Elements that a block takes at a time.
const TILE: usize = 8192;
/// Blocks of one launch: more than run at once; each takes tiles until none is left.
const MOST_BLOCKS: usize = 132 * 16;

/// Bytes of a tensor on the device.
#[derive(Debug, Clone)]
pub struct Bytes {
    place: Place,
    len: usize,
}

#[derive(Debug, Clone)]
enum Place {
    Own(Tensor),
    Part { of: Arc<DeviceBytes>, from: usize },
}

/// The type of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Number {
    Bf16 = 0,
    F16 = 1,
    F32 = 2,
}

impl Number {
    fn bytes(self) -> usize {
        self.dtype().size_in_bytes()
    }

    fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
        }
    }
}

/// What is computed of a tensor's parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Sum of factor * theta; no base.
    WeightedSum,
    /// theta0 + scaling * sum of factor * delta.
    Deltas,
    /// theta0 + scaling * what TIES makes of the trimmed deltas.
    Ties(Mean),
    /// Sum of factor * (theta0 + delta).
    SparseSum,
}

/// How TIES joins the deltas that agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Mean {
    Sum = 0,
    /// Over the sum of their shares.
    Mean = 1,
    /// As [`Mean::Mean`], but nothing is divided where there are two parents, and a single one keeps its value in full.
    Mixup = 2,
}

/// An edge among magnitudes.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Edge {
    index: u64,
    /// Magnitudes above these lie above the edge; -1: all.
    bits: i32,
    /// Whether those of just these bits do that have an index below `index`.
    divides: u32,
}

impl Edge {
    /// Magnitudes above these bits lie above it, and of those that have just these bits the elements with an index below this.
    pub fn new(bits: u32, index: u64) -> Self {
        let largest = bits.min(i32::MAX as u32) as i32;
        match (index, bits > i32::MAX as u32) {
            // No magnitude has such bits.
            (_, true) | (0, false) => Self {
                index: 0,
                bits: largest,
                divides: 0,
            },
            (u64::MAX, false) => Self {
                index,
                bits: largest - 1,
                divides: 0,
            },
            (index, false) => Self {
                index,
                bits: largest,
                divides: 1,
            },
        }
    }

    /// Everything lies above.
    pub const LOWEST: Self = Self {
        index: u64::MAX,
        bits: -1,
        divides: 0,
    };
}

/// What is done to every survivor of a sparsifier.
#[derive(Debug, Clone, Copy)]
pub enum Survivors {
    Keep,
    Divide(f32),
    Multiply(f32),
}

/// What a parent's delta goes through before the operation.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// Bit i: whether element i stays ([`Gpu::keep_bits`]). None of these where the values are formed.
    pub kept: Option<&'a Bytes>,
    /// Only what lies above the first edge and not above the second stays.
    pub between: Option<(Edge, Edge)>,
    pub survivors: Survivors,
    /// TIES: what does not lie above it goes.
    pub trim: Edge,
}

/// One parent.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    pub values: &'a Bytes,
    pub number: Number,
    /// Whether the values are deltas, of which a sparsifier has left what it leaves.
    pub formed: bool,
    pub change: Change<'a>,
    /// TIES: before the election.
    pub before: f32,
    pub factor: f32,
    /// TIES: of the divisor.
    pub share: f32,
}

/// Bits that are drawn: which of the elements of a tensor from `first` on a random sparsifier keeps.
#[derive(Debug)]
pub struct Draw<'a> {
    pub bits: &'a Bytes,
    pub first: usize,
    pub elements: usize,
    pub key: [u32; 2],
    pub threshold: u32,
}

/// One tensor, or a run of its elements: edges and bits count from the first of these.
#[derive(Debug)]
pub struct Pass<'a> {
    pub operation: Operation,
    pub elements: usize,
    pub base: Option<(&'a Bytes, Number)>,
    pub members: Vec<Member<'a>>,
    /// Of the sum; 1 divides by nothing.
    pub divisor: f32,
    pub scaling: f32,
    /// TIES: the sign of elements whose deltas sum to 0.
    pub majority: f32,
    pub out: Number,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawMember {
    values: u64,
    kept: u64,
    low: Edge,
    high: Edge,
    trim: Edge,
    number: u32,
    between: u32,
    survivors: u32,
    by: f32,
    before: f32,
    factor: f32,
    share: f32,
    reciprocal: f32,
    formed: u32,
    unused: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RawPass {
    length: u64,
    base: u64,
    out: u64,
    not_finite: u64,
    base_number: u32,
    out_number: u32,
    members: u32,
    mean: u32,
    divisor: f32,
    scaling: f32,
    majority: f32,
    reciprocal: f32,
    member: [RawMember; MOST_MEMBERS],
}

/// The kernels of many passes, and what each of their blocks takes.
#[derive(Debug)]
pub struct Plan {
    groups: Vec<Group>,
    /// By pass.
    kernels: Vec<String>,
    elements: Vec<usize>,
}

#[derive(Debug)]
struct Group {
    kernel: String,
    /// Pass and place of each tile.
    tiles: Tensor,
    count: usize,
}

impl Bytes {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn holds(&self, elements: usize, number: Number) -> Result<u64> {
        if self.len != elements * number.bytes() {
            bail!("{} bytes are not {elements} elements of {number:?}", self.len);
        }
        self.address()
    }

    fn address(&self) -> Result<u64> {
        match &self.place {
            Place::Own(tensor) => pointer(tensor),
            Place::Part { of, from } => Ok(of.address() + *from as u64),
        }
    }

    /// A part of what a lane has on the device, which begins where a run of elements may.
    pub(crate) fn part(of: &Arc<DeviceBytes>, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > of.len() || !range.start.is_multiple_of(ALIGNMENT) {
            bail!("bytes {range:?} of {}", of.len());
        }
        Ok(Self {
            len: range.len(),
            place: Place::Part {
                of: of.clone(),
                from: range.start,
            },
        })
    }
}

impl Member<'_> {
    fn raw(&self, elements: usize) -> Result<RawMember> {
        let change = &self.change;
        let (low, high) = change.between.unwrap_or((Edge::LOWEST, Edge::LOWEST));
        let (survivors, by) = match change.survivors {
            Survivors::Keep => (0, 1.0),
            Survivors::Divide(by) => (1, by),
            Survivors::Multiply(by) => (2, by),
        };
        let kept = match change.kept {
            None => 0,
            Some(bits) if bits.len() >= elements.div_ceil(32) * 4 => bits.address()?,
            Some(bits) => bail!("{} bytes of bits for {elements} elements", bits.len()),
        };
        Ok(RawMember {
            values: self.values.holds(elements, self.number)?,
            kept,
            low,
            high,
            trim: change.trim,
            number: self.number as u32,
            between: u32::from(change.between.is_some()),
            survivors,
            by,
            before: self.before,
            factor: self.factor,
            share: self.share,
            reciprocal: reciprocal(by),
            formed: u32::from(self.formed),
            unused: 0,
        })
    }
}

/// What the kernel divides by means of; 0 where that would not be exact.
fn reciprocal(by: f32) -> f32 {
    const MANTISSA: u32 = 0x7f_ffff;
    match (1e-4..1e4).contains(&by) && by.to_bits() & MANTISSA != MANTISSA {
        true => 1.0 / by,
        false => 0.0,
    }
}

impl Gpu {
    /// Room for bytes.
    pub fn bytes(&self, len: usize) -> Result<Bytes> {
        Ok(Bytes {
            place: Place::Own(Tensor::zeros(len.max(1), DType::U8, &self.device)?),
            len,
        })
    }

    pub fn upload(&self, bytes: &[u8]) -> Result<Bytes> {
        let place = match bytes {
            [] => Tensor::zeros(1, DType::U8, &self.device)?,
            bytes => Tensor::from_slice(bytes, bytes.len(), &self.device)?,
        };
        Ok(Bytes {
            place: Place::Own(place),
            len: bytes.len(),
        })
    }

    /// A copy of a tensor's bytes as a tensor that computes, on the GPU.
    pub fn tensor(&self, bytes: &Bytes, number: Number, shape: &[usize]) -> Result<Tensor> {
        let from = bytes.holds(shape.iter().product(), number)?;
        let copy = self.empty(shape, number.dtype())?;
        // SAFETY: both have as many bytes.
        unsafe { self.copy(pointer(&copy)?, from, bytes.len)? };
        Ok(copy)
    }

    pub fn download(&self, bytes: &Bytes) -> Result<Vec<u8>> {
        match &bytes.place {
            Place::Own(tensor) => tensor.narrow(0, 0, bytes.len)?.to_vec1(),
            Place::Part { .. } => bail!("a lane's bytes come back with it"),
        }
    }

    /// Which of `elements` elements a random sparsifier keeps, as bits: those whose Philox word is not below the threshold.
    pub fn keep_bits(&self, elements: usize, key: [u32; 2], threshold: u32) -> Result<Bytes> {
        let bits = self.bytes(elements.div_ceil(32) * 4)?;
        self.draw(&Draw {
            bits: &bits,
            first: 0,
            elements,
            key,
            threshold,
        })?;
        Ok(bits)
    }

    pub(crate) fn draw(&self, draw: &Draw<'_>) -> Result<()> {
        let Draw {
            bits,
            first,
            elements,
            key,
            threshold,
        } = *draw;
        if bits.len < elements.div_ceil(32) * 4 {
            bail!("{} bytes of bits for {elements} elements", bits.len);
        }
        let blocks = elements.div_ceil(32).div_ceil(THREADS);
        // SAFETY: the kernel writes one word for 32 elements, and there is room for them.
        unsafe {
            let at = bits.address()?;
            self.launch_keep_bits(
                blocks,
                THREADS,
                at,
                [first as u64, elements as u64],
                key,
                threshold,
            )
        }
    }

    /// Which kernels merge these passes, and which block takes what. It holds for other factors too.
    pub fn plan(&self, passes: &[Pass<'_>]) -> Result<Plan> {
        let groups = groups(&passes.iter().collect::<Vec<_>>())?;
        let groups = groups.into_iter().map(|(kernel, tiles)| {
            let count = tiles.len() / 2;
            Ok(Group {
                kernel,
                count,
                tiles: Tensor::from_vec(tiles, 2 * count, &self.device)?,
            })
        });
        Ok(Plan {
            groups: groups.collect::<Result<_>>()?,
            kernels: passes.iter().map(Pass::kernel).collect::<Result<_>>()?,
            elements: passes.iter().map(|pass| pass.elements).collect(),
        })
    }

    /// Merges tensors into `outs`, rounding once. `not_finite` becomes non-zero if a result is not finite.
    pub fn merge(
        &self,
        plan: &Plan,
        passes: &[Pass<'_>],
        outs: &mut [&mut Bytes],
        not_finite: &Tensor,
    ) -> Result<()> {
        if not_finite.dtype() != DType::U32 || not_finite.elem_count() == 0 {
            bail!("the flag is not a u32");
        }
        if passes.len() != plan.kernels.len() || outs.len() != passes.len() {
            bail!(
                "{} passes where {} were planned",
                passes.len(),
                plan.kernels.len()
            );
        }
        let flag = pointer(not_finite)?;
        let mut raw: Vec<RawPass> = Vec::with_capacity(passes.len());
        let planned = plan.kernels.iter().zip(&plan.elements);
        for ((pass, out), (kernel, elements)) in passes.iter().zip(outs).zip(planned) {
            if pass.kernel()? != *kernel || pass.elements != *elements {
                bail!("another pass was planned");
            }
            raw.push(pass.raw(out, flag)?);
        }
        let bytes = as_bytes(&raw);
        let there = Tensor::from_slice(bytes, bytes.len(), &self.device)?;
        let at = pointer(&there)?;
        for group in &plan.groups {
            let (tiles, count) = (pointer(&group.tiles)?, group.count as i32);
            // SAFETY: every tensor was found to hold its elements, and has room up to a whole run; the tiles are those of the
            // passes.
            unsafe { self.launch_tiles(&group.kernel, at, tiles, count)? };
        }
        Ok(())
    }
}

impl Gpu {
    /// # Safety
    /// As [`Gpu::launch_passes`].
    pub(crate) unsafe fn launch_tiles(
        &self,
        kernel: &str,
        passes: u64,
        tiles: u64,
        count: i32,
    ) -> Result<()> {
        let blocks = usize::try_from(count).unwrap_or(0).min(MOST_BLOCKS);
        // SAFETY: the caller's.
        unsafe { self.launch_passes(kernel, blocks, THREADS, passes, tiles, count) }
    }
}

/// By kernel, pass and place of each tile.
pub(crate) fn groups(passes: &[&Pass<'_>]) -> Result<Vec<(String, Vec<u32>)>> {
    let mut groups: Vec<(String, Vec<u32>)> = Vec::new();
    for (index, pass) in passes.iter().enumerate() {
        let kernel = pass.kernel()?;
        let at = match groups.iter().position(|(known, _)| *known == kernel) {
            Some(at) => at,
            None => {
                groups.push((kernel, Vec::new()));
                groups.len() - 1
            }
        };
        let tiles = (0..pass.elements.div_ceil(TILE)).flat_map(|tile| [index as u32, tile as u32]);
        groups[at].1.extend(tiles);
    }
    groups.retain(|(_, tiles)| !tiles.is_empty());
    Ok(groups)
}

/// Plain numbers as they lie in memory.
pub(crate) trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for RawPass {}

pub(crate) fn as_bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: these types have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

impl Pass<'_> {
    pub(crate) const RAW_BYTES: usize = size_of::<RawPass>();

    fn kernel(&self) -> Result<String> {
        let name = match self.operation {
            Operation::WeightedSum => "weighted_sum",
            Operation::Deltas => "deltas",
            Operation::Ties(_) => "ties",
            Operation::SparseSum => "sparse_sum",
        };
        let count = self.members.len();
        if count == 0 || count > MOST_MEMBERS {
            bail!("{count} parents; the kernels take up to {MOST_MEMBERS}");
        }
        if !(2..=3).contains(&count) || self.operation == Operation::SparseSum {
            return Ok(name.to_owned());
        }
        let mean = match self.operation {
            Operation::Ties(Mean::Sum) => "_sum",
            Operation::Ties(Mean::Mean) => "_mean",
            Operation::Ties(Mean::Mixup) => "_mixup",
            _ => "",
        };
        let is_sparse = |member: &Member<'_>| {
            let change = &member.change;
            change.kept.is_some() || change.between.is_some() || !matches!(change.survivors, Survivors::Keep)
        };
        // A weighted sum knows no deltas.
        let has_deltas = self.operation != Operation::WeightedSum;
        let sparse = match has_deltas && self.members.iter().any(is_sparse) {
            true => "_sparse",
            false => "",
        };
        Ok(format!("{name}{mean}_fast{sparse}_{count}"))
    }

    pub(crate) fn raw(&self, out: &Bytes, not_finite: u64) -> Result<RawPass> {
        let elements = self.elements;
        let (base, base_number) = match self.base {
            Some((bytes, number)) => (bytes.holds(elements, number)?, number),
            None if self.operation == Operation::WeightedSum => (0, Number::F32),
            None => bail!("{:?} needs a base", self.operation),
        };
        let first = self.members[0].raw(elements)?;
        let mut member = [first; MOST_MEMBERS];
        for (raw, of) in member.iter_mut().zip(&self.members) {
            *raw = of.raw(elements)?;
        }
        Ok(RawPass {
            length: elements as u64,
            base,
            out: out.holds(elements, self.out)?,
            not_finite,
            base_number: base_number as u32,
            out_number: self.out as u32,
            members: self.members.len() as u32,
            mean: match self.operation {
                Operation::Ties(mean) => mean as u32,
                _ => Mean::Sum as u32,
            },
            divisor: self.divisor,
            scaling: self.scaling,
            majority: self.majority,
            reciprocal: reciprocal(self.divisor),
            member,
        })
    }
}
