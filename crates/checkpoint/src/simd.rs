//! The one place that chooses instructions: loops written once are compiled for the baseline, AVX2 and AVX-512, and the
//! widest that this machine has runs. The results are the same bits everywhere: Rust neither contracts a multiplication
//! and an addition into one, nor reorders sums.
#![allow(unsafe_code)]

/// A loop over slices. `run` and all it calls in its loops must be `#[inline(always)]`, or they are compiled for the
/// smallest machine.
pub trait Loop {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs `work` with the widest instructions of this machine.
#[inline]
pub fn widest<L: Loop>(work: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the machine has the four features that the function was compiled for.
            return unsafe { with_avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has the feature that the function was compiled for.
            return unsafe { with_avx2(work) };
        }
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2")]
fn with_avx512<L: Loop>(work: L) -> L::Output {
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<L: Loop>(work: L) -> L::Output {
    work.run()
}
