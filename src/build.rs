//! Compiles the C++ that the bindings lack: the autograd node of `src/ops/autograd`, and the
//! switches and exception boundary of `src/libtorch`. Sets the rpaths of libtorch, NCCL and NVRTC,
//! so that the binary starts without LD_LIBRARY_PATH.

const SOURCES: [&str; 2] = ["src/ops/autograd/node.cpp", "src/libtorch/shim.cpp"];

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    SOURCES.iter().for_each(|source| println!("cargo:rerun-if-changed={source}"));
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        // Another version may be put in the same place.
        let version = format!("{libtorch}/version.py");
        if std::path::Path::new(&version).exists() {
            println!("cargo:rerun-if-changed={version}");
        }
        cc::Build::new()
            .cpp(true)
            .std("c++20")
            .opt_level(1)
            .warnings(false)
            // As libtorch is built: the layout of some of its classes depends on it.
            .define("NDEBUG", None)
            .include(format!("{libtorch}/include"))
            .include(format!("{libtorch}/include/torch/csrc/api/include"))
            .files(SOURCES)
            .compile("fm_dist_libtorch");
        // The latter two are opened at run time, from the folders of their own wheels.
        for folder in ["lib", "../nvidia/nccl/lib", "../nvidia/cu13/lib"] {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/{folder}");
        }
    }
}
