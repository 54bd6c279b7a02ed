//! `fm-dist doctor`.

use clap::Args;

use super::files::say;
use crate::commands::doctor;
use crate::error::{Error, Result};

#[derive(Args, Debug)]
pub struct DoctorArgs {}

impl DoctorArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let (text, complete) = doctor::report();
        say(&text)?;
        Ok(if complete { 0 } else { Error::environment("incomplete").exit_code() })
    }
}
