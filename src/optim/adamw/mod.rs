//! Adam with decoupled weight decay, in a single pass over memory: by the vectors of a CPU, or by a
//! kernel of our own on a GPU. Both are compared with libtorch's operators.

mod cpu;
mod cuda;
mod plain;

use tch::Device;

pub use cuda::OnGpu;

use super::{Optimizer, Slice, Update};
use crate::error::Result;
use crate::settings::settings;

settings! {
    /// `[optimizer.adamw]`: Adam with decoupled weight decay. Defaults are those of
    /// `torch.optim.AdamW`, except the learning rate.
    ///
    /// Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; rounding follows
    /// `torch.optim.AdamW`; which parameters decay is a setting of `[optimizer]`.
    pub struct AdamW {
        /// Peak learning rate, scaled by the schedule; 1e-4 trains from scratch, 1e-5 fine-tunes.
        lr: f64 = 1e-4, in 0.0..=10.0;
        /// Decay of the gradient's running mean.
        beta1: f64 = 0.9, in 0.0..1.0;
        /// Decay of the squared gradient's running mean; 0.99 forgets spikes sooner.
        beta2: f64 = 0.999, in 0.0..1.0;
        /// Added to the root of the second moment.
        eps: f64 = 1e-8, in 0.0..=1.0;
        /// Share of a weight taken off each step, times the learning rate.
        weight_decay: f64 = 0.01, in 0.0..=10.0;
    }
}

impl Optimizer for AdamW {
    fn lr(&self) -> f64 {
        self.lr
    }

    fn state_names(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn on(&self, device: Device) -> Result<Box<dyn Update>> {
        Ok(match device {
            Device::Cuda(_) => Box::new(OnGpu::ready(self, device)?),
            _ => Box::new(OnCpu { adamw: self.clone() }),
        })
    }
}

/// AdamW by a CPU's vectors.
struct OnCpu {
    adamw: AdamW,
}

impl Update for OnCpu {
    fn update(&self, slice: Slice<'_>, lr: f64, step: u64) {
        let factors = self.adamw.factors(&slice, lr, step);
        cpu::update(slice, factors);
    }
}

/// Factors of one update: the same for every element, in f64 until an operator rounds them.
#[derive(Clone, Copy, Debug)]
struct Factors {
    /// Factor of the gradient.
    gradient: f64,
    /// Factor of a parameter that decays.
    decay: f64,
    beta1: f64,
    beta2: f64,
    /// Square root of the second moment's bias correction.
    root_correction: f64,
    eps: f64,
    /// Factor of the quotient that is added to a parameter: minus the learning rate over the first
    /// moment's bias correction.
    move_by: f64,
    /// Share of its distance to the parameters by which an average moves; 0 without one.
    average_share: f64,
}

impl AdamW {
    fn factors(&self, slice: &Slice<'_>, lr: f64, step: u64) -> Factors {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Factors {
            gradient: slice.gradient_factor,
            decay: 1.0 - lr * (self.weight_decay * slice.decay_factor),
            beta1: self.beta1,
            beta2: self.beta2,
            root_correction: correction(self.beta2).sqrt(),
            eps: self.eps,
            move_by: -lr / correction(self.beta1),
            average_share: slice.average.as_ref().map_or(0.0, |average| average.share),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;
    use crate::optim::{Average, runs};
    use crate::rng::{Key, Purpose};

    fn slice<'a>(
        params: &'a mut Tensor,
        gradient: &'a Tensor,
        state: &'a mut [Tensor],
        decayed: &'a [(i64, i64)],
    ) -> Slice<'a> {
        Slice {
            params,
            gradient,
            gradient_factor: 1.0,
            state,
            computed: None,
            average: None,
            decayed,
            decay_factor: 1.0,
        }
    }

    #[test]
    fn the_first_step_moves_each_parameter_by_the_learning_rate_against_its_gradient() {
        let adamw = AdamW { weight_decay: 0.0, ..AdamW::default() };
        let mut params = Tensor::from_slice(&[1.0f32, 1.0, 1.0]);
        let gradient = Tensor::from_slice(&[0.5f32, -2.0, 0.0]);
        let mut state = [params.zeros_like(), params.zeros_like()];
        OnCpu { adamw }.update(slice(&mut params, &gradient, &mut state, &[]), 0.1, 1);
        let moved = Vec::<f32>::try_from(params).expect("f32");
        assert!(
            (moved[0] - 0.9).abs() < 1e-6 && (moved[1] - 1.1).abs() < 1e-6 && moved[2] == 1.0,
            "{moved:?}"
        );
    }

    #[test]
    fn decay_touches_only_its_runs() {
        let adamw = AdamW { weight_decay: 0.5, ..AdamW::default() };
        let mut params = Tensor::from_slice(&[1.0f32, 1.0, 1.0]);
        let gradient = params.zeros_like();
        let mut state = [params.zeros_like(), params.zeros_like()];
        OnCpu { adamw }.update(slice(&mut params, &gradient, &mut state, &[(1, 1)]), 0.1, 1);
        assert_eq!(Vec::<f32>::try_from(params).expect("f32"), [1.0, 0.95, 1.0]);
    }

    /// Elements that are no multiple of a vector, and more than one thread's share.
    const MANY: i64 = 3 * runs::SHARE as i64 + 37;
    /// The plain operators take roots by a library that may be off by one unit in the last place.
    const ROUNDING: f64 = 3e-7;

    #[test]
    fn the_single_pass_gives_what_the_operators_give() {
        let draw = |scope| {
            Key::new(7, Purpose::Test)
                .scope(scope)
                .seeded(|| Tensor::randn([MANY], (Kind::Float, Device::Cpu)))
        };
        let (begin, adamw) = (draw(0), AdamW::default());
        let decayed = [(0, 10), (1000, MANY - 1500)];
        let after = |update: fn(Slice<'_>, Factors)| {
            let (mut params, mut computed) = (begin.copy(), begin.to_kind(Kind::BFloat16));
            let mut average = begin.copy();
            let mut state = [params.zeros_like(), params.zeros_like()];
            for step in 1..=3 {
                let gradient = draw(step);
                let computed = Some(&mut computed);
                let slice = Slice {
                    params: &mut params,
                    gradient: &gradient,
                    gradient_factor: 0.3,
                    state: &mut state,
                    computed,
                    average: Some(Average { values: &mut average, share: 0.2 }),
                    decayed: &decayed,
                    decay_factor: 1.0,
                };
                let factors = adamw.factors(&slice, 1e-2, step);
                update(slice, factors);
            }
            let [exp_avg, exp_avg_sq] = state;
            [params, exp_avg, exp_avg_sq, average, computed]
        };
        let (single, plain) = (after(cpu::update), after(plain::update));
        for (single, plain) in single.iter().zip(&plain).take(4) {
            assert!(
                single.allclose(plain, ROUNDING, ROUNDING, false),
                "{}",
                (single - plain).abs().max()
            );
        }
        assert!(
            single[4].equal(&single[0].to_kind(Kind::BFloat16)),
            "the copy is rounded as libtorch rounds it"
        );
        assert!((&single[0] - &begin).abs().min().double_value(&[]) > 0.0, "every parameter moved");
    }
}
