//! Our own GPU kernels: the compiler of the wheel takes them, they have the bits of a CPU, and one
//! that computes anything but what libtorch's operators compute is refused.
//!
//! Without a GPU the driver is a double of it (`tests/nccl_double`). It reads what the real NVRTC
//! compiled and runs, in the place of machine code, the same text as C++: the arithmetic, its order
//! and its bounds are the kernel's own; what the compiler makes of them is not seen. The double is
//! opened by name, so it needs a child that finds it first.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use fm_dist::collective;
use fm_dist::cuda::{self, nvrtc};
use fm_dist::optim::adamw::OnGpu;
use fm_dist::optim::{AdamW, Average, Optimizer, Slice, Update};
use fm_dist::phase::Phase;
use fm_dist::pulse;
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::double::{double, project, with_libraries};
use crate::worlds::{Outcome, run};

const KERNEL: &str = include_str!("../../src/optim/adamw/kernel.cu");

/// Of A100, of H100 and H200, of B200.
const ARCHITECTURES: [u8; 3] = [80, 90, 100];

/// A library of AdamW's kernel for CPUs, made from a text.
fn adamw_on_host(folder: &Path, kernel: &str) -> PathBuf {
    let text = folder.join("kernel.cu");
    fs::write(&text, kernel).unwrap();
    on_host(folder, "adamw.cpp", &format!("-DKERNEL=\"{}\"", text.display()))
}

/// A library of kernels for CPUs: `program` includes their texts, which `definition` names.
pub fn on_host(folder: &Path, program: &str, definition: &str) -> PathBuf {
    let library = folder.join("kernels.so");
    let mut compiler = Command::new("g++");
    compiler.args([
        "-std=c++20",
        "-O1",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        // Where it is the default, jumps from one stack to another are refused.
        "-U_FORTIFY_SOURCE",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
    ]);
    compiler.arg(definition).arg(project("tests/nccl_double/kernels").join(program));
    assert!(
        compiler.arg("-o").arg(&library).status().expect("g++ runs").success(),
        "the kernel is no C++"
    );
    library
}

/// A program of this file in a child with the double, which runs `kernel` in the place of
/// what is compiled.
fn doubled(program: &str, kernel: &str, switches: &[(&str, &str)]) -> Outcome {
    let folder = TempDir::new().unwrap();
    doubled_with(program, &adamw_on_host(folder.path(), kernel), switches)
}

/// A program in a child with the double, which runs this library's kernels.
pub fn doubled_with(program: &str, kernels: &Path, switches: &[(&str, &str)]) -> Outcome {
    let mut command = with_libraries(Command::new(std::env::current_exe().unwrap()), double());
    command.env("NCCL_DOUBLE_KERNELS", kernels).envs(switches.iter().copied());
    run(command, program)
}

#[test]
fn the_compiler_of_the_wheel_makes_machine_code_for_each_architecture() {
    let version = nvrtc::version().expect("launch/setup.sh brings NVRTC");
    let pinned = format!("nvidia-cuda-nvrtc=={version}.");
    for list in [
        include_str!("../../launch/requirements/cuda.txt"),
        include_str!("../../launch/requirements/libtorch.txt"),
    ] {
        assert!(list.contains(&pinned), "{version} is not the version that is pinned");
    }
    for architecture in ARCHITECTURES {
        let code =
            nvrtc::compile("adamw/kernel.cu", KERNEL, &format!("sm_{architecture}")).unwrap();
        // An ELF file of machine 190, NVIDIA's, for this architecture.
        assert_eq!((&code[..4], code[18], code[49]), (&b"\x7fELF"[..], 190, architecture));
    }
}

#[test]
fn the_kernel_takes_what_is_handed_over_and_rounds_as_it_is_written() {
    // Opens what NVRTC needs.
    nvrtc::compile("adamw/kernel.cu", KERNEL, "sm_80").unwrap();
    let mut options: Vec<String> =
        nvrtc::OPTIONS.iter().map(|option| option.to_str().unwrap().into()).collect();
    options.push("--gpu-architecture=compute_80".into());
    let ptx =
        compile_ptx_with_opts(KERNEL, CompileOptions { options, ..CompileOptions::default() })
            .unwrap()
            .to_src();
    let entry = ptx
        .split(".visible .entry adamw(")
        .nth(1)
        .and_then(|rest| rest.split(')').next())
        .expect("a function by this name");
    let parameters: Vec<&str> =
        entry.split(',').map(|parameter| parameter.trim().trim_start_matches(".param ")).collect();
    let pointers_and_length = (0..9).map(|number| format!(".u64 adamw_param_{number}"));
    let by_value = [
        ".align 8 .b8 adamw_param_9[2048]",
        ".u64 adamw_param_10",
        ".align 4 .b8 adamw_param_11[36]",
    ];
    assert_eq!(
        parameters,
        pointers_and_length.chain(by_value.map(String::from)).collect::<Vec<_>>()
    );
    // The bounds are read where the launch put them: a copy for each thread would be 2 KiB more to
    // move.
    assert!(!ptx.contains(".local"), "{ptx}");
    for inexact in [".approx", ".full", ".ftz"] {
        assert!(!ptx.contains(inexact), "{inexact}");
    }
    let count = |instruction: &str| ptx.matches(instruction).count();
    // Two products fused for every element that is written out: those of a wide turn, of a narrow
    // turn, and of its unrolling.
    let elements = count("sqrt.rn.f32");
    assert_eq!(
        (count("rcp.rn.f32"), count("fma.rn.f32"), count("div.rn")),
        (elements, 2 * elements, 0)
    );
    assert!(
        elements >= 5 && count("ld.global.v4.f32") >= 4 && count("st.global.v4.u16") >= 1,
        "{ptx}"
    );
}

#[test]
fn a_mistake_in_a_kernel_is_told_in_the_compilers_own_words() {
    let broken = KERNEL.replace("param * rule.decay", "param * rule.decoy");
    let what = nvrtc::compile("adamw/kernel.cu", &broken, "sm_90").unwrap_err();
    let line = 1 + KERNEL.lines().position(|line| line.contains("param * rule.decay")).unwrap();
    assert!(what.starts_with("NVRTC 13.0 does not compile adamw/kernel.cu for sm_90: "), "{what}");
    assert!(
        what.contains(&format!(
            "adamw/kernel.cu({line}): error: class \"Rule\" has no member \"decoy\""
        )),
        "{what}"
    );
    assert!(!what.contains('\n'), "{what}");
    let what = nvrtc::compile("adamw/kernel.cu", KERNEL, "sm_1").unwrap_err();
    assert!(what.contains("--gpu-architecture"), "{what}");
}

#[test]
fn the_kernel_has_the_bits_of_a_cpu() {
    let Outcome { code, output, .. } =
        doubled("mpi::kernels::process_with_the_kernel", KERNEL, &[]);
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("the kernel has the bits"), "{output}");
}

/// Numbers within a larger buffer of a device, `offset` elements behind its beginning.
struct Within {
    buffer: Tensor,
    numbers: Tensor,
    offset: i64,
}

impl Within {
    fn new(numbers: &Tensor, offset: i64, device: Device) -> Self {
        let (length, kind) = (numbers.numel() as i64, numbers.kind());
        let buffer = Tensor::full([offset + length + 9], -7.0, (kind, device));
        let mut place = buffer.narrow(0, offset, length);
        place.copy_(numbers);
        Within { buffer, numbers: place, offset }
    }

    /// What the kernel left, on the CPU.
    fn found(&self) -> Tensor {
        let end = self.offset + self.numbers.numel() as i64;
        let around = [self.buffer.narrow(0, 0, self.offset), self.buffer.narrow(0, end, 9)];
        assert!(
            bool::try_from(Tensor::cat(&around, 0).eq(-7.0).all()).unwrap(),
            "written beside the slice"
        );
        self.numbers.to_device(Device::Cpu)
    }
}

pub fn process_with_the_kernel() {
    gives_the_bits_of_a_cpu(Device::Cpu);
    println!("the kernel has the bits");
}

/// The kernel on `device` beside the single pass on the CPU, step by step.
pub(crate) fn gives_the_bits_of_a_cpu(device: Device) {
    for (settings, offset, has_copy) in
        [("", 0, false), ("", 0, true), ("", 1, true), ("beta1 = 0.3\nweight_decay = 0.5", 4, true)]
    {
        let mut adamw = AdamW::default();
        fm_dist::settings::read(&mut adamw, "test", settings, &[]).unwrap();
        let on_gpu = OnGpu::ready(&adamw, device).unwrap_or_else(|error| panic!("{error}"));
        let on_cpu = adamw.on(Device::Cpu).unwrap();
        // One element, less than four, several blocks that go round, more runs than one launch
        // takes.
        for length in [1, 3, 4, 1027, 20_000] {
            let case = format!("{length} elements at {offset}, {settings:?}");
            three_steps(&*on_cpu, (&on_gpu, device), length, offset, has_copy, &case);
        }
    }
}

fn three_steps(
    on_cpu: &dyn Update,
    (on_gpu, device): (&OnGpu, Device),
    length: i64,
    offset: i64,
    has_copy: bool,
    case: &str,
) {
    let draw = || [(); 7].map(|()| Tensor::randn([length], (Kind::Float, Device::Cpu)));
    let [mut params, average, mean, square, gradients @ ..] =
        Key::new(5, Purpose::Test).scope(length as u64).seeded(draw);
    let mut state = [mean * 0.1, square.square() * 0.1];
    let runs = (0..length / 8).map(|run| (8 * run + run % 3, 1 + run % 5));
    let decayed: Vec<(i64, i64)> =
        runs.filter(|(start, length_of_run)| start + length_of_run <= length).collect();
    let there = |numbers: &Tensor| Within::new(numbers, offset, device);
    let (mut there_params, there_state) = (there(&params), [there(&state[0]), there(&state[1])]);
    // In f32 for an odd length, in bfloat16 for an even one.
    let average = if length % 2 == 1 { average } else { average.to_kind(Kind::BFloat16) };
    let (mut there_average, mut average) = (there(&average), average);
    let mut there_copy = there(&params.zeros_like().to_kind(Kind::BFloat16));
    for (number, gradient) in gradients.iter().enumerate() {
        // Of many sizes.
        let gradient = gradient * (&params * 3.0).exp();
        let kind = if number == 1 { Kind::BFloat16 } else { Kind::Float };
        let gradient = gradient.to_kind(kind);
        let gradient_there = there(&gradient);
        let (gradient_factor, lr, step) = (0.37, 0.01, number as u64 + 1);
        let share = 0.3;
        let slice = Slice {
            params: &mut params,
            gradient: &gradient,
            gradient_factor,
            state: &mut state,
            computed: None,
            average: Some(Average { values: &mut average, share }),
            decayed: &decayed,
            decay_factor: 1.5,
        };
        on_cpu.update(slice, lr, step);
        let mut state_there = [0, 1].map(|index: usize| there_state[index].numbers.shallow_clone());
        let slice = Slice {
            params: &mut there_params.numbers,
            gradient: &gradient_there.numbers,
            gradient_factor,
            state: &mut state_there,
            computed: has_copy.then_some(&mut there_copy.numbers),
            average: has_copy.then_some(Average { values: &mut there_average.numbers, share }),
            decayed: &decayed,
            decay_factor: 1.5,
        };
        on_gpu.update(slice, lr, step);
        assert!(
            there_state.iter().zip(&state).all(|(found, expected)| found.found().equal(expected)),
            "{case}, step {step}"
        );
        assert!(there_params.found().equal(&params), "{case}, step {step}");
        assert!(!has_copy || there_average.found().equal(&average), "{case}, step {step}");
        assert!(
            !has_copy || there_copy.found().equal(&params.to_kind(Kind::BFloat16)),
            "{case}, step {step}"
        );
    }
}

/// Three steps of the kernel, which end as the program does when a launch fails. Launches 0 and 1
/// are [`OnGpu::ready`]'s.
pub fn process_whose_gpu_fails() {
    std::panic::set_hook(Box::new(|panic| collective::end_after_panic(panic)));
    cuda::health::watch(0);
    // Answered once the GPU is watched.
    println!("faults before: {:?}", cuda::health::faults());
    let ready = OnGpu::ready(&AdamW::default(), Device::Cpu);
    let on_gpu = ready.unwrap_or_else(|error| collective::end_with(error));
    let numbers = || Tensor::ones([1000], (Kind::Float, Device::Cpu));
    let (mut params, gradient, mut state) = (numbers(), numbers(), [numbers(), numbers()]);
    for step in 1..=3 {
        pulse::begin_step(step);
        pulse::enter(Phase::Optimizer);
        let slice = Slice {
            params: &mut params,
            gradient: &gradient,
            gradient_factor: 1.0,
            state: &mut state,
            computed: None,
            average: None,
            decayed: &[],
            decay_factor: 1.0,
        };
        on_gpu.update(slice, 0.01, step);
    }
    println!("the GPU ended well");
}

/// Runs [`process_whose_gpu_fails`] with these switches; it ends with this code and one line, which
/// has the words, within the time that a failing run has.
fn gpu_fails(switches: &[(&str, &str)], code: i32, words: &[&str]) -> String {
    let Outcome { code: found, output, .. } =
        doubled("mpi::kernels::process_whose_gpu_fails", KERNEL, switches);
    assert_eq!(found, Some(code), "{output}");
    let lines: Vec<&str> =
        output.lines().filter(|line| line.starts_with("fm-dist: error")).collect();
    assert_eq!(lines.len(), 1, "{output}");
    words.iter().for_each(|word| assert!(lines[0].contains(word), "{word:?}: {output}"));
    lines[0].into()
}

const LATE: &str =
    "Kernels run behind the host, so the place may be late: CUDA_LAUNCH_BLOCKING=1 finds it";

#[test]
fn a_launch_that_fails_on_the_gpu_is_code_23_with_the_drivers_words() {
    for (error, words) in [
        (
            "3:700",
            "an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS, code 700)",
        ),
        (
            "3:715",
            "an illegal instruction was encountered (CUDA_ERROR_ILLEGAL_INSTRUCTION, code 715)",
        ),
        ("3:719", "unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED, code 719)"),
    ] {
        let whole =
            format!("step 2 phase optimizer: AdamW's kernel: cuLaunchKernel: {words}. {LATE}");
        let line = gpu_fails(&[("NCCL_DOUBLE_KERNEL_ERROR", error)], 23, &["error DEVICE", &whole]);
        assert!(line.ends_with("finds it. exit 23"), "NVML knows of no fault: {line}");
    }
    // The first launch is the trial's, at the start of a run.
    let words = ["error DEVICE", "AdamW's kernel on Cpu: cuLaunchKernel: an illegal memory access"];
    gpu_fails(&[("NCCL_DOUBLE_KERNEL_ERROR", "0:700")], 23, &words);
}

#[test]
fn nvmls_faults_of_the_gpu_stand_behind_the_drivers_words() {
    let switches = [
        ("NCCL_DOUBLE_KERNEL_ERROR", "3:700"),
        ("NCCL_DOUBLE_ECC_ERRORS", "2"),
        ("NCCL_DOUBLE_XID", "31"),
    ];
    let faults = "NVML: 2 uncorrected ECC errors since the driver was loaded, rows of memory wait \
                  to be remapped at the next reset, Xid 31 (memory page fault). exit 23";
    gpu_fails(&switches, 23, &[LATE, faults]);
}

#[test]
fn nvml_that_hangs_does_not_hold_up_the_end() {
    let switches = [("NCCL_DOUBLE_KERNEL_ERROR", "3:700"), ("NCCL_DOUBLE_NVML_HANGS", "1")];
    gpu_fails(&switches, 23, &["NVML: does not answer within 1 s. exit 23"]);
}

#[test]
fn memory_that_the_driver_lacks_is_code_53_with_what_is_free() {
    let free = "(CUDA_ERROR_OUT_OF_MEMORY, code 2); asked for an unknown size of the GPU, \
                512.00 MiB of 80.00 GiB are free; take a smaller micro-batch";
    let launch = ["error MEMORY", "step 2 phase optimizer: AdamW's kernel: cuLaunchKernel: ", free];
    gpu_fails(&[("NCCL_DOUBLE_KERNEL_ERROR", "3:2")], 53, &launch);
    let load = ["error MEMORY", "AdamW's kernel on Cpu: cuModuleLoadData: out of memory", free];
    gpu_fails(&[("NCCL_DOUBLE_LOAD_ERROR", "2")], 53, &load);
}

/// What `OnGpu::ready` says of a world of wrong kernels and missing libraries.
pub fn process_that_is_refused() {
    let error = OnGpu::ready(&AdamW::default(), Device::Cpu).err().expect("this kernel is wrong");
    println!("exit code {}: {error}", error.exit_code());
}

#[test]
fn a_kernel_that_computes_something_else_is_refused() {
    let wrong = [
        ("exp_avg_sq * rule.beta2", "exp_avg_sq * rule.fresh1", "exp_avg_sq differ"),
        ("decays ? param * rule.decay : param", "param * rule.decay", "parameters differ"),
        ("raw_gradient * rule.gradient", "raw_gradient", "exp_avg differ"),
        ("passed % 2 == 1", "passed % 2 == 0", "parameters differ"),
        ("4 * fours + thread; element < length", "4 * fours + thread; element < 0", "differ"),
        ("widened(narrow_gradient[element])", "0.0f", "exp_avg differ"),
        ("0x7fff + (bits >> 16 & 1)", "0", "the parameters in bfloat16"),
        ("(unsigned int)value << 16", "(unsigned int)value << 15", "exp_avg differ"),
        ("rule.average_share * (average - param)", "rule.average_share * average", "averages"),
        ("sqrtf(exp_avg_sq) *", "sqrtf(exp_avg_sq - 2.0f) *", "parameters differ"),
    ];
    for (right, mutant, words) in wrong {
        assert!(KERNEL.contains(right), "{right}");
        let Outcome { code, output, .. } =
            doubled("mpi::kernels::process_that_is_refused", &KERNEL.replace(right, mutant), &[]);
        assert_eq!(code, Some(0), "{output}");
        assert!(
            output.contains("exit code 52: AdamW's kernel on Cpu: ") && output.contains(words),
            "{mutant}: {output}"
        );
    }
}

#[test]
fn a_gpu_that_the_compiler_does_not_know_is_refused() {
    let Outcome { output, .. } = doubled(
        "mpi::kernels::process_that_is_refused",
        KERNEL,
        &[("NCCL_DOUBLE_ARCHITECTURE", "20")],
    );
    assert!(output.contains("exit code 52: AdamW's kernel on Cpu: NVRTC 13.0 does not compile adamw/kernel.cu for sm_20: "), "{output}");
}

#[test]
fn a_machine_without_nvrtc_is_told_what_was_looked_for() {
    let folder = TempDir::new().unwrap();
    for name in ["libnvrtc.so", "libnvrtc.so.13"] {
        fs::write(folder.path().join(name), "no library").unwrap();
    }
    let command = with_libraries(Command::new(std::env::current_exe().unwrap()), double());
    let Outcome { output, .. } =
        run(with_libraries(command, folder.path()), "mpi::kernels::process_that_is_refused");
    assert!(
        output.contains(
            "exit code 52: AdamW's kernel on Cpu: NVRTC is not found: looked for libnvrtc.so in"
        ),
        "{output}"
    );
}
