//! The operation's kernel writes behind a copy of the first features.

use tch::Tensor;

use super::OfFeatures;

pub fn forward<O: OfFeatures>(first: &Tensor, x: &Tensor) -> Tensor {
    let (before, width) = (*first.size().last().expect("[…, D]"), O::width(x));
    let mut shape = first.size();
    *shape.last_mut().expect("[…, D]") = before + width;
    let output = Tensor::empty(shape.as_slice(), (x.kind(), x.device()));
    output.narrow(-1, 0, before).copy_(first);
    O::write(x, &output.narrow(-1, before, width));
    output
}
