//! The hunt for an input that breaks a reader: mutated inputs, one after another, until the time is
//! over or one is found.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;

use crate::clock::processor_time;
use crate::mutation::{Dice, mutated};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What one input may cost: Rust's own allocations at their peak, and processor time. libtorch
/// holds no more than the input.
const MOST_BYTES: usize = 64 << 20;
const MOST_TIME: Duration = Duration::from_secs(1);
/// Time on the clock, for what waits instead of computing; the machine may be busy with others.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest message: a line that a launcher passes on whole.
const MOST_CHARS: usize = 4096;

/// A reader, and what it reads.
pub struct Prey<'a> {
    pub name: &'a str,
    /// Sound inputs. Each is tried as it is, and must be taken.
    pub sound: Vec<Vec<u8>>,
    /// Words of the format.
    pub words: &'a [&'a [u8]],
    /// Makes lengths and hashes fit again, so that what lies behind them is reached; most inputs
    /// are dressed.
    pub dress: &'a dyn Fn(Vec<u8>) -> Vec<u8>,
    /// The error is the message that a person would read.
    pub read: &'a dyn Fn(&[u8]) -> Result<(), String>,
}

/// What broke a reader.
#[derive(Debug)]
pub struct Finding {
    pub what: String,
    pub input: PathBuf,
    pub seed: u64,
}

/// How a hunt went that found nothing.
#[derive(Debug)]
pub struct Hunted {
    pub inputs: u64,
    pub taken: u64,
    pub slowest: Duration,
    pub most_bytes: usize,
}

/// Tests take turns from their first line on, because memory is counted for the whole process.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tries mutated inputs for so long.
pub fn hunt(prey: &Prey<'_>, seed: u64, time: Duration) -> Result<Hunted, Finding> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
    fs::create_dir_all(&folder).unwrap();
    // Written before it is tried: a stack that overflows leaves nobody to write it.
    let input = folder.join(format!("{}.input", prey.name));
    let mut hunted = Hunted { inputs: 0, taken: 0, slowest: Duration::ZERO, most_bytes: 0 };
    let began = Instant::now();
    while began.elapsed() < time || hunted.inputs < prey.sound.len() as u64 {
        let bytes = nth_input(prey, seed, hunted.inputs);
        fs::write(&input, &bytes).unwrap();
        let is_sound = hunted.inputs < prey.sound.len() as u64;
        let found = match attempt(prey, &bytes, &mut hunted) {
            Ok(Some(refusal)) if is_sound => Some(format!("a sound input is refused: {refusal}")),
            Ok(refusal) => {
                hunted.taken += u64::from(refusal.is_none());
                None
            }
            Err(what) => Some(what),
        };
        if let Some(what) = found {
            let kept = folder.join(format!("{}-{seed}-{}", prey.name, hunted.inputs));
            fs::rename(&input, &kept).unwrap();
            return Err(Finding { what, input: kept, seed });
        }
        hunted.inputs += 1;
    }
    fs::remove_file(input).unwrap();
    Ok(hunted)
}

/// The sound ones first, then what becomes of them.
fn nth_input(prey: &Prey<'_>, seed: u64, number: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed, number);
    match prey.sound.get(number as usize) {
        Some(sound) => (prey.dress)(sound.clone()),
        None => {
            let sound = &prey.sound[dice.below(prey.sound.len())];
            let bytes = mutated(&mut dice, sound, &prey.sound, prey.words);
            if dice.one_in(8) { bytes } else { (prey.dress)(bytes) }
        }
    }
}

/// Why the input is refused, or that it was taken; what is wrong where it was neither taken nor
/// refused as it should be.
fn attempt(prey: &Prey<'_>, bytes: &[u8], hunted: &mut Hunted) -> Result<Option<String>, String> {
    let (before, processor, clock) = (MEMORY.current_usage(), processor_time(), Instant::now());
    MEMORY.reset_peak_usage();
    let outcome = catch_unwind(AssertUnwindSafe(|| (prey.read)(bytes)));
    let (took, waited) = (processor_time() - processor, clock.elapsed());
    let peak = MEMORY.peak_usage().saturating_sub(before);
    hunted.slowest = hunted.slowest.max(took);
    hunted.most_bytes = hunted.most_bytes.max(peak);
    // Before what it costs: a backtrace costs more than any input may.
    let outcome = outcome.map_err(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or(panic.downcast_ref::<&str>().copied());
        format!("it panics: {}", text.unwrap_or("without words"))
    })?;
    if took > MOST_TIME || waited > PATIENCE {
        return Err(format!("it takes {took:?} of processor time and {waited:?} on the clock"));
    }
    if peak > MOST_BYTES {
        return Err(format!("it takes {peak} bytes of memory"));
    }
    match outcome {
        Ok(()) => Ok(None),
        Err(message) => told_well(&message).map(|()| Some(message)),
    }
}

/// One line, nothing that moves a terminal's cursor, and no longer than a line may be.
fn told_well(message: &str) -> Result<(), String> {
    let length = message.chars().count();
    match message.chars().find(|c| c.is_control()) {
        Some(control) => Err(format!("its message holds {control:?}: {message:?}")),
        None if length > MOST_CHARS => {
            Err(format!("its message has {length} characters: {:.200}…", message))
        }
        None => Ok(()),
    }
}
