//! The library's file, its version, and the CPU's instructions that it has kernels for.

use std::fs;
use std::path::{Path, PathBuf};

/// Path of the loaded library.
pub fn library() -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])))
        .find(|path| path.ends_with("libtorch_cpu.so"))
        .map(Path::to_path_buf)
}

/// Path `torch/<name>` for the library in `torch/lib/`.
pub fn torch_file(library: &Path, name: &str) -> Option<PathBuf> {
    Some(library.parent()?.parent()?.join(name))
}

/// Version of a library, read from its wheel.
pub fn version(library: &Path) -> Option<String> {
    let text = fs::read_to_string(torch_file(library, "version.py")?).ok()?;
    parse_version(&text).map(str::to_owned)
}

/// Finds the version in the text of PyTorch's `version.py`.
fn parse_version(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("__version__ = '")?.strip_suffix('\''))
}

/// The best instruction set of this CPU for which libtorch has kernels.
#[cfg(target_arch = "x86_64")]
pub fn cpu_capability() -> &'static str {
    use std::arch::is_x86_feature_detected as detected;
    if detected!("avx512f")
        && detected!("avx512bw")
        && detected!("avx512vl")
        && detected!("avx512dq")
        && detected!("fma")
    {
        "AVX512"
    } else if detected!("avx2") && detected!("fma") {
        "AVX2"
    } else {
        "no AVX2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub fn cpu_capability() -> &'static str {
    std::env::consts::ARCH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_pytorch_is_read_from_its_file() {
        assert_eq!(
            parse_version(
                "from typing import Optional\n__version__ = '2.13.0+cu130'\ndebug = False\n"
            ),
            Some("2.13.0+cu130")
        );
        assert_eq!(parse_version("__version__ = 2"), None);
    }

    #[test]
    fn this_very_process_has_loaded_one() {
        let library = library().expect("it is linked");
        assert!(version(&library).is_some(), "{}", library.display());
    }
}
