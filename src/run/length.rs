//! The length of a run: a number of steps, or of passes over its data.

use crate::data::batches_of;

/// The end that a configuration sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Optimizer steps, `max_steps`.
    Steps(u64),
    /// The batches of `max_epochs` passes over the data, of `global_batch` samples each.
    Epochs { batches: u64, global_batch: u64 },
}

impl Length {
    /// Returns the last step of a run that has done `step` and seen so many samples.
    pub fn last_step(self, step: u64, samples_seen: u64) -> u64 {
        match self {
            Length::Steps(max_steps) => max_steps,
            Length::Epochs { batches, global_batch } => {
                let seen = batches_of(samples_seen, global_batch);
                // A run that is beyond its end ended earlier.
                step.saturating_add(batches).saturating_sub(seen)
            }
        }
    }

    /// The key of the configuration that sets it.
    pub fn key(self) -> &'static str {
        match self {
            Length::Steps(_) => "max_steps",
            Length::Epochs { .. } => "max_epochs",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_end_after_their_samples_whatever_batches_they_were_seen_in() {
        let length = Length::Epochs { batches: 60, global_batch: 8 };
        assert_eq!(length.last_step(0, 0), 60);
        assert_eq!(length.last_step(20, 160), 60);
        assert_eq!(length.last_step(20, 80), 70, "in batches of 4 before");
        assert_eq!(length.last_step(20, 320), 40, "in batches of 16 before");
        assert_eq!(length.last_step(70, 560), 60, "a run beyond its end");
        assert_eq!(Length::Steps(60).last_step(70, 1), 60);
    }
}
