//! Floats of 8 bits, e4m3, with a scale for each weight or for each of its rows: a number is its
//! code times the scale, and the largest number has the largest code.

use tch::{Kind, Tensor};

use super::sizes;
use crate::files::float8::largest;

const KIND: Kind = Kind::Float8e4m3fn;

/// Returns the codes of a weight `[outputs, inputs]` and its scales, of which there is one where
/// the axes are both reduced, and one a row where only the second is.
pub fn pack(weight: &Tensor, axes: &[i64]) -> (Tensor, Option<Tensor>) {
    let most = f64::from(largest(KIND));
    let scales = sizes(weight, axes) / most;
    let divisors = scales.where_self(&scales.gt(0.0), &scales.ones_like());
    let codes = (weight / divisors).clamp_(-most, most).to_kind(KIND);
    (codes, Some(scales))
}

/// Returns the weight, f32, of codes `[outputs, inputs]`, u8.
pub fn unpack(codes: &Tensor, scales: &Tensor) -> Tensor {
    codes.view_dtype(KIND).to_kind(Kind::Float).g_mul_(&scales.view([-1, 1]))
}
