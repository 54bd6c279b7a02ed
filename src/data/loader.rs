//! Batches read ahead on one thread, so that a step does not wait for the disk.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::Batch;
use super::dataset::Dataset;
use super::order::Order;
use super::share::Share;
use crate::error::{Error, Result};
use crate::fault;
use crate::pulse::Phase;

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
            fault::strike(Phase::Read);
            dataset.batch(&order.block(step, share.block(micro), share.micro_batch_size))
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
        let thread =
            Builder::new().name("data".into()).spawn(read).map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::data::DataType;
    use crate::data::dataset::tests::{images, written};

    fn numbered(id: u64) -> Result<Batch> {
        Ok(Batch { tensors: BTreeMap::new(), data_type: DataType::Image, sample_ids: vec![id], bad_samples: 0 })
    }

    fn over(batches: impl Iterator<Item = Result<Batch>> + Send + 'static) -> Loader {
        Loader::over(batches, "a dataset".into(), 2).expect("a thread")
    }

    #[test]
    fn batches_come_in_the_order_of_training_from_any_step_on() {
        let folder = written(&[("a.safetensors", "2x2", vec![("image_latents", images(0, 40, 2))])], None);
        let dataset = Arc::new(Dataset::open(folder.path()).expect("a sound dataset"));
        let order = Order::new(dataset.groups(), 12, 1).expect("a large enough group");
        let share = Share { rank: 1, world_size: 2, micro_batches: 2, micro_batch_size: 3, neighbours: false };
        let mut loader = Loader::start(Arc::clone(&dataset), order.clone(), share, 2, 1).expect("a thread");
        for (step, micro) in [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)] {
            let batch = loader.next_batch().expect("sound samples");
            assert_eq!(batch.sample_ids, order.block(step, 2 * micro + 1, 3), "step {step}, micro-batch {micro}");
            let expected = dataset.batch(&batch.sample_ids).expect("sound samples");
            assert!(batch.tensors["image_latents"].equal(&expected.tensors["image_latents"]));
        }
    }

    #[test]
    fn an_error_arrives_behind_the_batches_before_it_and_ends_the_reading() {
        let mut loader = over((0..).map(|id| if id == 3 { Err(Error::data("b.safetensors", "bad sample")) } else { numbered(id) }));
        let good: Vec<u64> = (0..3).map(|_| loader.next_batch().expect("a batch").sample_ids[0]).collect();
        assert_eq!(good, [0, 1, 2]);
        assert_eq!(loader.next_batch().expect_err("the error").to_string(), "b.safetensors: bad sample");
        assert_eq!(loader.next_batch().expect_err("the end").to_string(), "a dataset: reading ahead has ended after an error");
    }

    #[test]
    fn a_panic_while_reading_reaches_the_consumer_as_an_error() {
        let mut loader = over((0..).map(|id| if id == 1 { panic!("sample {id} broke the reader") } else { numbered(id) }));
        loader.next_batch().expect("the batch before");
        let error = loader.next_batch().expect_err("the panic").to_string();
        assert_eq!(error, "a dataset: reading ahead panicked: sample 1 broke the reader");
    }

    #[test]
    fn dropping_the_loader_ends_its_thread_though_the_data_never_end() {
        let alive = Arc::new(());
        let held = Arc::clone(&alive);
        let mut loader = over((0..).map(move |id| {
            let _ = &held;
            numbered(id)
        }));
        loader.next_batch().expect("a batch");
        drop(loader);
        assert_eq!(Arc::strong_count(&alive), 1, "the thread has given back what it held");
    }

    #[test]
    fn no_more_is_read_ahead_than_was_asked_for() {
        let asked = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&asked);
        let mut loader = over((0..).map(move |id: u64| {
            // Before batch `id` is made, all but two of those before it must have been asked for.
            assert!(seen.load(Ordering::SeqCst) + 2 >= id as usize, "batch {id} is made too early");
            numbered(id)
        }));
        for _ in 0..1000 {
            asked.fetch_add(1, Ordering::SeqCst);
            loader.next_batch().expect("never made too early");
        }
    }
}
