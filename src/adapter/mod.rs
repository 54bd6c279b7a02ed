//! One adapter for each model family: converts batches to model inputs, and model outputs to
//! predictions.

mod fit;
mod flux;
mod flux2;
mod hunyuan;
mod inputs;
mod qwen_image;
mod seen_tokens;
mod simple;

pub use fit::Need;
pub use flux::Flux;
pub use flux2::Flux2;
pub use hunyuan::Hunyuan;
pub use inputs::TimestepDtype;
pub use qwen_image::QwenImage;
pub use simple::Simple;

use tch::{Device, Kind};

use crate::error::{Error, Result};
use crate::flow::{FlowMatchingPipeline, FlowMatchingSettings, ModelAdapter};
use crate::model::Model;
use crate::registry::registry;
use crate::settings::{self, Family};

/// An adapter's settings, from which it is built.
pub trait AdapterSettings {
    fn build(&self) -> Box<dyn ModelAdapter>;

    /// Returns settings that must have another value for `model`, which is of a family that the
    /// adapter supports.
    fn needs(&self, _model: &Model) -> Vec<Need> {
        Vec::new()
    }
}

registry! {
    /// `adapter_type`, with `[flow_matching.adapter]` for its arguments: one file, one line an
    /// adapter.
    pub enum AdapterChoice: AdapterSettings {
        "simple" => Simple(Simple),
        "flux" => Flux(Flux),
        "flux2" => Flux2(Flux2),
        "qwen_image" => QwenImage(QwenImage),
        "hunyuan" => Hunyuan(Hunyuan),
    }
}

/// Arguments of an adapter by name, as in `[flow_matching.adapter]`; missing ones have their
/// defaults.
pub type Arguments = serde_json::Map<String, serde_json::Value>;

/// Builds the adapter of this name with these arguments.
///
/// # Errors
/// [`Error::Config`] naming the available adapters, or every argument that is unknown or invalid.
pub fn create_adapter(adapter_type: &str, arguments: &Arguments) -> Result<Box<dyn ModelAdapter>> {
    let unknown = || {
        Error::config(
            "adapter_type",
            format!("unknown `{adapter_type}`; available: {}", AdapterChoice::NAMES.join(", ")),
        )
    };
    let mut choice = AdapterChoice::named(adapter_type).ok_or_else(unknown)?;
    settings::read_json(
        choice.settings(),
        &format!("arguments of the {adapter_type} adapter"),
        arguments,
    )?;
    Ok(choice.build())
}

/// Builds a pipeline with the adapter of this name.
///
/// # Errors
/// As [`create_adapter`].
pub fn create_pipeline(
    adapter_type: &str,
    arguments: &Arguments,
    settings: FlowMatchingSettings,
    device: Device,
    dtype: Kind,
) -> Result<FlowMatchingPipeline> {
    Ok(FlowMatchingPipeline::new(settings, create_adapter(adapter_type, arguments)?, device, dtype))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn created(adapter_type: &str, arguments: serde_json::Value) -> Result<Box<dyn ModelAdapter>> {
        create_adapter(adapter_type, arguments.as_object().expect("an object"))
    }

    #[test]
    fn arguments_reach_the_adapter() {
        let shape = |arguments| {
            let keys = created("hunyuan", arguments).expect("sound arguments").keys();
            keys.into_iter().find_map(|key| key.instead).expect("an image may be missing")
        };
        assert_eq!(shape(json!({})), "no image, of 1152 features");
        assert_eq!(shape(json!({"default_image_embed_shape": [5, 7]})), "no image, of 7 features");
    }

    #[test]
    fn what_is_no_adapter_or_no_argument_is_refused_by_name() {
        let refused = |adapter_type, arguments| {
            created(adapter_type, arguments).err().expect("refused").to_string()
        };
        let unknown = refused("flix", json!({}));
        assert!(
            unknown
                .ends_with("unknown `flix`; available: simple, flux, flux2, qwen_image, hunyuan"),
            "{unknown}"
        );
        let argument = refused("flux", json!({"guidance": 1.0}));
        assert!(
            argument.starts_with("arguments of the flux adapter: guidance: unknown key"),
            "{argument}"
        );
    }
}
