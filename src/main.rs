//! Arguments to a command, its outcome to an exit code. Whatever ends one rank ends the world.

use std::panic::PanicHookInfo;

use clap::Parser;
use fm_dist::cli::Cli;
use fm_dist::collective;
use fm_dist::error::{BUG, Error};
use fm_dist::{failure, libtorch};

fn main() {
    libtorch::share_memory_among_threads();
    std::panic::set_hook(Box::new(|panic| end(BUG, "BUG", &told(panic))));
    match Cli::parse().run() {
        Ok(code) => std::process::exit(code),
        // The rank that failed first has said why.
        Err(Error::Peer { code, .. }) => collective::follow(code),
        Err(error) => {
            // What ranks meet at once without being able to agree who says it.
            if matches!(error, Error::Collective { .. } | Error::Desync { .. }) && !failure::is_speaker() {
                collective::give_way();
            }
            end(error.exit_code(), error.name(), &error.to_string())
        }
    }
}

/// Where and why, without the C++ stack that libtorch puts behind its messages.
fn told(panic: &PanicHookInfo<'_>) -> String {
    let text = panic.payload_as_str().unwrap_or("without a text");
    let first_line = text.lines().next().unwrap_or(text).split("\\n").next().unwrap_or(text);
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    format!("panicked at {place}: {first_line}")
}

/// Says why, then ends this process and every other rank.
fn end(code: i32, name: &str, what: &str) -> ! {
    failure::tell(code, name, what);
    collective::abort(code)
}
