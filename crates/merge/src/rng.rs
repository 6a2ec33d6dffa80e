//! Philox4x32-10, the counter-based generator of drop masks: any element's bits can be had alone, so thread
//! count, shard order and device do not matter.
//!
//! Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Random123.

use crate::kernel::wide;

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Ten rounds of Philox4x32, one counter: the oracle of [`MaskWords::fill`].
#[cfg(test)]
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
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

/// The random words of one tensor of one parent: one u32 an element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskWords {
    key: [u32; 2],
}

impl MaskWords {
    /// The key comes from (seed, index of the parent in the recipe, tensor name).
    pub fn new(seed: u64, parent: usize, tensor: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("cauldron drop mask v1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(parent as u64).to_le_bytes());
        hasher.update(tensor.as_bytes());
        let hash = *hasher.finalize().as_bytes();
        let word = |at: usize| u32::from_le_bytes([hash[at], hash[at + 1], hash[at + 2], hash[at + 3]]);
        Self {
            key: [word(0), word(4)],
        }
    }

    #[cfg(feature = "cuda")]
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// Words of elements `start..start + len` of the flattened tensor: `words[skip + i]` is that of element `start + i`.
    /// Returns `skip`.
    pub fn fill(&self, start: usize, len: usize, words: &mut Vec<u32>) -> usize {
        let first = (start / 4) as u64;
        let blocks = ((start + len).div_ceil(4) as u64 - first) as usize;
        words.resize(blocks.next_multiple_of(LANES) * 4, 0);
        philox_blocks(self.key, first, words);
        start % 4
    }
}

/// Counters that are computed side by side.
const LANES: usize = 8;

wide! {
    /// Four words for each counter from `first` on. Every word lies in 64 bits, of which the upper half is not looked at: so
    /// a multiplication of 32 bits by 32 needs no shuffles.
    fn philox_blocks<'a>(key: [u32; 2], first: u64, words: &'a mut [u32]) {
        const LOW: u64 = 0xffff_ffff;
        let mut k = key;
        let keys: [[u64; 2]; 10] = std::array::from_fn(|_| {
            let now = k.map(u64::from);
            k = [k[0].wrapping_add(W0), k[1].wrapping_add(W1)];
            now
        });
        for (group, out) in words.as_chunks_mut::<{ LANES * 4 }>().0.iter_mut().enumerate() {
            let start = first + (group * LANES) as u64;
            let (mut c0, mut c1, mut c2, mut c3) = ([0u64; LANES], [0u64; LANES], [0u64; LANES], [0u64; LANES]);
            for lane in 0..LANES {
                c0[lane] = start + lane as u64;
                c1[lane] = (start + lane as u64) >> 32;
            }
            for [k0, k1] in keys {
                for lane in 0..LANES {
                    let p0 = u64::from(M0) * (c0[lane] & LOW);
                    let p1 = u64::from(M1) * (c2[lane] & LOW);
                    c0[lane] = (p1 >> 32) ^ c1[lane] ^ k0;
                    c1[lane] = p1;
                    c2[lane] = (p0 >> 32) ^ c3[lane] ^ k1;
                    c3[lane] = p0;
                }
            }
            for (lane, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let (low, high) = (c0[lane] & LOW | c1[lane] << 32, c2[lane] & LOW | c3[lane] << 32);
                *out = [low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32];
            }
        }
    }
}

/// An element is dropped where its word is below this: u < p * 2^32 for an integer u is u < ceil(p * 2^32).
pub(crate) fn drop_threshold(drop_rate: f64) -> u64 {
    (drop_rate * 4_294_967_296.0).ceil() as u64
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

    fn words(mask: MaskWords, start: usize, len: usize) -> Vec<u32> {
        let mut words = Vec::new();
        let skip = mask.fill(start, len, &mut words);
        words[skip..skip + len].to_vec()
    }

    #[test]
    fn a_mask_does_not_depend_on_where_it_is_cut() {
        let mask = MaskWords::new(3, 1, "w");
        let whole = words(mask, 0, 1001);
        for cut in [1, 2, 3, 4, 5, 500] {
            let mut parts = words(mask, 0, cut);
            parts.extend(words(mask, cut, 1001 - cut));
            assert_eq!(parts, whole);
        }
        for (index, word) in whole.iter().enumerate() {
            assert_eq!(*word, philox([(index / 4) as u32, 0, 0, 0], mask.key)[index % 4]);
        }
        let far = (1usize << 34) + 2;
        assert_eq!(words(mask, far, 1)[0], philox([0, 1, 0, 0], mask.key)[2]);
    }

    #[test]
    fn the_drop_rate_is_met_and_parents_and_tensors_have_masks_of_their_own() {
        let bits = |seed, parent, name| -> Vec<bool> {
            let threshold = drop_threshold(0.2);
            let words = words(MaskWords::new(seed, parent, name), 0, 100_000);
            words
                .into_iter()
                .map(|word| u64::from(word) < threshold)
                .collect()
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
