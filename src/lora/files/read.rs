//! Reads a file of any dialect: names are resolved in each family, and the one is taken in which
//! all have their place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Kind, Tensor};

use super::config::LoraConfig;
use super::keys::{self, Key, Prefix, Role};
use super::{Dialect, diffusers, facts, peft, rows};
use crate::error::{Error, Result};
use crate::files::outputs::Named;
use crate::files::safetensors::SafeTensors;
use crate::lora::family::{Family, Match, Part};
use crate::lora::{Adapter, Pair, listed};
use crate::settings::{Choice, nearest};

/// Longest `adapter_config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// An adapter as it was found.
#[derive(Debug)]
pub struct Found {
    pub adapter: Adapter,
    pub dialect: Dialect,
    pub family: Family,
}

/// Reads an adapter: a file of any dialect, or a folder of PEFT's or diffusers'. `family` says what
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
        let (stems, dialect) = self.stems()?;
        let modules: Vec<&str> = stems.values().map(|tensors| tensors.module).collect();
        let candidates = self.candidates(&modules, family)?;
        let stored: Vec<(&str, Pair)> = stems
            .iter()
            .map(|(stem, tensors)| Ok((tensors.module, self.pair(stem, tensors)?)))
            .collect::<Result<_>>()?;
        let pairs = candidates.iter().map(|family| (*family, self.named(&stored, *family)));
        let (mut fitting, misfits): (Vec<_>, Vec<_>) = pairs.partition(|(_, pairs)| pairs.is_ok());
        if fitting.len() > 1 {
            self.tell_apart(&mut fitting)?;
        }
        let Some((family, Ok(mut pairs))) = fitting.pop() else {
            let what = misfits.into_iter().find_map(|(_, pairs)| pairs.err()).unwrap_or_default();
            return Err(self.file.refused(what));
        };
        self.check_ranks(&stored, &pairs)?;
        if let Some(config) = &self.config {
            self.take_config(config, &mut pairs, &stems)?;
        }
        let mut adapter = Adapter { pairs, facts: facts::read(self.safetensors.metadata()) };
        if let Some(config) = &self.config {
            let facts = &mut adapter.facts;
            facts.base_model = facts.base_model.take().or_else(|| config.base_model.clone());
            if facts.targets.is_empty() {
                facts.targets = config.targets.clone();
            }
        }
        Ok(Found { adapter, dialect, family })
    }

    /// Sorts the file's tensors by the module that they belong to.
    fn stems(&self) -> Result<(BTreeMap<&str, Tensors<'_>>, Dialect)> {
        let mut stems: BTreeMap<&str, Tensors<'_>> = BTreeMap::new();
        let (mut prefixes, mut others) = (BTreeSet::new(), BTreeMap::new());
        for name in self.safetensors.tensors().iter().map(|info| info.name.as_str()) {
            let Key { stem, prefix, module, role } = match keys::parse(name) {
                Ok(key) => key,
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
            prefixes.insert(prefix as u8);
        }
        if let Some((what, names)) = others.into_iter().next() {
            let what = what.unwrap_or("no part of a LoRA that is known here");
            let more =
                if names.len() > 1 { format!(", of {} such", names.len()) } else { String::new() };
            return Err(self.file.refused(format!("`{}` is {what}{more}", names[0])));
        }
        if stems.is_empty() {
            return Err(self.file.refused("holds no adapter"));
        }
        let has = |prefix: Prefix| prefixes.contains(&(prefix as u8));
        let has_alphas = stems.values().any(|tensors| tensors.alpha.is_some());
        let dialect = if has(Prefix::Kohya) {
            Dialect::Kohya
        } else if has(Prefix::Peft) {
            Dialect::Peft
        } else if has(Prefix::Comfyui) || has_alphas {
            Dialect::Comfyui
        } else {
            Dialect::Diffusers
        };
        Ok((stems, dialect))
    }

    /// Returns the families that have all names.
    fn candidates(&self, modules: &[&str], family: Option<Family>) -> Result<Vec<Family>> {
        let families: Vec<Family> = match family {
            Some(family) => vec![family],
            None => Family::ALL.iter().map(|(_, family)| *family).collect(),
        };
        let unknown = |family: &Family| {
            modules.iter().filter(|module| family.matches(module).is_empty()).count()
        };
        let least = families.iter().map(unknown).min().unwrap_or_default();
        if least == 0 {
            return Ok(families.into_iter().filter(|family| unknown(family) == 0).collect());
        }
        if family.is_none() && least == modules.len() {
            let titles: Vec<&str> = families.iter().map(|family| family.title).collect();
            return Err(self.file.refused(format!(
                "adapts `{}`, a name of no family that is known here: {}",
                modules[0],
                titles.join(", ")
            )));
        }
        let nearest_family = families.iter().find(|family| unknown(family) == least);
        let family = *nearest_family.expect("the least is one of them");
        let strange = modules.iter().filter(|module| family.matches(module).is_empty());
        let told: Vec<String> = strange.map(|module| unknown_module(module, family)).collect();
        Err(self.file.refused(format!("is not of {}: {}", family.title, listed(&told))))
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
                "`{name}` has shape {:?}, expected a matrix; adapters of convolutions are not known here",
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
                "`{name}` is {:?}, no kind of numbers that an adapter has",
                tensor.kind()
            )));
        }
        if tensor.isfinite().all().int64_value(&[]) != 1 {
            return Err(self.file.refused(format!("`{name}` holds numbers that are not finite")));
        }
        Ok(tensor)
    }

    /// Returns the pairs under diffusers' names.
    fn named(
        &self,
        stored: &[(&str, Pair)],
        family: Family,
    ) -> Result<BTreeMap<String, Pair>, String> {
        let mut pairs = BTreeMap::new();
        for (module, pair) in stored {
            let matches = family.matches(module);
            let about = |what: String| format!("`{module}` of {} {what}", family.title);
            for (name, pair) in placed(&matches, pair).map_err(about)? {
                if pairs.insert(name.clone(), pair).is_some() {
                    return Err(format!("adapts `{name}` twice, once as `{module}`"));
                }
            }
        }
        Ok(pairs)
    }

    /// Keeps the one family that the metadata or the published sizes tell.
    fn tell_apart(
        &self,
        fitting: &mut Vec<(Family, Result<BTreeMap<String, Pair>, String>)>,
    ) -> Result<()> {
        let named = facts::family(self.safetensors.metadata());
        if named.is_some_and(|named| fitting.iter().any(|(family, _)| *family == named)) {
            fitting.retain(|(family, _)| Some(*family) == named);
            return Ok(());
        }
        for has_size in [within, exactly] {
            let sized: Vec<Family> = fitting
                .iter()
                .filter(|(family, pairs)| {
                    pairs.as_ref().is_ok_and(|pairs| has_size(*family, pairs))
                })
                .map(|(family, _)| *family)
                .collect();
            if !sized.is_empty() {
                fitting.retain(|(family, _)| sized.contains(family));
            }
        }
        if let [_] = fitting[..] {
            return Ok(());
        }
        let title = |(family, _): &(Family, _)| format!("{} ({})", family.title, family.word());
        let titles: Vec<String> = fitting.iter().map(title).collect();
        Err(self.file.refused(format!(
            "has names that {} have; say which it is by --family",
            titles.join(" and ")
        )))
    }

    /// Refuses metadata with a rank that no matrix has.
    fn check_ranks(&self, stored: &[(&str, Pair)], pairs: &BTreeMap<String, Pair>) -> Result<()> {
        let Some(told) = facts::read(self.safetensors.metadata()).rank else { return Ok(()) };
        let there = stored.iter().map(|(_, pair)| pair).chain(pairs.values());
        let ranks: BTreeSet<i64> = there.map(Pair::rank).collect();
        if ranks.contains(&told) {
            return Ok(());
        }
        let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
        Err(self.file.refused(format!(
            "its metadata tell of rank {told}, its matrices have {}",
            listed(&ranks)
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

fn unknown_module(module: &str, family: Family) -> String {
    let digits = |c: char| c.is_ascii_digit();
    let number: String =
        module.chars().skip_while(|c| !digits(*c)).take_while(|c| digits(*c)).collect();
    let known = family.spelled(if number.is_empty() { "0" } else { &number });
    let flat: Vec<String> = known.iter().map(|name| name.replace('.', "_")).collect();
    let spelled = if module.contains('.') { &known } else { &flat };
    match nearest(module, spelled.iter().map(String::as_str)) {
        Some(near) => format!("unknown `{module}`, the nearest is `{near}`"),
        None => format!("unknown `{module}`"),
    }
}

/// Highest number of a block behind `prefix`, plus one.
fn blocks(pairs: &BTreeMap<String, Pair>, prefix: &str) -> u32 {
    let number = |name: &String| {
        let rest = name.strip_prefix(prefix)?.strip_prefix('.')?;
        rest.split('.').next()?.parse::<u32>().ok()
    };
    pairs.keys().filter_map(number).max().map_or(0, |number| number.saturating_add(1))
}

/// True if a published model of the family has these blocks, of that width.
fn sized(family: Family, pairs: &BTreeMap<String, Pair>, compare: fn(u32, u32) -> bool) -> bool {
    let is_query = |name: &str| name.ends_with(".attn.to_q") || name.ends_with(".attn.add_q_proj");
    let mut widths = pairs.iter().filter(|(name, _)| is_query(name)).map(|(_, pair)| pair.inputs());
    let width = widths.next();
    let double = blocks(pairs, "transformer_blocks");
    let single = blocks(pairs, "single_transformer_blocks");
    family.published.iter().any(|model| {
        width.is_none_or(|width| width == model.width)
            && compare(double, model.double)
            && compare(single, model.single)
    })
}

fn within(family: Family, pairs: &BTreeMap<String, Pair>) -> bool {
    sized(family, pairs, |found, published| found <= published)
}

/// As most adapters have it: in all blocks of a kind or in none.
fn exactly(family: Family, pairs: &BTreeMap<String, Pair>) -> bool {
    sized(family, pairs, |found, published| found == published || found == 0)
}
