//! Masks of pixels: a dataset's `loss_mask` may have the sizes of the picture or video, and a batch
//! then has the mean weight of the pixels of each latent.

use tch::{Kind, Tensor};

/// The key of the mask that weighs the loss.
pub const LOSS_MASK: &str = "loss_mask";

/// Frames of a video that become one of the latents', except for the first, which stands alone.
const FRAMES: i64 = 4;

/// Returns the shape of a sample's mask once it is shrunk to its latents; `None` if it is no mask
/// of pixels: rows and columns are those of the latents times one whole factor, and frames are the
/// latents' or those of the video.
///
/// # Shapes
/// `mask`: `[(C,) (F,) H, W]`; `latents`: `[C, (F,) H, W]`.
pub fn shrunk_shape(mask: &[i64], latents: &[i64]) -> Option<Vec<i64>> {
    let ([before @ .., rows, columns], [.., latent_rows, latent_columns]) = (mask, latents) else {
        return None;
    };
    let factor = rows / latent_rows;
    let is_multiple = (*rows, *columns) == (factor * latent_rows, factor * latent_columns);
    if !is_multiple || factor < 1 || mask.len() > latents.len() {
        return None;
    }
    let mut shape = [before, &[*latent_rows, *latent_columns][..]].concat();
    if let ([_, frames, _, _], [.., found]) = (latents, before) {
        let pixels = FRAMES * (frames - 1) + 1;
        let place = before.len() - 1;
        shape[place] = if *found == pixels { *frames } else { *found };
    }
    let mut axes = shape.iter().rev().zip(latents.iter().rev());
    let fits = axes.all(|(size, latent)| *size == 1 || size == latent);
    (fits && shape != mask).then_some(shape)
}

/// Returns the means of the masks' weights over the pixels of each latent, computed in float32.
///
/// # Shapes
/// `masks`: `[B, …]` with samples that have a [`shrunk_shape`]; returns `[B, …shape]`.
pub(super) fn shrunk(masks: &Tensor, shape: &[i64]) -> Tensor {
    let masks = masks.to_kind(Kind::Float);
    let [.., rows, columns] = shape else { unreachable!("a mask of pixels has rows and columns") };
    let masks = masks.unflatten(-1, [*columns, -1]).unflatten(-3, [*rows, -1]).mean_dim(
        [-3i64, -1].as_slice(),
        false,
        Kind::Float,
    );
    let axis = shape.len() as i64 - 2;
    let (found, frames) = (masks.size(), shape.iter().rev().nth(2));
    match frames {
        Some(frames) if found[axis as usize] != *frames => {
            let rest = masks.narrow(axis, 1, found[axis as usize] - 1);
            let rest = rest.unflatten(axis, [-1, FRAMES]);
            let rest = rest.mean_dim([axis + 1].as_slice(), false, Kind::Float);
            Tensor::cat(&[masks.narrow(axis, 0, 1), rest], axis)
        }
        _ => masks,
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::{Key, Purpose};

    fn uniform(size: &[i64]) -> Tensor {
        let draw = || Tensor::rand(size, (Kind::Float, Device::Cpu));
        Key::new(1, Purpose::Test).seeded(draw)
    }

    #[test]
    fn masks_of_pixels_are_told_by_one_whole_factor() {
        type Case<'c> = (&'c [i64], &'c [i64], Option<&'c [i64]>);
        let (image, video): (&[i64], &[i64]) = (&[16, 4, 6], &[16, 3, 4, 6]);
        let cases: [Case<'_>; 18] = [
            (&[32, 48], image, Some(&[4, 6])),
            (&[1, 64, 96], image, Some(&[1, 4, 6])),
            (&[16, 8, 12], image, Some(&[16, 4, 6])),
            (&[32, 48], video, Some(&[4, 6])),
            (&[3, 32, 48], video, Some(&[3, 4, 6])),
            (&[9, 32, 48], video, Some(&[3, 4, 6])),
            (&[1, 32, 48], video, Some(&[1, 4, 6])),
            (&[1, 9, 32, 48], video, Some(&[1, 3, 4, 6])),
            (&[9, 4, 6], video, Some(&[3, 4, 6])),
            // Those of the latents, and those that do not fit.
            (&[4, 6], image, None),
            (&[3, 4, 6], video, None),
            (&[], image, None),
            (&[1, 1], image, None),
            (&[32, 96], image, None),
            (&[33, 48], image, None),
            (&[1, 1, 32, 48], image, None),
            (&[3, 32, 48], image, None),
            (&[5, 32, 48], video, None),
        ];
        for (mask, latents, expected) in cases {
            let found = shrunk_shape(mask, latents);
            assert_eq!(found.as_deref(), expected, "{mask:?} beside {latents:?}");
        }
    }

    #[test]
    fn a_mask_is_shrunk_as_torchs_interpolation_by_area_does() {
        for kind in [Kind::Float, Kind::Bool, Kind::Uint8, Kind::Half] {
            let masks = uniform(&[5, 1, 32, 48]).gt(0.3).to_kind(kind);
            // `torch.nn.functional.interpolate(mode="area")` is this pooling.
            let expected = masks.to_kind(Kind::Float).adaptive_avg_pool2d([4, 6]);
            let found = shrunk(&masks, &[1, 4, 6]);
            assert_eq!((found.kind(), found.size()), (Kind::Float, vec![5, 1, 4, 6]));
            assert!(found.allclose(&expected, 1e-6, 1e-6, false), "{kind:?}");
            let plain = shrunk(&masks.squeeze_dim(1), &[4, 6]);
            assert!(plain.equal(&found.squeeze_dim(1)));
        }
    }

    #[test]
    fn frames_are_shrunk_as_a_video_is_the_first_alone() {
        let masks = uniform(&[2, 9, 32, 48]);
        let found = shrunk(&masks, &[3, 4, 6]);
        assert_eq!(found.size(), [2, 3, 4, 6]);
        let first = masks.narrow(1, 0, 1).adaptive_avg_pool2d([4, 6]);
        let rest = masks.narrow(1, 1, 8).unsqueeze(1).adaptive_avg_pool3d([2, 4, 6]).squeeze_dim(1);
        assert!(found.allclose(&Tensor::cat(&[first, rest], 1), 1e-6, 1e-6, false));
        let of_latents = uniform(&[2, 1, 9, 4, 6]);
        let found = shrunk(&of_latents, &[1, 3, 4, 6]);
        assert!(found.select(2, 0).equal(&of_latents.select(2, 0)), "nothing to take a mean of");
    }
}
