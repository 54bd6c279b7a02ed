//! The numbers that floats of 8 bits stand for.
//!
//! Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1:
//! E4M3 has no infinity, and E5M2 is the upper half of a float16.

use half::f16;
use tch::Kind;

/// Numbers of a kind.
const COUNT: usize = 1 << 8;

static E4M3: [f32; COUNT] = numbers_of(true);
static E5M2: [f32; COUNT] = numbers_of(false);

/// Returns the number of each byte.
///
/// # Panics
/// For other kinds (a bug in the caller).
pub(crate) fn numbers(kind: Kind) -> &'static [f32; COUNT] {
    match kind {
        Kind::Float8e4m3fn => &E4M3,
        Kind::Float8e5m2 => &E5M2,
        other => panic!("{other:?} is no float of 8 bits"),
    }
}

/// Returns the largest finite number of the kind.
///
/// # Panics
/// As [`numbers`].
pub(crate) fn largest(kind: Kind) -> f32 {
    numbers(kind).iter().copied().filter(|number| number.is_finite()).fold(0.0, f32::max)
}

const fn numbers_of(is_e4m3: bool) -> [f32; COUNT] {
    let mut numbers = [0.0; COUNT];
    let mut byte = 0;
    while byte < COUNT {
        let bits = byte as u8;
        numbers[byte] = if is_e4m3 { e4m3(bits) } else { e5m2(bits) };
        byte += 1;
    }
    numbers
}

const fn e5m2(bits: u8) -> f32 {
    f16::from_bits((bits as u16) << 8).to_f32_const()
}

/// A sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa.
const fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = ((bits >> 3 & 0xf) as u32, (bits & 7) as f32);
    let magnitude = if bits & 0x7f == 0x7f {
        f32::NAN
    } else if exponent == 0 {
        mantissa * power_of_two(-9)
    } else {
        (8.0 + mantissa) * power_of_two(exponent as i32 - 10)
    };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Tensor};

    use super::*;
    use crate::tensor::bytes_mut;

    #[test]
    fn each_byte_is_the_number_that_libtorch_takes_it_for() {
        for (kind, most) in [(Kind::Float8e4m3fn, 448.0), (Kind::Float8e5m2, 57_344.0)] {
            let mut all = Tensor::zeros([COUNT as i64], (kind, Device::Cpu));
            let every_byte: Vec<u8> = (0..=u8::MAX).collect();
            bytes_mut(&mut all).copy_from_slice(&every_byte);
            let theirs = Vec::<f32>::try_from(all.to_kind(Kind::Float)).expect("f32");
            for (byte, (ours, theirs)) in numbers(kind).iter().zip(&theirs).enumerate() {
                let same = ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan());
                assert!(same, "{kind:?} {byte:#x}: {ours} and {theirs}");
            }
            assert_eq!(largest(kind), most);
        }
    }
}
