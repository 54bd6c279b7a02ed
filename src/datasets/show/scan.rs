//! Reads every sample of a dataset once, on threads, and merges what they find in the order of the
//! samples, so that the same dataset has the same summary everywhere.

use std::collections::BTreeMap;
use std::thread::available_parallelism;

use sha2::{Digest, Sha256};
use tch::Kind;

use super::numbers::{Range, is_float};
use crate::data::{Dataset, SCALE, TEXTS, latents_key};
use crate::datasets::parallel::in_parallel;
use crate::datasets::write::progress;
use crate::error::Result;
use crate::tensor::bytes;

/// Pieces of about equal numbers of samples, which threads take one after another.
const PIECES: usize = 4096;
const LEAST_PIECE: usize = 16;
/// Most threads; more do not make a disk faster.
const MOST_THREADS: usize = 16;

/// The first half of the SHA-256 of a sample's latents.
pub type Mark = [u8; 16];

/// Smallest and largest of some counts.
pub type Ends = (i64, i64);

/// Findings in samples of one group.
#[derive(Debug, Default)]
pub struct Found {
    /// Finite samples with the marks of their latents.
    pub latents: Vec<(u64, Mark)>,
    pub not_finite: u64,
    /// Range of the finite samples' numbers by key; scales of floats of 8 bits under their own.
    pub ranges: BTreeMap<String, Range>,
    /// Shortest and longest texts by key, where lengths are stored.
    pub lengths: BTreeMap<String, Ends>,
    /// Least and most tokens that count by key, where a mask is stored.
    pub valid_tokens: BTreeMap<String, Ends>,
}

impl Found {
    fn look(&mut self, dataset: &Dataset, id: u64) -> Result<()> {
        for (key, tensor) in dataset.sample_layout(id).iter().filter(|(_, t)| t.unequal) {
            widen(&mut self.lengths, key, (tensor.shape[0], tensor.shape[0]));
        }
        let sample = match dataset.sample(id) {
            Err(_) if !dataset.is_finite(id)? => {
                self.not_finite += 1;
                return Ok(());
            }
            sample => sample?,
        };
        let hash = Sha256::digest(bytes(&sample[latents_key(dataset.manifest().data_type)]));
        self.latents.push((id, hash[..size_of::<Mark>()].try_into().expect("half of it")));
        for (key, tensor) in sample.iter().filter(|(_, tensor)| is_float(tensor.kind())) {
            let scale = sample.get(&format!("{key}{SCALE}"));
            let scale = scale.map_or(1.0, |scale| scale.double_value(&[]) as f32);
            self.ranges.entry(key.clone()).or_default().add(tensor, scale);
        }
        for (text, mask) in TEXTS {
            if let Some(mask) = sample.get(mask).filter(|_| sample.contains_key(text)) {
                let valid = mask.ne(0).sum(Kind::Int64).int64_value(&[]);
                widen(&mut self.valid_tokens, text, (valid, valid));
            }
        }
        Ok(())
    }

    fn merge(mut self, other: Found) -> Self {
        self.latents.extend(other.latents);
        self.not_finite += other.not_finite;
        for (key, range) in other.ranges {
            let known = self.ranges.entry(key).or_default();
            *known = known.merge(range);
        }
        other.lengths.into_iter().for_each(|(key, ends)| widen(&mut self.lengths, &key, ends));
        for (key, ends) in other.valid_tokens {
            widen(&mut self.valid_tokens, &key, ends);
        }
        self
    }
}

fn widen(known: &mut BTreeMap<String, Ends>, key: &str, (least, most): Ends) {
    let (min, max) = known.entry(key.into()).or_insert((least, most));
    (*min, *max) = ((*min).min(least), (*max).max(most));
}

/// Returns the findings in each group.
///
/// # Errors
/// The first error of reading.
pub fn scan(dataset: &Dataset) -> Result<Vec<Found>> {
    let size = (dataset.num_samples() as usize / PIECES).max(LEAST_PIECE);
    let groups = dataset.groups().iter().enumerate();
    let pieces: Vec<(usize, &[u64])> = groups
        .flat_map(|(index, group)| group.sample_ids.chunks(size).map(move |ids| (index, ids)))
        .collect();
    let bar = progress(dataset.num_samples(), true);
    let threads = available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let results = in_parallel(&pieces, threads, |(_, ids)| {
        let mut piece = Found::default();
        for id in *ids {
            bar.inc(1);
            piece.look(dataset, *id)?;
        }
        Ok(piece)
    });
    bar.finish_and_clear();
    let mut found: Vec<Found> = dataset.groups().iter().map(|_| Found::default()).collect();
    for (piece, (group, _)) in results?.into_iter().zip(pieces) {
        found[group] = std::mem::take(&mut found[group]).merge(piece);
    }
    Ok(found)
}
