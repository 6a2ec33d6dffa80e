//! Compiles the kernels with nvcc into one file each, which the crate embeds: machine code of the GPU that
//! CUDA_COMPUTE_CAP names (90: H100, H200), and its PTX, which the driver compiles for any newer one.

use std::path::{Path, PathBuf};
use std::process::Command;

const KERNELS: [(&str, &[&str]); 2] = [
    // Products and sums stay apart, so that a merge has the same bytes as on the CPU.
    ("merge", &["--fmad=false"]),
    ("decoder", &[]),
];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_PATH", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    for (name, flags) in KERNELS {
        if let Err(error) = compile(name, flags, &out) {
            println!("cargo::error={error}");
        }
    }
}

fn compile(name: &str, flags: &[&str], out: &Path) -> Result<(), String> {
    let nvcc = nvcc();
    let cap = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "90".to_owned());
    let run = Command::new(&nvcc)
        .args(["--fatbin", "-O3"])
        .arg(format!(
            "-gencode=arch=compute_{cap},code=[sm_{cap},compute_{cap}]"
        ))
        .args(flags)
        .arg("-o")
        .arg(out.join(format!("{name}.fatbin")))
        .arg(format!("kernels/{name}.cu"))
        .output()
        .map_err(|e| format!("{} cannot be run ({e}); set NVCC or CUDA_PATH", nvcc.display()))?;
    match run.status.success() {
        true => Ok(()),
        false => Err(format!(
            "nvcc failed on kernels/{name}.cu: {}",
            String::from_utf8_lossy(&run.stderr).replace('\n', " ")
        )),
    }
}

fn nvcc() -> PathBuf {
    let toolkit = || {
        let folder = std::env::var_os("CUDA_PATH").or_else(|| std::env::var_os("CUDA_HOME"))?;
        Some(PathBuf::from(folder).join("bin/nvcc"))
    };
    std::env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(toolkit)
        .unwrap_or_else(|| "nvcc".into())
}
