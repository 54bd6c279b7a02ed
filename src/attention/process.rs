//! Starts the child of a trial and listens to it. However the child ends, its parent goes on.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

use super::child::{Line, Request};
use super::outcome::Outcome;
use super::trial::Unavailable;
use crate::collective::without_launcher;
use crate::error::MEMORY;
use crate::pulse;

/// The hidden command.
const COMMAND: &str = "attention-trial";

/// Times that a child may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Loading libraries and opening the GPU.
    pub start: Duration,
    /// All cases of one backend.
    pub cases: Duration,
}

impl Default for Limits {
    /// Two minutes to start, because libraries of gigabytes may come from a slow network, and one
    /// for the cases. Both together are below the watchdog's five minutes.
    fn default() -> Self {
        Limits { start: Duration::from_secs(120), cases: Duration::from_secs(60) }
    }
}

/// Time after its last line or its kill in which a process must be gone. One that a driver holds is
/// left behind.
const GRACE: Duration = Duration::from_secs(5);

/// Runs `program` with the request. Returns an outcome for each case.
///
/// # Errors
/// [`Unavailable`] if the program cannot be started or cannot open the device.
pub(super) fn run(
    program: &Path,
    request: &Request,
    limits: Limits,
) -> Result<Vec<Outcome>, Unavailable> {
    let text = serde_json::to_string(request).expect("numbers and texts are JSON");
    let mut command = Command::new(program);
    command.args([COMMAND, &text]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Ctrl-C in a terminal is for this process, which ends the child.
    command.process_group(0);
    let mut child = without_launcher(&mut command).spawn().map_err(|error| {
        Unavailable(format!("cannot start a trial by {}: {error}", program.display()))
    })?;
    let lines = lines_of(child.stdout.take().expect("it is piped"));
    let errors = lines_of(child.stderr.take().expect("it is piped"));
    let heard = listen(&lines, limits);
    let how = ending(&mut child, &errors, &heard, limits);
    heard.outcomes(request.cases.len(), how)
}

/// Reads lines on a thread, so that a full pipe never stops the child.
fn lines_of(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(pipe).split(b'\n').map_while(Result::ok);
        lines.try_for_each(|line| sender.send(String::from_utf8_lossy(&line).into_owned()))
    });
    receiver
}

/// All that a child has said.
#[derive(Default)]
struct Heard {
    is_ready: bool,
    outcomes: Vec<Outcome>,
    unavailable: Option<String>,
    /// The child was silent for longer than it may.
    is_late: bool,
}

fn listen(lines: &Receiver<String>, limits: Limits) -> Heard {
    let (mut heard, mut until) = (Heard::default(), Instant::now() + limits.start);
    loop {
        let line = match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return heard,
            Err(RecvTimeoutError::Timeout) => {
                heard.is_late = true;
                return heard;
            }
        };
        pulse::still_at_work();
        // Libraries may print lines of their own.
        match serde_json::from_str(&line) {
            Ok(Line::Ready) => {
                heard.is_ready = true;
                until = Instant::now() + limits.cases;
            }
            Ok(Line::Tried(outcome)) => heard.outcomes.push(outcome),
            Ok(Line::Unavailable(what)) => heard.unavailable = Some(what),
            Err(_) => (),
        }
    }
}

/// How a child ended that left cases untried.
struct Ending {
    /// The backend is not the reason.
    is_disturbed: bool,
    how: String,
}

fn ending(child: &mut Child, errors: &Receiver<String>, heard: &Heard, limits: Limits) -> Ending {
    if heard.is_late {
        // It may have ended by itself meanwhile.
        let _ = child.kill();
        gone(child);
        let limit = if heard.is_ready { limits.cases } else { limits.start };
        return Ending { is_disturbed: false, how: format!("took longer than {limit:?}") };
    }
    let Some(status) = gone(child) else {
        let _ = child.kill();
        gone(child);
        return Ending { is_disturbed: false, how: "closed its output and did not end".into() };
    };
    let how = words_of(status);
    let last = last_words(errors).map_or_else(String::new, |words| format!(": {words}"));
    Ending { is_disturbed: is_disturbed(status), how: how + &last }
}

/// True if memory ran out, or a signal ended the process that others send: users, launchers, and
/// the kernel where memory is short.
fn is_disturbed(status: ExitStatus) -> bool {
    let from_outside = [SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];
    status.code() == Some(MEMORY) || status.signal().is_some_and(|by| from_outside.contains(&by))
}

/// Waits for the end of a process; `None` if it does not end in time.
fn gone(child: &mut Child) -> Option<ExitStatus> {
    let until = Instant::now() + GRACE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(5)),
            _ => return None,
        }
    }
}

fn words_of(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => {
            let name = signal_hook::low_level::signal_name(signal);
            format!("ended by {}", name.map_or(format!("signal {signal}"), str::to_owned))
        }
        (None, None) => "ended".into(),
    }
}

/// Returns the reason on the child's last line of errors, without the places that lead to it.
fn last_words(errors: &Receiver<String>) -> Option<String> {
    let until = Instant::now() + GRACE;
    let next = || errors.recv_timeout(until.saturating_duration_since(Instant::now())).ok();
    let last = std::iter::from_fn(next).filter(|line| !line.trim().is_empty()).last()?;
    let reason = last.split_once("phase attention: ").map_or(last.as_str(), |(_, reason)| reason);
    let reason = reason.rsplit_once(" exit ").map_or(reason, |(reason, _)| reason);
    Some(reason.trim().trim_end_matches('.').into())
}

impl Heard {
    fn outcomes(
        self,
        cases: usize,
        Ending { is_disturbed, how }: Ending,
    ) -> Result<Vec<Outcome>, Unavailable> {
        if let Some(what) = self.unavailable {
            return Err(Unavailable(what));
        }
        if !self.is_ready {
            return Err(Unavailable(format!("a trial {how}")));
        }
        let mut outcomes = self.outcomes;
        if outcomes.len() < cases {
            outcomes.push(match is_disturbed {
                true => Outcome::Disturbed { how },
                false => Outcome::Ended { how },
            });
        }
        outcomes.resize(cases, Outcome::NotReached);
        Ok(outcomes)
    }
}
