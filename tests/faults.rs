//! The fault matrix: each row orders a fault of one rank at one moment, and says what must come of
//! it.
//!
//! A row's test is named after its number in the matrix (A configuration and launch, B data, C
//! processes, D storage, E numbers, F the end). Every case proves that its fault struck, ends
//! within its bound with the code that it names, says why in one line, and leaves no process
//! behind. Nothing is tried twice. Cases that start processes take turns, so that their bounds hold
//! on two cores.

/// C: devices that fail and memory that runs out.
mod devices;
/// C: processes that die, fail, hang or are slow while samples are judged.
mod judging;
/// A: configurations and launches that cannot work. B: data that cannot be trained on.
mod launching;
/// E: numbers that are not finite, losses that stand out, ranks that drift apart.
mod numbers;
/// C: processes that die, stop, hang, are slow or are asked to stop.
mod processes;
/// No row of the matrix and no exit code goes untested.
mod rows;
/// What was committed is never lost, whatever the disk does.
mod storage;
/// D: disks that fill up, fail, or hold what they should not. F: what the end of a run leaves.
mod storing;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::runs::{checkpoint, mpirun, program, running, with_sets};

/// Steps of a run; it saves every fourth.
const STEPS: u64 = 12;

/// Seconds in which a run is over whose rank died, failed or hangs. 5 are promised, of which a hang
/// spends the 3 of [`SHORT`]; four times as many pass where other programs want the cores too.
pub const SOON: f64 = 20.0;

/// What every case trains with, on top of [`TINY`](crate::runs::TINY). Steps are so short that a
/// save beside them would end many steps later: where that is not the point, it is waited for.
const SETS: [&str; 5] = [
    "max_steps=12",
    "checkpoint.every_n_steps=4",
    "train.global_batch_size=16",
    "checkpoint.asynchronous=false",
    "lr_scheduler.cosine.warmup_steps=10",
];

/// Saves beside the steps.
pub const BESIDE: &str = "checkpoint.asynchronous=true";

/// Short limits, for cases in which something hangs. Starting up keeps more: on a busy machine a
/// world may need it to meet.
pub const SHORT: [&str; 4] = [
    "watchdog.init_seconds=30",
    "watchdog.first_step_seconds=30",
    "watchdog.step_seconds=3",
    "watchdog.save_seconds=3",
];

/// Seconds within which a run that is left alone has started: what happens before a fault strikes
/// is not the fault's.
pub const START: f64 = 60.0;

/// One row.
pub struct Case<'c> {
    /// 0: without a launcher.
    pub ranks: usize,
    /// What is ordered; empty for none.
    pub fault: &'c str,
    pub sets: &'c [&'c str],
    /// Further words of the command line.
    pub words: &'c [&'c str],
    pub code: i32,
    /// Texts that standard error must hold.
    pub says: &'c [&'c str],
    /// Texts that it must not.
    pub never: &'c [&'c str],
    /// Time until everything must be over: since the fault struck last, or since the start where
    /// none is ordered.
    pub seconds: f64,
}

impl Default for Case<'_> {
    fn default() -> Self {
        Case {
            ranks: 2,
            fault: "",
            sets: &[],
            words: &[],
            code: 0,
            says: &[],
            never: &["WARN straggler"],
            seconds: START,
        }
    }
}

/// A folder for runs, and what the last one said.
pub struct Ended {
    pub root: TempDir,
    pub errors: String,
}

/// Cases take turns.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Case<'_> {
    /// Runs the case in a folder of its own.
    pub fn run(&self) -> Ended {
        self.run_in(TempDir::new().unwrap())
    }

    /// Runs the case in a folder in which others ran before.
    pub fn run_in(&self, root: TempDir) -> Ended {
        let _turn = turn();
        let started = Started::new(self.command(&root));
        let ended = started.end(root, self.seconds);
        self.judge(&ended.0, ended.1);
        ended.0
    }

    pub fn command(&self, root: &TempDir) -> Command {
        let output = format!("output_dir={}", root.path().join("run").display());
        let order = format!("debug.inject_fault={:?}", self.fault);
        let orders: &[&str] = if self.fault.is_empty() { &[] } else { &[&order] };
        let sets = [&SETS, self.sets, orders, &[&output]].concat();
        let words = with_sets(&[&["train"], self.words].concat(), &sets);
        if self.ranks == 0 { program(&words) } else { mpirun(self.ranks, &words) }
    }

    fn judge(&self, ended: &Ended, code: i32) {
        let Ended { errors, .. } = ended;
        assert_eq!(code, self.code, "{errors}");
        if !self.fault.is_empty() {
            assert!(
                errors.contains(&format!("fm-dist: fault {} strikes", self.fault)),
                "the fault never struck:\n{errors}"
            );
        }
        self.says
            .iter()
            .for_each(|text| assert!(errors.contains(text), "{text:?} was not said:\n{errors}"));
        self.never
            .iter()
            .for_each(|text| assert!(!errors.contains(text), "{text:?} was said:\n{errors}"));
        let causes = errors.lines().filter(|line| line.starts_with("fm-dist: error")).count();
        // A process that a signal ends says nothing, and neither does a run that was asked to stop.
        let expected = usize::from((20..=70).contains(&self.code));
        assert_eq!(causes, expected, "one line says why:\n{errors}");
    }
}

impl Ended {
    pub fn run_folder(&self) -> PathBuf {
        self.root.path().join("run")
    }

    /// What a rank left for programs to read.
    pub fn failure(&self, rank: usize) -> serde_json::Value {
        let path = self.run_folder().join(format!("failure-{rank}.json"));
        serde_json::from_str(
            &fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        )
        .unwrap()
    }

    /// Steps of the checkpoints, ascending.
    pub fn checkpoints(&self) -> Vec<u64> {
        let names = fs::read_dir(self.run_folder())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut steps: Vec<u64> =
            names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort();
        steps
    }

    /// Goes on without the fault and ends with the bytes of a run that nothing befell.
    pub fn resumes_to_the_unbroken_run(self, ranks: usize, sets: &[&str]) {
        let ended = Case { ranks, sets, words: &["--resume", "latest"], ..Case::default() }
            .run_in(self.root);
        assert!(ended.errors.contains("resumed from"), "{}", ended.errors);
        assert!(
            checkpoint(&ended.run_folder(), STEPS) == unbroken(ranks, sets),
            "the resumed run is another"
        );
    }

    /// Begins anew, where there was nothing to go on from.
    pub fn starts_again_as_the_unbroken_run(self, ranks: usize, sets: &[&str]) {
        fs::remove_dir_all(self.run_folder()).unwrap();
        let ended = Case { ranks, sets, ..Case::default() }.run_in(self.root);
        assert!(
            checkpoint(&ended.run_folder(), STEPS) == unbroken(ranks, sets),
            "the new run is another"
        );
    }
}

type Bytes = BTreeMap<String, Vec<u8>>;

/// The last checkpoint of a run that nothing befalls; each kind of run is made once.
pub fn unbroken(ranks: usize, sets: &[&str]) -> Bytes {
    static KNOWN: OnceLock<Mutex<BTreeMap<String, Bytes>>> = OnceLock::new();
    let known = KNOWN.get_or_init(Mutex::default);
    let name = format!("{ranks} {sets:?}");
    if let Some(bytes) = known.lock().unwrap().get(&name) {
        return bytes.clone();
    }
    let ended = Case { ranks, sets, ..Case::default() }.run();
    let bytes = checkpoint(&ended.run_folder(), STEPS);
    known.lock().unwrap().insert(name, bytes.clone());
    bytes
}

/// A run under way, in a process group of its own.
pub struct Started {
    child: Child,
    lines: Receiver<(Instant, String)>,
    heard: Vec<String>,
    began: Instant,
    /// Whether a fault was ordered, and when it struck last.
    ordered: bool,
    struck: Option<Instant>,
}

impl Started {
    pub fn new(mut command: Command) -> Self {
        let began = Instant::now();
        let ordered = command
            .get_args()
            .any(|word| word.to_string_lossy().starts_with("debug.inject_fault="));
        let mut child =
            command.process_group(0).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            errors
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send((Instant::now(), line)))
        });
        Started { child, lines, heard: Vec::new(), began, ordered, struck: None }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that contains `text`.
    pub fn hear(&mut self, text: &str) {
        while !self.heard.last().is_some_and(|line| line.contains(text)) {
            match self.lines.recv_timeout(Duration::from_secs_f64(START)) {
                Ok(line) => self.take(line),
                Err(_) => {
                    signal("KILL", &format!("-{}", self.pid()));
                    panic!("{text:?} was not said:\n{}", self.heard.join("\n"));
                }
            }
        }
    }

    fn take(&mut self, (when, line): (Instant, String)) {
        if line.starts_with("fm-dist: fault ") {
            self.struck = Some(when);
        }
        self.heard.push(line);
    }

    /// What is left of `seconds` since the fault struck, or of the time until it does.
    fn left(&self, seconds: f64) -> Duration {
        let (since, seconds) = match self.struck {
            Some(struck) => (struck, seconds),
            None => (self.began, if self.ordered { START } else { seconds }),
        };
        Duration::from_secs_f64(seconds).saturating_sub(since.elapsed())
    }

    /// Waits for the end of every process; one that does not come within `seconds`, see
    /// [`Case::seconds`], fails the test and is made.
    pub fn end(mut self, root: TempDir, seconds: f64) -> (Ended, i32) {
        // The pipe closes when the last process that holds it is gone.
        let in_time = loop {
            match self.lines.recv_timeout(self.left(seconds)) {
                Ok(line) => self.take(line),
                Err(why) => break why == RecvTimeoutError::Disconnected,
            }
        };
        let mark = root.path().to_str().unwrap();
        if !in_time {
            end_all(mark);
        }
        let status = self.child.wait().unwrap();
        let errors = self.heard.join("\n");
        assert!(in_time, "not over within {seconds} s:\n{errors}");
        // A launcher that is killed takes the pipe with it, and its ranks outlive it by moments.
        let over = Instant::now();
        while !running(mark).is_empty() {
            if over.elapsed() > Duration::from_secs_f64(SOON) {
                end_all(mark);
                panic!("processes are left:\n{errors}");
            }
            thread::yield_now();
        }
        let code = status.code().or_else(|| {
            std::os::unix::process::ExitStatusExt::signal(&status).map(|signal| 128 + signal)
        });
        (Ended { root, errors }, code.unwrap())
    }
}

/// Kills what a case that failed left behind: a rank that is stopped outlives its launcher, which
/// has a group of its own.
fn end_all(mark: &str) {
    for pid in running(mark) {
        // It may be gone by now.
        let _ = Command::new("kill").args(["-s", "KILL", &pid]).status();
    }
}

/// A command in a namespace where `folder` is a disk of `bytes`, and what a shell does afterwards
/// while that disk is there. Root may make one, and so may others where the system lets them.
pub fn on_a_small_disk(
    bytes: usize,
    folder: &Path,
    command: &Command,
    afterwards: &str,
) -> Command {
    fs::create_dir(folder).unwrap();
    let script = format!(
        "mount -t tmpfs -o size={bytes} tmpfs \"$1\" || exit {NO_DISK}
         shift; \"$@\"; code=$?; {afterwards}; exit $code"
    );
    let mut unshared = Command::new("unshare");
    unshared.args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"]).arg(folder);
    unshared.arg(command.get_program()).args(command.get_args());
    unshared.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    unshared
}

/// The exit code where no small disk could be mounted.
const NO_DISK: i32 = 99;

/// # Panics
/// If the system let no small disk be made.
pub fn assert_had_disk(code: i32, errors: &str) {
    assert!(
        code != NO_DISK && !errors.starts_with("unshare:"),
        "this test needs a mount namespace: run it as root, or allow user namespaces\n{errors}"
    );
}

/// Sends a signal to a process, or to a group where its number has a minus.
pub fn signal(name: &str, to: &str) {
    let status = Command::new("kill").args(["-s", name, "--", to]).status().unwrap();
    assert!(status.success(), "SIG{name} to {to}");
}
