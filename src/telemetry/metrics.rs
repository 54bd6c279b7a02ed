//! `metrics.jsonl`: one JSON object for each step, without gaps or duplicates across resumes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files::durable::{FirstFailure, LineFile, replace_file};

/// The key by which lines are ordered and cut; every object has it.
const STEP: &str = "step";

/// A run's metrics, appended step by step.
pub struct MetricsFile {
    /// `None` on ranks other than 0, which do not write.
    file: Option<LineFile>,
    path: PathBuf,
    failure: FirstFailure,
}

impl MetricsFile {
    /// Keeps the lines up to `step` and appends after them; the file need not exist yet. A new run
    /// resumes after step 0. `redone`: a key whose lines of that very step are written again, and
    /// not kept.
    ///
    /// # Errors
    /// [`Error::Storage`] if the file cannot be read, cut or opened.
    pub fn resume_after(path: &Path, step: u64, redone: Option<&str>) -> Result<Self> {
        if path.exists() {
            cut_after(path, step, redone)?;
        }
        let file = LineFile::open(path).map_err(Error::storage(path, "open"))?;
        Ok(MetricsFile { file: Some(file), path: path.into(), failure: FirstFailure::default() })
    }

    /// Returns a file that discards all metrics.
    pub fn silent() -> Self {
        MetricsFile { file: None, path: PathBuf::new(), failure: FirstFailure::default() }
    }

    /// Appends metrics of a step, an object with an integer `step`. A failing disk causes one
    /// warning, and training continues.
    ///
    /// # Panics
    /// If `metrics` is not such an object (a bug in the caller).
    pub fn append(&mut self, metrics: &impl Serialize) {
        let value = serde_json::to_value(metrics).expect("metrics are plain values");
        assert!(
            value.get(STEP).is_some_and(Value::is_u64),
            "metrics are an object with an integer step: {value}"
        );
        let result = self.file.as_mut().map_or(Ok(()), |file| file.append(&value.to_string()));
        self.warn_of(result);
    }

    /// Fsyncs the appended lines, before a checkpoint that relies on them.
    pub fn sync(&mut self) {
        let result = self.file.as_ref().map_or(Ok(()), LineFile::sync);
        self.warn_of(result);
    }

    fn warn_of(&mut self, result: io::Result<()>) {
        if let Some(error) = self.failure.first(result) {
            tracing::warn!(
                "cannot write {}: {error}; training goes on, metrics are lost",
                self.path.display()
            );
        }
    }
}

/// Reads every line of a metrics file. A last line that a crash truncated is left out.
///
/// # Errors
/// [`Error::Storage`] if it cannot be read, [`Error::Data`] if a line before the last is not a JSON
/// object.
pub fn read(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = fs::read(path).map_err(Error::storage(path, "read"))?;
    let lines: Vec<&[u8]> = text.split(|&byte| byte == b'\n').collect();
    let mut objects = Vec::with_capacity(lines.len());
    for (i, line) in lines.iter().enumerate() {
        match serde_json::from_slice(line) {
            Ok(object) => objects.push(object),
            Err(_) if i + 1 == lines.len() => {}
            Err(error) => {
                return Err(Error::data(
                    path,
                    format!("line {} is no JSON object: {error}", i + 1),
                ));
            }
        }
    }
    Ok(objects)
}

/// Returns one metric over the run as (step, value); steps that lack it, or whose value is not a
/// number, are left out.
pub fn column(lines: &[Map<String, Value>], name: &str) -> Vec<(f64, f64)> {
    lines
        .iter()
        .filter_map(|line| Some((line.get(STEP)?.as_f64()?, line.get(name)?.as_f64()?)))
        .collect()
}

/// Keeps only the whole lines up to `step`, without those of that step that have the key `redone`;
/// leaves the file unchanged if it has no others.
fn cut_after(path: &Path, step: u64, redone: Option<&str>) -> Result<()> {
    let lines = || {
        File::open(path)
            .map(|file| BufReader::new(file).split(b'\n'))
            .map_err(Error::storage(path, "read"))
    };
    let stays = |line: &[u8]| {
        let object: Map<String, Value> = serde_json::from_slice(line).unwrap_or_default();
        let is_redone = redone.is_some_and(|key| object.contains_key(key));
        let found = object.get(STEP).and_then(Value::as_u64);
        found.is_some_and(|found| found < step || (found == step && !is_redone))
    };
    let (mut kept, mut dropped) = (0, 0);
    for line in lines()? {
        let line = line.map_err(Error::storage(path, "read"))?;
        if stays(&line) { kept += 1 } else { dropped += 1 }
    }
    if dropped == 0 {
        return Ok(());
    }
    let source = lines()?;
    replace_file(path, |out| {
        for line in source {
            let line = line?;
            if stays(&line) {
                out.write_all(&line)?;
                out.write_all(b"\n")?;
            }
        }
        Ok(())
    })?;
    tracing::info!(kept, dropped, "metrics cut back to step {step}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn steps(path: &Path) -> Vec<u64> {
        read(path).unwrap().iter().map(|line| line[STEP].as_u64().unwrap()).collect()
    }

    #[test]
    fn f3_a_resumed_run_has_no_gap_and_no_double() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut first = MetricsFile::resume_after(&path, 0, None).unwrap();
        (1..=7).for_each(|step| first.append(&json!({ "step": step, "loss": 1.0 })));
        drop(first);
        let mut resumed = MetricsFile::resume_after(&path, 5, None).unwrap();
        (6..=8).for_each(|step| resumed.append(&json!({ "step": step, "loss": 0.5 })));
        assert_eq!(steps(&path), [1, 2, 3, 4, 5, 6, 7, 8]);
        let losses = column(&read(&path).unwrap(), "loss");
        assert_eq!(
            losses[4..6],
            [(5.0, 1.0), (6.0, 0.5)],
            "steps after the checkpoint are the new ones"
        );
    }

    #[test]
    fn what_is_written_again_of_the_last_step_stands_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut first = MetricsFile::resume_after(&path, 0, None).unwrap();
        for step in [1, 2] {
            first.append(&json!({ "step": step, "loss": 1.0 }));
            first.append(&json!({ "step": step, "judged": 2.0 }));
        }
        let mut resumed = MetricsFile::resume_after(&path, 2, Some("judged")).unwrap();
        resumed.append(&json!({ "step": 2, "judged": 3.0 }));
        let lines = read(&path).unwrap();
        assert_eq!(column(&lines, "loss"), [(1.0, 1.0), (2.0, 1.0)]);
        assert_eq!(column(&lines, "judged"), [(1.0, 2.0), (2.0, 3.0)]);
    }

    #[test]
    fn a_torn_last_line_is_cut_at_a_resume() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"lo").unwrap();
        assert_eq!(steps(&path), [1, 2]);
        let mut resumed = MetricsFile::resume_after(&path, 9, None).unwrap();
        resumed.append(&json!({ "step": 3 }));
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n"
        );
    }

    #[test]
    fn a_torn_line_that_is_whole_json_but_lacks_its_newline_counts_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}").unwrap();
        MetricsFile::resume_after(&path, 2, None).unwrap().append(&json!({ "step": 3 }));
        assert_eq!(steps(&path), [1, 2, 3]);
    }

    #[test]
    fn a_broken_line_inside_is_an_error_with_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\nrubbish\n{\"step\":3}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 2 is no JSON object"));
    }

    #[test]
    fn a_column_leaves_out_what_is_no_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::resume_after(&path, 0, None).unwrap();
        [
            json!({ "step": 1, "loss": f64::NAN }),
            json!({ "step": 2, "loss": 0.5 }),
            json!({ "step": 3 }),
        ]
        .iter()
        .for_each(|m| file.append(m));
        assert_eq!(column(&read(&path).unwrap(), "loss"), [(2.0, 0.5)]);
    }

    #[test]
    fn a_full_disk_does_not_stop_training() {
        let mut file = MetricsFile {
            file: LineFile::open(Path::new("/dev/full")).ok(),
            ..MetricsFile::silent()
        };
        file.append(&json!({ "step": 1 }));
        assert!(
            file.failure.first(Err(io::Error::other("again"))).is_none(),
            "the first failure was seen and warned of"
        );
    }
}
