//! Saving beside the steps: they stop while the state is copied, and no longer.
//!
//! Threads write; only the run's own thread speaks with other ranks. A save goes through two
//! phases, each of which is over on all ranks before the next begins: every rank writes its parts;
//! rank 0 commits them and deletes what is old. Whether its own part is over is all that a rank
//! tells the others at each step.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::commit::{commit, prepare, prune, staged};
use super::snapshot::{FileCopy, Saved};
use super::{Manifest, SavedFile, folder_name};
use crate::collective::Collective;
use crate::collective::agreement::{agree, on_rank_zero};
use crate::config::{CheckpointSettings, OnFailure};
use crate::error::{Error, Result, STORAGE};
use crate::files::disk::Disk;
use crate::libtorch;
use crate::phase::Phase;
use crate::pulse;

/// What a rank has to say of a save in flight once its part of the present phase is over.
const READY: u8 = 1;

/// Saves a run's checkpoints, one at a time.
pub struct Saver {
    run: PathBuf,
    settings: CheckpointSettings,
    in_flight: Option<Save>,
    /// Why the newest save that was tried gave no checkpoint, where the run went on nevertheless.
    missed: Option<Error>,
}

struct Save {
    manifest: Manifest,
    phase: SavePhase,
    began: Instant,
    /// While the steps stood still for the copy.
    copying: Duration,
}

enum SavePhase {
    /// Every rank its parts.
    Writing(Beside<Vec<SavedFile>>),
    /// Rank 0 all of them; what could not be deleted after it.
    Committing(Beside<String>),
}

impl Saver {
    pub fn new(run: PathBuf, settings: CheckpointSettings) -> Self {
        Saver { run, settings, in_flight: None, missed: None }
    }

    /// Copies the state and begins to write it, after an earlier save has come to its end.
    ///
    /// # Errors
    /// [`Error::Storage`] on a rank that could not write, [`Error::Peer`] on the others, unless the
    /// settings go on; the checkpoint before stays.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn begin(&mut self, saved: &Saved<'_>, collective: &dyn Collective) -> Result<()> {
        self.wait(collective)?;
        pulse::enter(Phase::Snapshot);
        let began = Instant::now();
        let (manifest, run) = (saved.manifest.clone(), self.run.clone());
        let step = manifest.step;
        if let Err(error) = on_rank_zero(collective, || prepare(&run, step).map(|()| String::new()))
        {
            return self.give_up(step, error, collective);
        }
        let copies = saved.copy(collective)?;
        let phase = SavePhase::Writing(Beside::begin("write", move || write(copies, &run, step)));
        self.in_flight = Some(Save { manifest, phase, began, copying: began.elapsed() });
        if self.settings.asynchronous { Ok(()) } else { self.wait(collective) }
    }

    /// What this rank tells the others at each step.
    pub fn progress(&self) -> u8 {
        self.in_flight.as_ref().map_or(0, |save| if save.phase.is_over() { READY } else { 0 })
    }

    /// Goes on with a save if every rank can, by what each told of its
    /// [`progress`](Self::progress). Returns the checkpoint that was committed.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    ///
    /// # Ordering
    /// Every rank calls it with the same states.
    pub fn advance(
        &mut self,
        states: &[u8],
        collective: &dyn Collective,
    ) -> Result<Option<PathBuf>> {
        if self.in_flight.is_none() || states.iter().any(|&state| state != READY) {
            return Ok(None);
        }
        self.move_on(collective)
    }

    /// Waits for a save in flight. A run ends by it.
    ///
    /// # Errors
    /// As [`begin`](Self::begin), also where the settings go on: if the newest save that was tried
    /// gave no checkpoint.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn finish(&mut self, collective: &dyn Collective) -> Result<()> {
        self.wait(collective)?;
        self.missed.take().map_or(Ok(()), Err)
    }

    fn wait(&mut self, collective: &dyn Collective) -> Result<()> {
        while self.in_flight.is_some() {
            pulse::enter(Phase::Save);
            self.move_on(collective)?;
        }
        Ok(())
    }

    /// Ends the present phase of the save in flight, waiting where it must, and begins the next.
    fn move_on(&mut self, collective: &dyn Collective) -> Result<Option<PathBuf>> {
        let Some(Save { manifest, phase, began, copying }) = self.in_flight.take() else {
            return Ok(None);
        };
        let step = manifest.step;
        let moved = match phase {
            SavePhase::Writing(writing) => {
                self.begin_commit(&manifest, writing, collective).map(|phase| {
                    self.in_flight = Some(Save { manifest, phase, began, copying });
                    None
                })
            }
            SavePhase::Committing(committing) => {
                agree(committing.join(), collective).map(|troubles| {
                    let path = self.committed(step, &troubles.concat());
                    pulse::saved(began.elapsed());
                    tracing::debug!(
                        "step {step}: {:.3} s for the copy, {:.3} s until it was safe",
                        copying.as_secs_f64(),
                        began.elapsed().as_secs_f64()
                    );
                    Some(path)
                })
            }
        };
        moved.or_else(|error| self.give_up(step, error, collective).map(|()| None))
    }

    fn begin_commit(
        &self,
        manifest: &Manifest,
        writing: Beside<Vec<SavedFile>>,
        collective: &dyn Collective,
    ) -> Result<SavePhase> {
        let parts =
            writing.join().map(|parts| serde_json::to_string(&parts).expect("parts are JSON"));
        let texts = agree(parts, collective)?;
        let mut committing = Beside::Over(Ok(String::new()));
        let begin = || {
            let of_rank = |text: &String| {
                serde_json::from_str::<Vec<SavedFile>>(text).expect("ranks send what they wrote")
            };
            let (parts, manifest) = (texts.iter().flat_map(of_rank).collect(), manifest.clone());
            let (run, settings) = (self.run.clone(), self.settings.clone());
            committing = Beside::begin("commit", move || {
                commit(&run, &manifest, parts)?;
                // The checkpoint stands whatever becomes of the old ones.
                Ok(prune(&run, manifest.step, &settings)
                    .err()
                    .map_or_else(String::new, |error| error.to_string()))
            });
            Ok(String::new())
        };
        on_rank_zero(collective, begin)?;
        Ok(SavePhase::Committing(committing))
    }

    fn committed(&mut self, step: u64, trouble: &str) -> PathBuf {
        let path = self.run.join(folder_name(step));
        tracing::info!("saved {}", path.display());
        if !trouble.is_empty() {
            tracing::warn!("an old checkpoint stays: {trouble}");
        }
        self.missed = None;
        path
    }

    /// Removes what was written of a save that failed, and goes on if the settings say so. Every
    /// rank comes here or none.
    fn give_up(&mut self, step: u64, error: Error, collective: &dyn Collective) -> Result<()> {
        if error.exit_code() != STORAGE {
            return Err(error);
        }
        let goes_on = self.settings.on_failure == OnFailure::Continue;
        on_rank_zero(collective, || {
            // Nobody mistakes it for a checkpoint, and the next start removes what stays.
            let _ = fs::remove_dir_all(staged(&self.run, step));
            if goes_on {
                tracing::warn!(
                    "step {step} was not saved: {error}; training goes on, the next save tries again"
                );
            }
            Ok(String::new())
        })?;
        if goes_on {
            self.missed = Some(error);
            return Ok(());
        }
        Err(error)
    }
}

fn write(copies: Vec<FileCopy>, run: &Path, step: u64) -> Result<Vec<SavedFile>> {
    let (folder, disk) = (staged(run, step), Disk::saving(step, Phase::Write));
    let parts = copies.into_iter().map(|copy| copy.write(&folder, disk)).collect::<Result<_>>()?;
    disk.sync_folder(&folder)?;
    Ok(parts)
}

impl SavePhase {
    fn is_over(&self) -> bool {
        match self {
            SavePhase::Writing(writing) => writing.is_over(),
            SavePhase::Committing(committing) => committing.is_over(),
        }
    }
}

/// What a thread of its own does.
enum Beside<T> {
    Running(JoinHandle<Result<T>>),
    Over(Result<T>),
}

impl<T: Send + 'static> Beside<T> {
    fn begin(name: &str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        match thread::Builder::new().name(name.into()).spawn(|| libtorch::guarded(work)) {
            Ok(thread) => Beside::Running(thread),
            Err(error) => Beside::Over(Err(Error::storage(name, "start a thread to")(error))),
        }
    }

    fn is_over(&self) -> bool {
        match self {
            Beside::Running(thread) => thread.is_finished(),
            Beside::Over(_) => true,
        }
    }

    fn join(self) -> Result<T> {
        match self {
            Beside::Running(thread) => {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
            Beside::Over(outcome) => outcome,
        }
    }
}
