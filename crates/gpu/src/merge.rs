//! One tensor of a merge: the operation, its parents' bytes, and the bytes that come of them (`kernels/merge.cu`).

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::{DType, Result, Tensor, bail};

use crate::device::{Gpu, pointer};

/// Parents that the kernels take.
const MOST_MEMBERS: usize = 8;
/// Elements of one thread; bytes of tensors are padded for whole runs of the widest type.
const RUN: usize = 8;
const THREADS: usize = 256;
/// Blocks of one launch: more than run at once, so that all end together; the rest is a loop.
const MOST_BLOCKS: usize = 132 * 16;

/// Bytes of a tensor on the device, with room up to a whole run of elements.
#[derive(Debug, Clone)]
pub struct Bytes {
    tensor: Tensor,
    len: usize,
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
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
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

/// An edge among magnitudes: of those that have just these bits, elements with an index below this lie above it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Edge {
    pub index: u64,
    pub bits: u32,
    unused: u32,
}

impl Edge {
    pub fn new(bits: u32, index: u64) -> Self {
        Self {
            index,
            bits,
            unused: 0,
        }
    }

    /// Everything lies above.
    pub const LOWEST: Self = Self {
        index: u64::MAX,
        bits: 0,
        unused: 0,
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
    /// Bit i: whether element i stays ([`Gpu::keep_bits`]).
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
    pub change: Change<'a>,
    /// TIES: before the election.
    pub before: f32,
    pub factor: f32,
    /// TIES: of the divisor.
    pub share: f32,
}

/// One tensor.
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
    unused: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawPass {
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
    unused: u32,
    member: [RawMember; MOST_MEMBERS],
}

// SAFETY: plain numbers, laid out as in C.
unsafe impl DeviceRepr for RawPass {}

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
        pointer(&self.tensor)
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
            Some(bits) if bits.len() >= elements.div_ceil(32) * 4 => pointer(&bits.tensor)?,
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
            unused: 0,
        })
    }
}

impl Gpu {
    /// Room for bytes.
    pub fn bytes(&self, len: usize) -> Result<Bytes> {
        // A run of 16-bit elements may lie where the last elements of a wider type would end.
        let room = len.next_multiple_of(RUN * 4);
        Ok(Bytes {
            tensor: Tensor::zeros(room.max(1), DType::U8, &self.device)?,
            len,
        })
    }

    pub fn upload(&self, bytes: &[u8]) -> Result<Bytes> {
        let mut padded = bytes.to_vec();
        let room = bytes.len().next_multiple_of(RUN * 4).max(1);
        padded.resize(room, 0);
        Ok(Bytes {
            tensor: Tensor::from_vec(padded, room, &self.device)?,
            len: bytes.len(),
        })
    }

    pub fn download(&self, bytes: &Bytes) -> Result<Vec<u8>> {
        bytes.tensor.narrow(0, 0, bytes.len)?.to_vec1()
    }

    /// Which of `elements` elements a random sparsifier keeps, as bits: those whose Philox word is not below the threshold.
    pub fn keep_bits(&self, elements: usize, key: [u32; 2], threshold: u32) -> Result<Bytes> {
        let bits = self.bytes(elements.div_ceil(32) * 4)?;
        let (at, length) = (pointer(&bits.tensor)?, elements as u64);
        let blocks = elements.div_ceil(32).div_ceil(THREADS);
        // SAFETY: the kernel writes one word for 32 elements, and there is room for them.
        unsafe {
            self.launch("keep_bits", (blocks, 1), THREADS, |launch| {
                launch.arg(&at).arg(&length).arg(&key[0]).arg(&key[1]).arg(&threshold);
            })?;
        }
        Ok(bits)
    }

    /// Merges one tensor into `out`, rounding once. `not_finite` becomes non-zero if a result is not finite.
    pub fn merge(&self, pass: &Pass<'_>, out: &mut Bytes, not_finite: &Tensor) -> Result<()> {
        let elements = pass.elements;
        let count = pass.members.len();
        let (name, mean) = match pass.operation {
            Operation::WeightedSum => ("weighted_sum", Mean::Sum),
            Operation::Deltas => ("deltas", Mean::Sum),
            Operation::Ties(mean) => ("ties", mean),
            Operation::SparseSum => ("sparse_sum", Mean::Sum),
        };
        if count == 0 || count > MOST_MEMBERS {
            bail!("{count} parents; the kernels take up to {MOST_MEMBERS}");
        }
        if not_finite.dtype() != DType::U32 || not_finite.elem_count() == 0 {
            bail!("the flag is not a u32");
        }
        let (base, base_number) = match pass.base {
            Some((bytes, number)) => (bytes.holds(elements, number)?, number),
            None if pass.operation == Operation::WeightedSum => (0, Number::F32),
            None => bail!("{name} needs a base"),
        };
        let first = pass.members[0].raw(elements)?;
        let mut member = [first; MOST_MEMBERS];
        for (raw, of) in member.iter_mut().zip(&pass.members) {
            *raw = of.raw(elements)?;
        }
        let raw = RawPass {
            length: elements as u64,
            base,
            out: out.holds(elements, pass.out)?,
            not_finite: pointer(not_finite)?,
            base_number: base_number as u32,
            out_number: pass.out as u32,
            members: count as u32,
            mean: mean as u32,
            divisor: pass.divisor,
            scaling: pass.scaling,
            majority: pass.majority,
            unused: 0,
            member,
        };
        let kernel = format!("{name}_{}", if count <= 2 { 2 } else { MOST_MEMBERS });
        let blocks = elements.div_ceil(RUN * THREADS).min(MOST_BLOCKS);
        // SAFETY: every tensor was found to hold its elements, and has room up to a whole run.
        unsafe {
            self.launch(&kernel, (blocks, 1), THREADS, |launch| {
                launch.arg(&raw);
            })
        }
    }
}
