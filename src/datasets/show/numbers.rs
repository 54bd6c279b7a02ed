//! Range, mean and deviation of many numbers, in one pass over their bytes.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use multiversion::multiversion;
use tch::{Kind, Tensor};

use crate::data::Moments;
use crate::files::float8;
use crate::files::safetensors::is_eight_bits;
use crate::tensor::bytes;

/// Numbers that are widened to float32 at once; they fit into a core's first-level cache.
const BLOCK: usize = 4096;
/// Sums side by side, which the compiler keeps in vectors.
const LANES: usize = 8;

/// Range of the numbers seen so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Range {
    moments: Moments,
    ends: Option<(f32, f32)>,
}

impl Range {
    /// Adds the numbers of a tensor of floats, those of 8 bits times `scale`.
    pub fn add(&mut self, tensor: &Tensor, scale: f32) {
        let (kind, bytes) = (tensor.kind(), bytes(tensor));
        let mut block = [0.0; BLOCK];
        for piece in bytes.chunks(BLOCK * kind.elt_size_in_bytes()) {
            let numbers = &mut block[..piece.len() / kind.elt_size_in_bytes()];
            widen(kind, piece, scale, numbers);
            *self = self.merge(range_of(numbers));
        }
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
        self.ends.map(|(min, max)| (min.into(), max.into()))
    }

    pub fn moments(&self) -> Moments {
        self.moments
    }
}

/// True for kinds whose numbers have a range.
pub fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double) || is_eight_bits(kind)
}

fn widen(kind: Kind, bytes: &[u8], scale: f32, numbers: &mut [f32]) {
    match kind {
        Kind::Half => {
            bytemuck::cast_slice::<u8, f16>(bytes).convert_to_f32_slice(numbers);
        }
        Kind::BFloat16 => {
            bytemuck::cast_slice::<u8, bf16>(bytes).convert_to_f32_slice(numbers);
        }
        Kind::Float => numbers.copy_from_slice(bytemuck::cast_slice(bytes)),
        Kind::Double => {
            let wide = bytemuck::cast_slice::<u8, f64>(bytes);
            numbers.iter_mut().zip(wide).for_each(|(number, wide)| *number = *wide as f32);
        }
        _ => {
            let table = float8::numbers(kind);
            let scaled = bytes.iter().map(|byte| table[usize::from(*byte)] * scale);
            numbers.iter_mut().zip(scaled).for_each(|(number, scaled)| *number = scaled);
        }
    }
}

#[multiversion(targets = "simd")]
fn range_of(numbers: &[f32]) -> Range {
    let Some(&first) = numbers.first() else { return Range::default() };
    let (mut min, mut max) = ([first; LANES], [first; LANES]);
    let (mut sum, mut squares) = ([0.0; LANES], [0.0; LANES]);
    let (lanes, rest) = numbers.as_chunks::<LANES>();
    for chunk in lanes {
        for lane in 0..LANES {
            let number = chunk[lane];
            min[lane] = if number < min[lane] { number } else { min[lane] };
            max[lane] = if number > max[lane] { number } else { max[lane] };
            sum[lane] += f64::from(number);
            squares[lane] += f64::from(number) * f64::from(number);
        }
    }
    for number in rest {
        min[0] = min[0].min(*number);
        max[0] = max[0].max(*number);
        sum[0] += f64::from(*number);
        squares[0] += f64::from(*number) * f64::from(*number);
    }
    let ends = (min.into_iter().fold(first, f32::min), max.into_iter().fold(first, f32::max));
    let moments = Moments::from_sums(numbers.len() as f64, sum.iter().sum(), squares.iter().sum());
    Range { moments, ends: Some(ends) }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn numbers_of_every_kind_have_the_range_that_libtorch_finds() {
        let numbers = Tensor::randn([3, 2111], (Kind::Float, Device::Cpu));
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
