//! What several adapters make of a batch in the same way.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::flow::FlowMatchingContext;
use crate::nn::Activations;
use crate::nn::patches::{cut_images, join_images};
use crate::settings::{Choice, Keys};

/// The kind in which the model is told the timestep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimestepDtype {
    /// The compute kind, the reference's way: bfloat16 moves timesteps by up to 2 of 1000.
    #[default]
    Compute,
    Float32,
}

impl Choice for TimestepDtype {
    const ALL: &'static [(&'static str, Self)] = &[("compute", TimestepDtype::Compute), ("float32", TimestepDtype::Float32)];
}

impl TimestepDtype {
    pub fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.choice("timestep_dtype", self, "Kind in which the model is told the timestep: the model's, or exactly.");
    }

    /// Timesteps `[B]` in `[0, 1]`. The compute kind divides by 1000 as the reference does, whatever the number of training
    /// timesteps.
    pub fn of_one(self, context: &FlowMatchingContext<'_>) -> Tensor {
        match self {
            TimestepDtype::Compute => context.timesteps.to_kind(context.dtype) / 1000.0,
            TimestepDtype::Float32 => context.sigma.shallow_clone(),
        }
    }

    /// Timesteps `[B]` on the scale of the training timesteps.
    pub fn of_a_thousand(self, context: &FlowMatchingContext<'_>) -> Tensor {
        match self {
            TimestepDtype::Compute => context.timesteps.to_kind(context.dtype),
            TimestepDtype::Float32 => context.timesteps.shallow_clone(),
        }
    }
}

/// `text_embeddings` `[B, L, D]` in the compute kind.
pub(super) fn text_embeddings(context: &FlowMatchingContext<'_>, adapter: &str) -> Result<Tensor> {
    batched(context, "text_embeddings", adapter, 3)
}

/// A condition of the batch in the compute kind, with `rank` axes once a missing batch axis is added; a single row stands for
/// all samples.
pub(super) fn batched(context: &FlowMatchingContext<'_>, key: &str, adapter: &str, rank: usize) -> Result<Tensor> {
    let found = context.required(key, adapter)?;
    let tensor = if found.dim() + 1 == rank { found.unsqueeze(0) } else { found.shallow_clone() };
    let samples = context.noisy_latents.size()[0];
    if tensor.dim() != rank || ![1, samples].contains(&tensor.size()[0]) {
        let what = format!("`{key}` {:?} must have {rank} axes and the latents' {samples} samples", found.size());
        return Err(Error::data("batch", what));
    }
    let mut size = tensor.size();
    size[0] = samples;
    Ok(tensor.expand(size, false).to_kind(context.dtype))
}

/// `text_mask` `[B, L]`, not zero where a token of `text` `[B, L, D]` is no padding; of samples whose text is dropped as
/// `drop` `[B]` says.
pub(super) fn text_mask(context: &FlowMatchingContext<'_>, text: &Tensor, drop: &Tensor, adapter: &str) -> Result<Tensor> {
    let mask = batched(context, "text_mask", adapter, 2)?;
    if mask.size() != text.size()[..2] {
        return Err(Error::data("batch", format!("`text_mask` {:?} marks no text of {:?}", mask.size(), text.size())));
    }
    context.dropped_mask("text_mask", &mask, drop)
}

/// Noisy images `[B, C, H, W]` as tokens of 2 x 2 pixels `[B, H/2 · W/2, 4·C]`, and their `grid`, `[3]` int64 on the host.
///
/// # Errors
/// [`Error::Data`] if they are no images or have odd sides.
pub(super) fn packed(context: &FlowMatchingContext<'_>, adapter: &str) -> Result<(Tensor, Tensor)> {
    let [height, width] = sides(context, adapter)?;
    if height % 2 != 0 || width % 2 != 0 {
        return Err(Error::data(
            "batch",
            format!("the {adapter} adapter needs latents of even height and width, found {height} x {width}"),
        ));
    }
    Ok((cut_images(context.noisy_latents, 2), Tensor::from_slice(&[1, height / 2, width / 2])))
}

/// Height and width of images.
///
/// # Errors
/// [`Error::Data`] if the latents are no images.
pub(super) fn sides(context: &FlowMatchingContext<'_>, adapter: &str) -> Result<[i64; 2]> {
    match context.noisy_latents.size().as_slice() {
        &[_, _, height, width] => Ok([height, width]),
        size => Err(Error::data("batch", format!("the {adapter} adapter needs latents [B, C, H, W], found {size:?}"))),
    }
}

/// Predicted tokens of 2 x 2 pixels as images again.
pub(super) fn unpacked(output: &Activations) -> Tensor {
    let grid = Vec::<i64>::try_from(output.get("grid")).expect("grid: integers");
    join_images(output.get("prediction"), 2, 2 * grid[1], 2 * grid[2])
}

/// The guidance scale that each sample's model is told, `[B]` f32: `own` in training, the context's in generation.
pub(super) fn guidance(context: &FlowMatchingContext<'_>, own: f64) -> Tensor {
    let scale = context.guidance_scale.unwrap_or(own);
    Tensor::full([context.noisy_latents.size()[0]], scale, (Kind::Float, context.device))
}
