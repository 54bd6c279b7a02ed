//! Noise levels of generation: the spacing, shift and end that a family uses.

use super::solver::Solver;
use crate::flow::time_shift::{empirical_mu, shifted_number};

/// Distance of UniPC's first level from 1, where it could not take a logarithm.
const BELOW_ONE: f64 = 1e-6;

/// A noise level of a trajectory, and what the model is told there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevel {
    /// An f32 number.
    pub sigma: f64,
    /// On the scale of the training timesteps: `sigma` times their number, a whole number for
    /// UniPC.
    pub timestep: f64,
}

/// A family's rule for its noise levels, for any number of steps, and the solver they are made for.
///
/// Source: `FlowMatchEulerDiscreteScheduler` and `UniPCMultistepScheduler` of diffusers 0.42.1 as
/// the family's pipeline sets them up. The first rounds to f32 between its operations and this code
/// only at the end, so that the two differ by a few units in the last place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevels {
    solver: Solver,
    spacing: Spacing,
    shift: Shift,
    /// Lowest level before 0, if the levels are stretched to end there.
    terminal: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Spacing {
    /// 1, (n − 1)/n, …, 1/n.
    Even,
    /// The scheduler's own, if a pipeline gives it no levels.
    DownToTraining,
}

/// Shift of the levels towards noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shift {
    Constant(f64),
    /// FLUX.2's fit over the number of image tokens and of steps.
    Empirical {
        tokens: i64,
    },
}

impl Shift {
    /// Returns the shift for this number of steps.
    fn for_steps(self, steps: i64) -> f64 {
        match self {
            Shift::Constant(shift) => shift,
            Shift::Empirical { tokens } => empirical_mu(tokens as f64, steps as f64).exp(),
        }
    }
}

impl NoiseLevels {
    /// Returns the levels 1, (n − 1)/n, …, 1/n, shifted.
    pub fn even(shift: Shift) -> Self {
        NoiseLevels { solver: Solver::Euler, spacing: Spacing::Even, shift, terminal: None }
    }

    /// Returns levels that are even from 1 down to the lowest level of training and shifted:
    /// Euler's end there, and have that one shifted before, UniPC's would end there with a step
    /// more.
    pub fn down_to_training(shift: f64) -> Self {
        NoiseLevels { spacing: Spacing::DownToTraining, ..Self::even(Shift::Constant(shift)) }
    }

    /// Returns the same levels, stretched so that the last one before 0 is `terminal`.
    #[must_use]
    pub fn ending_at(self, terminal: impl Into<Option<f64>>) -> Self {
        NoiseLevels { terminal: terminal.into(), ..self }
    }

    /// Returns the same levels with another shift.
    #[must_use]
    pub fn with_shift(self, shift: f64) -> Self {
        NoiseLevels { shift: Shift::Constant(shift), ..self }
    }

    /// Returns the levels for another solver.
    #[must_use]
    pub fn with_solver(self, solver: Solver) -> Self {
        NoiseLevels { solver, ..self }
    }

    pub fn solver(&self) -> Solver {
        self.solver
    }

    pub fn shift(&self) -> Shift {
        self.shift
    }

    /// Returns the levels of `steps` steps, from noise down to 0: `steps + 1` of them.
    pub fn of_steps(&self, steps: i64, num_train_timesteps: i64) -> Vec<NoiseLevel> {
        let shift = self.shift.for_steps(steps);
        let last_of_training = 1.0 / num_train_timesteps as f64;
        let mut levels = match (self.spacing, self.solver) {
            (Spacing::Even, _) => evenly(1.0 / steps as f64, steps),
            (Spacing::DownToTraining, Solver::Euler) => {
                evenly(shifted_number(last_of_training, shift), steps)
            }
            (Spacing::DownToTraining, Solver::UniPc) => evenly(last_of_training, steps + 1),
        };
        levels.truncate(steps as usize);
        // The scheduler's form of `shifted`, whose last bit decides a whole timestep.
        levels.iter_mut().for_each(|u| *u = shift * *u / (1.0 + (shift - 1.0) * *u));
        if let Some(terminal) = self.terminal {
            stretch(&mut levels, terminal);
        }
        let end = NoiseLevel { sigma: 0.0, timestep: 0.0 };
        let levels = levels.into_iter().map(|sigma| self.level(sigma, num_train_timesteps));
        levels.chain([end]).collect()
    }

    fn level(&self, sigma: f64, num_train_timesteps: i64) -> NoiseLevel {
        let rounded = |sigma: f64| sigma as f32;
        match self.solver {
            Solver::Euler => {
                let timestep = rounded(sigma) * num_train_timesteps as f32;
                NoiseLevel { sigma: rounded(sigma).into(), timestep: timestep.into() }
            }
            Solver::UniPc => {
                let sigma = if 1.0 - sigma < BELOW_ONE { sigma - BELOW_ONE } else { sigma };
                let timestep = (sigma * num_train_timesteps as f64).trunc();
                NoiseLevel { sigma: rounded(sigma).into(), timestep }
            }
        }
    }
}

/// Returns `count` numbers from 1 to `lowest`; one is 1.
fn evenly(lowest: f64, count: i64) -> Vec<f64> {
    let step = (lowest - 1.0) / (count - 1).max(1) as f64;
    let number = |index: i64| match index {
        0 => 1.0,
        _ if index == count - 1 => lowest,
        _ => index as f64 * step + 1.0,
    };
    (0..count).map(number).collect()
}

/// Scales the distances from 1 so that the last level is `terminal`; a single level is 1 and cannot
/// be stretched.
fn stretch(levels: &mut [f64], terminal: f64) {
    if let [_, .., last] = *levels {
        let scale = (1.0 - last) / (1.0 - terminal);
        levels.iter_mut().for_each(|level| *level = 1.0 - (1.0 - *level) / scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sigmas(levels: NoiseLevels, steps: i64) -> Vec<f64> {
        levels.of_steps(steps, 1000).iter().map(|level| level.sigma).collect()
    }

    #[test]
    fn levels_fall_from_one_to_zero_and_linger_at_noise_when_shifted() {
        let levels = sigmas(NoiseLevels::even(Shift::Constant(3.0)), 4);
        assert_eq!((levels[0], levels[4]), (1.0, 0.0));
        assert!(levels.windows(2).all(|pair| pair[1] < pair[0]) && (levels[2] - 0.75).abs() < 1e-7);
    }

    #[test]
    fn a_terminal_level_is_reached_and_the_first_stays_one() {
        let levels = NoiseLevels::even(Shift::Constant(2.0)).ending_at(0.02);
        let found = sigmas(levels, 20);
        assert!(
            found[0] == 1.0 && (found[19] - 0.02).abs() < 1e-7 && found[20] == 0.0,
            "{found:?}"
        );
        assert_eq!(sigmas(levels, 1), [1.0, 0.0], "one step goes straight to the data");
    }

    #[test]
    fn unipc_begins_below_one_and_tells_whole_timesteps() {
        let levels = NoiseLevels::down_to_training(3.0).with_solver(Solver::UniPc);
        let found = levels.of_steps(4, 1000);
        let timesteps: Vec<f64> = found.iter().map(|level| level.timestep).collect();
        // By hand: u = 1, 0.75025, 0.5005, 0.25075 through 3u/(1 + 2u) is 1, 0.9001, 0.7504,
        // 0.500999.
        assert_eq!(timesteps, [999.0, 900.0, 750.0, 500.0, 0.0]);
        assert!(found[0].sigma < 1.0 && found[0].sigma > 0.999_998, "{found:?}");
        assert!((found[3].sigma - 0.501).abs() < 1e-3, "{found:?}");
    }
}
