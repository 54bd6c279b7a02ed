//! Ranges by libtorch's operators.

use tch::Tensor;

use crate::ops::at_least_float;

pub fn ranges<const N: usize>(tensors: [&Tensor; N]) -> Tensor {
    let kind = at_least_float(tensors[0].kind());
    // Without an axis: along one, even the only one, the operator takes a hundred times as long.
    let range = |tensor: &Tensor| <[Tensor; 2]>::from(tensor.aminmax(None::<i64>, false));
    let numbers: Vec<Tensor> = tensors.into_iter().flat_map(range).collect();
    Tensor::stack(&numbers, 0).to_kind(kind)
}
