//! The weight of a linear map as a stage is given it.

use tch::{Kind, Tensor};

use super::Packed;
use crate::ops::autograd::passing_on;
use crate::ops::{product_onto, product_passing_on};

/// A weight `[outputs, inputs]`: its numbers, or the words that hold them.
pub struct Weight<'t> {
    pub held: &'t Tensor,
    /// The form of the words; `None` for numbers.
    pub packed: Option<Packed>,
}

impl Weight<'_> {
    /// True if it has no gradient.
    pub fn is_frozen(&self) -> bool {
        !self.held.requires_grad()
    }

    /// The numbers in this kind; what is held if they are.
    pub fn numbers(&self, kind: Kind) -> Tensor {
        numbers(self.held, self.packed, kind)
    }

    /// The numbers, in no narrower kind than they are held in.
    pub fn precise(&self) -> Tensor {
        self.numbers(if self.packed.is_some() { Kind::Float } else { self.held.kind() })
    }

    /// `x · weightᵀ + bias`, in the kind of `x`. Of a packed weight the graph keeps the words.
    pub fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        self.product_passing_on(x, bias).1
    }

    /// As [`product`](Self::product); returns `x` for its other uses, and the product.
    pub fn product_passing_on(&self, x: &Tensor, bias: Option<&Tensor>) -> (Tensor, Tensor) {
        match self.packed {
            Some(packed) => self.packed_product(packed, x, bias),
            None => product_passing_on(x, self.held, bias),
        }
    }

    fn packed_product(
        &self,
        packed: Packed,
        x: &Tensor,
        bias: Option<&Tensor>,
    ) -> (Tensor, Tensor) {
        let (frozen, trained) = match bias {
            Some(bias) if bias.requires_grad() => (None, Some(bias)),
            bias => (bias, None),
        };
        let shape = x.size();
        let (x, product) = passing_on(
            &[x],
            || (x.linear(&self.numbers(x.kind()), frozen), self.held.detach()),
            move |words, gradient, passed| {
                let weight = packed.unpack(&words, gradient.kind());
                let gradient = gradient.reshape([-1, weight.size()[0]]);
                vec![product_onto(passed, &gradient, &weight).reshape(&shape)]
            },
        );
        match trained {
            Some(bias) => (x, product + bias),
            None => (x, product),
        }
    }
}

/// As [`Weight::numbers`], for a weight that a graph has kept.
pub fn numbers(held: &Tensor, packed: Option<Packed>, kind: Kind) -> Tensor {
    match packed {
        Some(packed) => packed.unpack(held, kind),
        None => held.to_kind(kind),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::packed::FrozenDtype;
    use crate::rng::{Key, Purpose};
    use crate::settings::Choice;

    fn drawn(scope: u64, size: &[i64], kind: Kind) -> Tensor {
        let draw = || Tensor::randn(size, (Kind::Float, Device::Cpu));
        Key::new(4, Purpose::Test).scope(scope).seeded(draw).to_kind(kind)
    }

    #[test]
    fn a_product_with_words_is_that_with_their_numbers_and_so_are_its_gradients() {
        for kind in [Kind::Float, Kind::BFloat16] {
            for (_, form) in FrozenDtype::ALL {
                let packed = Packed::new(*form, &[24, 40]);
                let words = packed.pack(&drawn(1, &[24 * 40], Kind::Float));
                let weight = packed.unpack(&words, kind);
                for has_trained_bias in [false, true] {
                    let of = |weight: Weight<'_>| {
                        let x = drawn(2, &[2, 3, 40], kind).set_requires_grad(true);
                        let bias = drawn(3, &[24], kind).set_requires_grad(has_trained_bias);
                        let (passed_on, output) = weight.product_passing_on(&x, Some(&bias));
                        let loss = (&output * drawn(4, &[2, 3, 24], kind)).sum(Kind::Float)
                            + (passed_on * drawn(5, &[2, 3, 40], kind)).sum(Kind::Float);
                        let leaves = if has_trained_bias { vec![&x, &bias] } else { vec![&x] };
                        let mut found = Tensor::run_backward(&[loss], &leaves, false, false);
                        found.push(output.detach());
                        found
                    };
                    let found = of(Weight { held: &words, packed: Some(packed) });
                    let expected = of(Weight { held: &weight, packed: None });
                    for (found, expected) in found.iter().zip(&expected) {
                        assert_eq!(found.kind(), kind);
                        let off = (found - expected).norm() / expected.norm();
                        assert!(off.double_value(&[]) < 1e-2, "{form:?} {kind:?}: {off}");
                    }
                }
            }
        }
    }
}
