//! Modules and launches: what is read of machine code, and what a function for CPUs gets in its
//! place.

use std::ffi::{CStr, c_void};
use std::process::Command;
use std::ptr::null_mut;

use super::rank::*;
use crate::cuda::*;

const INVALID_VALUE: u32 = 1;
const INVALID_IMAGE: u32 = 200;
const NO_BINARY_FOR_GPU: u32 = 209;
const NOT_FOUND: u32 = 500;

/// An image of one kernel, `add`, that takes a pointer, a long and a struct of 12 bytes: no code,
/// but what is read of it.
pub fn image(architecture: u8) -> Vec<u8> {
    let names = b"\0.nv.info.add\0.shstrtab\0";
    let mut info = vec![3, 0x1b, 0xff, 0];
    for (number, size) in [(2u16, 12u32), (1, 8), (0, 8)] {
        info.extend([4, 0x17, 12, 0, 0, 0, 0, 0]);
        info.extend(number.to_le_bytes());
        info.extend([0, 0]);
        info.extend((size << 18 | 0x1f000).to_le_bytes());
    }
    let (info_at, names_at) = (64, 64 + info.len());
    let table = (names_at + names.len()).next_multiple_of(8);
    let mut image =
        [b"\x7fELF\x02\x01\x01\x41\x08\0\0\0\0\0\0\0\x02\0\xbe\0".as_slice(), &[0; 44]].concat();
    image[40..48].copy_from_slice(&(table as u64).to_le_bytes());
    image[49] = architecture;
    image[58..64].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
    image.extend(&info);
    image.extend(names);
    image.resize(table + 3 * 64, 0);
    for (number, name, offset, size) in
        [(1, 1u32, info_at, info.len()), (2, 14, names_at, names.len())]
    {
        let entry = table + number * 64;
        image[entry..entry + 4].copy_from_slice(&name.to_le_bytes());
        image[entry + 4] = 3;
        image[entry + 24..entry + 32].copy_from_slice(&(offset as u64).to_le_bytes());
        image[entry + 32..entry + 40].copy_from_slice(&(size as u64).to_le_bytes());
    }
    image
}

pub fn load(image: &[u8]) -> (u32, *mut c_void) {
    let mut module = null_mut();
    (unsafe { cuModuleLoadData(&mut module, image.as_ptr().cast()) }, module)
}

fn function(module: *mut c_void, name: &CStr) -> (u32, *mut c_void) {
    let mut function = null_mut();
    (unsafe { cuModuleGetFunction(&mut function, module, name.as_ptr()) }, function)
}

/// The kernel, in a module of its own.
pub fn kernel() -> (*mut c_void, *mut c_void) {
    let (_, module) = load(&image(90));
    (module, function(module, c"add").1)
}

/// Launches blocks of so many threads and bytes of memory on one axis, with a number for each
/// parameter.
pub fn run(
    function: *mut c_void,
    [blocks, threads, block_bytes]: [u32; 3],
    stream: *mut c_void,
    arguments: [*mut c_void; 3],
) -> u32 {
    let mut arguments = arguments;
    unsafe {
        cuLaunchKernel(
            function,
            blocks,
            1,
            1,
            threads,
            1,
            1,
            block_bytes,
            stream,
            arguments.as_mut_ptr(),
            null_mut(),
        )
    }
}

#[test]
fn machine_code_is_read_and_a_function_for_cpus_runs_in_its_place() {
    let folder = std::env::temp_dir().join(format!("nccl-double-kernels-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let text = "extern \"C\" void add_on_host(unsigned blocks, unsigned threads, unsigned block_bytes, void **arguments) {\n\
                *(float *)*(long **)arguments[0] += *(long *)arguments[1] + ((float *)arguments[2])[2] + 100 * blocks + 1000 * threads\n\
                + 10000 * block_bytes; }";
    std::fs::write(folder.join("add.cpp"), text).unwrap();
    let made = Command::new("g++")
        .args(["-shared", "-fPIC", "-o", "add.so", "add.cpp"])
        .current_dir(&folder)
        .status()
        .unwrap();
    assert!(made.success());
    let library = folder.join("add.so");
    expect_success(&launch(
        1,
        "kernels::program",
        &[("NCCL_DOUBLE_KERNELS", library.to_str().unwrap())],
    ));
    std::fs::remove_dir_all(folder).unwrap();
}

pub fn program() {
    let rank = Rank::start();
    assert_eq!(load(&[0; 64]).0, INVALID_IMAGE);
    assert_eq!(load(&image(100)).0, NO_BINARY_FOR_GPU, "this GPU is of architecture 90");
    assert_eq!(load(&image(91)).0, NO_BINARY_FOR_GPU);
    let (code, module) = load(&image(90));
    assert_eq!(code, 0);
    assert_eq!(function(module, c"subtract").0, NOT_FOUND);
    let (code, add) = function(module, c"add");
    assert_eq!(code, 0);
    let parameter = |number: usize| {
        let (mut offset, mut size) = (0, 0);
        (unsafe { cuFuncGetParamInfo(add, number, &mut offset, &mut size) }, offset, size)
    };
    assert_eq!([0, 1, 2].map(parameter), [(0, 0, 8), (0, 8, 8), (0, 16, 12)]);
    assert_eq!(parameter(3).0, INVALID_VALUE);
    let (mut sum, mut long, mut floats) = (0.5f32, 7i64, [0.0f32, 0.0, 0.25]);
    let mut start = &raw mut sum;
    let arguments = [(&raw mut start).cast(), (&raw mut long).cast(), floats.as_mut_ptr().cast()];
    assert_eq!(run(add, [0, 32, 0], null_mut(), arguments), INVALID_VALUE);
    assert_eq!(run(add, [1, 1025, 0], null_mut(), arguments), INVALID_VALUE);
    assert_eq!(run(add, [2, 32, 0], null_mut(), arguments), 0);
    assert_eq!(sum, 0.5 + 7.0 + 0.25 + 200.0 + 32_000.0);
    const BLOCK_BYTES: u32 = 8;
    assert_eq!(run(add, [1, 32, (48 << 10) + 1], null_mut(), arguments), INVALID_VALUE);
    assert_eq!(cuFuncSetAttribute(add, BLOCK_BYTES, (99 << 10) + 1), INVALID_VALUE);
    assert_eq!(cuFuncSetAttribute(add, BLOCK_BYTES, 99 << 10), 0);
    sum = 0.0;
    assert_eq!(run(add, [1, 32, 99 << 10], null_mut(), arguments), 0);
    assert_eq!(sum, (7.0f32 + 0.25 + 100.0 + 32_000.0) + 10_000.0 * 101_376.0);
    assert_eq!(cuModuleUnload(module), 0);
    rank.end();
}
