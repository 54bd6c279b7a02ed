//! A host that waits for an operation: how long, and whether it can ever be done.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::board;
use crate::failure::fail;
use crate::switches::switches;
use crate::world::World;

/// Gives up the processor while nothing can advance.
pub struct Patience {
    began: Instant,
    turns: u32,
}

impl Patience {
    pub fn new() -> Self {
        Patience { began: Instant::now(), turns: 0 }
    }

    pub fn is_over(&self) -> bool {
        self.began.elapsed() > switches().patience
    }

    pub fn pause(&mut self) {
        self.turns += 1;
        match self.turns {
            ..200 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

impl World {
    /// Ends the process if the operation that the host waits for can never be done.
    pub fn check_hope(&self, stream: usize, patience: &Patience) {
        let Some(operation) = self.awaited(stream) else { return };
        let (handle, number, what) =
            (operation.call.communicator, operation.number, operation.describe());
        let Some(communicator) = self.communicators.peek(handle) else { return };
        let Some(board) = &communicator.board else { return };
        board.own().waits.store(number + 1, Ordering::Release);
        let missing: Vec<(usize, u32, u32)> = (0..board.slots().len())
            .filter(|rank| board.slots()[*rank].posted.load(Ordering::Acquire) <= number)
            .map(|rank| {
                (
                    rank,
                    board.slots()[rank].state.load(Ordering::Acquire),
                    board.slots()[rank].process.load(Ordering::Acquire),
                )
            })
            .collect();
        for (rank, state, process) in &missing {
            match *state {
                // Read again: it may have posted and then left since.
                board::FINALIZING | board::LEFT
                    if board.slots()[*rank].posted.load(Ordering::Acquire) <= number =>
                {
                    fail(format!(
                        "ranks differ in the number of operations: rank {rank} ended the communicator before {what}"
                    ))
                }
                board::FAILED => {
                    fail(format!("{what} waits for rank {rank}, which has broken a rule"))
                }
                _ => self.check_deadlock(handle, *rank, *process, &what),
            }
        }
        if patience.is_over() {
            let missing: Vec<String> = missing
                .iter()
                .map(|(rank, state, process)| describe_missing(*rank, *state, *process))
                .collect();
            let seconds = switches().patience.as_secs_f64();
            let reason = if missing.is_empty() {
                "though every rank started it".into()
            } else {
                format!("for {}", missing.join(" and "))
            };
            fail(format!("{what} has waited {seconds} s {reason}"));
        }
    }

    /// A rank that we wait for, and which waits for us in another communicator.
    fn check_deadlock(&self, own: usize, rank: usize, process: u32, what: &str) {
        let others = self.communicators.iter().filter(|(handle, _)| *handle != own);
        for (handle, board) in
            others.filter_map(|(handle, other)| Some((handle, other.board.as_ref()?)))
        {
            let ours = board.own().posted.load(Ordering::Acquire);
            let theirs =
                board.slots().iter().find(|slot| slot.process.load(Ordering::Acquire) == process);
            if process != std::process::id()
                && theirs.is_some_and(|slot| slot.waits.load(Ordering::Acquire) > ours)
            {
                let (own, other) =
                    (self.communicators.title(own), self.communicators.title(handle));
                fail(format!(
                    "ranks differ in communicator: this rank waits for {what} of {own}, rank {rank} for one of {other}"
                ));
            }
        }
    }

    /// The host waits no more.
    pub fn stop_waiting(&self) {
        for board in
            self.communicators.iter().filter_map(|(_, communicator)| communicator.board.as_ref())
        {
            board.own().waits.store(0, Ordering::Release);
        }
    }
}

fn describe_missing(rank: usize, state: u32, process: u32) -> String {
    let gone = process != 0 && !board::lives(process);
    let how = match state {
        0 => " (never joined)",
        board::ABORTED => " (aborted the communicator)",
        _ if gone => " (its process is gone)",
        _ => "",
    };
    format!("rank {rank}{how}")
}
