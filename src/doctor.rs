//! What fm-dist finds on this machine, an item a line, each missing one with the command that mends it.
//!
//! Nothing is loaded or initialized for the report: libraries are looked for where the loaders would look.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use crate::collective;

/// Linux driver branch that CUDA 13 needs at least. Source: NVIDIA, CUDA 13.0 release notes, table 3.
const CUDA_13_DRIVER: u32 = 580;

/// One line of the report.
struct Item {
    verdict: Verdict,
    name: &'static str,
    text: String,
}

enum Verdict {
    Ok,
    /// Training on the CPU needs it.
    Missing,
    /// Worth knowing; what only GPUs need is a note when it is not there.
    Note,
}

impl Item {
    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Item { verdict: Verdict::Ok, name, text: text.into() }
    }

    fn missing(name: &'static str, text: impl Into<String>) -> Self {
        Item { verdict: Verdict::Missing, name, text: text.into() }
    }

    fn note(name: &'static str, text: impl Into<String>) -> Self {
        Item { verdict: Verdict::Note, name, text: text.into() }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Missing => "missing",
            Verdict::Note => "note",
        };
        write!(f, "{verdict:<7}  {:<11}  {}", self.name, self.text)
    }
}

/// The report, and whether all that training on the CPU needs is there.
pub fn report() -> (String, bool) {
    let libtorch = loaded_library("libtorch_cpu.so");
    let items = [
        Item::ok("fm-dist", env!("CARGO_PKG_VERSION")),
        libtorch_item(libtorch.as_deref()),
        Item::ok("MPI", collective::mpi_library_version()),
        mpirun_item(Command::new("mpirun").arg("--version").output().ok().map(|output| output.stdout)),
        nccl_item(libtorch.as_deref()),
        driver_item(fs::read_to_string("/proc/driver/nvidia/version").ok()),
        devices_item(Path::new("/proc/driver/nvidia/gpus")),
        cpu_item(),
    ];
    let complete = !items.iter().any(|item| matches!(item.verdict, Verdict::Missing));
    (items.map(|item| format!("{item}\n")).concat(), complete)
}

/// Path of a shared library of this process, by the end of its name.
fn loaded_library(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])))
        .find(|path| path.ends_with(name))
        .map(Path::to_path_buf)
}

fn libtorch_item(library: Option<&Path>) -> Item {
    let Some(library) = library else { return Item::missing("libtorch", "not loaded; install it with launch/setup.sh") };
    let version = beside_torch(library, "version.py").and_then(|path| fs::read_to_string(path).ok());
    let version = version.as_deref().and_then(version_of).unwrap_or("unknown");
    Item::ok("libtorch", format!("{version}, {}", library.display()))
}

/// `torch/<name>` for the libtorch in `torch/lib/`.
fn beside_torch(library: &Path, name: &str) -> Option<PathBuf> {
    Some(library.parent()?.parent()?.join(name))
}

/// The version in the text of PyTorch's `version.py`.
fn version_of(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("__version__ = '")?.strip_suffix('\''))
}

fn mpirun_item(version: Option<Vec<u8>>) -> Item {
    let Some(version) = version else {
        return Item::missing("mpirun", "not in PATH; apt-get install openmpi-bin libopenmpi-dev, or module load openmpi");
    };
    let version = String::from_utf8_lossy(&version);
    Item::ok("mpirun", version.lines().next().unwrap_or("unknown"))
}

/// cudarc opens `libnccl.so`, found in its wheel's folder (this binary's rpath) or in the linker's cache.
fn nccl_item(libtorch: Option<&Path>) -> Item {
    let wheel = libtorch.and_then(|library| beside_torch(library, "../nvidia/nccl/lib/libnccl.so")).filter(|library| library.exists());
    match wheel.map(|library| library.display().to_string()).or_else(|| cached_library("libnccl.so")) {
        Some(library) => Item::ok("NCCL", library),
        None => Item::note("NCCL", "not found; only GPUs need it, launch/setup.sh fetches it"),
    }
}

/// Path of a library that the linker's cache knows by exactly this name.
fn cached_library(name: &str) -> Option<String> {
    let cache = fs::read("/etc/ld.so.cache").ok()?;
    let mut texts = cache.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    texts.find(|text| text.starts_with('/') && Path::new(text).ends_with(name)).map(str::to_owned)
}

fn driver_item(version: Option<String>) -> Item {
    let Some(version) = version else { return Item::note("CUDA driver", "none; fm-dist trains on the CPU") };
    let numbers = |word: &str| word.contains('.') && word.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number = version.split_whitespace().find(|word| numbers(word)).unwrap_or("unknown");
    let branch = number.split('.').next().and_then(|branch| branch.parse::<u32>().ok());
    match branch {
        Some(branch) if branch < CUDA_13_DRIVER => {
            Item::note("CUDA driver", format!("{number}; this build's CUDA 13 needs {CUDA_13_DRIVER} or newer: update the driver"))
        }
        _ => Item::ok("CUDA driver", number),
    }
}

fn devices_item(folder: &Path) -> Item {
    let entries = fs::read_dir(folder).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let mut models: Vec<String> = entries.iter().map(|entry| model_of(&entry.path().join("information"))).collect();
    models.sort();
    if models.is_empty() { Item::note("GPUs", "none") } else { Item::ok("GPUs", format!("{}: {}", models.len(), models.join(", "))) }
}

fn model_of(information: &Path) -> String {
    let text = fs::read_to_string(information).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("Model:")).map_or("unknown", str::trim).to_owned()
}

fn cpu_item() -> Item {
    let cores = available_parallelism().map_or("unknown".into(), |cores| cores.to_string());
    Item::ok("CPU", format!("{cores} cores, {} threads in use by libtorch, {}", tch::get_num_threads(), cpu_capability()))
}

/// The best of the instruction sets for which libtorch has kernels.
#[cfg(target_arch = "x86_64")]
fn cpu_capability() -> &'static str {
    use std::arch::is_x86_feature_detected as detected;
    if detected!("avx512f") && detected!("avx512bw") && detected!("avx512vl") && detected!("avx512dq") && detected!("fma") {
        "AVX512"
    } else if detected!("avx2") && detected!("fma") {
        "AVX2"
    } else {
        "no AVX2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_capability() -> &'static str {
    std::env::consts::ARCH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_an_aligned_line_for_each_item() {
        let (text, complete) = report();
        assert_eq!(complete, !text.lines().any(|line| line.starts_with("missing")), "{text}");
        assert_eq!(text.lines().count(), 8, "{text}");
        for (line, name) in text.lines().zip(["fm-dist", "libtorch", "MPI", "mpirun", "NCCL", "CUDA driver", "GPUs", "CPU"]) {
            assert_eq!(line.find(name), Some(9), "{text}");
        }
        assert!(text.contains("libtorch_cpu.so"), "this very process has loaded it: {text}");
    }

    #[test]
    fn what_is_missing_comes_with_its_cure() {
        assert!(matches!(libtorch_item(None), Item { verdict: Verdict::Missing, text, .. } if text.contains("launch/setup.sh")));
        assert!(matches!(mpirun_item(None), Item { verdict: Verdict::Missing, text, .. } if text.contains("openmpi-bin")));
    }

    #[test]
    fn a_machine_without_a_driver_or_with_an_old_one_is_a_note() {
        let text = |release: &str| {
            Some(format!("NVRM version: NVIDIA UNIX x86_64 Kernel Module  {release}  Mon Sep 1 12:00:00 UTC\nGCC version:"))
        };
        assert!(matches!(driver_item(None).verdict, Verdict::Note));
        assert!(matches!(driver_item(text("535.104.05")), Item { verdict: Verdict::Note, text, .. } if text.starts_with("535.104.05;")));
        assert!(matches!(driver_item(text("580.65.06")), Item { verdict: Verdict::Ok, text, .. } if text == "580.65.06"));
    }

    #[test]
    fn devices_are_named_by_the_driver() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(matches!(devices_item(folder.path()).verdict, Verdict::Note));
        for bus in ["0000:18:00.0", "0000:3b:00.0"] {
            fs::create_dir(folder.path().join(bus)).expect("a folder");
            fs::write(folder.path().join(bus).join("information"), "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   17\n").expect("a file");
        }
        assert_eq!(devices_item(folder.path()).text, "2: NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3");
    }

    #[test]
    fn the_version_of_pytorch_is_read_from_its_file() {
        assert_eq!(version_of("from typing import Optional\n__version__ = '2.13.0+cu130'\ndebug = False\n"), Some("2.13.0+cu130"));
        assert_eq!(version_of("__version__ = 2"), None);
    }
}
