//! The stage that FLUX, Qwen-Image and HunyuanVideo 1.5 have in common, and the names of what crosses its boundaries.
//!
//! | activation | shape | |
//! |---|---|---|
//! | `image` | `[B, Li, D]` | tokens of the latents |
//! | `text` | `[B, Lt, D]` | tokens of the conditions |
//! | `conditioning` | `[B, D]` | timestep and whatever else modulates |
//! | `image_rope`, `text_rope` | `[L, 1, E/2]` complex f32 | constant; tables of [`rope`](crate::nn::rope), where places matter |
//! | `mask` | `[B, 1, 1, Lt + Li]` boolean | constant; keys that are seen, where some are not |

use tch::{Kind, Tensor};

use crate::nn::attention::{Heads, Stream};
use crate::nn::joint_block::{BlockNames, ModulatedJointBlock};
use crate::nn::{Activations, Builder, ParamSet, Stage, Views};

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
        let block = ModulatedJointBlock::new(&mut Builder::new(&mut params, &name), names, width, hidden, heads);
        JointStage { params, block }
    }
}

impl Stage for JointStage {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let conditioning = input.get("conditioning");
        let (image, text) = self.block.forward(params, streams(input), conditioning, input.find("mask"));
        Activations::new().with("image", image).with("text", text).with("conditioning", conditioning.shallow_clone())
    }
}

/// Image and text as a block takes them.
pub(super) fn streams(input: &Activations) -> [Stream<'_>; 2] {
    [
        Stream { tokens: input.get("image"), table: input.find("image_rope") },
        Stream { tokens: input.get("text"), table: input.find("text_rope") },
    ]
}

/// The keys that are seen where some text is padding: text as `text_mask` says, then the whole image.
///
/// # Shapes
/// `text_mask`: `[B, Lt]`, not zero where a token is no padding. Returns `[B, 1, 1, Lt + image_tokens]` boolean.
pub(super) fn joint_mask(text_mask: &Tensor, image_tokens: i64) -> Tensor {
    let image = Tensor::ones([text_mask.size()[0], image_tokens], (Kind::Bool, text_mask.device()));
    Tensor::cat(&[text_mask.to_kind(Kind::Bool), image], 1).unsqueeze(1).unsqueeze(1)
}

/// Frames, rows and columns of the latents' tokens, from the input `grid` `[3]` int64 on the host.
pub(super) fn grid(input: &Activations) -> [i64; 3] {
    Vec::<i64>::try_from(input.get("grid")).ok().and_then(|sizes| sizes.try_into().ok()).expect("grid: three integers")
}
