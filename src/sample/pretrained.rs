//! A published pipeline's own model, as it was before any training.

use std::path::Path;

use crate::config::RunConfig;
use crate::cuda::system::gpu_models;
use crate::error::{Error, Result};
use crate::model::read_folder;

/// The model's folder in a pipeline's.
const TRANSFORMER: &str = "transformer";
/// Folder of a second one, to which a pipeline changes at lower noise levels.
pub(super) const SECOND: &str = "transformer_2";

/// Returns the configuration of a pipeline's own model, with `overrides`: on the first GPU in
/// bfloat16 where there is one, else on the CPU in float32.
///
/// # Errors
/// [`Error::Config`] if the folder has no model of a known family, or one of two; an override that
/// cannot be.
pub(super) fn pretrained_config(pipeline: &Path, overrides: &[String]) -> Result<RunConfig> {
    let shown = pipeline.display();
    if !pipeline.is_dir() {
        let what = format!("{shown} is no folder; expected that of a published pipeline");
        return Err(Error::config("--pipeline", what));
    }
    let transformer = pipeline.join(TRANSFORMER);
    if !transformer.is_dir() {
        let what = format!(
            "{shown} has no {TRANSFORMER}/, the model to generate with; download it, or name a run by --run"
        );
        return Err(Error::config("--pipeline", what));
    }
    if pipeline.join(SECOND).is_dir() {
        let what = format!(
            "{shown} has two models, {TRANSFORMER}/ and {SECOND}/, which take turns on the way from noise \
             to data; a sample here is of one model"
        );
        return Err(Error::config("--pipeline", what));
    }
    let family = read_folder(&transformer)?;
    let (device, dtype) =
        if gpu_models().is_empty() { ("cpu", "float32") } else { ("cuda", "bfloat16") };
    let own = [
        ("model.path", format!("{:?}", transformer.display().to_string())),
        ("flow_matching.adapter_type", format!("{:?}", family.adapter())),
        ("parallel.device", format!("{device:?}")),
        ("model.dtype", format!("{dtype:?}")),
    ];
    let own = own.map(|(key, value)| format!("{key}={value}"));
    let published = as_published(family.adapter()).map(str::to_string);
    let all: Vec<String> =
        own.into_iter().chain(published).chain(overrides.iter().cloned()).collect();
    RunConfig::read("--pipeline", "", &all)
}

/// Returns the setting by which an adapter gives a model what its pipeline does, and not what the
/// reference's training does.
fn as_published(adapter: &str) -> Option<&'static str> {
    match adapter {
        // Timesteps are not rounded to the compute kind.
        "simple" => Some("flow_matching.adapter.timestep_dtype=\"float32\""),
        // No padding is attended to.
        "qwen_image" => Some("flow_matching.adapter.use_text_mask=true"),
        // No token of a long prompt is cut.
        "hunyuan" => Some("flow_matching.adapter.exact_text_lengths=true"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The configuration of a pipeline whose transformer is of this class.
    fn config_of(class: &str) -> RunConfig {
        let pipeline = tempfile::tempdir().expect("a folder");
        let transformer = pipeline.path().join(TRANSFORMER);
        fs::create_dir(&transformer).expect("a folder");
        let text = serde_json::json!({"_class_name": class}).to_string();
        fs::write(transformer.join("config.json"), text).expect("a file");
        pretrained_config(pipeline.path(), &[]).expect("a known class")
    }

    #[test]
    fn a_model_is_given_its_whole_text_and_no_padding() {
        assert!(config_of("QwenImageTransformer2DModel").reads_text_mask());
        let hunyuan = config_of("HunyuanVideo15Transformer3DModel").to_toml();
        assert!(hunyuan.contains("\nexact_text_lengths = true"), "{hunyuan}");
        assert!(!config_of("FluxTransformer2DModel").reads_text_mask(), "it attends to padding");
    }
}
