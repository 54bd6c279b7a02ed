//! Arguments to a command, its outcome to an exit code. Whatever ends one rank ends the world.

use std::io::Write;
use std::panic::PanicHookInfo;

use clap::Parser;
use fm_dist::cli::Cli;
use fm_dist::collective;
use fm_dist::error::{BUG, Error, one_line};

fn main() {
    std::panic::set_hook(Box::new(|panic| end(BUG, "BUG", &told(panic))));
    match Cli::parse().run() {
        Ok(code) => std::process::exit(code),
        // The rank that failed first has said why.
        Err(Error::Peer { code, .. }) => collective::follow(code),
        Err(error) => end(error.exit_code(), error.name(), &error.to_string()),
    }
}

/// Where and why, without the C++ stack that libtorch puts behind its messages.
fn told(panic: &PanicHookInfo<'_>) -> String {
    let text = panic.payload_as_str().unwrap_or("without a text");
    let first_line = text.lines().next().unwrap_or(text).split("\\n").next().unwrap_or(text);
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    format!("panicked at {place}: {first_line}")
}

/// Says why in one line, then ends this process and every other rank.
fn end(code: i32, name: &str, what: &str) -> ! {
    let what = one_line(what);
    let full_stop = if what.ends_with(['.', '?']) { "" } else { "." };
    let line = format!("fm-dist: error {name} {}: {what}{full_stop} exit {code}\n", collective::whereabouts());
    // One write, so that a launcher that joins the ranks' outputs cannot tear the line; a closed pipe changes nothing.
    let _ = std::io::stderr().write_all(line.as_bytes());
    collective::abort(code)
}
