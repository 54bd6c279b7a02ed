//! The loss of a step: its values, its bound, and its means under masks.

mod element;
mod mask;
mod weight;

pub(super) use element::Huber;
pub(super) use mask::loss_mask;
pub use mask::{LOSS_MASK, axes_of_mask};
pub(super) use weight::LossWeight;
pub use weight::bsmntw_table;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// Bound of the mean loss, above which it has exploded; the reference's value.
pub const EXPLODED: f64 = 100.0;

/// The values of a loss.
#[derive(Debug)]
pub struct LossValues {
    /// `[B, …]` f32, the loss of each element.
    pub weighted_loss: Tensor,
    /// Scalar f32: the mean over the elements that the masks keep, by their weight; 0 if they keep
    /// none.
    pub average_weighted_loss: Tensor,
    /// `[B, …]` f32.
    pub unweighted_loss: Tensor,
    /// Scalar f32, a mean like [`average_weighted_loss`](Self::average_weighted_loss).
    pub average_unweighted_loss: Tensor,
    /// `[B, 1, …]` f32.
    pub loss_weight: Tensor,
    /// The batch's mask as given, if it has one.
    pub loss_mask: Option<Tensor>,
    /// The elements in the means.
    pub kept: Kept,
    /// Scalar f32, the value that is differentiated: the mean weighted loss times the share of the
    /// batch that the masks keep.
    ///
    /// Its sum over all micro-batches and ranks, divided by the sum of their shares, is the loss of
    /// one big batch. The mean of the micro-batches' own means is not, if their masks keep
    /// different shares.
    pub objective: Tensor,
}

impl LossValues {
    /// Returns the mean over each sample's elements, `[B]` f32, of the unweighted loss times the
    /// masks' weights.
    pub fn sample_losses(&self) -> Tensor {
        self.sample_means(&self.unweighted_loss)
    }

    /// Returns the mean over each sample's elements, `[B]` f32, of `[B, …]` times the masks'
    /// weights.
    pub(super) fn sample_means(&self, elements: &Tensor) -> Tensor {
        sample_means(&self.kept.masked(elements))
    }

    /// Adds a scalar loss that has no elements. The mean over several batches weights it by the
    /// share that each batch keeps.
    pub(super) fn add_auxiliary(&mut self, auxiliary: &Tensor) {
        // Not in place: without weights and masks several of these are the same tensor.
        self.average_weighted_loss = &self.average_weighted_loss + auxiliary;
        self.objective = &self.objective
            + match self.kept.share() {
                Some(share) => auxiliary * share,
                None => auxiliary.shallow_clone(),
            };
    }
}

/// The elements in a mean: all of them, or those that masks keep, by weight.
#[derive(Debug)]
pub struct Kept {
    /// Product of all masks, `[B, …]` f32, broadcastable to the loss; `None` if every element
    /// counts.
    weights: Option<Tensor>,
}

impl Kept {
    /// Returns the elements that all `masks` keep; each f32, of the loss' rank and broadcastable to
    /// it.
    pub(super) fn by_masks(masks: Vec<Tensor>) -> Self {
        Kept { weights: masks.into_iter().reduce(|kept, mask| kept * mask) }
    }

    /// Returns the mean weight of each sample's elements, `[B]` f32; 1 without masks.
    pub fn share_of_samples(&self, samples: i64, device: tch::Device) -> Tensor {
        // Broadcast axes repeat their weights, which does not change a mean.
        self.weights
            .as_ref()
            .map_or_else(|| Tensor::ones([samples], (Kind::Float, device)), sample_means)
    }

    /// Returns the mean weight of the batch's elements, scalar f32; `None` without masks, where it
    /// is 1.
    fn share(&self) -> Option<Tensor> {
        self.weights.as_ref().map(|weights| weights.mean(Kind::Float))
    }

    /// Multiplies a loss of each element by the masks' weights.
    fn masked(&self, loss: &Tensor) -> Tensor {
        self.weights.as_ref().map_or_else(|| loss.shallow_clone(), |weights| loss * weights)
    }

    /// Returns the mean of a loss over the elements that are kept, and that mean times their share,
    /// both scalars.
    pub(super) fn mean_and_objective(&self, loss: &Tensor) -> (Tensor, Tensor) {
        let objective = self.masked(loss).mean(Kind::Float);
        match self.share() {
            // If nothing is kept, the objective is 0, and so is the mean.
            Some(share) => (&objective / share.clamp_min(f64::from(f32::MIN_POSITIVE)), objective),
            None => (objective.shallow_clone(), objective),
        }
    }
}

/// Returns the mean over all axes but the first, `[B]` f32.
fn sample_means(elements: &Tensor) -> Tensor {
    elements.reshape([elements.size()[0], -1]).mean_dim([1i64].as_slice(), false, Kind::Float)
}

/// True if a loss is a number and not above the reference's bound.
pub fn is_sound(loss: f64) -> bool {
    loss <= EXPLODED
}

/// Refuses a mean loss that is not a number or is above the reference's bound.
///
/// # Errors
/// [`Error::NotFinite`] naming the step and the loss.
pub fn check_loss(loss: f64, step: u64) -> Result<()> {
    if !is_sound(loss) {
        return Err(Error::NotFinite {
            step,
            what: format!("loss exploded: {loss} (the bound is {EXPLODED})"),
        });
    }
    Ok(())
}
