//! The exponential function as a loop over vectors computes it.

use std::f32::consts::LOG2_E;

/// Beyond it the result would leave f32's normal range.
const LARGEST: f32 = 87.0;
/// ln 2 in two parts, so that the product with a whole number loses nothing.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// 1.5 · 2²³: added to a small number and taken off again it leaves the nearest whole one.
const ROUND: f32 = 12_582_912.0;

/// `eˣ` to two units in the last place; numbers beyond ±87 count as ±87.
///
/// The power of two is taken off, a Taylor polynomial of degree 6 does the rest, |r| ≤ ln 2 / 2.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-LARGEST, LARGEST);
    let shifted = x.mul_add(LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = whole.mul_add(-LN_2_LOW, whole.mul_add(-LN_2_HIGH, x));
    let tail = 1.0 / 720.0;
    let sum = [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0]
        .into_iter()
        .fold(tail, |sum: f32, factor| sum.mul_add(r, factor));
    // The lowest bits of the shifted number are the whole one.
    sum * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exponential_function_to_two_units_in_the_last_place() {
        let worst = (-86_000..86_000).map(|number| number as f32 / 1000.0).map(|x| {
            let exact = f64::from(x).exp();
            (f64::from(exp(x)) / exact - 1.0).abs()
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1000.0), exp(-87.0));
    }
}
