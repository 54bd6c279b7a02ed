//! UniPC in predictions of the data, of second order, with `B(h) = exp(h) − 1`.
//!
//! Source: Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6, at the levels
//! `alpha = 1 − sigma` of flow matching; `UniPCMultistepScheduler` of diffusers 0.42.1 with
//! `use_flow_sigmas`, `solver_type = "bh2"`, `solver_order = 2` and `lower_order_final`.

use tch::{Kind, Tensor};

use super::noise_levels::NoiseLevel;
use crate::error::Result;

/// Predictions that a step looks back on.
const ORDER: usize = 2;

/// The data as the model predicted them at a noise level.
struct Prediction {
    sigma: f64,
    data: Tensor,
}

/// Follows the velocity from noise at the first of `levels` to data at the last; see
/// [`Solver::follow`](super::Solver::follow).
pub(super) fn unipc(
    noise: Tensor,
    levels: &[NoiseLevel],
    mut velocity: impl FnMut(&Tensor, NoiseLevel) -> Result<Tensor>,
) -> Result<Tensor> {
    let steps = levels.len() - 1;
    let (mut x, mut past) = (noise, Vec::<Prediction>::with_capacity(ORDER));
    // Where the last step began, and how many predictions it looked back on.
    let mut last: Option<(Tensor, usize)> = None;
    for (index, pair) in levels.windows(2).enumerate() {
        let sigma = pair[0].sigma;
        let data = &x - velocity(&x, pair[0])?.to_kind(Kind::Float) * sigma;
        let found = Prediction { sigma, data };
        if let Some((start, order)) = last {
            x = corrected(&start, &past[past.len() - order..], &found);
        }
        if past.len() == ORDER {
            past.remove(0);
        }
        past.push(found);
        // The last step has no second order: its end, the data, is infinitely far.
        let order = past.len().min(steps - index);
        let next = predicted(&x, &past[past.len() - order..], pair[1].sigma);
        last = Some((x, order));
        x = next;
    }
    Ok(x)
}

/// The way between two noise levels, on the axis of the logarithm of `alpha/sigma`.
struct Stretch {
    /// Its length `h`.
    length: f64,
    /// `alpha` at its end.
    alpha: f64,
    /// `sigma` at its end over that at its begin.
    ratio: f64,
}

impl Stretch {
    fn new(from: f64, to: f64) -> Self {
        Stretch { length: log_ratio(to) - log_ratio(from), alpha: 1.0 - to, ratio: to / from }
    }

    /// `exp(−h) − 1`, in which both the exact part of a step and `B(h)` are.
    fn decay(&self) -> f64 {
        (-self.length).exp_m1()
    }

    /// The end of the stretch if the predicted data do not change on it.
    fn end(&self, start: &Tensor, data: &Tensor) -> Tensor {
        start * self.ratio - data * (self.alpha * self.decay())
    }

    /// The part of a step that follows from changes of the predicted data, each with its weight.
    fn bend(&self, change: &Tensor) -> Tensor {
        change * -(self.alpha * self.decay())
    }

    /// How far `sigma` lies behind the begin, in lengths of the stretch: below 0.
    fn behind(&self, sigma: f64, begin: f64) -> f64 {
        (log_ratio(sigma) - log_ratio(begin)) / self.length
    }

    /// The weights of the changes up to the earlier prediction, at `behind`, and up to the one at
    /// the stretch's end, with which a correction is exact for data that change quadratically.
    fn weights(&self, behind: f64) -> (f64, f64) {
        let h = -self.length;
        let first = self.decay() / h - 1.0;
        let second = first / h - 0.5;
        let (first, second) = (first / self.decay(), 2.0 * second / self.decay());
        let earlier = (second - first) / (behind - 1.0);
        (earlier, first - earlier)
    }
}

fn log_ratio(sigma: f64) -> f64 {
    (1.0 - sigma).ln() - sigma.ln()
}

/// Returns the sample at noise level `to`; `past`: one or two predictions, the last one at `x`.
fn predicted(x: &Tensor, past: &[Prediction], to: f64) -> Tensor {
    let [.., now] = past else { unreachable!("a step follows a prediction") };
    let stretch = Stretch::new(now.sigma, to);
    let end = stretch.end(x, &now.data);
    match past {
        [earlier, now] => {
            let change = (&earlier.data - &now.data) / stretch.behind(earlier.sigma, now.sigma);
            end + stretch.bend(&change) * 0.5
        }
        _ => end,
    }
}

/// Returns the sample at `found`'s level once more, now that the prediction there is known.
/// `start`: the sample from which it was predicted, `past`: the predictions it was predicted by.
fn corrected(start: &Tensor, past: &[Prediction], found: &Prediction) -> Tensor {
    let [.., begin] = past else { unreachable!("a correction follows a step") };
    let stretch = Stretch::new(begin.sigma, found.sigma);
    let end = stretch.end(start, &begin.data);
    let change = &found.data - &begin.data;
    match past {
        [earlier, begin] => {
            let behind = stretch.behind(earlier.sigma, begin.sigma);
            let (first, second) = stretch.weights(behind);
            let before = (&earlier.data - &begin.data) / behind;
            end + stretch.bend(&(before * first + change * second))
        }
        _ => end + stretch.bend(&change) * 0.5,
    }
}
