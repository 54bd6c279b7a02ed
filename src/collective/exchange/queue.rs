//! Operations that were called for and have not been carried out.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;

use tch::Tensor;

use super::super::call::Call;
use super::Channel;
use super::rounds::Rounds;
use crate::error::Result;

/// The operations of a world and of all that were split off from it, in program order. Waiting for
/// one carries out all before it, so that ranks may wait in different orders, and need not wait for
/// one whose result they do not read.
///
/// One queue for all of them: with one each, two ranks that wait for two worlds in different orders
/// would wait for ever.
pub struct Queue<W> {
    waiting: VecDeque<Rounds<W>>,
    issued: u64,
    finished: u64,
    /// Kept from one operation to the next.
    scratch: Option<Tensor>,
    /// What an operation failed with: after that, ranks are no longer in step.
    broken: Option<String>,
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Queue { waiting: VecDeque::new(), issued: 0, finished: 0, scratch: None, broken: None }
    }
}

impl<W: Channel> Queue<W> {
    /// Returns the operation's number in this queue, which differs between ranks of different
    /// worlds.
    pub fn push(&mut self, operation: Rounds<W>) -> u64 {
        self.waiting.push_back(operation);
        self.issued += 1;
        self.issued
    }

    /// Carries out the operations up to number `last`.
    pub fn finish(&mut self, call: Call, last: u64) -> Result<()> {
        if let Some(what) = &self.broken {
            return Err(call.error(format!("an earlier operation failed: {what}")));
        }
        while self.finished < last {
            let Some(operation) = self.waiting.pop_front() else { break };
            self.finished += 1;
            let result = self.carry_out(operation);
            self.broken = result.as_ref().err().map(ToString::to_string);
            result?;
        }
        Ok(())
    }

    /// Carries out all of them.
    pub fn drain(&mut self, call: Call) -> Result<()> {
        self.finish(call, self.issued)
    }

    /// After a failure the channel may still read and write the memory: it is never given back.
    fn carry_out(&mut self, operation: Rounds<W>) -> Result<()> {
        let operation = ManuallyDrop::new(operation);
        let mut scratch = ManuallyDrop::new(self.scratch.take());
        let outcome = operation.run(&mut scratch);
        let operation = ManuallyDrop::into_inner(operation);
        match outcome {
            Ok(()) => self.scratch = ManuallyDrop::into_inner(scratch),
            Err(_) => operation.abandon(),
        }
        outcome
    }
}
