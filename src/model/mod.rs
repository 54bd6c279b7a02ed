//! Models: settings that build a list of stages. They hold no tensors and are independent of ranks.

mod diffusers;
mod dit;
mod flux;
mod flux2;
mod hunyuan_video15;
mod joint;
mod mistaken;
mod qwen_image;
mod settings;
mod wan;

use std::collections::BTreeMap;

use tch::Tensor;

pub use diffusers::{read_folder, write_config};
pub use dit::Dit;
pub use flux::Flux;
pub use flux2::Flux2;
pub use hunyuan_video15::HunyuanVideo15;
pub use qwen_image::QwenImage;
pub use settings::{Beginning, Dtype, ModelSettings};
pub use wan::Wan;

use crate::error::{Error, Result};
use crate::nn::Stage;
use crate::registry::registry;
use crate::settings::Family;

/// The interface of a model family.
pub trait Architecture {
    /// Returns the diffusers class whose configuration and parameters the model has; `None` for a
    /// model of our own.
    fn class_name(&self) -> Option<&'static str>;

    /// Returns fields that earlier releases of the class wrote into `config.json` and that the
    /// current one does not use.
    fn retired_fields(&self) -> &'static [&'static str] {
        &[]
    }

    /// Returns parts of the names of parameters that published weights contain without using them.
    fn ignored_parameters(&self) -> &'static [&'static str] {
        &[]
    }

    /// Returns the model as stages, in forward order.
    ///
    /// # Errors
    /// [`Error::Config`] if the settings contradict each other.
    fn stages(&self) -> Result<Vec<Box<dyn Stage>>>;

    /// Returns the name of the adapter that prepares the model's inputs, as in `adapter_type`.
    fn adapter(&self) -> &'static str;

    /// Returns the names of the activations that the first stage requires.
    fn inputs(&self) -> Vec<&'static str>;

    /// True if the model takes a guidance scale, `guidance`, when the adapter provides one.
    fn embeds_guidance(&self) -> bool {
        false
    }

    /// True if the model takes videos `[C, F, H, W]`, and images as videos of one frame.
    fn takes_frames(&self) -> bool {
        false
    }

    /// Returns the number of features of a token inside the model.
    fn width(&self) -> i64;

    /// Returns the number of tokens of a sample of `latents` `[C, (F,) H, W]`.
    fn image_tokens(&self, latents: &[i64]) -> i64;

    /// Returns the number of tokens to which the family's pipeline pads every prompt without a
    /// mask; `None` if it pads to the longest one.
    fn text_tokens(&self) -> Option<i64> {
        None
    }

    /// Returns patterns of the modules that a LoRA on the attention changes: the projections of the
    /// blocks' attentions.
    fn attention_modules(&self) -> &'static [&'static str];

    /// Returns the number of text tokens without which the model does not work; `None` if it takes
    /// any number.
    fn required_text_tokens(&self) -> Option<i64> {
        None
    }

    /// Refuses data that the model cannot take, before they cause a shape error deep inside it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting and the value in the data.
    fn check_data(&self, shapes: &SampleShapes<'_>) -> Result<()>;

    /// Refuses to generate videos from images where that takes an input that no adapter prepares.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    fn check_image_to_video(&self) -> Result<()> {
        Ok(())
    }
}

/// Shapes of one sample's tensors.
#[derive(Clone, Debug)]
pub struct SampleShapes<'s> {
    /// `[C, (F,) H, W]`.
    pub latents: &'s [i64],
    /// Shapes of every key, without the batch axis.
    pub of: BTreeMap<String, Vec<i64>>,
}

impl<'s> SampleShapes<'s> {
    /// Takes the shapes from a batch's `tensors` `[B, …]` of so many samples; one with several rows
    /// a sample has them as a first axis.
    pub fn of_batch(samples: i64, latents: &'s [i64], tensors: &BTreeMap<String, Tensor>) -> Self {
        let sample = |tensor: &Tensor| match *tensor.size() {
            [rows, ref rest @ ..] if rows > samples && rows.checked_rem(samples) == Some(0) => {
                [&[rows / samples], rest].concat()
            }
            [_, ref rest @ ..] => rest.to_vec(),
            [] => Vec::new(),
        };
        SampleShapes {
            latents,
            of: tensors.iter().map(|(key, tensor)| (key.clone(), sample(tensor))).collect(),
        }
    }

    /// Returns the last axis of a key, if the data have it.
    pub fn last(&self, key: &str) -> Option<i64> {
        self.of.get(key).and_then(|shape| shape.last()).copied()
    }
}

/// Refuses a setting that differs from the data; keys that the data lack are checked by the
/// adapter.
///
/// `found`: the number in the data; `of`: its description, such as "text_embeddings have".
fn expect_equal(setting: &str, value: i64, found: Option<i64>, of: &str) -> Result<()> {
    match found {
        Some(found) if found != value => {
            Err(Error::config(setting, format!("is {value}, the data's {of} {found}")))
        }
        _ => Ok(()),
    }
}

/// Refuses a setting that must be even.
fn expect_even(setting: &str, value: i64) -> Result<()> {
    if value % 2 == 0 {
        Ok(())
    } else {
        Err(Error::config(setting, format!("{value} must be even")))
    }
}

/// Returns channels, height and width of images that patches of side `patch` cover.
fn expect_image(setting: &str, latents: &[i64], patch: i64) -> Result<[i64; 3]> {
    match *latents {
        [channels, height, width] if height % patch == 0 && width % patch == 0 => {
            Ok([channels, height, width])
        }
        [_, height, width] => Err(Error::config(
            setting,
            format!("{patch} does not divide the data's latents of {height} x {width}"),
        )),
        _ => Err(Error::config(
            setting,
            format!("takes latents [C, H, W], the data have {latents:?}"),
        )),
    }
}

/// Maximum number of parameters of a model: more than any cluster holds, and few enough for sizes
/// in bytes to fit 64 bits.
const MOST_PARAMETERS: i64 = 1 << 48;

impl Model {
    /// Returns the stages of settings that a user may have written: as [`Architecture::stages`],
    /// with a check of the number of parameters.
    ///
    /// # Errors
    /// [`Error::Config`] if the settings contradict each other or the parameters are too many.
    pub fn checked_stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        let stages = self.stages()?;
        let total =
            stages.iter().try_fold(0i64, |sum, stage| sum.checked_add(stage.params().numel()));
        if total.is_none_or(|total| total > MOST_PARAMETERS) {
            let found = total
                .map_or("more than 2^63 parameters".into(), |total| format!("{total} parameters"));
            let what = format!(
                "has {found}, more than the {MOST_PARAMETERS} allowed; look at the heads, their width and the layers"
            );
            return Err(Error::config(format!("model.{}", self.name()), what));
        }
        Ok(stages)
    }
}

registry! {
    /// `[model.<name>]`: one file, one line a family.
    pub enum Model: Architecture {
        "dit" => Dit(Dit),
        "flux" => Flux(Flux),
        "flux2" => Flux2(Flux2),
        "qwen_image" => QwenImage(QwenImage),
        "wan" => Wan(Wan),
        "hunyuan_video15" => HunyuanVideo15(HunyuanVideo15),
    }
}
