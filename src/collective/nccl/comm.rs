//! One NCCL communicator that never blocks the host: each call is polled until NCCL has taken it,
//! and given up at a limit.

use std::cell::Cell;
use std::ffi::c_int;
use std::ptr::{null, null_mut};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::nccl::{result, sys};

use crate::cuda::{Outcome, text};

/// What every rank of a world must know to find the others.
pub(super) const ID_BYTES: usize = 128;

/// Version of NCCL whose layout of [`sys::ncclConfig_t`] cudarc gives us, in NCCL's count. A newer
/// library reads older layouts.
const CONFIG_VERSION: u32 = 22_907;
/// NCCL's mark of a configuration that was filled in.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// NCCL's mark of a number that is left to it.
const UNDEFINED: c_int = c_int::MIN;

/// Looks in a row before the first pause: NCCL takes most calls within microseconds, and Linux adds
/// 50 of them to a pause.
const EAGER_LOOKS: u32 = 100;
/// Between later looks: small beside the seconds in which NCCL connects peers, and no burden to the
/// core.
const PAUSE: Duration = Duration::from_micros(200);

/// A communicator in NCCL's hands; null once it is aborted.
pub(super) struct NcclComm {
    raw: Cell<sys::ncclComm_t>,
    /// How long to wait for NCCL to let it go.
    patience: Duration,
}

/// Checks that NCCL is installed and says which version, like `2.29.7`.
pub(super) fn version() -> Outcome<String> {
    // SAFETY: only opens the library, whose initializers ask nothing of the process.
    if !unsafe { sys::is_culib_present() } {
        return Err("NCCL is not found: looked for libnccl.so in LD_LIBRARY_PATH and the system's folders; launch/setup.sh \
                    puts it into .deps/nvidia/nccl/lib"
            .into());
    }
    let mut version = 0;
    // SAFETY: the result has a place.
    check("ncclGetVersion", unsafe { sys::ncclGetVersion(&mut version) })?;
    Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// A new world's id.
pub(super) fn new_id() -> Outcome<[u8; ID_BYTES]> {
    let id = result::get_uniqueid().map_err(|error| refusal("ncclGetUniqueId", error.0))?;
    Ok(id.internal.map(|byte| byte as u8))
}

impl NcclComm {
    /// Rank `rank` among the `world_size` that know `id`, on this thread's current device. Every
    /// rank comes here.
    pub fn join(
        id: [u8; ID_BYTES],
        rank: usize,
        world_size: usize,
        limit: Duration,
        patience: Duration,
    ) -> Outcome<Self> {
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        let (mut raw, mut config) = (null_mut(), never_blocking());
        // SAFETY: NCCL copies the configuration and the id during the call, and the result has a
        // place.
        let code = unsafe {
            sys::ncclCommInitRankConfig(
                &mut raw,
                world_size as c_int,
                id,
                rank as c_int,
                &mut config,
            )
        };
        let communicator = NcclComm { raw: Cell::new(raw), patience };
        let joined =
            check("ncclCommInitRankConfig", code).and_then(|()| communicator.settle(limit));
        joined
            .and_then(|()| communicator.check_place(rank, world_size))
            .inspect_err(|_| communicator.abort())?;
        Ok(communicator)
    }

    fn check_place(&self, rank: usize, world_size: usize) -> Outcome<()> {
        let (mut found_rank, mut found_size) = (0, 0);
        // SAFETY: the communicator is joined, and both results have a place.
        check("ncclCommUserRank", unsafe {
            sys::ncclCommUserRank(self.raw.get(), &mut found_rank)
        })?;
        // SAFETY: as above.
        check("ncclCommCount", unsafe { sys::ncclCommCount(self.raw.get(), &mut found_size) })?;
        let agrees = (found_rank, found_size) == (rank as c_int, world_size as c_int);
        if agrees {
            Ok(())
        } else {
            Err(format!(
                "NCCL says rank {found_rank} of {found_size}, expected {rank} of {world_size}"
            ))
        }
    }

    /// Hands several transfers to NCCL as one; `call` gets each, the communicator and the stream.
    pub fn group<T>(
        &self,
        stream: sys::cudaStream_t,
        transfers: &[T],
        call: impl Fn(&T, sys::ncclComm_t, sys::cudaStream_t) -> sys::ncclResult_t,
    ) -> Outcome<()> {
        // SAFETY: ended below on every path.
        check("ncclGroupStart", unsafe { sys::ncclGroupStart() })?;
        let called = transfers.iter().try_for_each(|transfer| {
            check("a call of the group", call(transfer, self.raw.get(), stream))
        });
        // SAFETY: started above.
        let ended = check("ncclGroupEnd", unsafe { sys::ncclGroupEnd() });
        called.and(ended)
    }

    /// Polls until NCCL has taken what it was given.
    pub fn settle(&self, limit: Duration) -> Outcome<()> {
        let settled = poll(limit, || self.is_settled())?;
        if settled {
            Ok(())
        } else {
            Err(format!("NCCL is still in progress after {:.1} s", limit.as_secs_f64()))
        }
    }

    /// Whether NCCL has taken what it was given.
    ///
    /// # Errors
    /// What went wrong since, here or at a peer, as far as NCCL tells.
    pub fn is_settled(&self) -> Outcome<bool> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is not given back, and the result has a place.
        check("ncclCommGetAsyncError", unsafe {
            sys::ncclCommGetAsyncError(self.raw.get(), &mut state)
        })?;
        check("asynchronous error", state)?;
        Ok(state != sys::ncclResult_t::ncclInProgress)
    }

    /// Tears the communicator down without its peers. NCCL itself is known to hang here, so that
    /// happens on a thread that is left behind when it takes too long.
    pub fn abort(&self) {
        let raw = self.raw.replace(null_mut());
        if raw.is_null() {
            return;
        }
        let address = raw.expose_provenance();
        let (sender, done) = mpsc::channel();
        let abort = move || {
            // SAFETY: the address was taken out of the communicator, so that nobody else uses it
            // from here on.
            let code =
                unsafe { sys::ncclCommAbort(std::ptr::with_exposed_provenance_mut(address)) };
            // Nobody listens any more when it took too long.
            let _ = sender.send(code);
        };
        let seconds = self.patience.as_secs_f64();
        match thread::Builder::new()
            .name("nccl abort".into())
            .spawn(abort)
            .map(|_| done.recv_timeout(self.patience))
        {
            Ok(Ok(code)) => {
                check("ncclCommAbort", code).unwrap_or_else(|what| tracing::warn!("{what}"))
            }
            Ok(Err(_)) => tracing::warn!(
                "ncclCommAbort has not returned after {seconds:.1} s and is left behind"
            ),
            Err(error) => tracing::warn!("no thread for ncclCommAbort: {error}"),
        }
    }

    /// Lets NCCL finish what is under way and takes leave of the peers.
    fn leave(&self) -> Outcome<()> {
        // SAFETY: the communicator is joined, and nothing is started on it any more.
        check("ncclCommFinalize", unsafe { sys::ncclCommFinalize(self.raw.get()) })?;
        self.settle(self.patience)?;
        // SAFETY: finalized; the handle is forgotten here.
        check("ncclCommDestroy", unsafe { sys::ncclCommDestroy(self.raw.replace(null_mut())) })
    }
}

impl Drop for NcclComm {
    /// On an early way out the peers may never take leave: after a while the communicator is
    /// aborted instead.
    fn drop(&mut self) {
        if self.raw.get().is_null() {
            return;
        }
        if let Err(what) = self.leave() {
            tracing::warn!("NCCL could not take leave of its peers: {what}");
            self.abort();
        }
    }
}

fn never_blocking() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
    }
}

/// Looks until `is_there`; false if the limit comes first.
pub(super) fn poll(limit: Duration, mut is_there: impl FnMut() -> Outcome<bool>) -> Outcome<bool> {
    let began = Instant::now();
    for look in 0.. {
        if is_there()? {
            return Ok(true);
        }
        if began.elapsed() >= limit {
            break;
        }
        if look < EAGER_LOOKS { thread::yield_now() } else { thread::sleep(PAUSE) }
    }
    Ok(false)
}

/// A call in progress is no refusal: who made it polls.
fn check(function: &str, code: sys::ncclResult_t) -> Outcome<()> {
    use sys::ncclResult_t::{ncclInProgress, ncclSuccess};
    if [ncclSuccess, ncclInProgress].contains(&code) {
        Ok(())
    } else {
        Err(refusal(function, code))
    }
}

fn refusal(function: &str, code: sys::ncclResult_t) -> String {
    // SAFETY: both return texts that NCCL keeps; the last error of the process asks for no
    // communicator.
    let (words, last) =
        unsafe { (sys::ncclGetErrorString(code), sys::ncclGetLastError(null_mut())) };
    let last = text(last);
    let detail = if last.is_empty() { String::new() } else { format!("; {last}") };
    format!("{function}: {} (code {}){detail}", text(words), code as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_ends_with_the_answer_the_limit_or_the_error() {
        let mut looks = 0;
        let third = || {
            looks += 1;
            Ok(looks == 3)
        };
        assert_eq!(poll(Duration::MAX, third), Ok(true));
        assert_eq!(poll(Duration::from_millis(1), || Ok(false)), Ok(false));
        assert_eq!(poll(Duration::MAX, || Err("broken".into())), Err("broken".to_string()));
    }

    #[test]
    fn an_answer_that_is_there_counts_even_without_time() {
        assert_eq!(poll(Duration::ZERO, || Ok(true)), Ok(true));
    }
}
