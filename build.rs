//! Tells the linker where libtorch and NCCL lie, so that the binary starts without LD_LIBRARY_PATH.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        // NCCL is opened at run time, from the folder of its own wheel.
        for folder in ["lib", "../nvidia/nccl/lib"] {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/{folder}");
        }
    }
}
