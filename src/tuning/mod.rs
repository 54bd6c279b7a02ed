//! The part of a model that is trained, and how fast: all of it, the parameters that patterns name,
//! or low-rank changes of its linear maps (LoRA).

mod factors;
mod names;
mod settings;
mod targets;

pub use factors::Factors;
pub use settings::{LoraInit, LoraSettings};

use crate::error::{Error, Result};
use crate::model::Architecture;
use crate::nn::{FrozenDtype, ParamSet, Stage, Tuned};
use crate::tuning::names::{matched, nearest};
use crate::tuning::targets::Targets;

/// The part of a model that is trained.
#[derive(Clone, Copy, Debug)]
pub struct Tuning<'s> {
    /// Patterns of parameters that are trained as they are; with neither these nor low-rank changes
    /// all are.
    pub trainable: &'s [String],
    pub lora: &'s LoraSettings,
    /// The form in which frozen linear maps of blocks are held, if not as they are computed with.
    pub frozen_form: Option<FrozenDtype>,
}

impl Tuning<'_> {
    /// True if the whole model is trained.
    pub fn is_whole(&self) -> bool {
        self.trainable.is_empty() && self.lora.rank.is_none()
    }

    /// Returns a model's stages, of which only this part is trained.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern matches nothing, with the nearest name.
    pub fn of(&self, model: &dyn Architecture) -> Result<Vec<Box<dyn Stage>>> {
        let stages = model.stages()?;
        if self.is_whole() {
            return Ok(stages);
        }
        self.check_trainable(&stages)?;
        let targets = Targets::new(self.lora, model, &stages)?;
        let tuned = |stage: Box<dyn Stage>| {
            let is_trained = |name: &str| self.trainable.iter().any(|glob| matched(glob, name));
            let mut params = stage.params().freezing(|info| !is_trained(&info.name));
            if let Some(form) = self.frozen_form.filter(|_| is_block(stage.params())) {
                params = params.packing(form);
            }
            let weights: Vec<String> =
                stage.params().linears().map(|info| info.name.clone()).collect();
            for weight in weights {
                if let Some(change) = targets.change_of(&weight, stage.params()) {
                    params.change_by_low_rank(&weight, &change);
                }
            }
            Box::new(Tuned::new(stage, params)) as Box<dyn Stage>
        };
        Ok(stages.into_iter().map(tuned).collect())
    }

    fn check_trainable(&self, stages: &[Box<dyn Stage>]) -> Result<()> {
        let names = || {
            stages.iter().flat_map(|stage| stage.params().infos()).map(|info| info.name.as_str())
        };
        match self.trainable.iter().find(|glob| !names().any(|name| matched(glob, name))) {
            Some(glob) => {
                let what = format!(
                    "`{glob}` matches no parameter of the model; the nearest is {}",
                    nearest(glob, names())
                );
                Err(Error::config("train.trainable", what))
            }
            None => Ok(()),
        }
    }
}

/// True for a stage that is one of many alike, `blocks.7`. Those around them are small, and more
/// depends on each.
fn is_block(params: &ParamSet) -> bool {
    params.stage().ends_with(|letter: char| letter.is_ascii_digit())
}

/// The stages with all of their parameters frozen.
pub fn all_frozen(stages: Vec<Box<dyn Stage>>) -> Vec<Box<dyn Stage>> {
    let frozen = |stage: Box<dyn Stage>| {
        let params = stage.params().freezing(|_| true);
        Box::new(Tuned::new(stage, params)) as Box<dyn Stage>
    };
    stages.into_iter().map(frozen).collect()
}

/// The stages with low-rank changes `strength` times as strong as they were trained.
pub fn with_strength(stages: Vec<Box<dyn Stage>>, strength: f64) -> Vec<Box<dyn Stage>> {
    let scaled = |stage: Box<dyn Stage>| {
        let params = stage.params().clone().with_strength(strength);
        Box::new(Tuned::new(stage, params)) as Box<dyn Stage>
    };
    stages.into_iter().map(scaled).collect()
}

#[cfg(test)]
mod tests;
