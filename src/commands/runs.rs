//! `fm-dist runs`: lists the runs of an `output_dir`, for people and for scripts. It writes nothing
//! and touches no lock.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::RunConfig;
use crate::error::Result;
use crate::run::folder::config_of;
use crate::run::lock;
use crate::run::resume::newest_run;
use crate::run::resume_log;
use crate::run::runs::{OutputDir, Run};

/// The format of a listing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ListingFormat {
    /// One line for each run.
    #[default]
    Text,
    /// One JSON object.
    Json,
    /// Assignments for `eval` in a POSIX shell: `output_dir`, and `latest_run`, `newest_step`,
    /// `finished` of the run that `--resume latest` continues.
    Shell,
}

#[derive(Serialize)]
struct Listing<'l> {
    output_dir: &'l str,
    /// The run that `--resume latest` continues.
    latest: Option<PathBuf>,
    /// Runs, oldest first.
    runs: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    path: PathBuf,
    /// The newest checkpoint.
    checkpoint: Option<PathBuf>,
    step: Option<u64>,
    /// `max_steps` of the run's own configuration; `None` if that cannot be read.
    max_steps: Option<u64>,
    finished: bool,
    /// The process that holds the folder; `None` also if that process is known to be gone.
    in_use_by: Option<String>,
    failure: Option<Failure>,
}

/// The failure of the newest attempt.
#[derive(Serialize)]
struct Failure {
    code: i32,
    name: String,
    rank: usize,
    message: String,
}

/// Returns the runs of the configured `output_dir` as text.
///
/// # Errors
/// [`Error::Config`](crate::error::Error::Config) if `output_dir` is not a folder;
/// [`Error::Storage`](crate::error::Error::Storage).
pub fn list_runs(config: &RunConfig, format: ListingFormat) -> Result<String> {
    let output_dir = OutputDir::new(&config.output_dir)?;
    let runs = output_dir.runs()?.iter().map(Entry::from_run).collect();
    let latest = newest_run(&output_dir)?.map(|(run, _)| run.path);
    let listing = Listing { output_dir: &config.output_dir, latest, runs };
    Ok(match format {
        ListingFormat::Text => listing.text(),
        ListingFormat::Json => {
            serde_json::to_string_pretty(&listing).expect("texts and numbers are JSON") + "\n"
        }
        ListingFormat::Shell => listing.shell(),
    })
}

impl Entry {
    fn from_run(run: &Run) -> Self {
        let (step, checkpoint) = run.newest.clone().unzip();
        let max_steps = config_of(&run.path).ok().map(|config| config.max_steps);
        let failure = resume_log::newest_failure(&run.path);
        Entry {
            path: run.path.clone(),
            checkpoint,
            step,
            max_steps,
            finished: step.is_some() && step >= max_steps && max_steps.is_some(),
            in_use_by: lock::holder(&run.path),
            failure: failure.map(|resume_log::Failure { code, name, rank, message, .. }| Failure {
                code,
                name,
                rank,
                message,
            }),
        }
    }

    fn progress(&self) -> String {
        let of = self.max_steps.map_or_else(String::new, |max_steps| format!(" of {max_steps}"));
        self.step.map_or_else(|| "no checkpoint".into(), |step| format!("step {step}{of}"))
    }

    fn state(&self) -> String {
        match (&self.in_use_by, &self.failure) {
            (Some(holder), _) => format!("in use by {holder}"),
            (None, _) if self.finished => "finished".into(),
            (None, Some(Failure { code, name, rank, message })) => {
                format!("failed: {name} (code {code}) on rank {rank}: {message}")
            }
            (None, None) => "not finished".into(),
        }
    }
}

impl Listing<'_> {
    fn text(&self) -> String {
        let rows: Vec<[String; 3]> = self
            .runs
            .iter()
            .map(|run| [run.path.display().to_string(), run.progress(), run.state()])
            .collect();
        let width = |column: usize| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let (paths, steps) = (width(0), width(1));
        let mut text = String::new();
        for [path, progress, state] in &rows {
            writeln!(text, "{path:<paths$}  {progress:<steps$}  {state}")
                .expect("writing to a String");
        }
        match &self.latest {
            Some(run) => text + &format!("--resume latest goes on with {}\n", run.display()),
            None => text + &format!("no run of {} has a checkpoint\n", self.output_dir),
        }
    }

    fn shell(&self) -> String {
        let latest = self.runs.iter().find(|run| Some(&run.path) == self.latest.as_ref());
        let path = latest.map_or(Path::new(""), |run| &run.path).display().to_string();
        let (step, finished) = (
            latest.and_then(|run| run.step).unwrap_or_default(),
            latest.is_some_and(|run| run.finished),
        );
        let (output_dir, path) = (quoted(self.output_dir), quoted(&path));
        format!(
            "output_dir={output_dir}\nlatest_run={path}\nnewest_step={step}\nfinished={finished}\n"
        )
    }
}

/// Quotes any text as one word of a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;
    use crate::run::checkpoint::folder_name;

    fn make(path: &Path, config: &RunConfig, step: Option<u64>) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("config.toml"), config.to_toml()).unwrap();
        if let Some(step) = step {
            fs::create_dir(path.join(folder_name(step))).unwrap();
        }
    }

    #[test]
    fn runs_are_told_with_their_steps_and_how_they_ended() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("x").display().to_string();
        let config = RunConfig { output_dir: base.clone(), max_steps: 9, ..RunConfig::default() };
        make(&root.path().join("x"), &config, Some(9));
        make(&root.path().join("x-3"), &config, Some(4));
        let failure =
            r#"{ "code": 40, "name": "DATA", "rank": 1, "message": "is cut", "time": 7.0 }"#;
        fs::write(root.path().join("x-3/failure-1.json"), failure).unwrap();
        make(&root.path().join("x-4"), &config, None);
        let text = list_runs(&config, ListingFormat::Text).unwrap();
        let expected = [
            format!("{base}    step 9 of 9    finished"),
            format!("{base}-3  step 4 of 9    failed: DATA (code 40) on rank 1: is cut"),
            format!("{base}-4  no checkpoint  not finished"),
            format!("--resume latest goes on with {base}-3"),
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
        let json: serde_json::Value =
            serde_json::from_str(&list_runs(&config, ListingFormat::Json).unwrap()).unwrap();
        assert_eq!(
            (&json["output_dir"], &json["latest"]),
            (&base.clone().into(), &format!("{base}-3").into())
        );
        let column = |key: &str| {
            json["runs"].as_array().unwrap().iter().map(|run| run[key].clone()).collect::<Vec<_>>()
        };
        assert_eq!(column("step"), [9.into(), 4.into(), serde_json::Value::Null]);
        assert_eq!(column("finished"), [true, false, false]);
        assert_eq!(json["runs"][1]["failure"]["code"], 40);
        let left: Vec<_> = fs::read_dir(root.path().join("x"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 2, "nothing was written: {left:?}");
    }

    #[test]
    fn a_shell_reads_every_name_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        for name in [
            "it's",
            "a\"b",
            r"c\d",
            "$HOME `id` $(id)",
            "line\nbreak",
            "two  blanks ",
            "-n",
            "ü*?[x]",
        ] {
            let output_dir = root.path().join(name).display().to_string();
            let config =
                RunConfig { output_dir: output_dir.clone(), max_steps: 7, ..RunConfig::default() };
            make(Path::new(&format!("{output_dir}-5")), &config, Some(7));
            let script = "eval \"$1\" && printf '%s|' \"$output_dir\" \"$latest_run\" \"$newest_step\" \"$finished\"";
            let text = list_runs(&config, ListingFormat::Shell).unwrap();
            let output = Command::new("sh").args(["-euc", script, "sh", &text]).output().unwrap();
            assert_eq!(
                String::from_utf8(output.stdout).unwrap(),
                format!("{output_dir}|{output_dir}-5|7|true|"),
                "{text}"
            );
        }
    }

    #[test]
    fn where_no_run_is_there_is_nothing_to_go_on_with() {
        let root = tempfile::tempdir().unwrap();
        let output_dir = root.path().join("deep/x").display().to_string();
        let config = RunConfig { output_dir: output_dir.clone(), ..RunConfig::default() };
        assert_eq!(
            list_runs(&config, ListingFormat::Text).unwrap(),
            format!("no run of {output_dir} has a checkpoint\n")
        );
        let shell = list_runs(&config, ListingFormat::Shell).unwrap();
        assert!(shell.ends_with("latest_run=''\nnewest_step=0\nfinished=false\n"), "{shell}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
