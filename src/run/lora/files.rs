//! The LoRA of a checkpoint as files for other programs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::RunConfig;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::files::outputs::Named;
use crate::lora::{self, Dialect, Facts, Lora, Pair};
use crate::nn::Stage;
use crate::run::checkpoint::{self, SavedWeights};
use crate::run::lora::family_of;
use crate::settings::Choice;

/// Writes the LoRA of a checkpoint in one dialect, as it is or averaged.
///
/// # Errors
/// [`Error::Config`] if the run trained no LoRA, or more than one, or has no averages; errors of
/// the checkpoint and of [`lora::write`].
pub fn export(
    folder: &Path,
    config: &RunConfig,
    weights: SavedWeights,
    dialect: Dialect,
    out: Named<'_>,
) -> Result<()> {
    let family = family_of(&config.model.family, "--run")?;
    let stages = config.stages()?;
    let lora = lora(folder, config, weights, &stages)?;
    lora::write(&lora, family, dialect, out)
}

/// Writes the LoRA of a checkpoint into its folder, in every dialect that the configuration names:
/// `lora-diffusers.safetensors`, …, `lora-peft/`; its averages, if there are any, as
/// `lora-ema-diffusers.safetensors`, …. Files that are there stay.
///
/// # Errors
/// As [`export`].
pub fn export_beside(folder: &Path, config: &RunConfig) -> Result<()> {
    let averaged = checkpoint::has_averages(folder)?.then_some(SavedWeights::Averaged);
    for dialect in &config.lora.export {
        for weights in [SavedWeights::Trained].into_iter().chain(averaged) {
            let path = path_beside(folder, weights, *dialect);
            if path.exists() {
                continue;
            }
            let out = Named { argument: "lora.export", path: &path };
            export(folder, config, weights, *dialect, out)?;
        }
    }
    Ok(())
}

fn path_beside(folder: &Path, weights: SavedWeights, dialect: Dialect) -> PathBuf {
    let ending = if dialect == Dialect::Peft { "" } else { ".safetensors" };
    let averaged = if weights == SavedWeights::Averaged { "ema-" } else { "" };
    folder.join(format!("lora-{averaged}{}{ending}", dialect.word()))
}

fn lora(
    folder: &Path,
    config: &RunConfig,
    weights: SavedWeights,
    stages: &[Box<dyn Stage>],
) -> Result<Lora> {
    let mut trained = stages.iter().flat_map(|stage| stage.params().trained());
    if config.lora.rank.is_none() {
        return Err(Error::config(
            "--run",
            "trained no LoRA; without --format the model is written",
        ));
    }
    if let Some(info) = trained.find(|info| !info.added) {
        let what = format!(
            "trained `{}` beside its LoRA, which no LoRA file holds; --merge writes the whole model",
            info.name
        );
        return Err(Error::config("--run", what));
    }
    let parts = checkpoint::open_parameters(folder, config, weights, stages)?;
    let mut pairs = BTreeMap::new();
    for params in stages.iter().map(|stage| stage.params()) {
        for change in params.low_ranks() {
            let (down, up, magnitude) = change.names(params);
            let a = parts.read(down)?;
            let alpha = change.scale() * a.size()[0] as f64;
            let magnitude = magnitude.map(|name| parts.read(name)).transpose()?;
            let pair = Pair { a, b: parts.read(up)?, alpha, magnitude };
            pairs.insert(change.module(params).to_string(), pair);
        }
    }
    let dataset = Dataset::configured(&config.data).ok();
    let facts = Facts {
        base_model: config.model.path.clone(),
        dataset: dataset.map(|dataset| dataset.name().to_string()),
        steps: Some(checkpoint::step_of(folder)?),
        // Patterns may name every module.
        rank: config.lora.rank.filter(|rank| pairs.values().any(|pair| pair.rank() == *rank)),
        alpha: config.lora.alpha.or(config.lora.rank.map(|rank| rank as f64)),
        targets: config.lora.target_modules.clone(),
    };
    Ok(Lora { pairs, facts })
}
