//! Small training runs for the other tests: worlds of threads in this process, and the real program
//! as a child.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fm_dist::collective::Threads;
use fm_dist::config::{DEFAULT, RunConfig};
use fm_dist::error::Error;
use fm_dist::ops::{self, Kernels};
use fm_dist::run::Resume;
use fm_dist::telemetry::metrics;
use fm_dist::train::{TrainOptions, train};

/// Overrides that make the digits run small; a global batch of 32 in blocks of 8 suits 1, 2 and 4
/// ranks.
pub const TINY: [&str; 6] = [
    "model.dit.width=32",
    "model.dit.depth=2",
    "data.micro_batch_size_per_gpu=8",
    "train.global_batch_size=32",
    "sampling.num_steps=2",
    "log.progress=\"never\"",
];

/// The digits run made small, with further overrides.
pub fn tiny(overrides: &[&str]) -> RunConfig {
    RunConfig::read("test", DEFAULT, &texts(&[&TINY, overrides].concat())).unwrap()
}

fn texts(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

/// Has this process compute as one that trains does: on one thread, with operations of our own.
pub fn compute_as_in_training() {
    tch::set_num_threads(1);
    ops::choose(Kernels::Fused);
}

/// Trains in a world of `ranks` threads; every rank must end alike. Returns the run folder.
pub fn train_in_threads(
    config: &RunConfig,
    resume: &Resume,
    ranks: usize,
) -> Result<PathBuf, Error> {
    let options = || TrainOptions { resume: resume.clone(), ..TrainOptions::default() };
    let mut folders =
        Threads::run(ranks, |world| train(config, &options(), world).map(|(folder, _)| folder));
    folders.swap_remove(0)
}

/// Bytes of every file of a checkpoint by name: model, optimizer and manifest; averages and a
/// validation where there are.
pub fn checkpoint(run: &Path, step: u64) -> BTreeMap<String, Vec<u8>> {
    let folder = run.join(format!("step-{step:08}"));
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let read = |path: PathBuf| {
        (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read(&path).unwrap())
    };
    let files: BTreeMap<_, _> = entries.map(|entry| read(entry.unwrap().path())).collect();
    let is_further = |name: &&String| {
        name.starts_with("ema-") || ["validation.json", "keep"].contains(&name.as_str())
    };
    let further = files.keys().filter(is_further).count();
    assert_eq!(files.len(), 3 + further, "{:?}", files.keys());
    files
}

/// One number a step from `metrics.jsonl`.
pub fn column(run: &Path, name: &str) -> Vec<(f64, f64)> {
    metrics::column(&metrics::read(&run.join("metrics.jsonl")).unwrap(), name)
}

/// The program with these arguments; `--set` for each of [`TINY`] comes with `train`.
pub fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fm-dist"));
    command.args(arguments);
    command
}

/// `mpirun -n ranks` of the program, with what Open MPI asks for as root and on few cores.
pub fn mpirun(ranks: usize, arguments: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMP_NUM_THREADS", "1");
    command
        .args(["--oversubscribe", "-n", &ranks.to_string(), env!("CARGO_BIN_EXE_fm-dist")])
        .args(arguments);
    command
}

/// `--set` before each override.
pub fn with_sets<'w>(command: &[&'w str], overrides: &[&'w str]) -> Vec<&'w str> {
    let sets = TINY.iter().chain(overrides).flat_map(|text| ["--set", text]);
    command.iter().copied().chain(sets).collect()
}

/// Runs to the end; standard error as text and the exit code.
pub fn finish(mut command: Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (
        status.code().unwrap_or(-1),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

/// Starts the command, kills it with SIGKILL once a line of its standard error contains `text`, and
/// returns when no process with `mark` in its arguments is left: a launcher's ranks outlive it by
/// moments.
pub fn kill_at(mut command: Command, text: &str, mark: &str) {
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut seen = Vec::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok) {
        seen.push(line);
        if seen.last().is_some_and(|line| line.contains(text)) {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        seen.last().is_some_and(|line| line.contains(text)),
        "the program ended without {text:?}:\n{}",
        seen.join("\n")
    );
    let began = Instant::now();
    while !running(mark).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "ranks outlive their killed launcher");
        thread::yield_now();
    }
}

/// Numbers of the processes that have `mark` in their arguments.
pub fn running(mark: &str) -> Vec<String> {
    let numbers = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let arguments =
        |number: &String| fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
    numbers.filter(|number| String::from_utf8_lossy(&arguments(number)).contains(mark)).collect()
}
