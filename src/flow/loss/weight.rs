//! Weights of the samples' losses.

use tch::{Device, Kind, Tensor};

use super::super::settings::{FlowMatchingSettings, LossWeightingScheme};
use super::super::time_shift::{WeightShift, get_flow_match_loss_weight};

/// The weighting of a run, with a table if the scheme has one.
#[derive(Debug)]
pub enum LossWeight {
    One,
    /// `1 + shift·sigma`.
    Linear {
        shift: WeightShift,
    },
    /// A bell-shaped table over the timesteps, `[N]` f32.
    Bsmntw {
        table: Tensor,
    },
    /// `sigma⁻²`.
    SigmaSqrt,
    /// `2/(π·(1 − 2·sigma + 2·sigma²))`.
    Cosmap,
}

impl LossWeight {
    pub fn new(settings: &FlowMatchingSettings, device: Device) -> Self {
        if !settings.use_loss_weighting {
            return LossWeight::One;
        }
        match settings.loss_weighting_scheme {
            LossWeightingScheme::Linear => {
                LossWeight::Linear { shift: WeightShift(settings.flow_shift) }
            }
            LossWeightingScheme::Bsmntw => LossWeight::Bsmntw {
                table: bsmntw_table(settings.num_train_timesteps).to_device(device),
            },
            LossWeightingScheme::SigmaSqrt => LossWeight::SigmaSqrt,
            LossWeightingScheme::Cosmap => LossWeight::Cosmap,
        }
    }

    /// `sigma`: `[B]` f32. Returns `[B]` f32.
    ///
    /// Source of `sigma_sqrt` and `cosmap`: `compute_loss_weighting_for_sd3` of diffusers 0.42.1.
    pub fn weights(&self, sigma: &Tensor) -> Tensor {
        match self {
            LossWeight::One => sigma.ones_like(),
            LossWeight::Linear { shift } => get_flow_match_loss_weight(sigma, *shift),
            LossWeight::Bsmntw { table } => {
                let steps = table.size()[0];
                let index = (sigma * steps as f64).to_kind(Kind::Int64).clamp(0, steps - 1);
                table.index_select(0, &index)
            }
            LossWeight::SigmaSqrt => sigma.pow_tensor_scalar(-2.0),
            LossWeight::Cosmap => {
                let bottom = 1.0 - sigma * 2.0 + sigma.square() * 2.0;
                2.0 / (bottom * std::f64::consts::PI)
            }
        }
    }
}

/// Returns bell-shaped weights over `steps` timesteps: mean 1, minimum 0, highest in the middle.
/// `[steps]` f32.
///
/// Source: the scheme that ai-toolkit and NeMo AutoModel call bsmntw.
pub fn bsmntw_table(steps: i64) -> Tensor {
    let timesteps = Tensor::arange(steps, (Kind::Float, Device::Cpu));
    let centred = (timesteps - steps as f64 / 2.0) / steps as f64;
    let bell = (centred.square() * -2.0).exp();
    let raised = &bell - bell.min();
    let scale = raised.sum(Kind::Float).reciprocal() * steps as f64;
    raised * scale
}

#[cfg(test)]
mod tests {
    use std::f32::consts::FRAC_2_PI;

    use super::*;

    #[test]
    fn the_bell_has_the_specified_values() {
        let table = Vec::<f32>::try_from(bsmntw_table(1000)).expect("f32");
        for (timestep, expected) in [
            (0, 0.0),
            (100, 0.480_215),
            (250, 1.107_882),
            (500, 1.579_605),
            (750, 1.107_882),
            (999, 0.004_869_9),
        ] {
            assert!(
                (table[timestep] - expected).abs() < 2e-6,
                "w[{timestep}] = {}",
                table[timestep]
            );
        }
        assert!((bsmntw_table(10).double_value(&[5]) - 1.592_547).abs() < 2e-6);
        assert!((table.iter().sum::<f32>() - 1000.0).abs() < 1e-2);
    }

    #[test]
    fn weights_of_sigma_have_the_specified_values() {
        let sigma = Tensor::from_slice(&[0.1f32, 0.5, 1.0]);
        let weights =
            |weight: LossWeight| Vec::<f32>::try_from(weight.weights(&sigma)).expect("f32");
        for (found, expected) in [
            (weights(LossWeight::SigmaSqrt), [100.0, 4.0, 1.0]),
            (weights(LossWeight::Cosmap), [0.776_366, 1.273_24, FRAC_2_PI]),
        ] {
            assert!(
                found.iter().zip(expected).all(|(a, b): (&f32, f32)| (a / b - 1.0).abs() < 1e-6),
                "{found:?}"
            );
        }
    }

    #[test]
    fn the_table_is_read_at_the_truncated_timestep() {
        let weight = LossWeight::Bsmntw { table: bsmntw_table(10) };
        let read = Vec::<f32>::try_from(weight.weights(&Tensor::from_slice(&[0.59f32, 1.0, 0.0])))
            .expect("f32");
        let table = Vec::<f32>::try_from(bsmntw_table(10)).expect("f32");
        assert_eq!(read, [table[5], table[9], table[0]]);
    }
}
