//! Dropped inputs of low-rank changes. Whether an input is dropped follows from the sample, the
//! step, the module, the token and the feature alone: not from the rank, the micro-batch or the
//! device.

use tch::{Device, Kind, Tensor, no_grad};

use crate::nn::Rows;
use crate::rng::{self, MIX};

/// Activation with a number of each sample in this step, `[B]` int64: where it is missing, nothing
/// is dropped.
pub const DROPOUT_KEYS: &str = "dropout_keys";

/// Inputs are dropped with probabilities in steps of `1 / STEPS`.
const STEPS: f64 = 65_536.0;
/// Number of the first token of an image in a sequence of text and image: a text may have as many
/// tokens as its micro-batch needs.
const FIRST_IMAGE_TOKEN: i64 = 1 << 20;
/// Numbers that a token takes, four features each.
const NUMBERS_OF_TOKEN: i64 = 1 << 20;

/// The inputs that are dropped in one use of a stage.
#[derive(Debug)]
pub struct Dropping {
    /// `[B]` int64.
    keys: Tensor,
    /// Number of text tokens at the beginning of joint sequences.
    text_tokens: i64,
    /// Number of each token of the text, `[L]` int64, where they do not count from 0.
    text_places: Option<Tensor>,
}

impl Dropping {
    pub fn new(keys: &Tensor, text_tokens: i64, text_places: Option<&Tensor>) -> Self {
        Dropping {
            keys: keys.shallow_clone(),
            text_tokens,
            text_places: text_places.map(|places| places.to_device(keys.device())),
        }
    }

    /// The same for a text of other places.
    pub(in crate::nn) fn at(&self, text_places: Option<&Tensor>) -> Self {
        Dropping::new(&self.keys, self.text_tokens, text_places)
    }

    /// Drops inputs with a probability, and scales the others up.
    ///
    /// # Shapes
    /// `x`: `[B, inputs]` or `[B, L, inputs]`. Returns the same.
    pub(in crate::nn) fn apply(
        &self,
        x: &Tensor,
        probability: f64,
        stream: u64,
        rows: Rows,
    ) -> Tensor {
        let size = x.size();
        let (tokens, inputs) = match size[..] {
            [_, inputs] => (1, inputs),
            [_, tokens, inputs] => (tokens, inputs),
            _ => panic!("[B, inputs] or [B, L, inputs], found {size:?}"),
        };
        let dropped = (probability * STEPS).round();
        let numbers = self.token_numbers(tokens, rows, x.device());
        let kept = no_grad(|| self.kept(&numbers, inputs, dropped as i64, stream).view(&size[..]));
        x * (kept.to_kind(x.kind()) * (STEPS / (STEPS - dropped)))
    }

    /// `[L]` int64.
    fn token_numbers(&self, tokens: i64, rows: Rows, device: Device) -> Tensor {
        let from = |first| Tensor::arange_start(first, first + tokens, (Kind::Int64, device));
        match rows {
            Rows::One | Rows::Image => from(0),
            Rows::Text => self.text_numbers(tokens, device),
            Rows::Joint => {
                let text = self.text_numbers(self.text_tokens, device);
                let image = from(FIRST_IMAGE_TOKEN).narrow(0, 0, tokens - self.text_tokens);
                Tensor::cat(&[text, image], 0)
            }
        }
    }

    /// `[L]` int64.
    fn text_numbers(&self, tokens: i64, device: Device) -> Tensor {
        self.text_places
            .as_ref()
            .map_or_else(|| Tensor::arange(tokens, (Kind::Int64, device)), Tensor::shallow_clone)
    }

    /// Returns which inputs are kept, `[B, L, inputs]` boolean.
    fn kept(&self, tokens: &Tensor, inputs: i64, dropped: i64, stream: u64) -> Tensor {
        let features = Tensor::arange((inputs + 3) / 4, (Kind::Int64, tokens.device()));
        let places = tokens.unsqueeze(1) * NUMBERS_OF_TOKEN + features;
        let keys = mixed(&self.keys.bitwise_xor(stream as i64)).view([-1, 1, 1]);
        // Sixteen bits for each feature.
        let bits = mixed(&keys.bitwise_xor_tensor(&places)).view_dtype(Kind::Int16);
        bits.narrow(2, 0, inputs).ge(dropped - (STEPS / 2.0) as i64)
    }
}

/// [`rng`]'s finalizer of each number.
fn mixed(numbers: &Tensor) -> Tensor {
    let rng::Mix { add, shifts, factors } = MIX;
    let shifted = |z: &Tensor, shift: i64| {
        // int64 shifts in copies of the sign.
        let bits =
            z.bitwise_right_shift_tensor_scalar(shift).bitwise_and((1i64 << (64 - shift)) - 1);
        z.bitwise_xor_tensor(&bits)
    };
    let z = numbers + add as i64;
    let z = shifted(&z, shifts[0]) * factors[0] as i64;
    let z = shifted(&z, shifts[1]) * factors[1] as i64;
    shifted(&z, shifts[2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    fn keys(ids: &[u64]) -> Tensor {
        let key = |id: &u64| Key::new(3, Purpose::Dropout).step(7).scope(*id).hash() as i64;
        Tensor::from_slice(&ids.iter().map(key).collect::<Vec<_>>())
    }

    fn drop_ones(ids: &[u64], size: &[i64], text_tokens: i64, rows: Rows) -> Tensor {
        let ones = Tensor::ones(size, (Kind::Float, Device::Cpu));
        Dropping::new(&keys(ids), text_tokens, None).apply(&ones, 0.25, 11, rows)
    }

    #[test]
    fn numbers_are_mixed_as_those_of_the_host() {
        let numbers = [0, 1, -1, i64::MAX, i64::MIN, 0x1234_5678_9abc_def0];
        let found = Vec::<i64>::try_from(mixed(&Tensor::from_slice(&numbers))).expect("int64");
        assert_eq!(found, numbers.map(|number| rng::mix(number as u64) as i64));
    }

    #[test]
    fn as_many_are_dropped_as_asked_for_and_the_mean_stays() {
        let found = drop_ones(&[1, 2], &[2, 300, 50], 0, Rows::Image);
        let zeros = found.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        // 30 000 draws: four standard deviations are 0.01.
        assert!((zeros - 0.25).abs() < 0.01, "{zeros}");
        assert!((found.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.015);
        let largest = found.max().double_value(&[]);
        assert!((largest - 4.0 / 3.0).abs() < 1e-6, "{largest}");
    }

    #[test]
    fn a_sample_drops_the_same_in_any_company_and_behind_a_text_of_any_length() {
        let together = drop_ones(&[5, 6, 7], &[3, 9, 10], 4, Rows::Joint);
        let alone = drop_ones(&[6], &[1, 7, 10], 2, Rows::Joint);
        let (of_text, of_image) = (alone.narrow(1, 0, 2), alone.narrow(1, 2, 5));
        assert!(of_text.get(0).equal(&together.get(1).narrow(0, 0, 2)));
        assert!(of_image.get(0).equal(&together.get(1).narrow(0, 4, 5)));
        assert!(!together.get(0).equal(&together.get(1)));
        let pooled = drop_ones(&[6], &[1, 10], 0, Rows::One);
        assert!(pooled.equal(&drop_ones(&[6], &[1, 1, 10], 0, Rows::Text).squeeze_dim(1)));
    }

    #[test]
    fn a_token_drops_the_same_wherever_a_cut_has_moved_it() {
        let whole = drop_ones(&[5, 6], &[2, 9, 10], 4, Rows::Joint);
        let places = Tensor::from_slice(&[1i64, 3]);
        let cut = Dropping::new(&keys(&[5, 6]), 2, Some(&places));
        let drop = |tokens: i64, rows| {
            cut.apply(&Tensor::ones([2, tokens, 10], (Kind::Float, Device::Cpu)), 0.25, 11, rows)
        };
        let of_text = whole.index_select(1, &places);
        assert!(drop(2, Rows::Text).equal(&of_text));
        let of_image = whole.narrow(1, 4, 5);
        assert!(drop(7, Rows::Joint).equal(&Tensor::cat(&[of_text, of_image], 1)));
        let again = cut.at(None).apply(&whole.ones_like(), 0.25, 11, Rows::Text);
        assert!(again.equal(&drop_ones(&[5, 6], &[2, 9, 10], 0, Rows::Text)));
    }

    #[test]
    fn gradients_reach_what_is_kept() {
        let x = Tensor::ones([2, 3, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let found = Dropping::new(&keys(&[1, 2]), 0, None).apply(&x, 0.5, 3, Rows::Text);
        found.sum(Kind::Float).backward();
        assert!(x.grad().equal(&found.detach()));
    }
}
