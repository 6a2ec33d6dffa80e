//! Family -> point: with the weights known, one fused pass gives every merged element.

use std::ops::Range;

use cauldron_checkpoint::{Digest, Dtype, dtype_size, narrow, row_len};

use crate::family::Family;
use crate::fusion::Fusion;
use crate::geometry::{coefficients, granularity, operands};
use crate::kernel::{self, TiesMean};
use crate::layout::{Input, OutTensor, Role};
use crate::recipe::{Granularity, Method, Recipe, Trim, dtype_name, lambda_weights};
use crate::selection::{erase, importance};
use crate::stream::{Chunk, Needs, Scratch, Stream, Tile, Work};
use crate::{MergeError, Observer};

/// One model of a family.
#[derive(Debug)]
pub struct Point<'f, 'a> {
    pub(crate) family: &'f Family<'a>,
    pub(crate) tensors: Vec<Combination>,
    observes: bool,
}

/// A run of one tensor's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its place in writing order.
    pub tensor: usize,
    pub len: usize,
}

/// What one tensor is made of, by member.
#[derive(Debug, Default)]
pub(crate) struct Combination {
    pub weights: Vec<f32>,
    /// Methods on angles: the coefficients of the tensor, of each row, or of each column.
    pub coefficients: Vec<Vec<f32>>,
    pub scaling: f32,
    /// nearswap.
    t: f32,
}

/// What was seen of the observed tiles while one chunk was merged. Lists follow the members of its tensor.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChunkStats {
    /// Elements of the tiles that were looked at.
    pub observed: u64,
    /// Elements whose delta went into the result.
    pub kept: Vec<u64>,
    /// Elements where kept deltas of both signs met.
    pub conflicting: u64,
    /// Sums of squares of the deltas, before anything is dropped by the method.
    pub delta_squares: Vec<f64>,
    /// Products of the deltas with the base's values, for the angle between them.
    pub base_squares: f64,
    /// Product of the first two deltas.
    pub product: f64,
}

impl<'a> Family<'a> {
    /// The model at the recipe's own weights, or at `lambda` of the first of two parents.
    pub fn point(&self, lambda: Option<f64>) -> Result<Point<'_, 'a>, MergeError> {
        self.point_of(lambda, 0..self.tensors().len())
    }

    /// The model at the weights of another recipe, which differs from the family's in its shares only.
    pub fn point_of_recipe(&self, recipe: &Recipe) -> Result<Point<'_, 'a>, MergeError> {
        if !recipe.is_sibling(self.recipe) {
            return Err(MergeError::Undefined {
                tensor: "every tensor".into(),
                detail: "the recipe is of another family".into(),
            });
        }
        self.combined(recipe, None, 0..self.tensors().len())
    }

    /// As [`Self::point`], of some tensors only.
    pub(crate) fn point_of(
        &self,
        lambda: Option<f64>,
        which: Range<usize>,
    ) -> Result<Point<'_, 'a>, MergeError> {
        self.combined(self.recipe, lambda, which)
    }

    fn combined(
        &self,
        recipe: &Recipe,
        lambda: Option<f64>,
        which: Range<usize>,
    ) -> Result<Point<'_, 'a>, MergeError> {
        let mut tensors = Vec::new();
        for (index, tensor) in self.tensors().iter().enumerate() {
            let mut combination = Combination::default();
            if tensor.role == Role::Merge && which.contains(&index) {
                combination = self.combination(index, tensor, recipe, lambda)?;
            }
            tensors.push(combination);
        }
        Ok(Point {
            family: self,
            tensors,
            observes: true,
        })
    }

    fn combination(
        &self,
        index: usize,
        tensor: &OutTensor,
        recipe: &Recipe,
        lambda: Option<f64>,
    ) -> Result<Combination, MergeError> {
        let place = tensor.place();
        let all = match lambda {
            Some(lambda) => lambda_weights(lambda),
            None => recipe.weights_at(&place),
        };
        let mut weights = tensor.weights(&all);
        let at = |setting: &crate::setting::Setting, default: f64| setting.at(&place).unwrap_or(default);
        let mixed = lambda.is_some() || recipe.mixup.is_some();
        let (scaling, t) = match &recipe.method {
            Method::TaskArithmetic { scaling, .. } | Method::Ties { scaling, .. } => (at(scaling, 1.0), 0.0),
            Method::NearSwap { t } => (1.0, at(t, 0.0)),
            Method::Slerp { .. } if mixed => (1.0, 1.0 - lambda_at(&weights, lambda, recipe, &place)),
            Method::Slerp { t } => (1.0, at(t, 0.5)),
            _ => (1.0, 0.0),
        };
        if let Method::Sce { .. } = self.recipe.method {
            weights = self.prepared[index].weights.clone();
        }
        let grams = &self.prepared[index].grams;
        let coefficients: Option<Vec<Vec<f32>>> = grams
            .iter()
            .map(|gram| coefficients(&recipe.method, gram, &weights, t))
            .collect();
        Ok(Combination {
            coefficients: coefficients.ok_or_else(|| MergeError::Undefined {
                tensor: tensor.plan.name.clone(),
                detail: "the weighted sum of the parents' directions is 0".into(),
            })?,
            weights,
            scaling: scaling as f32,
            t: t as f32,
        })
    }
}

fn lambda_at(
    weights: &[f32],
    lambda: Option<f64>,
    recipe: &Recipe,
    place: &crate::setting::Place<'_>,
) -> f64 {
    use crate::recipe::Shares;
    match (lambda, recipe.mixup.as_ref().map(|m| &m.shares)) {
        (Some(lambda), _) => lambda,
        (None, Some(Shares::Lambda(lambda))) => lambda.at(place).unwrap_or(0.5),
        (None, Some(Shares::Each(shares))) => shares[0],
        (None, None) => weights.first().copied().map_or(0.5, f64::from),
    }
}

impl Point<'_, '_> {
    /// What the pass has to read: without deltas neither the base nor a parent of weight 0.
    pub(crate) fn needs(&self, tensor: usize) -> Needs {
        let out = &self.family.tensors()[tensor];
        match out.role {
            Role::Merge => {}
            Role::Excluded => {
                return Needs {
                    base: true,
                    members: vec![false; out.members.len()],
                };
            }
            Role::Copied => {
                return Needs {
                    base: false,
                    members: vec![false; out.members.len()],
                };
            }
        }
        let recipe = self.family.recipe;
        let by_weight = matches!(recipe.method, Method::Average { .. }) && !recipe.on_deltas();
        let base =
            recipe.on_deltas() || matches!(recipe.method, Method::NearSwap { .. } | Method::ArceeFusion);
        let weights = &self.tensors[tensor].weights;
        Needs {
            base: base && out.base.is_some(),
            members: weights.iter().map(|w| !by_weight || *w != 0.0).collect(),
        }
    }

    /// The same model, of which no statistics are wanted: its pass has less to do.
    pub fn unobserved(mut self) -> Self {
        self.observes = false;
        self
    }

    /// Bytes of the parents that the pass reads: not those whose weight is 0, nor a base that the method leaves alone.
    pub fn input_bytes(&self) -> u64 {
        let parents = self.family.parents;
        let of = |(index, tensor): (usize, &OutTensor)| {
            let needs = self.needs(index);
            let base = tensor.base.iter().filter(|_| needs.base);
            let members = tensor.members.iter().zip(&needs.members);
            let members = members.filter(|(_, need)| **need).map(|((_, input), _)| input);
            let needed: Vec<&Input> = base.chain(members).collect();
            let is_read = |input: &&Input| tensor.role == Role::Copied || needed.contains(input);
            let item = |input: &Input| dtype_size(parents.sources[input.source].get(&input.name)?.dtype);
            let read = tensor.inputs().into_iter().filter(is_read);
            read.filter_map(item).sum::<u64>() * tensor.plan.numel() as u64
        };
        self.family.tensors().iter().enumerate().map(of).sum()
    }

    /// Runs `run` with the pass that merges.
    pub(crate) fn stream<T>(&self, run: impl FnOnce(&Stream<'_>) -> T) -> T {
        run(&Stream {
            parents: self.family.parents,
            tensors: self.family.tensors(),
            means: &self.family.means,
            cut: self.family.cut,
            window: self.family.window,
            deltas: self.family.recipe.on_deltas(),
            scratches: &self.family.scratches,
            held: self.family.parents.held(),
            thinned: self.family.thinned(),
            observes: self.observes,
            needs: &|tensor| self.needs(tensor),
        })
    }

    /// Names of the result's tensors, in writing order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.family.tensors().iter().map(|t| t.plan.name.as_str())
    }

    /// One tensor as the merged checkpoint has it: its dtype, its shape and its little-endian bytes.
    pub fn tensor(
        &self,
        index: usize,
        obs: &dyn Observer,
    ) -> Result<(Dtype, Vec<usize>, Vec<u8>), MergeError> {
        let plan = &self.family.tensors()[index].plan;
        let mut all = Vec::with_capacity(plan.byte_len() as usize);
        self.write(&[index], obs, Vec::new, |_, bytes| all.extend(bytes))?;
        Ok((plan.dtype, plan.shape.clone(), all))
    }

    /// The bytes of all tensors, in writing order and in buffers of some MiB, each with what is in it. `spare` gives buffers to
    /// be used again: memory that was touched before is cheaper than new one.
    pub fn tensors(
        &self,
        obs: &dyn Observer,
        spare: impl FnMut() -> Vec<u8>,
        consume: impl FnMut(Vec<Part>, Vec<u8>),
    ) -> Result<(), MergeError> {
        let all: Vec<usize> = (0..self.tensors.len()).collect();
        self.write(&all, obs, spare, consume)
    }

    fn write(
        &self,
        which: &[usize],
        obs: &dyn Observer,
        spare: impl FnMut() -> Vec<u8>,
        mut consume: impl FnMut(Vec<Part>, Vec<u8>),
    ) -> Result<(), MergeError> {
        let part = |chunk: &Chunk| Part {
            tensor: chunk.tensor,
            len: chunk.len * self.family.tensors()[chunk.tensor].plan.item_bytes(),
        };
        self.stream(|stream| {
            stream.write_each(
                which,
                obs,
                spare,
                |work, scratch, chunk, out| self.merge(work, scratch, chunk, out),
                |window, _, bytes| {
                    consume(window.iter().map(part).collect(), bytes);
                    Ok(())
                },
            )
        })
    }

    /// Merges one loaded chunk into `out`, rounding once.
    pub(crate) fn merge(
        &self,
        work: &Work<'_>,
        scratch: &mut Scratch,
        chunk: Chunk,
        out: &mut [u8],
    ) -> Result<ChunkStats, MergeError> {
        let tensor = &self.family.tensors()[chunk.tensor];
        let plan = &tensor.plan;
        let mut stats = ChunkStats::default();
        if tensor.role == Role::Copied {
            self.copy(chunk, tensor, out)?;
            return Ok(stats);
        }
        let item = plan.item_bytes();
        let mut rest = out;
        let fusion = self.fusion(chunk.tensor, tensor);
        let together = fusion.as_ref().map_or(1, Fusion::together);
        work.unread_tiles(scratch, chunk, together, |mut unread| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(unread.tile().len * item);
            rest = later;
            if fusion
                .as_ref()
                .is_some_and(|fusion| fusion.merge(&mut unread, now))
            {
                return Ok(());
            }
            let tile = unread.fill()?;
            let values = match tensor.role {
                Role::Excluded => &tile.theta0,
                _ => {
                    self.compute(chunk.tensor, tensor, tile, &mut stats);
                    &tile.merged
                }
            };
            match narrow(plan.dtype, &values[..tile.len], now) {
                true => Ok(()),
                false => Err(MergeError::NonFinite {
                    tensor: plan.name.clone(),
                    dtype: dtype_name(plan.dtype).to_owned(),
                }),
            }
        })?;
        Ok(stats)
    }

    pub(crate) fn compute(&self, index: usize, tensor: &OutTensor, tile: &mut Tile, stats: &mut ChunkStats) {
        let family = self.family;
        let combination = &self.tensors[index];
        tile.merged.resize(tile.len, 0.0);
        match &family.recipe.method {
            Method::Ties { trim, normalize, .. } => {
                family.form_trimmed(index, tile);
                if tile.observed {
                    measure(tile, stats);
                }
                self.ties(tensor, tile, combination, trim, *normalize, stats);
                kernel::add_to_base(&tile.theta0, combination.scaling, &mut tile.merged);
            }
            Method::Sce { .. } => {
                family.form_selected(index, tile);
                observe(tile, stats);
                sce(tile, &combination.weights);
                kernel::add_to_base(&tile.theta0, 1.0, &mut tile.merged);
            }
            Method::NearSwap { .. } | Method::ArceeFusion => {
                family.form(index, tile);
                if family.recipe.on_deltas() {
                    observe(tile, stats);
                    kernel::add_to_base(&tile.theta0, 1.0, &mut tile.deltas[0]);
                    std::mem::swap(&mut tile.deltas[0], &mut tile.thetas[0]);
                }
                match family.recipe.method {
                    Method::NearSwap { .. } => {
                        kernel::nearswap(combination.t, &tile.theta0, &tile.thetas[0], &mut tile.merged);
                    }
                    _ => self.fuse(index, tensor, tile),
                }
            }
            method => {
                family.form(index, tile);
                if family.recipe.on_deltas() {
                    observe(tile, stats);
                }
                let (start, len) = (tile.start, tile.len);
                let mut merged = std::mem::take(&mut tile.merged);
                let inputs = operands(family, tile);
                match combination.coefficients.as_slice() {
                    [] => kernel::weighted_sum(&combination.weights, inputs, &mut merged),
                    coefficients => {
                        let row = row_len(&tensor.plan.shape).max(1);
                        combine(
                            granularity(method),
                            coefficients,
                            row,
                            start,
                            len,
                            inputs,
                            &mut merged,
                        );
                    }
                }
                tile.merged = merged;
                let divisor = divisor(method, &combination.weights, family.recipe.mixup.is_some());
                kernel::divide(&mut tile.merged, divisor);
                if family.over_deltas() {
                    kernel::add_to_base(&tile.theta0, combination.scaling, &mut tile.merged);
                }
            }
        }
    }

    fn ties(
        &self,
        tensor: &OutTensor,
        tile: &mut Tile,
        combination: &Combination,
        trim: &Trim,
        normalize: bool,
        stats: &mut ChunkStats,
    ) {
        let (mean, majority) = self.ties_mean(combination, trim, normalize);
        let deltas = &mut tile.deltas[..tensor.members.len()];
        let observed = tile.observed;
        let counts = kernel::ties(deltas, majority, mean, observed, &mut tile.merged, &mut tile.ties);
        if !observed {
            return;
        }
        stats.kept.resize(counts.kept.len(), 0);
        stats.kept.iter_mut().zip(&counts.kept).for_each(|(s, k)| *s += k);
        stats.conflicting += counts.conflicting;
    }

    pub(crate) fn ties_mean<'w>(
        &self,
        combination: &'w Combination,
        trim: &Trim,
        normalize: bool,
    ) -> (TiesMean<'w>, i8) {
        let weights = &combination.weights;
        match trim {
            _ if self.family.recipe.mixup.is_some() => (TiesMean::Mixup(weights), self.majority(trim)),
            Trim::Global { .. } => (TiesMean::Weighted(weights), self.majority(trim)),
            Trim::Tensor { .. } if normalize => (TiesMean::PremultipliedMean(weights), 1),
            Trim::Tensor { .. } => (TiesMean::Premultiplied(weights), 1),
        }
    }

    #[cfg(feature = "gpu")]
    pub(crate) fn ties_rules(
        &self,
        combination: &Combination,
        trim: &Trim,
        normalize: bool,
    ) -> kernel::TiesRules {
        let (mean, majority) = self.ties_mean(combination, trim, normalize);
        mean.rules(combination.weights.len(), majority)
    }

    #[cfg(feature = "gpu")]
    pub(crate) fn combination_of(&self, tensor: usize) -> &Combination {
        &self.tensors[tensor]
    }

    fn majority(&self, trim: &Trim) -> i8 {
        match trim {
            Trim::Global { .. } => self.family.majority,
            Trim::Tensor { .. } => 1,
        }
    }

    /// theta0 where the importance of the change lies below the threshold, else theta.
    fn fuse(&self, index: usize, tensor: &OutTensor, tile: &mut Tile) {
        let row = row_len(&tensor.plan.shape).max(1);
        let mut scores = std::mem::take(&mut tile.extra);
        importance(&tile.theta0, &tile.thetas[0], row, &mut scores);
        kernel::delta(&tile.theta0, &tile.thetas[0], &mut tile.merged);
        if let Some(edge) = self.family.prepared[index].select {
            erase(&scores, edge, tile.start, std::slice::from_mut(&mut tile.merged));
        }
        kernel::add_to_base(&tile.theta0, 1.0, &mut tile.merged);
        tile.extra = scores;
    }

    /// Integers and bools: the bytes of the reference, if all parents have the same.
    fn copy(&self, chunk: Chunk, tensor: &OutTensor, out: &mut [u8]) -> Result<(), MergeError> {
        let parents = self.family.parents;
        let dtype = tensor.plan.dtype;
        let at = (chunk.start * dtype_size(dtype).unwrap_or(1) as usize) as u64;
        let first = tensor.first_input();
        let label = |source: usize| parents.label(source);
        let mut other = vec![0u8; out.len()];
        for input in tensor.inputs() {
            let target = if input == first { &mut *out } else { &mut other };
            parents.sources[input.source]
                .read_into(&input.name, at, target)
                .map_err(|e| MergeError::parent(&label(input.source), e))?;
            if input != first && other != out {
                return Err(MergeError::IntegerTensor {
                    tensor: tensor.plan.name.clone(),
                    dtype: format!("{dtype:?}"),
                });
            }
        }
        self.stream(|stream| {
            for input in tensor.inputs() {
                if stream.wants_digest(tensor, input, chunk) {
                    let shape = &tensor.plan.shape;
                    parents
                        .log
                        .note(input.source, &input.name, shape, chunk.index, Digest::of(out));
                }
            }
        });
        Ok(())
    }
}

/// What the sum is divided by; 1 where it is not.
pub(crate) fn divisor(method: &Method, weights: &[f32], mixed: bool) -> f32 {
    let sum: f32 = weights.iter().sum();
    match method {
        Method::Average { normalize: true } if !mixed => sum,
        Method::TaskArithmetic { normalize: true, .. } if !mixed && sum.abs() >= 1e-8 => sum,
        _ => 1.0,
    }
}

/// `merged` = the combination of the inputs with coefficients that differ by row or by column.
fn combine(
    granularity: Granularity,
    coefficients: &[Vec<f32>],
    row: usize,
    start: usize,
    len: usize,
    inputs: &[Vec<f32>],
    merged: &mut [f32],
) {
    merged.fill(0.0);
    match (granularity, coefficients) {
        (Granularity::Tensor, [one]) | (Granularity::Column, [one]) => {
            kernel::weighted_sum(one, inputs, merged)
        }
        (Granularity::Column, columns) => {
            for (k, input) in inputs.iter().enumerate() {
                for i in 0..len {
                    merged[i] += columns[(start + i) % row][k] * input[i];
                }
            }
        }
        (_, rows) => {
            for from in (0..len).step_by(row) {
                let to = (from + row).min(len);
                for (c, input) in rows[(start + from) / row].iter().zip(inputs) {
                    kernel::add_scaled(*c, &input[from..to], &mut merged[from..to]);
                }
            }
        }
    }
}

/// SCE: the selected deltas that have the sign of their sum, weighted; over the sum of those weights.
fn sce(tile: &mut Tile, weights: &[f32]) {
    for i in 0..tile.len {
        let sum: f32 = tile.deltas.iter().map(|d| d[i]).sum();
        let positive = sum >= 0.0;
        let (mut merged, mut total) = (0f32, 0f32);
        for (d, w) in tile.deltas.iter().zip(weights) {
            let d = d[i];
            if (d > 0.0 && positive) || (d < 0.0 && !positive) {
                merged += d * w;
                total += w;
            }
        }
        tile.merged[i] = merged / total.max(1e-6);
    }
}

/// Norms of what the method starts from.
fn measure(tile: &Tile, stats: &mut ChunkStats) {
    let count = tile.deltas.len();
    stats.observed += tile.len as u64;
    stats.delta_squares.resize(count, 0.0);
    if let [a, b] = tile.deltas.as_slice() {
        let (a, b) = (&a[..tile.len], &b[..tile.len]);
        let base = &tile.theta0[..tile.len];
        let mut moments = kernel::moments(a, b, base);
        if !moments.iter().all(|moment| moment.is_finite()) {
            // Squares beyond f32.
            let dot = |x: &[f32], y: &[f32]| kernel::dot(x, y);
            moments = [dot(a, a), dot(b, b), dot(a, b), dot(base, base)];
        }
        let [squares_a, squares_b, product, base] = moments;
        stats.delta_squares[0] += squares_a;
        stats.delta_squares[1] += squares_b;
        stats.product += product;
        stats.base_squares += base;
        return;
    }
    for (sum, delta) in stats.delta_squares.iter_mut().zip(&tile.deltas) {
        *sum += squares(&delta[..tile.len]);
    }
    if let [a, b, ..] = tile.deltas.as_slice() {
        let (a, b) = (&a[..tile.len], &b[..tile.len]);
        let product = kernel::dot_f32(a, b);
        stats.product += if product.is_finite() {
            product
        } else {
            kernel::dot(a, b)
        };
    }
    stats.base_squares += squares(&tile.theta0[..tile.len]);
}

/// In f32 where they fit.
fn squares(values: &[f32]) -> f64 {
    let sum = kernel::sum_squares(values);
    if sum.is_finite() {
        sum
    } else {
        kernel::dot(values, values)
    }
}

/// As [`measure`], with what is kept and where signs conflict.
fn observe(tile: &Tile, stats: &mut ChunkStats) {
    if !tile.observed {
        return;
    }
    measure(tile, stats);
    stats.kept.resize(tile.deltas.len(), 0);
    for (kept, delta) in stats.kept.iter_mut().zip(&tile.deltas) {
        *kept += kernel::count_nonzero(&delta[..tile.len]);
    }
    stats.conflicting += kernel::conflicting(&tile.deltas, tile.len);
}
