//! The phases of a run: the words by which messages, failure files, the watchdog and ordered faults
//! say where a rank stands.

/// A rank's occupation, in the order of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    Launch,
    /// Joining the launcher's world.
    Connect,
    /// Agreeing on one configuration, one program and one watchdog.
    Bootstrap,
    /// Opening the data, building the model, loading a checkpoint.
    Open,
    /// Reading a batch ahead, on a thread of its own.
    Read,
    /// Waiting for a batch.
    Data,
    Forward,
    Backward,
    /// Waiting for the other ranks' gradients and statistics.
    Reduce,
    Optimizer,
    /// Repeating a step's forward and backward to find what was not finite.
    Diagnose,
    /// Comparing parameters among ranks.
    Compare,
    /// Copying what a checkpoint holds.
    Snapshot,
    /// Writing the copy, beside the steps.
    Write,
    /// Bringing what was written to the disk.
    Sync,
    /// Making a checkpoint real.
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
        ("read", Phase::Read),
        ("data", Phase::Data),
        ("forward", Phase::Forward),
        ("backward", Phase::Backward),
        ("reduce", Phase::Reduce),
        ("optimizer", Phase::Optimizer),
        ("diagnose", Phase::Diagnose),
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

    /// The word that stands in messages and orders of faults.
    pub fn word(self) -> &'static str {
        Self::ALL[self as usize].0
    }

    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.iter().find(|(name, _)| *name == word).map(|(_, phase)| *phase)
    }

    /// The phase of that number, as in `phase as u8`.
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
