//! The model family of a cache: which one it says, and whether its tensors are those that the
//! family trains on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use tch::{Kind, Tensor};

use super::sample::{Cache, Cached};
use crate::adapter::{AdapterChoice, AdapterSettings, Simple};
use crate::data::{TEXTS, latents_key};
use crate::datasets::Samples;
use crate::encoding::Family;
use crate::error::{Error, Result};
use crate::flow::{DataShapes, FlowMatchingSettings, ModelAdapter, check_keys};
use crate::model::Model;
use crate::settings::{Choice, Family as _};

/// Factor by which HunyuanVideo 1.5's pipeline scales latents.
pub(super) const HUNYUAN_SCALE: f64 = 1.03682;
/// Standard deviation above which latents of FLUX.2 are not normalized: that of its VAE's own
/// latents is near 1.78, and normalized by its statistics near 1.
const FLUX2_SPREAD: f64 = 1.35;
/// Samples whose latents are looked at.
const LOOKED_AT: usize = 8;

/// Returns the family that a cache names by a word of its own trainer, or the one that the user
/// names where the word is unknown.
///
/// `what`: the word's place, such as "its model_type".
///
/// # Errors
/// [`Error::Data`] if both are missing.
pub(super) fn named_family(
    word: &str,
    what: &str,
    known: &[(&str, Family)],
    wanted: Option<Family>,
    path: &Path,
) -> Result<Family> {
    let found = known.iter().find(|(known, _)| *known == word).map(|(_, family)| *family);
    found.or(wanted).ok_or_else(|| {
        let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
        let what = format!(
            "is of model `{word}` by {what}; expected one of {}, or --family, which takes it \
             for a cache of that family",
            words.join(", ")
        );
        Error::data(path, what)
    })
}

/// Returns the families whose models are published, of which other trainers have caches.
fn published() -> impl Iterator<Item = Family> {
    Family::ALL.iter().map(|(_, family)| *family).filter(|family| *family != Family::Dit)
}

/// Returns the adapter that prepares such a sample.
fn adapter(family: Family, cached: &Cached) -> Box<dyn ModelAdapter> {
    if family == Family::Wan {
        let image_conditioning = cached.sample.layout.contains_key("condition_latents");
        return Simple { image_conditioning, ..Simple::default() }.build();
    }
    let model = Model::named(family.word()).expect("a family has its table");
    AdapterChoice::named(model.adapter()).expect("a model names an adapter").build()
}

/// Refuses a sample whose tensors the family's adapter does not take.
fn check(family: Family, cached: &Cached) -> Result<(), String> {
    let layout = &cached.sample.layout;
    let latents = layout.get(latents_key(family.data_type));
    let Some(latents) = latents.map(|latents| &latents.shape) else {
        let (wanted, found) = (family.data_type.word(), cached.data_type().word());
        return Err(format!("the family trains on {wanted} data, the cache holds {found} data"));
    };
    let adapter = adapter(family, cached);
    let mut sample: BTreeMap<String, Vec<i64>> =
        layout.iter().map(|(key, tensor)| (key.clone(), tensor.shape.clone())).collect();
    let read: Vec<&str> = adapter.keys().iter().flat_map(|key| key.names).copied().collect();
    for (text, mask) in TEXTS {
        // Texts without padding get their masks in each batch.
        if let Some(tensor) = layout.get(text).filter(|_| read.contains(&mask)) {
            sample.entry(mask.into()).or_insert_with(|| vec![tensor.shape[0]]);
        }
    }
    let data = DataShapes { latents, sample: &sample, empty_prompt: &BTreeMap::new() };
    check_keys(&*adapter, &FlowMatchingSettings::default(), data).map(drop)
}

/// Returns the one family of all samples, whose tensors are those that it trains on; `None` if the
/// cache does not say it and they fit several.
///
/// # Errors
/// [`Error::Data`] naming a sample of another family than the user or the first sample names, or
/// one that the family cannot train on.
pub(super) fn agreed_family(cached: &[Cached], wanted: Option<Family>) -> Result<Option<Family>> {
    let first = wanted.or_else(|| cached.iter().find_map(|sample| sample.family));
    let other = |sample: &&Cached| sample.family.is_some_and(|family| Some(family) != first);
    if let (Some(first), Some(sample)) = (first, cached.iter().find(other)) {
        let found = sample.family.expect("it differs").word();
        let what = match wanted {
            Some(_) => format!("is of family {found}, and --family says {}", first.word()),
            None => format!(
                "is of family {found}, and other samples of {}; import them apart",
                first.word()
            ),
        };
        return Err(Error::data(sample.path(), what));
    }
    if let Some(family) = first {
        for sample in cached {
            check(family, sample).map_err(|what| {
                let what = format!("cannot be trained on as {}: {what}", family.word());
                Error::data(sample.path(), what)
            })?;
        }
        return Ok(first);
    }
    let mut fitting: BTreeSet<Family> = published().collect();
    for sample in cached {
        fitting.retain(|family| check(*family, sample).is_ok());
        if fitting.is_empty() {
            let held: Vec<&str> = sample.sample.layout.keys().map(String::as_str).collect();
            let what = format!(
                "holds what no family trains on together: {}; --family tells what one lacks",
                held.join(", ")
            );
            return Err(Error::data(sample.path(), what));
        }
    }
    Ok(fitting.first().copied().filter(|_| fitting.len() == 1))
}

/// Refuses latents of FLUX.2 that were not normalized by the statistics of its VAE.
///
/// # Errors
/// [`Error::Data`] with a way out; errors of reading.
pub(super) fn check_normalized(cache: &Cache, path: &Path) -> Result<()> {
    let count = cache.list().len();
    let step = count.div_ceil(LOOKED_AT).max(1);
    let mut values = Vec::new();
    for index in (0..count).step_by(step) {
        let latents = cache.read_key(index, latents_key(Family::Flux2.data_type))?;
        values.extend(latents.map(|latents| latents.to_kind(Kind::Float).flatten(0, -1)));
    }
    let spread = Tensor::cat(&values, 0).std(false).double_value(&[]);
    // NaN, of numbers that are not finite, is told where data are checked.
    if spread > FLUX2_SPREAD {
        let what = format!(
            "holds latents of FLUX.2 before normalization: their standard deviation is {spread:.2}, \
             that of normalized ones near 1; let today's version of its trainer cache them anew"
        );
        return Err(Error::data(path, what));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_has_its_table_and_an_adapter() {
        for (word, _) in Family::ALL {
            let model = Model::named(word).unwrap_or_else(|| panic!("{word} is no model"));
            assert!(AdapterChoice::named(model.adapter()).is_some(), "{word}");
        }
    }
}
