//! The program: runs the command of the command line and exits with its code. An error on one rank
//! ends all ranks.

use std::panic::PanicHookInfo;

use clap::Parser;
use fm_dist::cli::Cli;
use fm_dist::collective;
use fm_dist::error::{BUG, Error, USAGE};
use fm_dist::libtorch;

fn main() {
    libtorch::share_memory_among_threads();
    std::panic::set_hook(Box::new(|panic| end_after(panic)));
    libtorch::panic_on_terminate();
    let cli = Cli::try_parse().unwrap_or_else(|error| end_before_start(&error));
    match libtorch::guarded(|| cli.run()) {
        Ok(code) => collective::leave(code),
        Err(Error::Peer { speaker, code, what }) => collective::follow(speaker, code, &what),
        Err(error) => end(&error),
    }
}

/// Prints the reason, then ends this process and every other rank.
fn end(error: &Error) -> ! {
    collective::end(error.exit_code(), error.name(), &error.to_string())
}

/// Ends the process after a panic. A panic is a bug unless it quotes a library error with an
/// external cause.
fn end_after(panic: &PanicHookInfo<'_>) -> ! {
    let text = panic.payload_as_str().unwrap_or("without a text");
    if let Some(error) = Error::from_library(text) {
        end(&error);
    }
    // Drops the C++ stack that libtorch appends to its messages.
    let first_line = text.lines().next().unwrap_or(text).split("\\n").next().unwrap_or(text);
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    collective::end(BUG, "BUG", &format!("panicked at {location}: {first_line}"))
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
