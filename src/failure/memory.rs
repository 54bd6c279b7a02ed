//! What the message adds when memory has run out: the size of the allocation, the memory that is
//! free, the memory that was predicted, and the next choice that takes less.

use std::fs;
use std::sync::{Mutex, PoisonError};

use bytesize::ByteSize;
use rustix::process::{Resource, getrlimit};

use crate::cuda::health;
use crate::error::{Place, Shortage};
use crate::phase::Phase;
use crate::pulse;

/// Advice where no prediction applies.
const TAKE_LESS: &str =
    "take a smaller micro-batch, recompute, shard or offload more, or use more memory";

/// The memory of a rank as `fm-dist check` predicts it; numbers are bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryForecast {
    /// The memory in which the rank computes.
    pub place: Place,
    /// Use of that memory at the peak of a step.
    pub step: u64,
    /// Changes of the configuration that take less, in the order in which to try them.
    pub changes: Vec<MemoryChange>,
    /// Host memory of a save's copy, on the rank that writes most.
    pub copy: u64,
    /// Host memory of what is offloaded.
    pub offloaded: u64,
}

/// A change of the configuration, and the memory that a rank takes with it.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryChange {
    /// The changed keys as a configuration has them, e.g. `parallel.recompute = "always"`.
    pub settings: String,
    /// Bytes at the peak of a step.
    pub bytes: u64,
}

static FORECAST: Mutex<Option<MemoryForecast>> = Mutex::new(None);

/// Sets the forecast of this process's run, for the message when memory runs out.
pub fn set_forecast(forecast: MemoryForecast) {
    *FORECAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(forecast);
}

/// Memory of one place.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Room {
    free: u64,
    /// The most that this process could have of it.
    most: u64,
}

/// Adds to an allocator's words the numbers and the remedy.
pub fn explain(what: &str, shortage: Shortage) -> String {
    let told = shortage.free.zip(shortage.total).map(|(free, most)| Room { free, most });
    let room = told.or_else(|| match shortage.place {
        Place::Gpu => health::memory().map(|memory| Room { free: memory.free, most: memory.total }),
        Place::Host => host_memory(),
    });
    // Never waits: the thread that failed may hold the lock.
    let forecast = FORECAST.try_lock().ok().and_then(|forecast| forecast.clone());
    let remedy = remedy(forecast.as_ref(), pulse::now().phase, shortage.place, room);
    match shortage.asked.and(told) {
        // The words have both numbers already.
        Some(_) => format!("{what}; {remedy}"),
        None => format!("{what}; {}; {remedy}", numbers(shortage, room)),
    }
}

/// `asked for 2.00 GiB, 1.06 GiB of 139.81 GiB are free`.
fn numbers(shortage: Shortage, room: Option<Room>) -> String {
    let place = match shortage.place {
        Place::Gpu => "the GPU",
        Place::Host => "the host",
    };
    let asked = shortage.asked.map_or("an unknown size".into(), shown);
    match room {
        Some(Room { free, most }) => {
            format!("asked for {asked} of {place}, {} of {} are free", shown(free), shown(most))
        }
        None => format!("asked for {asked} of {place}"),
    }
}

/// Returns the prediction for the rank's phase, and how to take less.
fn remedy(
    forecast: Option<&MemoryForecast>,
    phase: Phase,
    place: Place,
    room: Option<Room>,
) -> String {
    let Some(forecast) = forecast else { return advice(phase).into() };
    // A GPU's host has memory of its own, for what the GPU lets go and for copies.
    let is_beside_device = (place, forecast.place) == (Place::Host, Place::Gpu);
    match phase {
        Phase::Read | Phase::Data | Phase::Sample | Phase::Report => advice(phase).into(),
        Phase::Snapshot | Phase::Write | Phase::Sync | Phase::Commit | Phase::Save
            if place == Place::Host || forecast.place == Place::Host =>
        {
            format!(
                "check predicted {} of host memory for a save's copy on the rank that writes most: \
                 more ranks divide it",
                shown(forecast.copy)
            )
        }
        _ if is_beside_device => format!(
            "check predicted {} of host memory for what is offloaded and {} for a save's copy: \
             offload less, or start fewer ranks on a host",
            shown(forecast.offloaded),
            shown(forecast.copy)
        ),
        _ => predicted(forecast, room),
    }
}

/// Advice where no prediction applies.
fn advice(phase: Phase) -> &'static str {
    match phase {
        Phase::Read | Phase::Data => {
            "batches are read ahead in host memory: lower data.prefetch, or \
             data.micro_batch_size_per_gpu or data.micro_batch_tokens_per_gpu"
        }
        Phase::Sample => {
            "samples of prompts are made one at a time on each rank: lower sampling.size"
        }
        Phase::Report => {
            "samples go through the model together, up to 100 of them: lower \
             sampling.per_condition, or use more memory"
        }
        _ => TAKE_LESS,
    }
}

/// `check predicted 96.20 GiB for a rank, and 60.01 GiB with parallel.recompute = "always"`.
fn predicted(forecast: &MemoryForecast, room: Option<Room>) -> String {
    let most = room.map(|room| room.most);
    let step = format!("check predicted {} for a rank", shown(forecast.step));
    let Some(MemoryChange { settings, bytes }) = forecast.next_smaller(most) else {
        return format!("{step}, and less with no single setting: use more ranks, or more memory");
    };
    let with = format!("{step}, and {} with {settings}", shown(*bytes));
    if most.is_some_and(|most| *bytes >= most) {
        return format!("{with}, the least with a single setting: use more ranks, or more memory");
    }
    with
}

impl MemoryForecast {
    /// Returns the first change that takes less than there is; if none does, the one that takes
    /// least. `None` if no change takes less than the run itself.
    fn next_smaller(&self, most: Option<u64>) -> Option<&MemoryChange> {
        let smaller = || self.changes.iter().filter(|change| change.bytes < self.step);
        smaller()
            .find(|change| most.is_none_or(|most| change.bytes < most))
            .or_else(|| smaller().min_by_key(|change| change.bytes))
    }
}

/// Host memory that this process may still take, by the system and by its own limit.
fn host_memory() -> Option<Room> {
    let available = kilobytes("/proc/meminfo", "MemAvailable:")?;
    let own = |name| kilobytes("/proc/self/status", name).unwrap_or(0);
    let (free, most) = (available, available.saturating_add(own("VmRSS:")));
    // Set by `ulimit -v`: addresses, of which some are never used.
    let Some(limit) = getrlimit(Resource::As).current else { return Some(Room { free, most }) };
    Some(Room { free: free.min(limit.saturating_sub(own("VmSize:"))), most: most.min(limit) })
}

/// Returns the bytes of a line `name: 123 kB` of a file of the kernel.
fn kilobytes(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// `12.34 GiB`.
fn shown(bytes: u64) -> String {
    format!("{:.2}", ByteSize(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn change(settings: &str, bytes: u64) -> MemoryChange {
        MemoryChange { settings: settings.into(), bytes }
    }

    fn forecast(place: Place) -> MemoryForecast {
        let changes = vec![change("a = 1", 96 * GIB), change("b = 2", 60 * GIB), change("c", GIB)];
        MemoryForecast { place, step: 90 * GIB, changes, copy: 7 * GIB, offloaded: 5 * GIB }
    }

    fn room(most: u64) -> Option<Room> {
        Some(Room { free: 0, most })
    }

    #[test]
    fn the_first_change_that_fits_is_named_with_its_memory() {
        let forecast = forecast(Place::Gpu);
        let told = |most| remedy(Some(&forecast), Phase::Backward, Place::Gpu, room(most));
        let step = "check predicted 90.00 GiB for a rank, and ";
        assert_eq!(told(80 * GIB), format!("{step}60.00 GiB with b = 2"));
        assert_eq!(told(40 * GIB), format!("{step}1.00 GiB with c"));
        let least = ", the least with a single setting: use more ranks, or more memory";
        assert_eq!(told(GIB / 2), format!("{step}1.00 GiB with c{least}"));
        let unknown = remedy(Some(&forecast), Phase::Open, Place::Gpu, None);
        assert_eq!(unknown, format!("{step}60.00 GiB with b = 2"));
        let full = MemoryForecast { changes: Vec::new(), ..forecast };
        let text = remedy(Some(&full), Phase::Forward, Place::Gpu, None);
        assert!(text.contains("less with no single setting: use more ranks"), "{text}");
    }

    #[test]
    fn each_phase_has_the_advice_for_the_memory_that_it_uses() {
        let (gpu, host) = (forecast(Place::Gpu), forecast(Place::Host));
        for (forecast, phase, place, words) in [
            (&gpu, Phase::Snapshot, Place::Host, "7.00 GiB of host memory for a save's copy"),
            (&host, Phase::Write, Place::Host, "7.00 GiB of host memory for a save's copy"),
            (&gpu, Phase::Snapshot, Place::Gpu, "check predicted 90.00 GiB for a rank"),
            (&gpu, Phase::Backward, Place::Host, "5.00 GiB of host memory for what is offloaded"),
            (&host, Phase::Backward, Place::Host, "check predicted 90.00 GiB for a rank"),
            (&gpu, Phase::Read, Place::Host, "lower data.prefetch"),
            (&gpu, Phase::Sample, Place::Gpu, "lower sampling.size"),
            (&host, Phase::Report, Place::Host, "lower sampling.per_condition"),
        ] {
            let text = remedy(Some(forecast), phase, place, None);
            assert!(text.contains(words), "{phase:?}: {text}");
        }
        assert_eq!(remedy(None, Phase::Forward, Place::Gpu, None), TAKE_LESS);
    }

    #[test]
    fn numbers_that_an_allocator_leaves_out_are_added() {
        let asked = Shortage { asked: Some(2 * GIB), ..Shortage::of(Place::Host) };
        let text = explain("no memory", asked);
        let start = "no memory; asked for 2.00 GiB of the host, ";
        assert!(text.starts_with(start) && text.contains(" are free; "), "{text}");
        let told = Shortage { free: Some(GIB), total: Some(80 * GIB), ..asked };
        assert!(!explain("no memory", told).contains("asked for"));
        assert_eq!(numbers(Shortage::of(Place::Gpu), None), "asked for an unknown size of the GPU");
    }

    #[test]
    fn the_host_has_memory_and_some_of_it_is_free() {
        let Room { free, most } = host_memory().expect("Linux tells");
        assert!(0 < free && free <= most, "{free} of {most}");
    }
}
