//! One NCCL communicator that never blocks the host: each call is polled until NCCL has accepted
//! it, and abandoned after a time limit.

use std::cell::Cell;
use std::ffi::c_int;
use std::ptr::{null, null_mut};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::nccl::{result, sys};

use crate::cuda::{Outcome, text};

/// Bytes of the id that all ranks of a communicator need in order to connect.
pub(super) const ID_BYTES: usize = 128;

/// NCCL version, in NCCL's encoding, whose layout of [`sys::ncclConfig_t`] cudarc declares. A newer
/// library reads older layouts.
const CONFIG_VERSION: u32 = 22_907;
/// NCCL's marker of an initialized configuration.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// NCCL's value for an integer option that is left to its default.
const UNDEFINED: c_int = c_int::MIN;

/// Polls without a pause: NCCL accepts most calls within microseconds, and Linux adds 50 of them to
/// any sleep.
const EAGER_POLLS: u32 = 100;
/// Pause between later polls: short beside the seconds in which NCCL connects peers, and little
/// load on the core.
const PAUSE: Duration = Duration::from_micros(200);

/// A communicator of NCCL; null once it is aborted or destroyed.
pub(super) struct NcclComm {
    raw: Cell<sys::ncclComm_t>,
    /// Time that NCCL may take to finalize or abort it.
    teardown_timeout: Duration,
}

/// Checks that NCCL is installed and returns its version, e.g. `2.29.7`.
pub(super) fn version() -> Outcome<String> {
    // SAFETY: only opens the library, whose initializers have no requirements.
    if !unsafe { sys::is_culib_present() } {
        return Err("NCCL is not found: looked for libnccl.so in LD_LIBRARY_PATH and the system's folders; launch/setup.sh \
                    puts it into .deps/nvidia/nccl/lib"
            .into());
    }
    let mut version = 0;
    // SAFETY: the result is written to a live integer.
    check("ncclGetVersion", unsafe { sys::ncclGetVersion(&mut version) })?;
    Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// Returns the id of a new communicator.
pub(super) fn new_id() -> Outcome<[u8; ID_BYTES]> {
    let id = result::get_uniqueid().map_err(|error| refusal("ncclGetUniqueId", error.0))?;
    Ok(id.internal.map(|byte| byte as u8))
}

impl NcclComm {
    /// Joins the communicator `id` as rank `rank` of `world_size`, on this thread's current device.
    /// Every rank calls it.
    pub fn join(
        id: [u8; ID_BYTES],
        rank: usize,
        world_size: usize,
        limit: Duration,
        teardown_timeout: Duration,
    ) -> Outcome<Self> {
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        let (mut raw, mut config) = (null_mut(), nonblocking_config());
        // SAFETY: NCCL copies the configuration and the id during the call, and the result is
        // written to a live handle.
        let code = unsafe {
            sys::ncclCommInitRankConfig(
                &mut raw,
                world_size as c_int,
                id,
                rank as c_int,
                &mut config,
            )
        };
        let communicator = NcclComm { raw: Cell::new(raw), teardown_timeout };
        let joined = check("ncclCommInitRankConfig", code)
            .and_then(|()| communicator.wait_until_accepted(limit));
        joined
            .and_then(|()| communicator.check_rank(rank, world_size))
            .inspect_err(|_| communicator.abort())?;
        Ok(communicator)
    }

    fn check_rank(&self, rank: usize, world_size: usize) -> Outcome<()> {
        let (mut found_rank, mut found_size) = (0, 0);
        // SAFETY: the communicator is joined, and both results are written to live integers.
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

    /// Issues several transfers as one NCCL group. `call` gets a transfer, the communicator and the
    /// stream.
    pub fn group<T>(
        &self,
        stream: sys::cudaStream_t,
        transfers: &[T],
        call: impl Fn(&T, sys::ncclComm_t, sys::cudaStream_t) -> sys::ncclResult_t,
    ) -> Outcome<()> {
        // SAFETY: the group is ended below on every path.
        check("ncclGroupStart", unsafe { sys::ncclGroupStart() })?;
        let called = transfers.iter().try_for_each(|transfer| {
            check("a call of the group", call(transfer, self.raw.get(), stream))
        });
        // SAFETY: the group was started above.
        let ended = check("ncclGroupEnd", unsafe { sys::ncclGroupEnd() });
        called.and(ended)
    }

    /// Polls until NCCL has accepted the calls made so far.
    pub fn wait_until_accepted(&self, limit: Duration) -> Outcome<()> {
        let accepted = poll(limit, || self.has_accepted())?;
        if accepted {
            Ok(())
        } else {
            Err(format!("NCCL is still in progress after {:.1} s", limit.as_secs_f64()))
        }
    }

    /// True if NCCL has accepted the calls made so far.
    ///
    /// # Errors
    /// An asynchronous error, of this rank or of a peer, as far as NCCL reports it.
    pub fn has_accepted(&self) -> Outcome<bool> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is not destroyed, and the result is written to a live variable.
        check("ncclCommGetAsyncError", unsafe {
            sys::ncclCommGetAsyncError(self.raw.get(), &mut state)
        })?;
        check("asynchronous error", state)?;
        Ok(state != sys::ncclResult_t::ncclInProgress)
    }

    /// Destroys the communicator without its peers. `ncclCommAbort` itself is known to hang, so it
    /// runs on a thread that is abandoned if it takes too long.
    pub fn abort(&self) {
        let raw = self.raw.replace(null_mut());
        if raw.is_null() {
            return;
        }
        let address = raw.expose_provenance();
        let (sender, done) = mpsc::channel();
        let abort = move || {
            // SAFETY: the address was taken out of the communicator, so no other code uses it from
            // here on.
            let code =
                unsafe { sys::ncclCommAbort(std::ptr::with_exposed_provenance_mut(address)) };
            // After the time limit the receiver is gone.
            let _ = sender.send(code);
        };
        let seconds = self.teardown_timeout.as_secs_f64();
        match thread::Builder::new()
            .name("nccl abort".into())
            .spawn(abort)
            .map(|_| done.recv_timeout(self.teardown_timeout))
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

    /// Waits until NCCL has completed the operations under way, then destroys the communicator.
    fn finalize(&self) -> Outcome<()> {
        // SAFETY: the communicator is joined, and nothing is started on it any more.
        check("ncclCommFinalize", unsafe { sys::ncclCommFinalize(self.raw.get()) })?;
        self.wait_until_accepted(self.teardown_timeout)?;
        // SAFETY: the communicator is finalized, and its handle is cleared here.
        check("ncclCommDestroy", unsafe { sys::ncclCommDestroy(self.raw.replace(null_mut())) })
    }
}

impl Drop for NcclComm {
    /// Finalizes the communicator, which needs the peers. After an early return they may never do
    /// their part, so it is aborted after the time limit.
    fn drop(&mut self) {
        if self.raw.get().is_null() {
            return;
        }
        if let Err(what) = self.finalize() {
            tracing::warn!("NCCL could not take leave of its peers: {what}");
            self.abort();
        }
    }
}

fn nonblocking_config() -> sys::ncclConfig_t {
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

/// Calls `is_done` until it returns `true`; `false` if the limit is reached first.
pub(super) fn poll(limit: Duration, mut is_done: impl FnMut() -> Outcome<bool>) -> Outcome<bool> {
    let began = Instant::now();
    for attempt in 0.. {
        if is_done()? {
            return Ok(true);
        }
        if began.elapsed() >= limit {
            break;
        }
        if attempt < EAGER_POLLS { thread::yield_now() } else { thread::sleep(PAUSE) }
    }
    Ok(false)
}

/// Turns an error code into an error. A call in progress is not an error: its caller polls.
fn check(function: &str, code: sys::ncclResult_t) -> Outcome<()> {
    use sys::ncclResult_t::{ncclInProgress, ncclSuccess};
    if [ncclSuccess, ncclInProgress].contains(&code) {
        Ok(())
    } else {
        Err(refusal(function, code))
    }
}

fn refusal(function: &str, code: sys::ncclResult_t) -> String {
    // SAFETY: both return texts that NCCL keeps; the last error of the process needs no
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
        let mut polls = 0;
        let third = || {
            polls += 1;
            Ok(polls == 3)
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
