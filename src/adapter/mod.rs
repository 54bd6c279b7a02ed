//! One adapter a model family: batch to model inputs, model outputs to prediction.

mod fit;
mod flux;
mod flux2;
mod hunyuan;
mod inputs;
mod qwen_image;
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
use crate::settings::Family;

/// An adapter's settings, which build it.
pub trait AdapterSettings {
    fn build(&self) -> Box<dyn ModelAdapter>;

    /// Settings that must have another value for `model`, which is of a family that the adapter is made for.
    fn needs(&self, _model: &Model) -> Vec<Need> {
        Vec::new()
    }
}

registry! {
    /// `adapter_type`, with `[flow_matching.adapter]` for its arguments: one file, one line an adapter.
    pub enum AdapterChoice: AdapterSettings {
        "simple" => Simple(Simple),
        "flux" => Flux(Flux),
        "flux2" => Flux2(Flux2),
        "qwen_image" => QwenImage(QwenImage),
        "hunyuan" => Hunyuan(Hunyuan),
    }
}

/// The adapter of that name with default arguments.
///
/// # Errors
/// [`Error::Config`] naming the available ones.
pub fn create_adapter(adapter_type: &str) -> Result<Box<dyn ModelAdapter>> {
    let unknown = || Error::config("adapter_type", format!("unknown `{adapter_type}`; available: {}", AdapterChoice::NAMES.join(", ")));
    Ok(AdapterChoice::named(adapter_type).ok_or_else(unknown)?.build())
}

/// A pipeline with the adapter of that name, default arguments.
///
/// # Errors
/// [`Error::Config`] if there is no such adapter.
pub fn create_pipeline(adapter_type: &str, settings: FlowMatchingSettings, device: Device, dtype: Kind) -> Result<FlowMatchingPipeline> {
    Ok(FlowMatchingPipeline::new(settings, create_adapter(adapter_type)?, device, dtype))
}
