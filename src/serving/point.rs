//! The weights of a point as a decoder reads them: tensors in the memory that the pass over the parents filled.

use std::collections::HashMap;
use std::ops::Range;

use cauldron_checkpoint::{Dtype, widen};
use cauldron_lm::{LmError, WeightSource};
use cauldron_merge::{MergeError, Observer, Parents, Point};

/// The tensors of a result that is not there yet.
pub(super) struct Shapes<'a>(HashMap<&'a str, Place<'a>>);

pub(super) struct Place<'a> {
    pub index: usize,
    pub dtype: Dtype,
    shape: &'a [usize],
}

impl<'a> Shapes<'a> {
    pub fn of(parents: &'a Parents) -> Self {
        let tensors = parents.result_tensors().enumerate();
        let place = |(index, (name, dtype, shape))| (name, Place { index, dtype, shape });
        Self(tensors.map(place).collect())
    }

    pub fn place(&self, name: &str) -> Result<&Place<'a>, LmError> {
        self.0.get(name).ok_or_else(|| LmError::missing_tensor(name))
    }
}

impl Place<'_> {
    /// The numbers of its bytes.
    pub fn widen(&self, bytes: &[u8]) -> Vec<f32> {
        let size = cauldron_checkpoint::dtype_size(self.dtype).unwrap_or(1) as usize;
        let mut values = vec![0f32; bytes.len() / size];
        widen(self.dtype, bytes, &mut values);
        values
    }
}

impl WeightSource for Shapes<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|tensor| tensor.shape.to_vec())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
        Err(LmError::missing_tensor(name))
    }
}

/// A point as a decoder reads it.
pub(super) struct PointWeights<'a> {
    tensors: Shapes<'a>,
    pub buffers: Vec<Vec<u8>>,
    /// By tensor, in order: which buffer, and where in it.
    runs: Vec<Vec<(usize, Range<usize>)>>,
}

impl WeightSource for PointWeights<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.shape(name)
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
        let mut bytes = Vec::new();
        let place = self.append(name, &mut bytes)?;
        Ok(place.widen(&bytes))
    }

    fn read_bf16(&self, name: &str, out: &mut Vec<u8>) -> Result<bool, LmError> {
        match self.tensors.0.get(name) {
            Some(tensor) if tensor.dtype == Dtype::BF16 => self.append(name, out).map(|_| true),
            _ => Ok(false),
        }
    }

    fn bf16_pieces(&self, name: &str) -> Option<Vec<&[u8]>> {
        let tensor = self
            .tensors
            .0
            .get(name)
            .filter(|tensor| tensor.dtype == Dtype::BF16)?;
        let runs = self.runs[tensor.index].iter();
        Some(
            runs.map(|(buffer, range)| &self.buffers[*buffer][range.clone()])
                .collect(),
        )
    }
}

impl<'a> PointWeights<'a> {
    /// The pass over the parents.
    pub fn compute(
        point: &Point<'_, '_>,
        parents: &'a Parents,
        until: &dyn Observer,
        spare: &mut Vec<Vec<u8>>,
    ) -> Result<Self, MergeError> {
        let tensors = Shapes::of(parents);
        let mut buffers = Vec::new();
        let mut runs = vec![Vec::new(); parents.result_tensors().count()];
        let take = || spare.pop().unwrap_or_default();
        point.tensors(until, take, |parts, bytes| {
            let mut start = 0;
            for part in parts {
                runs[part.tensor].push((buffers.len(), start..start + part.len));
                start += part.len;
            }
            buffers.push(bytes);
        })?;
        Ok(Self {
            tensors,
            buffers,
            runs,
        })
    }

    fn append(&self, name: &str, out: &mut Vec<u8>) -> Result<&Place<'a>, LmError> {
        let place = self.tensors.place(name)?;
        for (buffer, range) in &self.runs[place.index] {
            out.extend_from_slice(&self.buffers[*buffer][range.clone()]);
        }
        Ok(place)
    }
}
