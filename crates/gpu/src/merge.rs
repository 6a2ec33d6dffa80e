//! The tensors of a merge: for each the operation, its parents' bytes, and the bytes that come of them (`kernels/merge.cu`).

use candle_core::{DType, Result, Tensor, bail};

use crate::device::{Gpu, pointer};

/// Parents that the kernels take.
const MOST_MEMBERS: usize = 8;
/// Elements of one thread; bytes of tensors are padded for whole runs of the widest type.
const RUN: usize = 8;
const THREADS: usize = 256;
/// Elements that a block takes at a time.
const TILE: usize = 8192;
/// Blocks of one launch: more than run at once; each takes tiles until none is left.
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
    reciprocal: f32,
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
            reciprocal: reciprocal(by),
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

    /// A copy of a tensor's bytes as a tensor that computes, on the GPU.
    pub fn tensor(&self, bytes: &Bytes, number: Number, shape: &[usize]) -> Result<Tensor> {
        let from = bytes.holds(shape.iter().product(), number)?;
        let copy = self.empty(shape, number.dtype())?;
        // SAFETY: both have as many bytes.
        unsafe { self.copy(pointer(&copy)?, from, bytes.len)? };
        Ok(copy)
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
        unsafe { self.launch_keep_bits(blocks, THREADS, at, length, key, threshold)? };
        Ok(bits)
    }

    /// Which kernels merge these passes, and which block takes what. It holds for other factors too.
    pub fn plan(&self, passes: &[Pass<'_>]) -> Result<Plan> {
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
        let groups = groups.into_iter().filter(|(_, tiles)| !tiles.is_empty());
        let groups = groups.map(|(kernel, tiles)| {
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
        // SAFETY: plain numbers without padding, looked at as bytes.
        let bytes =
            unsafe { std::slice::from_raw_parts(raw.as_ptr().cast::<u8>(), size_of_val(raw.as_slice())) };
        let there = Tensor::from_slice(bytes, bytes.len(), &self.device)?;
        let at = pointer(&there)?;
        for group in &plan.groups {
            let (tiles, count) = (pointer(&group.tiles)?, group.count as i32);
            // SAFETY: every tensor was found to hold its elements, and has room up to a whole run; the tiles are those of the
            // passes.
            unsafe {
                let blocks = group.count.min(MOST_BLOCKS);
                self.launch_passes(&group.kernel, blocks, THREADS, at, tiles, count)?;
            }
        }
        Ok(())
    }
}

impl Pass<'_> {
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
        let is_bf16 = |number: Number| number == Number::Bf16;
        let fast = (2..=3).contains(&count)
            && self.operation != Operation::SparseSum
            && is_bf16(self.out)
            && self.base.is_none_or(|(_, number)| is_bf16(number))
            && self.members.iter().all(|member| is_bf16(member.number));
        let is_sparse = |member: &Member<'_>| {
            let change = &member.change;
            change.kept.is_some() || change.between.is_some() || !matches!(change.survivors, Survivors::Keep)
        };
        Ok(match (fast, self.members.iter().any(is_sparse)) {
            (false, _) => name.to_owned(),
            (true, false) => format!("{name}_fast_{count}"),
            (true, true) => format!("{name}_fast_sparse_{count}"),
        })
    }

    fn raw(&self, out: &Bytes, not_finite: u64) -> Result<RawPass> {
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
            unused: 0,
            member,
        })
    }
}
