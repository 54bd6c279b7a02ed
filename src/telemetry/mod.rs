//! Output of a live run: log lines, progress, metrics.
//!
//! Rank 0 logs for the run on standard error; every rank writes its own `log/rank-NNNNN.jsonl`.
//! Errors here never stop a training: a closed pipe or a full disk causes one warning.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod console;
mod meters;
pub mod metrics;
mod progress;
mod record;
pub mod tensorboard;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tracing::dispatcher::{self, DefaultGuard, Dispatch};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

use crate::error::Result;
use crate::files::durable::{FirstFailure, LineFile};
use crate::pulse;
use crate::settings::{choice, settings};
use console::{Console, lock};
pub use meters::{Stopwatch, Throughput, duration_text, peak_resident_bytes};
pub use metrics::MetricsFile;
pub use progress::Progress;
use record::Record;
pub use tensorboard::EventFile;

settings! {
    /// `[log]`: log lines and progress.
    pub struct LogSettings {
        /// Least important events that are shown and kept.
        pub level: Level = Level::Info;
        /// Progress bar on standard error: on a terminal only, also into a pipe (mpirun), or never;
        /// lines where there is no bar.
        pub progress: ProgressStyle = ProgressStyle::Auto;
        /// Write metrics, samples and the configuration for TensorBoard, into the folder
        /// tensorboard of the run folder.
        pub tensorboard: bool = false;
    }
}

choice! {
    /// Least important events that are shown and kept.
    pub enum Level {
        /// Errors only.
        "error" => Error,
        /// Also warnings.
        "warn" => Warn,
        /// Also the course of the run.
        "info" => Info,
        /// Also details for those who look for a mistake.
        "debug" => Debug,
        /// Everything.
        "trace" => Trace,
    }
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => LevelFilter::ERROR,
            Level::Warn => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
            Level::Trace => LevelFilter::TRACE,
        }
    }
}

choice! {
    /// Outputs where the progress of a run is a bar instead of lines.
    pub enum ProgressStyle {
        /// On a terminal only.
        "auto" => Auto,
        /// Also into a pipe, as under mpirun.
        "always" => Always,
        /// Lines instead.
        "never" => Never,
    }
}

/// One rank's log. The thread that started it logs through it for as long as it lives.
pub struct Telemetry {
    rank: usize,
    run_folder: PathBuf,
    console: Arc<Console>,
    has_bar: bool,
    has_tensorboard: bool,
    dispatch: Dispatch,
    _this_thread: DefaultGuard,
}

/// Sends this thread's events to standard error and to `log/rank-NNNNN.jsonl` of the run folder.
///
/// Rank 0 shows all of its events, the other ranks only their warnings and errors. A log file that
/// cannot be opened causes a warning and no error.
pub fn start(
    settings: &LogSettings,
    rank: usize,
    world_size: usize,
    run_folder: &Path,
) -> Telemetry {
    start_on(Console::stderr(), settings, rank, world_size, run_folder)
}

fn start_on(
    console: Console,
    settings: &LogSettings,
    rank: usize,
    world_size: usize,
    run_folder: &Path,
) -> Telemetry {
    assert!(rank < world_size, "rank {rank} of a world of {world_size}");
    let has_bar = match settings.progress {
        ProgressStyle::Auto => console.is_terminal,
        ProgressStyle::Always => true,
        ProgressStyle::Never => false,
    };
    let console = Arc::new(console);
    let path = run_folder.join("log").join(format!("rank-{rank:05}.jsonl"));
    let (file, trouble) = match open_log(&path) {
        Ok(file) => (Some(file), None),
        Err(error) => (None, Some(error)),
    };
    let lines = Lines {
        console: Arc::clone(&console),
        file: Mutex::new((file, FirstFailure::default())),
        rank,
        path,
    };
    let level = LevelFilter::from(settings.level);
    let dispatch = Dispatch::new(tracing_subscriber::registry().with(lines).with(level));
    let this_thread = dispatcher::set_default(&dispatch);
    let telemetry = Telemetry {
        rank,
        run_folder: run_folder.into(),
        console,
        has_bar,
        has_tensorboard: settings.tensorboard,
        dispatch,
        _this_thread: this_thread,
    };
    if let Some(error) = trouble {
        tracing::warn!(
            "no log file under {}: {error}; logging to standard error only",
            run_folder.display()
        );
    }
    telemetry
}

fn open_log(path: &Path) -> io::Result<LineFile> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    LineFile::open(path)
}

impl Telemetry {
    /// Uses this rank's log for every thread of the process that has none of its own, such as data
    /// loader and watchdog.
    ///
    /// For programs whose process is one rank. The first call takes effect; later ones do nothing.
    pub fn cover_all_threads(&self) {
        if dispatcher::set_global_default(self.dispatch.clone()).is_err() {
            tracing::debug!("the threads of this process log to an earlier rank");
        }
    }

    /// True if this rank writes the files that a run has once: metrics, pictures, the report.
    pub fn writes_run_files(&self) -> bool {
        pulse::is_root(self.rank)
    }

    /// Shows the progress from step `start` to `total_steps`, on rank 0 only.
    pub fn progress(&self, total_steps: u64, start: u64) -> Progress {
        match (self.writes_run_files(), self.has_bar) {
            (false, _) => Progress::nothing(total_steps, start),
            (true, true) => Progress::bar(&self.console, total_steps, start),
            (true, false) => Progress::lines(total_steps, start),
        }
    }

    /// Opens `metrics.jsonl` of the run folder, cut back to `step` and without that step's lines
    /// that have the key `redone`; ranks other than 0 get one that discards metrics.
    ///
    /// # Errors
    /// As [`MetricsFile::resume_after`].
    pub fn metrics_after(&self, step: u64, redone: Option<&str>) -> Result<MetricsFile> {
        match self.writes_run_files() {
            true => MetricsFile::resume_after(&self.run_folder.join("metrics.jsonl"), step, redone),
            false => Ok(MetricsFile::silent()),
        }
    }

    /// Opens the events for TensorBoard of a run that goes on after `step`; nothing is written if
    /// the settings want none, and on ranks other than 0.
    pub fn events_after(&self, step: u64) -> EventFile {
        match self.has_tensorboard && self.writes_run_files() {
            true => EventFile::resume_after(&self.run_folder, step),
            false => EventFile::silent(),
        }
    }
}

/// The tracing layer: writes every event as a line to the console and as a line to the file.
struct Lines {
    console: Arc<Console>,
    file: Mutex<(Option<LineFile>, FirstFailure)>,
    rank: usize,
    path: PathBuf,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let record = Record::from_event(event);
        let unprinted = self.print(&record);
        let unwritten = self.keep(&record);
        // Each output's failure is reported through the other; logging it as an event would come
        // back here.
        if let Some(error) = unprinted {
            self.keep(&Record::new(
                tracing::Level::WARN,
                format!("cannot print on standard error: {error}; the run goes on"),
            ));
        }
        if let Some(error) = unwritten {
            let message = format!("cannot write {}: {error}; the run goes on", self.path.display());
            self.print(&Record::new(tracing::Level::WARN, message));
        }
    }
}

impl Lines {
    fn print(&self, record: &Record) -> Option<io::Error> {
        let speaks = pulse::is_root(self.rank);
        let prefix = if speaks { String::new() } else { format!("[rank {}]", self.rank) };
        let shown = speaks || record.level <= tracing::Level::WARN;
        shown.then(|| self.console.print(&record.text(&prefix, self.console.is_terminal)))?
    }

    fn keep(&self, record: &Record) -> Option<io::Error> {
        let (file, failure) = &mut *lock(&self.file);
        failure.first(file.as_mut()?.append(&record.json()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value};

    use super::console::Page;
    use super::*;

    fn on_page(page: &Page, settings: &LogSettings, rank: usize, folder: &Path) -> Telemetry {
        start_on(Console::new(Box::new(page.clone()), false), settings, rank, 4, folder)
    }

    fn kept(folder: &Path, rank: usize) -> Vec<Map<String, Value>> {
        metrics::read(&folder.join(format!("log/rank-{rank:05}.jsonl"))).unwrap()
    }

    #[test]
    fn rank_zero_speaks_and_keeps() {
        let (page, folder) = (Page::default(), tempfile::tempdir().unwrap());
        let _telemetry = on_page(&page, &LogSettings::default(), 0, folder.path());
        tracing::info!(step = 3, "saved");
        tracing::debug!("not at this level");
        let writes = page.writes();
        assert_eq!(writes.len(), 1);
        assert_eq!(&writes[0][8..], " saved step=3\n");
        let lines = kept(folder.path(), 0);
        assert_eq!(
            (lines.len(), &lines[0]["message"], &lines[0]["fields"]["step"]),
            (1, &"saved".into(), &3.into())
        );
    }

    #[test]
    fn another_rank_is_heard_only_when_something_is_wrong() {
        let (page, folder) = (Page::default(), tempfile::tempdir().unwrap());
        let telemetry = on_page(&page, &LogSettings::default(), 3, folder.path());
        tracing::info!("fine");
        tracing::warn!("slow disk");
        telemetry.progress(10, 0).advance(10, "loss 1");
        assert_eq!(page.writes().len(), 1);
        assert!(page.text().ends_with(" WARN [rank 3] slow disk\n"), "{}", page.text());
        assert_eq!(kept(folder.path(), 3).len(), 2);
    }

    #[test]
    fn ranks_in_threads_log_apart() {
        let (page, folder) = (Page::default(), tempfile::tempdir().unwrap());
        std::thread::scope(|scope| {
            for rank in 0..3 {
                let (page, folder) = (&page, folder.path());
                scope.spawn(move || {
                    let _telemetry = on_page(page, &LogSettings::default(), rank, folder);
                    tracing::info!(rank, "started");
                });
            }
        });
        (0..3).for_each(|rank| {
            assert_eq!(kept(folder.path(), rank)[0]["fields"]["rank"], Value::from(rank))
        });
        assert_eq!(page.writes().len(), 1, "rank 0's line");
    }

    #[test]
    fn a_start_after_a_start_in_one_thread_takes_over() {
        let (first_page, second_page, folder) =
            (Page::default(), Page::default(), tempfile::tempdir().unwrap());
        let _first = on_page(&first_page, &LogSettings::default(), 0, folder.path());
        let _second = on_page(&second_page, &LogSettings::default(), 0, folder.path());
        tracing::info!("here");
        assert_eq!((first_page.writes().len(), second_page.writes().len()), (0, 1));
    }

    #[test]
    fn a_log_folder_that_cannot_be_made_costs_one_warning() {
        let (page, folder) = (Page::default(), tempfile::tempdir().unwrap());
        fs::write(folder.path().join("log"), "a file where the folder should be").unwrap();
        let _telemetry = on_page(&page, &LogSettings::default(), 0, folder.path());
        (0..3).for_each(|step| tracing::info!(step, "still here"));
        let text = page.text();
        assert_eq!(
            (text.matches("WARN").count(), text.matches("still here").count()),
            (1, 3),
            "{text}"
        );
    }

    #[test]
    fn a_full_disk_under_the_log_costs_one_warning() {
        let page = Page::default();
        let console = Arc::new(Console::new(Box::new(page.clone()), false));
        let file =
            Mutex::new((LineFile::open(Path::new("/dev/full")).ok(), FirstFailure::default()));
        let lines = Lines { console, file, rank: 0, path: "log/rank-00000.jsonl".into() };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            (0..3).for_each(|step| tracing::info!(step, "still here"));
        });
        let text = page.text();
        assert_eq!(
            (text.matches("cannot write log/").count(), text.matches("still here").count()),
            (1, 3),
            "{text}"
        );
    }

    #[test]
    fn progress_without_a_terminal_is_lines_and_a_bar_where_it_is_demanded() {
        let (page, folder) = (Page::default(), tempfile::tempdir().unwrap());
        let telemetry = on_page(&page, &LogSettings::default(), 0, folder.path());
        let mut progress = telemetry.progress(100, 0);
        (1..=100).for_each(|step| progress.advance(step, "loss 0.41"));
        let text = page.text();
        assert!(text.contains(" step 1/100 (1 %)  loss 0.41\n"), "{text}");
        assert!(text.ends_with(" step 100/100 (100 %)  loss 0.41\n"), "{text}");
        assert_eq!(text.lines().count(), 2, "nothing between them within ten seconds");
        let settings = LogSettings { progress: ProgressStyle::Always, ..LogSettings::default() };
        on_page(&page, &settings, 0, folder.path()).progress(100, 40).advance(41, "loss 0.41");
        assert!(page.text().contains("━"), "a bar");
    }

    #[test]
    fn metrics_are_written_by_rank_zero_alone() {
        let (page, folder) = (Page::default(), tempfile::tempdir().unwrap());
        for (rank, exists) in [(1, false), (0, true)] {
            let telemetry = on_page(&page, &LogSettings::default(), rank, folder.path());
            telemetry.metrics_after(0, None).unwrap().append(&serde_json::json!({ "step": 1 }));
            assert_eq!(folder.path().join("metrics.jsonl").exists(), exists);
        }
    }

    #[test]
    fn the_log_table_reads_back() {
        let mut settings = LogSettings::default();
        crate::settings::read(
            &mut settings,
            "test",
            "level = 'debug'\nprogress = 'never'\ntensorboard = true",
            &[],
        )
        .unwrap();
        assert_eq!(
            settings,
            LogSettings { level: Level::Debug, progress: ProgressStyle::Never, tensorboard: true }
        );
    }
}
