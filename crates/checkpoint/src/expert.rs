//! A model as it is named by a reference `checkpoint[+adapter]`: the adapter's delta is folded in while
//! reading, so no merged copy has to exist.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use safetensors::Dtype;

use crate::held::buffer;
use crate::{
    Adapter, Checkpoint, CheckpointError, Digest, HeldWeights, Hold, Keeper, LetGo, LoraFactors, Place,
    dtype_size, narrow, widen,
};

/// Elements that are folded together, by one thread.
const BLOCK: usize = 1 << 18;

/// A checkpoint with an optional LoRA adapter.
#[derive(Debug)]
pub struct Expert {
    checkpoint: Arc<Checkpoint>,
    adapter: Option<(Adapter, PathBuf)>,
    folded: Place,
}

impl Expert {
    pub fn open(dir: &Path, adapter: Option<&Path>) -> Result<Self, CheckpointError> {
        Self::over(Arc::new(Checkpoint::open(dir)?), adapter)
    }

    /// An expert over a checkpoint that is open already.
    pub fn over(checkpoint: Arc<Checkpoint>, adapter: Option<&Path>) -> Result<Self, CheckpointError> {
        let adapter = match adapter {
            None => None,
            Some(dir) => {
                let adapter = Adapter::open(dir)?;
                adapter.check_against(checkpoint.tensors())?;
                Some((adapter, dir.to_owned()))
            }
        };
        Ok(Self {
            checkpoint,
            adapter,
            folded: Place::default(),
        })
    }

    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref().map(|(adapter, _)| adapter)
    }

    /// The LoRA factors of one tensor, or None if nothing is to be folded into it.
    pub fn factors(&self, tensor: &str) -> Result<Option<LoraFactors>, CheckpointError> {
        match &self.adapter {
            Some((adapter, _)) => adapter.factors(tensor),
            None => Ok(None),
        }
    }

    /// A whole float tensor as f32. With an adapter the sum is rounded to the checkpoint's dtype, so that
    /// serving `base+adapter` gives the weights that the folded checkpoint on disk has.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let mut values = self.checkpoint.read_f32(name)?;
        if let (Some(factors), Some(info)) = (self.factors(name)?, self.checkpoint.get(name)) {
            factors.fold(0, &mut values);
            let mut bytes = vec![0u8; info.byte_len() as usize];
            if !narrow(info.dtype, &values, &mut bytes) {
                return Err(CheckpointError::Tensor {
                    tensor: name.to_owned(),
                    detail: "is not finite with the adapter".into(),
                });
            }
            widen(info.dtype, &bytes, &mut values);
        }
        Ok(values)
    }

    /// Digest of checkpoint and adapter; that of the checkpoint alone where there is no adapter.
    pub fn content_digest(&self, advance: &(dyn Fn(u64) -> bool + Sync)) -> Result<Digest, CheckpointError> {
        let checkpoint = self.checkpoint.content_digest(&BTreeMap::new(), advance)?;
        self.with_adapter_digest(checkpoint)
    }

    /// [`Self::content_digest`] where the checkpoint's own digest is known.
    pub fn with_adapter_digest(&self, checkpoint: Digest) -> Result<Digest, CheckpointError> {
        let Some((adapter, _)) = &self.adapter else {
            return Ok(checkpoint);
        };
        let mut hasher = blake3::Hasher::new_derive_key("cauldron expert content v1");
        hasher.update(checkpoint.as_bytes());
        hasher.update(adapter.content_digest()?.as_bytes());
        Ok(hasher.finalize().into())
    }

    /// A cheap fingerprint of the files: equal while nothing was written to them.
    pub fn identity(&self) -> Result<String, CheckpointError> {
        let checkpoint = self.checkpoint.identity()?;
        match &self.adapter {
            None => Ok(checkpoint),
            Some((adapter, dir)) => Ok(format!("{checkpoint}+{}", adapter.identity(dir)?)),
        }
    }
    /// Whether [`Self::identity`] may be kept: see [`Checkpoint::is_settled`].
    pub fn is_settled(&self) -> Result<bool, CheckpointError> {
        let adapter = match &self.adapter {
            None => true,
            Some((adapter, dir)) => adapter.is_settled(dir)?,
        };
        Ok(adapter && self.checkpoint.is_settled()?)
    }

    /// Some elements of a tensor that the adapter changes as little-endian f32, of weights that [`Hold::read_all`] of this
    /// expert gave; None for other tensors.
    pub fn folded<'h>(
        &self,
        held: &'h HeldWeights,
        tensor: &str,
        elements: Range<usize>,
    ) -> Option<&'h [u8]> {
        let place = self.adapter()?.place_of(tensor)?;
        held.bytes(place, 4 * elements.start..4 * elements.end)
    }

    /// Folds one tensor into little-endian f32.
    fn fold_all(
        &self,
        adapter: &Adapter,
        tensor: &str,
        out: &mut [u8],
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), CheckpointError> {
        let Some((factors, info)) = adapter.factors(tensor)?.zip(self.checkpoint.get(tensor)) else {
            return Ok(());
        };
        let item = dtype_size(info.dtype).unwrap_or(4) as usize;
        let blocks = out.par_chunks_mut(4 * BLOCK).enumerate();
        let buffers = || (Vec::new(), Vec::new());
        blocks.try_for_each_init(buffers, |(bytes, values), (index, out)| {
            if !go_on() {
                return Err(CheckpointError::Cancelled);
            }
            let start = index * BLOCK;
            bytes.resize(out.len() / 4 * item, 0);
            values.resize(out.len() / 4, 0.0);
            self.checkpoint.read_into(tensor, (start * item) as u64, bytes)?;
            // Whoever reads the values finds out whether they are finite.
            widen(info.dtype, bytes, values);
            factors.fold(start, values);
            narrow(Dtype::F32, values, out);
            Ok(())
        })
    }
}

impl LetGo for Expert {
    fn place(&self) -> &Place {
        &self.folded
    }
}

/// Of an expert with an adapter: the tensors that the adapter changes, as the f32 numbers that it makes of them.
impl Hold for Expert {
    fn identity(&self) -> Result<String, CheckpointError> {
        self.identity()
    }

    fn bytes_to_hold(&self) -> u64 {
        let sizes = self.adapter().into_iter().flat_map(Adapter::sizes);
        sizes.map(|(_, elements)| 4 * elements as u64).sum()
    }

    fn read_all(
        &self,
        go_on: &(dyn Fn() -> bool + Sync),
        keeper: Box<dyn Keeper>,
    ) -> Result<HeldWeights, CheckpointError> {
        let fold = |adapter: &Adapter, tensor: &str, elements: usize| {
            let mut out = buffer(4 * elements as u64, tensor)?;
            self.fold_all(adapter, tensor, &mut out, go_on)?;
            Ok(out)
        };
        let folded = self.adapter().map(|adapter| {
            let sizes = adapter.sizes();
            sizes
                .map(|(tensor, elements)| fold(adapter, tensor, elements))
                .collect()
        });
        Ok(HeldWeights::new(folded.transpose()?.unwrap_or_default(), keeper))
    }
}
