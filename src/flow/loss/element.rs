//! The loss of one element, before weights and masks.

use tch::{Kind, Tensor};

use super::super::settings::{FlowMatchingSettings, HuberSchedule, LossType};
use crate::tensor::broadcast_to_rank;

/// A loss that grows with the error's square where the error is small, and with its absolute value
/// where it is large.
#[derive(Clone, Copy, Debug)]
pub struct Huber {
    is_smooth: bool,
    /// The error at which the loss turns, at sigma 1 or for all sigmas.
    turn: f64,
    schedule: HuberSchedule,
}

impl Huber {
    /// Returns the configured loss; `None` for the squared error.
    pub fn new(settings: &FlowMatchingSettings) -> Option<Self> {
        let is_smooth = match settings.loss_type {
            LossType::Mse => return None,
            LossType::Huber => false,
            LossType::PseudoHuber => true,
        };
        Some(Huber { is_smooth, turn: settings.huber_c, schedule: settings.huber_schedule })
    }

    /// Returns the loss of each element, f32. With the error `e` and the turn `c`, it is
    /// `e²/2` up to `|e| = c` and `c·(|e| − c/2)` beyond, or, if smooth, `sqrt(e² + c²) − c`.
    ///
    /// # Shapes
    /// `prediction`, `target`: `[B, …]`; `sigma`: `[B]` f32. Returns `[B, …]`.
    ///
    /// Source: Huber 1964, as `torch.nn.HuberLoss`; Song & Dhariwal 2023, arXiv:2310.14189,
    /// section 3.3.
    pub fn loss(&self, prediction: &Tensor, target: &Tensor, sigma: &Tensor) -> Tensor {
        let error = prediction.to_kind(Kind::Float) - target.to_kind(Kind::Float);
        let turn = broadcast_to_rank(&self.turns(sigma), error.dim());
        if self.is_smooth {
            return (error.square() + turn.square()).sqrt() - turn;
        }
        let size = error.abs();
        let beyond = &turn * (&size - &turn * 0.5);
        (error.square() * 0.5).where_self(&size.lt_tensor(&turn), &beyond)
    }

    /// Returns the turn of each sample, `[B]` f32.
    fn turns(&self, sigma: &Tensor) -> Tensor {
        match self.schedule {
            HuberSchedule::Constant => sigma.full_like(self.turn),
            HuberSchedule::Exponential => (sigma * self.turn.ln()).exp(),
            HuberSchedule::Snr => {
                let data: Tensor = 1.0 - sigma;
                data.square() * (1.0 - self.turn) + self.turn
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Losses of the errors 0.05, −0.4 and 2 at sigma 0.25, with a turn of 0.1.
    fn losses(loss_type: LossType, huber_schedule: HuberSchedule) -> Vec<f64> {
        let settings = FlowMatchingSettings {
            loss_type,
            huber_schedule,
            huber_c: 0.1,
            ..FlowMatchingSettings::default()
        };
        let huber = Huber::new(&settings).expect("no squared error");
        let error = Tensor::from_slice(&[0.05f32, -0.4, 2.0]).view([1, 3]);
        let loss = huber.loss(&error, &error.zeros_like(), &Tensor::from_slice(&[0.25f32]));
        Vec::try_from(loss.view([3]).to_kind(Kind::Double)).expect("three numbers")
    }

    fn assert_losses(loss_type: LossType, schedule: HuberSchedule, turn: f64) {
        let expected = [0.05f64, 0.4, 2.0].map(|error| match loss_type {
            LossType::PseudoHuber => (error * error + turn * turn).sqrt() - turn,
            _ if error < turn => error * error / 2.0,
            _ => turn * (error - turn / 2.0),
        });
        let found = losses(loss_type, schedule);
        // f32 rounding of numbers up to 2, whose difference the smooth loss takes.
        assert!(
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 5e-7),
            "{loss_type:?} {schedule:?}: {found:?}, expected {expected:?}"
        );
    }

    #[test]
    fn losses_turn_where_their_schedule_says() {
        for loss_type in [LossType::Huber, LossType::PseudoHuber] {
            assert_losses(loss_type, HuberSchedule::Constant, 0.1);
            assert_losses(loss_type, HuberSchedule::Exponential, 0.1f64.powf(0.25));
            assert_losses(loss_type, HuberSchedule::Snr, 0.9 * 0.5625 + 0.1);
        }
    }

    #[test]
    fn a_huber_loss_is_half_a_square_and_then_a_line_and_the_squared_error_is_the_adapters() {
        let constant = losses(LossType::Huber, HuberSchedule::Constant);
        assert!((constant[1] - 0.035).abs() < 1e-7 && (constant[2] - 0.195).abs() < 1e-7);
        assert!(Huber::new(&FlowMatchingSettings::default()).is_none(), "the reference's loss");
    }

    #[test]
    fn the_gradient_of_a_perfect_prediction_is_zero() {
        for loss_type in [LossType::Huber, LossType::PseudoHuber] {
            let settings = FlowMatchingSettings { loss_type, ..FlowMatchingSettings::default() };
            let huber = Huber::new(&settings).expect("no squared error");
            let prediction =
                Tensor::zeros([1, 2], (Kind::Float, tch::Device::Cpu)).set_requires_grad(true);
            let loss =
                huber.loss(&prediction, &prediction.zeros_like(), &Tensor::from_slice(&[0.5f32]));
            loss.sum(Kind::Float).backward();
            assert!(prediction.grad().equal(&prediction.zeros_like()), "{loss_type:?}");
        }
    }
}
