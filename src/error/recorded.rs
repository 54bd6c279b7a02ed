//! Texts of libtorch and its libraries, recorded where they failed. Unit tests read them, and
//! injected faults replay the first one of each list.

/// A text of a library with all its lines, as its exception has it in front of the C++ stack.
pub struct Recorded {
    /// The device and the libraries that gave the text.
    pub source: &'static str,
    pub text: &'static str,
}

const H200: &str = "H200, driver 580.159.04, PyTorch 2.11.0+cu130";

/// Texts of a GPU whose kernels failed.
pub const DEVICE: &[Recorded] = &[
    Recorded { source: H200, text: include_str!("recorded/illegal_access.txt") },
    Recorded { source: H200, text: include_str!("recorded/assertion.txt") },
    Recorded { source: H200, text: include_str!("recorded/cublas_internal.txt") },
];

/// Texts of memory that ran out.
pub const OUT_OF_MEMORY: &[Recorded] = &[
    Recorded { source: H200, text: include_str!("recorded/out_of_memory.txt") },
    Recorded { source: H200, text: include_str!("recorded/out_of_memory_beside_another.txt") },
    Recorded { source: H200, text: include_str!("recorded/cublas_alloc.txt") },
    Recorded {
        source: "CPU, libtorch 2.13.0",
        text: include_str!("recorded/out_of_host_memory.txt"),
    },
];
