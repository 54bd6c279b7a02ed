//! A tensor whose gradient is dense.

use tch::Tensor;

use super::autograd::custom_gradient;

/// Returns the same numbers, without a copy; the gradient that arrives for them is made contiguous
/// before it goes on.
///
/// A gradient is a strided part of a larger one where the numbers went into a concatenation.
pub fn with_dense_gradient(x: &Tensor) -> Tensor {
    custom_gradient(&[x], || (x.detach(), ()), |(), gradient| vec![gradient.contiguous()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    use tch::{Device, Kind};

    /// True if the gradient that goes on to `x` is contiguous, and the gradient.
    fn arrived(through: impl Fn(&Tensor) -> Tensor) -> (bool, Tensor) {
        let x = Tensor::ones([3, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let (sender, receiver) = mpsc::channel();
        let watched = custom_gradient(
            &[&x],
            || (x.detach(), ()),
            move |(), gradient| {
                sender.send(gradient.is_contiguous()).expect("a receiver");
                vec![gradient.shallow_clone()]
            },
        );
        let beside = Tensor::ones([3, 2], (Kind::Float, Device::Cpu));
        let weight = Tensor::arange(18, (Kind::Float, Device::Cpu)).view([3, 6]);
        (Tensor::cat(&[through(&watched), beside], 1) * weight).sum(None).backward();
        (receiver.recv().expect("a gradient"), x.grad())
    }

    #[test]
    fn the_gradient_of_a_part_of_a_concatenation_arrives_in_one_piece() {
        let (strided, expected) = arrived(Tensor::shallow_clone);
        let (dense, gradient) = arrived(with_dense_gradient);
        assert!(!strided, "libtorch itself gives a part of the larger gradient");
        assert!(dense);
        assert!(gradient.equal(&expected));
    }

    #[test]
    fn the_numbers_are_not_copied() {
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert_eq!(with_dense_gradient(&x).data_ptr(), x.data_ptr());
    }
}
