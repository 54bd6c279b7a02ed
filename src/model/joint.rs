//! The stages and activations shared by families with joint attention over image and text.
//!
//! | activation | shape | |
//! |---|---|---|
//! | `image` | `[B, Li, D]` | tokens of the latents |
//! | `text` | `[B, Lt, D]` | tokens of the conditions |
//! | `joint` | `[B, Lt + Li, D]` | both as one sequence, from a single block |
//! | `conditioning` | `[B, D]` | the vector that modulates: timestep, guidance, pooled text |
//! | `image_rope`, `text_rope` | `[L, 1, E/2]` complex f32 | constant; tables of [`rope`](crate::nn::rope), optional |
//! | `rope` | `[Lt + Li, 1, E/2]` complex f32 | constant; both as one, for single blocks |
//! | `mask` | `[B, 1, 1, Lt + Li]` boolean | constant; true for valid keys, if samples have different ones |

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::nn::attention::{Heads, Stream};
use crate::nn::joint_block::{BlockNames, ModulatedJointBlock};
use crate::nn::modulation::ModulatedProjection;
use crate::nn::{Activations, Builder, ParamSet, Rows, Stage, Views};

/// One block over both streams.
pub(super) struct JointStage {
    params: ParamSet,
    block: ModulatedJointBlock,
}

impl JointStage {
    /// `transformer_blocks.<index>`.
    pub fn new(index: i64, names: &BlockNames, width: i64, hidden: i64, heads: Heads) -> Self {
        let name = format!("transformer_blocks.{index}");
        let mut params = ParamSet::new(&name);
        let block = ModulatedJointBlock::new(
            &mut Builder::new(&mut params, &name, Rows::Image),
            names,
            width,
            hidden,
            heads,
        );
        JointStage { params, block }
    }
}

impl Stage for JointStage {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let conditioning = input.get("conditioning");
        let (image, text) =
            self.block.forward(params, streams(input), conditioning, input.find("mask"));
        Activations::new()
            .with("image", image)
            .with("text", text)
            .with("conditioning", conditioning.shallow_clone())
    }
}

/// The last stage: maps image tokens to predicted ones, `prediction` `[B, Li, features]`.
pub(super) struct Head {
    params: ParamSet,
    output: ModulatedProjection,
}

impl Head {
    /// `norm_out.linear` and `proj_out`.
    pub fn new(width: i64, features: i64, with_bias: bool, epsilon: f64) -> Self {
        let mut params = ParamSet::new("head");
        let output = ModulatedProjection::new(
            &mut Builder::new(&mut params, "", Rows::Image),
            width,
            features,
            with_bias,
            epsilon,
        );
        Head { params, output }
    }
}

impl Stage for Head {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let image = match input.find("joint") {
            Some(joint) => {
                let text_tokens = input.get("text_rope").size()[0];
                joint.narrow(1, text_tokens, joint.size()[1] - text_tokens)
            }
            None => input.get("image").shallow_clone(),
        };
        Activations::new()
            .with("prediction", self.output.forward(params, &image, input.get("conditioning")))
    }
}

/// Returns text and image as one sequence, from a double block or a single one.
pub(super) fn joined(input: &Activations) -> Tensor {
    match input.find("joint") {
        Some(joint) => joint.shallow_clone(),
        None => Tensor::cat(&[input.get("text"), input.get("image")], 1),
    }
}

/// Returns image and text as inputs of a block.
pub(super) fn streams(input: &Activations) -> [Stream<'_>; 2] {
    [
        Stream { tokens: input.get("image"), table: input.find("image_rope") },
        Stream { tokens: input.get("text"), table: input.find("text_rope") },
    ]
}

/// Returns the mask of valid keys: the text by `text_mask`, then the whole image.
///
/// # Shapes
/// `text_mask`: `[B, Lt]` boolean. Returns `[B, 1, 1, Lt + image_tokens]` boolean.
pub(super) fn joint_mask(text_mask: &Tensor, image_tokens: i64) -> Tensor {
    let image = Tensor::ones([text_mask.size()[0], image_tokens], (Kind::Bool, text_mask.device()));
    Tensor::cat(&[text_mask, &image], 1).unsqueeze(1).unsqueeze(1)
}

/// Returns a number of text tokens for which a rotary table is made: the tokens in use, rounded up,
/// so that texts that are cut to their length share a few tables instead of having one each.
pub(super) fn table_tokens(text_tokens: i64) -> i64 {
    const STEP: i64 = 512;
    (text_tokens + STEP - 1) / STEP * STEP
}

/// Refuses axes of a rotary embedding that do not fill a head with pairs.
///
/// # Errors
/// [`Error::Config`] naming the setting.
pub(super) fn check_axes(setting: &str, axes: &[i64], head_width: i64) -> Result<()> {
    if axes.iter().sum::<i64>() == head_width && axes.iter().all(|axis| axis % 2 == 0) {
        return Ok(());
    }
    Err(Error::config(
        setting,
        format!("{axes:?} must be even and add up to attention_head_dim = {head_width}"),
    ))
}

/// Returns frames, rows and columns of the latents' tokens, from the input `grid` `[3]` int64 on
/// the host.
pub(super) fn grid(input: &Activations) -> [i64; 3] {
    Vec::<i64>::try_from(input.get("grid"))
        .ok()
        .and_then(|sizes| sizes.try_into().ok())
        .expect("grid: three integers")
}
