//! Recipe -> family: what needs passes over the parents before the first element can be merged. No lambda here.
//!
//! Source of global TIES: yule-BUAA/MergeLM and prateeky2806/ties-merging; of the rest: docs/METHODS.md.

use std::ops::Range;
use std::sync::Arc;

use cauldron_checkpoint::{LetGo, Place, TensorInfo, dtype_size, row_len, widen};

use crate::geometry::Gram;
use crate::layout::{OutTensor, Role};
use crate::masks::{self, Mask};
use crate::recipe::{Method, Recipe, Rescale, Trim};
use crate::sparsify::{Drop, Edge, Survivors};
use crate::stream::{Cut, Needs, Pool, RowMeans, Scratch, Stream, Thinned, Tile, WINDOW};
use crate::{HoldWeights, MergeError, Observer, Parents};

/// What a method knows of one tensor before any weight.
#[derive(Debug, Clone, Default)]
pub(crate) struct Prepared {
    /// By member.
    pub drops: Vec<Drop>,
    /// By member, what the drops decided, where that is remembered.
    pub masks: Vec<Mask>,
    /// TIES: by member, the edge of what is trimmed.
    pub trims: Vec<Edge>,
    /// Methods on angles: inner products of the members' tensors (or rows, or columns).
    pub grams: Vec<Gram>,
    /// sce and arcee_fusion: the edge of what is selected.
    pub select: Option<Edge>,
    /// sce: weights of the members.
    pub weights: Vec<f32>,
}

/// A recipe with lambda left open: everything but the weights of the parents.
#[derive(Debug)]
pub struct Family<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) parents: &'a Parents,
    pub(crate) prepared: Vec<Prepared>,
    /// TIES, global variant: the sign that elements without a sum of their own get.
    pub(crate) majority: i8,
    pub(crate) means: RowMeans,
    pub(crate) cut: Cut,
    /// Elements that are computed together.
    pub(crate) window: usize,
    /// The tensors that are being prepared.
    scope: Range<usize>,
    pub(crate) scratches: Pool<Scratch>,
    /// Deltas that a sparsifier has thinned, where they are held: f32, by tensor and member.
    pub(crate) thinned: Arc<Place>,
    /// By tensor, which of them is its first member's.
    pub(crate) first_thinned: Vec<Option<usize>>,
}

/// Bytes that are read at once for a mean of rows.
const MEAN_BYTES: usize = 4 << 20;
/// Windows that are prepared and merged together where a method needs to know no more than one tensor at a time.
const GROUP: usize = 4;

/// Passes over the parents that a merge makes: the preparing ones and the one that writes.
pub(crate) fn passes(recipe: &Recipe) -> u64 {
    let mut passes = 1;
    if let Some(sparsify) = &recipe.sparsify {
        passes += u64::from(!sparsify.drops.is_random()) + u64::from(sparsify.rescale == Rescale::L1);
    }
    passes
        + match &recipe.method {
            Method::Ties {
                trim: Trim::Global { .. },
                ..
            } => 2,
            Method::Ties { .. } | Method::ArceeFusion => 1,
            Method::Sce { select } => 1 + u64::from(*select < 1.0),
            Method::Slerp { .. }
            | Method::NuSlerp { .. }
            | Method::MultiSlerp { .. }
            | Method::Karcher { .. }
            | Method::ModelStock { .. } => 1,
            Method::Average { .. }
            | Method::TaskArithmetic { .. }
            | Method::NearSwap { .. }
            | Method::Passthrough => 0,
        }
}

impl<'a> Family<'a> {
    /// Runs the preparing passes over all tensors.
    pub fn prepare(recipe: &'a Recipe, parents: &'a Parents, obs: &dyn Observer) -> Result<Self, MergeError> {
        let mut family = Self::open(recipe, parents, WINDOW, obs)?;
        family.prepare_tensors(0..family.tensors().len(), obs)?;
        Ok(family)
    }

    /// As [`Self::prepare`], for many points: what random drops decide is decided once, where there is room to remember it, and
    /// what costs much to form is formed once, where `hold` has room for it.
    pub fn prepare_for_points(
        recipe: &'a Recipe,
        parents: &'a Parents,
        hold: &dyn HoldWeights,
        obs: &dyn Observer,
    ) -> Result<Self, MergeError> {
        let mut family = Self::prepare(recipe, parents, obs)?;
        family.remember_drops(obs)?;
        family.hold_thinned(hold, obs)?;
        Ok(family)
    }

    /// Bytes of what was formed once and is held.
    pub fn held_bytes(&self) -> u64 {
        self.thinned.held().map_or(0, |held| held.byte_len())
    }

    pub(crate) fn thinned(&self) -> Option<Thinned<'_>> {
        let held = self.thinned.held()?;
        let first = &self.first_thinned;
        Some(Thinned { held, first })
    }

    /// A family of which no tensor is prepared yet.
    pub(crate) fn open(
        recipe: &'a Recipe,
        parents: &'a Parents,
        window: usize,
        obs: &dyn Observer,
    ) -> Result<Self, MergeError> {
        let mut family = Self {
            prepared: vec![Prepared::default(); parents.layout.tensors.len()],
            majority: 0,
            recipe,
            parents,
            means: RowMeans::new(),
            cut: match recipe.is_by_row() {
                true => Cut::Rows,
                false => Cut::Elements,
            },
            window,
            scope: 0..0,
            scratches: Pool::default(),
            thinned: Arc::default(),
            first_thinned: Vec::new(),
        };
        family.find_row_means(obs)?;
        Ok(family)
    }

    /// Whether the method measures the whole model, so that all tensors are prepared before the first is merged.
    pub(crate) fn is_global(&self) -> bool {
        matches!(
            self.recipe.method,
            Method::Ties {
                trim: Trim::Global { .. },
                ..
            }
        )
    }

    /// The tensors from `first` on, in runs that can be prepared and merged one after the other. All are one where everything is
    /// prepared first, and if `undivided` also where there is nothing to prepare.
    pub(crate) fn groups(&self, first: usize, undivided: bool) -> Vec<Range<usize>> {
        let tensors = self.tensors();
        let is_one = self.is_global() || (undivided && passes(self.recipe) == 1);
        let (mut groups, mut start, mut elements) = (Vec::new(), first, 0);
        for (index, tensor) in tensors.iter().enumerate().skip(first) {
            if elements > 0 && elements + tensor.plan.numel() > GROUP * self.window && !is_one {
                groups.push(start..index);
                (start, elements) = (index, 0);
            }
            elements += tensor.plan.numel();
        }
        groups.push(start..tensors.len());
        groups
    }

    /// The preparing passes over some tensors.
    pub(crate) fn prepare_tensors(
        &mut self,
        tensors: Range<usize>,
        obs: &dyn Observer,
    ) -> Result<(), MergeError> {
        self.scope = tensors;
        self.prepare_drops(obs)?;
        match &self.recipe.method {
            Method::Ties {
                trim: Trim::Global { retain },
                ..
            } => {
                self.trim_globally(*retain, obs)?;
                self.find_majority(obs)?;
            }
            Method::Ties {
                trim: Trim::Tensor { retain },
                ..
            } => self.trim_by_tensor(retain, obs)?,
            Method::Sce { select } => self.prepare_sce(*select, obs)?,
            Method::ArceeFusion => self.prepare_fusion(obs)?,
            Method::Slerp { .. }
            | Method::NuSlerp { .. }
            | Method::MultiSlerp { .. }
            | Method::Karcher { .. }
            | Method::ModelStock { .. } => self.find_grams(obs)?,
            Method::Average { .. }
            | Method::TaskArithmetic { .. }
            | Method::NearSwap { .. }
            | Method::Passthrough => {}
        }
        Ok(())
    }

    /// Tells the kernel that some tensors will be read soon.
    pub(crate) fn prefetch(&self, tensors: Range<usize>) {
        for tensor in &self.tensors()[tensors] {
            for input in tensor.inputs() {
                let source = &self.parents.sources[input.source];
                let len = source.get(&input.name).map_or(0, TensorInfo::byte_len);
                source.prefetch(&input.name, 0, len);
            }
        }
    }

    /// Lets go of what was prepared for some tensors.
    pub(crate) fn forget(&mut self, tensors: Range<usize>) {
        self.prepared[tensors].fill_with(Prepared::default);
    }

    pub(crate) fn tensors(&self) -> &'a [OutTensor] {
        &self.parents.layout.tensors
    }

    /// Indices of the tensors in preparation that are merged.
    pub(crate) fn merged(&self) -> Vec<usize> {
        self.scope
            .clone()
            .filter(|t| self.tensors()[*t].role == Role::Merge)
            .collect()
    }

    /// Runs `run` with a pass in which everything is read.
    pub(crate) fn stream<T>(&self, run: impl FnOnce(&Stream<'_>) -> T) -> T {
        let tensors = self.tensors();
        run(&Stream {
            parents: self.parents,
            tensors,
            means: &self.means,
            cut: self.cut,
            window: self.window,
            deltas: self.recipe.on_deltas(),
            scratches: &self.scratches,
            held: self.parents.held(),
            thinned: self.thinned(),
            observes: false,
            needs: &|tensor| Needs::all(&tensors[tensor]),
        })
    }

    /// What the method works on: deltas after the sparsifier, and for methods on whole tensors theta0 + delta.
    pub(crate) fn form(&self, tensor: usize, tile: &mut Tile) {
        if !self.recipe.on_deltas() {
            return;
        }
        let prepared = &self.prepared[tensor];
        for (member, drop) in prepared.drops.iter().enumerate() {
            if tile.is_formed(member) {
                continue;
            }
            let known = prepared.masks.get(member).and_then(|mask| mask.of(tile));
            let delta = &mut tile.deltas[member];
            match known {
                Some(bits) => {
                    let (factor, rest) = drop.survivors().as_factor();
                    masks::apply(bits, factor, delta);
                    rest.apply(delta);
                }
                None => drop.apply(tile.start, delta, &mut tile.drops),
            }
        }
    }

    /// As [`Self::form`], with what was trimmed set to 0.
    pub(crate) fn form_trimmed(&self, tensor: usize, tile: &mut Tile) {
        self.form(tensor, tile);
        let Tile {
            start, deltas, drops, ..
        } = tile;
        for (trim, delta) in self.prepared[tensor].trims.iter().zip(deltas) {
            let drop = Drop::Between {
                low: *trim,
                high: Edge::HIGHEST,
                survivors: Survivors::Keep,
            };
            drop.apply(*start, delta, drops);
        }
    }

    /// Tells of a preparing pass over some tensors.
    pub(crate) fn advance(&self, tensors: &[usize], obs: &dyn Observer) {
        let bytes = tensors.iter().map(|t| {
            let tensor = &self.tensors()[*t];
            self.parents.bytes_per_element(tensor) * tensor.plan.numel() as u64
        });
        obs.advance(bytes.sum());
    }

    /// Counts what a pass leaves out, so that progress ends at its total.
    pub(crate) fn advance_rest(&self, obs: &dyn Observer) {
        let rest: Vec<usize> = self
            .scope
            .clone()
            .filter(|t| self.tensors()[*t].role != Role::Merge)
            .collect();
        self.advance(&rest, obs);
    }

    /// The mean of a vocabulary tensor's rows, summed in f64 row by row.
    fn row_mean(&self, source: usize, name: &str, obs: &dyn Observer) -> Result<Vec<f32>, MergeError> {
        let checkpoint = &self.parents.sources[source];
        let failed = |e| MergeError::parent(&self.parents.label(source), e);
        let info = &checkpoint.tensors()[name];
        let width = row_len(&info.shape).max(1);
        let item = dtype_size(info.dtype).unwrap_or(4) as usize;
        let rows = info.numel() / width;
        let mut sums = vec![0f64; width];
        let mut values = vec![0f32; width];
        let mut bytes = Vec::new();
        let at_once = (MEAN_BYTES / (width * item)).max(1);
        for from in (0..rows).step_by(at_once) {
            if obs.cancelled() {
                return Err(MergeError::Cancelled);
            }
            bytes.resize(at_once.min(rows - from) * width * item, 0);
            let at = (from * width * item) as u64;
            checkpoint.read_into(name, at, &mut bytes).map_err(failed)?;
            for row in bytes.chunks_exact(width * item) {
                if !widen(info.dtype, row, &mut values) {
                    return Err(MergeError::NonFiniteInput {
                        tensor: name.to_owned(),
                        parent: self.parents.label(source),
                    });
                }
                sums.iter_mut()
                    .zip(&values)
                    .for_each(|(s, v)| *s += f64::from(*v));
            }
        }
        let rows = rows.max(1) as f64;
        Ok(sums.into_iter().map(|s| (s / rows) as f32).collect())
    }

    /// Means of vocabulary tensors whose rows are too few.
    fn find_row_means(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        for (source, checkpoint) in self.parents.sources.iter().enumerate() {
            let Some(map) = self.parents.vocab.map(source) else {
                continue;
            };
            if !map.contains(&crate::vocab::Row::OwnMean) {
                continue;
            }
            for name in checkpoint
                .tensors()
                .keys()
                .filter(|name| crate::vocab::is_vocabulary(name))
            {
                let mean = self.row_mean(source, name, obs)?;
                self.means.insert((source, name.clone()), mean);
            }
        }
        Ok(())
    }
}
