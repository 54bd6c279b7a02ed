//! Mean and standard deviation of many numbers, merged from parts.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Count, sum and sum of squares, which are added to merge parts.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Moments {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Moments {
    /// Measures all elements, of any kind.
    pub fn from_tensor(tensor: &Tensor) -> Self {
        let wide = tensor.to_kind(Kind::Double);
        Moments {
            count: wide.numel() as f64,
            sum: wide.sum(Kind::Double).double_value(&[]),
            squares: wide.square().sum(Kind::Double).double_value(&[]),
        }
    }

    pub fn merge(self, other: Self) -> Self {
        Moments {
            count: self.count + other.count,
            sum: self.sum + other.sum,
            squares: self.squares + other.squares,
        }
    }

    /// `None` without a number.
    pub fn mean(self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }

    /// `None` for fewer than two numbers.
    pub fn standard_deviation(self) -> Option<f64> {
        let mean = self.sum / self.count;
        (self.count >= 2.0).then(|| (self.squares / self.count - mean * mean).max(0.0).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_together_have_the_deviation_of_the_whole() {
        let numbers = Tensor::from_slice(&[1f32, 2.0, 4.0, 9.0]);
        let [first, rest] = [(0, 1), (1, 3)]
            .map(|(start, length)| Moments::from_tensor(&numbers.narrow(0, start, length)));
        let deviation = first.merge(rest).standard_deviation().expect("four numbers");
        assert!((deviation - 9.5f64.sqrt()).abs() < 1e-12, "{deviation}");
        assert_eq!((first.merge(rest).mean(), Moments::default().mean()), (Some(4.0), None));
        assert_eq!(
            Moments::default().merge(first).standard_deviation(),
            None,
            "one number has none"
        );
    }
}
