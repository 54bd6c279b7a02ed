//! `fm-dist data pack`: writes a dataset anew, in files of a wanted size, in its order or shuffled.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::json;
use tch::Tensor;

use super::write::{FurtherFile, WriteOptions, Written, write_dataset};
use super::{Description, Sample, Samples};
use crate::collective::Collective;
use crate::data::order::permute;
use crate::data::{Caption, Dataset, Links};
use crate::error::Result;
use crate::rng::{Key, Purpose};

/// Options of `fm-dist data pack`.
#[derive(Clone, Debug)]
pub struct PackRequest {
    pub folder: PathBuf,
    pub links: Links,
    pub out: PathBuf,
    pub shard_bytes: u64,
    /// Seed of the shuffled order; the dataset's own order if unset.
    pub shuffle: Option<u64>,
    pub jobs: usize,
}

/// Writes the samples of a dataset, its captions, conditions and empty prompt into a new folder.
///
/// # Errors
/// Errors of [`Dataset::open_with`] and [`write_dataset`];
/// [`Error::Data`](crate::error::Error::Data) if a sample is not finite.
///
/// # Ordering
/// Every rank calls it.
pub fn pack(request: &PackRequest, collective: &dyn Collective) -> Result<Written> {
    let dataset = Dataset::open_with(&request.folder, request.links)?;
    let manifest = dataset.manifest().clone();
    let description = Description {
        name: manifest.name,
        source: manifest.source,
        licence: manifest.licence,
        data_type: manifest.data_type,
    };
    let further = further(&dataset);
    let samples = Stored::new(dataset)?;
    let mut order: Vec<usize> = (0..samples.list.len()).collect();
    if let Some(seed) = request.shuffle {
        permute(&mut order, Key::new(seed, Purpose::Order));
    }
    let options = WriteOptions {
        out: request.out.clone(),
        shard_bytes: request.shard_bytes,
        jobs: request.jobs,
        order: Some(order),
        further,
    };
    write_dataset(&samples, &description, &options, collective)
}

/// Returns the files besides samples and captions.
fn further(dataset: &Dataset) -> Vec<FurtherFile> {
    let (manifest, folder) = (dataset.manifest(), dataset.path());
    let conditions = manifest.conditions.iter().map(|entry| FurtherFile {
        key: "conditions",
        path: folder.join(&entry.path),
        entry: json!({"names": entry.names}),
    });
    let empty_prompt = manifest.empty_prompt.iter().map(|entry| FurtherFile {
        key: "empty_prompt",
        path: folder.join(&entry.path),
        entry: json!({}),
    });
    conditions.chain(empty_prompt).collect()
}

/// The samples of a dataset.
struct Stored {
    dataset: Dataset,
    list: Vec<Sample>,
    /// Times that an epoch takes each.
    repeats: Vec<u64>,
}

impl Stored {
    fn new(dataset: Dataset) -> Result<Self> {
        let mut captions = vec![Caption::default(); dataset.num_samples() as usize];
        let mut next = captions.iter_mut();
        if let Some(stored) = dataset.captions() {
            stored.check_count(dataset.num_samples())?;
            stored.for_each(|caption| {
                next.by_ref().take(1).for_each(|place| *place = caption.clone());
                Ok(())
            })?;
        }
        let fingerprint = dataset.fingerprint();
        let sample = |(id, caption)| Sample {
            layout: dataset.sample_layout(id),
            caption,
            origin: format!("{fingerprint} sample {id}"),
        };
        let list = (0..).zip(captions).map(sample).collect();
        let mut repeats = vec![1; dataset.num_samples() as usize];
        for stock in dataset.stock().into_iter().flatten() {
            repeats[stock.ids.start as usize..stock.ids.end as usize].fill(stock.repeats);
        }
        Ok(Stored { dataset, list, repeats })
    }
}

impl Samples for Stored {
    fn list(&self) -> &[Sample] {
        &self.list
    }

    fn repeats(&self, index: usize) -> u64 {
        self.repeats[index]
    }

    fn read(&self, index: usize) -> Result<BTreeMap<String, Tensor>> {
        self.dataset.sample(index as u64)
    }
}
