//! Reads batches ahead on threads, so that a step does not wait for the disk.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::Batch;
use super::dataset::Dataset;
use super::moments::Moments;
use super::order::Order;
use super::share::Share;
use crate::error::{Error, Result};
use crate::fault;
use crate::libtorch;
use crate::phase::Phase;
use crate::pulse;

/// Yields one rank's micro-batches in the order of training; dropping it ends its threads.
#[derive(Debug)]
pub struct Loader {
    /// Threads in the order of their next batches; empty after an error.
    readers: VecDeque<Reader>,
    path: PathBuf,
    /// Number of the first step's batches whose latents are not yet measured.
    unmeasured: usize,
    /// Moments of the first step's latents.
    first_latents: Moments,
}

/// A thread that reads one batch ahead.
#[derive(Debug)]
struct Reader {
    /// Dropped before the thread is joined: without a receiver the thread ends.
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts to read at `first_step`, `prefetch` batches ahead of the one in use, each on a
    /// thread.
    ///
    /// # Errors
    /// [`Error::Environment`] if no thread can be started.
    pub fn start(
        dataset: Arc<Dataset>,
        order: Order,
        share: Share,
        first_step: u64,
        prefetch: usize,
    ) -> Result<Self> {
        let path = dataset.path().to_path_buf();
        // Shared by the threads, since it caches an epoch's order.
        let order = Mutex::new(order);
        let read = move |number: u64| {
            let micro_batches = share.micro_batches as u64;
            let (step, micro) =
                (first_step + number / micro_batches, (number % micro_batches) as usize);
            // Steps count from 1, blocks of the order from 0.
            fault::strike_at(Phase::Read, step + 1);
            let ids = order.lock().unwrap_or_else(PoisonError::into_inner).block(
                step,
                share.block(micro),
                share.micro_batch_size,
            );
            dataset.batch(&ids)
        };
        Ok(Loader { unmeasured: share.micro_batches, ..Loader::over(read, path, prefetch)? })
    }

    /// Loads the batches that `read` returns for the numbers from 0.
    fn over(
        read: impl Fn(u64) -> Result<Batch> + Send + Sync + 'static,
        path: PathBuf,
        prefetch: usize,
    ) -> Result<Self> {
        let read = Arc::new(read);
        let start = |first: usize| {
            Reader::start(Arc::clone(&read), (first as u64..).step_by(prefetch), path.clone())
        };
        let readers = (0..prefetch).map(start).collect::<Result<_>>()?;
        Ok(Loader { readers, path, unmeasured: 0, first_latents: Moments::default() })
    }

    /// Returns the next micro-batch; waits for it if it has not been read yet.
    ///
    /// # Errors
    /// The reader's error, once; afterwards an error saying that reading has ended.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let ended = || Error::data(&self.path, "reading ahead has ended after an error");
        let batch = self.readers.front().and_then(Reader::receive).ok_or_else(ended)?;
        match &batch {
            Ok(batch) => {
                self.readers.rotate_left(1);
                self.measure(batch);
            }
            Err(_) => self.readers.clear(),
        }
        batch
    }

    fn measure(&mut self, batch: &Batch) {
        if let (Some(left), Some(latents)) = (self.unmeasured.checked_sub(1), batch.latents()) {
            self.unmeasured = left;
            self.first_latents = self.first_latents.merge(Moments::from_tensor(latents));
        }
    }

    /// Returns the moments of this rank's latents of the first loaded step, over the batches
    /// returned so far.
    pub fn first_latents(&self) -> Moments {
        self.first_latents
    }
}

impl Reader {
    fn start<R>(
        read: Arc<R>,
        numbers: impl Iterator<Item = u64> + Send + 'static,
        path: PathBuf,
    ) -> Result<Self>
    where
        R: Fn(u64) -> Result<Batch> + Send + Sync + 'static,
    {
        // The thread holds one finished batch until it is received, and starts no other meanwhile.
        let (sender, receiver) = sync_channel(0);
        let run = move || {
            pulse::work_beside(Phase::Read);
            // A panic becomes an error, which the consumer receives in place of the missing batch.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| {
                send_all(numbers.map(|number| libtorch::guarded(|| read(number))), &sender)
            })) {
                let _ = sender.send(Err(Error::data(
                    path,
                    format!("reading ahead panicked: {}", panic_text(panic.as_ref())),
                )));
            }
        };
        let thread = Builder::new()
            .name("data".into())
            .spawn(run)
            .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        Ok(Reader { batches: Some(receiver), thread: Some(thread) })
    }

    /// `None` once its thread has ended.
    fn receive(&self) -> Option<Result<Batch>> {
        self.batches.as_ref()?.recv().ok()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // Its panics are caught; a read in progress is awaited.
            let _ = thread.join();
        }
    }
}

/// Sends until an error has been sent or the receiver is gone.
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
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no reason given".into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::Tensor;

    use super::*;
    use crate::data::DataType;
    use crate::data::made_up::{images, written};

    fn numbered(id: u64) -> Result<Batch> {
        Ok(Batch {
            tensors: BTreeMap::new(),
            data_type: DataType::Image,
            sample_ids: vec![id],
            bad_samples: 0,
        })
    }

    fn over(read: impl Fn(u64) -> Result<Batch> + Send + Sync + 'static) -> Loader {
        Loader::over(read, "a dataset".into(), 2).expect("threads")
    }

    #[test]
    fn batches_come_in_the_order_of_training_from_any_step_on() {
        let folder =
            written(&[("a.safetensors", "2x2", vec![("image_latents", images(0, 40, 2))])], None);
        let dataset = Arc::new(Dataset::open(folder.path()).expect("a sound dataset"));
        let order = Order::new(dataset.groups(), 12, 1).expect("a large enough group");
        let share = Share {
            rank: 1,
            world_size: 2,
            micro_batches: 2,
            micro_batch_size: 3,
            neighbours: false,
        };
        let mut loader =
            Loader::start(Arc::clone(&dataset), order.clone(), share, 2, 1).expect("a thread");
        let mut first_step = Vec::new();
        for (step, micro) in [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)] {
            let batch = loader.next_batch().expect("sound samples");
            assert_eq!(
                batch.sample_ids,
                order.block(step, 2 * micro + 1, 3),
                "step {step}, micro-batch {micro}"
            );
            let expected = dataset.batch(&batch.sample_ids).expect("sound samples");
            assert!(batch.tensors["image_latents"].equal(&expected.tensors["image_latents"]));
            first_step.extend((step == 2).then(|| batch.tensors["image_latents"].shallow_clone()));
        }
        let deviation = Tensor::cat(&first_step, 0).std(false).double_value(&[]);
        let measured = loader.first_latents().standard_deviation().expect("many numbers");
        assert!(
            (measured - deviation).abs() < 1e-5,
            "{measured} and {deviation}: the latents of the first step alone"
        );
    }

    #[test]
    fn an_error_arrives_behind_the_batches_before_it_and_ends_the_reading() {
        let mut loader = over(|id| {
            if id == 3 { Err(Error::data("b.safetensors", "bad sample")) } else { numbered(id) }
        });
        let good: Vec<u64> =
            (0..3).map(|_| loader.next_batch().expect("a batch").sample_ids[0]).collect();
        assert_eq!(good, [0, 1, 2]);
        assert_eq!(
            loader.next_batch().expect_err("the error").to_string(),
            "b.safetensors: bad sample"
        );
        assert_eq!(
            loader.next_batch().expect_err("the end").to_string(),
            "a dataset: reading ahead has ended after an error"
        );
    }

    #[test]
    fn a_panic_while_reading_reaches_the_consumer_as_an_error() {
        let mut loader =
            over(|id| if id == 1 { panic!("sample {id} broke the reader") } else { numbered(id) });
        loader.next_batch().expect("the batch before");
        let error = loader.next_batch().expect_err("the panic").to_string();
        assert_eq!(error, "a dataset: reading ahead panicked: sample 1 broke the reader");
    }

    #[test]
    fn dropping_the_loader_ends_its_threads_though_the_data_never_end() {
        let alive = Arc::new(());
        let held = Arc::clone(&alive);
        let mut loader = over(move |id| {
            let _ = &held;
            numbered(id)
        });
        loader.next_batch().expect("a batch");
        drop(loader);
        assert_eq!(Arc::strong_count(&alive), 1, "the threads have given back what they held");
    }

    #[test]
    fn no_more_is_read_ahead_than_was_asked_for() {
        let asked = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&asked);
        let mut loader = over(move |id: u64| {
            // Before batch `id` is made, all but one of those before it must have been received.
            assert!(seen.load(Ordering::SeqCst) + 1 >= id as usize, "batch {id} is made too early");
            numbered(id)
        });
        for _ in 0..1000 {
            asked.fetch_add(1, Ordering::SeqCst);
            loader.next_batch().expect("never made too early");
        }
    }
}
