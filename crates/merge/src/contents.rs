//! Content digests of the parents, made from the chunks that a merge reads anyway: a first merge of new parents reads them
//! once, not once more for their digests.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use cauldron_checkpoint::{Checkpoint, CheckpointError, Chunks, Digest, tensor_digest};

/// The content digest of one source, once it is known.
#[derive(Debug)]
pub(crate) struct SourceContent {
    /// State of the files when they were opened.
    pub identity: String,
    /// Whether the identity may be kept beyond this process.
    pub settled: bool,
    pub digest: OnceLock<Digest>,
}

impl SourceContent {
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        Ok(Self {
            identity: checkpoint.identity()?,
            settled: checkpoint.is_settled()?,
            digest: OnceLock::new(),
        })
    }
}

/// Digests of the chunks that were seen, by source and tensor.
#[derive(Debug, Default)]
pub(crate) struct ChunkLog(Mutex<BTreeMap<(usize, String), Seen>>);

#[derive(Debug)]
enum Seen {
    Some {
        chunks: Vec<Option<Digest>>,
        left: usize,
    },
    All(Digest),
}

impl ChunkLog {
    /// Whether the digest of a chunk is still of use.
    pub fn wants(&self, source: usize, tensor: &str, chunk: usize) -> bool {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match log.get(&(source, tensor.to_owned())) {
            None => true,
            Some(Seen::All(_)) => false,
            Some(Seen::Some { chunks, .. }) => chunks.get(chunk).is_some_and(Option::is_none),
        }
    }

    pub fn note(&self, source: usize, tensor: &str, shape: &[usize], chunk: usize, digest: Digest) {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = log.entry((source, tensor.to_owned())).or_insert_with(|| {
            let count = Chunks::of(shape).count();
            Seen::Some {
                chunks: vec![None; count],
                left: count,
            }
        });
        if let Seen::Some { chunks, left } = seen
            && let Some(slot @ None) = chunks.get_mut(chunk)
        {
            *slot = Some(digest);
            *left -= 1;
            if *left == 0 {
                let all: Vec<Digest> = chunks.iter().copied().flatten().collect();
                *seen = Seen::All(tensor_digest(&all));
            }
        }
    }

    /// The tensors of a source that were seen in full.
    pub fn tensors(&self, source: usize) -> BTreeMap<String, Digest> {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = log.iter().filter_map(|((of, name), seen)| match seen {
            Seen::All(digest) if *of == source => Some((name.clone(), *digest)),
            _ => None,
        });
        whole.collect()
    }
}
