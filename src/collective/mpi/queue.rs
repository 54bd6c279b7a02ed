//! Operations that were called for and have not been carried out.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;

use tch::Tensor;

use super::super::call::Call;
use super::exchange::{Operation, Place};
use crate::error::Result;

/// The operations of one communicator in program order. Waiting for one carries out all before it, so that ranks may wait in
/// different orders, and need not wait for one whose result they do not read.
pub struct Queue {
    pub place: Place,
    waiting: VecDeque<Operation>,
    issued: u64,
    finished: u64,
    /// Kept from one operation to the next.
    scratch: Option<Tensor>,
    /// What an operation failed with: after that, ranks are no longer in step.
    broken: Option<String>,
}

impl Queue {
    pub fn new(place: Place) -> Self {
        Queue { place, waiting: VecDeque::new(), issued: 0, finished: 0, scratch: None, broken: None }
    }

    /// Number of the next operation.
    pub fn next(&self) -> u64 {
        self.issued
    }

    pub fn push(&mut self, operation: Operation) {
        self.waiting.push_back(operation);
        self.issued += 1;
    }

    /// Carries out the operations up to number `last`.
    pub fn finish(&mut self, call: Call, last: u64) -> Result<()> {
        if let Some(what) = &self.broken {
            return Err(call.error(format!("an earlier operation failed: {what}")));
        }
        while self.finished <= last {
            let Some(operation) = self.waiting.pop_front() else { break };
            let result = self.carry_out(operation);
            self.broken = result.as_ref().err().map(ToString::to_string);
            result?;
            self.finished += 1;
        }
        Ok(())
    }

    /// Carries out all of them.
    pub fn drain(&mut self, call: Call) -> Result<()> {
        self.finish(call, self.issued)
    }

    /// After a failure MPI may still read and write the memory: it is never given back.
    fn carry_out(&mut self, operation: Operation) -> Result<()> {
        let operation = ManuallyDrop::new(operation);
        let mut scratch = ManuallyDrop::new(self.scratch.take());
        operation.run(self.place, &mut scratch)?;
        self.scratch = ManuallyDrop::into_inner(scratch);
        drop(ManuallyDrop::into_inner(operation));
        Ok(())
    }
}
