//! The phases of a run, with the words for them in messages, failure files, the watchdog and
//! injected faults.

/// A rank's activity, in the order of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    Launch,
    /// Connecting to the launcher's world.
    Connect,
    /// Agreeing on one configuration, one program and one watchdog.
    Bootstrap,
    /// Opening the data, building the model, loading a checkpoint.
    Open,
    /// Trying a backend of attention, in a process of its own.
    Attention,
    /// Reading a batch ahead, on a thread of its own.
    Read,
    /// Waiting for a batch.
    Data,
    /// Drawing a batch's noise and timesteps, on the thread that read it; waiting for them.
    Draw,
    Forward,
    Backward,
    /// Waiting for the other ranks' gradients and statistics.
    Reduce,
    Optimizer,
    /// Repeating a step's forward and backward to find the tensor that was not finite.
    Diagnose,
    /// Judging samples that are not trained on.
    Validate,
    /// Making samples of prompts between two steps.
    Sample,
    /// Comparing parameters between ranks.
    Compare,
    /// Copying the tensors of a checkpoint.
    Snapshot,
    /// Writing the copy while steps go on.
    Write,
    /// Fsyncing the files that were written.
    Sync,
    /// Publishing a checkpoint by renaming it.
    Commit,
    /// Deleting old checkpoints.
    Prune,
    /// Waiting for a checkpoint that is still being written.
    Save,
    /// Generating samples and drawing the report at the end.
    Report,
    Finalize,
}

impl Phase {
    const ALL: &'static [(&'static str, Phase)] = &[
        ("launch", Phase::Launch),
        ("connect", Phase::Connect),
        ("bootstrap", Phase::Bootstrap),
        ("open", Phase::Open),
        ("attention", Phase::Attention),
        ("read", Phase::Read),
        ("data", Phase::Data),
        ("draw", Phase::Draw),
        ("forward", Phase::Forward),
        ("backward", Phase::Backward),
        ("reduce", Phase::Reduce),
        ("optimizer", Phase::Optimizer),
        ("diagnose", Phase::Diagnose),
        ("validate", Phase::Validate),
        ("sample", Phase::Sample),
        ("compare", Phase::Compare),
        ("snapshot", Phase::Snapshot),
        ("write", Phase::Write),
        ("sync", Phase::Sync),
        ("commit", Phase::Commit),
        ("prune", Phase::Prune),
        ("save", Phase::Save),
        ("report", Phase::Report),
        ("finalize", Phase::Finalize),
    ];

    /// The phase's word in messages and in the configuration of faults.
    pub fn word(self) -> &'static str {
        Self::ALL[self as usize].0
    }

    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.iter().find(|(name, _)| *name == word).map(|(_, phase)| *phase)
    }

    /// The phase whose discriminant (`phase as u8`) is `number`.
    pub fn numbered(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).map(|(_, phase)| *phase)
    }

    /// Every word, for a message.
    pub fn words() -> impl Iterator<Item = &'static str> {
        Self::ALL.iter().map(|(word, _)| *word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_its_word() {
        for (index, (word, phase)) in Phase::ALL.iter().enumerate() {
            assert_eq!(
                (*phase as usize, phase.word(), Phase::named(word)),
                (index, *word, Some(*phase))
            );
        }
        assert_eq!(Phase::named("lunch"), None);
    }
}
