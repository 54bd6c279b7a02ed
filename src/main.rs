//! The program: runs the command of the command line and exits with its code. An error on one rank
//! ends all ranks.

use std::time::Duration;

use clap::Parser;
use fm_dist::cli::Cli;
use fm_dist::collective;
use fm_dist::error::{Error, USAGE};
use fm_dist::libtorch;

fn main() {
    libtorch::share_memory_among_threads();
    std::panic::set_hook(Box::new(|panic| collective::end_after_panic(panic)));
    libtorch::panic_on_terminate();
    let cli = Cli::try_parse().unwrap_or_else(|error| end_before_start(&error));
    match libtorch::guarded(|| cli.run()) {
        Ok(code) => collective::leave(code),
        Err(Error::Peer { speaker, code, what }) => collective::follow(speaker, code, &what),
        Err(error) => collective::end_with(error),
    }
}

/// Time in which a launcher has ended the other ranks of a launch whose first one has ended.
const OTHERS_END: Duration = Duration::from_secs(5);

/// Prints the help, the version, or the mistake in the command line, and exits. As a rule every
/// process of a launch has the same command line, and the first rank prints for all; another one
/// that is still there after a while has made a mistake of its own.
fn end_before_start(shown: &clap::Error) -> ! {
    let code = if shown.use_stderr() { USAGE } else { 0 };
    let is_first = matches!(collective::launched_rank(), None | Some(0));
    if !is_first && code != 0 {
        std::thread::sleep(OTHERS_END);
    }
    if is_first || code != 0 {
        drop(shown.print());
    }
    collective::leave(code)
}
