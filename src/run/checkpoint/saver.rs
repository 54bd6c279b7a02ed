//! Saves concurrently with the steps, which stop only while the state is copied.
//!
//! Background threads write; only the run's main thread communicates with other ranks. A save has
//! two phases, and each must finish on all ranks before the next starts: first every rank writes
//! its files, then rank 0 commits them and deletes old checkpoints. At each step a rank sends the
//! others one number: `READY` once its own work of the present phase is finished, else 0.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::commit::{commit, prepare, prune, staged};
use super::snapshot::{FileCopy, Saved};
use super::{Judged, Manifest, SavedFile, best, folder_name};
use crate::collective::Collective;
use crate::collective::agreement::{agree, on_rank_zero};
use crate::config::{CheckpointSettings, OnFailure, RunConfig};
use crate::error::{Error, Result, STORAGE};
use crate::files::disk::Disk;
use crate::libtorch;
use crate::phase::Phase;
use crate::pulse;
use crate::run::lora::files::export_beside;

/// The progress of a rank whose work of the present phase is finished; 0 before that.
const READY: u8 = 1;

/// Saves a run's checkpoints, one at a time.
pub struct Saver {
    run: PathBuf,
    settings: CheckpointSettings,
    /// The configuration of a run whose LoRA each checkpoint holds for other programs, too.
    exported: Option<RunConfig>,
    /// The criterion of the best checkpoint, if one is chosen.
    criterion: Option<String>,
    in_flight: Option<Save>,
    /// Reason why the newest attempted save produced no checkpoint, if the run continued
    /// regardless.
    missed: Option<Error>,
}

struct Save {
    manifest: Manifest,
    judged: Option<Judged>,
    phase: SavePhase,
    began: Instant,
    /// Time for which the steps stopped for the copy.
    copying: Duration,
}

enum SavePhase {
    /// Every rank writes its files.
    Writing(Beside<Vec<SavedFile>>),
    /// Rank 0 commits all files, writes LoRA files and deletes old checkpoints; its result is the
    /// error text of what failed after the commit.
    Committing(Beside<String>),
}

impl Saver {
    pub fn new(run: PathBuf, settings: CheckpointSettings) -> Self {
        let (exported, criterion) = (None, None);
        Saver { run, settings, exported, criterion, in_flight: None, missed: None }
    }

    /// Makes the link `best` lead to the checkpoint that this criterion finds best, if the settings
    /// keep it.
    pub fn choosing_by(self, criterion: Option<String>) -> Self {
        Saver { criterion: criterion.filter(|_| self.settings.keep_best), ..self }
    }

    /// Makes each checkpoint hold the run's LoRA in the formats that the configuration names.
    pub fn exporting(self, config: &RunConfig) -> Self {
        let exported = (!config.lora.export.is_empty()).then(|| config.clone());
        Saver { exported, ..self }
    }

    /// Does for the checkpoint that a run goes on from what an earlier start may not have come to
    /// after its commit: the link to the best one, and its LoRA files.
    ///
    /// # Errors
    /// [`Error::Peer`] if another rank fails meanwhile. What cannot be done is a warning.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn make_up(&self, resumed: &Path, collective: &dyn Collective) -> Result<()> {
        let make_up = || {
            let link = |criterion: &String| best::link_best(&self.run, criterion, Disk::PLAIN);
            let linked = self.criterion.as_ref().map_or(Ok(()), link);
            let export = |config: &RunConfig| export_beside(resumed, config);
            let written = self.exported.as_ref().map_or(Ok(()), export);
            for error in [linked, written].into_iter().filter_map(Result::err) {
                tracing::warn!("{}: {error}", resumed.display());
            }
            Ok(String::new())
        };
        on_rank_zero(collective, make_up).map(drop)
    }

    /// Copies the state and starts to write it, after waiting for an earlier save.
    ///
    /// # Errors
    /// [`Error::Storage`] on a rank that could not write, [`Error::Peer`] on the others, unless the
    /// settings let training continue. The previous checkpoint stays.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn begin(&mut self, saved: &Saved<'_>, collective: &dyn Collective) -> Result<()> {
        self.wait(collective)?;
        pulse::enter(Phase::Snapshot);
        let began = Instant::now();
        let (manifest, judged) = (saved.manifest.clone(), saved.judged.cloned());
        let run = self.run.clone();
        let step = manifest.step;
        if let Err(error) = on_rank_zero(collective, || prepare(&run, step).map(|()| String::new()))
        {
            return self.give_up(step, error, collective);
        }
        let copies = saved.copy(collective)?;
        let phase =
            SavePhase::Writing(Beside::begin(Phase::Write, move || write(copies, &run, step)));
        self.in_flight = Some(Save { manifest, judged, phase, began, copying: began.elapsed() });
        if self.settings.asynchronous { Ok(()) } else { self.wait(collective) }
    }

    /// Returns true on every rank if a checkpoint of this validation would be the best of the run,
    /// and the settings keep it.
    ///
    /// # Errors
    /// As [`agree`].
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn would_be_best(&self, judged: &Judged, collective: &dyn Collective) -> Result<bool> {
        if self.criterion.is_none() {
            return Ok(false);
        }
        let compared = || {
            let committed = best::all_judged(&self.run)?;
            let under_way = self.in_flight.as_ref().and_then(|save| save.judged.as_ref());
            let is_best = judged.is_below(committed.iter().chain(under_way));
            Ok(if is_best { "best".into() } else { String::new() })
        };
        Ok(!on_rank_zero(collective, compared)?.is_empty())
    }

    /// Records the validation of a step whose checkpoint was committed without it, and chooses the
    /// best checkpoint anew.
    ///
    /// # Errors
    /// [`Error::Storage`] on rank 0, [`Error::Peer`] on the others.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn record(&self, judged: &Judged, collective: &dyn Collective) -> Result<()> {
        let record = || {
            best::record(&self.run.join(folder_name(judged.step)), judged)?;
            self.criterion
                .as_ref()
                .map_or(Ok(()), |criterion| best::link_best(&self.run, criterion, Disk::PLAIN))
        };
        on_rank_zero(collective, || record().map(|()| String::new())).map(drop)
    }

    /// Returns the progress byte that this rank sends to the others at each step.
    pub fn progress(&self) -> u8 {
        self.in_flight.as_ref().map_or(0, |save| if save.phase.is_over() { READY } else { 0 })
    }

    /// Advances a save to its next phase if all ranks are ready, given every rank's
    /// [`progress`](Self::progress). Returns the path of a checkpoint that was committed.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    ///
    /// # Ordering
    /// Every rank calls it with the same progress values.
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

    /// Waits for a save in flight. Called at the end of a run.
    ///
    /// # Errors
    /// As [`begin`](Self::begin). Returns an error even if the settings let training continue: when
    /// the newest attempted save produced no checkpoint.
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

    /// Finishes the present phase of the save in flight, waiting if necessary, and starts the next
    /// one.
    fn move_on(&mut self, collective: &dyn Collective) -> Result<Option<PathBuf>> {
        let Some(Save { manifest, judged, phase, began, copying }) = self.in_flight.take() else {
            return Ok(None);
        };
        let step = manifest.step;
        let moved = match phase {
            SavePhase::Writing(writing) => {
                self.begin_commit(&manifest, judged.clone(), writing, collective).map(|phase| {
                    self.in_flight = Some(Save { manifest, judged, phase, began, copying });
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
        judged: Option<Judged>,
        writing: Beside<Vec<SavedFile>>,
        collective: &dyn Collective,
    ) -> Result<SavePhase> {
        let parts =
            writing.join().map(|parts| serde_json::to_string(&parts).expect("parts are JSON"));
        let texts = agree(parts, collective)?;
        let mut committing = Beside::Over(Ok(String::new()));
        let begin = || {
            let files_of_rank = |text: &String| {
                serde_json::from_str::<Vec<SavedFile>>(text).expect("ranks send what they wrote")
            };
            let (parts, manifest) =
                (texts.iter().flat_map(files_of_rank).collect(), manifest.clone());
            let (run, settings) = (self.run.clone(), self.settings.clone());
            let (exported, criterion) = (self.exported.clone(), self.criterion.clone());
            committing = Beside::begin(Phase::Commit, move || {
                commit(&run, &manifest, &settings, judged.as_ref(), parts)?;
                Ok(after_commit(&run, manifest.step, &settings, exported, criterion))
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
            tracing::warn!("{}: {trouble}", path.display());
        }
        self.missed = None;
        path
    }

    /// Removes the files of a failed save, and continues if the settings allow it. Either every
    /// rank calls it or none does.
    fn give_up(&mut self, step: u64, error: Error, collective: &dyn Collective) -> Result<()> {
        if error.exit_code() != STORAGE {
            return Err(error);
        }
        let goes_on = self.settings.on_failure == OnFailure::Continue;
        on_rank_zero(collective, || {
            // Readers do not take the folder for a checkpoint, and the next start removes the
            // remains.
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

/// Writes the LoRA files of a committed checkpoint, chooses the best one and deletes old ones.
/// Returns what failed of it: the checkpoint is valid in any case.
fn after_commit(
    run: &Path,
    step: u64,
    settings: &CheckpointSettings,
    exported: Option<RunConfig>,
    criterion: Option<String>,
) -> String {
    let folder = run.join(folder_name(step));
    // A folder that cannot be listed is not pruned either.
    let best = criterion.and_then(|criterion| best::best_step(run, &criterion).ok().flatten());
    let disk = Disk::saving(step, Phase::Commit);
    let linked = best.map_or(Ok(()), |step| best::link(run, step, disk));
    let written = exported.map_or(Ok(()), |config| export_beside(&folder, &config));
    let pruned = prune(run, step, settings, best);
    let told =
        |what: &str, outcome: Result<()>| outcome.err().map(|error| format!("{what}: {error}"));
    let troubles = [
        told("it holds no LoRA file", written),
        told("the link to the best checkpoint stays as it was", linked),
        told("an old checkpoint stays", pruned),
    ];
    troubles.into_iter().flatten().collect::<Vec<_>>().join("; ")
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

/// Work on a thread of its own, or its result.
enum Beside<T> {
    Running(JoinHandle<Result<T>>),
    Over(Result<T>),
}

impl<T: Send + 'static> Beside<T> {
    fn begin(phase: Phase, work: impl FnOnce() -> Result<T> + Send + 'static) -> Self {
        let run = move || {
            pulse::work_beside(phase);
            libtorch::guarded(work)
        };
        match thread::Builder::new().name(phase.word().into()).spawn(run) {
            Ok(thread) => Beside::Running(thread),
            Err(error) => {
                Beside::Over(Err(Error::storage(phase.word(), "start a thread to")(error)))
            }
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
