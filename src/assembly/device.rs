//! A rank's device, and the communicator that carries the device's tensors.

use tch::{Cuda, Device};

use crate::collective::agreement::agreed;
use crate::collective::{Collective, Limits, Nccl, local_rank};
use crate::config::RunConfig;
use crate::cuda;
use crate::error::{Error, Result};
use crate::ops;
use crate::parallel::{Backend, DeviceChoice};

/// A rank's device, with an NCCL communicator if the launcher's world cannot carry the device's
/// tensors.
pub struct RankDevice {
    pub device: Device,
    nccl: Option<Nccl>,
}

impl RankDevice {
    /// # Errors
    /// [`Error::Environment`] if there is no GPU for this rank, or a library is missing.
    ///
    /// # Ordering
    /// Every rank of `world` calls it.
    pub fn open(config: &RunConfig, world: &dyn Collective) -> Result<Self> {
        let device = device(config, world)?;
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
        Ok(RankDevice { device, nccl })
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

/// Returns the GPU with this rank's index in its node, or the CPU, and makes operations use the
/// configured kernels.
///
/// # Errors
/// As [`RankDevice::open`]; [`Error::Environment`] if a single pass on the GPU computes anything
/// but what libtorch's operators compute.
///
/// # Ordering
/// Every rank of `world` calls it, after it has set libtorch's number of threads.
pub fn device(config: &RunConfig, world: &dyn Collective) -> Result<Device> {
    config.compute.apply();
    match config.parallel.device {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda => agreed(gpu(local_rank(world)?), world),
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
    ops::verify(device).map_err(Error::environment)?;
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Solo;
    use crate::libtorch;

    #[test]
    fn cudnns_attention_is_off_unless_the_configuration_asks_for_it() {
        for (asked, allowed) in
            [("", false), ("compute.attention=cudnn", true), ("compute.attention=auto", false)]
        {
            let overrides: Vec<String> =
                std::iter::once(asked).filter(|text| !text.is_empty()).map(String::from).collect();
            let config = RunConfig::read("test", "", &overrides).expect("a sound configuration");
            device(&config, &Solo).expect("a CPU");
            assert_eq!(libtorch::allows_cudnn_attention(), allowed, "{asked}");
        }
    }
}
