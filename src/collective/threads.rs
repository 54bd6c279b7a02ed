//! A world inside one process, a thread a rank: for tests, and for a debugger that wants to see every rank.
//!
//! Ranks post copies of their tensors on one board and each computes its result from all of them, left to right from
//! rank 0. What would hang under MPI is an error here: ranks that disagree about an operation, and a rank that is gone.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor, no_grad};

use super::call::Call;
use super::{Collective, ReduceOp, Work};
use crate::error::Result;

/// One rank of a world of threads; move it to its thread. Dropping it tells the others that the rank is gone.
pub struct Threads {
    rank: usize,
    world_size: usize,
    board: Arc<Board>,
    /// Number of the next operation: operations are matched in program order.
    next: Cell<u64>,
}

struct Board {
    state: Mutex<State>,
    bell: Condvar,
}

struct State {
    rounds: BTreeMap<u64, Round>,
    /// Whether each rank still holds its handle.
    present: Vec<bool>,
}

/// One operation: what each rank has posted for it.
struct Round {
    posts: Vec<Option<Post>>,
    taken: usize,
}

struct Post {
    /// Operation, kind, shape and op in words: must be equal on all ranks, and says what was not.
    signature: String,
    tensor: Tensor,
}

fn call(operation: &'static str) -> Call {
    Call { backend: "threads", operation }
}

impl Threads {
    /// The handles of a world of `world_size` ranks, in rank order.
    pub fn world(world_size: usize) -> Vec<Threads> {
        let state = State { rounds: BTreeMap::new(), present: vec![true; world_size] };
        let board = Arc::new(Board { state: Mutex::new(state), bell: Condvar::new() });
        (0..world_size).map(|rank| Threads { rank, world_size, board: board.clone(), next: Cell::new(0) }).collect()
    }

    /// Posts `tensor`; once all ranks have posted, `finish` gets their tensors in rank order.
    fn post(&self, call: Call, details: String, tensor: &Tensor, finish: impl FnOnce(Vec<Tensor>) + 'static) -> Work {
        let number = self.next.replace(self.next.get() + 1);
        let signature = format!("{} {details}", call.operation);
        // A copy, because the caller's tensor receives the result while slower ranks still read this one.
        let post = Post { signature, tensor: no_grad(|| tensor.copy()) };
        let mut state = self.board.lock();
        let round = state.rounds.entry(number).or_insert_with(|| Round::of(self.world_size));
        round.posts[self.rank] = Some(post);
        drop(state);
        self.board.bell.notify_all();
        let board = self.board.clone();
        Work::new(move || {
            let all = board.take(number, call)?;
            no_grad(|| finish(all));
            Ok(())
        })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.board.lock().present[self.rank] = false;
        self.board.bell.notify_all();
    }
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, so a poisoned state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every rank has posted operation `number`, or until it is sure that one never will.
    fn take(&self, number: u64, call: Call) -> Result<Vec<Tensor>> {
        let mut state = self.lock();
        loop {
            let State { rounds, present } = &mut *state;
            let round = rounds.get_mut(&number).expect("a round stays until every rank has taken it");
            if let Some(what) = round.mismatch() {
                return Err(call.error(what));
            }
            if let Some(all) = round.all() {
                round.taken += 1;
                if round.taken == round.posts.len() {
                    rounds.remove(&number);
                }
                return Ok(all);
            }
            if let Some(gone) = round.posts.iter().zip(present).position(|(post, present)| post.is_none() && !*present) {
                return Err(call.error(format!("rank {gone} is gone, operation {number} of this world waits for it")));
            }
            state = self.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Round {
    fn of(world_size: usize) -> Self {
        Round { posts: (0..world_size).map(|_| None).collect(), taken: 0 }
    }

    fn all(&self) -> Option<Vec<Tensor>> {
        self.posts.iter().map(|post| Some(post.as_ref()?.tensor.shallow_clone())).collect()
    }

    fn mismatch(&self) -> Option<String> {
        let mut posted = self.posts.iter().enumerate().filter_map(|(rank, post)| Some((rank, &post.as_ref()?.signature)));
        let (first, expected) = posted.next()?;
        let (other, found) = posted.find(|(_, signature)| *signature != expected)?;
        Some(format!("ranks disagree: rank {first} called {expected}, rank {other} called {found}"))
    }
}

/// Kind and shape, as a signature names them.
fn form(tensor: &Tensor) -> String {
    format!("{:?} {:?}", tensor.kind(), tensor.size())
}

/// The ranks' tensors as one, left to right from rank 0 on every rank.
fn reduce(all: &[Tensor], op: ReduceOp) -> Tensor {
    let join = |left: Tensor, right: &Tensor| match op {
        ReduceOp::Sum | ReduceOp::Mean => left + right,
        ReduceOp::Min => left.minimum(right),
        ReduceOp::Max => left.maximum(right),
    };
    let joined = all[1..].iter().fold(all[0].shallow_clone(), join);
    if op == ReduceOp::Mean { joined / all.len() as f64 } else { joined }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, mut buffer: Tensor, op: ReduceOp) -> Result<Work> {
        let call = call("all_reduce");
        call.check_reduction(&buffer, op)?;
        let input = buffer.shallow_clone();
        Ok(self.post(call, format!("{op:?} of {}", form(&input)), &input, move |all| buffer.copy_(&reduce(&all, op))))
    }

    fn reduce_scatter(&self, full: Tensor, mut owned: Tensor, op: ReduceOp) -> Result<Work> {
        let call = call("reduce_scatter");
        call.check_reduction(&full, op)?;
        call.check_slices(&owned, &full, self.world_size)?;
        let (start, length) = ((self.rank * owned.numel()) as i64, owned.numel() as i64);
        let mine = move |tensor: &Tensor| tensor.flatten(0, -1).narrow(0, start, length);
        Ok(self.post(call, format!("{op:?} of {}", form(&full)), &full, move |all| {
            let slices: Vec<Tensor> = all.iter().map(mine).collect();
            owned.copy_(&reduce(&slices, op).view_as(&owned));
        }))
    }

    fn all_gather(&self, owned: Tensor, mut full: Tensor) -> Result<Work> {
        let call = call("all_gather");
        call.check_slices(&owned, &full, self.world_size)?;
        Ok(self.post(call, format!("of {}", form(&owned)), &owned, move |all| {
            let joined: Vec<Tensor> = all.iter().map(|tensor| tensor.flatten(0, -1)).collect();
            full.copy_(&Tensor::cat(&joined, 0).view_as(&full));
        }))
    }

    fn broadcast(&self, mut buffer: Tensor, root: usize) -> Result<Work> {
        let call = call("broadcast");
        call.check_buffer(&buffer)?;
        call.check_root(root, self.world_size)?;
        let input = buffer.shallow_clone();
        Ok(self.post(call, format!("from rank {root} of {}", form(&input)), &input, move |all| buffer.copy_(&all[root])))
    }

    fn barrier(&self) -> Result<()> {
        let nothing = Tensor::empty([0], (Kind::Float, Device::Cpu));
        self.post(call("barrier"), String::new(), &nothing, |_| ()).wait()
    }
}
