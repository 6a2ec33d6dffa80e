//! How a tensor is cut for reading, hashing and merging. The cut follows from the shape alone, so that digests and sums
//! that are made chunk by chunk do not depend on dtype, shard layout or threads.

use std::ops::Range;

/// Elements that a chunk has at most, unless one row is longer.
pub const CHUNK_ELEMENTS: usize = 64 << 10;
/// Rows longer than this are cut like vectors.
pub const LONGEST_ROW: usize = 4 << 20;

/// The chunks of one tensor: runs of elements of the flattened tensor, whole rows where it has rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks {
    numel: usize,
    chunk: usize,
}

impl Chunks {
    pub fn of(shape: &[usize]) -> Self {
        let numel = shape.iter().product();
        let row = row_len(shape);
        let chunk = match shape.len() >= 2 && (1..=LONGEST_ROW).contains(&row) {
            true => row * (CHUNK_ELEMENTS / row).max(1),
            false => CHUNK_ELEMENTS,
        };
        Self { numel, chunk }
    }

    /// The whole tensor as one chunk.
    pub fn whole(shape: &[usize]) -> Self {
        let numel = shape.iter().product();
        Self { numel, chunk: numel }
    }

    /// Number of chunks; 0 for an empty tensor.
    pub fn count(&self) -> usize {
        match self.chunk {
            0 => 0,
            chunk => self.numel.div_ceil(chunk),
        }
    }

    /// Elements of chunk `index`.
    pub fn range(&self, index: usize) -> Range<usize> {
        let start = index * self.chunk;
        start..self.numel.min(start + self.chunk)
    }
}

/// Whether no row of a tensor of this shape is cut.
pub fn has_whole_rows(shape: &[usize]) -> bool {
    shape.len() < 2 || row_len(shape) <= LONGEST_ROW
}

/// Elements of one row: all dimensions but the first; of a vector or a scalar, the whole tensor.
pub fn row_len(shape: &[usize]) -> usize {
    match shape {
        [] => 1,
        [len] => *len,
        [_, rest @ ..] => rest.iter().product(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_a_tensor_in_whole_rows() {
        for shape in [
            vec![],
            vec![1],
            vec![200_000],
            vec![0, 4],
            vec![4, 0],
            vec![300, 2048],
            vec![3, 100_000],
            vec![2, 5 << 20],
            vec![7, 3, 5000],
        ] {
            let chunks = Chunks::of(&shape);
            let mut next = 0;
            for index in 0..chunks.count() {
                let range = chunks.range(index);
                assert_eq!(range.start, next);
                assert!(!range.is_empty());
                if shape.len() >= 2 && row_len(&shape) <= LONGEST_ROW {
                    assert_eq!(range.len() % row_len(&shape), 0, "{shape:?}");
                }
                next = range.end;
            }
            assert_eq!(next, shape.iter().product::<usize>());
        }
    }
}
