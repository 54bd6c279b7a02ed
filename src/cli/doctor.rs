//! `fm-dist doctor`.

use clap::Args;

use super::files::say;
use crate::commands::doctor;
use crate::error::{Error, Result};

#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Also try every backend of attention on the first GPU, anew, and print a table; exit code 52
    /// if none but the plain one is sound
    #[arg(long)]
    gpu: bool,
}

impl DoctorArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let (text, complete) = doctor::report();
        say(&text)?;
        let mut is_sound = complete;
        if self.gpu {
            let found = doctor::attention_on(0);
            say(&found.text)?;
            is_sound &= found.is_sound;
        }
        Ok(if is_sound { 0 } else { Error::environment("incomplete").exit_code() })
    }
}
