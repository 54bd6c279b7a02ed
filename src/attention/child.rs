//! The child of a trial: the hidden command that tries one backend and prints a line for each case.

use std::io::{self, Write};

use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use serde::{Deserialize, Serialize};
use tch::{Cuda, Device};

use super::case::Case;
use super::measure::measure;
use super::outcome::Outcome;
use crate::cuda;
use crate::error::{Error, Result};
use crate::fault;
use crate::libtorch::AttentionBackend;
use crate::nn::attention::open_on;
use crate::phase::Phase;
use crate::pulse;

/// The argument of the hidden command, as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    pub backend: AttentionBackend,
    /// Number of the GPU; `None` for the CPU.
    pub gpu: Option<usize>,
    pub cases: Vec<Case>,
    /// Rank of the parent, for injected faults and messages.
    pub rank: usize,
    /// An injected fault. Its step is the backend's place in [`AttentionBackend::ALL`], from 1, and
    /// its phase `attention`.
    pub fault: Option<String>,
}

/// A line of the child's standard output, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    /// The device is open; cases begin.
    Ready,
    /// The next case is done.
    Tried(Outcome),
    /// The device cannot be opened.
    Unavailable(String),
}

/// Answers a request on standard output.
///
/// # Errors
/// [`Error::Environment`] if the request is none, or standard output is closed.
pub fn answer(request: &str) -> Result<()> {
    let request: Request = serde_json::from_str(request)
        .map_err(|error| Error::environment(format!("no request of a trial: {error}")))?;
    // A trial that nobody waits for would hold the GPU; a core file of it would fill the disk.
    // Neither is worth an error.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    if let Some(order) = &request.fault {
        fault::arm(order.parse().map_err(Error::environment)?);
    }
    pulse::set_rank(request.rank, 1);
    tch::set_num_threads(1);
    let device = match opened(request.gpu) {
        Ok(device) => device,
        Err(error) => return say(&Line::Unavailable(error.to_string())),
    };
    say(&Line::Ready)?;
    let place = AttentionBackend::ALL.iter().position(|backend| *backend == request.backend);
    pulse::begin_step(place.map_or(0, |place| place as u64 + 1));
    request.cases.iter().try_for_each(|case| {
        pulse::enter(Phase::Attention);
        say(&Line::Tried(measure(case, request.backend, device)))
    })
}

fn opened(gpu: Option<usize>) -> Result<Device> {
    let Some(number) = gpu else { return Ok(Device::Cpu) };
    cuda::open_libtorch()?;
    let count = Cuda::device_count();
    if number as i64 >= count {
        return Err(Error::environment(format!("no GPU {number}: libtorch finds {count}")));
    }
    open_on(Device::Cuda(number));
    Ok(Device::Cuda(number))
}

fn say(line: &Line) -> Result<()> {
    let text = serde_json::to_string(line).expect("finite numbers and texts are JSON");
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::environment(format!("nobody listens to a trial: {error}")))
}
