//! NCCL between GPUs, over cudarc's raw layer: its safe one blocks at the start, knows no
//! asynchronous errors, and aborts in destructors that may panic.
//!
//! Operations run on a stream beside the one in which libtorch computes. Nothing in here blocks the
//! host: what NCCL takes its time for is polled, with a limit, and [`Work::wait`] only orders the
//! compute stream behind the operation. `cuda/driver.rs` has the CUDA driver's streams and events,
//! `nccl/comm.rs` NCCL's own, `nccl/traffic.rs` what is under way, and `nccl/gpu_claim.rs` the
//! rule of one GPU a rank. Both libraries are opened at run time, so that one binary serves all
//! machines.

#![allow(unsafe_code)]

mod comm;
mod gpu_claim;
mod traffic;

use std::ffi::c_void;
use std::rc::Rc;
use std::time::Duration;

use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t};
use tch::{Device, Kind, Tensor, no_grad};

use super::call::Call;
use super::ledger::{Ledger, Signature};
use super::{Collective, Issued, ReduceOp, Sliced, Spent, Work, gather_texts, local_rank};
use crate::cuda::driver;
use crate::error::{Error, Result};
use crate::pulse;
use comm::{ID_BYTES, NcclComm};
use gpu_claim::GpuClaim;
use traffic::{Side, Traffic};

/// How long NCCL may take before it is given up. A peer that is dead is noticed by nothing else.
/// The defaults of the first two are PyTorch's.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To connect to all peers.
    pub init: Duration,
    /// From the call of an operation to its end, computation before it and slower peers included.
    pub operation: Duration,
    /// To take leave of the peers, or of a communicator that failed.
    pub abort: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            init: Duration::from_secs(600),
            operation: Duration::from_secs(600),
            abort: Duration::from_secs(5),
        }
    }
}

/// This process as a rank with a GPU. Tensors on its device travel by NCCL, all others by the world
/// that it was made from.
///
/// A [`Work`] is over for the device: what libtorch computes after [`Work::wait`] sees the results.
/// An error of a peer or an operation that never ends shows at a later call, since the host does
/// not wait.
pub struct Nccl {
    traffic: Rc<Traffic>,
    side: Rc<Side>,
    control: Box<dyn Collective>,
    device: Device,
    limits: Limits,
    ledger: Ledger,
}

fn call(operation: &'static str) -> Call {
    Call { backend: "nccl", operation }
}

/// Version of the NCCL that is installed, like `2.29.7`.
///
/// # Errors
/// [`Error::Environment`] if none is.
pub fn library_version() -> Result<String> {
    comm::version().map_err(Error::environment)
}

impl Nccl {
    /// The ranks of `control` with a GPU each: number n of those that its host shows, for the n-th
    /// rank there. Every rank calls it. `Device::Cpu` in place of a GPU is for a stand-in of both
    /// libraries that works on the host's memory.
    ///
    /// # Errors
    /// [`Error::Environment`] for a library that is missing or too old, for fewer GPUs than ranks
    /// on a host, and for ranks with one GPU; [`Error::Collective`] if the ranks do not come
    /// together within `limits.init`.
    pub fn connect(control: &dyn Collective, device: Device, limits: Limits) -> Result<Self> {
        let control = control.split(0)?;
        let ordinal = local_rank(&*control)?;
        if ![Device::Cpu, Device::Cuda(ordinal)].contains(&device) {
            let rank = control.rank();
            return Err(Error::environment(format!(
                "rank {rank} is number {ordinal} of its host and was given {device:?}, not GPU {ordinal}"
            )));
        }
        claim_gpu(&*control, ordinal)?;
        let side = Rc::new(Side::open(ordinal).map_err(Error::environment)?);
        Nccl::join(control, side, device, limits)
    }

    fn join(
        control: Box<dyn Collective>,
        side: Rc<Side>,
        device: Device,
        limits: Limits,
    ) -> Result<Self> {
        let (rank, world_size) = (control.rank(), control.world_size());
        let place = format!("rank {rank}/{world_size}");
        let failed = |what| call("connect").error(format!("{place}: {what}"));
        let own =
            if pulse::is_root(rank) { comm::new_id().map_err(failed)? } else { [0; ID_BYTES] };
        let id = broadcast_id(&*control, own)?;
        let communicator =
            NcclComm::join(id, rank, world_size, limits.init, limits.abort).map_err(failed)?;
        let traffic =
            Rc::new(Traffic::new(communicator, side.clone(), limits, place, device == Device::Cpu));
        Ok(Nccl { traffic, side, control, device, limits, ledger: Ledger::default() })
    }

    /// Which of the tensors are NCCL's to carry.
    fn is_here(&self, tensor: &Tensor) -> bool {
        tensor.device() == self.device
    }
}

/// Tells the others which GPU this rank takes, and compares.
fn claim_gpu(control: &dyn Collective, ordinal: usize) -> Result<()> {
    let num_gpus = driver::start().map_err(Error::environment)?;
    let gpu = if ordinal < num_gpus {
        Some(driver::uuid(ordinal).map_err(Error::environment)?)
    } else {
        None
    };
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    let claim = GpuClaim { host, num_gpus, gpu, nccl: library_version()? };
    let text = serde_json::to_string(&claim).expect("texts and numbers become JSON");
    let broken = |error| call("connect").error(format!("a rank's claim cannot be read: {error}"));
    let claims = gather_texts(control, &text)?
        .iter()
        .map(|text| serde_json::from_str(text))
        .collect::<serde_json::Result<Vec<GpuClaim>>>();
    gpu_claim::check(&claims.map_err(broken)?)
}

/// The id of rank 0, on every rank.
fn broadcast_id(control: &dyn Collective, own: [u8; ID_BYTES]) -> Result<[u8; ID_BYTES]> {
    let bytes = Tensor::from_slice(&own.map(i64::from));
    control.broadcast(bytes.shallow_clone(), 0)?.wait()?;
    let bytes: Vec<u8> = Vec::<i64>::try_from(bytes)
        .expect("a flat integer tensor")
        .into_iter()
        .map(|byte| byte as u8)
        .collect();
    Ok(bytes.try_into().expect("as many as were sent"))
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn world_size(&self) -> usize {
        self.control.world_size()
    }

    fn all_reduce(&self, buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work> {
        let call = call("all_reduce");
        buffers.iter().try_for_each(|buffer| call.check_buffer(buffer))?;
        self.ledger.enter(Signature::new(call.operation, &buffers).by(op));
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            buffers.into_iter().partition(|buffer| self.is_here(buffer));
        let elsewhere = unless_empty(elsewhere, |buffers| self.control.all_reduce(buffers, op))?;
        let transfers =
            here.iter().map(|buffer| Transfer::between(buffer, buffer, buffer.numel())).collect();
        let here = self.traffic.issue(call, here, transfers, |one, communicator, stream| {
            let Transfer { from, to, count, kind, .. } = *one;
            // SAFETY: in place on a tensor that the work owns, of `count` elements of this kind.
            unsafe {
                sys::ncclAllReduce(from, to, count, kind, reduction(op), communicator, stream)
            }
        })?;
        Ok(both(here, elsewhere))
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let call = call("reduce_scatter");
        tensors.iter().try_for_each(|sliced| call.check_slices(sliced, self.world_size()))?;
        self.ledger.enter(
            Signature::new(call.operation, tensors.iter().map(|sliced| &sliced.full)).by(op),
        );
        let (mut here, elsewhere): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|sliced| self.is_here(&sliced.full));
        let elsewhere =
            unless_empty(elsewhere, |tensors| self.control.reduce_scatter(tensors, op))?;
        for sliced in here.iter_mut().filter(|sliced| clash(sliced, self.rank())) {
            sliced.full = no_grad(|| sliced.full.copy());
        }
        let transfers = here
            .iter()
            .map(|sliced| Transfer::between(&sliced.full, &sliced.owned, sliced.owned.numel()))
            .collect();
        let here =
            self.traffic.issue(call, flat(here), transfers, |one, communicator, stream| {
                let Transfer { from, to, count, kind, .. } = *one;
                // SAFETY: the work owns both tensors; `from` holds `count` elements for each rank,
                // `to` has room for `count`, apart from `from` or in this rank's place of it.
                unsafe {
                    sys::ncclReduceScatter(
                        from,
                        to,
                        count,
                        kind,
                        reduction(op),
                        communicator,
                        stream,
                    )
                }
            })?;
        Ok(both(here, elsewhere))
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        let call = call("all_gather");
        tensors.iter().try_for_each(|sliced| call.check_slices(sliced, self.world_size()))?;
        self.ledger
            .enter(Signature::new(call.operation, tensors.iter().map(|sliced| &sliced.full)));
        let (mut here, elsewhere): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|sliced| self.is_here(&sliced.full));
        let elsewhere = unless_empty(elsewhere, |tensors| self.control.all_gather(tensors))?;
        for sliced in here.iter_mut().filter(|sliced| clash(sliced, self.rank())) {
            sliced.owned = no_grad(|| sliced.owned.copy());
        }
        let transfers = here
            .iter()
            .map(|sliced| Transfer::between(&sliced.owned, &sliced.full, sliced.owned.numel()))
            .collect();
        let here =
            self.traffic.issue(call, flat(here), transfers, |one, communicator, stream| {
                let Transfer { from, to, count, kind, .. } = *one;
                // SAFETY: the work owns both tensors; `from` holds `count` elements, `to` has room
                // for `count` of each rank, apart from `from` or around it in this rank's place.
                unsafe { sys::ncclAllGather(from, to, count, kind, communicator, stream) }
            })?;
        Ok(both(here, elsewhere))
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        let call = call("broadcast");
        call.check_buffer(&buffer)?;
        call.check_root(root, self.world_size())?;
        self.ledger.enter(Signature::new(call.operation, [&buffer]).rooted_at(root));
        if !self.is_here(&buffer) {
            return self.control.broadcast(buffer, root);
        }
        let transfers = vec![Transfer::between(&buffer, &buffer, buffer.numel())];
        self.traffic.issue(call, vec![buffer], transfers, |one, communicator, stream| {
            let Transfer { from, to, count, kind, .. } = *one;
            // SAFETY: in place on a tensor that the work owns, of `count` elements of this kind.
            unsafe { sys::ncclBroadcast(from, to, count, kind, root as i32, communicator, stream) }
        })
    }

    fn barrier(&self) -> Result<()> {
        self.traffic.look(call("barrier"))?;
        self.ledger.enter(Signature::new("barrier", []));
        self.control.barrier()
    }

    /// A communicator with an id of its own: `ncclCommSplit` would need the peers of the other
    /// colors, and shares their fate.
    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        self.traffic.look(call("split"))?;
        self.ledger.enter(Signature::new("split", []));
        let part = self.control.split(color)?;
        Ok(Box::new(Nccl::join(part, self.side.clone(), self.device, self.limits)?))
    }

    fn carries(&self, device: Device) -> bool {
        device == self.device || self.control.carries(device)
    }

    fn spent(&self) -> Spent {
        self.traffic.spent() + self.control.spent()
    }

    fn issued(&self) -> Issued {
        self.ledger.issued()
    }
}

/// One call of a group, by address: who makes it must own the tensors.
struct Transfer {
    from: *const c_void,
    to: *mut c_void,
    /// Elements of one rank.
    count: usize,
    kind: ncclDataType_t,
    /// Of the larger tensor.
    bytes: usize,
}

impl Transfer {
    fn between(from: &Tensor, to: &Tensor, count: usize) -> Self {
        let bytes = from.numel().max(to.numel()) * from.kind().elt_size_in_bytes();
        Transfer {
            from: from.data_ptr(),
            to: to.data_ptr(),
            count,
            kind: datatype(from.kind()),
            bytes,
        }
    }
}

/// Starts what concerns the tensors of other devices, if there are any.
fn unless_empty<T>(
    tensors: Vec<T>,
    start: impl FnOnce(Vec<T>) -> Result<Work>,
) -> Result<Option<Work>> {
    if tensors.is_empty() { Ok(None) } else { start(tensors).map(Some) }
}

fn both(here: Work, elsewhere: Option<Work>) -> Work {
    match elsewhere {
        None => here,
        Some(elsewhere) => Work::new(move || here.wait().and(elsewhere.wait())),
    }
}

fn flat(tensors: Vec<Sliced>) -> Vec<Tensor> {
    tensors.into_iter().flat_map(|Sliced { owned, full }| [owned, full]).collect()
}

/// Whether a rank's slice shares memory with the whole elsewhere than in its own place there, which
/// NCCL forbids.
fn clash(Sliced { owned, full }: &Sliced, rank: usize) -> bool {
    let start = |tensor: &Tensor| tensor.data_ptr() as usize;
    let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    let overlap =
        start(owned) < start(full) + bytes(full) && start(full) < start(owned) + bytes(owned);
    overlap && start(owned) != start(full) + rank * bytes(owned)
}

fn datatype(kind: Kind) -> ncclDataType_t {
    match kind {
        Kind::Float => ncclDataType_t::ncclFloat32,
        Kind::Double => ncclDataType_t::ncclFloat64,
        Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
        Kind::Int64 => ncclDataType_t::ncclInt64,
        other => unreachable!("check_buffer refuses {other:?}"),
    }
}

fn reduction(op: ReduceOp) -> ncclRedOp_t {
    match op {
        ReduceOp::Sum => ncclRedOp_t::ncclSum,
        ReduceOp::Min => ncclRedOp_t::ncclMin,
        ReduceOp::Max => ncclRedOp_t::ncclMax,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_in_its_own_place_is_no_clash() {
        let full = Tensor::zeros([6], (Kind::Float, Device::Cpu));
        let slice =
            |start: i64| Sliced { owned: full.narrow(0, start, 2), full: full.shallow_clone() };
        assert!(!clash(&slice(2), 1));
        assert!(clash(&slice(2), 0));
        assert!(clash(&slice(1), 0));
        assert!(!clash(&Sliced { owned: Tensor::zeros([2], (Kind::Float, Device::Cpu)), full }, 1));
    }

    #[test]
    fn a_transfer_counts_the_bytes_of_the_larger_tensor() {
        let (owned, full) = (
            Tensor::zeros([2], (Kind::Double, Device::Cpu)),
            Tensor::zeros([6], (Kind::Double, Device::Cpu)),
        );
        let transfer = Transfer::between(&full, &owned, owned.numel());
        assert_eq!(
            (transfer.count, transfer.bytes, transfer.kind),
            (2, 48, ncclDataType_t::ncclFloat64)
        );
    }
}
