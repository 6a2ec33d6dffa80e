//! Compiles the kernels with nvcc into one file each, which the crate embeds: machine code of the GPU that
//! CUDA_COMPUTE_CAP names (90: H100, H200), and its PTX, which the driver compiles for any newer one.

use std::path::{Path, PathBuf};
use std::process::Command;

const KERNELS: [(&str, &[&str]); 3] = [
    // Products and sums stay apart, so that a merge has the same bytes as on the CPU.
    ("merge", &["--fmad=false"]),
    ("decoder", &[]),
    // Sums as on the CPU.
    ("draw", &["--fmad=false"]),
];

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_PATH", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let has = |feature: &str| std::env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if !has("CUDA") {
        if has("EMULATED")
            && let Err(error) = emulate(&out)
        {
            println!("cargo::error={error}");
        }
        return;
    }
    for (name, flags) in KERNELS {
        if let Err(error) = compile(name, flags, &out) {
            println!("cargo::error={error}");
        }
    }
}

fn compile(name: &str, flags: &[&str], out: &Path) -> Result<(), String> {
    let nvcc = nvcc();
    let cap = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "90".to_owned());
    run(Command::new(&nvcc)
        .args(["--fatbin", "-O3"])
        .arg(format!(
            "-gencode=arch=compute_{cap},code=[sm_{cap},compute_{cap}]"
        ))
        .args(flags)
        .arg("-o")
        .arg(out.join(format!("{name}.fatbin")))
        .arg(format!("kernels/{name}.cu")))
    .map_err(|error| format!("{error} (NVCC or CUDA_PATH names nvcc)"))
}

/// Compiles the kernels of the merge and of the draws for the CPU, as a library that the crate is linked with.
fn emulate(out: &Path) -> Result<(), String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    // Products and sums stay apart here too.
    let flags = [
        "-x",
        "c++",
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-exceptions",
        "-fno-rtti",
    ];
    let mut archive = Command::new(std::env::var("AR").unwrap_or_else(|_| "ar".to_owned()));
    archive.arg("crs").arg(out.join("libcauldron_emulated.a"));
    for name in ["merge", "draw"] {
        let object = out.join(name).with_extension("o");
        let mut compile = Command::new(&compiler);
        compile
            .args(flags)
            .args(["-Wno-unknown-pragmas", "-Ikernels/emulated"]);
        // nvcc needs no header for what it knows.
        compile.args(["-include", "kernels/emulated/cuda.h", "-c"]);
        run(compile.arg(format!("kernels/{name}.cu")).arg("-o").arg(&object))?;
        archive.arg(object);
    }
    run(&mut archive)?;
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=cauldron_emulated");
    Ok(())
}

fn run(command: &mut Command) -> Result<(), String> {
    let done = command
        .output()
        .map_err(|e| format!("{} cannot be run: {e}", command.get_program().display()))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{} failed: {}",
            command.get_program().display(),
            String::from_utf8_lossy(&done.stderr).replace('\n', " ")
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
