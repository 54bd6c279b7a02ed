//! `tensorboard/events.out.tfevents.*` of the run folder: the metrics of each step, the
//! configuration and samples, for TensorBoard and whatever reads its files.

mod event;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

pub use event::EventValue;
use event::{Content, record};

use crate::files::durable::FirstFailure;
use crate::pulse;

/// Folder of the files in a run folder.
const FOLDER: &str = "tensorboard";

/// The events of a run, one file for each start of it.
pub struct EventFile {
    /// `None` where no events are written.
    file: Option<File>,
    path: PathBuf,
    failure: FirstFailure,
}

impl EventFile {
    /// Creates the file of a start that goes on after `step`: what earlier files hold of later
    /// steps is void. A disk that fails causes one warning.
    pub fn resume_after(run: &Path, step: u64) -> Self {
        let folder = run.join(FOLDER);
        let mut events =
            EventFile { file: None, path: folder.clone(), failure: FirstFailure::default() };
        match fs::create_dir_all(&folder).and_then(|()| created(&folder)) {
            Ok((path, file)) => (events.path, events.file) = (path, Some(file)),
            Err(error) => events.warn_of(Err(error)),
        }
        events.write(0, &Content::Begin);
        if step > 0 {
            events.write(step + 1, &Content::Restart);
        }
        events
    }

    /// Returns events that nobody writes.
    pub fn silent() -> Self {
        EventFile { file: None, path: PathBuf::new(), failure: FirstFailure::default() }
    }

    /// True if events are written, as on rank 0 of a run that wants them.
    pub fn are_written(&self) -> bool {
        self.file.is_some()
    }

    /// Writes values of a step under their tags. `values` is called only if events are written.
    pub fn append<'v>(
        &mut self,
        step: u64,
        values: impl FnOnce() -> Vec<(String, EventValue<'v>)>,
    ) {
        if self.file.is_some() {
            self.write(step, &Content::Values(&values()));
        }
    }

    fn write(&mut self, step: u64, content: &Content<'_>) {
        let Some(file) = &mut self.file else { return };
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // In one write, so that a reader meets no half of a record.
        let written = file.write_all(&record(seconds.as_secs_f64(), step, content));
        self.warn_of(written);
    }

    fn warn_of(&mut self, result: io::Result<()>) {
        if let Some(error) = self.failure.first(result) {
            tracing::warn!(
                "cannot write {}: {error}; training goes on, events are lost",
                self.path.display()
            );
        }
    }
}

/// Creates a file of its own for this start; two starts may fall into one second.
fn created(folder: &Path) -> io::Result<(PathBuf, File)> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (host, process) = (pulse::host(), std::process::id());
    let mut number = 0;
    loop {
        let path = folder.join(format!("events.out.tfevents.{now}.{host}.{process}.{number}"));
        match File::create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            created => return created.map(|file| (path, file)),
        }
    }
}
