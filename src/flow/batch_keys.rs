//! The tensors that an adapter reads from a batch: keys, axes and defaults, so that data are
//! checked by their shapes before weights are loaded.

use std::collections::BTreeMap;
use std::fmt;

use super::adapter::ModelAdapter;
use super::loss::{LOSS_MASK, axes_of_mask};
use super::settings::{CfgDropout, CfgDropoutValue, FlowMatchingSettings};
use crate::data::{Batch, EMPTY};

/// Keys of the latents; the first existing one is read.
pub const LATENTS: [&str; 2] = ["video_latents", "image_latents"];

/// Similarity from which an unread key is taken for a misspelling of a missing one.
const ALIKE: f64 = 0.85;

/// One tensor that an adapter reads for each sample.
#[derive(Clone, Debug)]
pub struct BatchKey {
    /// Alternative keys; the first existing one is read.
    pub names: &'static [&'static str],
    /// Names of one sample's axes, in each allowed form. `C`, `F`, `H` and `W` are the latents'
    /// own; any other name stands for one size in all of an adapter's keys.
    pub forms: &'static [&'static [&'static str]],
    pub role: Role,
    /// Description of the default that replaces a missing tensor; a tensor without one is required.
    pub instead: Option<String>,
}

/// The role of a batch's tensor in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A condition, which the model does not get when conditions are dropped.
    Condition,
    /// The valid tokens of a condition: 1, and 0 for padding. It is dropped with its condition.
    TokenMask,
    /// An input that is never dropped.
    Fixed,
}

impl BatchKey {
    /// Describes a required tensor.
    pub fn required(
        role: Role,
        names: &'static [&'static str],
        forms: &'static [&'static [&'static str]],
    ) -> Self {
        BatchKey { names, forms, role, instead: None }
    }

    /// Describes a tensor with a default; `instead` describes the default.
    pub fn optional(
        role: Role,
        names: &'static [&'static str],
        forms: &'static [&'static [&'static str]],
        instead: String,
    ) -> Self {
        BatchKey { names, forms, role, instead: Some(instead) }
    }
}

/// Shape of one sample's tensors, by key.
pub type Shapes = BTreeMap<String, Vec<i64>>;

/// Shapes of the training data: a sample of one resolution group, and the empty prompt under its
/// own keys.
#[derive(Clone, Copy, Debug)]
pub struct DataShapes<'s> {
    /// `[C, (F,) H, W]`.
    pub latents: &'s [i64],
    pub sample: &'s Shapes,
    /// Shapes by key, without the prefix that batches use.
    pub empty_prompt: &'s Shapes,
}

/// Returns the same batch with a sample axis in front of each tensor that the adapter reads and
/// that lacks one: the tensor then holds for all samples, as in the reference. Batches of a dataset
/// are left unchanged, and so is a tensor whose first axis is as long as the number of samples:
/// adding an axis there could give one sample the condition of another.
pub fn with_sample_axis(adapter: &dyn ModelAdapter, batch: &Batch) -> Batch {
    let mut whole = batch.alias();
    let Some(latents) = LATENTS
        .into_iter()
        .find_map(|name| batch.get(name))
        .filter(|_| batch.sample_ids.is_empty())
    else {
        return whole;
    };
    let samples = latents.size()[0];
    for key in adapter.keys() {
        let has_form = |axes: usize| key.forms.iter().any(|form| form.len() == axes);
        for (name, tensor) in key.names.iter().filter_map(|name| Some((*name, batch.get(name)?))) {
            let size = tensor.size();
            let is_sample = has_form(size.len()) && (size.is_empty() || !has_form(size.len() - 1));
            if is_sample && (samples == 1 || size.first() != Some(&samples)) {
                whole.tensors.insert(
                    name.into(),
                    tensor.unsqueeze(0).expand([&[samples], &size[..]].concat(), false),
                );
            }
        }
    }
    whole
}

/// A remark on data and settings that fit each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Note {
    /// Probably a mistake.
    Warning(String),
    /// Nothing is wrong.
    Information(String),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Note::Warning(text) | Note::Information(text)) = self;
        f.write_str(text)
    }
}

/// Compares data with the keys that an adapter and the settings read. Returns remarks: keys that
/// are not read, and defaults that replace missing keys.
///
/// # Errors
/// The first mistake, described: a key that is missing, or has the wrong axes.
pub fn check_keys(
    adapter: &dyn ModelAdapter,
    settings: &FlowMatchingSettings,
    data: DataShapes<'_>,
) -> Result<Vec<Note>, String> {
    let keys = adapter.keys();
    let mut sizes = latent_sizes(data.latents);
    let mut notes = Vec::new();
    for key in &keys {
        match key.names.iter().find_map(|name| Some((*name, data.sample.get(*name)?))) {
            Some((name, shape)) => bind(name, shape, key.forms, &mut sizes)?,
            None => notes.push(Note::Warning(missing(key, adapter, data.sample)?)),
        }
    }
    if settings.apply_loss_mask {
        let no_mask = || {
            format!(
                "apply_loss_mask is set and the data have no `{LOSS_MASK}`{}",
                written_otherwise(&[LOSS_MASK], data.sample)
            )
        };
        axes_of_mask(data.sample.get(LOSS_MASK).ok_or_else(no_mask)?, data.latents)?;
    }
    check_empty_prompt(adapter, settings, data)?;
    notes.extend(unread(&keys, settings, data.sample).map(Note::Information));
    notes.extend(dropout_without_effect(adapter, settings).map(Note::Warning));
    notes.extend(settings.warnings().into_iter().map(Note::Warning));
    Ok(notes)
}

/// Returns the latents' axes by name.
fn latent_sizes(latents: &[i64]) -> BTreeMap<&'static str, i64> {
    let names: &[&'static str] =
        if latents.len() == 4 { &["C", "F", "H", "W"] } else { &["C", "H", "W"] };
    names.iter().copied().zip(latents.iter().copied()).collect()
}

/// Matches a shape with the first form of as many axes, and records the sizes by name.
fn bind(
    name: &str,
    shape: &[i64],
    forms: &[&[&'static str]],
    sizes: &mut BTreeMap<&'static str, i64>,
) -> Result<(), String> {
    let shown = || {
        forms.iter().map(|axes| format!("[{}]", axes.join(", "))).collect::<Vec<_>>().join(" or ")
    };
    let Some(axes) = forms.iter().find(|axes| axes.len() == shape.len()) else {
        return Err(format!("`{name}` is {shape:?} a sample, expected {}", shown()));
    };
    for (axis, &size) in axes.iter().zip(shape) {
        let known = *sizes.entry(*axis).or_insert(size);
        if known != size {
            return Err(format!(
                "`{name}` is {shape:?} a sample, expected {} with {axis} = {known}",
                shown()
            ));
        }
    }
    Ok(())
}

/// Describes the default of a missing key.
///
/// # Errors
/// A description of a missing key that has no default.
fn missing(key: &BatchKey, adapter: &dyn ModelAdapter, sample: &Shapes) -> Result<String, String> {
    let names = key.names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" or ");
    let otherwise = written_otherwise(key.names, sample);
    match &key.instead {
        Some(instead) => {
            Ok(format!("the data have no {names}{otherwise}; the model is given {instead}"))
        }
        None => {
            let form = key.forms[0].join(", ");
            let held = sample.keys().cloned().collect::<Vec<_>>().join(", ");
            Err(format!(
                "the {} adapter needs {names} [{form}] of each sample{otherwise}; the data have {held}",
                adapter.name()
            ))
        }
    }
}

/// Returns ` (is \`…\` meant?)` if the data have a key similar to one of these.
fn written_otherwise(names: &[&str], sample: &Shapes) -> String {
    let alike =
        |key: &str| names.iter().map(|name| strsim::jaro_winkler(key, name)).fold(0.0, f64::max);
    let nearest = sample.keys().map(|key| (alike(key), key)).filter(|(score, _)| *score >= ALIKE);
    let nearest = nearest.max_by(|a, b| a.0.total_cmp(&b.0));
    nearest.map_or_else(String::new, |(_, key)| format!(" (is their `{key}` meant?)"))
}

/// Returns a line about the keys that neither the adapter nor the settings read.
fn unread(keys: &[BatchKey], settings: &FlowMatchingSettings, sample: &Shapes) -> Option<String> {
    let mask = settings.apply_loss_mask.then_some(LOSS_MASK);
    let latents = LATENTS.into_iter().find(|name| sample.contains_key(*name));
    let first_of =
        |key: &BatchKey| key.names.iter().copied().find(|name| sample.contains_key(*name));
    let read: Vec<&str> = keys.iter().filter_map(first_of).chain(mask).chain(latents).collect();
    let unread: Vec<String> = sample
        .keys()
        .filter(|key| !read.contains(&key.as_str()))
        .map(|key| format!("`{key}`"))
        .collect();
    (!unread.is_empty())
        .then(|| format!("keys of the data that nobody reads: {}", unread.join(", ")))
}

/// Returns a line about a dropout that has no effect, because neither the adapter nor the pipeline
/// drops anything.
fn dropout_without_effect(
    adapter: &dyn ModelAdapter,
    settings: &FlowMatchingSettings,
) -> Option<String> {
    let without = settings.cfg_dropout_prob > 0.0
        && settings.cfg_dropout == CfgDropout::Adapter
        && adapter.dropout().is_none();
    without.then(|| {
        format!(
            "cfg_dropout_prob = {} drops nothing: the {} adapter drops no conditions; cfg_dropout = \"per_sample\" does",
            settings.cfg_dropout_prob,
            adapter.name()
        )
    })
}

/// Checks that the empty prompt has a row for every condition that it may replace.
fn check_empty_prompt(
    adapter: &dyn ModelAdapter,
    settings: &FlowMatchingSettings,
    data: DataShapes<'_>,
) -> Result<(), String> {
    let drops = settings.cfg_dropout == CfgDropout::PerSample || adapter.dropout().is_some();
    if settings.cfg_dropout_prob <= 0.0
        || settings.cfg_dropout_value != CfgDropoutValue::EmptyPrompt
        || !drops
    {
        return Ok(());
    }
    for name in dropped_keys(adapter, settings.cfg_dropout_value) {
        let Some(shape) = data.sample.get(name) else { continue };
        let missing = || {
            format!(
                "cfg_dropout_value is \"empty_prompt\" and the data's empty prompt has no `{name}`"
            )
        };
        check_empty_row(name, data.empty_prompt.get(name).ok_or_else(missing)?, shape)?;
    }
    Ok(())
}

/// Returns the keys whose rows are replaced when a sample's conditions are dropped: conditions, and
/// if the empty prompt replaces them also their masks, since it has its own.
pub fn dropped_keys(adapter: &dyn ModelAdapter, value: CfgDropoutValue) -> Vec<&'static str> {
    let with_masks = value == CfgDropoutValue::EmptyPrompt;
    let goes = |role: Role| role == Role::Condition || (with_masks && role == Role::TokenMask);
    adapter
        .keys()
        .into_iter()
        .filter(|key| goes(key.role))
        .flat_map(|key| key.names)
        .copied()
        .collect()
}

/// Refuses an empty prompt that does not fit into a sample's row of `shape`: only its first axis
/// may be shorter.
pub(super) fn check_empty_row(name: &str, empty: &[i64], shape: &[i64]) -> Result<(), String> {
    if empty.len() != shape.len()
        || empty.first() > shape.first()
        || empty.get(1..) != shape.get(1..)
    {
        return Err(format!(
            "`{EMPTY}{name}` {empty:?} is no row of `{name}`, which is {shape:?} a sample"
        ));
    }
    Ok(())
}
