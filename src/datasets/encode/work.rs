//! The batches that are missing, encoded on all ranks: threads prepare inputs while one thread of
//! each rank computes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;

use indicatif::{ProgressBar, ProgressStyle};

use super::batches::Batch;
use super::store::Store;
use crate::collective::Collective;
use crate::collective::agreement::{agree, on_rank_zero};
use crate::encoding::Conditions;
use crate::error::Result;
use crate::pulse;

/// Encodes the batches that the store lacks, each rank its part, and writes them into the store.
///
/// `prepare` makes the input of a batch, on `jobs` threads; `encode` makes a row of tensors for
/// each of the batch's rows, one batch after the other.
///
/// # Errors
/// The first error of either, which ends the world.
///
/// # Ordering
/// Every rank calls it, with equal batches.
pub(super) fn encode_missing<I: Send>(
    store: &Store,
    batches: &[Batch],
    (word, jobs): (&str, usize),
    prepare: impl Fn(&Batch) -> Result<I> + Sync,
    mut encode: impl FnMut(&Batch, I) -> Result<Vec<Conditions>>,
    collective: &dyn Collective,
) -> Result<()> {
    let missing = on_rank_zero(collective, || {
        let missing = (0..batches.len()).filter(|batch| !store.has(&batches[*batch].file));
        Ok(serde_json::to_string(&missing.collect::<Vec<_>>()).expect("numbers are JSON"))
    })?;
    let missing: Vec<usize> = serde_json::from_str(&missing).expect("rank 0 wrote it");
    let own = missing.iter().skip(collective.rank()).step_by(collective.world_size());
    let own: Vec<&Batch> = own.map(|batch| &batches[*batch]).collect();
    let rows = own.iter().map(|batch| batch.rows.len() as u64).sum();
    let bar = progress(word, rows, pulse::is_root(collective.rank()));
    let next = AtomicUsize::new(0);
    let done = thread::scope(|scope| {
        let (sender, receiver) = sync_channel(jobs);
        for _ in 0..jobs.min(own.len()) {
            let (sender, next, own, prepare) = (sender.clone(), &next, &own, &prepare);
            scope.spawn(move || {
                while let Some(batch) = own.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // After an error nobody receives.
                    if sender.send((*batch, prepare(batch))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        receiver.into_iter().try_for_each(|(batch, input)| {
            pulse::still_at_work();
            store.write(&batch.file, &encode(batch, input?)?)?;
            bar.inc(batch.rows.len() as u64);
            Ok(())
        })
    });
    bar.finish_and_clear();
    // An error is told at once, and not when all others have finished their work.
    done?;
    agree(Ok(String::new()), collective).map(drop)
}

/// Returns a bar that counts rows with their rate, hidden unless `shown`, which is true on one rank
/// only.
pub(super) fn progress(word: &str, rows: u64, shown: bool) -> ProgressBar {
    let template = format!("{{bar:28.blue}} {{pos}}/{{len}} {word}, {{per_sec}}, {{eta}} left");
    let style = ProgressStyle::with_template(&template);
    // Hidden where standard error is no terminal.
    let bar = if shown { ProgressBar::new(rows) } else { ProgressBar::hidden() };
    bar.with_style(style.expect("the template is valid"))
}
