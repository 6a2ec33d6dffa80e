//! A model as it is named by a reference `checkpoint[+adapter]`: the adapter's delta is folded in while
//! reading, so no merged copy has to exist.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Adapter, Checkpoint, CheckpointError, Digest, LoraFactors, narrow, widen};

/// A checkpoint with an optional LoRA adapter.
#[derive(Debug, Clone)]
pub struct Expert {
    checkpoint: Arc<Checkpoint>,
    adapter: Option<(Arc<Adapter>, PathBuf)>,
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
                Some((Arc::new(adapter), dir.to_owned()))
            }
        };
        Ok(Self { checkpoint, adapter })
    }

    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref().map(|(adapter, _)| &**adapter)
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
}
