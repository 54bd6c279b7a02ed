//! Range, mean and deviation of many numbers, merged from parts.

use tch::{Kind, Tensor};

use crate::data::Moments;
use crate::files::safetensors::is_eight_bits;

/// Range of the numbers seen so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Range {
    moments: Moments,
    ends: Option<(f64, f64)>,
}

impl Range {
    /// Adds the numbers of a tensor of floats, times `scale`.
    pub fn add(&mut self, tensor: &Tensor, scale: f32) {
        if tensor.numel() == 0 {
            return;
        }
        let numbers = tensor.to_kind(Kind::Double) * f64::from(scale);
        let ends = (numbers.min().double_value(&[]), numbers.max().double_value(&[]));
        *self = self.merge(Range { moments: Moments::from_tensor(&numbers), ends: Some(ends) });
    }

    /// Returns the range of both.
    pub fn merge(self, other: Self) -> Self {
        let ends = match (self.ends, other.ends) {
            (Some((min, max)), Some((least, most))) => Some((min.min(least), max.max(most))),
            (ends, None) | (None, ends) => ends,
        };
        Range { moments: self.moments.merge(other.moments), ends }
    }

    /// Returns the smallest and the largest number; `None` if there are none.
    pub fn ends(&self) -> Option<(f64, f64)> {
        self.ends
    }

    pub fn moments(&self) -> Moments {
        self.moments
    }
}

/// True for kinds whose numbers have a range.
pub fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double) || is_eight_bits(kind)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::{Key, Purpose};

    #[test]
    fn numbers_of_every_kind_have_the_range_that_libtorch_finds() {
        let draw = || Tensor::randn([3, 2111], (Kind::Float, Device::Cpu));
        let numbers = Key::new(1, Purpose::Test).seeded(draw);
        for kind in [
            Kind::Half,
            Kind::BFloat16,
            Kind::Float,
            Kind::Double,
            Kind::Float8e4m3fn,
            Kind::Float8e5m2,
        ] {
            let stored = numbers.to_kind(kind);
            let scale = if is_eight_bits(kind) { 0.25 } else { 1.0 };
            let expected = stored.to_kind(Kind::Double) * f64::from(scale);
            let mut range = Range::default();
            range.add(&stored, scale);
            let (min, max) = range.ends().expect("numbers");
            let close = |found: f64, expected: f64| (found - expected).abs() < 1e-6;
            assert!(close(min, expected.min().double_value(&[])), "{kind:?}");
            assert!(close(max, expected.max().double_value(&[])), "{kind:?}");
            let (mean, deviation) = (range.moments().mean(), range.moments().standard_deviation());
            assert!(
                mean.is_some_and(|mean| close(mean, expected.mean(Kind::Double).double_value(&[])))
            );
            assert!(
                deviation.is_some_and(|found| close(found, expected.std(false).double_value(&[])))
            );
        }
        let mut empty = Range::default();
        empty.add(&Tensor::zeros([0], (Kind::Float, Device::Cpu)), 1.0);
        assert_eq!(empty.ends(), None);
    }
}
