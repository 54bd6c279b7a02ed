//! A world of one: nothing to wait for, so that no caller asks how many ranks there are.

use tch::{Tensor, no_grad};

use super::call::Call;
use super::{Collective, ReduceOp, Work};
use crate::error::Result;

/// The only rank of its world; needs no launcher and no MPI.
#[derive(Debug, Default)]
pub struct Solo;

fn call(operation: &'static str) -> Call {
    Call { backend: "solo", operation }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&self, buffer: Tensor, op: ReduceOp) -> Result<Work> {
        call("all_reduce").check_reduction(&buffer, op)?;
        Ok(Work::done())
    }

    fn reduce_scatter(&self, full: Tensor, mut owned: Tensor, op: ReduceOp) -> Result<Work> {
        let call = call("reduce_scatter");
        call.check_reduction(&full, op)?;
        call.check_slices(&owned, &full, 1)?;
        no_grad(|| owned.copy_(&full.view_as(&owned)));
        Ok(Work::done())
    }

    fn all_gather(&self, owned: Tensor, mut full: Tensor) -> Result<Work> {
        call("all_gather").check_slices(&owned, &full, 1)?;
        no_grad(|| full.copy_(&owned.view_as(&full)));
        Ok(Work::done())
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        let call = call("broadcast");
        call.check_buffer(&buffer)?;
        call.check_root(root, 1)?;
        Ok(Work::done())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
