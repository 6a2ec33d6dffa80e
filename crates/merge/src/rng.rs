//! Philox4x32-10, the counter-based generator of drop masks: any element's bits can be had alone, so thread
//! count, shard order and device do not matter.
//!
//! Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Random123.

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Ten rounds of Philox4x32.
pub(crate) fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(M0) * u64::from(counter[0]);
        let p1 = u64::from(M1) * u64::from(counter[2]);
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
    }
    counter
}

/// The drop mask of one tensor of one parent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DropMask {
    key: [u32; 2],
    /// An element is dropped where its u32 is below this.
    threshold: u64,
}

impl DropMask {
    /// The key comes from (seed, index of the parent in the recipe, tensor name).
    pub fn new(seed: u64, parent: usize, tensor: &str, drop_rate: f64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("cauldron drop mask v1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(parent as u64).to_le_bytes());
        hasher.update(tensor.as_bytes());
        let hash = *hasher.finalize().as_bytes();
        let word = |at: usize| u32::from_le_bytes([hash[at], hash[at + 1], hash[at + 2], hash[at + 3]]);
        Self {
            key: [word(0), word(4)],
            // u < p * 2^32 for an integer u is u < ceil(p * 2^32).
            threshold: (drop_rate * 4_294_967_296.0).ceil() as u64,
        }
    }

    /// Calls `each(i, dropped)` for elements `start..start + len` of the flattened tensor.
    pub fn visit(&self, start: usize, len: usize, mut each: impl FnMut(usize, bool)) {
        let mut index = start as u64;
        let end = index + len as u64;
        while index < end {
            let block = index / 4;
            let bits = philox([block as u32, (block >> 32) as u32, 0, 0], self.key);
            let stop = end.min((block + 1) * 4);
            while index < stop {
                let dropped = u64::from(bits[(index % 4) as usize]) < self.threshold;
                each((index - start as u64) as usize, dropped);
                index += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_mask_does_not_depend_on_where_it_is_cut() {
        let mask = DropMask::new(3, 1, "w", 0.3);
        let mut whole = vec![false; 1001];
        mask.visit(0, 1001, |i, d| whole[i] = d);
        for cut in [1, 2, 3, 4, 5, 500] {
            let mut parts = vec![false; 1001];
            mask.visit(0, cut, |i, d| parts[i] = d);
            mask.visit(cut, 1001 - cut, |i, d| parts[cut + i] = d);
            assert_eq!(parts, whole);
        }
    }

    #[test]
    fn the_drop_rate_is_met_and_parents_and_tensors_have_masks_of_their_own() {
        let bits = |seed, parent, name| {
            let mut out = vec![false; 100_000];
            DropMask::new(seed, parent, name, 0.2).visit(0, 100_000, |i, d| out[i] = d);
            out
        };
        let first = bits(0, 0, "w");
        let dropped = first.iter().filter(|d| **d).count() as f64 / 1e5;
        assert!((dropped - 0.2).abs() < 0.005, "{dropped}");
        for other in [bits(1, 0, "w"), bits(0, 1, "w"), bits(0, 0, "v")] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count() as f64 / 1e5;
            assert!((same - 0.68).abs() < 0.01, "{same}");
        }
    }
}
