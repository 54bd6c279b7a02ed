//! Recognizes texts of libtorch and its libraries that report an external cause, as opposed to bugs
//! of this program.
//!
//! tch's plain operators panic with the text of the C++ exception; its type is lost.

use bytesize::ByteSize;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit};

use super::Error;

const RAISE_THE_LIMIT: &str = "raise the limit on open files with `ulimit -n`";

/// The memory in which something did not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Gpu,
    Host,
}

/// An allocation that failed, as far as the library's text tells; numbers are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    pub place: Place,
    /// Size of the allocation.
    pub asked: Option<u64>,
    pub free: Option<u64>,
    /// Size of the whole memory.
    pub total: Option<u64>,
}

impl Shortage {
    /// A shortage of which only the place is known.
    pub fn of(place: Place) -> Self {
        Shortage { place, asked: None, free: None, total: None }
    }

    /// Reads the numbers of libtorch's allocators.
    fn parse(line: &str) -> Self {
        let place = if HOST_WORDS.iter().any(|word| line.contains(word)) {
            Place::Host
        } else {
            Place::Gpu
        };
        let after = |words: &str| size_at_start(line.split_once(words)?.1);
        Shortage {
            place,
            asked: after("Tried to allocate ").or_else(|| after("you tried to allocate ")),
            free: after(" of which "),
            total: after("total capacity of "),
        }
    }
}

/// Parses the size that a text begins with, e.g. `1.06 GiB is free` or `8 bytes`.
fn size_at_start(text: &str) -> Option<u64> {
    let mut words = text.split_whitespace();
    let (number, unit) = (words.next()?, words.next()?.trim_end_matches(['.', ',']));
    let unit = if unit == "bytes" { "B" } else { unit };
    format!("{number} {unit}").parse::<ByteSize>().ok().map(|size| size.as_u64())
}

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

/// Phrases among [`MEMORY_WORDS`] that are about the host's memory.
const HOST_WORDS: &[&str] = &["DefaultCPUAllocator", "C10 Out of Memory", "std::bad_alloc"];

/// The places at which libtorch's text goes over to advice about its own settings.
const ADVICE_WORDS: &[&str] = &[" If reserved but unallocated memory", " See documentation for"];

/// Phrases with which they report a machine that lacks what is needed: no retry helps.
const ENVIRONMENT_WORDS: &[&str] = &[
    "CUDA_ERROR_NO_DEVICE",
    "CUDA_ERROR_INVALID_DEVICE",
    "CUDA_ERROR_INVALID_IMAGE",
    "CUDA_ERROR_NO_BINARY_FOR_GPU",
    "CUDA_ERROR_STUB_LIBRARY",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    "CUDA driver version is insufficient",
    "no kernel image is available for execution on the device",
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
    "unhandled cuda error",
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

/// Returns libtorch's line without the advice at its end.
fn without_advice(line: &str) -> &str {
    let end = ADVICE_WORDS.iter().filter_map(|words| line.find(words)).min();
    line[..end.unwrap_or(line.len())].trim_end_matches('.')
}

impl Error {
    /// Returns the error that a text of libtorch, CUDA or one of its libraries reports: a device
    /// that failed, memory or open files that ran out, or a machine without what CUDA needs. `None`
    /// for any other text, which then is a bug of this program. Keeps only the line with the
    /// phrase, because C++ stacks and advice follow it.
    pub fn from_library(text: &str) -> Option<Self> {
        if let Some(line) = line_with(text, MEMORY_WORDS) {
            let shortage = Shortage::parse(&line);
            return Some(Error::OutOfMemory { what: without_advice(&line).into(), shortage });
        }
        if let Some(what) = line_with(text, ENVIRONMENT_WORDS) {
            return Some(Error::environment(what));
        }
        if let Some(what) = line_with(text, DEVICE_WORDS) {
            return Some(Error::Device { what });
        }
        line_with(text, FILE_WORDS)
            .map(|what| Error::environment(format!("{what}; {RAISE_THE_LIMIT}")))
    }

    /// Returns the error that a text of CUDA reports; `otherwise(text)` if it names no cause that
    /// [`Error::from_library`] knows.
    pub fn from_library_or(text: String, otherwise: impl FnOnce(String) -> Error) -> Error {
        Error::from_library(&text).unwrap_or_else(|| otherwise(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::recorded::{self, Recorded};

    /// The text of a panic that quotes libtorch, with its C++ stack after it.
    fn quoted(text: &str) -> String {
        let raised = "Exception raised from c10_cuda_check_implementation at CUDAException.cpp:44";
        let text = format!("{text}\n{raised}");
        format!("called `Result::unwrap()` on an `Err` value: Torch({text:?})")
    }

    #[test]
    fn texts_that_were_recorded_on_a_device_that_failed_are_code_23() {
        for Recorded { source, text } in recorded::DEVICE {
            let first = text.lines().next().expect("a line");
            for text in [text.to_string(), quoted(text)] {
                let error = Error::from_library(&text).expect("a device's words");
                assert_eq!((error.exit_code(), error.to_string()), (23, first.into()), "{source}");
            }
        }
    }

    #[test]
    fn texts_that_were_recorded_when_memory_ran_out_are_code_53_with_their_numbers() {
        let gib = |number: f64| (number * f64::from(1 << 30)) as u64;
        let gpu = |asked: f64, free: f64| Shortage {
            place: Place::Gpu,
            asked: Some(gib(asked)),
            free: Some(gib(free)),
            total: Some(gib(139.8)),
        };
        let host = Shortage { asked: Some(1 << 60), ..Shortage::of(Place::Host) };
        let expected = [gpu(2.0, 1.29), gpu(900.0, 118.59), Shortage::of(Place::Gpu), host];
        assert_eq!(recorded::OUT_OF_MEMORY.len(), expected.len());
        for (Recorded { source, text }, expected) in recorded::OUT_OF_MEMORY.iter().zip(expected) {
            for text in [text.to_string(), quoted(text)] {
                let error = Error::from_library(&text).expect("words of an allocator");
                assert_eq!((error.exit_code(), error.name()), (53, "MEMORY"), "{source}");
                assert!(!error.to_string().contains("try setting"), "{error}");
                let Error::OutOfMemory { shortage, .. } = error else { panic!("{error}") };
                assert_eq!(shortage, expected, "{source}: {text}");
            }
        }
    }

    #[test]
    fn a_gpu_that_libtorch_or_a_kernel_is_not_made_for_is_no_reason_to_try_again() {
        for words in [
            "CUDA error: no kernel image is available for execution on the device",
            "cuInit: no CUDA-capable device is detected (CUDA_ERROR_NO_DEVICE, code 100)",
        ] {
            assert_eq!(Error::from_library(words).map(|error| error.exit_code()), Some(52));
        }
        let other = Error::from_library_or("NVRTC does not compile it".into(), Error::environment);
        assert_eq!(other.to_string(), "NVRTC does not compile it");
    }

    #[test]
    fn what_a_device_says_is_code_23_in_its_own_words() {
        for words in [
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
            "CUDA error: out of memory",
            "CUDA driver error: out of memory",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "cuMemAlloc: out of memory (CUDA_ERROR_OUT_OF_MEMORY, code 2)",
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
        let text = tch::Tensor::f_empty([1 << 58], (tch::Kind::Float, tch::Device::Cpu))
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
