//! A world of one rank. Every collective completes at once, so no caller has to check the world
//! size.

use tch::{Device, Tensor, no_grad};

use super::call::Call;
use super::{Collective, Issued, ReduceOp, Sliced, Spent, Work};
use crate::error::Result;

/// The only rank of its world; needs neither a launcher nor MPI.
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

    fn all_reduce(&self, buffers: Vec<Tensor>, _op: ReduceOp) -> Result<Work> {
        buffers.iter().try_for_each(|buffer| call("all_reduce").check_buffer(buffer))?;
        Ok(Work::done())
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, _op: ReduceOp) -> Result<Work> {
        for mut sliced in tensors {
            call("reduce_scatter").check_slices(&sliced, 1)?;
            no_grad(|| sliced.owned.copy_(&sliced.full.view_as(&sliced.owned)));
        }
        Ok(Work::done())
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        for mut sliced in tensors {
            call("all_gather").check_slices(&sliced, 1)?;
            no_grad(|| sliced.full.copy_(&sliced.owned.view_as(&sliced.full)));
        }
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

    fn split(&self, _color: usize) -> Result<Box<dyn Collective>> {
        Ok(Box::new(Solo))
    }

    fn carries(&self, _device: Device) -> bool {
        true
    }

    fn spent(&self) -> Spent {
        Spent::default()
    }

    /// Nothing is counted: there is no peer to compare with.
    fn issued(&self) -> Issued {
        Issued::default()
    }
}
