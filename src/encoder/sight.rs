//! The keys that each query sees.

use tch::{Device, Kind, Tensor};

use crate::nn::attention::attend_plainly;

/// The keys that each query sees where texts are read from left to right.
#[derive(Debug)]
pub struct Sight {
    /// Boolean `[1 or B, 1, L, L]`, true where a query sees a key.
    mask: Tensor,
    /// Boolean `[B, L, 1]`, true for a query that sees no key; `None` if each sees itself.
    blind: Option<Tensor>,
}

impl Sight {
    /// Each token sees itself and the `window` before, all of them without a window, and no
    /// padding.
    ///
    /// # Shapes
    /// `tokens`: boolean `[B, L]`, false for padding.
    pub fn causal(
        length: i64,
        tokens: Option<&Tensor>,
        window: Option<i64>,
        device: Device,
    ) -> Self {
        let places = Tensor::arange(length, (Kind::Int64, device));
        let distance = places.unsqueeze(1) - places.unsqueeze(0);
        let mut seen = distance.ge(0);
        if let Some(window) = window {
            seen = seen.logical_and(&distance.lt(window));
        }
        let seen = seen.view([1, 1, length, length]);
        let Some(tokens) = tokens else { return Sight { mask: seen, blind: None } };
        let mask = seen.logical_and(&tokens.view([-1, 1, 1, length]));
        let blind = mask.any_dim(-1, false).logical_not().transpose(1, 2);
        Sight { mask, blind: Some(blind) }
    }

    /// Attention of all heads; zeros where a query sees no key, as libtorch's attention has it on a
    /// CPU, whatever the device.
    ///
    /// # Shapes
    /// As [`attend_plainly`].
    pub fn attend(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
        let attended = attend_plainly(query, key, value, Some(&self.mask));
        match &self.blind {
            Some(blind) => attended.masked_fill(blind, 0.0),
            None => attended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(mask: &Tensor) -> Vec<Vec<bool>> {
        let mask = mask.squeeze();
        (0..mask.size()[0]).map(|row| Vec::try_from(mask.get(row)).expect("booleans")).collect()
    }

    #[test]
    fn each_token_sees_itself_and_those_before() {
        let (t, f) = (true, false);
        let sight = |window| Sight::causal(3, None, window, Device::Cpu).mask;
        assert_eq!(rows(&sight(None)), [[t, f, f], [t, t, f], [t, t, t]]);
        assert_eq!(rows(&sight(Some(2))), [[t, f, f], [t, t, f], [f, t, t]]);
    }

    #[test]
    fn padding_on_the_left_sees_nothing_and_becomes_zeros() {
        let tokens = Tensor::from_slice(&[false, false, true, true]).view([1, 4]);
        let sight = Sight::causal(4, Some(&tokens), None, Device::Cpu);
        let ones = Tensor::ones([1, 4, 1, 2], (Kind::Float, Device::Cpu));
        let attended = sight.attend(&ones, &ones, &ones);
        let found = Vec::<f32>::try_from(attended.flatten(0, -1)).expect("floats");
        assert_eq!(found, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
    }
}
