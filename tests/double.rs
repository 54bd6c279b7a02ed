//! The double of NCCL, the CUDA driver and NVML (`tests/nccl_double`), built here, and commands
//! that find it. The libraries are opened by name, so that only a child finds the right ones first.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A command that finds the libraries of this folder before all others, and before those of an
/// earlier call.
pub fn with_libraries(mut command: Command, folder: &Path) -> Command {
    const NAME: &str = "LD_LIBRARY_PATH";
    let given = command
        .get_envs()
        .find_map(|(name, folders)| folders.filter(|_| name == NAME))
        .map(OsString::from);
    let mut folders = folder.as_os_str().to_os_string();
    if let Some(others) = given.or_else(|| std::env::var_os(NAME)) {
        folders.push(":");
        folders.push(others);
    }
    command.env(NAME, folders);
    command
}

pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The folder of the double under the names of the libraries, built once.
pub fn double() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let target = project("target/nccl_double");
        let mut build = Command::new(env!("CARGO"));
        build
            .args(["build", "--quiet", "--manifest-path"])
            .arg(project("tests/nccl_double/Cargo.toml"));
        assert!(
            build.arg("--target-dir").arg(&target).status().expect("cargo runs").success(),
            "the double cannot be built"
        );
        let folder = target.join("lib");
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["libcuda.so", "libnccl.so", "libnvidia-ml.so.1"] {
            // Another test run may be at it too: a new link takes the place of the old one in one
            // step.
            let fresh = folder.join(format!("{name}.{}", std::process::id()));
            std::os::unix::fs::symlink(target.join("debug/libnccl_double.so"), &fresh).unwrap();
            std::fs::rename(fresh, folder.join(name)).unwrap();
        }
        folder
    })
}
