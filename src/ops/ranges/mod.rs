//! The least and the greatest number of several tensors.

mod cuda;
mod plain;

use tch::{Kind, Tensor};

use super::launch::KernelFile;
use super::{Bytes, Case, Misfit, Operation, Pass, bytes, drawn};

/// Number of tensors that are measured together.
const TENSORS: usize = 5;

/// The least and the greatest number of each of five tensors, NaN if it has one.
///
/// # Shapes
/// `[…]` of equally many numbers, constants. Returns `[10]` f32, the least and the greatest number
/// of the first tensor, then those of the second one, and so on.
#[derive(Clone, Copy, Debug)]
pub struct Ranges;

impl Operation<TENSORS> for Ranges {
    const NAME: &'static str = "ranges";
    const CONSTANTS: [bool; TENSORS] = [true; TENSORS];
    type Saved = ();

    fn plain(&self, tensors: [&Tensor; TENSORS]) -> Tensor {
        plain::ranges(tensors)
    }

    fn kernels() -> &'static KernelFile {
        &cuda::KERNELS
    }

    fn takes(&self, _pass: Pass, tensors: [&Tensor; TENSORS]) -> Result<(), Misfit> {
        if tensors.iter().any(|tensor| !matches!(tensor.kind(), Kind::Float | Kind::BFloat16)) {
            Err(Misfit::Kind)
        } else if tensors.iter().any(|tensor| tensor.numel() != tensors[0].numel()) {
            Err(Misfit::Shape)
        } else {
            Ok(())
        }
    }

    fn forward(&self, pass: Pass, tensors: [Tensor; TENSORS]) -> (Tensor, ()) {
        let ranges = match pass {
            Pass::Cpu => plain::ranges(tensors.each_ref()),
            Pass::Cuda => cuda::ranges(tensors.each_ref()),
        };
        (ranges, ())
    }

    fn backward(&self, _pass: Pass, (): (), _grad_output: Tensor) -> [Tensor; TENSORS] {
        std::array::from_fn(|_| Tensor::new())
    }

    fn least_bytes(&self, tensors: [&Tensor; TENSORS]) -> Bytes {
        let written = 2 * TENSORS * size_of::<f32>();
        Bytes { forward: bytes(tensors) + written as u64, backward: 0 }
    }

    fn cases() -> Vec<Case<Self, TENSORS>> {
        let case = |narrow: [bool; TENSORS], shape: &[i64]| {
            let tensor = |number: usize| {
                let kind = if narrow[number] { Kind::BFloat16 } else { Kind::Float };
                drawn(shape, kind, number as u64)
            };
            Case { operation: Ranges, inputs: std::array::from_fn(tensor), tolerance: 0.0 }
        };
        let kinds = [[false; TENSORS], [true, false, true, true, false]];
        let shapes: [&[i64]; 3] = [&[1], &[3, 101], &[2, 4, 60, 80]];
        kinds.into_iter().flat_map(|narrow| shapes.map(|shape| case(narrow, shape))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::apply;

    #[test]
    fn a_tensor_with_a_nan_has_no_range() {
        let numbers = |numbers: [f32; 3]| Tensor::from_slice(&numbers);
        let sound = numbers([2.0, -3.0, 1.0]);
        let broken = numbers([2.0, f32::NAN, 1.0]);
        let ranges = apply(Ranges, [&sound, &broken, &sound, &sound, &(&sound * 2.0)]);
        let ranges = Vec::<f32>::try_from(ranges).expect("f32");
        assert!(ranges[2].is_nan() && ranges[3].is_nan(), "{ranges:?}");
        assert_eq!((&ranges[..2], &ranges[8..]), (&[-3.0, 2.0][..], &[-6.0, 4.0][..]));
    }
}
