//! Tells if attention will need a mask: where the samples of a micro-batch see different tokens.

use std::collections::BTreeSet;

use tch::{Kind, Tensor};

use crate::assembly::attention::tokens_of_group;
use crate::config::RunConfig;
use crate::data::group::Group;
use crate::data::{Dataset, EMPTY};
use crate::error::Result;
use crate::flow::{CfgDropout, CfgDropoutValue, DropoutScope, ModelAdapter, Role, TaskScope};
use crate::parallel::SeedScope;
use crate::pulse;

/// Samples of which one key is read, in all groups together: enough to tell, and read in no time.
const MOST_SAMPLES: usize = 1024;
/// Bytes of one key that are read, in all groups together. Masks are small, embeddings of images
/// are not.
const MOST_BYTES: usize = 256 << 20;

/// Describes the attention of a run on `dataset`, or on data that are not there yet: without a
/// mask, as flash attention needs it, or with one. It does not tell of texts without a single valid
/// token, which keep a masked one.
///
/// # Errors
/// Those of reading the data.
pub fn attention(
    config: &RunConfig,
    dataset: Option<&Dataset>,
    world_size: usize,
) -> Result<String> {
    let adapter = config.flow_matching.adapter.build();
    let masks = masks(&*adapter);
    if masks.is_empty() {
        return Ok(format!("{WITHOUT}: the {} adapter masks no text", adapter.name()));
    }
    let one_sample =
        || Ok(format!("{WITHOUT}: a micro-batch of one sample has the tokens that it sees"));
    let Some(dataset) = dataset else {
        if !config.data.counts_tokens() && config.data.micro_batch_size() == 1 {
            return one_sample();
        }
        let masks = masks.join("` and `");
        return Ok(with_mask(config, &format!("the data's `{masks}` will tell")));
    };
    let mut groups = Vec::new();
    for group in dataset.groups() {
        let tokens = tokens_of_group(config, dataset, group);
        if config.micro_batches(tokens, world_size)?.samples > 1 {
            groups.push(group);
        }
    }
    if groups.is_empty() {
        return one_sample();
    }
    let look = Look { config, adapter: &*adapter, dataset, groups };
    let differences = look.differences()?;
    if differences.is_empty() {
        let looked_at = look.looked_at();
        return Ok(format!(
            "{WITHOUT}: all samples of a resolution group see the same tokens, by {looked_at}"
        ));
    }
    let differences: Vec<String> = differences.into_iter().collect();
    Ok(with_mask(config, &differences.join(", ")))
}

const WITHOUT: &str = "without a mask, so that it can be flash attention";

fn with_mask(config: &RunConfig, why: &str) -> String {
    let (samples, one) = match config.data.counts_tokens() {
        true => ("samples".into(), "data.micro_batch_tokens_per_gpu = 1"),
        false => (
            format!("{} samples", config.data.micro_batch_size()),
            "data.micro_batch_size_per_gpu = 1",
        ),
    };
    format!(
        "with a mask, so not flash attention, in micro-batches whose {samples} see different tokens \
         ({why}); with {one} there is none"
    )
}

/// Returns the keys of the masks that the adapter reads.
fn masks(adapter: &dyn ModelAdapter) -> Vec<&'static str> {
    let keys = adapter.keys().into_iter().filter(|key| key.role == Role::TokenMask);
    keys.flat_map(|key| key.names).copied().collect()
}

/// A look at some samples of each group.
struct Look<'l> {
    config: &'l RunConfig,
    adapter: &'l dyn ModelAdapter,
    dataset: &'l Dataset,
    /// Groups whose micro-batches have several samples.
    groups: Vec<&'l Group>,
}

impl Look<'_> {
    /// Returns the number of samples of a group of which the key is read.
    fn most(&self, group: &Group, key: &str) -> usize {
        let groups = self.groups.len();
        let elements: i64 = self.dataset.sample_shapes(group)[key].iter().product();
        // The masks of texts of unequal length are made, not stored.
        let kind = group.layout.get(key).map_or(Kind::Int64, |tensor| tensor.kind);
        let bytes = kind.elt_size_in_bytes() * elements as usize;
        let most = (MOST_BYTES / groups / bytes.max(1)).min(MOST_SAMPLES / groups).max(2);
        group.sample_ids.len().min(most)
    }

    /// Returns the keys that were read, each with the number of samples.
    fn looked_at(&self) -> String {
        let all: usize = self.groups.iter().map(|group| group.sample_ids.len()).sum();
        let of_key = |key: &str| {
            let groups = self.groups.iter();
            let groups = groups.filter(|group| self.dataset.sample_shapes(group).contains_key(key));
            let read: usize = groups.map(|group| self.most(group, key)).sum();
            format!("`{key}` of {read}")
        };
        let images = self.groups.iter().find_map(|group| self.image_tokens(group));
        let keys: Vec<String> = masks(self.adapter).into_iter().chain(images).map(of_key).collect();
        format!("{} of {all} samples", keys.join(" and "))
    }

    /// Returns the reasons for which two samples of a micro-batch may see different tokens.
    fn differences(&self) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        for group in &self.groups {
            pulse::still_at_work();
            for key in masks(self.adapter) {
                found.extend(self.texts(group, key)?);
            }
            found.extend(self.images(group)?);
        }
        Ok(found)
    }

    fn texts(&self, group: &Group, key: &str) -> Result<Option<String>> {
        let rows = self.rows(group, key)?.ne(0);
        if differ(&rows) {
            return Ok(Some(format!("their `{key}` differs")));
        }
        if !self.mixes_empty_prompts() {
            return Ok(None);
        }
        let batch = self.dataset.batch(&group.sample_ids[..1])?;
        let another = batch.get(&format!("{EMPTY}{key}")).is_some_and(|empty| {
            let missing = rows.size()[1] - empty.size()[0];
            !empty.ne(0).constant_pad_nd([0, missing]).equal(&rows.get(0))
        });
        Ok(another.then(|| format!("the empty prompt has another `{key}`")))
    }

    /// True if a micro-batch can hold samples with their own prompt and with the empty one.
    fn mixes_empty_prompts(&self) -> bool {
        let flow = &self.config.flow_matching.flow;
        let by_adapter = match self.adapter.dropout() {
            None => false,
            Some(DropoutScope::Sample) => true,
            Some(DropoutScope::Batch) => self.draws_for_each_sample(),
        };
        flow.cfg_dropout_prob > 0.0
            && flow.cfg_dropout_value == CfgDropoutValue::EmptyPrompt
            && (flow.cfg_dropout == CfgDropout::PerSample || by_adapter)
    }

    fn draws_for_each_sample(&self) -> bool {
        self.config.parallel.seed_scope == SeedScope::Sample
    }

    /// Returns the key of image tokens that a sample of the group may see.
    fn image_tokens(&self, group: &Group) -> Option<&'static str> {
        let key = self.adapter.image_tokens().filter(|key| group.layout.contains_key(*key))?;
        let latents = self.dataset.latent_shape(group);
        let is_clip = matches!(latents[..], [_, frames, _, _] if frames > 1);
        (is_clip && self.config.flow_matching.flow.i2v_prob > 0.0).then_some(key)
    }

    fn images(&self, group: &Group) -> Result<Option<String>> {
        let Some(key) = self.image_tokens(group) else { return Ok(None) };
        let flow = &self.config.flow_matching.flow;
        let draws_tasks = flow.task_scope == TaskScope::Sample || self.draws_for_each_sample();
        if draws_tasks && flow.i2v_prob < 1.0 {
            return Ok(Some("only some are image-to-video".into()));
        }
        let has_image = self.rows(group, key)?.ne(0).flatten(1, -1).any_dim(1, true);
        Ok(differ(&has_image).then(|| format!("`{key}` of some are zeros")))
    }

    /// Returns the key's tensors of samples from the group's beginning to its end.
    fn rows(&self, group: &Group, key: &str) -> Result<Tensor> {
        let (all, count) = (group.sample_ids.len(), self.most(group, key));
        let ids: Vec<u64> = (0..count).map(|place| group.sample_ids[place * all / count]).collect();
        self.dataset.stacked(key, &ids)
    }
}

/// True if the rows are not all equal.
fn differ(rows: &Tensor) -> bool {
    rows.ne_tensor(&rows.narrow(0, 0, 1)).any().int64_value(&[]) == 1
}
