//! Kernels: machine code as NVRTC makes it is read as far as the driver's answers and the
//! strictness need it. It is not run: a program for CPUs, made from the same text, runs in its
//! place.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_uint, c_void};

use crate::failure::fail;
use crate::switches::switches;

/// An ELF machine number: NVIDIA's.
const CUDA: u16 = 190;
const HEADER: usize = 64;
const SECTION: usize = 64;
/// Attributes of a kernel with a value of several bytes, and the one that describes a parameter.
const SIZED: u8 = 4;
const PARAMETER: u8 = 0x17;

/// Bytes of a block's memory that a kernel may have without asking for more, and the most that it
/// may ask for.
pub const USUAL_BLOCK_BYTES: c_uint = 48 << 10;
pub const MOST_BLOCK_BYTES: c_uint = 99 << 10;

/// A function as `<name>_on_host` of the library that the switch names: blocks, threads and bytes
/// of memory of each, addresses of the arguments.
pub type OnHost = unsafe extern "C" fn(c_uint, c_uint, c_uint, *mut *mut c_void);

/// Code for one architecture.
#[derive(Debug)]
pub struct Module {
    /// Ten times the compute capability.
    pub architecture: u32,
    /// Bytes of each parameter, by the kernel's name.
    pub kernels: BTreeMap<String, Vec<usize>>,
}

#[derive(Clone)]
pub struct Function {
    pub module: usize,
    pub name: String,
    pub parameters: Vec<usize>,
    pub most_block_bytes: c_uint,
}

impl Module {
    /// None for what is no cubin.
    ///
    /// # Safety
    /// A cubin must be whole: only it says how long it is.
    pub unsafe fn read(image: *const c_void) -> Option<Self> {
        let start = image.cast::<u8>();
        // SAFETY: the caller's duty; a header is the least of it.
        let header = unsafe { std::slice::from_raw_parts(start, HEADER) };
        if header[..5] != *b"\x7fELF\x02" || u16_at(header, 18) != CUDA {
            return None;
        }
        let (sections, count) = (u64_at(header, 40) as usize, usize::from(u16_at(header, 60)));
        let ends = |image: &[u8]| {
            (0..count)
                .map(|number| Section::at(image, sections, number))
                .map(|section| section.end())
                .max()
        };
        // SAFETY: as above; the table of sections comes after the header, and says where each
        // section lies.
        let table = unsafe { std::slice::from_raw_parts(start, sections + count * SECTION) };
        // SAFETY: as above.
        let whole = unsafe { std::slice::from_raw_parts(start, ends(table)?.max(table.len())) };
        let names = Section::at(whole, sections, usize::from(u16_at(header, 62)));
        let mut kernels = BTreeMap::new();
        for section in (0..count).map(|number| Section::at(whole, sections, number)) {
            let name = CStr::from_bytes_until_nul(&whole[names.offset + section.name..])
                .ok()?
                .to_str()
                .ok()?;
            if let Some(kernel) = name.strip_prefix(".nv.info.") {
                kernels
                    .insert(kernel.to_string(), parameters(&whole[section.offset..section.end()]));
            }
        }
        Some(Module { architecture: u32_at(header, 48) >> 8 & 0xff, kernels })
    }

    /// Machine code runs on GPUs of its generation that are not older.
    pub fn runs_on(&self, architecture: u32) -> bool {
        self.architecture / 10 == architecture / 10 && self.architecture <= architecture
    }
}

/// Where a section lies.
struct Section {
    name: usize,
    offset: usize,
    size: usize,
}

impl Section {
    fn at(image: &[u8], table: usize, number: usize) -> Self {
        /// A section that takes no room in the image.
        const NOBITS: u32 = 8;
        let entry = &image[table + number * SECTION..];
        let size = if u32_at(entry, 4) == NOBITS { 0 } else { u64_at(entry, 32) as usize };
        Section { name: u32_at(entry, 0) as usize, offset: u64_at(entry, 24) as usize, size }
    }

    fn end(&self) -> usize {
        self.offset + self.size
    }
}

/// Bytes of each parameter that a kernel's attributes describe.
fn parameters(mut attributes: &[u8]) -> Vec<usize> {
    let mut sizes = BTreeMap::new();
    while let [form, attribute, rest @ ..] = attributes {
        let length = if *form == SIZED { usize::from(u16_at(rest, 0)) } else { 0 };
        if (*form, *attribute) == (SIZED, PARAMETER) {
            // An index, the parameter's number, its offset, and its size above 18 bits of other
            // things.
            sizes.insert(u16_at(rest, 6), (u32_at(rest, 10) >> 18) as usize);
        }
        attributes = &rest[2 + length..];
    }
    sizes.into_values().collect()
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

/// What runs in the place of a kernel.
pub fn on_host(kernel: &str) -> OnHost {
    let Some(library) = &switches().kernels else {
        fail(format!(
            "cuLaunchKernel: {kernel} cannot run here: NCCL_DOUBLE_KERNELS names no library to run instead"
        ))
    };
    let path =
        CString::new(library.as_os_str().as_encoded_bytes()).expect("an environment variable");
    // SAFETY: both texts end with a zero; the library stays open.
    let function = unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        let name = CString::new(format!("{kernel}_on_host")).expect("the name of a function");
        if handle.is_null() { std::ptr::null_mut() } else { libc::dlsym(handle, name.as_ptr()) }
    };
    if function.is_null() {
        fail(format!("cuLaunchKernel: there is no {kernel}_on_host in {}", library.display()));
    }
    // SAFETY: by its name it is such a function.
    unsafe { std::mem::transmute::<*mut c_void, OnHost>(function) }
}
