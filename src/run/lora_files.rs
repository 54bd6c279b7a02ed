//! The LoRA of a checkpoint as files for other programs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::RunConfig;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::files::outputs::Named;
use crate::lora::{self, Adapter, Dialect, Facts, Pair};
use crate::nn::Stage;
use crate::run::checkpoint;
use crate::run::first_lora::family_of;
use crate::settings::Choice;

/// Writes the LoRA of a checkpoint in one dialect.
///
/// # Errors
/// [`Error::Config`] if the run trained no LoRA, or more than one; errors of the checkpoint and of
/// [`lora::write`].
pub fn export(folder: &Path, config: &RunConfig, dialect: Dialect, out: Named<'_>) -> Result<()> {
    let family = family_of(&config.model.family, "--run")?;
    let stages = config.stages()?;
    let adapter = adapter(folder, config, &stages)?;
    lora::write(&adapter, family, dialect, out)
}

/// Writes the LoRA of a checkpoint into its folder, in every dialect that the configuration names:
/// `lora-diffusers.safetensors`, …, `lora-peft/`.
///
/// # Errors
/// As [`export`].
pub fn export_beside(folder: &Path, config: &RunConfig) -> Result<()> {
    for dialect in &config.lora.export {
        let path = path_beside(folder, *dialect);
        export(folder, config, *dialect, Named { argument: "lora.export", path: &path })?;
    }
    Ok(())
}

fn path_beside(folder: &Path, dialect: Dialect) -> PathBuf {
    let ending = if dialect == Dialect::Peft { "" } else { ".safetensors" };
    folder.join(format!("lora-{}{ending}", dialect.word()))
}

fn adapter(folder: &Path, config: &RunConfig, stages: &[Box<dyn Stage>]) -> Result<Adapter> {
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
    let parts = checkpoint::open_parameters(folder, config, stages)?;
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
        rank: config.lora.rank,
        alpha: config.lora.alpha.or(config.lora.rank.map(|rank| rank as f64)),
        targets: config.lora.target_modules.clone(),
    };
    Ok(Adapter { pairs, facts })
}
