//! Operations that were issued and have not been carried out.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;

use tch::Tensor;

use super::super::call::Call;
use super::Channel;
use super::rounds::Rounds;
use crate::error::Result;

/// The operations of a communicator and of all that were split off it, in program order. Waiting
/// for one operation carries out all before it, so ranks may wait in different orders and need not
/// wait for an operation whose result they do not read.
///
/// All of them share one queue: with a queue each, two ranks that wait for two communicators in
/// different orders would deadlock.
pub struct Queue<C> {
    waiting: VecDeque<Rounds<C>>,
    issued: u64,
    finished: u64,
    /// Scratch memory, kept from one operation to the next.
    scratch: Option<Tensor>,
    /// The error of the operation that failed. After it, ranks are no longer in step.
    broken: Option<String>,
}

impl<C> Default for Queue<C> {
    fn default() -> Self {
        Queue { waiting: VecDeque::new(), issued: 0, finished: 0, scratch: None, broken: None }
    }
}

impl<C: Channel> Queue<C> {
    /// Appends an operation. Returns its number in this queue, which may differ between ranks.
    pub fn push(&mut self, operation: Rounds<C>) -> u64 {
        self.waiting.push_back(operation);
        self.issued += 1;
        self.issued
    }

    /// Carries out all operations up to number `last`.
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

    /// Carries out all queued operations.
    pub fn drain(&mut self, call: Call) -> Result<()> {
        self.finish(call, self.issued)
    }

    /// Carries out one operation. After a failure its memory is leaked, because the channel may
    /// still read and write it.
    fn carry_out(&mut self, operation: Rounds<C>) -> Result<()> {
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
