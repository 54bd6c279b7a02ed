//! The driver, the GPUs and the libraries of this machine, found without opening a GPU.

use std::fs;
use std::path::Path;

use libloading::os::unix::{Library, Symbol};

/// Folder in which the driver describes itself and its GPUs.
const DRIVER_FOLDER: &str = "/proc/driver/nvidia";

/// Stands for a model or a version that a file should name and does not.
pub const UNKNOWN: &str = "unknown";

/// Returns the version of the driver, e.g. `580.65.06`; `None` without one, [`UNKNOWN`] if its text
/// has no version.
pub fn driver_version() -> Option<String> {
    let text = fs::read_to_string(Path::new(DRIVER_FOLDER).join("version")).ok()?;
    Some(version_in(&text).unwrap_or(UNKNOWN).to_owned())
}

/// Finds the version in the text of the driver's `version` file.
pub(crate) fn version_in(text: &str) -> Option<&str> {
    let numbers = |word: &str| {
        word.contains('.') && word.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
    };
    text.split_whitespace().find(|word| numbers(word))
}

/// Returns the models of all GPUs of this machine, sorted.
pub fn gpu_models() -> Vec<String> {
    models_in(&Path::new(DRIVER_FOLDER).join("gpus"))
}

/// Returns the models that the driver's folder of GPUs names.
pub(crate) fn models_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder)
        .map(|entries| entries.flatten().collect::<Vec<_>>())
        .unwrap_or_default();
    let mut models: Vec<String> =
        entries.iter().map(|entry| model_of(&entry.path().join("information"))).collect();
    models.sort();
    models
}

fn model_of(information: &Path) -> String {
    let text = fs::read_to_string(information).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("Model:")).map_or(UNKNOWN, str::trim).to_owned()
}

/// Returns the version of cuDNN, e.g. `9.20.0`; `None` if there is none. `beside`: the folder of
/// libtorch's libraries, beside whose wheel cuDNN's is installed; otherwise the linker finds the
/// library.
pub fn cudnn_version(beside: Option<&Path>) -> Option<String> {
    const NAME: &str = "libcudnn.so.9";
    let wheel = beside.map(|folder| folder.join("../../nvidia/cudnn/lib").join(NAME));
    let named = wheel.filter(|path| path.exists()).unwrap_or_else(|| NAME.into());
    // SAFETY: the library's initializers have no requirements, and open no GPU.
    let library = unsafe { Library::new(named) }.ok()?;
    // SAFETY: cuDNN's function of this name takes nothing and returns a `size_t`.
    let version = unsafe {
        let function: Symbol<unsafe extern "C" fn() -> usize> =
            library.get(b"cudnnGetVersion").ok()?;
        function()
    };
    // libtorch opens the same library, and finds it open.
    std::mem::forget(library);
    Some(cudnn_words(version))
}

/// Writes cuDNN's number of a version as words: 92000 is 9.20.0, 8907 was 8.9.7.
fn cudnn_words(number: usize) -> String {
    let major = if number < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", number / major, number % major / 100, number % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_they_are_written() {
        let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Mon Sep 1 12:00:00 UTC\nGCC version:";
        assert_eq!(version_in(text), Some("580.65.06"));
        assert_eq!(version_in("NVRM"), None);
        assert_eq!(
            [cudnn_words(92_000), cudnn_words(91_900), cudnn_words(8907)],
            ["9.20.0", "9.19.0", "8.9.7"]
        );
    }

    #[test]
    fn devices_are_named_by_the_driver() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(models_in(folder.path()).is_empty());
        for bus in ["0000:18:00.0", "0000:3b:00.0"] {
            fs::create_dir(folder.path().join(bus)).expect("a folder");
            fs::write(
                folder.path().join(bus).join("information"),
                "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   17\n",
            )
            .expect("a file");
        }
        assert_eq!(models_in(folder.path()), ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"]);
    }
}
