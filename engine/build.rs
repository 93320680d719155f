//! Compiles kernels/*.cu with nvcc, where the feature `cuda` is on: one fatbin a file, for the architectures of `CUDA_COMPUTE_CAP`.
//!
//! `CUDA_COMPUTE_CAP`: architectures, comma-separated; default 80,89,90a. `CUDA_HOME` or `CUDA_PATH`: the toolkit's folder, else nvcc on the
//! PATH. `LORAD_SKIP_KERNELS=1` builds without any kernel, to check the code where there is no toolkit: such a program finds no GPU.

use std::path::{Path, PathBuf};
use std::process::Command;

const ARCHITECTURES: &str = "80,89,90a";

fn main() {
    for name in ["CUDA_COMPUTE_CAP", "CUDA_HOME", "CUDA_PATH", "LORAD_SKIP_KERNELS", "NVCC_APPEND_FLAGS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        println!("cargo:rerun-if-changed=build.rs");
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let skip = std::env::var("LORAD_SKIP_KERNELS").is_ok_and(|value| value == "1");
    let folder = PathBuf::from("../kernels");
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut sources: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("kernels/ lies beside the engine")
        .map(|entry| entry.expect("kernels/ can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    if skip {
        sources.clear();
    }
    let architectures = architectures();
    compile(&sources, &out, &architectures);
    let list: String = sources.iter().map(|source| list_line(&fatbin(source, &out))).collect();
    let text = format!(
        "/// Compiled kernels, one fatbin a source file.\npub(super) static FATBINS: &[&[u8]] = &[\n{list}];\n\
         /// What they were compiled for.\npub(super) const ARCHITECTURES: &str = {:?};\n",
        architectures.join(",")
    );
    std::fs::write(out.join("fatbins.rs"), text).expect("OUT_DIR can be written");
}

fn list_line(fatbin: &Path) -> String {
    format!("    include_bytes!({:?}),\n", fatbin.display().to_string())
}

fn fatbin(source: &Path, out: &Path) -> PathBuf {
    let name = source.file_stem().expect("a source file has a name");
    out.join(name).with_extension("fatbin")
}

/// What to compile for. 90 means the card whose kernels need its specific target.
fn architectures() -> Vec<String> {
    let wanted = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| ARCHITECTURES.to_owned());
    let name = |name: &str| name.trim().replace("sm_", "").replace('.', "");
    wanted.split(',').map(name).map(|name| if name == "90" { "90a".to_owned() } else { name }).collect()
}

/// Compiles what is older than its source or a header, as many at once as cargo allows.
fn compile(sources: &[PathBuf], out: &Path, architectures: &[String]) {
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize).max(1);
    // nvcc takes its own variable too.
    let stamp = format!("{} {:?}", architectures.join(","), std::env::var_os("NVCC_APPEND_FLAGS"));
    let stale: Vec<&PathBuf> = sources.iter().filter(|source| is_stale(source, out, &stamp)).collect();
    for some in stale.chunks(jobs) {
        let running: Vec<_> = some.iter().map(|source| (source, start(source, out, architectures))).collect();
        for (source, mut child) in running {
            let status = child.wait().expect("nvcc can be waited for");
            assert!(status.success(), "nvcc failed on {}", source.display());
            std::fs::write(fatbin(source, out).with_extension("architectures"), &stamp)
                .expect("OUT_DIR can be written");
        }
    }
}

fn is_stale(source: &Path, out: &Path, stamp: &str) -> bool {
    let changed = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let headers = std::fs::read_dir("../kernels").expect("kernels/ can be read").flatten().map(|entry| entry.path());
    let newest = headers
        .filter(|path| path.extension().is_some_and(|extension| extension == "cuh"))
        .chain([source.to_owned()])
        .filter_map(|path| changed(&path))
        .max();
    let target = fatbin(source, out);
    let same = std::fs::read_to_string(target.with_extension("architectures")).is_ok_and(|text| text == stamp);
    !same || changed(&target) < newest
}

fn start(source: &Path, out: &Path, architectures: &[String]) -> std::process::Child {
    let home = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(std::env::var_os).map(PathBuf::from);
    let nvcc = home.map_or_else(|| PathBuf::from("nvcc"), |home| home.join("bin/nvcc"));
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "-lineinfo", "-o"]).arg(fatbin(source, out)).arg(source);
    for name in architectures {
        command.arg(format!("-gencode=arch=compute_{name},code=sm_{name}"));
    }
    command.spawn().unwrap_or_else(|error| {
        panic!(
            "{} cannot be started ({error}): set CUDA_HOME, or run scripts/cuda-toolkit.sh (README.md)",
            nvcc.display()
        )
    })
}
