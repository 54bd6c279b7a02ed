//! Compiles the node that `src/autograd` adds to libtorch's graph and what catches its exceptions, and tells the linker where libtorch, NCCL and NVRTC lie, so
//! that the binary starts without LD_LIBRARY_PATH.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=src/autograd/node.cpp");
    println!("cargo:rerun-if-changed=src/libtorch.cpp");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        cc::Build::new()
            .cpp(true)
            .std("c++20")
            .opt_level(1)
            .warnings(false)
            .include(format!("{libtorch}/include"))
            .include(format!("{libtorch}/include/torch/csrc/api/include"))
            .file("src/autograd/node.cpp")
            .file("src/libtorch.cpp")
            .compile("fm_dist_libtorch");
        // The latter two are opened at run time, from the folders of their own wheels.
        for folder in ["lib", "../nvidia/nccl/lib", "../nvidia/cu13/lib"] {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/{folder}");
        }
    }
}
