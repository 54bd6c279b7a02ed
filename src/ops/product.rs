//! A product with a weight, whose gradients are computed where they are added up or stay.

use tch::{Device, Kind, Tensor};

use super::autograd::{is_alone, passing_on};
use super::choice;
use crate::libtorch::take_place;

/// Name of the operation in messages.
const NAME: &str = "product";

/// True if products on `device` compute the gradients of weights in the places offered for them.
pub fn computes_in_place(device: Device) -> bool {
    choice::pass_of(NAME, device).is_some()
}

/// Computes `x · weightᵀ + bias`, and returns `x` for its other uses and the product.
///
/// The gradient of `x` is added to that of the other uses within the product that computes it.
/// libtorch writes it, reads it and the other one, and writes the sum: for queries, keys and
/// values of one input the most bytes that a block of a transformer moves beside products. The
/// gradient of the weight is computed in the place that was offered for it, if one was.
///
/// # Shapes
/// `x`: `[…, inputs]`; `weight`: `[outputs, inputs]`, `bias`: `[outputs]`, of the kind of `x`.
/// Returns `x` and `[…, outputs]`.
pub fn product_passing_on(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> (Tensor, Tensor) {
    match computes_in_place(x.device()) {
        true => own_product(x, weight, bias),
        false => (x.shallow_clone(), x.linear(weight, bias)),
    }
}

/// The product as a node of ours, whatever the process has chosen.
fn own_product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> (Tensor, Tensor) {
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let (shape, [outputs, width]) = (x.size(), size_of(weight));
    // Each gradient needs what it is multiplied with, and no more is kept.
    let of_x = x.requires_grad().then(|| weight.detach());
    let of_weight = weight.requires_grad().then(|| (weight.shallow_clone(), x.detach()));
    let of_bias = bias.map(Tensor::requires_grad);
    passing_on(
        &inputs,
        || (x.linear(weight, bias), (of_x, of_weight)),
        move |(of_x, of_weight), grad_output, passed| {
            let gradient = grad_output.reshape([-1, outputs]);
            let of_x = of_x.map(|weight| product_onto(passed, &gradient, &weight).reshape(&shape));
            let of_weight = of_weight
                .map(|(leaf, x)| product_in_place(&leaf, &gradient.tr(), &x.reshape([-1, width])));
            let sum = || gradient.sum_dim_intlist([0i64].as_slice(), false, None::<Kind>);
            let of_bias = of_bias.map(|has_gradient| has_gradient.then(sum));
            let gradients = [of_x, of_weight].into_iter().chain(of_bias);
            gradients.map(|gradient| gradient.unwrap_or_else(Tensor::new)).collect()
        },
    )
}

fn size_of(weight: &Tensor) -> [i64; 2] {
    weight.size().try_into().expect("[outputs, inputs]")
}

/// `a · b`, the gradient of `leaf`, in the place that was offered for it, if one was.
fn product_in_place(leaf: &Tensor, a: &Tensor, b: &Tensor) -> Tensor {
    match take_place(leaf) {
        Some(place) => a.mm_out(&place, b),
        None => a.mm(b),
    }
}

/// `gradient · weight`, the gradient of a product's input, with what other uses `passed`, which is
/// overwritten if nothing else holds it.
///
/// # Shapes
/// `passed`: `[…, inputs]`; `gradient`: `[rows, outputs]`; `weight`: `[outputs, inputs]`. Returns
/// `[rows, inputs]`.
pub fn product_onto(passed: Option<Tensor>, gradient: &Tensor, weight: &Tensor) -> Tensor {
    let Some(passed) = passed else { return gradient.mm(weight) };
    let may_be_overwritten = is_alone(&passed) && passed.is_contiguous();
    let mut sum = passed.reshape([-1, weight.size()[1]]);
    if may_be_overwritten { sum.addmm_(gradient, weight) } else { sum.addmm(gradient, weight) }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::libtorch::{gradients, offer_place};
    use crate::ops::drawn;

    /// Queries, keys and values of `x`, and the gradients of `x` and of all weights and biases, for
    /// drawn ones of the three products.
    fn differentiated(kind: Kind, passes_on: bool) -> Vec<Tensor> {
        let leaf = |shape: &[i64], scope| {
            drawn(shape, Kind::Float, scope).to_kind(kind).set_requires_grad(true)
        };
        let x = leaf(&[2, 5, 8], 1);
        let weights = [2, 3, 4].map(|scope| leaf(&[6, 8], scope));
        let biases = [5, 6, 7].map(|scope| leaf(&[6], scope));
        let (mut tokens, mut products) = (x.shallow_clone(), Vec::new());
        for (weight, bias) in weights.iter().zip(&biases) {
            let product;
            (tokens, product) = match passes_on {
                true => own_product(&tokens, weight, Some(bias)),
                false => (x.shallow_clone(), x.linear(weight, Some(bias))),
            };
            products.push(product);
        }
        let given = [8, 9, 10].map(|scope| drawn(&[2, 5, 6], Kind::Float, scope).to_kind(kind));
        let outputs: Vec<&Tensor> = products.iter().collect();
        let leaves: Vec<&Tensor> = [&x].into_iter().chain(&weights).chain(&biases).collect();
        let found = gradients(&outputs, &given.each_ref(), &leaves);
        products.iter().map(Tensor::detach).chain(found).collect()
    }

    #[test]
    fn products_and_gradients_are_libtorchs() {
        let found = differentiated(Kind::Double, true);
        let expected = differentiated(Kind::Double, false);
        for (number, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // Only the gradient of `x` is summed in another order.
            let allowed = if number == 3 { 1e-14 } else { 0.0 };
            let difference = (found - expected).abs().max().double_value(&[]);
            assert!(difference <= allowed, "{number}: {difference:e}");
        }
    }

    #[test]
    fn a_sum_in_bfloat16_is_rounded_no_more_often_than_libtorchs() {
        let exact = differentiated(Kind::Double, false).swap_remove(3);
        let error = |passes_on| {
            let found = differentiated(Kind::BFloat16, passes_on).swap_remove(3);
            (found.to_kind(Kind::Double) - &exact).norm().double_value(&[])
        };
        assert!(error(true) < 1.1 * error(false), "{} {}", error(true), error(false));
    }

    #[test]
    fn frozen_weights_have_no_gradient_and_x_has_its_own() {
        let float = (Kind::Float, Device::Cpu);
        let x = Tensor::ones([2, 3], float).set_requires_grad(true);
        let (passed_on, product) = own_product(&x, &Tensor::ones([4, 3], float), None);
        (passed_on.sum(None) + product.sum(None)).backward();
        assert!(x.grad().equal(&(Tensor::ones([2, 3], float) * 5.0)));
        let weight = Tensor::ones([4, 3], float).set_requires_grad(true);
        let (passed_on, product) = own_product(&Tensor::ones([2, 3], float), &weight, None);
        product.sum(None).backward();
        assert!(!passed_on.requires_grad());
        assert!(weight.grad().equal(&(Tensor::ones([4, 3], float) * 2.0)));
    }

    #[test]
    fn the_gradient_of_a_weight_is_computed_in_its_place_and_added_to_by_another_use() {
        let float = (Kind::Float, Device::Cpu);
        let (x, place) = (Tensor::ones([2, 3], float), Tensor::zeros([4, 3], float));
        let weight = Tensor::ones([4, 3], float).set_requires_grad(true);
        let gradient_of = |uses: usize| {
            offer_place(&weight, &place);
            let products = (0..uses).map(|_| own_product(&x, &weight, None).1);
            let loss = products.map(|product| product.sum(None)).reduce(|a, b| a + b);
            let loss = loss.expect("a use");
            gradients(&[&loss], &[&loss.ones_like()], &[&weight]).swap_remove(0)
        };
        let once = gradient_of(1);
        assert_eq!(once.data_ptr(), place.data_ptr());
        assert!(once.equal(&(Tensor::ones([4, 3], float) * 2.0)));
        let twice = gradient_of(2);
        assert!(twice.equal(&(Tensor::ones([4, 3], float) * 4.0)), "{twice}");
    }

    #[test]
    fn a_gradient_that_something_else_holds_is_not_overwritten() {
        let float = (Kind::Float, Device::Cpu);
        let passed = Tensor::ones([2, 3], float);
        let (held, place) = (passed.shallow_clone(), passed.data_ptr());
        let (gradient, weight) = (Tensor::ones([2, 4], float), Tensor::ones([4, 3], float));
        let sum = product_onto(Some(passed), &gradient, &weight);
        assert!(sum.equal(&(Tensor::ones([2, 3], float) * 5.0)) && sum.data_ptr() != place);
        assert!(held.equal(&Tensor::ones([2, 3], float)));
        let sum = product_onto(Some(held), &gradient, &weight);
        assert!(sum.equal(&(Tensor::ones([2, 3], float) * 5.0)) && sum.data_ptr() == place);
    }
}
