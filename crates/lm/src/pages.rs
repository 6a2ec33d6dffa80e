//! Large zeros straight from the system. Its pages come as they are first written and go back when the value is dropped; an
//! allocator may hand out memory that was used before, and then all of it is written at once, used or not.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Less is as well left to the allocator.
const LEAST_BYTES: usize = 256 << 10;
/// From here on large pages are asked for where all of it will be written.
const LARGE_BYTES: usize = 4 << 20;

/// A slice of zeros at first.
pub(crate) struct Zeroed<T> {
    memory: Memory<T>,
}

enum Memory<T> {
    System(MmapMut, PhantomData<T>),
    Heap(Vec<T>),
}

impl<T: Pod> Zeroed<T> {
    /// Of which perhaps little is ever written.
    pub(crate) fn sparse(len: usize) -> Self {
        let map = len
            .checked_mul(size_of::<T>())
            .filter(|bytes| *bytes >= LEAST_BYTES)
            .and_then(|bytes| MmapMut::map_anon(bytes).ok());
        let memory = match map {
            Some(map) => Memory::System(map, PhantomData),
            // What is too much for the system is too much for the allocator, which says so.
            None => Memory::Heap(vec![T::zeroed(); len]),
        };
        Self { memory }
    }

    /// Of which all will be written.
    pub(crate) fn dense(len: usize) -> Self {
        let zeroed = Self::sparse(len);
        #[cfg(target_os = "linux")]
        if let Memory::System(map, _) = &zeroed.memory
            && map.len() >= LARGE_BYTES
        {
            // It may have none.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        zeroed
    }
}

impl<T: Pod> Deref for Zeroed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.memory {
            Memory::System(map, _) => bytemuck::cast_slice(map),
            Memory::Heap(values) => values,
        }
    }
}

impl<T: Pod> DerefMut for Zeroed<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::System(map, _) => bytemuck::cast_slice_mut(map),
            Memory::Heap(values) => values,
        }
    }
}

impl<T> std::fmt::Debug for Zeroed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = match &self.memory {
            Memory::System(map, _) => map.len(),
            Memory::Heap(values) => size_of_val(&values[..]),
        };
        write!(f, "Zeroed({bytes} bytes)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sizes_are_zeros_that_can_be_written() {
        for len in [0usize, 1, 1000, 1 << 17, 1 << 18, 3 << 17] {
            for mut values in [Zeroed::<[u16; 16]>::sparse(len), Zeroed::dense(len)] {
                assert_eq!(values.len(), len);
                assert!(values.iter().all(|value| *value == [0; 16]));
                if let Some(last) = values.last_mut() {
                    last[15] = 7;
                }
                assert_eq!(
                    values.iter().map(|v| usize::from(v[15])).sum::<usize>(),
                    7 * len.min(1)
                );
            }
        }
    }
}
