//! Errors with a cause outside the program, each with the exit code that tells a batch script
//! whether to retry.
//!
//! A message is one line: the problem that was found, the expectation, and the way to fix it. Bugs
//! of the program itself panic instead (exit code [`BUG`]), so tensor arithmetic is written with
//! plain operators.

mod library;
pub mod recorded;

use std::fmt;
use std::path::{Path, PathBuf};

use library::describe_file_limit;
pub use library::{Place, Shortage};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Exit code of a panic: an invariant of the program is broken.
pub const BUG: i32 = 70;
/// Exit code of a run that was asked to stop and has saved its state.
pub const STOPPED: i32 = 10;
/// Exit code of a command line that does not parse (clap's own).
pub const USAGE: i32 = 2;
/// Exit code of [`Error::Collective`], and of a rank whose heartbeat stopped.
pub const COMM: i32 = 22;
/// Exit code of [`Error::Device`].
pub const DEVICE: i32 = 23;
/// Exit code of [`Error::Storage`], on the rank that met it and on its peers.
pub const STORAGE: i32 = 30;
/// Exit code of [`Error::OutOfMemory`].
pub const MEMORY: i32 = 53;
/// Exit code of [`Error::NotFinite`], on the rank that met it and on its peers.
pub const NUMERIC: i32 = 41;

/// One problem in a configuration, with its location.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigProblem {
    /// Dotted path of the key, e.g. `optimizer.adamw.lr`.
    pub key: String,
    /// Location of the value: `line 12` or `--set`; empty for a default.
    pub place: String,
    pub what: String,
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        if !self.place.is_empty() {
            write!(f, " ({})", self.place)?;
        }
        write!(f, ": {}", self.what)
    }
}

/// An error with a cause outside the program.
#[derive(Debug)]
pub enum Error {
    /// The configuration is invalid; lists all its problems at once.
    Config { source_name: String, problems: Vec<ConfigProblem> },
    /// Training data are missing, malformed or unusable.
    Data { path: PathBuf, what: String },
    /// The run folder cannot be read or written.
    Storage { path: PathBuf, operation: &'static str, source: std::io::Error },
    /// A checkpoint does not fit this program or configuration.
    CheckpointMismatch { path: PathBuf, what: String },
    /// A resume was requested and there is no usable checkpoint.
    NoCheckpoint { path: PathBuf, what: String },
    /// Several starts in a row resumed from one checkpoint, and none saved a newer one.
    NoProgress { path: PathBuf, what: String },
    /// A collective failed, on this rank or another.
    Collective { backend: &'static str, operation: &'static str, what: String },
    /// Ranks are at different operations, or hold different values of a number that must be equal
    /// on all.
    Desync { what: String },
    /// A number that must be finite is not, or the loss exploded.
    NotFinite { step: u64, what: String },
    /// Another rank failed first, with exit code `code`. `speaker` is the rank that prints the
    /// reason; `None` if it has been printed already.
    Peer { speaker: Option<usize>, code: i32, what: String },
    /// This process was asked to stop when there was nothing to save.
    Stopped { what: String },
    /// A GPU, or a library that uses it, failed. A retry on another GPU may succeed.
    Device { what: String },
    /// The run needs more memory than there is.
    OutOfMemory { what: String, shortage: Shortage },
    /// Launcher, libraries or devices do not meet the requirements.
    Environment { what: String },
}

impl Error {
    /// A problem with one key that is found only by checking the configuration as a whole.
    pub fn config(key: impl Into<String>, what: impl Into<String>) -> Self {
        let problem = ConfigProblem { key: key.into(), place: String::new(), what: what.into() };
        Error::Config { source_name: "configuration".into(), problems: vec![problem] }
    }

    /// Appends explanatory lines to the last problem of a configuration error; returns any other
    /// error unchanged.
    pub fn followed_by(self, lines: &[impl fmt::Display]) -> Self {
        let Error::Config { source_name, mut problems } = self else { return self };
        if let Some(last) = problems.last_mut() {
            lines.iter().for_each(|line| last.what.push_str(&format!("; {line}")));
        }
        Error::Config { source_name, problems }
    }

    pub fn data(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::Data { path: path.as_ref().into(), what: what.into() }
    }

    /// For `map_err`: `fs::read(path).map_err(Error::storage(path, "read"))`. Too many open files
    /// become [`Error::Environment`] instead: the limit belongs to the process, and a retry would
    /// hit it again.
    pub fn storage(
        path: impl AsRef<Path>,
        operation: &'static str,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| match describe_file_limit(&source) {
            Some(what) => {
                Error::environment(format!("cannot {operation} {}: {what}", path.display()))
            }
            None => Error::Storage { path, operation, source },
        }
    }

    pub fn checkpoint_mismatch(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::CheckpointMismatch { path: path.as_ref().into(), what: what.into() }
    }

    pub fn environment(what: impl Into<String>) -> Self {
        Error::Environment { what: what.into() }
    }

    /// Short upper-case name, for messages and the log.
    pub fn name(&self) -> &'static str {
        match self {
            Error::Config { .. } => "CONFIG",
            Error::Data { .. } => "DATA",
            Error::Storage { .. } => "STORAGE",
            Error::CheckpointMismatch { .. } => "CKPT_MISMATCH",
            Error::NoProgress { .. } => "NO_PROGRESS",
            Error::NoCheckpoint { .. } => "NO_CKPT",
            Error::Collective { .. } => "COMM",
            Error::Desync { .. } => "DESYNC",
            Error::NotFinite { .. } => "NUMERIC",
            Error::Peer { .. } => "PEER",
            Error::Environment { .. } => "ENVIRONMENT",
            Error::Stopped { .. } => "STOPPED",
            Error::Device { .. } => "DEVICE",
            Error::OutOfMemory { .. } => "MEMORY",
        }
    }

    /// Exit code of the process; [`Error::Peer`] has the code of its cause. A retry may help with
    /// codes below 40, and does not from 40 on.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Peer { code, .. } => *code,
            Error::Stopped { .. } => STOPPED,
            Error::Collective { .. } => COMM,
            Error::Device { .. } => DEVICE,
            Error::Storage { .. } => STORAGE,
            Error::Data { .. } => 40,
            Error::NotFinite { .. } => NUMERIC,
            Error::Desync { .. } => 42,
            Error::NoProgress { .. } => 43,
            Error::NoCheckpoint { .. } => 44,
            Error::Config { .. } => 50,
            Error::CheckpointMismatch { .. } => 51,
            Error::Environment { .. } => 52,
            Error::OutOfMemory { .. } => MEMORY,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shortened(one_line(&FullMessage(self).to_string())))
    }
}

/// The message in full length. It may quote megabytes of a hostile file.
struct FullMessage<'e>(&'e Error);

impl fmt::Display for FullMessage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Error::Config { source_name, problems } => {
                write!(f, "{source_name}: ")?;
                let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
                f.write_str(&texts.join("; "))
            }
            Error::Data { path, what }
            | Error::CheckpointMismatch { path, what }
            | Error::NoProgress { path, what }
            | Error::NoCheckpoint { path, what } => write!(f, "{}: {what}", path.display()),
            Error::Storage { path, operation, source } => {
                write!(f, "cannot {operation} {}: {source}", path.display())
            }
            Error::Collective { backend, operation, what } => {
                write!(f, "{backend} {operation}: {what}")
            }
            Error::NotFinite { step, what } => write!(f, "step {step}: {what}"),
            Error::Peer { what, .. }
            | Error::Desync { what }
            | Error::Environment { what }
            | Error::Stopped { what }
            | Error::Device { what }
            | Error::OutOfMemory { what, .. } => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Storage { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Escapes control characters, which file names and peers may contain, so that the text stays on
/// one line of a log.
pub fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

/// Longest message in bytes: with location and exit code it stays below 4096, which a pipe takes in
/// one write.
const MOST_BYTES: usize = 3500;

/// Truncates a text to the length of a log message.
pub fn shortened(mut text: String) -> String {
    if text.len() > MOST_BYTES {
        let end =
            (0..=MOST_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_is_worth_it_only_below_code_forty() {
        let retry = [
            Error::Collective { backend: "mpi", operation: "barrier", what: String::new() },
            Error::storage("x", "write")(std::io::Error::other("disk")),
            Error::Device { what: String::new() },
        ];
        let hold = [
            Error::config("a", "b"),
            Error::data("x", "y"),
            Error::Desync { what: String::new() },
            Error::environment("z"),
            Error::OutOfMemory { what: String::new(), shortage: Shortage::of(Place::Host) },
            Error::storage("x", "open")(rustix::io::Errno::MFILE.into()),
        ];
        assert!(retry.iter().all(|e| e.exit_code() < 40));
        assert!(hold.iter().all(|e| e.exit_code() >= 40));
    }

    #[test]
    fn a_message_stays_on_one_line() {
        assert_eq!(one_line("a\nb\u{1b}[31m"), "a\\nb\\u{1b}[31m");
        assert_eq!(Error::data("a\nb", "holds \u{1b}[31m").to_string(), "a\\nb: holds \\u{1b}[31m");
    }

    #[test]
    fn a_message_that_quotes_megabytes_is_cut() {
        let text = Error::data("a", "µ".repeat(1 << 20)).to_string();
        assert!(
            text.starts_with("a: µµ")
                && text.ends_with("µ…")
                && text.len() <= MOST_BYTES + "…".len(),
            "{}",
            text.len()
        );
    }
}
