//! A communicator over NCCL between GPUs, through cudarc's raw layer: its safe layer blocks during
//! initialization, does not report asynchronous errors, and aborts in destructors that may panic.
//!
//! Operations run on a stream beside libtorch's compute stream. Nothing here blocks the host: slow
//! NCCL calls are polled with a time limit, and [`Work::wait`] only makes the compute stream wait
//! for the operation. `cuda/driver.rs` has the CUDA driver's streams and events, `nccl/comm.rs`
//! NCCL's communicator, `nccl/traffic.rs` the operations under way, and `nccl/gpu_claim.rs` the
//! check that every rank has a GPU of its own. Both libraries are opened at run time, so one binary
//! serves all machines.

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
use traffic::{SideStream, Traffic};

/// Time limits of NCCL calls. They are the only way to notice a dead peer. The defaults of `init`
/// and `operation` are PyTorch's.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To connect to all peers.
    pub init: Duration,
    /// From the call of an operation to its end, including the computation queued before it and
    /// slower peers.
    pub operation: Duration,
    /// To disconnect from the peers, or to abort a communicator that failed.
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

/// This process as a rank with a GPU. Tensors on its device are carried by NCCL, all others by the
/// communicator that it was made from.
///
/// After [`Work::wait`], whatever libtorch queues on the compute stream sees the results. The host
/// does not wait, so a peer's error or an operation that hangs is reported by a later call.
pub struct Nccl {
    traffic: Rc<Traffic>,
    side: Rc<SideStream>,
    control: Box<dyn Collective>,
    device: Device,
    limits: Limits,
    ledger: Ledger,
}

fn call(operation: &'static str) -> Call {
    Call { backend: "nccl", operation }
}

/// The error of a driver that refuses a device: the device failed, or is not what is needed.
fn refused(what: String) -> Error {
    Error::from_library_or(what, Error::environment)
}

/// Version of the installed NCCL, e.g. `2.29.7`.
///
/// # Errors
/// [`Error::Environment`] if NCCL is not installed.
pub fn library_version() -> Result<String> {
    comm::version().map_err(Error::environment)
}

impl Nccl {
    /// Connects the ranks of `control`, each with the GPU whose index is the rank's index on its
    /// host. Every rank calls it. Pass `Device::Cpu` instead of a GPU to run with the tests' double
    /// of both libraries, which works in host memory.
    ///
    /// # Errors
    /// [`Error::Environment`] if a library is missing or too old, a host has fewer GPUs than ranks,
    /// or two ranks took one GPU; [`Error::Collective`] if the ranks are not connected within
    /// `limits.init`.
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
        let side = Rc::new(SideStream::open(ordinal).map_err(refused)?);
        Nccl::join(control, side, device, limits)
    }

    fn join(
        control: Box<dyn Collective>,
        side: Rc<SideStream>,
        device: Device,
        limits: Limits,
    ) -> Result<Self> {
        let (rank, world_size) = (control.rank(), control.world_size());
        let label = format!("rank {rank}/{world_size}");
        let failed = |what| call("connect").error(format!("{label}: {what}"));
        let own =
            if pulse::is_root(rank) { comm::new_id().map_err(failed)? } else { [0; ID_BYTES] };
        let id = broadcast_id(&*control, own)?;
        let communicator =
            NcclComm::join(id, rank, world_size, limits.init, limits.abort).map_err(failed)?;
        let traffic =
            Rc::new(Traffic::new(communicator, side.clone(), limits, label, device == Device::Cpu));
        Ok(Nccl { traffic, side, control, device, limits, ledger: Ledger::default() })
    }

    /// True if NCCL carries the tensor.
    fn is_on_device(&self, tensor: &Tensor) -> bool {
        tensor.device() == self.device
    }
}

/// Gathers which GPU each rank takes, and checks the claims.
fn claim_gpu(control: &dyn Collective, ordinal: usize) -> Result<()> {
    let num_gpus = driver::start().map_err(refused)?;
    let gpu = if ordinal < num_gpus { Some(driver::uuid(ordinal).map_err(refused)?) } else { None };
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

/// Returns rank 0's id on every rank.
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
        self.ledger.enter(Signature::new(call.operation, &buffers).reduced_by(op));
        let (on_device, others): (Vec<_>, Vec<_>) =
            buffers.into_iter().partition(|buffer| self.is_on_device(buffer));
        let others = start_unless_empty(others, |buffers| self.control.all_reduce(buffers, op))?;
        let transfers =
            on_device.iter().map(|buffer| Transfer::new(buffer, buffer, buffer.numel())).collect();
        let on_device =
            self.traffic.issue(call, on_device, transfers, |one, communicator, stream| {
                let Transfer { from, to, count, kind, .. } = *one;
                // SAFETY: in place on a tensor that the work owns, of `count` elements of this
                // kind.
                unsafe {
                    sys::ncclAllReduce(from, to, count, kind, reduction(op), communicator, stream)
                }
            })?;
        Ok(both(on_device, others))
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let call = call("reduce_scatter");
        tensors.iter().try_for_each(|sliced| call.check_slices(sliced, self.world_size()))?;
        self.ledger.enter(
            Signature::new(call.operation, tensors.iter().map(|sliced| &sliced.full))
                .reduced_by(op),
        );
        let (mut on_device, others): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|sliced| self.is_on_device(&sliced.full));
        let others =
            start_unless_empty(others, |tensors| self.control.reduce_scatter(tensors, op))?;
        for sliced in on_device.iter_mut().filter(|sliced| overlaps_elsewhere(sliced, self.rank()))
        {
            sliced.full = no_grad(|| sliced.full.copy());
        }
        let transfers = on_device
            .iter()
            .map(|sliced| Transfer::new(&sliced.full, &sliced.owned, sliced.owned.numel()))
            .collect();
        let on_device =
            self.traffic.issue(call, flat(on_device), transfers, |one, communicator, stream| {
                let Transfer { from, to, count, kind, .. } = *one;
                // SAFETY: the work owns both tensors; `from` holds `count` elements for each rank,
                // and `to` holds `count` elements, either apart from `from` or exactly at this
                // rank's slice of it.
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
        Ok(both(on_device, others))
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        let call = call("all_gather");
        tensors.iter().try_for_each(|sliced| call.check_slices(sliced, self.world_size()))?;
        self.ledger
            .enter(Signature::new(call.operation, tensors.iter().map(|sliced| &sliced.full)));
        let (mut on_device, others): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|sliced| self.is_on_device(&sliced.full));
        let others = start_unless_empty(others, |tensors| self.control.all_gather(tensors))?;
        for sliced in on_device.iter_mut().filter(|sliced| overlaps_elsewhere(sliced, self.rank()))
        {
            sliced.owned = no_grad(|| sliced.owned.copy());
        }
        let transfers = on_device
            .iter()
            .map(|sliced| Transfer::new(&sliced.owned, &sliced.full, sliced.owned.numel()))
            .collect();
        let on_device =
            self.traffic.issue(call, flat(on_device), transfers, |one, communicator, stream| {
                let Transfer { from, to, count, kind, .. } = *one;
                // SAFETY: the work owns both tensors; `from` holds `count` elements, and `to` holds
                // `count` elements for each rank, either apart from `from` or with `from` exactly
                // at this rank's slice.
                unsafe { sys::ncclAllGather(from, to, count, kind, communicator, stream) }
            })?;
        Ok(both(on_device, others))
    }

    fn broadcast(&self, buffer: Tensor, root: usize) -> Result<Work> {
        let call = call("broadcast");
        call.check_buffer(&buffer)?;
        call.check_root(root, self.world_size())?;
        self.ledger.enter(Signature::new(call.operation, [&buffer]).rooted_at(root));
        if !self.is_on_device(&buffer) {
            return self.control.broadcast(buffer, root);
        }
        let transfers = vec![Transfer::new(&buffer, &buffer, buffer.numel())];
        self.traffic.issue(call, vec![buffer], transfers, |one, communicator, stream| {
            let Transfer { from, to, count, kind, .. } = *one;
            // SAFETY: in place on a tensor that the work owns, of `count` elements of this kind.
            unsafe { sys::ncclBroadcast(from, to, count, kind, root as i32, communicator, stream) }
        })
    }

    fn barrier(&self) -> Result<()> {
        self.traffic.check_health(call("barrier"))?;
        self.ledger.enter(Signature::new("barrier", []));
        self.control.barrier()
    }

    /// Creates a communicator with an id of its own. `ncclCommSplit` would need the ranks of all
    /// colors, and an error of one part would affect the others.
    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        self.traffic.check_health(call("split"))?;
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

    /// Leaks it: destroying it would wait for its peers.
    fn abandon(self: Box<Self>) {
        std::mem::forget(self);
    }
}

/// Arguments of one NCCL call within a group, by address. The caller owns the tensors.
struct Transfer {
    from: *const c_void,
    to: *mut c_void,
    /// Elements of one rank's slice; of the whole tensor for in-place operations.
    count: usize,
    kind: ncclDataType_t,
    /// Bytes of the larger tensor.
    bytes: usize,
}

impl Transfer {
    fn new(from: &Tensor, to: &Tensor, count: usize) -> Self {
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

/// Starts the operation on the tensors of other devices, if there are any.
fn start_unless_empty<T>(
    tensors: Vec<T>,
    start: impl FnOnce(Vec<T>) -> Result<Work>,
) -> Result<Option<Work>> {
    if tensors.is_empty() { Ok(None) } else { start(tensors).map(Some) }
}

fn both(on_device: Work, others: Option<Work>) -> Work {
    match others {
        None => on_device,
        Some(others) => Work::new(move || on_device.wait().and(others.wait())),
    }
}

fn flat(tensors: Vec<Sliced>) -> Vec<Tensor> {
    tensors.into_iter().flat_map(|Sliced { owned, full }| [owned, full]).collect()
}

/// True if `owned` shares memory with `full` elsewhere than at this rank's slice, which NCCL
/// forbids.
fn overlaps_elsewhere(Sliced { owned, full }: &Sliced, rank: usize) -> bool {
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
        assert!(!overlaps_elsewhere(&slice(2), 1));
        assert!(overlaps_elsewhere(&slice(2), 0));
        assert!(overlaps_elsewhere(&slice(1), 0));
        assert!(!overlaps_elsewhere(
            &Sliced { owned: Tensor::zeros([2], (Kind::Float, Device::Cpu)), full },
            1
        ));
    }

    #[test]
    fn a_transfer_counts_the_bytes_of_the_larger_tensor() {
        let (owned, full) = (
            Tensor::zeros([2], (Kind::Double, Device::Cpu)),
            Tensor::zeros([6], (Kind::Double, Device::Cpu)),
        );
        let transfer = Transfer::new(&full, &owned, owned.numel());
        assert_eq!(
            (transfer.count, transfer.bytes, transfer.kind),
            (2, 48, ncclDataType_t::ncclFloat64)
        );
    }
}
