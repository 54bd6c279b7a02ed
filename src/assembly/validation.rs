//! The samples that a run is judged on, cut into blocks that are the same at every number of ranks,
//! so that a sample's loss has the same bits on whichever rank it is computed.

use std::collections::BTreeSet;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::as_configured;
use super::attention::tokens_of_group;
use crate::config::RunConfig;
use crate::data::{Dataset, Group};
use crate::error::Result;
use crate::files::sha256;
use crate::flow::{Levels, Note};
use crate::nn::Tokens;
use crate::settings::{self, Family};

/// Most noise levels that a remark names.
const NAMED: usize = 3;

/// The samples that a run is judged on, and their noise levels.
#[derive(Clone, Debug)]
pub struct ValidationSet {
    pub dataset: Arc<Dataset>,
    pub blocks: Arc<[Block]>,
    pub levels: Levels,
    /// Hex digits that change with the samples, what the model is given of them, their noise and
    /// their noise levels: losses by different criteria cannot be compared.
    pub criterion: String,
}

/// Samples of one resolution group that go through the model together.
#[derive(Clone, Debug)]
pub struct Block {
    /// Index of their group in the dataset.
    pub group: usize,
    pub ids: Vec<u64>,
    /// One for each noise level.
    pub sigmas: Vec<f64>,
}

impl ValidationSet {
    /// Returns the configured set: a dataset of its own, or the samples that are held out of
    /// `trained`; `None` if the run is not judged.
    ///
    /// # Errors
    /// As [`dataset`](super::dataset).
    pub fn of(config: &RunConfig, trained: &Arc<Dataset>) -> Result<Option<Self>> {
        let validation = &config.validation;
        let dataset = match &validation.path {
            Some(path) => {
                let dataset = Dataset::named(path, config.data.links())?;
                Arc::new(as_configured(config, dataset)?)
            }
            None if validation.share.is_some() => Arc::clone(trained),
            None => return Ok(None),
        };
        let levels = validation.levels();
        let blocks = blocks(config, &dataset, &levels);
        let criterion = criterion(config, &dataset, &blocks);
        Ok(Some(ValidationSet { dataset, blocks: blocks.into(), levels, criterion }))
    }

    pub fn num_samples(&self) -> u64 {
        self.blocks.iter().map(|block| block.ids.len() as u64).sum()
    }

    /// Returns how often each rank takes part: with fewer blocks than ranks, or a rest, some repeat
    /// the last block, which is not counted.
    pub fn rounds(&self, world_size: usize) -> usize {
        self.blocks.len().div_ceil(world_size)
    }

    /// Returns the index of the block that a rank computes in a round.
    pub fn block_of(&self, round: usize, rank: usize, world_size: usize) -> usize {
        (round * world_size + rank).min(self.blocks.len() - 1)
    }

    /// Returns what is worth knowing though nothing is wrong: samples that are trained on, and
    /// noise levels that training never draws.
    pub fn notes(&self, config: &RunConfig, trained: &Dataset) -> Vec<Note> {
        let notes = [self.trained_files(config, trained), self.unseen_levels(config)];
        notes.into_iter().flatten().map(Note::Warning).collect()
    }

    fn trained_files(&self, config: &RunConfig, trained: &Dataset) -> Option<String> {
        let path = config.validation.path.as_ref()?;
        let hashes = |dataset: &Dataset| -> BTreeSet<String> {
            let files = dataset.folders().iter().flat_map(|folder| &folder.manifest().files);
            files.map(|file| file.sha256.clone()).collect()
        };
        let both = hashes(&self.dataset).intersection(&hashes(trained)).count();
        (both > 0).then(|| {
            format!("validation.path: {both} files of {path} are trained on, too: their loss says nothing of new samples")
        })
    }

    fn unseen_levels(&self, config: &RunConfig) -> Option<String> {
        let flow = &config.flow_matching.flow;
        let window = flow.sigma_min..=flow.sigma_max;
        let unseen = |sigma: &&f64| !window.contains(sigma);
        let unseen: Vec<String> =
            self.blocks[0].sigmas.iter().filter(unseen).map(f64::to_string).collect();
        let more = if unseen.len() > NAMED { ", …" } else { "" };
        (!unseen.is_empty()).then(|| {
            format!(
                "validation.sigmas {}{more} lie outside of sigma_min = {} to sigma_max = {}, which is \
                 all that training draws; validation.quantiles follow it",
                unseen[..unseen.len().min(NAMED)].join(", "),
                flow.sigma_min,
                flow.sigma_max
            )
        })
    }
}

/// Returns the largest number of samples that a block of a group has.
pub fn block_size(config: &RunConfig, tokens: Tokens) -> usize {
    match config.data.counts_tokens() {
        true => {
            let fitting =
                config.data.micro_batch_tokens_per_gpu / (tokens.image + tokens.text).max(1);
            fitting.max(1) as usize
        }
        false => config.data.micro_batch_size(),
    }
}

fn blocks(config: &RunConfig, dataset: &Dataset, levels: &Levels) -> Vec<Block> {
    let flow = &config.flow_matching.flow;
    let of_group = |(index, ids): (usize, Vec<u64>)| {
        let group = &dataset.groups()[index];
        let tokens = tokens_of_group(config, dataset, group);
        let sigmas = levels.sigmas(flow, tokens.image);
        let block = |ids: &[u64]| Block { group: index, ids: ids.into(), sigmas: sigmas.clone() };
        ids.chunks(block_size(config, tokens)).map(block).collect::<Vec<_>>()
    };
    chosen(config, dataset).into_iter().enumerate().flat_map(of_group).collect()
}

/// Returns the ids of the samples that are judged, by group: all, or those of the smallest hashes.
fn chosen(config: &RunConfig, dataset: &Dataset) -> Vec<Vec<u64>> {
    let candidates = |group: &Group| match config.validation.share {
        Some(_) => group.held_out.clone(),
        None => group.sample_ids.clone(),
    };
    let mut groups: Vec<Vec<u64>> = dataset.groups().iter().map(candidates).collect();
    let count: usize = groups.iter().map(Vec::len).sum();
    let most = config.validation.max_samples.map_or(count, |most| most as usize);
    if most < count {
        keep_smallest(&mut groups, most, |id| dataset.sample_hash(id));
    }
    groups
}

/// Keeps so many samples of all groups, those of the smallest hashes. Samples of files that are
/// copies of each other have one hash; of these the first are kept.
fn keep_smallest(groups: &mut [Vec<u64>], most: usize, hash: impl Fn(u64) -> u64) {
    let place = |id: u64| (hash(id), id);
    let mut places: Vec<(u64, u64)> = groups.iter().flatten().map(|id| place(*id)).collect();
    places.sort_unstable();
    let bound = places[most];
    groups.iter_mut().for_each(|ids| ids.retain(|id| place(*id) < bound));
}

fn criterion(config: &RunConfig, dataset: &Dataset, blocks: &[Block]) -> String {
    let (flow, mut adapter) = (&config.flow_matching.flow, config.flow_matching.adapter.clone());
    let (adapter, name) = (settings::write_json(adapter.settings()), adapter.name());
    let adapter = serde_json::Value::Object(adapter);
    let mut hash = Sha256::new_with_prefix(format!(
        "{} {} {} {} {} {} {name} {adapter}",
        dataset.fingerprint(),
        config.seed,
        flow.num_train_timesteps,
        flow.i2v_prob,
        flow.apply_loss_mask,
        config.data.text_tokens,
    ));
    // How samples are cut into blocks is no part of it.
    for group in blocks.chunk_by(|a, b| a.group == b.group) {
        let ids: Vec<u64> = group.iter().flat_map(|block| block.ids.iter().copied()).collect();
        hash.update(format!("\n{ids:?} {:?}", group[0].sigmas));
    }
    sha256::hex(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assembly::dataset;

    fn set(overrides: &[&str]) -> ValidationSet {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        let config = RunConfig::read("test", crate::config::DEFAULT, &overrides)
            .expect("a sound configuration");
        let trained = Arc::new(dataset(&config).expect("the digits"));
        ValidationSet::of(&config, &trained).expect("sound data").expect("a share")
    }

    fn ids(set: &ValidationSet) -> BTreeSet<u64> {
        set.blocks.iter().flat_map(|block| block.ids.clone()).collect()
    }

    #[test]
    fn every_sample_is_counted_once_at_every_number_of_ranks() {
        let set = set(&["validation.share=0.1", "data.micro_batch_size_per_gpu=16"]);
        assert_eq!(set.num_samples(), set.dataset.num_held_out());
        for world_size in [1, 2, 3, 5, 16] {
            let rounds = set.rounds(world_size);
            let mut seen = vec![0; set.blocks.len()];
            for (round, rank) in
                (0..rounds).flat_map(|round| (0..world_size).map(move |r| (round, r)))
            {
                if round * world_size + rank < set.blocks.len() {
                    seen[set.block_of(round, rank, world_size)] += 1;
                }
            }
            assert_eq!(seen, vec![1; set.blocks.len()], "{world_size} ranks");
        }
    }

    #[test]
    fn as_many_are_judged_as_asked_for_though_copies_have_one_hash() {
        let kept = |most: usize, hash: fn(u64) -> u64| {
            let mut groups = [vec![0, 2, 4], vec![1, 3, 5]];
            keep_smallest(&mut groups, most, hash);
            groups
        };
        assert_eq!(kept(1, |_| 7), [vec![0], vec![]]);
        assert_eq!(kept(4, |id| id / 2), [vec![0, 2], vec![1, 3]]);
        assert_eq!(kept(3, |id| 9 - id), [vec![4], vec![3, 5]]);
    }

    #[test]
    fn fewer_samples_are_some_of_the_more_and_another_criterion() {
        let of = |most: &str| set(&["validation.share=0.2", most]);
        let (few, more) = (of("validation.max_samples=20"), of("validation.max_samples=100"));
        assert_eq!((few.num_samples(), more.num_samples()), (20, 100));
        assert!(ids(&more).is_superset(&ids(&few)));
        assert!(of("validation.max_samples=100000").num_samples() > 300);
        assert_ne!(few.criterion, more.criterion);
        for other in ["validation.sigmas=[0.5]", "flow_matching.adapter.timestep_dtype=float32"] {
            let other = set(&["validation.share=0.2", "validation.max_samples=20", other]);
            assert_ne!(few.criterion, other.criterion);
        }
        assert_eq!(few.criterion, of("validation.max_samples=20").criterion);
        let cut = set(&[
            "validation.share=0.2",
            "validation.max_samples=20",
            "data.micro_batch_size_per_gpu=7",
        ]);
        assert_ne!(cut.blocks.len(), few.blocks.len());
        assert_eq!(few.criterion, cut.criterion, "the same samples in other blocks");
    }
}
