//! From the pixels of a batch to its rows in the store.

use tch::{Kind, Tensor};

use super::samples::Medium;
use super::sources::CONTROL;
use crate::data::{LOSS_MASK, latents_key};
use crate::datasets::pictures::Pixels;
use crate::encoding::{Conditions, Pipeline};
use crate::error::Result;

/// Half of the largest byte, which becomes 0.
const MIDDLE: f64 = 127.5;
/// Hexadecimal digits of a number of 64 bits.
const DIGITS: usize = 16;

/// Encodes pictures or videos of one size. Latents that are drawn follow from the content's hash.
///
/// # Errors
/// Errors of [`Pipeline::encode_pixels`].
pub(super) fn encode_pixels(
    pipeline: &Pipeline,
    media: &[&Medium],
    read: &[Pixels],
) -> Result<Vec<Conditions>> {
    let keys: Vec<u64> = media.iter().map(|medium| key_of(&medium.content)).collect();
    let pixels = stacked(read.iter().map(|read| &read.pixels));
    let latents = pipeline.encode_pixels(&pixels, &keys)?;
    let mut rows = pipeline.pixel_conditions(&pixels)?;
    let name = latents_key(pipeline.family().data_type);
    for (number, row) in rows.iter_mut().enumerate() {
        row.insert(name.into(), latents.get(number as i64));
    }
    if let Some(controls) = controls(pipeline, &keys, read, &latents)? {
        for (number, row) in rows.iter_mut().enumerate() {
            row.insert(CONTROL.into(), controls.get(number as i64));
        }
    }
    let sides = &latents.size()[latents.dim() - 2..];
    for (row, read) in rows.iter_mut().zip(read) {
        let mask = read.mask.as_ref().map(|mask| shrunk(mask, sides));
        row.extend(mask.map(|mask| (LOSS_MASK.to_string(), mask)));
    }
    for (row, medium) in rows.iter_mut().zip(media) {
        for (key, tensor) in row.iter_mut() {
            *tensor = tensor.to_kind(medium.layout[key].kind);
        }
    }
    Ok(rows)
}

/// The number that the beginning of a hash is.
fn key_of(content: &str) -> u64 {
    let digits = content.get(..DIGITS).unwrap_or(content);
    u64::from_str_radix(digits, 16).expect("a hash is hexadecimal digits")
}

/// Returns bytes `[3, …]` as one batch from -1 to 1.
fn stacked<'t>(pixels: impl Iterator<Item = &'t Tensor>) -> Tensor {
    let pixels: Vec<&Tensor> = pixels.collect();
    Tensor::stack(&pixels, 0).to_kind(Kind::Float) / MIDDLE - 1.0
}

/// Returns the latents of all controls side by side on the axis of channels; those of a picture
/// beside a video stand for its first frame, with zeros behind them.
fn controls(
    pipeline: &Pipeline,
    keys: &[u64],
    read: &[Pixels],
    latents: &Tensor,
) -> Result<Option<Tensor>> {
    let count = read.first().map_or(0, |read| read.controls.len());
    let one = |number: usize| {
        let pixels = stacked(read.iter().map(|read| &read.controls[number]));
        let keys: Vec<u64> = keys.iter().map(|key| key.wrapping_add(number as u64 + 1)).collect();
        let encoded = pipeline.encode_pixels(&pixels, &keys)?;
        if encoded.dim() < 5 {
            return Ok(encoded);
        }
        let missing = latents.size()[2] - encoded.size()[2];
        Ok(encoded.constant_pad_nd([0, 0, 0, 0, 0, missing]))
    };
    let controls = (0..count).map(one).collect::<Result<Vec<_>>>()?;
    Ok((!controls.is_empty()).then(|| Tensor::cat(&controls, 1)))
}

/// Returns the mean weights of the pixels of each latent, `[H, W]`, from bytes.
fn shrunk(mask: &Tensor, sides: &[i64]) -> Tensor {
    let mask = mask.to_kind(Kind::Float) / 255.0;
    mask.unsqueeze(0).adaptive_avg_pool2d(sides).squeeze_dim(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_becomes_the_mean_weight_of_each_latents_pixels() {
        let mask = Tensor::from_slice(&[255u8, 255, 0, 51, 0, 255, 0, 0]).view([2, 4]);
        let found = Vec::<Vec<f32>>::try_from(shrunk(&mask, &[1, 2])).expect("rows");
        assert_eq!(found, [[0.75, 0.05]]);
    }

    #[test]
    fn draws_follow_from_the_first_digits_of_a_hash() {
        assert_eq!(key_of("00000000000000ffabcdef"), 255);
    }
}
