//! The program: runs the command of the command line and exits with its code. An error on one rank
//! ends all ranks.

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

/// Prints the help, the version, or the mistake in the command line, and exits. Every process of a
/// launch has the same command line, so only the first rank prints.
fn end_before_start(shown: &clap::Error) -> ! {
    let code = if shown.use_stderr() { USAGE } else { 0 };
    match collective::launched_rank() {
        Some(1..) if code != 0 => collective::follow(Some(0), code, "the command line is wrong"),
        Some(1..) => (),
        _ => drop(shown.print()),
    }
    collective::leave(code)
}
