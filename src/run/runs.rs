//! Lists the runs of one `output_dir`: `output_dir` itself, then `output_dir-2`, `output_dir-3`, …
//! with or without gaps.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::run::checkpoint;
use crate::settings;

pub const CONFIG: &str = "config.toml";
pub const METRICS: &str = "metrics.jsonl";
pub const REPORT: &str = "report.html";
/// Number of the run whose name has no number.
const FIRST: u64 = 1;

/// A run folder.
#[derive(Clone, Debug)]
pub struct Run {
    pub path: PathBuf,
    /// The number at the end of its name; [`FIRST`] if there is none.
    number: u64,
    /// The newest checkpoint and its step.
    pub newest: Option<(u64, PathBuf)>,
    /// Time of the newest checkpoint, or of the configuration if there is none.
    time: SystemTime,
}

/// The path of the first run, and the base of the others' names.
#[derive(Clone, Debug)]
pub struct OutputDir {
    path: PathBuf,
    /// The last component of the path.
    name: String,
}

impl OutputDir {
    /// # Errors
    /// [`Error::Config`] if a path component exists and is not a folder.
    pub fn new(output_dir: &str) -> Result<Self> {
        let mut path = PathBuf::from(output_dir);
        if path.file_name().is_none() {
            // `.` and `..` get names when they are resolved.
            path = fs::canonicalize(&path).map_err(Error::storage(&path, "find"))?;
        }
        let there = path.ancestors().find(|ancestor| ancestor.symlink_metadata().is_ok());
        if let Some(there) = there.filter(|there| !there.is_dir()) {
            let kind = if there.is_symlink() && !there.exists() {
                "a link to nothing"
            } else {
                "no folder"
            };
            return Err(Error::config(
                "output_dir",
                format!("{} is {kind}; name a folder, or one that can be made", there.display()),
            ));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(OutputDir { path, name })
    }

    /// Returns the folder of the run with this number.
    fn numbered(&self, number: u64) -> PathBuf {
        if number == FIRST {
            self.path.clone()
        } else {
            self.path.with_file_name(format!("{}-{number}", self.name))
        }
    }

    /// Returns the number of a folder beside this one; `None` if its name does not match.
    fn number_of(&self, name: &str) -> Option<u64> {
        if name == self.name {
            return Some(FIRST);
        }
        let digits = name.strip_prefix(&self.name)?.strip_prefix('-')?;
        let number: u64 = digits.parse().ok().filter(|&number| number > FIRST)?;
        // `x-02` and `x-+2` are not names that this program gives.
        (digits == number.to_string()).then_some(number)
    }

    fn parent(&self) -> &Path {
        self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// True if `run` is the folder of a run of this `output_dir`, numbered or not, through links
    /// and dots.
    pub fn has(&self, run: &Path) -> bool {
        let (Ok(run), Ok(parent)) = (fs::canonicalize(run), fs::canonicalize(self.parent())) else {
            return false;
        };
        let name = run.file_name().map(|name| name.to_string_lossy().into_owned());
        let is_numbered = run.parent() == Some(&*parent)
            && name.is_some_and(|name| self.number_of(&name).is_some());
        is_numbered || fs::canonicalize(&self.path).is_ok_and(|own| own == run)
    }

    /// Returns the runs that exist, oldest first.
    ///
    /// # Errors
    /// [`Error::Storage`] if one of them cannot be listed.
    pub fn runs(&self) -> Result<Vec<Run>> {
        let found: Result<Vec<Option<Run>>> =
            self.numbers().into_iter().map(|number| self.run(number)).collect();
        let mut runs: Vec<Run> = found?.into_iter().flatten().collect();
        runs.sort_by_key(|run| (run.time, run.number));
        Ok(runs)
    }

    /// Returns the numbers of the folders that exist. If the parent folder can be traversed but not
    /// listed, it stops at the first gap.
    fn numbers(&self) -> Vec<u64> {
        let Ok(entries) = fs::read_dir(self.parent()) else {
            return (FIRST..).take_while(|&number| self.numbered(number).exists()).collect();
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| self.number_of(&name)).collect()
    }

    /// Returns the run with this number; `None` if no run has the folder, or if it belongs to
    /// another `output_dir` whose name happens to match.
    fn run(&self, number: u64) -> Result<Option<Run>> {
        let path = self.numbered(number);
        let Some(config_time) = modified(&path.join(CONFIG)) else { return Ok(None) };
        if number != FIRST && names_itself(&path) {
            return Ok(None);
        }
        let newest = checkpoint::list(&path)?.into_iter().next_back();
        let time = newest
            .as_ref()
            .and_then(|(_, folder)| checkpoint::written(folder))
            .unwrap_or(config_time);
        Ok(Some(Run { path, number, newest, time }))
    }

    /// Returns folders for a new run in the order in which they are tried: `output_dir` itself, the
    /// last numbered folder if a failed start left it, then higher numbers.
    pub fn candidates(&self) -> Result<impl Iterator<Item = PathBuf> + '_> {
        let last = self.runs()?.iter().map(|run| run.number).max().unwrap_or(FIRST).max(FIRST + 1);
        let is_vacant =
            |path: &PathBuf| !path.exists() || path.join(CONFIG).exists() && is_unused(path);
        let numbered = (last..).map(|number| self.numbered(number)).filter(is_vacant);
        Ok(std::iter::once(self.path.clone()).filter(|path| is_unused(path)).chain(numbered))
    }
}

/// True if no step was done in a folder and it holds no configuration of a user's own: a failed
/// start leaves only its configuration, its log and its failure files, which a new run may
/// overwrite.
pub fn is_unused(folder: &Path) -> bool {
    let has_step =
        has_metrics(folder) || checkpoint::list(folder).is_ok_and(|list| !list.is_empty());
    let bytes = fs::metadata(folder.join(CONFIG)).map_or(0, |found| found.len());
    let is_a_runs = bytes == 0 || folder.join("log").join("rank-00000.jsonl").exists();
    !has_step && is_a_runs
}

/// True if a folder has metrics of a step. Those of step 0 are of a validation before the first.
fn has_metrics(folder: &Path) -> bool {
    let Ok(file) = File::open(folder.join(METRICS)) else { return false };
    let step_of = |line: &String| {
        let object: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        object.get("step").and_then(serde_json::Value::as_u64)
    };
    BufReader::new(file).lines().map_while(Result::ok).any(|line| step_of(&line) != Some(0))
}

/// True if a numbered folder is the `output_dir` of its own run, and so belongs to another
/// configuration.
fn names_itself(run: &Path) -> bool {
    let text = fs::read_to_string(run.join(CONFIG)).unwrap_or_default();
    let table = settings::table(&text).unwrap_or_default();
    let configured = table.get("output_dir").and_then(toml::Value::as_str).map(Path::new);
    configured.is_some_and(|configured| {
        configured.file_name().is_some() && configured.file_name() == run.file_name()
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|found| found.modified()).ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;

    /// Makes a run's folder with a checkpoint for each step; the last is dated at `second`.
    fn make(path: &Path, output_dir: &str, steps: &[u64], second: u64) {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        let write = |path: &Path, text: &str| {
            fs::write(path, text).unwrap();
            File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
        };
        fs::create_dir_all(path).unwrap();
        write(&path.join(CONFIG), &format!("output_dir = {output_dir:?}\n"));
        for step in steps {
            let folder = path.join(checkpoint::folder_name(*step));
            fs::create_dir(&folder).unwrap();
            write(&folder.join("manifest.json"), "{}");
        }
    }

    fn found(output: &OutputDir) -> Vec<String> {
        let name = |run: &Run| run.path.file_name().unwrap().to_str().unwrap().to_string();
        output.runs().unwrap().iter().map(name).collect()
    }

    #[test]
    fn runs_are_ordered_by_time_whatever_their_numbers_and_gaps() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("x").display().to_string();
        for (name, second) in [("x", 30), ("x-3", 10), ("x-12", 20), ("x-7", 20)] {
            make(&root.path().join(name), &base, &[1, 2], second);
        }
        assert_eq!(found(&OutputDir::new(&base).unwrap()), ["x-3", "x-7", "x-12", "x"]);
    }

    #[test]
    fn folders_of_other_names_and_of_other_configurations_are_no_runs() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("x").display().to_string();
        make(&root.path().join("x"), &base, &[1], 1);
        for name in ["x-1", "x-02", "x-a", "x-", "x2", "y", "x-2-2"] {
            make(&root.path().join(name), &base, &[1], 2);
        }
        // Another experiment whose name happens to end in a number.
        make(
            &root.path().join("x-2026"),
            &root.path().join("x-2026").display().to_string(),
            &[1],
            3,
        );
        fs::create_dir(root.path().join("x-5")).unwrap();
        assert_eq!(found(&OutputDir::new(&base).unwrap()), ["x"]);
    }

    #[test]
    fn what_is_no_folder_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name).display().to_string();
        fs::write(root.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", root.path().join("link")).unwrap();
        for (name, says) in [
            ("file", "file is no folder"),
            ("file/run", "file is no folder"),
            ("link", "link is a link to nothing"),
        ] {
            let error = OutputDir::new(&path(name)).unwrap_err();
            assert_eq!(error.exit_code(), 50);
            assert!(error.to_string().contains(says), "{error}");
        }
        OutputDir::new(&path("new/deep")).unwrap();
    }

    #[test]
    fn folders_that_failed_starts_left_are_used_again_and_no_others() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("x");
        assert!(is_unused(&folder), "nothing is there");
        fs::create_dir_all(folder.join("log")).unwrap();
        fs::write(folder.join(CONFIG), "").unwrap();
        assert!(is_unused(&folder), "a start that died before it wrote its configuration");
        fs::write(folder.join(CONFIG), "seed = 1\n").unwrap();
        assert!(!is_unused(&folder), "a configuration that somebody keeps there");
        fs::write(folder.join("log/rank-00000.jsonl"), "{}\n").unwrap();
        fs::write(folder.join(METRICS), "{\"step\":0,\"validation_loss\":1.0}\n").unwrap();
        assert!(is_unused(&folder), "a start that died before its first step");
        fs::write(folder.join(METRICS), "{}\n").unwrap();
        assert!(!is_unused(&folder), "a step");
        fs::remove_file(folder.join(METRICS)).unwrap();
        fs::create_dir(folder.join(checkpoint::folder_name(3))).unwrap();
        assert!(!is_unused(&folder), "a checkpoint");
    }

    #[test]
    fn a_new_run_gets_the_number_behind_the_highest() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("x").display().to_string();
        let first = || OutputDir::new(&base).unwrap().candidates().unwrap().next().unwrap();
        assert_eq!(first(), root.path().join("x"));
        make(&root.path().join("x"), &base, &[1], 1);
        assert_eq!(first(), root.path().join("x-2"));
        make(&root.path().join("x-3"), &base, &[1], 1);
        assert_eq!(first(), root.path().join("x-4"), "no gap is filled");
        make(&root.path().join("x-4"), &base, &[], 1);
        fs::write(root.path().join("x-4").join(CONFIG), "").unwrap();
        assert_eq!(first(), root.path().join("x-4"), "a start that failed");
        fs::create_dir(root.path().join("x-5")).unwrap();
        make(&root.path().join("x-4"), &base, &[2], 1);
        assert_eq!(first(), root.path().join("x-6"), "somebody's own folder");
    }

    #[test]
    fn a_folder_is_known_through_links_and_dots() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("x");
        make(&base, "x", &[1], 1);
        make(&root.path().join("x-2"), "x", &[1], 1);
        make(&root.path().join("y"), "y", &[1], 1);
        std::os::unix::fs::symlink(&base, root.path().join("link")).unwrap();
        let output = OutputDir::new(&base.display().to_string()).unwrap();
        assert!(
            output.has(&root.path().join("link")) && output.has(&root.path().join("y/../x-2/."))
        );
        assert!(!output.has(&root.path().join("y")) && !output.has(&root.path().join("nowhere")));
    }
}
