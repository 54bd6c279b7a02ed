//! Copies of frozen parameters from host memory to the device that computes with them.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::cuda::{Event, FromHost, Outcome, PinnedMemory};
use crate::error::{Error, Result};

/// The copies of one rank. On a GPU they run beside computation; where the host itself computes, a
/// copy is done when it is started.
#[derive(Default)]
pub struct Copies {
    gpu: Option<usize>,
    /// Opened by the first copy.
    stream: OnceCell<FromHost>,
}

impl Copies {
    /// Copies to this device.
    pub fn to(device: Device) -> Self {
        match device {
            Device::Cuda(ordinal) => Copies::beside(ordinal),
            _ => Copies::default(),
        }
    }

    /// Copies in a stream of the GPU with this index. The tests' double of the CUDA driver copies
    /// within host memory.
    pub fn beside(ordinal: usize) -> Self {
        Copies { gpu: Some(ordinal), stream: OnceCell::new() }
    }

    /// Returns zeros in memory of the host from which copies are fastest, with what keeps that
    /// memory where it is not libtorch's: it is dropped after the tensor.
    pub fn zeros(&self, length: i64, kind: Kind) -> (Tensor, Option<PinnedMemory>) {
        match self.gpu.map(|ordinal| PinnedMemory::zeros(ordinal, length, kind)) {
            Some(Ok((memory, tensor))) => (tensor, Some(memory)),
            other => {
                if let Some(Err(what)) = other {
                    tracing::warn!("frozen parameters lie in memory that is not pinned: {what}");
                }
                (Tensor::zeros([length], (kind, Device::Cpu)), None)
            }
        }
    }

    /// Starts to copy a tensor of the host to `device`.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn start(&self, host: &Tensor, device: Device) -> Result<Arriving> {
        let tensor = Tensor::empty(host.size(), (host.kind(), device));
        let Some(ordinal) = self.gpu else {
            tensor.shallow_clone().copy_(host);
            return Ok(Arriving::here(tensor));
        };
        let copied = self.stream(ordinal).and_then(|stream| stream.start(host, &tensor));
        Ok(Arriving { tensor, copied: Some(copied.map_err(failed)?) })
    }

    fn stream(&self, ordinal: usize) -> Outcome<&FromHost> {
        match self.stream.get() {
            Some(stream) => Ok(stream),
            None => FromHost::open(ordinal).map(|opened| self.stream.get_or_init(|| opened)),
        }
    }
}

/// A tensor on its way to the device.
pub struct Arriving {
    tensor: Tensor,
    /// The end of its copy; `None` for a tensor that is there.
    copied: Option<Event>,
}

impl Arriving {
    /// A tensor that is on the device already.
    pub fn here(tensor: Tensor) -> Self {
        Arriving { tensor, copied: None }
    }

    /// Returns the tensor; what is computed with it from here on comes after the copy.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn wait(mut self) -> Result<Tensor> {
        if let Some(copied) = self.copied.take() {
            FromHost::finish(&copied).map_err(failed)?;
        }
        Ok(self.tensor.shallow_clone())
    }
}

impl Drop for Arriving {
    /// libtorch gives the memory to later work of the compute stream, which must not come before
    /// the copy.
    fn drop(&mut self) {
        if let Some(what) = self.copied.take().and_then(|copied| FromHost::finish(&copied).err()) {
            tracing::warn!("while releasing a copy to the device: {what}");
        }
    }
}

fn failed(what: String) -> Error {
    Error::from_library_or(what, |what| Error::Device { what })
}
