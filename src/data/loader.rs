//! Reads batches ahead on threads, so that a step does not wait for the disk.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::Batch;
use super::dataset::Dataset;
use super::moments::Moments;
use super::steps::{Place, Steps};
use crate::error::{Error, Result};
use crate::fault;
use crate::libtorch;
use crate::phase::Phase;
use crate::pulse;

/// Yields one rank's micro-batches in the order of training, each with a value `T` that its thread
/// makes of it; dropping the loader ends its threads.
#[derive(Debug)]
pub struct Loader<T> {
    /// Threads in the order of their next batches; empty after an error.
    readers: VecDeque<Reader<T>>,
    path: PathBuf,
    /// Number of the first step's batches whose latents are not yet measured.
    unmeasured: usize,
    /// Moments of the first step's latents.
    first_latents: Moments,
}

/// A micro-batch, and the value that its thread is making of it.
#[derive(Debug)]
pub struct Loaded<T> {
    pub batch: Batch,
    pub ahead: Ahead<T>,
}

/// A value that a thread is making ahead. Dropping it before it is received ends the thread.
#[derive(Debug)]
pub struct Ahead<T> {
    value: Receiver<Result<T>>,
}

/// A thread that reads one batch ahead.
#[derive(Debug)]
struct Reader<T> {
    /// Dropped before the thread is joined: without a receiver the thread ends.
    batches: Option<Receiver<Result<Loaded<T>>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Loader<T> {
    /// Starts to read after `steps_done`, `prefetch` batches ahead of the one in use, each on a
    /// thread. `make` computes a value of each batch that was read, on the same thread.
    ///
    /// # Errors
    /// [`Error::Environment`] if no thread can be started.
    pub fn start(
        dataset: Arc<Dataset>,
        steps: Steps,
        steps_done: u64,
        prefetch: usize,
        make: impl Fn(Place, &Batch) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let path = dataset.path().to_path_buf();
        let (unmeasured, places) =
            (steps.share(steps_done + 1).micro_batches, steps.places_after(steps_done));
        let read = move |place: Place| {
            fault::strike_at(Phase::Read, place.step);
            dataset.batch(&steps.sample_ids(place))
        };
        Ok(Loader { unmeasured, ..Loader::over(places, read, make, path, prefetch)? })
    }

    /// Starts to read batches of these samples in their order, `prefetch` ahead of the one in use.
    /// `make` computes a value of each batch that was read, on the same thread.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn of_samples(
        dataset: Arc<Dataset>,
        batches: Vec<Vec<u64>>,
        prefetch: usize,
        make: impl Fn(usize, &Batch) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let (path, places) = (dataset.path().to_path_buf(), 0..batches.len());
        let read = move |place: usize| dataset.batch(&batches[place]);
        Loader::over(places, read, make, path, prefetch)
    }

    /// Loads the batches that `read` returns for the places, and what `make` makes of them.
    fn over<P: Copy + 'static>(
        places: impl Iterator<Item = P> + Clone + Send + 'static,
        read: impl Fn(P) -> Result<Batch> + Send + Sync + 'static,
        make: impl Fn(P, &Batch) -> Result<T> + Send + Sync + 'static,
        path: PathBuf,
        prefetch: usize,
    ) -> Result<Self> {
        let work = Arc::new(Work { read, make, path: path.clone() });
        let start = |first: usize| {
            Reader::start(Arc::clone(&work), places.clone().skip(first).step_by(prefetch))
        };
        let readers = (0..prefetch).map(start).collect::<Result<_>>()?;
        Ok(Loader { readers, path, unmeasured: 0, first_latents: Moments::default() })
    }

    /// Returns the next micro-batch; waits for it if it has not been read yet, but not for the
    /// value that is made of it.
    ///
    /// # Errors
    /// The reader's error, once; afterwards an error saying that reading has ended.
    pub fn next_batch(&mut self) -> Result<Loaded<T>> {
        let ended = || Error::data(&self.path, "reading ahead has ended after an error");
        let loaded = self.readers.front().and_then(Reader::receive).ok_or_else(ended)?;
        match &loaded {
            Ok(loaded) => {
                self.readers.rotate_left(1);
                self.measure(&loaded.batch);
            }
            Err(_) => self.readers.clear(),
        }
        loaded
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

impl<T> Ahead<T> {
    /// Waits for the value.
    ///
    /// # Errors
    /// The error of the function that makes it.
    pub fn wait(self) -> Result<T> {
        self.value.recv().expect("a thread sends the value or an error")
    }
}

/// The functions of a loader's threads.
struct Work<R, M> {
    read: R,
    make: M,
    path: PathBuf,
}

impl<R, M> Work<R, M> {
    /// Reads and sends batches, and the value made of each, until an error has been sent or a
    /// receiver is gone. A batch and its value are held until both are received, and no other is
    /// read meanwhile.
    fn send_all<P: Copy, T>(
        &self,
        places: impl Iterator<Item = P>,
        batches: &SyncSender<Result<Loaded<T>>>,
    ) where
        R: Fn(P) -> Result<Batch>,
        M: Fn(P, &Batch) -> Result<T>,
    {
        for place in places {
            pulse::work_beside(Phase::Read);
            let batch = match self.caught("reading", || (self.read)(place)) {
                Ok(batch) => batch,
                Err(error) => return drop(batches.send(Err(error))),
            };
            let (sender, value) = sync_channel(0);
            let alias = batch.alias();
            if batches.send(Ok(Loaded { batch, ahead: Ahead { value } })).is_err() {
                return;
            }
            let value = self.caught("working", || (self.make)(place, &alias));
            drop(alias);
            let last = value.is_err();
            if sender.send(value).is_err() || last {
                return;
            }
        }
    }

    /// Turns a panic into an error, which the consumer receives in place of what is missing.
    fn caught<T>(&self, doing: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(|| libtorch::guarded(body))).unwrap_or_else(|panic| {
            let text = panic_text(panic.as_ref());
            Err(Error::data(&self.path, format!("{doing} ahead panicked: {text}")))
        })
    }
}

impl<T: Send + 'static> Reader<T> {
    fn start<P, R, M>(
        work: Arc<Work<R, M>>,
        places: impl Iterator<Item = P> + Send + 'static,
    ) -> Result<Self>
    where
        P: Copy + 'static,
        R: Fn(P) -> Result<Batch> + Send + Sync + 'static,
        M: Fn(P, &Batch) -> Result<T> + Send + Sync + 'static,
    {
        // One batch may lie in the channel while the value is made of it.
        let (sender, receiver) = sync_channel(1);
        let thread = Builder::new()
            .name("data".into())
            .spawn(move || work.send_all(places, &sender))
            .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        Ok(Reader { batches: Some(receiver), thread: Some(thread) })
    }
}

impl<T> Reader<T> {
    /// `None` once its thread has ended.
    fn receive(&self) -> Option<Result<Loaded<T>>> {
        self.batches.as_ref()?.recv().ok()
    }
}

impl<T> Drop for Reader<T> {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // Its panics are caught; work in progress is awaited.
            let _ = thread.join();
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
    use std::sync::mpsc::channel;

    use tch::Tensor;

    use super::*;
    use crate::data::made_up::{images, written};
    use crate::data::{DataType, Order, Share};

    fn numbered(id: u64) -> Result<Batch> {
        Ok(Batch {
            tensors: BTreeMap::new(),
            data_type: DataType::Image,
            sample_ids: vec![id],
            bad_samples: 0,
        })
    }

    fn over(read: impl Fn(u64) -> Result<Batch> + Send + Sync + 'static) -> Loader<u64> {
        making(read, |number, _| Ok(number))
    }

    fn making<T: Send + 'static>(
        read: impl Fn(u64) -> Result<Batch> + Send + Sync + 'static,
        make: impl Fn(u64, &Batch) -> Result<T> + Send + Sync + 'static,
    ) -> Loader<T> {
        Loader::over(0u64.., read, make, "a dataset".into(), 2).expect("threads")
    }

    /// The next batch, after the value that is made of it.
    fn next<T: Send + 'static>(loader: &mut Loader<T>) -> Result<Batch> {
        let Loaded { batch, ahead } = loader.next_batch()?;
        ahead.wait()?;
        Ok(batch)
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
        let place = |place: Place, _: &Batch| Ok(place);
        let steps = Steps::alike(order.clone(), share);
        let mut loader = Loader::start(Arc::clone(&dataset), steps, 2, 1, place).expect("a thread");
        let mut first_step = Vec::new();
        for (step, micro) in [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)] {
            let Loaded { batch, ahead } = loader.next_batch().expect("sound samples");
            let place = ahead.wait().expect("a place");
            assert_eq!(place, Place { step: step + 1, micro_batch: micro });
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
            (0..3).map(|_| next(&mut loader).expect("a batch").sample_ids[0]).collect();
        assert_eq!(good, [0, 1, 2]);
        assert_eq!(
            next(&mut loader).expect_err("the error").to_string(),
            "b.safetensors: bad sample"
        );
        assert_eq!(
            next(&mut loader).expect_err("the end").to_string(),
            "a dataset: reading ahead has ended after an error"
        );
    }

    #[test]
    fn a_panic_while_reading_reaches_the_consumer_as_an_error() {
        let mut loader =
            over(|id| if id == 1 { panic!("sample {id} broke the reader") } else { numbered(id) });
        next(&mut loader).expect("the batch before");
        let error = next(&mut loader).expect_err("the panic").to_string();
        assert_eq!(error, "a dataset: reading ahead panicked: sample 1 broke the reader");
    }

    #[test]
    fn a_value_is_made_of_each_batch_before_it_is_asked_for() {
        let (made, seen) = channel();
        let mut loader = making(numbered, move |number, batch| {
            made.send(batch.sample_ids[0]).expect("the test listens");
            Ok(10 * number)
        });
        for number in 0..6 {
            let Loaded { batch, ahead } = loader.next_batch().expect("a batch");
            assert_eq!(batch.sample_ids, [number]);
            // Both threads make theirs before any is received.
            seen.recv().expect("it is made");
            assert_eq!(ahead.wait().expect("a number"), 10 * number);
        }
    }

    #[test]
    fn what_breaks_while_a_value_is_made_arrives_behind_its_batch_and_ends_the_reading() {
        let fail = |number: u64, _: &Batch| match number {
            0 => Ok(()),
            1 => Err(Error::data("b.safetensors", "no number fits")),
            _ => panic!("value {number} broke"),
        };
        let mut loader = making(numbered, fail);
        next(&mut loader).expect("the one before");
        let Loaded { batch, ahead } = loader.next_batch().expect("it was read");
        assert_eq!(batch.sample_ids, [1]);
        assert_eq!(
            ahead.wait().expect_err("the error").to_string(),
            "b.safetensors: no number fits"
        );
        assert_eq!(
            next(&mut loader).expect_err("the panic").to_string(),
            "a dataset: working ahead panicked: value 2 broke"
        );
        assert_eq!(
            next(&mut loader).expect_err("the end").to_string(),
            "a dataset: reading ahead has ended after an error"
        );
    }

    #[test]
    fn dropping_the_loader_ends_its_threads_though_the_data_never_end() {
        let alive = Arc::new(());
        let held = Arc::clone(&alive);
        let mut loader = over(move |id| {
            let _ = &held;
            numbered(id)
        });
        next(&mut loader).expect("a batch");
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
            next(&mut loader).expect("never made too early");
        }
    }
}
