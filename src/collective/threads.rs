//! A world inside one process with one thread per rank: for tests, and for debugging all ranks in
//! one debugger.
//!
//! Ranks post copies of their tensors at a shared rendezvous, and each rank computes its result
//! from all of them in the order of the pairwise tree. Mistakes that would hang under MPI are
//! errors here: ranks that issue different operations, and a rank that has exited.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tch::{Device, Kind, Tensor, no_grad};

use super::call::Call;
use super::exchange::disagreement;
use super::ledger::{Ledger, Signature};
use super::{Collective, Issued, Meter, ReduceOp, Sliced, Spent, Work};
use crate::error::{Error, Result};

/// The handle of one rank; move it to the rank's thread. Dropping it makes operations that wait for
/// this rank fail on the others.
pub struct Threads {
    rank: usize,
    world_size: usize,
    rendezvous: Arc<Rendezvous>,
    /// Its count matches this rank's operations with those of the others.
    ledger: Ledger,
    meter: Meter,
}

struct Rendezvous {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    operations: BTreeMap<u64, PostedOperation>,
    /// True for each rank that still holds its handle.
    present: Vec<bool>,
    /// Communicators being split off, by operation number and color: the handles that no rank has
    /// taken yet.
    worlds: BTreeMap<(u64, usize), Vec<Threads>>,
}

/// One operation: the posts of the ranks, and how many ranks have taken the result.
struct PostedOperation {
    posts: Vec<Option<Post>>,
    taken: usize,
}

struct Post {
    /// Must be equal on all ranks; names the operation if it is not.
    issued: Issued,
    /// Flattened, because shapes may differ between ranks.
    tensors: Vec<Tensor>,
}

/// No code panics while it holds one of the locks of this file, so a poisoned state is consistent.
fn lock<S>(state: &Mutex<S>) -> MutexGuard<'_, S> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The text of a panic.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_string()
}

fn call(operation: &'static str) -> Call {
    Call { backend: "threads", operation }
}

impl Threads {
    /// Returns the handles of a world of `world_size` ranks, in rank order.
    pub fn world(world_size: usize) -> Vec<Threads> {
        let state = State {
            operations: BTreeMap::new(),
            present: vec![true; world_size],
            worlds: BTreeMap::new(),
        };
        let rendezvous = Arc::new(Rendezvous { state: Mutex::new(state), changed: Condvar::new() });
        let handle = |rank| Threads {
            rank,
            world_size,
            rendezvous: rendezvous.clone(),
            ledger: Ledger::default(),
            meter: Meter::default(),
        };
        (0..world_size).map(handle).collect()
    }

    /// Calls `body` once per rank of a new world, each on a thread of its own, and returns the
    /// results in rank order.
    ///
    /// A rank whose body returns or panics leaves the world, so that collectives of the others fail
    /// instead of waiting for it.
    ///
    /// # Panics
    /// If a rank panics, after all ranks have ended: with rank and message of every panic, in the
    /// order in which they happened.
    pub fn run<T: Send>(world_size: usize, body: impl Fn(&Threads) -> T + Sync) -> Vec<T> {
        let panics = Mutex::new(Vec::new());
        let on_rank = |world: Threads| {
            let result = catch_unwind(AssertUnwindSafe(|| body(&world)));
            // Recorded before the rank leaves the world, which makes others fail in turn.
            result.map_err(|panic| lock(&panics).push((world.rank, message(&*panic)))).ok()
        };
        let results: Vec<Option<T>> = thread::scope(|scope| {
            let spawn = |world: Threads| {
                let thread = thread::Builder::new().name(format!("rank {}", world.rank));
                thread.spawn_scoped(scope, || on_rank(world)).expect("a thread for each rank")
            };
            let ranks: Vec<_> = Threads::world(world_size).into_iter().map(spawn).collect();
            ranks.into_iter().map(|rank| rank.join().expect("panics are caught")).collect()
        });
        let causes: Vec<String> = lock(&panics)
            .iter()
            .map(|(rank, what)| format!("rank {rank} panicked: {what}"))
            .collect();
        assert!(causes.is_empty(), "{}", causes.join("\n"));
        results.into_iter().flatten().collect()
    }

    /// Posts this rank's tensors. When the work is waited for and all ranks have posted, `finish`
    /// receives everyone's tensors in rank order.
    fn post(
        &self,
        call: Call,
        signature: impl FnOnce(Signature) -> Signature,
        tensors: &[&Tensor],
        finish: impl FnOnce(Vec<Vec<Tensor>>) + 'static,
    ) -> Work {
        let issued =
            self.ledger.enter(signature(Signature::new(call.operation, tensors.iter().copied())));
        let number = issued.count;
        // Copies, because the caller's tensors receive the result while slower ranks still read
        // these.
        let post = Post {
            issued,
            tensors: no_grad(|| {
                tensors.iter().map(|tensor| tensor.copy().flatten(0, -1)).collect()
            }),
        };
        let mut state = self.rendezvous.lock();
        let operation =
            state.operations.entry(number).or_insert_with(|| PostedOperation::new(self.world_size));
        operation.posts[self.rank] = Some(post);
        drop(state);
        self.rendezvous.changed.notify_all();
        let (rendezvous, meter) = (self.rendezvous.clone(), self.meter.clone());
        Work::new(move || {
            let all = meter.exposed(|| rendezvous.take(number, call))?;
            no_grad(|| finish(all));
            Ok(())
        })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.rendezvous.lock().present[self.rank] = false;
        self.rendezvous.changed.notify_all();
    }
}

impl Rendezvous {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Blocks until every rank has posted operation `number`, or until a rank that has not posted
    /// is gone.
    fn take(&self, number: u64, call: Call) -> Result<Vec<Vec<Tensor>>> {
        let mut state = self.lock();
        loop {
            let State { operations, present, .. } = &mut *state;
            let operation = operations
                .get_mut(&number)
                .expect("an operation stays until every rank has taken it");
            if let Some(mismatch) = operation.mismatch() {
                return Err(mismatch);
            }
            if let Some(all) = operation.all() {
                operation.taken += 1;
                if operation.taken == operation.posts.len() {
                    operations.remove(&number);
                }
                return Ok(all);
            }
            if let Some(gone) = operation
                .posts
                .iter()
                .zip(present)
                .position(|(post, present)| post.is_none() && !*present)
            {
                return Err(call.error(format!(
                    "rank {gone} is gone, operation {number} of this world waits for it"
                )));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl PostedOperation {
    fn new(world_size: usize) -> Self {
        PostedOperation { posts: (0..world_size).map(|_| None).collect(), taken: 0 }
    }

    fn all(&self) -> Option<Vec<Vec<Tensor>>> {
        self.posts
            .iter()
            .map(|post| Some(post.as_ref()?.tensors.iter().map(Tensor::shallow_clone).collect()))
            .collect()
    }

    fn mismatch(&self) -> Option<Error> {
        let mut posted = self
            .posts
            .iter()
            .enumerate()
            .filter_map(|(rank, post)| Some((rank, post.as_ref()?.issued)));
        let (first, expected) = posted.next()?;
        let (other, found) = posted.find(|(_, issued)| *issued != expected)?;
        Some(disagreement(other, &found.to_string(), first, &expected.to_string()))
    }
}

/// Reduces the ranks' tensors to one in the order of the pairwise tree.
fn reduce(mut all: Vec<Tensor>, op: ReduceOp) -> Tensor {
    let join = |left: &Tensor, right: &Tensor| match op {
        ReduceOp::Sum => left + right,
        ReduceOp::Min => left.minimum(right),
        ReduceOp::Max => left.maximum(right),
    };
    while all.len() > 1 {
        all = all
            .chunks(2)
            .map(|pair| {
                pair[1..].iter().fold(pair[0].shallow_clone(), |left, right| join(&left, right))
            })
            .collect();
    }
    all.swap_remove(0)
}

/// Returns tensor `index` of each rank.
fn nth(all: &[Vec<Tensor>], index: usize) -> impl Iterator<Item = &Tensor> {
    all.iter().map(move |tensors| &tensors[index])
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, mut buffers: Vec<Tensor>, op: ReduceOp) -> Result<Work> {
        let call = call("all_reduce");
        buffers.iter().try_for_each(|buffer| call.check_buffer(buffer))?;
        let inputs: Vec<Tensor> = buffers.iter().map(Tensor::shallow_clone).collect();
        Ok(self.post(
            call,
            |signature| signature.reduced_by(op),
            &inputs.iter().collect::<Vec<_>>(),
            move |all| {
                for (index, buffer) in buffers.iter_mut().enumerate() {
                    buffer.copy_(
                        &reduce(nth(&all, index).map(Tensor::shallow_clone).collect(), op)
                            .view_as(&*buffer),
                    );
                }
            },
        ))
    }

    fn reduce_scatter(&self, tensors: Vec<Sliced>, op: ReduceOp) -> Result<Work> {
        let call = call("reduce_scatter");
        tensors.iter().try_for_each(|sliced| call.check_slices(sliced, self.world_size))?;
        let (fulls, mut owned): (Vec<Tensor>, Vec<Tensor>) =
            tensors.into_iter().map(|sliced| (sliced.full, sliced.owned)).unzip();
        let rank = self.rank;
        Ok(self.post(
            call,
            |signature| signature.reduced_by(op),
            &fulls.iter().collect::<Vec<_>>(),
            move |all| {
                for (index, owned) in owned.iter_mut().enumerate() {
                    let length = owned.numel() as i64;
                    let mine = |tensor: &Tensor| tensor.narrow(0, rank as i64 * length, length);
                    owned.copy_(&reduce(nth(&all, index).map(mine).collect(), op).view_as(&*owned));
                }
            },
        ))
    }

    fn all_gather(&self, tensors: Vec<Sliced>) -> Result<Work> {
        let call = call("all_gather");
        tensors.iter().try_for_each(|sliced| call.check_slices(sliced, self.world_size))?;
        let (owned, mut fulls): (Vec<Tensor>, Vec<Tensor>) =
            tensors.into_iter().map(|sliced| (sliced.owned, sliced.full)).unzip();
        Ok(self.post(
            call,
            |signature| signature,
            &owned.iter().collect::<Vec<_>>(),
            move |all| {
                for (index, full) in fulls.iter_mut().enumerate() {
                    let joined: Vec<&Tensor> = nth(&all, index).collect();
                    full.copy_(&Tensor::cat(&joined, 0).view_as(&*full));
                }
            },
        ))
    }

    fn broadcast(&self, mut buffer: Tensor, root: usize) -> Result<Work> {
        let call = call("broadcast");
        call.check_buffer(&buffer)?;
        call.check_root(root, self.world_size)?;
        let input = buffer.shallow_clone();
        Ok(self.post(
            call,
            move |signature| signature.rooted_at(root),
            &[&input],
            move |all| buffer.copy_(&all[root][0].view_as(&buffer)),
        ))
    }

    fn barrier(&self) -> Result<()> {
        self.post(call("barrier"), |signature| signature, &[], |_| ()).wait()
    }

    fn split(&self, color: usize) -> Result<Box<dyn Collective>> {
        let number = self.ledger.enter(Signature::new("split", [])).count;
        let colors = Tensor::zeros([self.world_size as i64], (Kind::Int64, Device::Cpu));
        let own = Tensor::from_slice(&[color as i64]);
        self.all_gather(vec![Sliced { owned: own, full: colors.shallow_clone() }])?.wait()?;
        let colors = Vec::<i64>::try_from(colors).expect("integers");
        let same = |colors: &[i64]| colors.iter().filter(|other| **other == color as i64).count();
        let (size, earlier) = (same(&colors), same(&colors[..self.rank]));
        let mut state = self.rendezvous.lock();
        let world = state.worlds.entry((number, color)).or_insert_with(|| Threads::world(size));
        let index = world
            .iter()
            .position(|handle| handle.rank == earlier)
            .expect("each rank takes its handle once");
        let handle = world.swap_remove(index);
        if world.is_empty() {
            state.worlds.remove(&(number, color));
        }
        Ok(Box::new(handle))
    }

    fn carries(&self, device: Device) -> bool {
        device == Device::Cpu
    }

    fn spent(&self) -> Spent {
        self.meter.take()
    }

    fn issued(&self) -> Issued {
        self.ledger.issued()
    }
}
