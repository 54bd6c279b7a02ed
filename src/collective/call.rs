//! Checks of an operation's arguments, shared by all backends so that the same mistake gets the
//! same message everywhere.

use tch::{Kind, Tensor};

use super::Sliced;
use crate::error::{Error, Result};

/// One operation of one backend, as error messages name it.
#[derive(Clone, Copy)]
pub struct Call {
    pub backend: &'static str,
    pub operation: &'static str,
}

impl Call {
    pub fn error(self, what: impl Into<String>) -> Error {
        Error::Collective { backend: self.backend, operation: self.operation, what: what.into() }
    }

    /// Refuses kinds that not every backend can carry, and tensors that are not contiguous.
    pub fn check_buffer(self, buffer: &Tensor) -> Result<()> {
        let kind = buffer.kind();
        if !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64) {
            return Err(self.error(format!(
                "cannot carry {kind:?}; convert to Float, Double, BFloat16 or Int64 first"
            )));
        }
        if !buffer.is_contiguous() {
            return Err(
                self.error(format!("tensor of shape {:?} is not contiguous", buffer.size()))
            );
        }
        Ok(())
    }

    /// Checks that `full` holds exactly one `owned` for each rank, of the same kind and device.
    pub fn check_slices(self, Sliced { owned, full }: &Sliced, world_size: usize) -> Result<()> {
        self.check_buffer(owned)?;
        self.check_buffer(full)?;
        if owned.kind() != full.kind() || owned.device() != full.device() {
            let side = |tensor: &Tensor| format!("{:?} on {:?}", tensor.kind(), tensor.device());
            return Err(self.error(format!("owned is {}, full is {}", side(owned), side(full))));
        }
        if owned.numel() * world_size != full.numel() {
            let (owned, full) = (owned.numel(), full.numel());
            return Err(self
                .error(format!("full has {full} elements, {world_size} ranks own {owned} each")));
        }
        Ok(())
    }

    pub fn check_root(self, root: usize, world_size: usize) -> Result<()> {
        if root < world_size {
            Ok(())
        } else {
            Err(self.error(format!("no rank {root} among {world_size}")))
        }
    }
}
