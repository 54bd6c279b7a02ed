//! Preparation of inputs that several adapters share.

use tch::{Kind, Tensor};

use super::seen_tokens::SeenTokens;
use crate::error::{Error, Result};
use crate::flow::{BatchKey, FlowMatchingContext, Role};
use crate::nn::Activations;
use crate::nn::patches::{cut_images, join_images};
use crate::settings::choice;

choice! {
    /// Kind in which the model gets the timestep.
    pub enum TimestepDtype {
        /// The compute kind, the reference's way: bfloat16 moves timesteps by up to 2 of 1000.
        "compute" => Compute,
        /// float32, exactly.
        "float32" => Float32,
    }
}

impl TimestepDtype {
    /// Returns timesteps `[B]` in `[0, 1]`. The compute kind divides by 1000 as the reference does,
    /// whatever the number of training timesteps.
    pub fn unit_timesteps(self, context: &FlowMatchingContext<'_>) -> Tensor {
        match self {
            TimestepDtype::Compute => context.timesteps.to_kind(context.dtype) / 1000.0,
            TimestepDtype::Float32 => context.sigma.shallow_clone(),
        }
    }

    /// Returns timesteps `[B]` on the scale of the training timesteps.
    pub fn training_timesteps(self, context: &FlowMatchingContext<'_>) -> Tensor {
        match self {
            TimestepDtype::Compute => context.timesteps.to_kind(context.dtype),
            TimestepDtype::Float32 => context.timesteps.shallow_clone(),
        }
    }
}

/// Returns the key of the text, which every family reads.
pub(super) fn text_key() -> BatchKey {
    BatchKey::required(Role::Condition, &["text_embeddings"], &[&["L", "D"]])
}

/// Returns the key of the text's token mask.
pub(super) fn text_mask_key() -> BatchKey {
    BatchKey::required(Role::TokenMask, &["text_mask"], &[&["L"]])
}

/// Returns `text_embeddings` `[B, L, D]` in the compute kind.
pub(super) fn text_embeddings(context: &FlowMatchingContext<'_>, adapter: &str) -> Result<Tensor> {
    batched(context, "text_embeddings", adapter, 3)
}

/// Returns a condition of the batch on the device in the compute kind, with `rank` axes, the first
/// of which matches the latents' samples.
pub(super) fn batched(
    context: &FlowMatchingContext<'_>,
    key: &str,
    adapter: &str,
    rank: usize,
) -> Result<Tensor> {
    let stored = stored(context, key, adapter, rank)?;
    Ok(stored.to_device(context.device).to_kind(context.dtype))
}

/// Returns the same as the batch holds it, on the host.
pub(super) fn stored<'b>(
    context: &FlowMatchingContext<'b>,
    key: &str,
    adapter: &str,
    rank: usize,
) -> Result<&'b Tensor> {
    let found = context.required(key, adapter)?;
    let samples = context.noisy_latents.size()[0];
    if found.dim() != rank || found.size()[0] != samples {
        let what = format!(
            "`{key}` {:?} must have {rank} axes and the latents' {samples} samples",
            found.size()
        );
        return Err(Error::data("batch", what));
    }
    Ok(found)
}

/// Returns the mask `[B, L]` of the tokens of `text` `[B, L, D]`, boolean and on the host: true for
/// a valid token, false for padding.
///
/// # Errors
/// [`Error::Data`] if the batch lacks it, it does not cover the text, or it has other numbers, as
/// additive masks do.
pub(super) fn token_mask(
    context: &FlowMatchingContext<'_>,
    key: &str,
    text: &Tensor,
    adapter: &str,
) -> Result<Tensor> {
    let mask = stored(context, key, adapter, 2)?;
    if mask.size() != text.size()[..2] {
        let what = format!(
            "`{key}` {:?} must cover the {} tokens of its text {:?}",
            mask.size(),
            text.size()[1],
            text.size()
        );
        return Err(Error::data("batch", what));
    }
    let valid = mask.ne(0);
    let other = valid.logical_and(&mask.ne(1)).to_kind(Kind::Int64);
    if other.any().int64_value(&[]) == 0 {
        return Ok(valid);
    }
    let at = other.flatten(0, -1).argmax(0, false).int64_value(&[]);
    let (row, token) = (at / mask.size()[1], at % mask.size()[1]);
    let found = mask.double_value(&[row, token]);
    let sample = context.batch.sample(row as usize);
    let what = format!(
        "`{key}` of {sample} holds {found} at token {token}; expected 1 where a token counts and 0 where it is padding"
    );
    Err(Error::data("batch", what))
}

/// Returns the tokens of `text_embeddings` that attention sees: all, or those of the batch's
/// `text_mask` if it `is_masked`. The text of dropped samples is replaced.
pub(super) fn seen_text(
    context: &FlowMatchingContext<'_>,
    is_masked: bool,
    adapter: &str,
) -> Result<SeenTokens> {
    const MASK: &str = "text_mask";
    let text = text_embeddings(context, adapter)?;
    let mask = is_masked.then(|| token_mask(context, MASK, &text, adapter)).transpose()?;
    let text = context.dropped("text_embeddings", &text)?;
    Ok(match mask {
        // Blocks over text and image need a token of each.
        Some(mask) => SeenTokens::by_mask(&text, &context.dropped_mask(MASK, &mask)?, true),
        None => SeenTokens::all(text),
    })
}

/// Returns noisy images `[B, C, H, W]` as tokens of 2 x 2 pixels `[B, H/2 · W/2, 4·C]`, and their
/// `grid`, `[3]` int64 on the host.
///
/// # Errors
/// [`Error::Data`] if they are not images or have odd sides.
pub(super) fn packed(context: &FlowMatchingContext<'_>, adapter: &str) -> Result<(Tensor, Tensor)> {
    let [height, width] = sides(context, adapter)?;
    if height % 2 != 0 || width % 2 != 0 {
        return Err(Error::data(
            "batch",
            format!(
                "the {adapter} adapter needs latents of even height and width, found {height} x {width}"
            ),
        ));
    }
    Ok((cut_images(context.noisy_latents, 2), Tensor::from_slice(&[1, height / 2, width / 2])))
}

/// Returns height and width of images.
///
/// # Errors
/// [`Error::Data`] if the latents are not images.
pub(super) fn sides(context: &FlowMatchingContext<'_>, adapter: &str) -> Result<[i64; 2]> {
    match context.noisy_latents.size().as_slice() {
        &[_, _, height, width] => Ok([height, width]),
        size => Err(Error::data(
            "batch",
            format!("the {adapter} adapter needs latents [B, C, H, W], found {size:?}"),
        )),
    }
}

/// Converts predicted tokens of 2 x 2 pixels back to images.
pub(super) fn unpacked(output: &Activations) -> Tensor {
    let grid = Vec::<i64>::try_from(output.get("grid")).expect("grid: integers");
    join_images(output.get("prediction"), 2, 2 * grid[1], 2 * grid[2])
}

/// Returns each sample's guidance scale for the model, `[B]` f32: `own` in training, the context's
/// in generation.
pub(super) fn guidance(context: &FlowMatchingContext<'_>, own: f64) -> Tensor {
    let scale = context.guidance_scale.unwrap_or(own);
    Tensor::full([context.noisy_latents.size()[0]], scale, (Kind::Float, context.device))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::Batch;
    use crate::flow::{CfgDropoutValue, ModelAdapter};

    /// Inputs that `adapter` prepares of `batch` where nothing is dropped: `latents` `[B, C, F, H,
    /// W]` stand for the noisy ones too, at `sigma` `[B]`.
    pub fn prepared(
        adapter: &dyn ModelAdapter,
        batch: &Batch,
        latents: &Tensor,
        sigma: &[f32],
        image_to_video: &[bool],
    ) -> Result<Activations> {
        let sigma = Tensor::from_slice(sigma);
        adapter.prepare_inputs(&FlowMatchingContext {
            noisy_latents: latents,
            latents,
            timesteps: &(&sigma * 1000.0),
            sigma: &sigma,
            image_to_video: &Tensor::from_slice(image_to_video),
            data_type: batch.data_type,
            device: latents.device(),
            dtype: latents.kind(),
            batch,
            drop: None,
            cfg_dropout_value: CfgDropoutValue::Zeros,
            guidance_scale: None,
        })
    }
}
