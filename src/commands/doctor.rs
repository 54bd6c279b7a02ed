//! `fm-dist doctor`: reports the state of this machine, one item on each line, with the command
//! that repairs a missing one.
//!
//! Libraries are searched where the loaders would search; none is loaded. Operations are tried on
//! the CPU; attention on a GPU only with `--gpu`, in processes of their own.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;

use tch::Device;

use crate::attention::{
    Decision, Machine, NodeReport, Trial, Tried, Unavailable, standard_cases, table,
};
use crate::collective;
use crate::cuda::system;
use crate::libtorch::{self, AttentionBackend};
use crate::ops::{self, Unfit, Verified};

/// Oldest Linux driver branch that CUDA 13 supports. Source: NVIDIA, CUDA 13.0 release notes, table
/// 3.
const CUDA_13_DRIVER: u32 = 580;

/// Name of the lines about attention.
const ATTENTION: &str = "attention";

/// One line of the report.
struct Item {
    verdict: Verdict,
    name: &'static str,
    text: String,
}

enum Verdict {
    Ok,
    /// Training on the CPU needs it.
    Missing,
    /// The item is present and computes wrongly.
    Wrong,
    /// Information; a missing item that only GPUs need is a note.
    Note,
}

impl Item {
    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Item { verdict: Verdict::Ok, name, text: text.into() }
    }

    fn missing(name: &'static str, text: impl Into<String>) -> Self {
        Item { verdict: Verdict::Missing, name, text: text.into() }
    }

    fn note(name: &'static str, text: impl Into<String>) -> Self {
        Item { verdict: Verdict::Note, name, text: text.into() }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Missing => "missing",
            Verdict::Wrong => "wrong",
            Verdict::Note => "note",
        };
        write!(f, "{verdict:<7}  {:<11}  {}", self.name, self.text)
    }
}

/// Returns the report, and true if everything that training on the CPU needs is present.
pub fn report() -> (String, bool) {
    let library = libtorch::library();
    let items = [
        Item::ok("fm-dist", env!("CARGO_PKG_VERSION")),
        libtorch_item(library.as_deref()),
        Item::ok("MPI", collective::mpi_library_version()),
        mpirun_item(
            Command::new("mpirun").arg("--version").output().ok().map(|output| output.stdout),
        ),
        wheel_item("NCCL", "nccl/lib/libnccl.so", library.as_deref()),
        wheel_item("NVRTC", "cu13/lib/libnvrtc.so", library.as_deref()),
        driver_item(system::driver_version()),
        devices_item(&system::gpu_models()),
        cpu_item(),
        operations_item(ops::verify(Device::Cpu)),
    ];
    let complete =
        !items.iter().any(|item| matches!(item.verdict, Verdict::Missing | Verdict::Wrong));
    (items.map(|item| format!("{item}\n")).concat(), complete)
}

/// The attention of a GPU, and true if a backend besides the plain one is sound.
pub struct GpuAttention {
    pub text: String,
    pub is_sound: bool,
}

/// Tries every backend of attention anew on the GPU of this number, in the standard cases.
pub fn attention_on(gpu: usize) -> GpuAttention {
    let trial = Trial { cache: None, ..Trial::on_gpu(gpu) };
    match trial.run(&standard_cases()) {
        Ok(findings) => judged(&trial.machine, &findings.tried),
        Err(Unavailable(why)) => {
            let item = Item::missing("GPU", format!("attention cannot be tried: {why}"));
            GpuAttention { text: format!("{item}\n"), is_sound: false }
        }
    }
}

fn judged(machine: &Machine, tried: &[Tried]) -> GpuAttention {
    let Decision { lines, warnings, .. } = Decision::of(&[NodeReport::new(machine, tried)]);
    let has_fused =
        |tried: &Tried| tried.backend != AttentionBackend::Plain && tried.outcome.is_sound();
    let is_sound = tried.iter().any(has_fused);
    let warnings = warnings.into_iter().map(|text| Item::note(ATTENTION, text));
    let verdicts: Vec<Item> = match is_sound {
        true => lines
            .iter()
            .map(|line| Item::ok(ATTENTION, line.trim_start_matches("attention ")))
            .collect(),
        false => vec![Item {
            verdict: Verdict::Wrong,
            name: ATTENTION,
            text: "no backend but plain is sound on this GPU".into(),
        }],
    };
    let items: String = warnings.chain(verdicts).map(|item| format!("{item}\n")).collect();
    GpuAttention { text: format!("\n{}\n{items}", table(tried)), is_sound }
}

fn libtorch_item(library: Option<&Path>) -> Item {
    let Some(library) = library else {
        return Item::missing("libtorch", "not loaded; install it with launch/setup.sh");
    };
    let version = libtorch::version(library).unwrap_or_else(|| "unknown".into());
    Item::ok("libtorch", format!("{version}, {}", library.display()))
}

fn mpirun_item(version: Option<Vec<u8>>) -> Item {
    let Some(version) = version else {
        return Item::missing(
            "mpirun",
            "not in PATH; apt-get install openmpi-bin libopenmpi-dev, or module load openmpi",
        );
    };
    let version = String::from_utf8_lossy(&version);
    Item::ok("mpirun", version.lines().next().unwrap_or("unknown"))
}

/// Describes a library of the wheel. cudarc opens it by a name without a version, found in the
/// wheel's folder (this binary's rpath) or in the linker's cache.
fn wheel_item(name: &'static str, file: &str, library: Option<&Path>) -> Item {
    let wheel = library
        .and_then(|library| libtorch::torch_file(library, &format!("../nvidia/{file}")))
        .filter(|library| library.exists());
    let cached = || cached_library(Path::new(file).file_name()?.to_str()?);
    match wheel.map(|library| library.display().to_string()).or_else(cached) {
        Some(library) => Item::ok(name, library),
        None => Item::note(name, "not found; only GPUs need it, launch/setup.sh fetches it"),
    }
}

/// Returns the path of a library that is in the linker's cache under exactly this name.
fn cached_library(name: &str) -> Option<String> {
    let cache = fs::read("/etc/ld.so.cache").ok()?;
    let mut texts =
        cache.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    texts.find(|text| text.starts_with('/') && Path::new(text).ends_with(name)).map(str::to_owned)
}

fn driver_item(version: Option<String>) -> Item {
    let Some(version) = version else {
        return Item::note("CUDA driver", "none; fm-dist trains on the CPU");
    };
    let branch = version.split('.').next().and_then(|branch| branch.parse::<u32>().ok());
    match branch {
        Some(branch) if branch < CUDA_13_DRIVER => Item::note(
            "CUDA driver",
            format!(
                "{version}; this build's CUDA 13 needs {CUDA_13_DRIVER} or newer: update the driver"
            ),
        ),
        _ => Item::ok("CUDA driver", version),
    }
}

fn devices_item(models: &[String]) -> Item {
    if models.is_empty() {
        Item::note("GPUs", "none")
    } else {
        Item::ok("GPUs", format!("{}: {}", models.len(), models.join(", ")))
    }
}

fn cpu_item() -> Item {
    let cores = available_parallelism().map_or("unknown".into(), |cores| cores.to_string());
    Item::ok(
        "CPU",
        format!(
            "{cores} cores, {} threads in use by libtorch, {}",
            tch::get_num_threads(),
            libtorch::cpu_capability()
        ),
    )
}

/// Single passes beside libtorch's operators, on this CPU.
fn operations_item(Verified { cases, unfit }: Verified) -> Item {
    match unfit.first() {
        None => Item::ok(
            "operations",
            format!("compute what libtorch computes, {cases} cases on the CPU"),
        ),
        Some(Unfit { what, .. }) => Item {
            verdict: Verdict::Wrong,
            name: "operations",
            text: format!("{what}; train with compute.kernels = \"plain\", and report it"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Errors, Outcome};

    #[test]
    fn the_report_has_an_aligned_line_for_each_item() {
        let (text, complete) = report();
        assert_eq!(
            complete,
            !text.lines().any(|line| line.starts_with("missing") || line.starts_with("wrong")),
            "{text}"
        );
        assert_eq!(text.lines().count(), 10, "{text}");
        for (line, name) in text.lines().zip([
            "fm-dist",
            "libtorch",
            "MPI",
            "mpirun",
            "NCCL",
            "NVRTC",
            "CUDA driver",
            "GPUs",
            "CPU",
            "operations",
        ]) {
            assert_eq!(line.find(name), Some(9), "{text}");
        }
        assert!(text.contains("libtorch_cpu.so"), "this very process has loaded it: {text}");
    }

    #[test]
    fn what_is_missing_comes_with_its_cure() {
        assert!(
            matches!(libtorch_item(None), Item { verdict: Verdict::Missing, text, .. } if text.contains("launch/setup.sh"))
        );
        assert!(
            matches!(mpirun_item(None), Item { verdict: Verdict::Missing, text, .. } if text.contains("openmpi-bin"))
        );
    }

    #[test]
    fn an_operation_that_is_wrong_spoils_the_report() {
        let unfit = vec![Unfit { operation: "rms_norm", what: "rms_norm of [3]: off".into() }];
        let item = operations_item(Verified { cases: 0, unfit });
        assert!(matches!(item.verdict, Verdict::Wrong));
        let line = item.to_string();
        assert!(
            line.starts_with("wrong    operations   rms_norm of [3]: off; train with"),
            "{line}"
        );
    }

    #[test]
    fn a_machine_without_a_driver_or_with_an_old_one_is_a_note() {
        let item = |version: &str| driver_item(Some(version.to_owned()));
        assert!(matches!(driver_item(None).verdict, Verdict::Note));
        assert!(
            matches!(item("535.104.05"), Item { verdict: Verdict::Note, text, .. } if text.starts_with("535.104.05;"))
        );
        assert!(
            matches!(item("580.65.06"), Item { verdict: Verdict::Ok, text, .. } if text == "580.65.06")
        );
    }

    #[test]
    fn gpus_are_counted_and_named() {
        assert!(matches!(devices_item(&[]).verdict, Verdict::Note));
        let models = ["NVIDIA H100 80GB HBM3"; 2].map(String::from);
        assert_eq!(devices_item(&models).text, "2: NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3");
    }

    #[test]
    fn a_gpu_without_a_sound_backend_beside_the_plain_one_is_wrong() {
        let errors = Errors { output: 1e-3, query: 1e-3, key: 1e-3, value: 1e-3 };
        let sound = Outcome::Sound { errors, milliseconds: 1.0 };
        let tried = |flash: &Outcome| -> Vec<Tried> {
            [(AttentionBackend::Flash, flash), (AttentionBackend::Plain, &sound)]
                .map(|(backend, outcome)| Tried {
                    backend,
                    case: standard_cases()[0],
                    outcome: outcome.clone(),
                })
                .into()
        };
        let found = judged(&Machine::default(), &tried(&sound));
        assert!(found.is_sound, "{}", found.text);
        assert!(
            found.text.contains("ok       attention    without a mask: flash"),
            "{}",
            found.text
        );
        let found = judged(&Machine::default(), &tried(&Outcome::NotTaken));
        assert!(!found.is_sound);
        let line = found.text.lines().last().expect("a last line");
        assert_eq!(line, "wrong    attention    no backend but plain is sound on this GPU");
    }
}
