//! What a test may ask of the double, by environment variables (the table stands in the crate's
//! head).

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use crate::failure::fail;

/// One rank's operation, counted from 0 over all its communicators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: usize,
    pub operation: u64,
}

impl FromStr for Place {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (rank, operation) = text.split_once(':').ok_or(())?;
        Ok(Place { rank: rank.parse().map_err(drop)?, operation: operation.parse().map_err(drop)? })
    }
}

/// A launch of a kernel, counted from 0, and the driver's error that it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchError {
    pub launch: u64,
    pub code: u32,
}

impl FromStr for LaunchError {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (launch, code) = text.split_once(':').ok_or(())?;
        Ok(LaunchError { launch: launch.parse().map_err(drop)?, code: code.parse().map_err(drop)? })
    }
}

#[derive(Debug, Default)]
pub struct Switches {
    pub delay: Duration,
    pub shuffle: Option<u64>,
    pub stuck_init: Option<usize>,
    pub stuck_operation: Option<Place>,
    pub launch_error: Option<Place>,
    pub late_error: Option<Place>,
    pub abort_hangs: bool,
    pub kernel_error: Option<LaunchError>,
    pub device_error: Option<Place>,
    pub load_error: Option<u32>,
    /// Uncorrected ECC errors that NVML counts.
    pub ecc_errors: u64,
    /// The critical error that NVML tells once a kernel has failed.
    pub xid: Option<u64>,
    pub nvml_hangs: bool,
    pub num_gpus: usize,
    pub same_gpu: bool,
    pub patience: Duration,
    pub folder: Option<PathBuf>,
    pub kernels: Option<PathBuf>,
    pub modules_stay: bool,
    /// Ten times the compute capability of all GPUs.
    pub architecture: u32,
}

/// The switches of this process, read once.
pub fn switches() -> &'static Switches {
    static SWITCHES: OnceLock<Switches> = OnceLock::new();
    SWITCHES.get_or_init(|| {
        read(std::env::vars().filter(|(name, _)| name.starts_with("NCCL_DOUBLE_")).collect())
    })
}

fn read(variables: Vec<(String, String)>) -> Switches {
    let mut switches = Switches {
        num_gpus: 8,
        patience: Duration::from_secs(60),
        architecture: 90,
        ..Switches::default()
    };
    for (name, value) in variables {
        match name.as_str() {
            "NCCL_DOUBLE_DELAY_MS" => switches.delay = Duration::from_millis(parse(&name, &value)),
            "NCCL_DOUBLE_SHUFFLE" => switches.shuffle = Some(parse(&name, &value)),
            "NCCL_DOUBLE_STUCK_INIT" => switches.stuck_init = Some(parse(&name, &value)),
            "NCCL_DOUBLE_STUCK_OPERATION" => switches.stuck_operation = Some(parse(&name, &value)),
            "NCCL_DOUBLE_ERROR" => switches.launch_error = Some(parse(&name, &value)),
            "NCCL_DOUBLE_LATE_ERROR" => switches.late_error = Some(parse(&name, &value)),
            "NCCL_DOUBLE_KERNEL_ERROR" => switches.kernel_error = Some(parse(&name, &value)),
            "NCCL_DOUBLE_DEVICE_ERROR" => switches.device_error = Some(parse(&name, &value)),
            "NCCL_DOUBLE_LOAD_ERROR" => switches.load_error = Some(parse(&name, &value)),
            "NCCL_DOUBLE_ECC_ERRORS" => switches.ecc_errors = parse(&name, &value),
            "NCCL_DOUBLE_XID" => switches.xid = Some(parse(&name, &value)),
            "NCCL_DOUBLE_NVML_HANGS" => switches.nvml_hangs = parse::<u8>(&name, &value) != 0,
            "NCCL_DOUBLE_ABORT_HANGS" => switches.abort_hangs = parse::<u8>(&name, &value) != 0,
            "NCCL_DOUBLE_GPUS" => switches.num_gpus = parse(&name, &value),
            "NCCL_DOUBLE_SAME_GPU" => switches.same_gpu = parse::<u8>(&name, &value) != 0,
            "NCCL_DOUBLE_PATIENCE_MS" => {
                switches.patience = Duration::from_millis(parse(&name, &value))
            }
            "NCCL_DOUBLE_FOLDER" => switches.folder = Some(value.into()),
            "NCCL_DOUBLE_KERNELS" => switches.kernels = Some(value.into()),
            "NCCL_DOUBLE_MODULES_STAY" => switches.modules_stay = parse::<u8>(&name, &value) != 0,
            "NCCL_DOUBLE_ARCHITECTURE" => switches.architecture = parse(&name, &value),
            // A misspelled switch would make a test pass that shows nothing.
            _ => fail(format!("there is no switch {name}")),
        }
    }
    switches
}

fn parse<T: FromStr>(name: &str, value: &str) -> T {
    value.parse().unwrap_or_else(|_| fail(format!("{name}={value:?} cannot be read")))
}
