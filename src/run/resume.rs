//! Chooses the run folder of a start, and the checkpoint that it resumes from.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::files::safetensors::refuse_pickled_weights;
use crate::run::checkpoint::{self, Manifest, Unfit};
use crate::run::folder::{Checkpoint, RunFolder, first_free};
use crate::run::length::Length;
use crate::run::locate::{checkpoints_of, locate_manifest, no_checkpoint, run_of};
use crate::run::lock::RunLock;
use crate::run::resume_log;
use crate::run::runs::{CONFIG, OutputDir, REPORT, Run, is_unused};

/// Advice at the end of an error about a resume that finds nothing.
const INSTEAD: &str = "start with --resume never, or with --resume auto, which goes on where it can and begins anew where it cannot";

/// Selects where a run starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// At step 0, in a new folder.
    #[default]
    Never,
    /// At the newest checkpoint that verifies, in the newest run of `output_dir` that has any.
    Latest,
    /// As [`Latest`](Resume::Latest) if any run of `output_dir` has a checkpoint, else as
    /// [`Never`](Resume::Never).
    Auto,
    /// At this checkpoint, or at the newest one of this run folder.
    From(PathBuf),
    /// As [`From`](Resume::From), in a new folder, to which the checkpoint is copied.
    Branch(PathBuf),
}

impl FromStr for Resume {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "never" => Resume::Never,
            "latest" => Resume::Latest,
            "auto" => Resume::Auto,
            folder => Resume::From(folder.into()),
        })
    }
}

/// Finds or makes the folder of a run, and locks it.
///
/// # Errors
/// As [`RunFolder::open`].
pub fn choose(config: &RunConfig, resume: &Resume, length: Length) -> Result<RunFolder> {
    let output_dir = OutputDir::new(&config.output_dir);
    match resume {
        Resume::Never => begin(&output_dir?),
        Resume::Latest => {
            let output_dir = output_dir?;
            let (run, passed_over) = newest_run(&output_dir)?.ok_or_else(|| nothing_at(config))?;
            latest(&run, passed_over, length)
        }
        Resume::Auto => {
            let output_dir = output_dir?;
            match newest_run(&output_dir)? {
                Some((run, passed_over)) => latest(&run, passed_over, length),
                None => begin(&output_dir),
            }
        }
        Resume::From(path) => {
            let mut folder = resume_from(path, length)?;
            if !output_dir.is_ok_and(|output_dir| output_dir.has(&folder.path)) {
                let (run, unused) = (folder.path.display(), &config.output_dir);
                folder.warnings.push(format!("the run goes on in {run}, as --resume says; output_dir = {unused:?} is not used"));
                folder.is_elsewhere = true;
            }
            Ok(folder)
        }
        Resume::Branch(path) => branch(path, &output_dir?, length),
    }
}

/// Makes the folder of a new run that goes on from a checkpoint of another.
fn branch(path: &Path, output_dir: &OutputDir, length: Length) -> Result<RunFolder> {
    let (_, from, manifest) = locate_manifest(path)?;
    if manifest.step >= length.last_step(manifest.step, manifest.samples_seen) {
        let what = format!(
            "is at step {}, and {} ends the run there or earlier: a branch of it would have nothing to do",
            manifest.step,
            length.key()
        );
        return Err(Error::config("--branch", format!("{} {what}", from.display())));
    }
    let RunFolder { path, warnings, lock, .. } = begin(output_dir)?;
    checkpoint::clear_leftovers(&path)?;
    let copy = checkpoint::copy_to(&path, &from, &manifest)?;
    let lock = lock.expect("a new run is locked");
    let mut folder = going_on(path, copy, &manifest, length, warnings, lock);
    folder.resumed_from =
        folder.resumed_from.map(|copy| Checkpoint { copy_of: Some(from), ..copy });
    Ok(folder)
}

/// Makes or takes the folder of a new run: the first candidate that no process has.
fn begin(output_dir: &OutputDir) -> Result<RunFolder> {
    for path in output_dir.candidates()? {
        fs::create_dir_all(&path).map_err(Error::storage(&path, "create"))?;
        let was_used = path.join(CONFIG).exists();
        let Some(lock) = RunLock::take_if_free(&path)? else { continue };
        // Another run may have started and ended here meanwhile.
        if !is_unused(&path) {
            continue;
        }
        resume_log::archive_failures(&path, 0)?;
        let config = path.join(CONFIG);
        File::create(&config).map_err(Error::storage(&config, "create"))?;
        let warnings = was_used.then(|| {
            format!("{} is used again: an earlier start left it without a step", path.display())
        });
        let warnings = warnings.into_iter().collect();
        return Ok(RunFolder {
            path,
            resumed_from: None,
            is_over: false,
            is_elsewhere: false,
            warnings,
            lock: Some(lock),
        });
    }
    unreachable!("the candidates are endless")
}

/// Returns the newest run that has a checkpoint, and the newer folders that have none.
///
/// # Errors
/// [`Error::Storage`].
pub fn newest_run(output_dir: &OutputDir) -> Result<Option<(Run, Vec<PathBuf>)>> {
    let mut passed_over = Vec::new();
    for run in output_dir.runs()?.into_iter().rev() {
        if run.newest.is_some() {
            return Ok(Some((run, passed_over)));
        }
        passed_over.push(run.path);
    }
    Ok(None)
}

fn nothing_at(config: &RunConfig) -> Error {
    let path = Path::new(&config.output_dir);
    let what = if path.exists() {
        "holds no checkpoint"
    } else {
        "there is no such folder, and no run to go on with"
    };
    no_checkpoint(path, format!("{what}; {INSTEAD}"))
}

/// Resumes the newest run. Since the user named none, repeated starts without progress are refused.
fn latest(run: &Run, passed_over: Vec<PathBuf>, length: Length) -> Result<RunFolder> {
    let mut folder = resume_run(&run.path, length, true)?;
    let said = |path: PathBuf| {
        format!("{} is passed over: it ended before its first checkpoint", path.display())
    };
    folder.warnings.splice(0..0, passed_over.into_iter().map(said));
    Ok(folder)
}

fn resume_from(path: &Path, length: Length) -> Result<RunFolder> {
    if checkpoint::is_checkpoint(path) {
        return resume_checkpoint(path, length);
    }
    refuse_pickled_weights(path)?;
    let must_be = |what: String| {
        no_checkpoint(
            path,
            format!(
                "{what}; --resume takes never, auto, latest, or the folder of a run or a checkpoint"
            ),
        )
    };
    let list = checkpoints_of(path).map_err(|error| match error {
        Error::NoCheckpoint { what, .. } => must_be(what),
        other => other,
    })?;
    if list.is_empty() {
        return Err(no_checkpoint(path, format!("holds no checkpoint; {INSTEAD}")));
    }
    // `.` would say nothing in a log.
    let path = if path.file_name().is_none() {
        fs::canonicalize(path).map_err(Error::storage(path, "find"))?
    } else {
        path.into()
    };
    resume_run(&path, length, false)
}

/// Resumes from this very checkpoint.
fn resume_checkpoint(path: &Path, length: Length) -> Result<RunFolder> {
    let (run, path) = run_of(path)?;
    if !run.join(CONFIG).exists() && checkpoint::list(&run)?.len() > 1 {
        let what = format!(
            "is one of several in {}, which is no run's folder, having no {CONFIG}; a run that went on there would delete old ones: begin one from it by --branch",
            run.display()
        );
        return Err(no_checkpoint(&path, what));
    }
    let (lock, taken_over) = RunLock::take(&run)?;
    checkpoint::clear_leftovers(&run)?;
    let manifest = checkpoint::verify(&path).map_err(|unfit| unfit.into_error(&path))?;
    refuse_newer(&run, &path, manifest.step)?;
    let alone = || {
        format!(
            "{} has no {CONFIG}: it becomes the folder of the run that goes on from {}",
            run.display(),
            path.display()
        )
    };
    let warnings = taken_over.into_iter().chain((!run.join(CONFIG).exists()).then(alone)).collect();
    Ok(going_on(run, path, &manifest, length, warnings, lock))
}

/// Resumes at the newest checkpoint that verifies; newer ones that do not are set aside with a
/// warning. `is_guarded` refuses repeated starts without progress.
fn resume_run(run: &Path, length: Length, is_guarded: bool) -> Result<RunFolder> {
    let (lock, taken_over) = RunLock::take(run)?;
    checkpoint::clear_leftovers(run)?;
    let (manifest, chosen, broken) = newest_sound(run)?;
    let step = manifest.step;
    if is_guarded && step < length.last_step(step, manifest.samples_seen) {
        resume_log::guard(run, step)?;
    }
    let mut warnings: Vec<String> = taken_over.into_iter().collect();
    for (bad, path, what) in broken {
        let kept = set_aside(&path)?;
        let (bad_name, redone) = (checkpoint::folder_name(bad), bad.saturating_sub(step));
        let using = checkpoint::folder_name(step);
        warnings
            .push(format!("{bad_name} failed its check ({what}); using {using}; {redone} steps will be redone; bad one kept as {kept}"));
    }
    Ok(going_on(run.into(), chosen, &manifest, length, warnings, lock))
}

fn going_on(
    run: PathBuf,
    path: PathBuf,
    manifest: &Manifest,
    length: Length,
    warnings: Vec<String>,
    lock: RunLock,
) -> RunFolder {
    let Manifest { step, samples_seen, .. } = *manifest;
    let last = length.last_step(step, samples_seen);
    // A run that ended at its last step but before its report still has to write it.
    let is_over = step > last || step == last && run.join(REPORT).exists();
    RunFolder {
        path: run,
        resumed_from: Some(Checkpoint { path, step, samples_seen, copy_of: None }),
        is_over,
        is_elsewhere: false,
        warnings,
        lock: Some(lock),
    }
}

/// A checkpoint that failed verification: its step, its folder, and the fault.
type Broken = (u64, PathBuf, String);

/// Returns the newest checkpoint that verifies, and the newer ones that do not.
///
/// # Errors
/// [`Error::NoCheckpoint`] if none verifies; an error that another checkpoint would not avoid.
fn newest_sound(run: &Path) -> Result<(Manifest, PathBuf, Vec<Broken>)> {
    let mut broken = Vec::new();
    for (step, path) in checkpoint::list(run)?.into_iter().rev() {
        match checkpoint::verify(&path) {
            Ok(manifest) => return Ok((manifest, path, broken)),
            Err(Unfit::Corrupt { file, what }) => {
                broken.push((step, path, format!("{file}: {what}")))
            }
            Err(Unfit::Other(error)) => return Err(error),
        }
    }
    let texts: Vec<String> = broken
        .iter()
        .map(|(step, _, what)| format!("{} ({what})", checkpoint::folder_name(*step)))
        .collect();
    Err(no_checkpoint(
        run,
        format!("none of its {} checkpoints verifies: {}", broken.len(), texts.join(", ")),
    ))
}

/// Renames a checkpoint to the first free of `.bad-1`, `.bad-2`, …; returns the name.
fn set_aside(path: &Path) -> Result<String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let run = path.parent().expect("a checkpoint lies in its run");
    let free = first_free((1..).map(|number| format!("{name}.bad-{number}")), run);
    fs::rename(path, path.with_file_name(&free)).map_err(Error::storage(path, "set aside"))?;
    Ok(free)
}

/// Refuses to resume from an old checkpoint while newer ones exist: the run would overwrite them.
fn refuse_newer(run: &Path, chosen: &Path, step: u64) -> Result<()> {
    let newer: Vec<String> = checkpoint::list(run)?
        .iter()
        .rev()
        .take_while(|(other, _)| *other > step)
        .map(|(_, path)| path.display().to_string())
        .collect();
    if newer.is_empty() {
        return Ok(());
    }
    Err(Error::checkpoint_mismatch(
        chosen,
        format!(
            "newer checkpoints stand in the same run: {}; move them away first",
            newer.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Length = Length::Steps(1000);

    fn config(output: &Path) -> RunConfig {
        RunConfig { output_dir: output.display().to_string(), ..RunConfig::default() }
    }

    /// Makes a run that has done a step.
    fn begun(output: &Path) -> PathBuf {
        let folder = choose(&config(output), &Resume::Never, LENGTH).unwrap();
        fs::write(folder.path.join("metrics.jsonl"), "{\"step\": 1}\n").unwrap();
        folder.path
    }

    #[test]
    fn a_second_run_gets_a_folder_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("digits");
        let folders: Vec<PathBuf> = (0..3).map(|_| begun(&output)).collect();
        assert_eq!(folders, [output, root.path().join("digits-2"), root.path().join("digits-3")]);
    }

    #[test]
    fn a_start_that_failed_leaves_its_folder_to_the_next() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("digits");
        for start in 0..3 {
            let folder = choose(&config(&output), &Resume::Never, LENGTH).unwrap();
            assert_eq!(folder.path, output);
            let said = format!(
                "{} is used again: an earlier start left it without a step",
                output.display()
            );
            assert_eq!(folder.warnings, if start == 0 { vec![] } else { vec![said] });
            fs::write(output.join("failure-0.json"), "{}").unwrap();
        }
        let (held, _) = RunLock::take(&output).unwrap();
        assert_eq!(
            choose(&config(&output), &Resume::Never, LENGTH).unwrap().path,
            root.path().join("digits-2"),
            "a run that is just starting"
        );
        drop(held);
    }

    #[test]
    fn the_latest_run_is_the_newest_that_has_a_checkpoint_and_those_without_are_named() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("digits");
        let folders: Vec<PathBuf> = (0..3).map(|_| begun(&output)).collect();
        fs::create_dir(folders[1].join(checkpoint::folder_name(5))).unwrap();
        let (run, passed_over) =
            newest_run(&OutputDir::new(&config(&output).output_dir).unwrap()).unwrap().unwrap();
        assert_eq!((run.path, passed_over), (folders[1].clone(), vec![folders[2].clone()]));
        for resume in [Resume::Latest, Resume::Auto] {
            let error = choose(&config(&output), &resume, LENGTH).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!(
                    "{}: none of its 1 checkpoints verifies",
                    folders[1].display()
                )),
                "{error}"
            );
        }
    }

    #[test]
    fn auto_begins_anew_where_no_run_has_a_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("digits");
        assert_eq!(choose(&config(&output), &Resume::Auto, LENGTH).unwrap().path, output);
        begun(&output);
        assert_eq!(
            choose(&config(&output), &Resume::Auto, LENGTH).unwrap().path,
            root.path().join("digits-2")
        );
    }

    #[test]
    fn a_resume_without_a_checkpoint_says_what_there_is_instead() {
        let root = tempfile::tempdir().unwrap();
        let (empty, file, none) =
            (root.path().join("empty"), root.path().join("file"), root.path().join("none"));
        fs::create_dir(&empty).unwrap();
        fs::write(&file, "").unwrap();
        let cases = [
            (
                &empty,
                Resume::Latest,
                "holds no checkpoint; start with --resume never, or with --resume auto",
            ),
            (
                &none,
                Resume::Latest,
                "there is no such folder, and no run to go on with; start with --resume never",
            ),
            (&none, Resume::From(empty.clone()), "holds no checkpoint; start with --resume never"),
            (
                &none,
                Resume::From(file.clone()),
                "is a file; a run or a checkpoint is a folder; --resume takes never, auto, latest, or",
            ),
            (
                &none,
                Resume::From("true".into()),
                "true: there is no such folder; --resume takes never, auto, latest, or",
            ),
        ];
        for (output, resume, says) in cases {
            let error = choose(&config(output), &resume, LENGTH).unwrap_err();
            assert_eq!(error.exit_code(), 44, "{error}");
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
