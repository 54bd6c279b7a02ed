//! The program `ffmpeg`: where it is, how it is started, and what it says.
//!
//! It is told to open local files only, and never runs longer than its reader lives.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};

/// Its name where none is given.
const PROGRAM: &str = "ffmpeg";
/// The last bytes of what it says that are kept.
const KEPT_BYTES: usize = 2048;
/// The first release that knows `-fps_mode`.
const FIRST_WITH_FPS_MODE: (u32, u32) = (5, 1);

/// A program that was found and runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ffmpeg {
    program: PathBuf,
    version: Option<(u32, u32)>,
}

/// The error of a video that needs ffmpeg where there is none.
pub(super) fn missing() -> Error {
    Error::environment(
        "videos are read and written by ffmpeg, which is not in PATH: install it, name it with \
         --ffmpeg FILE, or give each video as a folder of frames",
    )
}

impl Ffmpeg {
    /// Finds the given program, or `ffmpeg` in `PATH`, and starts it once.
    ///
    /// # Errors
    /// [`Error::Environment`] if it cannot be started or is no ffmpeg.
    pub fn find(program: Option<&Path>) -> Result<Self> {
        let name = program.unwrap_or(Path::new(PROGRAM));
        let mut command = Command::new(name);
        command.arg("-version").stdin(Stdio::null());
        let output = command.output().map_err(|error| match (program, error.kind()) {
            (None, io::ErrorKind::NotFound) => missing(),
            _ => Error::environment(format!("cannot start {}: {error}", name.display())),
        })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(words) = text.strip_prefix("ffmpeg version ").filter(|_| output.status.success())
        else {
            let what = format!("{} is no ffmpeg: it does not tell its version", name.display());
            return Err(Error::environment(what));
        };
        Ok(Ffmpeg { program: name.into(), version: version_of(words) })
    }

    /// Returns the arguments that keep every decoded frame as it is, neither doubled nor dropped.
    pub(super) fn all_frames(&self) -> [&'static str; 2] {
        match self.version.is_some_and(|version| version < FIRST_WITH_FPS_MODE) {
            true => ["-vsync", "0"],
            false => ["-fps_mode", "passthrough"],
        }
    }

    /// Starts it with pipes to its input, if `feeds`, and from its output.
    ///
    /// # Errors
    /// [`Error::Environment`] if it cannot be started.
    pub(super) fn start(&self, arguments: &[OsString], feeds: bool) -> Result<Running> {
        let mut command = Command::new(&self.program);
        command.args(["-hide_banner", "-loglevel", "error"]).args(arguments);
        command.stdin(if feeds { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            Error::environment(format!("cannot start {}: {error}", self.program.display()))
        })?;
        let errors = child.stderr.take().expect("it is piped");
        Ok(Running { child, errors: Some(thread::spawn(move || last_bytes(errors))) })
    }
}

/// Returns arguments for the program.
pub(super) fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.map(OsString::from).to_vec()
}

/// Returns the release of a version like `7.1.2-static` or `n5.1`; that of a build between releases
/// is unknown.
fn version_of(words: &str) -> Option<(u32, u32)> {
    let word = words.split_whitespace().next()?;
    let mut numbers = word.trim_start_matches('n').split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number().unwrap_or(0)))
}

/// Reads to the end, and keeps what came last.
fn last_bytes(mut pipe: impl Read) -> String {
    let (mut kept, mut piece) = (VecDeque::new(), [0; 512]);
    while let Ok(count @ 1..) = pipe.read(&mut piece) {
        kept.extend(&piece[..count]);
        kept.drain(..kept.len().saturating_sub(KEPT_BYTES));
    }
    String::from_utf8_lossy(kept.make_contiguous()).trim().to_string()
}

/// A started ffmpeg. It is killed and waited for when this is dropped.
pub(super) struct Running {
    child: Child,
    errors: Option<JoinHandle<String>>,
}

impl Running {
    pub fn output(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("it is piped, and taken once")
    }

    pub fn input(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("it is piped, and taken once")
    }

    /// Waits for its end. Returns true if it succeeded, and the last lines that it said.
    pub fn finish(mut self) -> (bool, String) {
        let succeeded = self.child.wait().is_ok_and(|status| status.success());
        let errors = self.errors.take().and_then(|thread| thread.join().ok());
        (succeeded, errors.unwrap_or_default())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, and has been waited for then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_told_from_builds_between_them() {
        let known = ["4.4.2-0ubuntu0.22.04.1 Copyright", "n5.1", "7.1.2-static https", "8.0"];
        let releases = [(4, 4), (5, 1), (7, 1), (8, 0)];
        assert_eq!(known.map(version_of), releases.map(Some));
        assert_eq!(version_of("N-112345-g0123abc Copyright"), None);
        assert_eq!(version_of(""), None);
    }

    #[test]
    fn a_program_that_is_none_is_told() {
        let told = |program: &str| Ffmpeg::find(Some(Path::new(program))).unwrap_err().to_string();
        assert!(told("/no/ffmpeg").starts_with("cannot start /no/ffmpeg: "));
        assert_eq!(told("true"), "true is no ffmpeg: it does not tell its version");
    }

    #[test]
    fn what_is_said_without_end_is_kept_in_part() {
        let endless = io::repeat(b'x').take(1 << 20).chain(&b"the end\n"[..]);
        let kept = last_bytes(endless);
        assert!(kept.len() <= KEPT_BYTES && kept.ends_with("xthe end"));
    }

    #[test]
    fn a_process_ends_with_its_reader_and_leaves_nothing() {
        let child = Command::new("sleep").arg("600").stdout(Stdio::piped()).spawn();
        let running = Running { child: child.expect("it can be started"), errors: None };
        let place = PathBuf::from(format!("/proc/{}", running.child.id()));
        assert!(place.exists());
        drop(running);
        assert!(!place.exists(), "it is neither there nor a zombie");
    }
}
