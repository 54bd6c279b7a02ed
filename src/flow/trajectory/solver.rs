//! Integrates the learned velocity from noise to data.

use tch::{Kind, Tensor, no_grad};

use super::noise_levels::NoiseLevel;
use super::unipc::unipc;
use crate::error::Result;
use crate::settings::choice;

choice! {
    /// The way of a step from a noise level to the next.
    #[derive(Default)]
    pub enum Solver {
        /// Straight along the velocity.
        #[default]
        "euler" => Euler,
        /// UniPC of second order: a step is predicted from the two predictions before it, and
        /// corrected by the next one. Wan's published pipelines have it.
        "unipc" => UniPc,
    }
}

impl Solver {
    /// Follows `velocity(x, level)` from noise at the first of `levels` to data at the last, whose
    /// sigma is 0.
    ///
    /// # Shapes
    /// `noise`: `[B, …]` f32. Returns the same.
    ///
    /// # Errors
    /// Those of `velocity`.
    pub fn follow(
        self,
        noise: Tensor,
        levels: &[NoiseLevel],
        velocity: impl FnMut(&Tensor, NoiseLevel) -> Result<Tensor>,
    ) -> Result<Tensor> {
        no_grad(|| match self {
            Solver::Euler => euler(noise, levels, velocity),
            Solver::UniPc => unipc(noise, levels, velocity),
        })
    }
}

/// Source: Lipman et al. 2023, arXiv:2210.02747, the ODE of eq. 1, time reversed.
fn euler(
    noise: Tensor,
    levels: &[NoiseLevel],
    mut velocity: impl FnMut(&Tensor, NoiseLevel) -> Result<Tensor>,
) -> Result<Tensor> {
    levels.windows(2).try_fold(noise, |x, pair| {
        let step = velocity(&x, pair[0])?.to_kind(Kind::Float) * (pair[1].sigma - pair[0].sigma);
        Ok(x + step)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{NoiseLevels, Shift};
    use crate::rng::{Key, Purpose};

    const FLOAT: (Kind, tch::Device) = (Kind::Float, tch::Device::Cpu);

    fn levels(solver: Solver, steps: i64) -> Vec<NoiseLevel> {
        NoiseLevels::even(Shift::Constant(3.0)).with_solver(solver).of_steps(steps, 1000)
    }

    fn draw() -> (Tensor, Tensor) {
        let both = || (Tensor::randn([2, 3], FLOAT), Tensor::randn([2, 3], FLOAT));
        Key::new(1, Purpose::Test).seeded(both)
    }

    #[test]
    fn a_constant_velocity_is_followed_exactly_to_the_data() {
        let (data, noise) = draw();
        for (solver, steps) in
            [(Solver::Euler, 7), (Solver::UniPc, 1), (Solver::UniPc, 2), (Solver::UniPc, 7)]
        {
            let velocity = |_: &Tensor, _: NoiseLevel| Ok(&noise - &data);
            let reached = solver.follow(noise.copy(), &levels(solver, steps), velocity);
            let difference = (reached.expect("no error inside") - &data).abs().max();
            // A few f32 operations a step on numbers below 10; UniPC begins 1e-6 below noise.
            assert!(difference.double_value(&[]) < 2e-5, "{solver:?} {steps}: {difference}");
        }
    }

    /// The velocity towards data that are normal with a spread of 0.5; it bends on the way.
    fn of_normal_data(x: &Tensor, level: NoiseLevel) -> Tensor {
        let (sigma, variance) = (level.sigma, 0.25);
        let spread = (1.0 - sigma).powi(2) * variance + sigma * sigma;
        x * ((sigma - (1.0 - sigma) * variance) / spread)
    }

    #[test]
    fn unipc_is_nearer_to_the_end_of_a_bent_path_than_euler() {
        let (_, noise) = draw();
        // The path keeps each sample's place in its distribution.
        let end = &noise * 0.5;
        let farthest = |solver: Solver, steps: i64| {
            let velocity = |x: &Tensor, level: NoiseLevel| Ok(of_normal_data(x, level));
            let reached = solver.follow(noise.copy(), &levels(solver, steps), velocity);
            (reached.expect("no error inside") - &end).abs().max().double_value(&[])
        };
        let [euler, unipc] = [Solver::Euler, Solver::UniPc].map(|solver| farthest(solver, 20));
        assert!(unipc < 0.2 * euler, "UniPC is {unipc} off, Euler {euler}");
        let finer = farthest(Solver::UniPc, 80);
        assert!(finer < 0.15 * unipc, "of second order: {unipc} with 20 steps, {finer} with 80");
    }

    #[test]
    fn an_error_of_the_velocity_ends_the_way() {
        let (_, noise) = draw();
        for solver in [Solver::Euler, Solver::UniPc] {
            let mut asked = 0;
            let ended = solver.follow(noise.copy(), &levels(solver, 5), |x, _| {
                asked += 1;
                match asked {
                    3 => Err(crate::error::Error::config("test", "the third")),
                    _ => Ok(x.zeros_like()),
                }
            });
            assert!(ended.is_err() && asked == 3, "{solver:?}: {asked}");
        }
    }
}
