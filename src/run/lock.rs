//! Only one process uses a run folder: `run.lock` names it.
//!
//! The file is created with O_EXCL, which is reliable on network file systems where advisory locks
//! are not, and its times are updated every few seconds for as long as the run lives, so that its
//! age is a heartbeat. It is removed when the run ends in good order; the lock of a dead run is
//! taken over.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, futimens};
use serde::{Deserialize, Serialize};

use crate::collective;
use crate::error::{ConfigProblem, Error, Result};
use crate::pulse;

const FILE: &str = "run.lock";
/// Time between two updates of the lock's times.
const BEAT: Duration = Duration::from_secs(5);
/// Age from which a lock is stale: many beats, and longer than a network file system stalls.
const STALE: Duration = Duration::from_secs(120);
/// Largest difference between the clocks of two machines.
const SKEW: Duration = Duration::from_secs(900);

/// The exclusive use of a run folder, released on drop.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    holder: Holder,
    /// The sender is dropped to end the heartbeat thread.
    heart: Option<(Sender<()>, JoinHandle<()>)>,
}

/// The process that holds a folder.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Holder {
    host: String,
    pid: u32,
    /// Start time of the process as reported by the system, since a later process may get the same
    /// number.
    began: Option<u64>,
    job: Option<String>,
    /// How often the job was queued again.
    restarts: Option<String>,
    /// The namespace in which the process has its number: containers of one host have several.
    numbers: Option<String>,
    /// Time in UTC.
    since: String,
}

impl RunLock {
    /// Locks `run` for this process. Also returns a warning if a stale lock was taken over.
    ///
    /// # Errors
    /// [`Error::Config`] naming the holder; [`Error::Storage`].
    pub fn take(run: &Path) -> Result<(Self, Option<String>)> {
        RunLock::take_or_find(run)?.map_err(|found| in_use(run, &found))
    }

    /// As [`take`](Self::take), but returns `None` if another run holds the lock.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn take_if_free(run: &Path) -> Result<Option<Self>> {
        Ok(RunLock::take_or_find(run)?.ok().map(|(lock, _)| lock))
    }

    fn take_or_find(run: &Path) -> Result<Result<(Self, Option<String>), Found>> {
        let (path, holder) = (run.join(FILE), Holder::this_process());
        let mut said = None;
        loop {
            match File::create_new(&path) {
                Ok(file) => return Ok(Ok((RunLock::hold(path, file, holder)?, said))),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::storage(&path, "create")(error)),
            }
            let Some(found) = Found::read(&path)? else { continue };
            match found.why_stale(&holder) {
                None => return Ok(Err(found)),
                Some(why) => {
                    if remove_stale(&path, &found)?.is_none() {
                        return Ok(Err(found));
                    }
                    said = Some(format!(
                        "took {} over from {}: {why}",
                        path.display(),
                        found.holder_text()
                    ));
                }
            }
        }
    }

    fn hold(path: PathBuf, mut file: File, holder: Holder) -> Result<Self> {
        let text = serde_json::to_string(&holder).expect("texts and numbers are JSON") + "\n";
        if let Err(error) = file.write_all(text.as_bytes()) {
            // An empty lock would look like that of a run that is just starting.
            let _ = fs::remove_file(&path);
            return Err(Error::storage(&path, "write")(error));
        }
        let (stop, stopped) = channel();
        let of_thread = path.clone();
        let beat = move || beat(&of_thread, &file, &stopped);
        let heart = thread::Builder::new()
            .name("lock".into())
            .spawn(beat)
            .map_err(Error::storage(&path, "start a thread for"))?;
        Ok(RunLock { path, holder, heart: Some((stop, heart)) })
    }
}

/// Returns the process that holds a run folder, without touching the lock; `None` if that process
/// is gone, as far as this machine's clock tells.
pub fn holder(run: &Path) -> Option<String> {
    let path = run.join(FILE);
    let text = fs::read_to_string(&path).ok()?;
    let touched = fs::metadata(&path).and_then(|found| found.modified()).ok()?;
    let age = SystemTime::now().duration_since(touched).unwrap_or_default().saturating_sub(SKEW);
    let found = Found { holder: serde_json::from_str(&text).ok(), text, age };
    found.why_stale(&Holder::this_process()).is_none().then(|| found.holder_text())
}

impl Drop for RunLock {
    fn drop(&mut self) {
        if let Some((stop, heart)) = self.heart.take() {
            drop(stop);
            // The thread returns no value, and a panic in it has already ended the process.
            let _ = heart.join();
        }
        // A lock that now belongs to another process must stay.
        if Found::read(&self.path)
            .ok()
            .flatten()
            .is_some_and(|found| found.holder.as_ref() == Some(&self.holder))
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Updates the lock's times by the file system's clock until the other end of the channel is
/// dropped.
fn beat(path: &Path, file: &File, stopped: &Receiver<()>) {
    let time = |nanoseconds| Timespec { tv_sec: 0, tv_nsec: nanoseconds };
    let now = Timestamps { last_access: time(UTIME_OMIT), last_modification: time(UTIME_NOW) };
    while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
        // A disk that fails here fails the next checkpoint too, and that reports the error.
        let _ = futimens(file, &now);
        if belongs_to_another(path, file) {
            let what = format!(
                "{} was taken over by another run while this one stood still",
                path.display()
            );
            let error = Error::config("output_dir", what);
            collective::end(error.exit_code(), error.name(), &error.to_string());
        }
    }
}

fn belongs_to_another(path: &Path, file: &File) -> bool {
    let (there, own) = (fs::metadata(path), file.metadata());
    matches!((there, own), (Ok(there), Ok(own)) if (there.dev(), there.ino()) != (own.dev(), own.ino()))
}

/// An existing lock.
struct Found {
    text: String,
    /// `None` while the file is being written.
    holder: Option<Holder>,
    /// Time since the last touch, by the clock of the file system.
    age: Duration,
}

impl Found {
    /// `None` if the file no longer exists.
    fn read(path: &Path) -> Result<Option<Self>> {
        let if_exists = |result: io::Result<_>| match result {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::storage(path, "read")(error)),
        };
        let read =
            fs::read_to_string(path).and_then(|text| Ok((text, fs::metadata(path)?.modified()?)));
        let Some((text, touched)) = if_exists(read)? else { return Ok(None) };
        let age = now_at(path)?.duration_since(touched).unwrap_or_default();
        Ok(Some(Found { holder: serde_json::from_str(&text).ok(), text, age }))
    }

    /// Returns the reason why the lock is stale; `None` if it is still held.
    fn why_stale(&self, own: &Holder) -> Option<String> {
        let old = (self.age > STALE).then(|| format!("not touched for {} s", self.age.as_secs()));
        let Some(holder) = &self.holder else { return old };
        if holder.host == own.host && holder.numbers == own.numbers {
            // Here the process can be looked up; a living process holds its lock whatever the age.
            return match holder.lives() {
                Some(true) => None,
                Some(false) => Some(format!("process {} is gone", holder.pid)),
                None => old,
            };
        }
        // Two runs of one allocation are of one job, too, but of one start.
        let is_requeued =
            holder.job.is_some() && holder.job == own.job && holder.restarts != own.restarts;
        if is_requeued { Some("the job is this one's own, started again".into()) } else { old }
    }

    fn holder_text(&self) -> String {
        let Some(Holder { host, pid, job, since, .. }) = &self.holder else {
            return "a run that is just starting".into();
        };
        let job = job.as_ref().map_or_else(|| "a run".into(), |job| format!("job {job}"));
        format!("{job} on host {host} since {since} (pid {pid})")
    }
}

/// Returns the time of the clock that sets file times in the lock's folder.
fn now_at(path: &Path) -> Result<SystemTime> {
    let probe = path.with_file_name(format!(".{FILE}.{}.{}", pulse::host(), std::process::id()));
    let written = File::create(&probe)
        .and_then(|mut file| file.write_all(b"\n").and_then(|()| file.metadata()?.modified()));
    // Another thread of this process may have removed the file first.
    let _ = fs::remove_file(&probe);
    written.map_err(Error::storage(&probe, "write"))
}

/// Removes a stale lock; `None` if another lock has replaced it meanwhile, which is kept.
fn remove_stale(path: &Path, stale: &Found) -> Result<Option<()>> {
    let aside =
        path.with_file_name(format!(".{FILE}.stale.{}.{}", pulse::host(), std::process::id()));
    match fs::rename(path, &aside) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Some(())),
        other => other.map_err(Error::storage(path, "set aside"))?,
    }
    let taken = fs::read_to_string(&aside).map_err(Error::storage(&aside, "read"))?;
    if taken == stale.text {
        fs::remove_file(&aside).map_err(Error::storage(&aside, "delete"))?;
        return Ok(Some(()));
    }
    fs::rename(&aside, path).map_err(Error::storage(path, "put back"))?;
    Ok(None)
}

fn in_use(run: &Path, found: &Found) -> Error {
    let what = format!("run folder in use by {}", found.holder_text());
    let problem = ConfigProblem { key: "output_dir".into(), place: String::new(), what };
    Error::Config { source_name: run.display().to_string(), problems: vec![problem] }
}

impl Holder {
    fn this_process() -> Self {
        let pid = std::process::id();
        let since = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let numbers = fs::read_link("/proc/self/ns/pid").ok();
        Holder {
            host: pulse::host(),
            pid,
            began: began(pid),
            job: collective::job(),
            restarts: collective::restarts(),
            numbers: numbers.map(|link| link.display().to_string()),
            since,
        }
    }

    /// Returns whether the process is alive, of a holder whose number means the same here; `None`
    /// if the system does not report start times.
    fn lives(&self) -> Option<bool> {
        began(std::process::id())?;
        let there = began(self.pid);
        Some(there.is_some() && there == self.began)
    }
}

/// Returns the start time of a process, in clock ticks since boot; `None` if it does not exist or
/// is a zombie.
fn began(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The preceding name may contain anything, even a parenthesis.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    // The state is the third field, the start time the 22nd.
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(holder: Holder, age_seconds: u64) -> Found {
        Found { text: String::new(), holder: Some(holder), age: Duration::from_secs(age_seconds) }
    }

    fn elsewhere() -> Holder {
        Holder {
            host: "n12".into(),
            pid: 7,
            began: Some(1),
            job: Some("41".into()),
            restarts: None,
            numbers: Some("pid:[1]".into()),
            since: "2026-01-02T03:04:05Z".into(),
        }
    }

    #[test]
    fn a_second_run_on_a_folder_is_told_who_has_it() {
        let run = tempfile::tempdir().unwrap();
        let (held, said) = RunLock::take(run.path()).unwrap();
        assert_eq!(said, None);
        let error = RunLock::take(run.path()).unwrap_err();
        assert_eq!(error.exit_code(), 50);
        let expected = format!("run folder in use by a run on host {} since ", pulse::host());
        assert!(
            error.to_string().contains(&expected)
                && error.to_string().ends_with(&format!("(pid {})", std::process::id())),
            "{error}"
        );
        drop(held);
        assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0, "released without a trace");
        RunLock::take(run.path()).unwrap();
    }

    #[test]
    fn a_lock_of_a_process_that_is_gone_is_taken_over_at_once() {
        let run = tempfile::tempdir().unwrap();
        // The number of this process, with another start time.
        let gone = Holder { began: Some(1), ..Holder::this_process() };
        fs::write(run.path().join(FILE), serde_json::to_string(&gone).unwrap()).unwrap();
        let (_held, said) = RunLock::take(run.path()).unwrap();
        assert!(said.unwrap().ends_with(&format!("process {} is gone", std::process::id())));
    }

    #[test]
    fn a_dead_run_of_another_host_is_not_told_to_be_in_use_for_ever() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join(FILE);
        fs::write(&path, serde_json::to_string(&elsewhere()).unwrap()).unwrap();
        assert!(holder(run.path()).unwrap().contains("n12"));
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        File::options().write(true).open(&path).unwrap().set_modified(hour_ago).unwrap();
        assert_eq!(holder(run.path()), None);
    }

    #[test]
    fn a_lock_of_another_host_holds_until_nobody_has_touched_it_for_long() {
        let own = Holder::this_process();
        assert_eq!(found(elsewhere(), 119).why_stale(&own), None);
        assert_eq!(found(elsewhere(), 121).why_stale(&own).unwrap(), "not touched for 121 s");
        assert_eq!(
            found(elsewhere(), 0).holder_text(),
            "job 41 on host n12 since 2026-01-02T03:04:05Z (pid 7)"
        );
    }

    #[test]
    fn a_job_that_starts_again_elsewhere_takes_its_own_lock_over() {
        let restarts = Some("1".into());
        let requeued = Holder { job: Some("41".into()), restarts, ..Holder::this_process() };
        assert!(found(elsewhere(), 0).why_stale(&requeued).is_some());
        let beside = Holder { restarts: None, ..requeued.clone() };
        assert_eq!(found(elsewhere(), 0).why_stale(&beside), None, "another step of the job");
        assert_eq!(
            found(Holder { job: None, ..elsewhere() }, 0)
                .why_stale(&Holder { job: None, ..requeued }),
            None,
            "no job is no job"
        );
    }

    #[test]
    fn a_process_that_lives_holds_its_lock_however_old() {
        let own = Holder::this_process();
        assert_eq!(found(own.clone(), 100_000).why_stale(&own), None);
    }

    #[test]
    fn a_number_of_another_container_says_nothing() {
        let own = Holder::this_process();
        let numbers = Some("pid:[1]".into());
        let other = Holder { began: Some(1), numbers, ..own.clone() };
        assert_eq!(found(other.clone(), 0).why_stale(&own), None);
        assert!(found(other, 121).why_stale(&own).is_some());
    }

    #[test]
    fn a_lock_that_is_just_being_written_is_in_use() {
        let run = tempfile::tempdir().unwrap();
        fs::write(run.path().join(FILE), "").unwrap();
        let error = RunLock::take(run.path()).unwrap_err();
        assert!(
            error.to_string().ends_with("run folder in use by a run that is just starting"),
            "{error}"
        );
    }

    #[test]
    fn a_stale_lock_that_another_took_first_is_left_to_it() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join(FILE);
        fs::write(&path, "another's, quicker").unwrap();
        let stale = Found { text: "of the dead".into(), holder: None, age: STALE };
        assert_eq!(remove_stale(&path, &stale).unwrap(), None);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another's, quicker");
    }

    #[test]
    fn d18_age_is_told_by_the_file_system() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join(FILE);
        fs::write(&path, "").unwrap();
        let hour = Duration::from_secs(3600);
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .set_modified(SystemTime::now() - hour)
            .unwrap();
        let age = Found::read(&path).unwrap().unwrap().age;
        assert!(age > hour / 2 && age < 2 * hour, "{age:?}");
        let (_held, said) = RunLock::take(run.path()).unwrap();
        assert!(said.unwrap().contains("from a run that is just starting: not touched for 3"));
    }
}
