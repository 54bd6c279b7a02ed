//! The state of a rank's GPU besides its results: errors of its memory and of its driver, as NVML,
//! NVIDIA's management library, tells them, and its free memory.
//!
//! A thread of its own asks NVML and the driver, and the answer is waited for with a limit: a GPU
//! that hangs may hang them too, and must not keep a failing run from its end.

use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::{
    NVML_FI_DEV_REMAPPED_FAILURE, NVML_FI_DEV_REMAPPED_PENDING,
};
use nvml_wrapper::{Device, EventSet, Nvml};

use super::{Outcome, driver};

/// The name of NVML that every driver installs; the name without a number is a developer's.
const NVML: &str = "libnvidia-ml.so.1";

/// Longest wait for an answer: a fraction of the 5 s in which a failing run ends.
const PATIENCE: Duration = Duration::from_secs(1);

/// Most critical errors that are read for one answer.
const MOST_XIDS: usize = 64;

/// Memory of a GPU in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    pub free: u64,
    pub total: u64,
}

/// A question to the thread, with the place for its answer.
enum Question {
    Faults(SyncSender<Vec<String>>),
    Memory(SyncSender<Outcome<GpuMemory>>),
}

/// The way to the thread; `None` before [`watch`].
static THREAD: Mutex<Option<Sender<Question>>> = Mutex::new(None);

/// Registers for the critical errors (Xid) of the GPU that the driver counts as `ordinal`, and
/// makes [`faults`] and [`memory`] tell of it. Returns at once. Without NVML only [`memory`]
/// answers.
pub fn watch(ordinal: usize) {
    let (sender, questions) = channel();
    let thread = thread::Builder::new().name("health".into());
    match thread.spawn(move || answer(ordinal, &questions)) {
        Ok(_) => *THREAD.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender),
        Err(error) => tracing::debug!("no thread for NVML: {error}"),
    }
}

/// Describes the GPU's faults since the driver was loaded; empty if there is none, if no GPU is
/// watched, and without NVML.
pub fn faults() -> Vec<String> {
    match ask(Question::Faults) {
        Ok(faults) => faults,
        Err(RecvTimeoutError::Timeout) => {
            vec![format!("does not answer within {} s", PATIENCE.as_secs())]
        }
        Err(RecvTimeoutError::Disconnected) => Vec::new(),
    }
}

/// Returns the GPU's memory; `None` if no GPU is watched, or if it does not answer.
pub fn memory() -> Option<GpuMemory> {
    ask(Question::Memory).ok()?.ok()
}

fn ask<T>(question: impl FnOnce(SyncSender<T>) -> Question) -> Result<T, RecvTimeoutError> {
    // Room for the answer, so that one that comes too late blocks nobody.
    let (sender, receiver) = sync_channel(1);
    let thread = THREAD.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let thread = thread.ok_or(RecvTimeoutError::Disconnected)?;
    thread.send(question(sender)).map_err(|_| RecvTimeoutError::Disconnected)?;
    receiver.recv_timeout(PATIENCE)
}

/// Answers questions until the process ends.
fn answer(ordinal: usize, questions: &Receiver<Question>) {
    let nvml = Nvml::builder().lib_path(NVML.as_ref()).init();
    let gpu = match &nvml {
        Ok(nvml) => driver::start().and_then(|_| Gpu::open(nvml, ordinal)),
        Err(error) => Err(error.to_string()),
    };
    if let Err(what) = &gpu {
        tracing::debug!("NVML tells nothing of GPU {ordinal}: {what}");
    }
    for question in questions {
        // Nobody waits for an answer that comes too late.
        match question {
            Question::Faults(reply) => {
                drop(reply.send(gpu.as_ref().map(Gpu::faults).unwrap_or_default()))
            }
            Question::Memory(reply) => drop(reply.send(driver::memory(ordinal))),
        }
    }
}

/// A GPU as NVML knows it.
struct Gpu<'nvml> {
    device: Device<'nvml>,
    /// Receives the GPU's critical errors; `None` if it reports none.
    events: Option<EventSet<'nvml>>,
}

impl<'nvml> Gpu<'nvml> {
    /// Finds the GPU by its place on the bus: NVML has an order of its own, and knows nothing of
    /// `CUDA_VISIBLE_DEVICES`.
    fn open(nvml: &'nvml Nvml, ordinal: usize) -> Outcome<Self> {
        let device = nvml
            .device_by_pci_bus_id(driver::pci_bus_id(ordinal)?)
            .map_err(|error| error.to_string())?;
        let events = nvml
            .create_event_set()
            .ok()
            .and_then(|set| device.register_events(EventTypes::CRITICAL_XID_ERROR, set).ok());
        Ok(Gpu { device, events })
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        match self.device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile) {
            Ok(0) => {}
            Ok(1) => faults.push("1 uncorrected ECC error since the driver was loaded".into()),
            Ok(count) => {
                faults.push(format!("{count} uncorrected ECC errors since the driver was loaded"))
            }
            Err(NvmlError::GpuLost) => faults.push("the GPU is lost".into()),
            // Many GPUs have no ECC, or have it turned off.
            Err(_) => {}
        }
        faults.extend(self.row_faults());
        faults.extend(self.xids().into_iter().map(describe_xid));
        faults
    }

    /// Describes rows of memory that are to be replaced by spare ones, or could not be.
    fn row_faults(&self) -> Vec<String> {
        let known = [
            (NVML_FI_DEV_REMAPPED_PENDING, "rows of memory wait to be remapped at the next reset"),
            (NVML_FI_DEV_REMAPPED_FAILURE, "a row of memory could not be remapped"),
        ];
        let samples = self.device.field_values_for(&known.map(|(field, _)| FieldId(field)));
        let samples = samples.unwrap_or_default().into_iter();
        let samples = samples.map(|sample| sample.and_then(|sample| sample.value));
        known
            .iter()
            .zip(samples)
            .filter(|(_, value)| value.as_ref().is_ok_and(is_positive))
            .map(|((_, what), _)| (*what).into())
            .collect()
    }

    /// Takes the critical errors since the last call, ascending.
    fn xids(&self) -> Vec<u64> {
        let mut xids = Vec::new();
        while xids.len() < MOST_XIDS
            && let Some(Ok(event)) = self.events.as_ref().map(|events| events.wait(0))
        {
            if let Some(XidError::Value(xid)) = event.event_data {
                xids.push(xid);
            }
        }
        xids.sort_unstable();
        xids.dedup();
        xids
    }
}

/// Meanings of the critical errors that are most common. Source: NVIDIA, XID Errors, r580.
const XIDS: &[(u64, &str)] = &[
    (13, "an exception in a kernel"),
    (31, "memory page fault"),
    (43, "the GPU stopped processing"),
    (48, "double-bit ECC error"),
    (63, "a row of memory was remapped"),
    (64, "a row of memory could not be remapped"),
    (74, "NVLink error"),
    (79, "the GPU has fallen off the bus"),
    (94, "contained ECC error"),
    (95, "uncontained ECC error"),
    (119, "the GPU's system processor does not answer"),
];

/// `Xid 31 (memory page fault)`.
fn describe_xid(xid: u64) -> String {
    match XIDS.iter().find(|(known, _)| *known == xid) {
        Some((_, meaning)) => format!("Xid {xid} ({meaning})"),
        None => format!("Xid {xid}"),
    }
}

fn is_positive(value: &SampleValue) -> bool {
    match *value {
        SampleValue::F64(value) => value > 0.0,
        SampleValue::U32(value) => value > 0,
        SampleValue::U64(value) => value > 0,
        SampleValue::I64(value) => value > 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_watched_has_no_faults_and_no_memory() {
        assert_eq!((faults(), memory()), (Vec::new(), None));
    }

    #[test]
    fn a_critical_error_has_its_number_and_its_meaning_if_it_is_known() {
        assert_eq!(describe_xid(79), "Xid 79 (the GPU has fallen off the bus)");
        assert_eq!(describe_xid(1000), "Xid 1000");
    }
}
