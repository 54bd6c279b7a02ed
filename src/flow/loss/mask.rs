//! The batch's `loss_mask`: a weight for each element of the loss, given along some of the latents'
//! axes.

use tch::{Device, Kind, Tensor};

use crate::data::Batch;
pub use crate::data::LOSS_MASK;
use crate::error::{Error, Result};

/// Returns the shapes that a sample's mask may have beside latents of `axes` axes.
fn expected(axes: usize) -> &'static str {
    match axes {
        3 => {
            "one number, [H, W], [1, H, W] or [C, H, W] a sample; in a dataset also of pixels, \
             whose rows and columns are those of the latents times one whole factor"
        }
        _ => {
            "one number, [H, W], [F, H, W], [1, F, H, W] or [C, F, H, W] a sample; in a dataset \
             also of pixels, whose rows and columns are those of the latents times one whole \
             factor, with F or 4 (F - 1) + 1 frames"
        }
    }
}

/// Returns the mask's sizes along the latents' own axes. The number of axes identifies them: `[H,
/// W]` are rows and columns, `[F, H, W]` frames, rows and columns.
///
/// # Shapes
/// `mask`: one sample's; `latents`: `[C, (F,) H, W]`. Returns as many sizes as `latents` has, each
/// equal to the latents' or 1.
///
/// # Errors
/// A text with what was found and what is expected.
pub fn axes_of_mask(mask: &[i64], latents: &[i64]) -> Result<Vec<i64>, String> {
    let behind = match (mask.len(), latents.len()) {
        (0, _) => Some(&mask[..0]),
        (2, _) | (3, 4) => Some(mask),
        (given, axes) if given == axes => Some(mask),
        _ => None,
    };
    let whole = behind.map(|behind| [&vec![1; latents.len() - behind.len()], behind].concat());
    let fits = |sizes: &Vec<i64>| {
        sizes.iter().zip(latents).all(|(size, latent)| *size == 1 || size == latent)
    };
    whole.filter(fits).ok_or_else(|| {
        format!(
            "`{LOSS_MASK}` is {mask:?} a sample, its latents {latents:?}; expected {}",
            expected(latents.len())
        )
    })
}

/// Returns the batch's mask along the axes of its loss.
///
/// # Shapes
/// `loss`: `[B, C, (F,) H, W]`. Returns as many axes, broadcastable to it, f32 on `device`.
///
/// # Errors
/// [`Error::Data`] if the batch has no mask, its axes are not the loss', or a weight is negative or
/// not finite.
pub fn loss_mask(batch: &Batch, loss: &[i64], device: Device) -> Result<Tensor> {
    let missing = || {
        Error::data("batch", format!("apply_loss_mask is set and the batch has no `{LOSS_MASK}`"))
    };
    let mask = batch.get(LOSS_MASK).ok_or_else(missing)?;
    let (samples, own) = match mask.size().split_first() {
        Some((samples, own)) => (*samples, own.to_vec()),
        None => (0, Vec::new()),
    };
    if samples != loss[0] {
        return Err(Error::data(
            "batch",
            format!("`{LOSS_MASK}` {:?} must have the latents' {} samples", mask.size(), loss[0]),
        ));
    }
    let axes = axes_of_mask(&own, &loss[1..]).map_err(|what| Error::data("batch", what))?;
    let mask = mask.to_kind(Kind::Float).reshape([&[samples], &axes[..]].concat());
    check_weights(batch, &mask)?;
    Ok(mask.to_device(device))
}

/// Refuses weights that are negative or not finite. Runs on the batch's device, the host.
fn check_weights(batch: &Batch, mask: &Tensor) -> Result<()> {
    // The comparison is false for NaN too.
    let bad = mask.ge(0.0).logical_and(&mask.isfinite()).logical_not().flatten(1, -1);
    if !bad.any().double_value(&[]).eq(&1.0) {
        return Ok(());
    }
    let row = bad.any_dim(1, false).to_kind(Kind::Int64).argmax(0, false).int64_value(&[]);
    let values = mask.get(row).flatten(0, -1);
    let value =
        values.double_value(&[bad.get(row).to_kind(Kind::Int64).argmax(0, false).int64_value(&[])]);
    let what = format!(
        "`{LOSS_MASK}` of {} holds {value}; weights are finite and at least 0",
        batch.sample(row as usize)
    );
    Err(Error::data("batch", what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_known_by_their_number() {
        let (image, video): (&[i64], &[i64]) = (&[8, 4, 6], &[8, 3, 4, 6]);
        let cases: [(&[i64], &[i64], &[i64]); 9] = [
            (&[], image, &[1, 1, 1]),
            (&[4, 6], image, &[1, 4, 6]),
            (&[1, 4, 6], image, &[1, 4, 6]),
            (&[8, 4, 6], image, &[8, 4, 6]),
            (&[], video, &[1, 1, 1, 1]),
            (&[4, 6], video, &[1, 1, 4, 6]),
            (&[3, 4, 6], video, &[1, 3, 4, 6]),
            (&[1, 4, 6], video, &[1, 1, 4, 6]),
            (&[8, 1, 1, 1], video, &[8, 1, 1, 1]),
        ];
        for (mask, latents, expected) in cases {
            assert_eq!(
                axes_of_mask(mask, latents).as_deref(),
                Ok(expected),
                "{mask:?} beside {latents:?}"
            );
        }
    }

    #[test]
    fn a_mask_of_rows_is_one_of_rows_where_channels_are_as_many() {
        assert_eq!(axes_of_mask(&[8, 8], &[8, 8, 8]), Ok(vec![1, 8, 8]));
    }

    #[test]
    fn other_axes_are_refused_with_what_is_expected() {
        let (image, video): (&[i64], &[i64]) = (&[8, 4, 6], &[8, 3, 4, 6]);
        let cases: [(&[i64], &[i64]); 6] = [
            (&[8], image),
            (&[6, 4], image),
            (&[2, 4, 6], image),
            (&[8, 3, 4, 6], image),
            (&[8, 4, 6], video),
            (&[3], video),
        ];
        for (mask, latents) in cases {
            let what = axes_of_mask(mask, latents).expect_err("unfit");
            assert!(
                what.starts_with(&format!("`loss_mask` is {mask:?} a sample"))
                    && what.contains("expected one number, [H, W]"),
                "{what}"
            );
        }
    }
}
