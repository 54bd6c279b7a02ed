//! Arguments to a command, its outcome to an exit code. Whatever ends one rank ends the world.

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

/// Says why, then ends this process and every other rank.
fn end(error: &Error) -> ! {
    collective::end(error.exit_code(), error.name(), &error.to_string())
}

/// A panic is a mistake of the program, unless it quotes a library that the world outside failed.
fn end_after(panic: &PanicHookInfo<'_>) -> ! {
    let text = panic.payload_as_str().unwrap_or("without a text");
    if let Some(error) = Error::of_library(text) {
        end(&error);
    }
    // Without the C++ stack that libtorch puts behind its messages.
    let first_line = text.lines().next().unwrap_or(text).split("\\n").next().unwrap_or(text);
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    collective::end(BUG, "BUG", &format!("panicked at {place}: {first_line}"))
}

/// Help and version, or what is wrong with the command line: every process of a launch has the same
/// one, so that the first rank shows it.
fn end_before_start(shown: &clap::Error) -> ! {
    let code = if shown.use_stderr() { USAGE } else { 0 };
    match collective::launched_rank() {
        Some(1..) if code != 0 => collective::follow(Some(0), code, "the command line is wrong"),
        Some(1..) => (),
        _ => drop(shown.print()),
    }
    collective::leave(code)
}
