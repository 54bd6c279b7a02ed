//! Noise levels of generation: the spacing, shift and end that a family uses.

use tch::{Device, Kind, Tensor};

use super::time_shift::{empirical_mu, shifted};

/// A family's rule for its noise levels, for any number of steps.
///
/// Source: `FlowMatchEulerDiscreteScheduler` of diffusers 0.42.1 as the family's pipeline sets it
/// up. That code rounds to f32 between its operations and this one only at the end, so that the two
/// differ by a few units in the last place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevels {
    spacing: Spacing,
    shift: Shift,
    /// Lowest level before 0, if the levels are stretched to end there.
    terminal: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Spacing {
    Even,
    DownToTraining { num_train_timesteps: i64 },
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
        NoiseLevels { spacing: Spacing::Even, shift, terminal: None }
    }

    /// Returns levels that are even from 1 down to the lowest level of training, which is already
    /// shifted, and then shifted: the scheduler's default if a pipeline gives it no levels.
    pub fn down_to_training(shift: f64, num_train_timesteps: i64) -> Self {
        NoiseLevels {
            spacing: Spacing::DownToTraining { num_train_timesteps },
            shift: Shift::Constant(shift),
            terminal: None,
        }
    }

    /// Returns the same levels, stretched so that the last one before 0 is `terminal`.
    pub fn ending_at(self, terminal: f64) -> Self {
        NoiseLevels { terminal: Some(terminal), ..self }
    }

    /// Returns the same levels with another shift.
    pub fn with_shift(self, shift: f64) -> Self {
        NoiseLevels { shift: Shift::Constant(shift), ..self }
    }

    /// Returns the levels of `steps` steps, from 1 down to 0: `steps + 1` of them, each an f32
    /// number.
    pub fn sigmas(&self, steps: i64) -> Vec<f64> {
        let shift = self.shift.for_steps(steps);
        let lowest = match self.spacing {
            Spacing::Even => 1.0 / steps as f64,
            Spacing::DownToTraining { num_train_timesteps } => {
                shifted(&Tensor::from(1.0 / num_train_timesteps as f64), shift).double_value(&[])
            }
        };
        let levels =
            shifted(&Tensor::linspace(1.0, lowest, steps, (Kind::Double, Device::Cpu)), shift);
        let levels = match self.terminal {
            // A single level is 1 and cannot be stretched.
            Some(terminal) if steps > 1 => stretched(&levels, terminal),
            _ => levels,
        };
        let rounded = Vec::<f32>::try_from(levels.to_kind(Kind::Float)).expect("f32");
        rounded.into_iter().chain([0.0]).map(f64::from).collect()
    }
}

/// Scales the distances from 1 so that the last level is `terminal`.
fn stretched(levels: &Tensor, terminal: f64) -> Tensor {
    let below_one: Tensor = 1.0 - levels;
    let scale = (1.0 - terminal) / below_one.double_value(&[-1]);
    1.0 - below_one * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_fall_from_one_to_zero_and_linger_at_noise_when_shifted() {
        let levels = NoiseLevels::even(Shift::Constant(3.0)).sigmas(4);
        assert_eq!((levels[0], levels[4]), (1.0, 0.0));
        assert!(levels.windows(2).all(|pair| pair[1] < pair[0]) && (levels[2] - 0.75).abs() < 1e-7);
    }

    #[test]
    fn a_terminal_level_is_reached_and_the_first_stays_one() {
        let levels = NoiseLevels::even(Shift::Constant(2.0)).ending_at(0.02);
        let found = levels.sigmas(20);
        assert!(
            found[0] == 1.0 && (found[19] - 0.02).abs() < 1e-7 && found[20] == 0.0,
            "{found:?}"
        );
        assert_eq!(levels.sigmas(1), [1.0, 0.0], "one step goes straight to the data");
    }
}
