//! The linear maps that low-rank changes are added to, and the change of each.

use crate::error::{Error, Result};
use crate::model::{Architecture, Dtype};
use crate::nn::{LowRankChange, ParamSet, Stage};
use crate::settings::GlobMap;
use crate::tuning::LoraSettings;
use crate::tuning::names::{means, nearest};

/// Names of sets of modules.
const ATTENTION: &str = "attention";
const ALL_LINEAR: &str = "all-linear";

/// The targets of `[lora]` in one model.
pub struct Targets<'s> {
    lora: &'s LoraSettings,
    rank: i64,
    /// Patterns of the targets.
    included: Vec<&'s str>,
    excluded: &'s [String],
}

impl<'s> Targets<'s> {
    /// # Errors
    /// [`Error::Config`] if a pattern matches no linear map of the model, with the nearest name.
    pub fn new(
        lora: &'s LoraSettings,
        model: &dyn Architecture,
        stages: &[Box<dyn Stage>],
    ) -> Result<Self> {
        let Some(rank) = lora.rank else {
            return Ok(Targets { lora, rank: 0, included: Vec::new(), excluded: &[] });
        };
        let included = lora.target_modules.iter().flat_map(|target| match target.as_str() {
            ATTENTION => model.attention_modules().to_vec(),
            ALL_LINEAR => vec!["*"],
            glob => vec![glob],
        });
        let targets =
            Targets { lora, rank, included: included.collect(), excluded: &lora.exclude_modules };
        targets.check(stages)?;
        Ok(targets)
    }

    fn check(&self, stages: &[Box<dyn Stage>]) -> Result<()> {
        let linears = stages.iter().flat_map(|stage| stage.params().linears());
        let modules: Vec<&str> = linears.map(|info| module(&info.name)).collect();
        let targets: Vec<&str> =
            modules.iter().copied().filter(|module| self.is_target(module)).collect();
        let refuse = |key: &str, glob: &str, among: &[&str], what: &str| {
            let near = nearest(glob, among.iter().copied());
            let what = format!("`{glob}` matches no {what}; the nearest is {near}");
            Err(Error::config(format!("lora.{key}"), what))
        };
        let lacks = |glob: &&str, among: &[&str]| !among.iter().any(|module| means(glob, module));
        let globs = |globs: &'s [String]| globs.iter().map(String::as_str);
        let named = |glob: &&str| [ATTENTION, ALL_LINEAR].contains(glob);
        let mut own = globs(&self.lora.target_modules).filter(|glob| !named(glob));
        if let Some(glob) = own.find(|glob| lacks(glob, &modules)) {
            let words = [modules.as_slice(), &[ATTENTION, ALL_LINEAR]].concat();
            return refuse("target_modules", glob, &words, "linear map of the model");
        }
        if let Some(glob) = globs(self.excluded).find(|glob| lacks(glob, &modules)) {
            return refuse("exclude_modules", glob, &modules, "linear map of the model");
        }
        let patterns =
            |key, globs: Vec<&'s str>| match globs.into_iter().find(|glob| lacks(glob, &targets)) {
                Some(glob) => refuse(key, glob, &targets, "target"),
                None => Ok(()),
            };
        if targets.is_empty() {
            let what = "names no linear map of the model that exclude_modules leaves";
            return Err(Error::config("lora.target_modules", what));
        }
        patterns("rank_pattern", keys(&self.lora.rank_pattern))?;
        patterns("alpha_pattern", keys(&self.lora.alpha_pattern))
    }

    fn is_target(&self, module: &str) -> bool {
        self.included.iter().any(|glob| means(glob, module))
            && !self.excluded.iter().any(|glob| means(glob, module))
    }

    /// Returns the change of the linear map with this weight of a stage; `None` if it is no target.
    pub fn change_of(&self, weight: &str, params: &ParamSet) -> Option<LowRankChange> {
        let (lora, module) = (self.lora, module(weight));
        if !self.is_target(module) {
            return None;
        }
        let info = params.linears().find(|info| info.name == weight)?;
        let rank = *by_pattern(&lora.rank_pattern, module).unwrap_or(&self.rank);
        let alpha = by_pattern(&lora.alpha_pattern, module).or(lora.alpha.as_ref());
        let divisor = if lora.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        Some(LowRankChange {
            rank,
            scale: alpha.copied().unwrap_or(rank as f64) / divisor,
            init: lora.init.of(rank, info.shape[1]),
            precise: lora.dtype == Some(Dtype::Float32),
            with_magnitude: lora.use_dora,
            dropout: lora.dropout,
        })
    }
}

/// The module of a linear map's weight.
fn module(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

fn keys<T>(map: &GlobMap<T>) -> Vec<&str> {
    map.0.iter().map(|(glob, _)| glob.as_str()).collect()
}

/// Returns the value of the longest pattern that means the module, so that the order in which they
/// are written, and kept, does not matter.
fn by_pattern<'m, T>(map: &'m GlobMap<T>, module: &str) -> Option<&'m T> {
    let fitting = map.0.iter().filter(|(glob, _)| means(glob, module));
    fitting.max_by_key(|(glob, _)| (glob.len(), glob)).map(|(_, value)| value)
}
