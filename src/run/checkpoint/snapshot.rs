//! The state of a checkpoint at one moment: gathered stage by stage and kept in host memory by the
//! rank that writes it.
//!
//! Files hold consecutive stages, and the division depends on the model alone. Each file goes to
//! the rank that keeps the fewest bytes so far.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::path::Path;

use tch::{Device, Kind, Tensor, no_grad};

use super::{Judged, Manifest, SavedFile};
use crate::collective::Collective;
use crate::error::Result;
use crate::files::disk::Disk;
use crate::files::safetensors::{Planned, Writer};
use crate::files::sha256::HashingWriter;
use crate::optim::Optimizer;
use crate::parallel::Replica;
use crate::pulse;
use crate::run::optimizer_state::OptimizerState;

/// Approximate number of parts of a model, so that the ranks of a node can write concurrently.
const NUM_PARTS: u64 = 8;
/// The smallest and largest number of parameter bytes for which a part is cut; a larger stage gets
/// a part of its own.
const PART_BYTES: RangeInclusive<u64> = 32 << 20..=1 << 30;
/// All tensors are saved in f32.
const ELEMENT_BYTES: u64 = 4;
/// First word of the names of the files that hold averaged weights.
pub const AVERAGES: &str = "ema";

/// The state that a checkpoint is made of.
pub struct Saved<'r> {
    pub manifest: &'r Manifest,
    /// The validation of the step, if it had one.
    pub judged: Option<&'r Judged>,
    pub replica: &'r Replica<'r>,
    pub optimizer: &'r dyn Optimizer,
    pub state: &'r OptimizerState,
}

/// The tensors of its stages that a file holds.
#[derive(Clone, Copy)]
enum Content {
    Optimizer,
    Model,
    Averages,
}

impl Content {
    /// `model-00001-of-00002.safetensors`.
    fn file_name(self, index: usize, count: usize) -> String {
        let word = match self {
            Content::Optimizer => "optimizer",
            Content::Model => "model",
            Content::Averages => AVERAGES,
        };
        format!("{word}-{:05}-of-{count:05}.safetensors", index + 1)
    }
}

/// A file of a checkpoint, before it is written.
pub struct FileCopy {
    name: String,
    /// Names and shapes of its tensors, in file order.
    planned: Vec<(String, Vec<i64>)>,
    /// Flat tensors whose concatenated bytes are those of `planned`: f32, on the CPU, sharing no
    /// storage.
    flats: Vec<Tensor>,
}

impl Saved<'_> {
    /// Returns the files that this rank writes.
    ///
    /// # Ordering
    /// Every rank calls it: each stage is gathered on the rank that keeps it.
    pub fn copy(&self, collective: &dyn Collective) -> Result<Vec<FileCopy>> {
        let sizes: Vec<u64> =
            self.replica.stages.iter().map(|stage| stage.params().num_trained() as u64).collect();
        let names = self.optimizer.state_names();
        let prefixes: Vec<String> = names.iter().map(|name| format!("{name}.")).collect();
        let ranges = part_ranges(&sizes);
        let averages = self.state.averages.as_ref();
        let tensors = tensors_of_contents(names.len() as u64, averages.is_some());
        let (writers, _) = writers(&sizes, &ranges, &tensors, collective.world_size());
        let mut copies = Vec::new();
        for (index, range) in ranges.iter().enumerate() {
            let begin = |content: Content, prefixes: &[String]| {
                let mine = writers[index][content as usize] == collective.rank();
                let (name, planned) =
                    (content.file_name(index, ranges.len()), self.planned(range, prefixes));
                mine.then(|| FileCopy { name, planned, flats: Vec::new() })
            };
            let own = [String::new()];
            let (mut moments, mut model) =
                (begin(Content::Optimizer, &prefixes), begin(Content::Model, &own));
            let mut averaged = averages.and_then(|_| begin(Content::Averages, &own));
            for stage in range.clone() {
                pulse::still_at_work();
                keep(&mut model, &self.replica.trained_parameters(stage)?);
                for name in 0..names.len() {
                    keep(&mut moments, &self.state.whole(stage, name, self.replica)?);
                }
                if let Some(averages) = averages {
                    keep(&mut averaged, &averages.whole(stage, self.replica)?);
                }
            }
            copies.extend([model, moments, averaged].into_iter().flatten());
        }
        Ok(copies)
    }

    /// Returns names and shapes of a part's tensors: stage by stage, prefix by prefix.
    fn planned(&self, range: &Range<usize>, prefixes: &[String]) -> Vec<(String, Vec<i64>)> {
        let named = |stage: usize, prefix: &String| {
            let trained = self.replica.stages[stage].params().trained();
            trained
                .map(|info| (format!("{prefix}{}", info.name), info.shape.clone()))
                .collect::<Vec<_>>()
        };
        range
            .clone()
            .flat_map(|stage| prefixes.iter().flat_map(move |prefix| named(stage, prefix)))
            .collect()
    }
}

/// Copies a stage's tensor. The copy is always needed: the gathered tensor may share the
/// storage that the optimizer updates.
fn keep(part: &mut Option<FileCopy>, flat: &Tensor) {
    if let Some(part) = part {
        let mut copy = Tensor::empty(flat.size(), (Kind::Float, Device::Cpu));
        no_grad(|| copy.copy_(flat));
        part.flats.push(copy);
    }
}

impl FileCopy {
    /// Writes and fsyncs the file, and frees each tensor once it is written.
    ///
    /// # Errors
    /// [`Error::Storage`](crate::error::Error::Storage).
    pub fn write(self, folder: &Path, disk: Disk) -> Result<SavedFile> {
        let path = folder.join(&self.name);
        let bytes = self
            .planned
            .iter()
            .map(|(_, shape)| shape.iter().product::<i64>() as u64 * ELEMENT_BYTES)
            .sum();
        let tensors: Vec<_> = self
            .planned
            .iter()
            .map(|(name, shape)| Planned { name, kind: Kind::Float, shape: shape.clone() })
            .collect();
        let (mut sha256, mut written) = (String::new(), 0);
        disk.write_file(&path, Some(bytes), |file| {
            let mut writer = Writer::begin(HashingWriter::new(file), &tensors, &BTreeMap::new())?;
            for flat in self.flats {
                writer.tensor(&flat)?;
            }
            (_, sha256, written) = writer.finish().finish();
            Ok(())
        })?;
        Ok(SavedFile { file: self.name, bytes: written, sha256 })
    }
}

/// Divides consecutive stages into parts, given the stages' numbers of trained parameters.
fn part_ranges(sizes: &[u64]) -> Vec<Range<usize>> {
    let total = ELEMENT_BYTES * sizes.iter().sum::<u64>();
    let limit = (total / NUM_PARTS).clamp(*PART_BYTES.start(), *PART_BYTES.end());
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0;
    for (stage, size) in sizes.iter().enumerate() {
        bytes += ELEMENT_BYTES * size;
        match ranges.last_mut() {
            Some(range) if bytes <= limit => range.end = stage + 1,
            _ => {
                bytes = ELEMENT_BYTES * size;
                ranges.push(stage..stage + 1);
            }
        }
    }
    ranges
}

/// Returns the number of tensors of each parameter in the files of each [`Content`] that there is.
fn tensors_of_contents(optimizer_tensors: u64, has_averages: bool) -> Vec<u64> {
    [optimizer_tensors, 1].into_iter().chain(has_averages.then_some(1)).collect()
}

/// Assigns each part's files, one for each [`Content`], to a rank. Returns the ranks by part and
/// content, and the bytes that each rank keeps.
fn writers(
    sizes: &[u64],
    ranges: &[Range<usize>],
    tensors_of_contents: &[u64],
    world_size: usize,
) -> (Vec<Vec<usize>>, Vec<u64>) {
    let mut kept = vec![0; world_size];
    let mut give = |bytes: u64| {
        let rank = (0..world_size).min_by_key(|&rank| kept[rank]).expect("a world has ranks");
        kept[rank] += bytes;
        rank
    };
    let bytes = |range: &Range<usize>| ELEMENT_BYTES * sizes[range.clone()].iter().sum::<u64>();
    let mut writers = vec![Vec::new(); ranges.len()];
    // The larger optimizer files are assigned first, so that the smaller ones balance the ranks.
    for tensors in tensors_of_contents {
        for (range, writers) in ranges.iter().zip(&mut writers) {
            writers.push(give(tensors * bytes(range)));
        }
    }
    (writers, kept)
}

/// Returns the host memory that a save takes on the rank that keeps most, given the stages' numbers
/// of trained parameters.
pub fn copied_bytes(
    sizes: &[u64],
    optimizer_tensors: u64,
    has_averages: bool,
    world_size: usize,
) -> u64 {
    let tensors = tensors_of_contents(optimizer_tensors, has_averages);
    let (_, kept) = writers(sizes, &part_ranges(sizes), &tensors, world_size);
    kept.into_iter().max().unwrap_or(0)
}

/// Returns the bytes of a checkpoint on the disk, but for its headers.
pub fn saved_bytes(sizes: &[u64], optimizer_tensors: u64, has_averages: bool) -> u64 {
    copied_bytes(sizes, optimizer_tensors, has_averages, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of parameters of the largest part.
    const LARGEST: u64 = (1 << 30) / ELEMENT_BYTES;

    #[test]
    fn parts_are_cut_by_size_and_a_giant_stands_alone() {
        // Enough stages follow for parts to reach the maximum size.
        let sizes = [&[1, 2, LARGEST - 3, 1, LARGEST + 5, 1], &[LARGEST; 6][..]].concat();
        assert_eq!(part_ranges(&sizes)[..5], [0..3, 3..4, 4..5, 5..6, 6..7]);
    }

    #[test]
    fn a_model_gives_eight_ranks_something_to_write_unless_it_is_tiny() {
        let million = 1_000_000;
        assert_eq!(
            part_ranges(&[5 * million; 14]).len(),
            14,
            "70 million parameters: each of these stages is more than an eighth with another"
        );
        assert_eq!(part_ranges(&[2 * million; 64]).len(), 8);
        assert_eq!(part_ranges(&[million; 8]).len(), 1);
    }

    #[test]
    fn everything_is_kept_once_and_by_whoever_has_least() {
        let sizes = [LARGEST; 8];
        let bytes = |world_size| copied_bytes(&sizes, 2, false, world_size);
        assert_eq!([1, 2, 4, 8, 16].map(bytes), [24, 12, 6, 3, 2].map(|parts| parts << 30));
        let with_averages = |world_size| copied_bytes(&sizes, 2, true, world_size);
        assert_eq!([1, 8].map(with_averages), [32, 4].map(|parts| parts << 30));
    }
}
