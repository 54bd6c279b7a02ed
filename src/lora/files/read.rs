//! Reads a file of any dialect: names are resolved in each family, and the one is taken in which
//! all have their place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use super::config::LoraConfig;
use super::keys::{self, Key, Prefix, Role};
use super::{Dialect, diffusers, facts, identify, peft, rows};
use crate::error::{Error, Result};
use crate::files::outputs::Named;
use crate::files::safetensors::SafeTensors;
use crate::lora::family::{Family, Match, Part};
use crate::lora::{Lora, Pair, listed};

/// Longest configuration of peft's that is read; one that names a thousand modules has 100 KB.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Most tensors; four of each linear map of the largest model are 4000.
const MAX_TENSORS: usize = 16_384;
/// Most targets that are taken over from peft's configuration, and the longest.
const MAX_TARGETS: usize = 32;
const MAX_TARGET_BYTES: usize = 100;

/// A LoRA as it was found.
#[derive(Debug)]
pub struct Found {
    pub lora: Lora,
    pub dialect: Dialect,
    pub family: Family,
    /// Number of tensors of text encoders beside it, which were left out.
    pub of_text_encoders: usize,
}

/// Reads a LoRA: a file of any dialect, or a folder of PEFT's or diffusers'. `family` says what
/// names alone may leave open.
///
/// # Errors
/// [`Error::Config`] naming the file and what is wrong with it: tensors that are no part of a LoRA,
/// names of no family or of several, a matrix without its other half, shapes that do not fit, a
/// rank in the metadata that the matrices do not have, numbers that are not finite.
/// [`Error::Data`] if it is no safetensors file.
pub fn read(file: Named<'_>, family: Option<Family>) -> Result<Found> {
    let path = located(file)?;
    let safetensors = SafeTensors::open(&path)?;
    let source = Source { file, config: config(file, &path, &safetensors)?, safetensors };
    source.read(family)
}

/// Returns the file of tensors in a folder.
fn located(file: Named<'_>) -> Result<PathBuf> {
    if !file.path.is_dir() {
        return Ok(file.path.into());
    }
    let names = [peft::FILE, diffusers::FILE];
    let found = names.iter().map(|name| file.path.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| file.refused(format!("is a folder without {}", names.join(" or "))))
}

/// Reads peft's configuration from the metadata or from the file beside PEFT's.
fn config(file: Named<'_>, path: &Path, safetensors: &SafeTensors) -> Result<Option<LoraConfig>> {
    let refused = |place: &str, what: &str| file.refused(format!("{place}: {what}"));
    let parse = |place: &str, text: &[u8]| {
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(refused(place, "is longer than any real one"));
        }
        let fields: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|error| refused(place, &format!("is no JSON object: {error}")))?;
        LoraConfig::parse(&fields, diffusers::PREFIX).map_err(|what| refused(place, &what))
    };
    if let Some(text) = safetensors.metadata().get(diffusers::METADATA) {
        return parse(diffusers::METADATA, text.as_bytes()).map(Some);
    }
    let is_peft = safetensors.tensors().iter().any(|info| info.name.starts_with(peft::PREFIX));
    if !is_peft {
        return Ok(None);
    }
    let beside = path.with_file_name(peft::CONFIG);
    match fs::metadata(&beside) {
        Ok(found) if found.is_file() && found.len() <= MAX_CONFIG_BYTES => {
            let text = fs::read(&beside).map_err(Error::storage(&beside, "read"))?;
            parse(peft::CONFIG, &text).map(Some)
        }
        _ => Err(file.refused(format!(
            "has PEFT's names, and no {} beside it, which has the alpha",
            peft::CONFIG
        ))),
    }
}

struct Source<'f> {
    file: Named<'f>,
    safetensors: SafeTensors,
    config: Option<LoraConfig>,
}

/// The tensors of one stem.
#[derive(Default)]
struct Tensors<'n> {
    module: &'n str,
    a: Option<&'n str>,
    b: Option<&'n str>,
    alpha: Option<&'n str>,
    magnitude: Option<&'n str>,
}

impl Source<'_> {
    fn read(&self, family: Option<Family>) -> Result<Found> {
        let (stems, dialect, of_text_encoders) = self.stems()?;
        let modules: Vec<&str> = stems.values().map(|tensors| tensors.module).collect();
        let refused = |what: String| self.file.refused(what);
        let candidates = identify::candidates(&modules, family).map_err(refused)?;
        let stored: Vec<(&str, Pair)> = stems
            .iter()
            .map(|(stem, tensors)| Ok((tensors.module, self.pair(stem, tensors)?)))
            .collect::<Result<_>>()?;
        let (mut readings, mut misfit) = (Vec::new(), None);
        for family in candidates {
            match named(&stored, family) {
                Ok(pairs) => readings.push((family, pairs)),
                Err(what) => drop(misfit.get_or_insert(what)),
            }
        }
        if let (true, Some(what)) = (readings.is_empty(), misfit) {
            return Err(refused(what));
        }
        let metadata = self.safetensors.metadata();
        let (family, mut pairs) = identify::told_apart(readings, metadata).map_err(refused)?;
        self.check_ranks(&stored, &pairs)?;
        if let Some(config) = &self.config {
            self.take_config(config, &mut pairs, &stems)?;
        }
        let mut lora = Lora { pairs, facts: facts::read(self.safetensors.metadata()) };
        if let Some(config) = &self.config {
            let facts = &mut lora.facts;
            facts.base_model = facts.base_model.take().or_else(|| config.base_model.clone());
            // Some programs list every module there, which tells nothing new.
            if facts.targets.is_empty() && config.targets.len() <= MAX_TARGETS {
                facts.targets = config.targets.clone();
                facts.targets.retain(|target| target.len() <= MAX_TARGET_BYTES);
            }
        }
        Ok(Found { lora, dialect, family, of_text_encoders })
    }

    /// Sorts the file's tensors by the module that they belong to.
    fn stems(&self) -> Result<(BTreeMap<&str, Tensors<'_>>, Dialect, usize)> {
        let count = self.safetensors.tensors().len();
        if count > MAX_TENSORS {
            let what = format!("holds {count} tensors, more than the {MAX_TENSORS} of any LoRA");
            return Err(self.file.refused(what));
        }
        let mut stems: BTreeMap<&str, Tensors<'_>> = BTreeMap::new();
        let (mut prefixes, mut others) = (BTreeSet::new(), BTreeMap::new());
        let mut of_text_encoders = 0;
        for name in self.safetensors.tensors().iter().map(|info| info.name.as_str()) {
            let Key { stem, prefix, module, role } = match keys::parse(name) {
                Ok(key) => key,
                Err(Some(keys::TEXT_ENCODER)) => {
                    of_text_encoders += 1;
                    continue;
                }
                Err(what) => {
                    others.entry(what).or_insert_with(Vec::new).push(name);
                    continue;
                }
            };
            let tensors = stems.entry(stem).or_default();
            tensors.module = module;
            let place = match role {
                Role::A => &mut tensors.a,
                Role::B => &mut tensors.b,
                Role::Alpha => &mut tensors.alpha,
                Role::Magnitude => &mut tensors.magnitude,
            };
            if let Some(other) = place.replace(name) {
                return Err(self
                    .file
                    .refused(format!("`{other}` and `{name}` are the same matrix")));
            }
            prefixes.insert(prefix);
        }
        if let Some((what, names)) = others.into_iter().next() {
            let what = what.unwrap_or("no part of a LoRA that is known here");
            let more =
                if names.len() > 1 { format!(", of {} such", names.len()) } else { String::new() };
            return Err(self.file.refused(format!("`{}` is {what}{more}", names[0])));
        }
        if stems.is_empty() {
            return Err(self.file.refused("holds no LoRA of a transformer"));
        }
        let has = |prefix: Prefix| prefixes.contains(&prefix);
        // Under diffusers' names, what diffusers does not write.
        let is_for_comfyui = stems.values().any(|tensors| tensors.alpha.is_some())
            || self.safetensors.metadata().keys().any(|key| key.starts_with("ss_"));
        let dialect = if has(Prefix::Kohya) {
            Dialect::Kohya
        } else if has(Prefix::Peft) {
            Dialect::Peft
        } else if has(Prefix::Comfyui) || is_for_comfyui {
            Dialect::Comfyui
        } else {
            Dialect::Diffusers
        };
        Ok((stems, dialect, of_text_encoders))
    }

    /// Reads one pair and checks its shapes and numbers.
    fn pair(&self, stem: &str, tensors: &Tensors<'_>) -> Result<Pair> {
        let half = |there: &str, missing: &str| {
            self.file.refused(format!("`{stem}` has {there} and no {missing}"))
        };
        let (a, b) = match (tensors.a, tensors.b) {
            (Some(a), Some(b)) => (self.matrix(a)?, self.matrix(b)?),
            (Some(_), None) => return Err(half("A (down)", "B (up)")),
            (None, Some(_)) => return Err(half("B (up)", "A (down)")),
            (None, None) => return Err(half("no matrices", "use")),
        };
        let (rank, columns) = (a.size()[0], b.size()[1]);
        if rank != columns || a.kind() != b.kind() {
            return Err(self.file.refused(format!(
                "`{stem}` has A {:?} {:?} and B {:?} {:?}, expected [r, inputs] and [outputs, r] of one kind",
                a.kind(),
                a.size(),
                b.kind(),
                b.size()
            )));
        }
        let alpha = match tensors.alpha {
            Some(name) => self.alpha(name)?,
            None => rank as f64,
        };
        let magnitude =
            tensors.magnitude.map(|name| self.magnitude(name, b.size()[0])).transpose()?;
        Ok(Pair { a, b, alpha, magnitude })
    }

    fn matrix(&self, name: &str) -> Result<Tensor> {
        let tensor = self.numbers(name)?;
        if tensor.dim() != 2 {
            return Err(self.file.refused(format!(
                "`{name}` has shape {:?}, expected a matrix; LoRAs of convolutions are not known here",
                tensor.size()
            )));
        }
        Ok(tensor)
    }

    fn alpha(&self, name: &str) -> Result<f64> {
        let tensor = self.safetensors.read(name)?;
        let alpha = (tensor.numel() == 1).then(|| tensor.flatten(0, -1).double_value(&[0]));
        alpha.filter(|alpha| alpha.is_finite() && *alpha != 0.0).ok_or_else(|| {
            self.file.refused(format!("`{name}` is no alpha: expected one number other than 0"))
        })
    }

    fn magnitude(&self, name: &str, outputs: i64) -> Result<Tensor> {
        let tensor = self.numbers(name)?;
        if tensor.numel() as i64 != outputs || tensor.size().first() != Some(&outputs) {
            return Err(self.file.refused(format!(
                "`{name}` has shape {:?}, expected one magnitude for each of {outputs} outputs",
                tensor.size()
            )));
        }
        Ok(tensor.flatten(0, -1))
    }

    fn numbers(&self, name: &str) -> Result<Tensor> {
        let tensor = self.safetensors.read(name)?;
        let kinds = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double];
        if !kinds.contains(&tensor.kind()) {
            return Err(self.file.refused(format!(
                "`{name}` is {:?}, no kind of numbers that a LoRA has",
                tensor.kind()
            )));
        }
        if tensor.isfinite().all().int64_value(&[]) != 1 {
            return Err(self.file.refused(format!("`{name}` holds numbers that are not finite")));
        }
        Ok(tensor)
    }

    /// Refuses metadata with a rank that no matrix has.
    fn check_ranks(&self, stored: &[(&str, Pair)], pairs: &BTreeMap<String, Pair>) -> Result<()> {
        let Some(told) = facts::read(self.safetensors.metadata()).rank else { return Ok(()) };
        let there = stored.iter().map(|(_, pair)| pair).chain(pairs.values());
        let ranks: BTreeSet<i64> = there.map(Pair::rank).collect();
        if ranks.contains(&told) {
            return Ok(());
        }
        Err(self.file.refused(format!(
            "its metadata tell of rank {told}, its matrices have {}",
            listed(ranks.iter().map(ToString::to_string))
        )))
    }

    /// Takes the alphas of peft's configuration, whose ranks must be those of the matrices.
    fn take_config(
        &self,
        config: &LoraConfig,
        pairs: &mut BTreeMap<String, Pair>,
        stems: &BTreeMap<&str, Tensors<'_>>,
    ) -> Result<()> {
        let has_alphas = stems.values().any(|tensors| tensors.alpha.is_some());
        for (name, pair) in pairs.iter_mut() {
            let (rank, alpha) = (config.rank_of(name), config.alpha_of(name));
            if rank != pair.rank() {
                return Err(self.file.refused(format!(
                    "its metadata give `{name}` rank {rank}, its matrices have {}",
                    pair.rank()
                )));
            }
            if has_alphas && pair.alpha != alpha {
                return Err(self.file.refused(format!(
                    "its metadata give `{name}` alpha {alpha}, its tensor {}",
                    pair.alpha
                )));
            }
            if config.has_magnitudes != pair.magnitude.is_some() {
                let [told, found] =
                    if config.has_magnitudes { ["DoRA", "no"] } else { ["no DoRA", "a"] };
                return Err(self.file.refused(format!(
                    "its metadata tell of {told}, and `{name}` has {found} magnitude"
                )));
            }
            pair.alpha = alpha;
        }
        Ok(())
    }
}

/// Returns the pairs under diffusers' names.
fn named(stored: &[(&str, Pair)], family: Family) -> Result<BTreeMap<String, Pair>, String> {
    let mut pairs = BTreeMap::new();
    for (module, pair) in stored {
        let about = |what: String| format!("`{module}` of {} {what}", family.title);
        for (name, pair) in placed(&family.matches(module), pair).map_err(about)? {
            if pairs.insert(name.clone(), pair).is_some() {
                return Err(format!("adapts `{name}` twice, once as `{module}`"));
            }
        }
    }
    Ok(pairs)
}

/// The pair under diffusers' names of the maps that it is for.
fn placed(matches: &[Match<'_>], pair: &Pair) -> Result<Vec<(String, Pair)>, String> {
    match matches {
        [one] => Ok(vec![(
            one.name(),
            match one.part {
                Part::Swapped => rows::swapped(pair)?,
                _ => pair.shallow_clone(),
            },
        )]),
        several => {
            let of = several.iter().find_map(|found| match found.part {
                Part::Slice { of, .. } => Some(of),
                _ => None,
            });
            let parts = rows::parted(pair, of.expect("several maps are slices"))?;
            let named = several.iter().zip(parts);
            Ok(named.filter_map(|(found, part)| Some((found.name(), part?))).collect())
        }
    }
}
