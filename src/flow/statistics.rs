//! What the logs say of a step, measured on the device as one row of numbers that ranks can gather.

use tch::{Kind, Tensor};

use super::loss::LossValues;

/// Bins of the sigma histogram over `[0, 1]`.
pub const SIGMA_BINS: usize = 10;

/// Count, mean, sum of squared deviations, least and largest: enough to merge exactly.
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
    const WIDTH: usize = 5;

    /// Unbiased standard deviation; 0 for a single value.
    pub fn std(&self) -> f64 {
        if self.count > 1.0 { (self.squares / (self.count - 1.0)).sqrt() } else { 0.0 }
    }

    /// Of the rows of `values`, one after the other: `[rows, N]` gives `[rows · WIDTH]` f32.
    fn measure(values: &Tensor) -> Tensor {
        let along = [1i64].as_slice();
        let num_values = values.size()[1];
        let (variance, mean) = values.var_mean_correction(along, 0.0, true);
        let squares = variance * num_values as f64;
        let (min, max) = values.aminmax(1, true);
        let count = mean.full_like(num_values);
        Tensor::cat(&[count, mean, squares, min, max], 1).flatten(0, 1)
    }

    fn read(row: &mut impl Iterator<Item = f64>) -> Self {
        let [count, mean, squares, min, max] = take(row);
        Moments { count, mean, squares, min, max }
    }

    /// Source: Chan, Golub & LeVeque 1979, the pairwise update.
    fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        let apart = other.mean - self.mean;
        Moments {
            count,
            mean: self.mean + apart * other.count / count,
            squares: self.squares + other.squares + apart * apart * self.count * other.count / count,
            min: merge_min(self.min, other.min),
            max: merge_max(self.max, other.max),
        }
    }
}

/// Least and largest element of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    pub min: f64,
    pub max: f64,
}

impl Range {
    const WIDTH: usize = 2;

    fn read(row: &mut impl Iterator<Item = f64>) -> Self {
        let [min, max] = take(row);
        Range { min, max }
    }

    fn merge(self, other: Self) -> Self {
        Range { min: merge_min(self.min, other.min), max: merge_max(self.max, other.max) }
    }
}

/// NaN on either side stays, so that it is not lost on the way to the log.
fn merge_min(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.min(b) }
}

fn merge_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// A step's numbers, over however many samples, micro-batches and ranks were merged.
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
    /// Mean weighted loss with auxiliary losses: what is differentiated.
    pub loss: f64,
    pub unweighted_loss: f64,
    /// Samples in each tenth of sigma.
    pub sigma_histogram: [f64; SIGMA_BINS],
    /// Sum of the samples' mean unweighted losses in each tenth of sigma.
    loss_sums: [f64; SIGMA_BINS],
}

/// What a step computed, as far as statistics look at it.
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
    /// Numbers in a row.
    pub const WIDTH: usize = 3 * Moments::WIDTH + 5 * Range::WIDTH + 2 + 2 * SIGMA_BINS;

    /// `[WIDTH]` f32 on the device, without a host synchronization; to be called without a graph.
    pub(super) fn measure(observed: &Observed<'_>) -> Tensor {
        let loss = observed.loss;
        let moments = Moments::measure(&Tensor::stack(&[observed.sigma, observed.timesteps, &loss.loss_weight.flatten(0, -1)], 0));
        let tensors = [observed.latents, observed.noise, observed.noisy_latents, observed.model_pred, observed.target];
        // Without an axis: along one, even the only one, the operator takes a hundred times as long.
        let range = |tensor: &Tensor| <[Tensor; 2]>::from(tensor.aminmax(None::<i64>, false));
        let mut scalars: Vec<Tensor> = tensors.into_iter().flat_map(range).collect();
        scalars.extend([&loss.average_weighted_loss, &loss.average_unweighted_loss].map(Tensor::shallow_clone));
        let histogram = histogram(observed.sigma, &loss.unweighted_loss);
        Tensor::cat(&[moments, Tensor::stack(&scalars, 0), histogram.flatten(0, 1)], 0)
    }

    /// Reads a row that [`FlowMatchingPipeline::step`](super::FlowMatchingPipeline::step) measured.
    ///
    /// # Panics
    /// If the row has another width (a bug in the caller).
    pub fn from_row(row: &[f32]) -> Self {
        assert_eq!(row.len(), Self::WIDTH, "one row of statistics");
        let row = &mut row.iter().map(|&number| f64::from(number));
        // Fields are evaluated in the order in which `measure` wrote them.
        Statistics {
            sigma: Moments::read(row),
            timesteps: Moments::read(row),
            weight: Moments::read(row),
            latents: Range::read(row),
            noise: Range::read(row),
            noisy_latents: Range::read(row),
            prediction: Range::read(row),
            target: Range::read(row),
            loss: take::<1>(row)[0],
            unweighted_loss: take::<1>(row)[0],
            sigma_histogram: take(row),
            loss_sums: take(row),
        }
    }

    /// The statistics of both together.
    pub fn merge(self, other: &Self) -> Self {
        let share = other.sigma.count / (self.sigma.count + other.sigma.count);
        let add = |a: [f64; SIGMA_BINS], b: [f64; SIGMA_BINS]| std::array::from_fn(|bin| a[bin] + b[bin]);
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
            unweighted_loss: self.unweighted_loss + share * (other.unweighted_loss - self.unweighted_loss),
            sigma_histogram: add(self.sigma_histogram, other.sigma_histogram),
            loss_sums: add(self.loss_sums, other.loss_sums),
        }
    }

    /// Mean unweighted loss in each tenth of sigma; none where no sample fell.
    pub fn loss_per_sigma(&self) -> [Option<f64>; SIGMA_BINS] {
        std::array::from_fn(|bin| (self.sigma_histogram[bin] > 0.0).then(|| self.loss_sums[bin] / self.sigma_histogram[bin]))
    }
}

/// Samples, and sums of their mean losses, in each bin of sigma: `[2, SIGMA_BINS]` f32.
fn histogram(sigma: &Tensor, unweighted_loss: &Tensor) -> Tensor {
    let per_sample = unweighted_loss.flatten(1, -1).mean_dim([1i64].as_slice(), false, Kind::Float);
    let bins = SIGMA_BINS as i64;
    // NaN becomes the lowest integer and lands in bin 0; the loss itself is checked elsewhere.
    let bin = (sigma * bins as f64).to_kind(Kind::Int64).clamp(0, bins - 1);
    let added = Tensor::stack(&[per_sample.ones_like(), per_sample], 0);
    Tensor::zeros([2, bins], (Kind::Float, sigma.device())).index_add_(1, &bin, &added)
}

fn take<const N: usize>(row: &mut impl Iterator<Item = f64>) -> [f64; N] {
    std::array::from_fn(|_| row.next().expect("the width was checked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f32]) -> Moments {
        let row = Moments::measure(&Tensor::from_slice(values).unsqueeze(0));
        Moments::read(&mut Vec::<f32>::try_from(row).expect("f32").into_iter().map(f64::from))
    }

    #[test]
    fn merged_moments_are_those_of_all_values() {
        let (a, b) = ([0.1f32, 0.7, 0.4], [0.9f32, 0.2]);
        let merged = moments(&a).merge(moments(&b));
        let all = moments(&[0.1, 0.7, 0.4, 0.9, 0.2]);
        assert!((merged.mean - all.mean).abs() < 1e-7 && (merged.std() - all.std()).abs() < 1e-7);
        assert_eq!((merged.min, merged.max, merged.count), (all.min, all.max, 5.0));
    }

    #[test]
    fn losses_are_averaged_in_their_tenth_of_sigma() {
        let sigma = Tensor::from_slice(&[0.05f32, 0.95, 0.99, 1.0]);
        let loss = Tensor::from_slice(&[1.0f32, 2.0, 4.0, 6.0]).view([4, 1]);
        let found = histogram(&sigma, &loss);
        assert_eq!(Vec::<f32>::try_from(found.get(0)).expect("f32"), [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]);
        assert_eq!(found.double_value(&[1, 9]), 12.0);
    }
}
