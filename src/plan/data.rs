//! Checks data against the adapter, the settings and the model before anything is loaded.

use std::collections::BTreeSet;

use tch::Device;

use crate::assembly::attention::tokens_of_group;
use crate::assembly::{build_pipeline, dataset};
use crate::config::RunConfig;
use crate::data::{Dataset, Folder, Group, Order, TextPadding};
use crate::error::{Error, Result};
use crate::flow::{DataShapes, Note, check_keys};
use crate::model::SampleShapes;
use crate::nn::Tokens;
use crate::pulse;
use crate::settings::Family;

/// Reads all data, compares them with their hashes, and searches them for numbers that are not
/// finite.
///
/// # Errors
/// [`Error::Data`] for the first file that differs, or the first such number.
pub fn verify_data(config: &RunConfig) -> Result<()> {
    let dataset = dataset(config)?;
    dataset.verify_hashes().and_then(|()| dataset.verify_numbers())
}

/// Refuses a dataset if the adapter or the model cannot take one of its resolution groups. Returns
/// notes that are worth knowing though nothing is wrong.
///
/// # Errors
/// [`Error::Data`] naming the group and the key; [`Error::Config`] naming the model's setting.
pub fn check_data(config: &RunConfig, dataset: &Dataset) -> Result<Vec<Note>> {
    let (flow, adapter) = (&config.flow_matching.flow, config.flow_matching.adapter.build());
    let mut notes = BTreeSet::from_iter(
        adapter.notes(config.model.family.embeds_guidance()).map(Note::Warning),
    );
    let empty_prompt = dataset.empty_prompt_shapes();
    for group in dataset.groups() {
        let latents = &dataset.latent_shape(group)[..];
        let mut sample = dataset.sample_shapes(group);
        // Masks that batches get though nobody reads them are no keys of the data.
        sample.retain(|key, _| config.reads_text_mask() || group.layout.contains_key(key));
        let shapes = DataShapes { latents, sample: &sample, empty_prompt: &empty_prompt };
        let unfit = |what: String| {
            Error::data(dataset.path_of(group), format!("resolution group {}: {what}", group.name))
        };
        let found = check_keys(adapter.as_ref(), flow, shapes).map_err(unfit)?;
        config
            .model
            .family
            .check_data(&SampleShapes { latents, of: sample })
            .map_err(|error| error.followed_by(&found))?;
        notes.extend(found);
    }
    notes.extend(padding(config, dataset));
    notes.extend(too_many_tokens(config, dataset));
    Ok(notes.into_iter().collect())
}

/// Returns a remark on texts of unequal length whose padding the model attends to.
fn padding(config: &RunConfig, dataset: &Dataset) -> Option<Note> {
    let (padding, fixed) = (config.text_padding(), dataset.extended_text());
    if let (TextPadding::All(tokens), Some(stored), false) = (padding, fixed, dataset.pads_texts())
    {
        let what = format!("texts of {stored} tokens are padded with zeros to {tokens}");
        return Some(Note::Information(what));
    }
    if !dataset.pads_texts() || config.reads_text_mask() {
        return None;
    }
    let adapter = config.flow_matching.adapter.name();
    let begin = format!("texts have unequal lengths and the {adapter} adapter reads no text_mask");
    Some(match padding {
        TextPadding::Longest => Note::Warning(format!(
            "{begin}: the model attends to their padding, and a sample's loss depends on the others \
             of its micro-batch; adapter.use_text_mask = true leaves padding out where the adapter \
             has it, data.text_tokens pads all texts to one length"
        )),
        TextPadding::Tokens(tokens) | TextPadding::All(tokens) => Note::Information(format!(
            "{begin}: they are padded with zeros to {tokens} tokens, which the model attends to"
        )),
    })
}

/// Returns a remark on samples that have more tokens than a micro-batch is to have.
fn too_many_tokens(config: &RunConfig, dataset: &Dataset) -> Option<Note> {
    let most = config.data.micro_batch_tokens_per_gpu;
    let tokens = |group: &Group| {
        let Tokens { image, text } = tokens_of_group(config, dataset, group);
        image + text
    };
    let groups = dataset.groups().iter().map(|group| (tokens(group), &group.name));
    let (tokens, name) = groups.max().filter(|_| config.data.counts_tokens())?;
    (tokens > most).then(|| {
        Note::Warning(format!(
            "a sample of resolution group {name} has {tokens} tokens, more than \
             data.micro_batch_tokens_per_gpu = {most}: micro-batches of one sample go beyond it"
        ))
    })
}

/// Returns the resolution groups that are trained on.
pub(super) fn trained_groups<'d>(dataset: &'d Dataset, order: &Order) -> Vec<&'d Group> {
    let groups = dataset.groups().iter().enumerate();
    groups.filter(|(index, _)| order.takes(*index)).map(|(_, group)| group).collect()
}

/// Returns lines about the folders of a mixed dataset, name and value: how many samples of each an
/// epoch takes.
pub fn shares(dataset: &Dataset, order: &Order) -> Vec<(String, String)> {
    let all = order.samples_per_epoch();
    let line = |(index, folder): (usize, &Folder)| {
        let (ids, taken) = (folder.sample_ids(), order.samples_of(index));
        let samples = ids.end - ids.start;
        let share = 100.0 * taken as f64 / all as f64;
        (
            folder.path().display().to_string(),
            format!("{samples} samples, {taken} of an epoch's {all} ({share:.1} %)"),
        )
    };
    let lines = dataset.folders().iter().enumerate().map(line);
    // Nothing is to be said of one folder whose samples are taken once.
    let plain = dataset.folders().len() == 1 && all == dataset.num_samples();
    lines.filter(|_| !plain).collect()
}

/// Converts the first sample of each resolution group to the model's inputs, on the CPU: errors
/// that depend on values and not on shapes, as in masks, are found before weights are loaded.
///
/// # Errors
/// [`Error::Data`] naming the group and the key.
pub fn rehearse_data(config: &RunConfig, dataset: &Dataset) -> Result<()> {
    let pipeline = build_pipeline(config, Device::Cpu);
    dataset.groups().iter().try_for_each(|group| {
        pulse::still_at_work();
        let unfit = |error| match error {
            Error::Data { what, .. } => {
                let what = format!("resolution group {}: {what}", group.name);
                Error::data(dataset.path_of(group), what)
            }
            other => other,
        };
        pipeline.rehearse(&dataset.batch(&group.sample_ids[..1])?).map_err(unfit)
    })
}
