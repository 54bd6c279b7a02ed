//! A step's loss: its values, its bound, its mean under a mask.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// A mean loss above this has exploded; the reference's bound.
pub const EXPLODED: f64 = 100.0;

/// A loss from every side.
#[derive(Debug)]
pub struct LossValues {
    /// `[B, …]` f32, of each element.
    pub weighted_loss: Tensor,
    /// Scalar f32; what is differentiated.
    pub average_weighted_loss: Tensor,
    /// `[B, …]` f32.
    pub unweighted_loss: Tensor,
    /// Scalar f32.
    pub average_unweighted_loss: Tensor,
    /// `[B, 1, …]` f32.
    pub loss_weight: Tensor,
    /// The batch's mask, if it has one.
    pub loss_mask: Option<Tensor>,
}

/// Whether a loss is a number, and not above the reference's bound.
pub fn is_sound(loss: f64) -> bool {
    loss <= EXPLODED
}

/// Refuses a mean loss that is not a number or above the reference's bound.
///
/// # Errors
/// [`Error::NotFinite`] naming the step and the loss.
pub fn check_loss(loss: f64, step: u64) -> Result<()> {
    if !is_sound(loss) {
        return Err(Error::NotFinite { step, what: format!("loss exploded: {loss} (the bound is {EXPLODED})") });
    }
    Ok(())
}

/// Mean of the elements that all masks keep, 0 where they keep none; a mask of fewer axes covers the leading ones.
pub(super) fn masked_mean(loss: &Tensor, masks: &[&Tensor]) -> Result<Tensor> {
    let whole = |mask: &&Tensor| {
        let unfit = || Error::data("batch", format!("loss_mask {:?} does not fit the loss {:?}", mask.size(), loss.size()));
        let mut shape = mask.size();
        shape.resize(loss.dim().max(shape.len()), 1);
        mask.to_kind(Kind::Float).reshape(&shape).f_expand_as(loss).map_err(|_| unfit())
    };
    let masks = masks.iter().map(whole).collect::<Result<Vec<_>>>()?;
    let kept = masks.into_iter().reduce(|kept, mask| kept * mask).expect("at least one mask");
    Ok((loss * &kept).sum(Kind::Float) / kept.sum(Kind::Float).clamp_min(1.0))
}
