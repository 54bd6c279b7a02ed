//! Batches read ahead on one thread, so that a step does not wait for the disk.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::Batch;
use super::dataset::Dataset;
use super::order::Order;
use crate::error::{Error, Result};

/// One rank's part of every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub rank: usize,
    pub world_size: usize,
    /// Micro-batches of one rank in one step.
    pub micro_batches: usize,
    /// Samples in a micro-batch.
    pub micro_batch_size: usize,
}

/// Yields one rank's micro-batches in the order of training; dropping it ends its thread.
#[derive(Debug)]
pub struct Loader {
    /// Taken before the thread is joined: the thread ends when nobody can receive.
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl Loader {
    /// Starts to read from `first_step` on, at most `prefetch` batches ahead of the one in use (and one more in hand).
    ///
    /// # Errors
    /// [`Error::Environment`] if no thread can be started.
    pub fn start(dataset: Arc<Dataset>, order: Order, share: Share, first_step: u64, prefetch: usize) -> Result<Self> {
        let path = dataset.path().to_path_buf();
        let places = (first_step..).flat_map(move |step| (0..share.micro_batches).map(move |micro| (step, micro)));
        let batches = places.map(move |(step, micro)| {
            let ids = order.micro_batch(step, micro, share.rank, share.world_size, share.micro_batch_size);
            dataset.batch(&ids)
        });
        Loader::over(batches, path, prefetch)
    }

    fn over(batches: impl Iterator<Item = Result<Batch>> + Send + 'static, path: PathBuf, prefetch: usize) -> Result<Self> {
        let (sender, receiver) = sync_channel(prefetch);
        let failed = path.clone();
        let read = move || {
            // A panic travels as an error: the consumer hears of it at the batch that is missing.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| send_all(batches, &sender))) {
                let _ = sender.send(Err(Error::data(failed, format!("reading ahead panicked: {}", panic_text(panic.as_ref())))));
            }
        };
        let thread = Builder::new().name("data".into()).spawn(read).map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        Ok(Loader { batches: Some(receiver), thread: Some(thread), path })
    }

    /// The next micro-batch; waits for it if it has not been read yet.
    ///
    /// # Errors
    /// What the reading met, once; afterwards that it has ended.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let received = self.batches.as_ref().map(Receiver::recv);
        match received {
            Some(Ok(batch)) => batch,
            _ => Err(Error::data(&self.path, "reading ahead has ended after an error")),
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // Its panics have been caught; a read under way is waited for.
            let _ = thread.join();
        }
    }
}

/// Sends until an error has been sent or nobody listens.
fn send_all(batches: impl Iterator<Item = Result<Batch>>, sender: &SyncSender<Result<Batch>>) {
    for batch in batches {
        let last = batch.is_err();
        if sender.send(batch).is_err() || last {
            return;
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no reason given".into())
}
