//! Sums a stage's gradients over the micro-batches of a step.

use tch::{Tensor, no_grad};

use crate::ops::at_least_float;

/// The order in which micro-batches are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Summation {
    /// One after the other into one buffer.
    #[default]
    Running,
    /// As a pairwise tree, the same order in which ranks are summed, so that the result does not
    /// depend on how the batch is divided between ranks and micro-batches. Holds as many buffers as
    /// the number of micro-batches has binary digits.
    Pairwise,
}

/// Sums gradients in f32; one to which nothing is added keeps its kind.
#[derive(Debug)]
pub struct Accumulator {
    summation: Summation,
    /// Sums of complete subtrees with the number of their levels, largest first.
    parts: Vec<(u32, Tensor)>,
}

impl Accumulator {
    pub fn new(summation: Summation) -> Self {
        Accumulator { summation, parts: Vec::new() }
    }

    /// Adds a gradient of any float kind; the gradient may be overwritten.
    pub fn add(&mut self, gradient: Tensor) {
        match (self.summation, self.parts.last_mut()) {
            (Summation::Running, Some((_, sum))) => add(sum, &gradient),
            _ => self.parts.push((0, gradient)),
        }
        while let [.., (left, _), (right, _)] = self.parts.as_slice()
            && left == right
        {
            self.join();
        }
    }

    /// Returns the sum since the last call; `None` if no gradient was added.
    pub fn take(&mut self) -> Option<Tensor> {
        while self.parts.len() > 1 {
            self.join();
        }
        self.parts.pop().map(|(_, sum)| sum)
    }

    fn join(&mut self) {
        if let (Some((_, right)), Some((doubled, left))) = (self.parts.pop(), self.parts.last_mut())
        {
            *doubled += 1;
            add(left, &right);
        }
    }
}

fn add(sum: &mut Tensor, gradient: &Tensor) {
    let kind = at_least_float(sum.kind());
    if sum.kind() != kind {
        *sum = sum.to_kind(kind);
    }
    let _ = no_grad(|| sum.f_add_(gradient)).expect("gradients of one stage have one shape");
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    /// Powers of a third: their sum shows the order of summation.
    fn sum(summation: Summation, numbers: impl Iterator<Item = u32>) -> f32 {
        let mut accumulator = Accumulator::new(summation);
        numbers.for_each(|number| accumulator.add(Tensor::from_slice(&[value(number)])));
        accumulator.take().expect("something was added").double_value(&[0]) as f32
    }

    fn value(number: u32) -> f32 {
        1.0 / 3f32.powi(number as i32)
    }

    #[test]
    fn running_sums_go_left_to_right() {
        assert_eq!(
            sum(Summation::Running, 0..5),
            (0..5).map(value).fold(0.0, |sum, value| sum + value)
        );
    }

    #[test]
    fn pairwise_sums_are_the_tree_whatever_their_number() {
        let v = value;
        assert_eq!(sum(Summation::Pairwise, 0..4), (v(0) + v(1)) + (v(2) + v(3)));
        assert_eq!(
            sum(Summation::Pairwise, 0..7),
            ((v(0) + v(1)) + (v(2) + v(3))) + ((v(4) + v(5)) + v(6))
        );
    }

    #[test]
    fn a_gradient_is_widened_when_something_is_added_to_it() {
        for summation in [Summation::Running, Summation::Pairwise] {
            let mut accumulator = Accumulator::new(summation);
            let small = || Tensor::from_slice(&[2f32.powi(-12)]).to_kind(Kind::BFloat16);
            let mut add = |gradients: Vec<Tensor>| {
                gradients.into_iter().for_each(|gradient| accumulator.add(gradient));
                accumulator.take().expect("something was added")
            };
            assert_eq!(add(vec![small()]).kind(), Kind::BFloat16);
            let one = Tensor::ones([1], (Kind::BFloat16, tch::Device::Cpu));
            let sum = add(vec![one, small()]);
            assert_eq!(sum.double_value(&[0]), 1.0 + 2f64.powi(-12), "{summation:?}");
        }
    }

    #[test]
    fn halves_of_a_pairwise_sum_add_up_to_the_same_bits() {
        let halves = sum(Summation::Pairwise, 0..4) + sum(Summation::Pairwise, 4..8);
        assert_eq!(sum(Summation::Pairwise, 0..8), halves);
        assert!(Accumulator::new(Summation::Pairwise).take().is_none());
    }
}
