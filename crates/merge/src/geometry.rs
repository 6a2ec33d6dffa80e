//! Methods on lengths and angles: inner products of the parents' tensors, and the coefficients that follow from them.
//!
//! Every one of these methods gives a combination of its inputs, and its coefficients depend on the inputs' inner products
//! only. So one pass forms the products, in f64, and the merge itself is the same pass as an average.
//!
//! Formulas: mergekit 0.1.5 (`merge_methods/{slerp,nuslerp,multislerp,karcher,model_stock}.py`); Model Stock arXiv 2403.19522.

use cauldron_checkpoint::row_len;

use crate::family::Family;
use crate::kernel;
use crate::recipe::{Granularity, Method};
use crate::stream::Tile;
use crate::{MergeError, Observer};

/// slerp: cosines beyond this are interpolated linearly.
const NEARLY_PARALLEL: f64 = 0.9995;

/// Inner products of K inputs: element i * K + j is that of inputs i and j.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Gram {
    count: usize,
    products: Vec<f64>,
}

impl Gram {
    fn new(count: usize) -> Self {
        Self {
            count,
            products: vec![0.0; count * count],
        }
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.products[i * self.count + j]
    }

    fn norm(&self, i: usize) -> f64 {
        self.at(i, i).sqrt()
    }

    fn add(&mut self, other: &Self) {
        self.products
            .iter_mut()
            .zip(&other.products)
            .for_each(|(a, b)| *a += b);
    }

    /// Adds the products of a run of elements.
    fn add_run(&mut self, inputs: &[Vec<f32>], from: usize, to: usize) {
        for i in 0..self.count {
            for j in i..self.count {
                let product = kernel::dot(&inputs[i][from..to], &inputs[j][from..to]);
                self.products[i * self.count + j] += product;
                if i != j {
                    self.products[j * self.count + i] += product;
                }
            }
        }
    }

    /// Adds the products of single elements, one Gram an element.
    fn add_columns(grams: &mut [Self], inputs: &[Vec<f32>], from: usize) {
        for (column, gram) in grams.iter_mut().enumerate() {
            for i in 0..gram.count {
                for j in 0..gram.count {
                    let product = f64::from(inputs[i][from + column]) * f64::from(inputs[j][from + column]);
                    gram.products[i * gram.count + j] += product;
                }
            }
        }
    }

    /// Length of the combination with these coefficients.
    fn length(&self, coefficients: &[f64]) -> f64 {
        let mut sum = 0.0;
        for i in 0..self.count {
            for j in 0..self.count {
                sum += coefficients[i] * coefficients[j] * self.at(i, j);
            }
        }
        sum.max(0.0).sqrt()
    }
}

/// What angles of a method are measured over.
pub(crate) fn granularity(method: &Method) -> Granularity {
    match method {
        Method::NuSlerp { granularity } | Method::ModelStock { granularity } => *granularity,
        _ => Granularity::Tensor,
    }
}

/// What the angles are between: deltas where the method forms them, else the tensors themselves.
pub(crate) fn operands<'t>(family: &Family<'_>, tile: &'t mut Tile) -> &'t [Vec<f32>] {
    if family.over_deltas() {
        return &tile.deltas;
    }
    if family.recipe.sparsify.is_some() {
        // The method runs on theta0 + sparse delta.
        for delta in &mut tile.deltas {
            kernel::add_to_base(&tile.theta0, 1.0, delta);
        }
        return &tile.deltas;
    }
    &tile.thetas
}

impl Family<'_> {
    /// Whether the method combines deltas and adds the base, or combines whole tensors.
    pub(crate) fn over_deltas(&self) -> bool {
        match self.recipe.method {
            Method::TaskArithmetic { .. }
            | Method::Ties { .. }
            | Method::Sce { .. }
            | Method::ModelStock { .. } => true,
            Method::NuSlerp { .. } | Method::MultiSlerp { .. } => self.recipe.base.is_some(),
            _ => false,
        }
    }

    /// One pass: the products of every tensor, row or column. They are added chunk by chunk, in order.
    pub(crate) fn find_grams(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        let merged = self.merged();
        let granularity = granularity(&self.recipe.method);
        let mut grams: Vec<Vec<Gram>> = vec![Vec::new(); self.tensors().len()];
        self.stream(|stream| {
            stream.for_each(
                &merged,
                obs,
                |work, scratch, chunk| {
                    let tensor = &self.tensors()[chunk.tensor];
                    let count = tensor.members.len();
                    let row = row_len(&tensor.plan.shape).max(1);
                    let columns = granularity == Granularity::Column && tensor.plan.shape.len() >= 2;
                    let mut parts = match (granularity, columns) {
                        (Granularity::Row, _) => Vec::new(),
                        (_, true) => vec![Gram::new(count); row],
                        _ => vec![Gram::new(count)],
                    };
                    work.tiles(scratch, chunk, |tile| {
                        self.form(chunk.tensor, tile);
                        let (start, len) = (tile.start, tile.len);
                        let inputs = operands(self, tile);
                        match granularity {
                            Granularity::Row => {
                                for from in (0..len).step_by(row) {
                                    let mut gram = Gram::new(count);
                                    gram.add_run(inputs, from, (from + row).min(len));
                                    parts.push(gram);
                                }
                            }
                            _ if columns => {
                                let mut from = 0;
                                while from < len {
                                    let column = (start + from) % row;
                                    let run = (row - column).min(len - from);
                                    Gram::add_columns(&mut parts[column..column + run], inputs, from);
                                    from += run;
                                }
                            }
                            _ => parts[0].add_run(inputs, 0, len),
                        }
                        Ok(())
                    })?;
                    Ok(parts)
                },
                |chunk, parts| {
                    let all = &mut grams[chunk.tensor];
                    if granularity == Granularity::Row || all.is_empty() {
                        all.extend(parts);
                    } else {
                        all.iter_mut().zip(&parts).for_each(|(all, part)| all.add(part));
                    }
                },
            )
        })?;
        for &t in &merged {
            self.prepared[t].grams = std::mem::take(&mut grams[t]);
        }
        self.advance(&merged, obs);
        self.advance_rest(obs);
        Ok(())
    }
}

/// The coefficients of one tensor, row or column. None: the method has no answer (antipodal inputs).
pub(crate) fn coefficients(method: &Method, gram: &Gram, weights: &[f32], t: f64) -> Option<Vec<f32>> {
    let found = match method {
        Method::Slerp { .. } => slerp(gram, t),
        Method::NuSlerp { .. } => nuslerp(gram, weights),
        Method::MultiSlerp { normalize } => multislerp(gram, weights, *normalize)?,
        Method::Karcher { max_iter, tolerance } => karcher(gram, *max_iter, *tolerance),
        _ => model_stock(gram),
    };
    Some(found.into_iter().map(|c| c as f32).collect())
}

fn arc(t: f64, theta: f64) -> Vec<f64> {
    vec![
        ((1.0 - t) * theta).sin() / theta.sin(),
        (t * theta).sin() / theta.sin(),
    ]
}

fn slerp(gram: &Gram, t: f64) -> Vec<f64> {
    let usable = |norm: f64| if norm > 1e-8 { norm } else { 1.0 };
    let cosine = (gram.at(0, 1) / (usable(gram.norm(0)) * usable(gram.norm(1)))).clamp(-1.0, 1.0);
    match cosine.abs() > NEARLY_PARALLEL {
        true => vec![1.0 - t, t],
        false => arc(t, cosine.acos()),
    }
}

fn nuslerp(gram: &Gram, weights: &[f32]) -> Vec<f64> {
    let total = f64::from(weights[0]) + f64::from(weights[1]);
    let t = if total.abs() < 1e-6 {
        0.5
    } else {
        f64::from(weights[1]) / total
    };
    let cosine = gram.at(0, 1) / (gram.norm(0).max(1e-7) * gram.norm(1).max(1e-7));
    let cosine = cosine.clamp(-1.0, 1.0);
    match 1.0 - cosine * cosine <= 1e-16 {
        true => vec![1.0 - t, t],
        false => arc(t, cosine.acos()),
    }
}

/// The tangent at the weighted mean of the unit vectors that the original interpolates along is 0: the mean is a multiple of
/// what it is the mean of. So the result is that mean, at the mean of the lengths.
fn multislerp(gram: &Gram, weights: &[f32], normalize: bool) -> Option<Vec<f64>> {
    const EPS: f64 = 1e-8;
    let mut weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    if gram.count == 1 {
        return Some(vec![1.0]);
    }
    if normalize {
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    let units: Vec<f64> = (0..gram.count)
        .map(|i| weights[i] / (gram.norm(i) + EPS))
        .collect();
    let length = gram.length(&units);
    if length < EPS {
        // Nobody changed anything: any coefficients give that.
        let all_zero = (0..gram.count).all(|i| gram.norm(i) == 0.0);
        return (gram.count == 2 || all_zero).then_some(weights);
    }
    let average: f64 = (0..gram.count).map(|i| gram.norm(i) * weights[i]).sum();
    Some(units.into_iter().map(|u| average * u / length).collect())
}

/// Iterates on the coefficients of the mean over the unit vectors.
fn karcher(gram: &Gram, max_iter: u64, tolerance: f64) -> Vec<f64> {
    let count = gram.count;
    if count == 1 {
        return vec![1.0];
    }
    let norms: Vec<f64> = (0..count).map(|i| gram.norm(i)).collect();
    let share = 1.0 / count as f64;
    let valid: Vec<usize> = (0..count).filter(|i| norms[*i] > tolerance).collect();
    if valid.is_empty() {
        return vec![0.0; count];
    }
    let alpha = 1.0 / valid.len() as f64;
    let unit = |i: usize, j: usize| gram.at(i, j) / (norms[i] * norms[j]);
    let product = |a: &[f64], j: usize| valid.iter().map(|i| a[*i] * unit(*i, j)).sum::<f64>();
    let length = |a: &[f64]| {
        let sum: f64 = valid.iter().map(|j| a[*j] * product(a, *j)).sum();
        sum.max(0.0).sqrt()
    };
    let mut mean = vec![0.0; count];
    valid.iter().for_each(|i| mean[*i] = alpha);
    let norm = length(&mean);
    if norm < tolerance {
        mean = vec![0.0; count];
        mean[valid[0]] = 1.0;
    } else {
        mean.iter_mut().for_each(|m| *m /= norm);
    }
    for _ in 0..max_iter {
        let mut tangent = vec![0.0; count];
        for &j in &valid {
            let cosine = product(&mean, j).clamp(-1.0, 1.0);
            let theta = cosine.acos();
            if theta < tolerance {
                continue;
            }
            let factor = alpha * theta / theta.sin();
            tangent[j] += factor;
            for (t, m) in tangent.iter_mut().zip(&mean) {
                *t -= factor * cosine * m;
            }
        }
        let norm = length(&tangent);
        if norm < tolerance {
            break;
        }
        for (m, t) in mean.iter_mut().zip(&tangent) {
            *m = norm.cos() * *m + norm.sin() * t / norm;
        }
        let norm = length(&mean);
        if norm > tolerance {
            mean.iter_mut().for_each(|m| *m /= norm);
        }
    }
    let scale: f64 = norms.iter().map(|n| share * n).sum();
    (0..count)
        .map(|i| {
            if valid.contains(&i) {
                scale * mean[i] / norms[i]
            } else {
                0.0
            }
        })
        .collect()
}

fn model_stock(gram: &Gram) -> Vec<f64> {
    let count = gram.count;
    let mut cosines = Vec::new();
    for i in 0..count {
        for j in i + 1..count {
            let lengths = (gram.norm(i) * gram.norm(j)).max(1e-6);
            cosines.push((gram.at(i, j) / lengths).clamp(-1.0, 1.0));
        }
    }
    let cosine = cosines.iter().sum::<f64>() / cosines.len().max(1) as f64;
    let denominator = 1.0 + (count as f64 - 1.0) * cosine;
    let t = match denominator.abs() < 1e-6 {
        true => 0.0,
        false => count as f64 * cosine / denominator,
    };
    vec![t / count as f64; count]
}
