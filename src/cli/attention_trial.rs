//! The hidden command by which a run tries a backend of attention in a process of its own.

use clap::Args;

use crate::attention;
use crate::error::Result;

#[derive(Args, Debug)]
pub struct AttentionTrialArgs {
    /// What to try, as JSON
    request: String,
}

impl AttentionTrialArgs {
    /// Does what was asked; returns the exit code.
    pub fn run(self) -> Result<i32> {
        attention::answer(&self.request).map(|()| 0)
    }
}
