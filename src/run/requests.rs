//! Requests from users and launchers to a live run: to save, or to save and stop.
//!
//! SIGUSR1, SIGUSR2, SIGTERM, SIGHUP and SIGINT request a stop; a second SIGINT ends the process at
//! once with code 130. Files named `save` and `save_quit` in the run folder make requests too, and
//! `--stop-after` requests a stop after a time.
//!
//! Requests are read at the end of each step, when the step's report spreads one rank's request to
//! all. Before the first step, the rank that reads weights or verifies a checkpoint checks for them
//! and ends the run, see [`go_on`]. They are checked as well during a validation and while samples
//! for the report are generated, which are then left out. A command without steps ends at once by
//! its signal.

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ};
use signal_hook::flag;

use crate::collective::Collective;
use crate::collective::agreement::agree;
use crate::error::{Error, Result};
use crate::pulse;

/// Exit code of a process that a second Ctrl-C ends: 128 plus SIGINT's number.
const INTERRUPTED: i32 = 130;

/// Requests to a run, the strongest last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Request {
    #[default]
    Nothing,
    /// Save a checkpoint now.
    Save,
    /// Save a checkpoint now, then stop.
    Stop,
}

/// Set once this process is requested to stop.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Returns a flag that signals set. From then on these signals no longer end this process.
    ///
    /// # Errors
    /// [`Error::Environment`] if the operating system refuses.
    pub fn on_signals() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let register = || {
            // The order matters: the first SIGINT must find the flag unset.
            flag::register_conditional_shutdown(SIGINT, INTERRUPTED, stop.clone())?;
            let asking = [SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGHUP];
            asking
                .into_iter()
                .try_for_each(|signal| flag::register(signal, stop.clone()).map(drop))?;
            // Exceeding a file size limit then is a write error, like a full disk.
            flag::register(SIGXFSZ, Arc::default())
        };
        register().map_err(|error: std::io::Error| {
            Error::environment(format!("cannot listen to signals: {error}"))
        })?;
        Ok(SIGNALLED.get_or_init(|| StopFlag(stop)).clone())
    }
}

/// The flag that signals set; empty in a command without steps.
static SIGNALLED: OnceLock<StopFlag> = OnceLock::new();

/// Returns an error if a signal has requested this process to stop; called before the first step.
///
/// # Errors
/// [`Error::Stopped`].
pub fn go_on() -> Result<()> {
    pulse::still_at_work();
    match SIGNALLED.get().is_some_and(|flag| flag.0.load(Ordering::Relaxed)) {
        true => Err(Error::Stopped {
            what:
                "asked to stop before the first step: nothing is lost, and nothing was to be saved"
                    .into(),
        }),
        false => Ok(()),
    }
}

/// Reads the requests to one rank.
pub struct Requests {
    stop: StopFlag,
    stop_at: Option<Instant>,
    /// Folder in which request files are looked for; set on one rank only.
    folder: Option<PathBuf>,
    looked: Cell<Option<Instant>>,
}

impl Requests {
    /// Minimum time between two looks for files: on a busy network file system one takes
    /// milliseconds.
    const LOOKS: Duration = Duration::from_secs(1);

    /// `stop_at`: time at which the run requests its own stop. `folder`: where to look for files,
    /// on one rank.
    pub fn new(stop: StopFlag, stop_at: Option<Instant>, folder: Option<PathBuf>) -> Self {
        Requests { stop, stop_at, folder, looked: Cell::new(None) }
    }

    /// Returns the strongest request to this rank so far.
    pub fn heard(&self) -> Request {
        if self.stop.0.load(Ordering::Relaxed)
            || self.stop_at.is_some_and(|when| Instant::now() >= when)
        {
            return Request::Stop;
        }
        self.in_files()
    }

    /// Returns an error if any rank is requested to stop; called where no step is under way.
    ///
    /// # Errors
    /// [`Error::Stopped`] on every rank alike; [`Error::Peer`] if another rank agrees on an error
    /// of its own meanwhile.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn go_on_together(&self, collective: &dyn Collective) -> Result<()> {
        pulse::still_at_work();
        let own = if self.heard() == Request::Stop { "stop" } else { "" };
        match agree(Ok(own.into()), collective)?.iter().any(|text| !text.is_empty()) {
            true => Err(Error::Stopped { what: "asked to stop after the step".into() }),
            false => Ok(()),
        }
    }

    fn in_files(&self) -> Request {
        let Some(folder) = &self.folder else { return Request::Nothing };
        if self.looked.get().is_some_and(|when| when.elapsed() < Self::LOOKS) {
            return Request::Nothing;
        }
        self.looked.set(Some(Instant::now()));
        let asked = FILES.iter().filter(|(name, _)| folder.join(name).exists());
        asked.map(|(_, request)| *request).max().unwrap_or_default()
    }

    /// Deletes the files of this request and of weaker ones, so that each is carried out once. A
    /// stronger one may have come since.
    pub fn done(&self, request: Request) {
        let Some(folder) = &self.folder else { return };
        for (name, _) in FILES.iter().filter(|(_, of_file)| *of_file <= request) {
            match fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(
                        "cannot delete {}: {error}; it asks again",
                        folder.join(name).display()
                    );
                }
                _ => (),
            }
        }
    }
}

const FILES: &[(&str, Request)] = &[("save", Request::Save), ("save_quit", Request::Stop)];

impl Request {
    /// Returns the request as a number that ranks can exchange.
    pub fn number(self) -> f32 {
        self as u8 as f32
    }

    pub fn from_number(number: f32) -> Self {
        [Request::Stop, Request::Save]
            .into_iter()
            .find(|request| request.number() == number)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_the_run_folder_asks_once() {
        let folder = tempfile::tempdir().unwrap();
        let listening = || Requests::new(StopFlag::default(), None, Some(folder.path().into()));
        assert_eq!(listening().heard(), Request::Nothing);
        fs::write(folder.path().join("save"), "").unwrap();
        assert_eq!(listening().heard(), Request::Save);
        fs::write(folder.path().join("save_quit"), "").unwrap();
        let requests = listening();
        assert_eq!(requests.heard(), Request::Stop);
        requests.done(Request::Save);
        assert_eq!(listening().heard(), Request::Stop, "it came behind the other");
        requests.done(Request::Stop);
        assert_eq!(listening().heard(), Request::Nothing);
    }

    #[test]
    fn files_are_not_looked_for_at_every_step() {
        let folder = tempfile::tempdir().unwrap();
        let requests = Requests::new(StopFlag::default(), None, Some(folder.path().into()));
        assert_eq!(requests.heard(), Request::Nothing);
        fs::write(folder.path().join("save"), "").unwrap();
        assert_eq!(requests.heard(), Request::Nothing);
    }

    #[test]
    fn a_time_that_has_come_asks_to_stop() {
        assert_eq!(
            Requests::new(StopFlag::default(), Some(Instant::now()), None).heard(),
            Request::Stop
        );
        assert_eq!(Requests::new(StopFlag::default(), None, None).heard(), Request::Nothing);
    }

    #[test]
    fn a_request_is_the_same_behind_its_number() {
        for request in [Request::Nothing, Request::Save, Request::Stop] {
            assert_eq!(Request::from_number(request.number()), request);
        }
    }
}
