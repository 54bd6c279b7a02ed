//! A slice to try an optimizer's kernel on, and its comparison with libtorch's operators.

use tch::{Device, Kind, Tensor};

use super::{Average, Slice, ema};
use crate::cuda::Outcome;

/// How far a kernel may be from libtorch's operators on the same GPU, relative to one plus a
/// value's size: some ten roundings. Their compiler fuses products and sums where it likes to, so
/// that no bits can be asked for.
const TOLERANCE: f64 = 1e-6;

/// Elements: four at a time, and some left over.
const ELEMENTS: i64 = 1003;

/// Factor of the gradient.
const FACTOR: f64 = 0.7;

/// Factor of the weight decay.
const DECAY_FACTOR: f64 = 3.0;

/// Share by which the average moves.
const SHARE: f64 = 0.3;

/// Tensors of one slice that reaches every branch of a kernel.
pub struct Trial {
    params: Tensor,
    gradient: Tensor,
    state: Vec<Tensor>,
    computed: Tensor,
    average: Tensor,
    average_before: Tensor,
}

/// Averages are rounded alike everywhere, so that their bits can be asked for.
const NO_AVERAGES: &str =
    "averages differ from those of libtorch's operators on the same parameters, in";

/// Numbers of both signs, without touching a generator.
pub fn wave(pace: f64, device: Device) -> Tensor {
    (Tensor::arange(ELEMENTS, (Kind::Float, device)) * pace).sin()
}

impl Trial {
    /// `state`: as the optimizer may find it, made of [`wave`]s; `kind`: of gradient and
    /// average.
    pub fn new(state: Vec<Tensor>, kind: Kind, device: Device) -> Self {
        let average = wave(2.3, device).to_kind(kind);
        // Of many sizes.
        let gradient = wave(1.9, device) * (wave(0.1, device) * 5.0).exp();
        Trial {
            params: wave(1.3, device),
            gradient: gradient.to_kind(kind),
            state,
            computed: Tensor::zeros([ELEMENTS], (Kind::BFloat16, device)),
            average_before: average.copy(),
            average,
        }
    }

    pub fn slice(&mut self) -> Slice<'_> {
        let Trial { params, gradient, state, computed, average, .. } = self;
        // Runs that meet, and that begin and end among four.
        Slice {
            params,
            gradient,
            gradient_factor: FACTOR,
            state,
            computed: Some(computed),
            average: Some(Average { values: average, share: SHARE }),
            decayed: &[(2, 3), (5, 400), (701, 1)],
            decay_factor: DECAY_FACTOR,
        }
    }

    /// Compares what a kernel left with what libtorch's operators left.
    ///
    /// # Errors
    /// The first state tensor, by its name, the parameters or averages, with an element that
    /// differs.
    pub fn compare(&self, expected: &Trial, state_names: &[&str]) -> Outcome<()> {
        for (name, (found, expected)) in
            state_names.iter().zip(self.state.iter().zip(&expected.state))
        {
            compare(name, found, expected)?;
        }
        compare("parameters", &self.params, &expected.params)?;
        let mut average = self.average_before.copy();
        ema::advance(&mut average, &self.params, SHARE);
        if !self.average.equal(&average) {
            return Err(format!("{NO_AVERAGES} {:?}", average.kind()));
        }
        if self.computed.equal(&self.params.to_kind(Kind::BFloat16)) {
            Ok(())
        } else {
            Err("the parameters in bfloat16 are not those in float32, rounded".into())
        }
    }
}

/// # Errors
/// The first element that is farther off than [`TOLERANCE`].
fn compare(name: &str, found: &Tensor, expected: &Tensor) -> Outcome<()> {
    let off = (found - expected).abs().gt_tensor(&((expected.abs() + 1.0) * TOLERANCE));
    // A NaN is no number to compare.
    let off = off.logical_or(&found.isfinite().logical_not());
    if !bool::try_from(off.any()).expect("one truth value") {
        return Ok(());
    }
    let element = off.to_kind(Kind::Int).argmax(None, false).int64_value(&[]);
    let [found, expected] = [found, expected].map(|tensor| tensor.double_value(&[element]));
    Err(format!(
        "{name} differ from those of libtorch's operators, element {element} is {found:e} and not \
         {expected:e}: this GPU, its driver or NVRTC computes wrongly, try others"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_off_or_none_are_named() {
        let expected = Tensor::from_slice(&[1.0f32, 2.0, 3.0]);
        assert_eq!(
            compare("parameters", &Tensor::from_slice(&[1.0f32, 2.000_001, 3.0]), &expected),
            Ok(())
        );
        for (wrong, word) in [(2.000_01f32, "2.00001"), (f32::NAN, "NaN")] {
            let what = compare("parameters", &Tensor::from_slice(&[1.0f32, wrong, 3.0]), &expected)
                .expect_err("it is off");
            assert!(
                what.starts_with("parameters differ")
                    && what.contains("element 1 is ")
                    && what.contains(&word[..3]),
                "{what}"
            );
        }
    }
}
