//! Worlds of processes for the other tests: this binary under `mpirun` or alone, as one of its
//! [`programs`].

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use fm_dist::collective::{self, Collective, Launch};
use fm_dist::error::{BUG, Error};

use crate::programs;

/// What became of a world of MPI ranks.
pub struct Outcome {
    pub code: Option<i32>,
    pub output: String,
    /// From the line in which a rank said that it fails to the end of the world.
    pub survived: Option<Duration>,
}

/// The line with which a failing rank starts the clock.
pub const FAILS_NOW: &str = "this rank fails now";

/// No world of this file takes a minute, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// This binary under `mpirun`, to be [`run`].
pub fn world_of(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--allow-run-as-root", "-n", &ranks.to_string()]);
    command.arg(std::env::current_exe().expect("this binary has a path"));
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command
}

/// Runs one of the [`programs`] in children, one world at a time: there are more ranks than cores
/// already. `command` starts this binary, alone or under `mpirun`.
pub fn run(mut command: Command, program: &str) -> Outcome {
    static ONE_WORLD: Mutex<()> = Mutex::new(());
    let _alone = ONE_WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    command.args(programs::arguments(program)).env("OMP_NUM_THREADS", "1");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mpirun of Open MPI is in PATH");
    let (stdout, mut stderr) =
        (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let (sender, done) = mpsc::channel();
    thread::spawn(move || sender.send(read_lines(stdout)));
    let Ok((mut output, failed_at)) = done.recv_timeout(PATIENCE) else {
        child.kill().expect("a child can be killed");
        panic!(
            "{program} hangs: {}",
            errors.join().expect("a reader does not panic").expect("a pipe can be read")
        );
    };
    let code = child.wait().expect("a child can be waited for").code();
    let survived = failed_at.map(|instant| instant.elapsed());
    output += &errors.join().expect("a reader does not panic").expect("a pipe can be read");
    Outcome { code, output, survived }
}

/// All lines until the pipe closes, and when a rank said that it fails.
fn read_lines(pipe: impl Read) -> (String, Option<Instant>) {
    let (mut text, mut failed_at) = (String::new(), None);
    for line in BufReader::new(pipe).lines().map_while(std::io::Result::ok) {
        failed_at = failed_at.or_else(|| line.contains(FAILS_NOW).then(Instant::now));
        text += &(line + "\n");
    }
    (text, failed_at)
}

/// Joins the world of `mpirun`; from here on a panic of this rank ends all ranks, as it does in
/// `main`.
pub fn join_the_world() -> Box<dyn Collective> {
    let world = collective::connect(Launch::Auto, Duration::from_secs(60));
    end_all_on_panic();
    world.unwrap_or_else(|error| end_with(&error))
}

pub fn end_all_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        collective::abort(BUG);
    }));
}

pub fn end_with(error: &Error) -> ! {
    eprintln!("{error}");
    collective::abort(error.exit_code())
}
