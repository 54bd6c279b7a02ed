//! Statistics of a step for the logs, measured on the device as one row of numbers that ranks can
//! gather.

use tch::Tensor;

use super::loss::LossValues;
use crate::ops::{Ranges, apply};

/// Number of bins of the sigma histogram over `[0, 1]`.
pub const SIGMA_BINS: usize = 10;

/// Count, mean, sum of squared deviations, minimum and maximum, which can be merged exactly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments {
    pub count: f64,
    pub mean: f64,
    /// Sum of squared deviations from the mean.
    squares: f64,
    pub min: f64,
    pub max: f64,
}

impl Moments {
    /// # Panics
    /// If there are no values (a bug in the caller).
    fn from_values(values: &[f32]) -> Self {
        assert!(!values.is_empty(), "moments of at least one value");
        let values = values.iter().map(|&value| f64::from(value));
        let count = values.len() as f64;
        let mean = values.clone().sum::<f64>() / count;
        let squares = values.clone().map(|value| (value - mean).powi(2)).sum();
        let (min, max) = (
            values.clone().fold(f64::INFINITY, merge_min),
            values.fold(f64::NEG_INFINITY, merge_max),
        );
        Moments { count, mean, squares, min, max }
    }

    /// Returns the unbiased standard deviation; 0 for a single value.
    pub fn std(&self) -> f64 {
        if self.count > 1.0 { (self.squares / (self.count - 1.0)).sqrt() } else { 0.0 }
    }

    /// Source: Chan, Golub & LeVeque 1979, the pairwise update.
    fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        let apart = other.mean - self.mean;
        Moments {
            count,
            mean: self.mean + apart * other.count / count,
            squares: self.squares
                + other.squares
                + apart * apart * self.count * other.count / count,
            min: merge_min(self.min, other.min),
            max: merge_max(self.max, other.max),
        }
    }
}

/// Minimum and maximum element of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    pub min: f64,
    pub max: f64,
}

impl Range {
    fn read(scalars: &mut impl Iterator<Item = f64>) -> Self {
        let [min, max] = take(scalars);
        Range { min, max }
    }

    fn merge(self, other: Self) -> Self {
        Range { min: merge_min(self.min, other.min), max: merge_max(self.max, other.max) }
    }
}

/// Keeps a NaN on either side, so that it reaches the log.
fn merge_min(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.min(b) }
}

fn merge_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// A step's numbers, merged over any number of samples, micro-batches and ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    pub sigma: Moments,
    pub timesteps: Moments,
    pub weight: Moments,
    pub latents: Range,
    pub noise: Range,
    pub noisy_latents: Range,
    pub prediction: Range,
    pub target: Range,
    /// Mean weighted loss over the elements that the masks keep, with auxiliary losses; 0 if they
    /// keep none.
    pub loss: f64,
    /// Mean unweighted loss over the elements that the masks keep.
    pub unweighted_loss: f64,
    /// Sum of the samples' shares that the masks keep; the number of samples without masks.
    pub kept: f64,
    /// Number of samples in each tenth of sigma.
    pub sigma_histogram: [f64; SIGMA_BINS],
    by_sigma: BySigma,
}

/// Sums over the samples in each tenth of sigma.
#[derive(Clone, Copy, Debug, PartialEq)]
struct BySigma {
    /// Sum of the means, over a sample's elements, of the unweighted loss times the masks' weights.
    losses: [f64; SIGMA_BINS],
    /// Sum of the shares that the masks keep.
    kept: [f64; SIGMA_BINS],
}

/// The results of a step from which statistics are computed.
pub(super) struct Observed<'a> {
    pub sigma: &'a Tensor,
    pub timesteps: &'a Tensor,
    pub latents: &'a Tensor,
    pub noise: &'a Tensor,
    pub noisy_latents: &'a Tensor,
    pub model_pred: &'a Tensor,
    pub target: &'a Tensor,
    pub loss: &'a LossValues,
}

impl Statistics {
    /// Numbers of a row for each sample: sigma, timestep, weight, masked mean of the unweighted
    /// loss, share that the masks keep.
    const PER_SAMPLE: usize = 5;

    /// Numbers of a row for the whole batch: five ranges, two mean losses.
    const SCALARS: usize = 5 * 2 + 2;

    /// Returns the length of the row of a batch with this many samples.
    pub const fn width(samples: usize) -> usize {
        Self::PER_SAMPLE * samples + Self::SCALARS
    }

    /// Returns `[width(B)]` f32 on the device, without a host synchronization; must be called
    /// without a graph. Only reductions of whole tensors run there: each operator costs more than
    /// all of the host's work on the few numbers of each sample.
    pub(super) fn measure(observed: &Observed<'_>) -> Tensor {
        let Observed { sigma, timesteps, latents, noise, noisy_latents, model_pred, target, loss } =
            observed;
        let kept = loss.kept.share_of_samples(sigma.size()[0], sigma.device());
        let ranges = apply(Ranges, [latents, noise, noisy_latents, model_pred, target]);
        let [weighted, unweighted] =
            [&loss.average_weighted_loss, &loss.average_unweighted_loss].map(|mean| mean.view(1));
        let weight = loss.loss_weight.flatten(0, -1);
        let losses = loss.sample_losses();
        Tensor::cat(
            &[sigma, timesteps, &weight, &losses, &kept, &ranges, &weighted, &unweighted],
            0,
        )
    }

    /// Reads a row that [`FlowMatchingPipeline::step`](super::FlowMatchingPipeline::step) measured.
    ///
    /// # Panics
    /// If no batch's row has this length (a bug in the caller).
    pub fn from_row(row: &[f32]) -> Self {
        let samples = row.len().saturating_sub(Self::SCALARS) / Self::PER_SAMPLE;
        assert_eq!(row.len(), Self::width(samples), "a row of statistics");
        let (per_sample, scalars) = row.split_at(Self::PER_SAMPLE * samples);
        let column = |number: usize| &per_sample[number * samples..][..samples];
        let (sigma, kept) = (column(0), column(4));
        let (sigma_histogram, by_sigma) = histogram(sigma, column(3), kept);
        let scalars = &mut scalars.iter().map(|&number| f64::from(number));
        // Fields are evaluated in this order, in which `measure` wrote the scalars.
        Statistics {
            sigma: Moments::from_values(sigma),
            timesteps: Moments::from_values(column(1)),
            weight: Moments::from_values(column(2)),
            latents: Range::read(scalars),
            noise: Range::read(scalars),
            noisy_latents: Range::read(scalars),
            prediction: Range::read(scalars),
            target: Range::read(scalars),
            loss: take::<1>(scalars)[0],
            unweighted_loss: take::<1>(scalars)[0],
            kept: kept.iter().map(|&share| f64::from(share)).sum(),
            sigma_histogram,
            by_sigma,
        }
    }

    /// Returns the statistics of both together.
    pub fn merge(self, other: &Self) -> Self {
        let kept = self.kept + other.kept;
        let share = if kept > 0.0 { other.kept / kept } else { 0.0 };
        Statistics {
            sigma: self.sigma.merge(other.sigma),
            timesteps: self.timesteps.merge(other.timesteps),
            weight: self.weight.merge(other.weight),
            latents: self.latents.merge(other.latents),
            noise: self.noise.merge(other.noise),
            noisy_latents: self.noisy_latents.merge(other.noisy_latents),
            prediction: self.prediction.merge(other.prediction),
            target: self.target.merge(other.target),
            loss: self.loss + share * (other.loss - self.loss),
            unweighted_loss: self.unweighted_loss
                + share * (other.unweighted_loss - self.unweighted_loss),
            kept,
            sigma_histogram: added(self.sigma_histogram, other.sigma_histogram),
            by_sigma: BySigma {
                losses: added(self.by_sigma.losses, other.by_sigma.losses),
                kept: added(self.by_sigma.kept, other.by_sigma.kept),
            },
        }
    }

    /// Returns the mean unweighted loss, over the elements that the masks keep, in each tenth of
    /// sigma; `None` if nothing was kept.
    pub fn loss_per_sigma(&self) -> [Option<f64>; SIGMA_BINS] {
        let BySigma { losses, kept } = self.by_sigma;
        std::array::from_fn(|bin| (kept[bin] > 0.0).then(|| losses[bin] / kept[bin]))
    }

    /// Returns the factor that converts a gradient of the mean over all elements to one of the mean
    /// over those kept; 1 without masks, and if nothing was kept.
    pub fn gradient_scale(&self) -> f64 {
        if self.kept > 0.0 { self.sigma.count / self.kept } else { 1.0 }
    }
}

fn added(a: [f64; SIGMA_BINS], b: [f64; SIGMA_BINS]) -> [f64; SIGMA_BINS] {
    std::array::from_fn(|bin| a[bin] + b[bin])
}

/// Returns the number of samples in each tenth of sigma, and the sums of their values.
fn histogram(sigma: &[f32], sample_losses: &[f32], kept: &[f32]) -> ([f64; SIGMA_BINS], BySigma) {
    let mut counts = [0.0; SIGMA_BINS];
    let mut sums = BySigma { losses: [0.0; SIGMA_BINS], kept: [0.0; SIGMA_BINS] };
    for (sigma, (loss, share)) in sigma.iter().zip(sample_losses.iter().zip(kept)) {
        // NaN falls into bin 0; the loss itself is checked elsewhere.
        let bin = ((sigma * SIGMA_BINS as f32) as usize).min(SIGMA_BINS - 1);
        counts[bin] += 1.0;
        sums.losses[bin] += f64::from(*loss);
        sums.kept[bin] += f64::from(*share);
    }
    (counts, sums)
}

fn take<const N: usize>(row: &mut impl Iterator<Item = f64>) -> [f64; N] {
    std::array::from_fn(|_| row.next().expect("the width was checked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_moments_are_those_of_all_values() {
        let (a, b) = ([0.1f32, 0.7, 0.4], [0.9f32, 0.2]);
        let merged = Moments::from_values(&a).merge(Moments::from_values(&b));
        let all = Moments::from_values(&[0.1, 0.7, 0.4, 0.9, 0.2]);
        // f64 rounding of a few sums of numbers below 1.
        assert!((merged.mean - all.mean).abs() < 1e-15 && (merged.std() - all.std()).abs() < 1e-15);
        // The numbers were rounded to f32 before.
        assert!((all.mean - 0.46).abs() < 1e-7 && (all.std() - 0.113f64.sqrt()).abs() < 1e-7);
        assert_eq!((merged.min, merged.max, merged.count), (all.min, all.max, 5.0));
    }

    #[test]
    fn losses_are_averaged_in_their_tenth_of_sigma_by_what_is_kept() {
        let (counts, sums) =
            histogram(&[0.05, 0.95, 0.99, 1.0], &[1.0, 2.0, 2.0, 0.0], &[1.0, 1.0, 0.5, 0.0]);
        assert_eq!(counts, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]);
        assert_eq!((sums.losses[0], sums.losses[9]), (1.0, 4.0));
        assert_eq!((sums.kept[0], sums.kept[9]), (1.0, 1.5));
    }

    /// Returns statistics of samples at sigma 0.5 with these losses and shares; `loss` is their
    /// mean.
    fn masked(losses: &[f32], kept: &[f32], loss: f32) -> Statistics {
        let samples = losses.len();
        let columns = [
            &vec![0.5; samples],
            &vec![500.0; samples],
            &vec![1.0; samples],
            &losses.to_vec(),
            &kept.to_vec(),
        ];
        let row = [columns.map(Vec::as_slice).concat(), vec![0.0; 10], vec![loss; 2]].concat();
        Statistics::from_row(&row)
    }

    #[test]
    fn batches_merge_by_what_their_masks_keep() {
        // Sample means 8 and 2 over all elements, of which 1 and 1/4 are kept: losses of 8 over the
        // first's, 8 over the second's.
        let merged = masked(&[8.0], &[1.0], 8.0).merge(&masked(&[2.0, 0.0], &[0.25, 0.0], 8.0));
        assert_eq!((merged.loss, merged.kept, merged.gradient_scale()), (8.0, 1.25, 3.0 / 1.25));
        assert_eq!(merged.loss_per_sigma()[5], Some(8.0));
        let merged = masked(&[3.0], &[1.0], 3.0).merge(&masked(&[2.5], &[0.5], 5.0));
        assert!((merged.loss - 5.5 / 1.5).abs() < 1e-15, "{}", merged.loss);
    }

    #[test]
    fn batches_that_keep_nothing_have_a_loss_of_zero() {
        let merged = masked(&[0.0], &[0.0], 0.0).merge(&masked(&[0.0], &[0.0], 0.0));
        assert_eq!((merged.loss, merged.kept, merged.gradient_scale()), (0.0, 0.0, 1.0));
        assert_eq!(merged.loss_per_sigma(), [None; SIGMA_BINS]);
    }
}
