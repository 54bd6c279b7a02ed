//! The tensors that an adapter reads of a batch: keys, axes and what becomes of them, so that data
//! are checked by their shapes before weights are loaded.

use std::collections::BTreeMap;
use std::fmt;

use super::adapter::ModelAdapter;
use super::loss::{LOSS_MASK, axes_of_mask};
use super::settings::{CfgDropout, CfgDropoutValue, FlowMatchingSettings};
use crate::data::{Batch, EMPTY};

/// Keys of the latents; the first that is there is read.
pub const LATENTS: [&str; 2] = ["video_latents", "image_latents"];

/// How like an unread key must be to one that is missing to be taken for a slip of the pen.
const ALIKE: f64 = 0.85;

/// One tensor that an adapter reads of each sample.
#[derive(Clone, Debug)]
pub struct BatchKey {
    /// The keys that it may have; the first that is there is read.
    pub names: &'static [&'static str],
    /// Names of one sample's axes, in each form that it may have. `C`, `F`, `H` and `W` are the
    /// latents' own; any other name stands for one size in all of an adapter's keys.
    pub forms: &'static [&'static [&'static str]],
    pub role: Role,
    /// The words for what stands in where no such key is there; a tensor without them is required.
    pub instead: Option<String>,
}

/// What a tensor of a batch is to training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// What the model is told of a sample, and is not where conditions are dropped.
    Condition,
    /// The tokens of a condition that count: 1, and 0 for padding. It goes with its condition.
    TokenMask,
    /// What the model is always told.
    Fixed,
}

impl BatchKey {
    /// A tensor that must be there.
    pub fn required(
        role: Role,
        names: &'static [&'static str],
        forms: &'static [&'static [&'static str]],
    ) -> Self {
        BatchKey { names, forms, role, instead: None }
    }

    /// A tensor that something stands in for where it is missing: `instead`, in words.
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

/// Shapes of what a run is trained on: a sample of one resolution group, and the empty prompt under
/// its own keys.
#[derive(Clone, Copy, Debug)]
pub struct DataShapes<'s> {
    /// `[C, (F,) H, W]`.
    pub latents: &'s [i64],
    pub sample: &'s Shapes,
    /// Without the prefix that batches give them.
    pub empty_prompt: &'s Shapes,
}

/// The same batch with an axis for samples in front of each tensor that an adapter reads and that
/// lacks it: it then holds for all samples, as in the reference. Batches of a dataset are left as
/// they are, and so is a tensor whose first axis has as many entries as there are samples: taken
/// for a missing axis, it would make one sample's condition another's.
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

/// A line on data and settings that fit, for those who look at them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Note {
    /// Probably not what was meant.
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

/// Compares data with what an adapter and the settings read of them. Returns what a user should
/// know though nothing is wrong: keys that nobody reads, and what stands in for keys that are
/// missing.
///
/// # Errors
/// The first mistake in words: a key that is missing, or has other axes than it must have.
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
    Ok(notes)
}

/// The latents' axes by name.
fn latent_sizes(latents: &[i64]) -> BTreeMap<&'static str, i64> {
    let names: &[&'static str] =
        if latents.len() == 4 { &["C", "F", "H", "W"] } else { &["C", "H", "W"] };
    names.iter().copied().zip(latents.iter().copied()).collect()
}

/// Takes the axes of a shape for those of the first form that has as many, and remembers their
/// sizes.
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

/// The words for what stands in for a missing key.
///
/// # Errors
/// The words for a key that nothing stands in for.
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

/// ` (is \`…\` meant?)` where the data have a key that is nearly one of these.
fn written_otherwise(names: &[&str], sample: &Shapes) -> String {
    let alike =
        |key: &str| names.iter().map(|name| strsim::jaro_winkler(key, name)).fold(0.0, f64::max);
    let nearest = sample.keys().map(|key| (alike(key), key)).filter(|(score, _)| *score >= ALIKE);
    let nearest = nearest.max_by(|a, b| a.0.total_cmp(&b.0));
    nearest.map_or_else(String::new, |(_, key)| format!(" (is their `{key}` meant?)"))
}

/// A line for the keys that neither the adapter nor the settings read.
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

/// A line for a dropout that the adapter leaves to others, who do not drop either.
fn dropout_without_effect(
    adapter: &dyn ModelAdapter,
    settings: &FlowMatchingSettings,
) -> Option<String> {
    let without = settings.cfg_dropout_prob > 0.0
        && settings.cfg_dropout == CfgDropout::Adapter
        && !adapter.drops_conditions();
    without.then(|| {
        format!(
            "cfg_dropout_prob = {} drops nothing: the {} adapter drops no conditions; cfg_dropout = \"per_sample\" does",
            settings.cfg_dropout_prob,
            adapter.name()
        )
    })
}

/// The empty prompt has a row for every condition that may become it.
fn check_empty_prompt(
    adapter: &dyn ModelAdapter,
    settings: &FlowMatchingSettings,
    data: DataShapes<'_>,
) -> Result<(), String> {
    let drops = settings.cfg_dropout == CfgDropout::PerSample || adapter.drops_conditions();
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

/// The keys whose rows are replaced where a sample's conditions are dropped: conditions, and their
/// masks where the empty prompt comes in, which has its own.
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

/// Refuses an empty prompt that does not fit into a sample's row of `shape`: its first axis may be
/// shorter.
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
