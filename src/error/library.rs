//! Recognizes texts of libtorch and its libraries that report an external cause, as opposed to bugs
//! of this program.
//!
//! tch's plain operators panic with the text of the C++ exception; its type is lost.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit};

use super::Error;

const RAISE_THE_LIMIT: &str = "raise the limit on open files with `ulimit -n`";
const TAKE_LESS: &str = "take a smaller micro-batch, shard or offload more, or use more memory";

/// Phrases with which libtorch (2.11 to 2.13), the CUDA driver and CUDA's libraries report that
/// memory ran out, on a GPU or on the host.
const MEMORY_WORDS: &[&str] = &[
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
    "OutOfMemoryError",
    "would exceed allowed memory. (out of memory)",
    "DefaultCPUAllocator: can't allocate memory",
    "C10 Out of Memory",
    "std::bad_alloc",
];

/// Phrases with which they report that a device or a call to it failed.
const DEVICE_WORDS: &[&str] = &[
    "CUDA error",
    "CUDA driver error",
    "CUDA NVRTC error",
    "CUDA_ERROR_",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
    "CUSOLVER_STATUS_",
    "CUSPARSE_STATUS_",
    "CUFFT_",
    "cuDNN error",
    "cudnn error",
    "cuBLAS error",
    "cuFFT error",
    "cusolver error",
    "cusparse error",
    "NCCL error",
    "NCCL Error",
    "No CUDA GPUs are available",
];

/// Phrases with which libtorch and the C++ library report that no more files can be opened. The
/// second one comes from random numbers.
const FILE_WORDS: &[&str] = &["Too many open files", "Unable to open /dev/urandom"];

/// Returns the line that contains one of these phrases, without the panic's quotation around it. A
/// panic quotes line ends as `\\n`.
fn line_with(text: &str, words: &[&str]) -> Option<String> {
    let lines = text.lines().flat_map(|line| line.split("\\n"));
    let found = lines.into_iter().find(|line| words.iter().any(|word| line.contains(word)))?;
    let quoted = found.rsplit_once("Torch(\"").map_or(found, |(_, quoted)| quoted);
    Some(quoted.trim_end_matches("\")").trim().into())
}

/// Describes the limit on open files that `error` reports, and the way to raise it; `None` for any
/// other error.
pub fn describe_file_limit(error: &std::io::Error) -> Option<String> {
    match Errno::from_io_error(error)? {
        Errno::MFILE => {
            let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
            let [soft, hard] = [current, maximum].map(|limit| limit.map_or("unlimited".into(), |limit| limit.to_string()));
            Some(format!(
                "too many open files, this process may have {soft}; raise the limit before the start with ulimit -n (the hard limit is \
                 {hard}; an administrator raises that one: nofile in limits.conf, LimitNOFILE in systemd)"
            ))
        }
        Errno::NFILE => Some("too many open files on this host; an administrator raises its limit: sysctl fs.file-max".into()),
        _ => None,
    }
}

impl Error {
    /// Returns the error that a text of libtorch, CUDA or one of its libraries reports: a device
    /// that failed, or memory or open files that ran out. `None` for any other text, which then is
    /// a bug of this program. Keeps only the line with the phrase, because C++ stacks and advice
    /// follow it.
    pub fn from_library(text: &str) -> Option<Self> {
        if let Some(what) = line_with(text, MEMORY_WORDS) {
            return Some(Error::OutOfMemory { what: format!("{what}; {TAKE_LESS}") });
        }
        if let Some(what) = line_with(text, DEVICE_WORDS) {
            return Some(Error::Device { what });
        }
        line_with(text, FILE_WORDS)
            .map(|what| Error::environment(format!("{what}; {RAISE_THE_LIMIT}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text of a panic that quotes libtorch, with its advice and its C++ stack after the line
    /// that names the error.
    fn quoted(first_line: &str) -> String {
        let advice = "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.";
        let text = format!(
            "{first_line}\n{advice}\nException raised from c10_cuda_check_implementation at CUDAException.cpp:44"
        );
        format!("called `Result::unwrap()` on an `Err` value: Torch({text:?})")
    }

    #[test]
    fn what_a_device_says_is_code_23_in_its_own_words() {
        for words in [
            "CUDA error: an illegal memory access was encountered",
            "CUDA error: device-side assert triggered",
            "CUDA error: uncorrectable ECC error encountered",
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`",
            "CUDA driver error: unspecified launch failure",
            "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
            "No CUDA GPUs are available",
            "cuLaunchKernel: an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS, code 700)",
        ] {
            for text in [words.to_string(), quoted(words)] {
                let error = Error::from_library(&text).expect("a device's words");
                assert_eq!(
                    (error.exit_code(), error.name(), error.to_string()),
                    (23, "DEVICE", words.to_string())
                );
            }
        }
    }

    #[test]
    fn memory_that_ran_out_is_code_53_on_any_device() {
        for words in [
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is free.",
            "CUDA error: out of memory",
            "CUDA driver error: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "cuMemAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY, code 2)",
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)",
        ] {
            for text in [words.to_string(), quoted(words)] {
                let error = Error::from_library(&text).expect("words of an allocator");
                assert_eq!((error.exit_code(), error.name()), (53, "MEMORY"));
                assert!(error.to_string().starts_with(words), "{error}");
            }
        }
    }

    #[test]
    fn a_host_that_really_has_no_memory_left_says_so() {
        let text = tch::Tensor::f_empty([1 << 60], (tch::Kind::Float, tch::Device::Cpu))
            .expect_err("an exbibyte")
            .to_string();
        assert_eq!(Error::from_library(&text).map(|error| error.exit_code()), Some(53), "{text}");
    }

    #[test]
    fn open_files_that_ran_out_are_code_52_and_other_words_no_error_of_the_world() {
        let error = Error::from_library("Unable to open /dev/urandom").expect("no more files");
        assert_eq!(error.exit_code(), 52);
        assert!(error.to_string().contains("ulimit -n"), "{error}");
        for text in [
            "index out of bounds: the len is 3 but the index is 7",
            "The size of tensor a (3) must match the size of tensor b (4)",
        ] {
            assert!(Error::from_library(text).is_none(), "{text}");
        }
    }

    #[test]
    fn too_many_open_files_are_no_reason_to_try_again() {
        let met = |number: Errno| Error::storage("x", "open")(number.into());
        for number in [Errno::MFILE, Errno::NFILE] {
            assert_eq!(met(number).exit_code(), 52);
            assert!(
                met(number).to_string().starts_with("cannot open x: too many open files"),
                "{}",
                met(number)
            );
        }
        assert!(
            met(Errno::MFILE)
                .to_string()
                .contains("raise the limit before the start with ulimit -n")
        );
        assert_eq!(met(Errno::ACCESS).exit_code(), 30);
    }
}
