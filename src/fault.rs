//! Injected faults: on one rank or on all, at one moment, in one way. `tests/faults/` tests how a
//! run handles each of them.
//!
//! A fault is configured by `[debug] inject_fault`. When it strikes it is announced on standard
//! error, so that a test knows that it did. Without a configured fault a check is one load of a
//! pointer.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use crate::error::{Error, Result, recorded};
use crate::phase::Phase;
use crate::pulse;
use crate::settings::{parsed, settings};

settings! {
    /// `[debug]`: for tests of fm-dist itself.
    // The brackets of the fault's grammar are no link.
    #[allow(rustdoc::broken_intra_doc_links)]
    pub struct DebugSettings {
        /// A fault made on purpose, for tests: "kind@rank:step:phase[:argument]".
        pub inject_fault: Option<Fault> = None;
    }
}
parsed!(Fault);

/// The way in which a process breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSEGV.
    Segv,
    /// SIGABRT.
    Abort,
    /// SIGSTOP.
    Stop,
    /// The process exits with the argument as its code, by default 3.
    Exit,
    Panic,
    /// A panic with a recorded text of libtorch: of a GPU that fails, or of memory that ran out on
    /// one. With an argument, in the stage of that index, otherwise at the start of the phase.
    Device,
    OutOfMemory,
    /// Computes forever.
    Spin,
    /// Sleeps for the argument's seconds, by default 1.
    Sleep,
    /// An error is returned.
    Error,
    /// SIGUSR1, SIGUSR2, SIGTERM and SIGINT to this process, as a user or Slurm would send them.
    Usr1,
    Usr2,
    Term,
    Int,
    /// The rank's loss becomes NaN; with an argument, only the first time that the step is
    /// computed.
    NanLoss,
    /// The rank's loss is multiplied by the argument, by default 50.
    Spike,
    /// One element of a gradient becomes NaN, in the stage whose index is the argument, by default
    /// 0.
    NanGrad,
    /// The lowest bit of one parameter flips, in the stage whose index is the argument, by default
    /// 0.
    BitFlip,
    /// The rank issues a collective that the others do not.
    ExtraCollective,
    /// The rank reports a program different from the others'.
    OtherBuild,
    /// Storage errors: disk full, I/O error, quota exceeded, read-only file system, permission
    /// denied.
    Enospc,
    Eio,
    Edquot,
    Erofs,
    Eacces,
}

const WORDS: &[(&str, Kind)] = &[
    ("kill", Kind::Kill),
    ("segv", Kind::Segv),
    ("abort", Kind::Abort),
    ("stop", Kind::Stop),
    ("exit", Kind::Exit),
    ("panic", Kind::Panic),
    ("device", Kind::Device),
    ("out_of_memory", Kind::OutOfMemory),
    ("spin", Kind::Spin),
    ("sleep", Kind::Sleep),
    ("error", Kind::Error),
    ("usr1", Kind::Usr1),
    ("usr2", Kind::Usr2),
    ("term", Kind::Term),
    ("int", Kind::Int),
    ("nan_loss", Kind::NanLoss),
    ("spike", Kind::Spike),
    ("nan_grad", Kind::NanGrad),
    ("bit_flip", Kind::BitFlip),
    ("extra_collective", Kind::ExtraCollective),
    ("other_build", Kind::OtherBuild),
    ("enospc", Kind::Enospc),
    ("eio", Kind::Eio),
    ("edquot", Kind::Edquot),
    ("erofs", Kind::Erofs),
    ("eacces", Kind::Eacces),
];

/// A configured fault: its kind, rank, moment and argument.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    kind: Kind,
    /// `None` for every rank.
    rank: Option<usize>,
    /// First and last step; 0 is before the first.
    steps: (u64, u64),
    phase: Phase,
    argument: Option<f64>,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unreadable = || format!("expected kind@rank:step:phase[:argument], found {text:?}");
        let (kind, moment) = text.split_once('@').ok_or_else(unreadable)?;
        let words = || WORDS.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        let known = WORDS.iter().find(|(word, _)| *word == kind);
        let (_, kind) = known.ok_or_else(|| format!("no fault {kind:?}; one of: {}", words()))?;
        let parts: Vec<&str> = moment.split(':').collect();
        let (&[rank, steps, phase], argument) = parts.split_first_chunk().ok_or_else(unreadable)?;
        let argument = match argument {
            [] => None,
            [number] => Some(number.parse().map_err(|_| unreadable())?),
            _ => return Err(unreadable()),
        };
        Ok(Fault {
            kind: *kind,
            rank: if rank == "every" {
                None
            } else {
                Some(rank.parse().map_err(|_| unreadable())?)
            },
            steps: parse_steps(steps).ok_or_else(unreadable)?,
            phase: Phase::named(phase).ok_or_else(|| {
                format!(
                    "no phase {phase:?}; one of: {}",
                    Phase::words().collect::<Vec<_>>().join(", ")
                )
            })?,
            argument,
        })
    }
}

/// Parses `7`, `3-9` or `every` to the first and last step.
fn parse_steps(text: &str) -> Option<(u64, u64)> {
    if text == "every" {
        return Some((0, u64::MAX));
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some((first.parse().ok()?, last.parse().ok()?))
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word =
            WORDS.iter().find(|(_, kind)| *kind == self.kind).expect("every kind has a word").0;
        write!(f, "{word}@{}:", self.rank.map_or("every".into(), |rank| rank.to_string()))?;
        match self.steps {
            (0, u64::MAX) => f.write_str("every")?,
            (first, last) if first == last => write!(f, "{first}")?,
            (first, last) => write!(f, "{first}-{last}")?,
        }
        write!(f, ":{}", self.phase.word())?;
        self.argument.map_or(Ok(()), |argument| write!(f, ":{argument}"))
    }
}

impl Fault {
    /// Index of the stage in which the fault strikes; `None` if it strikes at a phase's start or
    /// wherever the code checks for it.
    fn stage(&self) -> Option<usize> {
        let strikes_in_stage = matches!(self.kind, Kind::Device | Kind::OutOfMemory);
        self.argument.filter(|_| strikes_in_stage).map(|argument| argument as usize)
    }
}

static ORDER: OnceLock<Fault> = OnceLock::new();

/// Arms a fault for this process. It may strike at the start of any phase and wherever the code
/// checks for it. The first call counts.
pub fn arm(order: Fault) {
    ORDER.get_or_init(|| order);
    pulse::on_enter(strike);
}

/// Returns the fault that is armed in this process.
pub fn ordered() -> Option<&'static Fault> {
    ORDER.get()
}

/// Returns the fault if it is of one of these kinds and due on this rank, in this step and phase;
/// announces it.
fn due(phase: Phase, step: u64, kinds: &[Kind]) -> Option<&'static Fault> {
    let order = ORDER.get()?;
    let now = order.phase == phase
        && order.rank.is_none_or(|rank| rank == pulse::rank())
        && (order.steps.0..=order.steps.1).contains(&step);
    let struck = now && kinds.contains(&order.kind);
    if struck {
        // A closed pipe is ignored: only tests read the line.
        let _ = io::stderr()
            .write_all(format!("fm-dist: fault {order} strikes at step {step}\n").as_bytes());
    }
    struck.then_some(order)
}

/// Breaks this process if a fault is due now in the stage that starts to compute.
pub fn strike_in_stage(stage: usize) {
    let Some(order) = ORDER.get().filter(|order| order.stage() == Some(stage)) else { return };
    let now = pulse::now();
    if due(now.phase, now.step, &[order.kind]).is_some() {
        order.fail_in_library();
    }
}

/// Breaks this process if a fault is due now.
pub fn strike(phase: Phase) {
    strike_at(phase, pulse::now().step);
}

/// Does as [`strike`] on another thread than the run's own, whose work belongs to `step`.
pub fn strike_at(phase: Phase, step: u64) {
    use Kind::*;
    let kinds = [
        Kill,
        Segv,
        Abort,
        Stop,
        Exit,
        Panic,
        Device,
        OutOfMemory,
        Spin,
        Sleep,
        Usr1,
        Usr2,
        Term,
        Int,
    ];
    if ORDER.get().is_some_and(|order| order.stage().is_some()) {
        return;
    }
    let Some(order) = due(phase, step, &kinds) else { return };
    match order.kind {
        Kill => signal(Signal::KILL),
        // The first signal only removes the handler that detects stack overflows.
        Segv => (0..2).for_each(|_| signal(Signal::SEGV)),
        Abort => signal(Signal::ABORT),
        Stop => signal(Signal::STOP),
        Usr1 => signal(Signal::USR1),
        Usr2 => signal(Signal::USR2),
        Term => signal(Signal::TERM),
        Int => signal(Signal::INT),
        Exit => signal_hook::low_level::exit(order.argument.unwrap_or(3.0) as i32),
        Panic => panic!("a fault was ordered"),
        Device | OutOfMemory => order.fail_in_library(),
        Sleep => std::thread::sleep(Duration::from_secs_f64(order.argument.unwrap_or(1.0))),
        _ => loop {
            std::hint::spin_loop();
        },
    }
}

impl Fault {
    /// Panics as a tensor operation does whose library reports this fault.
    fn fail_in_library(&self) -> ! {
        let text = match self.kind {
            Kind::OutOfMemory => recorded::OUT_OF_MEMORY[0].text,
            _ => recorded::DEVICE[0].text,
        };
        panic!("called `Result::unwrap()` on an `Err` value: Torch({text:?})")
    }
}

fn signal(signal: Signal) {
    kill_process(getpid(), signal).expect("a process may signal itself");
}

/// Returns the error of the operating system that a fault injects into storage work of `step`.
pub fn io(phase: Phase, step: u64) -> io::Result<()> {
    use rustix::io::Errno;
    let kinds = [
        (Kind::Enospc, Errno::NOSPC),
        (Kind::Eio, Errno::IO),
        (Kind::Edquot, Errno::DQUOT),
        (Kind::Erofs, Errno::ROFS),
        (Kind::Eacces, Errno::ACCESS),
    ];
    let Some(order) = due(phase, step, &kinds.map(|(kind, _)| kind)) else { return Ok(()) };
    let (_, errno) =
        kinds.iter().find(|(kind, _)| *kind == order.kind).expect("it is one of these");
    Err((*errno).into())
}

/// Returns an injected error if one is due now.
///
/// # Errors
/// [`Error::Environment`] if a fault of kind `error` is due.
pub fn error(phase: Phase) -> Result<()> {
    error_at(phase, pulse::now().step)
}

/// Does as [`error`] on another thread than the run's own, whose work belongs to `step`.
///
/// # Errors
/// As [`error`].
pub fn error_at(phase: Phase, step: u64) -> Result<()> {
    match due(phase, step, &[Kind::Error]) {
        Some(order) => Err(Error::environment(format!("fault {order} was ordered"))),
        None => Ok(()),
    }
}

/// Returns the argument of a fault of this kind if one is due now; `default` if it has no argument.
pub fn argument(kind: Kind, phase: Phase, default: f64) -> Option<f64> {
    due(phase, pulse::now().step, &[kind]).map(|order| order.argument.unwrap_or(default))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_reads_as_it_is_written() {
        for text in [
            "kill@1:5:backward",
            "sleep@0:every:data:0.3",
            "nan_loss@2:3-9:forward",
            "exit@1:0:bootstrap:7",
            "panic@every:6:read",
            "out_of_memory@1:6:backward:3",
        ] {
            assert_eq!(text.parse::<Fault>().map(|fault| fault.to_string()), Ok(text.to_string()));
        }
    }

    #[test]
    fn an_order_that_is_none_is_refused_with_the_words_that_are_known() {
        assert!("kil@1:5:backward".parse::<Fault>().unwrap_err().contains("one of: kill, segv"));
        assert!("kill@1:5:lunch".parse::<Fault>().unwrap_err().contains("one of: launch, connect"));
        for text in [
            "kill",
            "kill@1",
            "kill@1:5",
            "kill@x:5:data",
            "kill@1:x:data",
            "sleep@1:5:data:x",
            "sleep@1:5:data:1:2",
        ] {
            assert!(
                text.parse::<Fault>().unwrap_err().starts_with("expected kind@rank:step:phase"),
                "{text}"
            );
        }
    }

    #[test]
    fn without_an_order_nothing_breaks() {
        assert!(ordered().is_none());
        strike(Phase::Forward);
        assert!(io(Phase::Write, 0).is_ok() && error(Phase::Forward).is_ok());
        assert_eq!(argument(Kind::NanLoss, Phase::Forward, 1.0), None);
    }
}
