//! Checks data against the adapter, the settings and the model before anything is loaded.

use std::collections::BTreeSet;

use tch::Device;

use crate::assembly::build_pipeline;
use crate::config::RunConfig;
use crate::data::{Dataset, TextPadding};
use crate::error::{Error, Result};
use crate::flow::{DataShapes, Note, check_keys};
use crate::model::SampleShapes;
use crate::pulse;
use crate::settings::Family;

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
        let latents = dataset.latent_shape(&group.name).expect("a group has latents");
        let mut sample = dataset.sample_shapes(group);
        // Masks that batches get though nobody reads them are no keys of the data.
        sample.retain(|key, _| config.reads_text_mask() || group.layout.contains_key(key));
        let shapes = DataShapes { latents, sample: &sample, empty_prompt: &empty_prompt };
        let unfit = |what: String| {
            Error::data(dataset.path(), format!("resolution group {}: {what}", group.name))
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
                Error::data(dataset.path(), format!("resolution group {}: {what}", group.name))
            }
            other => other,
        };
        pipeline.rehearse(&dataset.batch(&group.sample_ids[..1])?).map_err(unfit)
    })
}
