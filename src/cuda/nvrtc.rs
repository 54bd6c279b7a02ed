//! NVRTC, the run-time compiler: compiles a kernel's source to machine code for one architecture.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr::{null, null_mut};

use cudarc::nvrtc::sys;

use super::{Outcome, text};

/// Compiler options. Without fused multiply-add a product is rounded before it is added, unless the
/// source asks for one. NVRTC's other defaults round as IEEE 754 requires.
pub const OPTIONS: [&CStr; 2] = [c"--std=c++17", c"--fmad=false"];

/// Checks that NVRTC is installed and returns its version, e.g. `13.0`.
pub fn version() -> Outcome<String> {
    numbers().map(|(major, minor)| format!("{major}.{minor}"))
}

fn numbers() -> Outcome<(c_int, c_int)> {
    // SAFETY: only opens the library, whose initializers have no requirements.
    if !unsafe { sys::is_culib_present() } {
        return Err("NVRTC is not found: looked for libnvrtc.so in LD_LIBRARY_PATH and the system's folders; launch/setup.sh \
                    puts it into .deps/nvidia/cu13/lib"
            .into());
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both results are written to live integers.
    check("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major, minor))
}

/// Compiles `source` to machine code (a cubin) for an architecture like `sm_90`. `file` is the name
/// of the source in messages.
///
/// # Errors
/// The compiler's messages, all lines joined to one.
pub fn compile(file: &str, source: &str, architecture: &str) -> Outcome<Vec<u8>> {
    let (major, minor) = numbers()?;
    open_builtins(major, minor);
    let program = Program::new(&terminated(file), &terminated(source))?;
    let refused =
        |what| format!("NVRTC {major}.{minor} does not compile {file} for {architecture}: {what}");
    program.compile(&terminated(&format!("--gpu-architecture={architecture}"))).map_err(refused)?;
    program.machine_code()
}

fn terminated(text: &str) -> CString {
    CString::new(text).expect("sources and names have no zeros")
}

/// Opens NVRTC's second library, which NVRTC opens by its bare name: it looks neither in its own
/// folder, where the wheel has the library, nor in the run paths of this program. A library that is
/// already open is found.
fn open_builtins(major: c_int, minor: c_int) {
    use libloading::os::unix::Library;
    // SAFETY: the library holds data and functions for NVRTC; its initializers have no
    // requirements.
    match unsafe { Library::new(format!("libnvrtc-builtins.so.{major}.{minor}")) } {
        Ok(library) => std::mem::forget(library),
        // With another installation NVRTC finds it by itself, or reports that it does not.
        Err(error) => tracing::debug!("{error}"),
    }
}

/// A program of NVRTC.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(file: &CStr, source: &CStr) -> Outcome<Self> {
        let mut raw = null_mut();
        // SAFETY: both texts are zero-terminated and copied, there are no headers, and the result
        // is written to a live pointer.
        let code = unsafe {
            sys::nvrtcCreateProgram(&mut raw, source.as_ptr(), file.as_ptr(), 0, null(), null())
        };
        check("nvrtcCreateProgram", code)?;
        Ok(Program(raw))
    }

    fn compile(&self, architecture: &CStr) -> Outcome<()> {
        let options: Vec<*const c_char> =
            [architecture].iter().chain(&OPTIONS).map(|option| option.as_ptr()).collect();
        // SAFETY: the program exists, and each of the options is zero-terminated.
        let code =
            unsafe { sys::nvrtcCompileProgram(self.0, options.len() as c_int, options.as_ptr()) };
        check("nvrtcCompileProgram", code).map_err(|what| match self.log() {
            Ok(log) if !log.is_empty() => log,
            _ => what,
        })
    }

    /// The compiler's messages in one line.
    fn log(&self) -> Outcome<String> {
        let log =
            self.read("nvrtcGetProgramLog", sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)?;
        let log = String::from_utf8_lossy(&log).into_owned();
        let lines =
            log.trim_end_matches('\0').lines().map(str::trim).filter(|line| !line.is_empty());
        Ok(lines.collect::<Vec<_>>().join("; "))
    }

    fn machine_code(&self) -> Outcome<Vec<u8>> {
        self.read("nvrtcGetCUBIN", sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)
    }

    /// Reads one of the compiler's results: `size` returns the number of bytes that `get` writes.
    fn read(
        &self,
        function: &str,
        size: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        get: unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
    ) -> Outcome<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the program exists, and the result is written to a live integer.
        check(function, unsafe { size(self.0, &mut length) })?;
        let mut bytes = vec![0u8; length];
        // SAFETY: the program exists, and the buffer has the size that the library asked for.
        check(function, unsafe { get(self.0, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once and destroyed once.
        if let Err(what) =
            check("nvrtcDestroyProgram", unsafe { sys::nvrtcDestroyProgram(&mut self.0) })
        {
            tracing::warn!("while releasing: {what}");
        }
    }
}

fn check(function: &str, code: sys::nvrtcResult) -> Outcome<()> {
    if code == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: a text that NVRTC keeps.
    Err(format!(
        "{function}: {} (code {})",
        text(unsafe { sys::nvrtcGetErrorString(code) }),
        code as u32
    ))
}
