//! A rank's device, and the communicator that carries the device's tensors.

use std::io::{self, Write};

use tch::{Cuda, Device};

use crate::assembly::attention::{choose_attention, tokens_of_data};
use crate::assembly::kernels::verify_kernels;
use crate::collective::agreement::agreed;
use crate::collective::{Collective, Limits, Nccl, local_rank};
use crate::config::RunConfig;
use crate::cuda;
use crate::error::{Error, Result};
use crate::flow::Note;
use crate::nn::Tokens;
use crate::nn::attention::open_on;
use crate::ops::{self, Kernels};
use crate::parallel::{Backend, DeviceChoice};

/// A rank's device, with an NCCL communicator if the launcher's world cannot carry the device's
/// tensors.
pub struct RankDevice {
    pub device: Device,
    /// Lines for the log: the backends of attention and how they were chosen, and kernels that are
    /// left out.
    pub notes: Vec<Note>,
    nccl: Option<Nccl>,
}

impl RankDevice {
    /// # Errors
    /// [`Error::Environment`] if there is no GPU for this rank, or a library is missing.
    ///
    /// # Ordering
    /// Every rank of `world` calls it.
    pub fn open(config: &RunConfig, world: &dyn Collective) -> Result<Self> {
        let OpenedDevice { device, notes } = device(config, || tokens_of_data(config), world)?;
        let by_nccl = match config.parallel.backend {
            Backend::Auto => !world.carries(device),
            Backend::Mpi => false,
            Backend::Nccl => true,
        };
        let (watchdog, usual) = (&config.watchdog, Limits::default());
        let limits = Limits {
            init: watchdog.connect_timeout(),
            operation: watchdog.operation_timeout(),
            ..usual
        };
        let nccl = by_nccl.then(|| Nccl::connect(world, device, limits)).transpose()?;
        Ok(RankDevice { device, notes, nccl })
    }

    /// Returns the communicator for tensors of the device.
    pub fn collective<'p>(&'p self, world: &'p dyn Collective) -> &'p dyn Collective {
        self.nccl.as_ref().map_or(world, |nccl| nccl)
    }

    /// Leaks the communicator after an error: destroying it would wait for peers that are gone.
    pub fn leak(self) {
        std::mem::forget(self.nccl);
    }
}

/// A rank's device, and what the log says of attention and kernels on it.
pub struct OpenedDevice {
    pub device: Device,
    pub notes: Vec<Note>,
}

impl OpenedDevice {
    /// Returns the device for a command without a log, after its warnings were printed.
    pub fn without_log(self) -> Device {
        let warnings = self.notes.iter().filter(|note| matches!(note, Note::Warning(_)));
        // A closed pipe changes nothing.
        warnings.for_each(|note| drop(writeln!(io::stderr(), "fm-dist: {note}")));
        self.device
    }
}

/// Opens the GPU with this rank's index in its node, or the CPU, and makes operations and attention
/// use the configured kernels. `samples`: the tokens of the samples that will be computed.
///
/// # Errors
/// As [`RankDevice::open`].
///
/// # Ordering
/// Every rank of `world` calls it, after it has set libtorch's number of threads.
pub fn device(
    config: &RunConfig,
    samples: impl FnOnce() -> Vec<Tokens>,
    world: &dyn Collective,
) -> Result<OpenedDevice> {
    ops::choose(config.compute.kernels);
    match config.parallel.device {
        DeviceChoice::Cpu => Ok(OpenedDevice { device: Device::Cpu, notes: Vec::new() }),
        DeviceChoice::Cuda => {
            let number = local_rank(world)?;
            let mut notes = choose_attention(config, samples, number, world)?;
            let device = agreed(gpu(number), world)?;
            notes.extend(verify_kernels(config.compute.kernels, device, world)?);
            Ok(OpenedDevice { device, notes })
        }
    }
}

/// Opens libtorch's CUDA library if the configuration computes on GPUs.
///
/// # Errors
/// [`Error::Environment`] if the library is not installed.
///
/// # Ordering
/// To be called before the first random number, and before anything else for which libtorch asks
/// for its CUDA library: it asks once, and a process that asked too early finds no GPU.
pub fn open_libraries(config: &RunConfig) -> Result<()> {
    match config.parallel.device {
        DeviceChoice::Cpu => Ok(()),
        DeviceChoice::Cuda => cuda::open_libtorch(),
    }
}

/// Opens the device of a command that has no configuration: attention is libtorch's own choice.
///
/// # Errors
/// [`Error::Environment`] if there is no GPU for this rank, or a library is missing.
///
/// # Ordering
/// Every rank of `world` calls it, before the first tensor.
pub fn plain_device(choice: DeviceChoice, world: &dyn Collective) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda => {
            let device = agreed(local_rank(world).and_then(gpu), world)?;
            let notes = verify_kernels(Kernels::Fused, device, world)?;
            Ok(OpenedDevice { device, notes }.without_log())
        }
    }
}

fn gpu(number: usize) -> Result<Device> {
    cuda::open_libtorch()?;
    let count = Cuda::device_count();
    if number as i64 >= count {
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        return Err(Error::environment(format!(
            "rank {number} of host {host} needs a GPU of its own, and libtorch finds {count}"
        )));
    }
    cuda::health::watch(number);
    let device = Device::Cuda(number);
    open_on(device);
    Ok(device)
}
