//! Errors and times of one backend on one case.

use std::time::Instant;

use tch::{Cuda, Device, Kind, Tensor};

use super::case::Case;
use super::outcome::{Errors, Outcome};
use crate::fault;
use crate::libtorch::AttentionBackend;
use crate::median::{Middle, median};
use crate::nn::attention::Attention;
use crate::ops::drawn;
use crate::phase::Phase;

/// Samples of a case. The mask hides some keys of the second one.
const SAMPLES: i64 = 2;
/// Most tokens at which numbers are compared: the exact ones need a matrix of scores for each head,
/// 11 MB in float32.
const MOST_COMPARED: i64 = 1152;
/// Passes before the first that is timed, and passes that are.
const REHEARSALS: usize = 2;
const TIMED: usize = 5;

/// An error may be this many times the sum of the plain backend's own in the same kind and of
/// [`rounding`]. Fused kernels round the probabilities and their gradients to the kind once more
/// than the plain one, which computes bfloat16 in float32; a fault is not of this size but near 1.
const ALLOWED: f64 = 4.0;

/// The relative rounding of numbers in a kind: bfloat16 has 8 bits; products of float32 in three
/// parts, as tensor cores compute them, keep 20.
fn rounding(kind: Kind) -> f64 {
    if kind == Kind::BFloat16 { 2f64.powi(-8) } else { 2f64.powi(-20) }
}

/// The kind in which numbers of `kind` count as exact.
fn exact_kind(kind: Kind) -> Kind {
    if kind == Kind::BFloat16 { Kind::Float } else { Kind::Double }
}

/// Use of the output by a model, which decides the layout of its gradient.
#[derive(Clone, Copy)]
enum Use {
    /// The gradient is contiguous.
    Alone,
    /// Joined with other features, as in blocks whose attention and MLP share a product: the
    /// gradient is a strided part of theirs.
    Joined,
}

/// Tensors of a case, drawn alike in every process. Shapes as in [`Case`].
struct Inputs {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    /// `[2, 1, 1, keys]`
    mask: Option<Tensor>,
    /// `[2, queries, heads · width]`, the gradient of the output.
    gradient: Tensor,
}

/// Feature 0 of every key in [`Inputs::new`].
const KEY_OFFSET: f64 = 8.0;
/// The score that feature 0 adds in the rows of [`Inputs::new`] that stand out.
const LOW_SCORE: f64 = -110.0;

impl Inputs {
    /// Draws normal numbers. The first and the last query have scores near -110, which change
    /// nothing but the softmax's shift: cuDNN 9.19 and 9.20 compute NaN there (PyTorch issue
    /// 196678).
    fn new(case: &Case, device: Device) -> Self {
        let Case { heads, width, queries, keys, .. } = *case;
        let kind = case.precision.kind();
        let draw = |tokens, scope| drawn(&[SAMPLES, tokens, heads, width], kind, scope);
        let (query, key, value) = (draw(queries, 1), draw(keys, 2), draw(keys, 3));
        let _ = key.select(3, 0).fill_(KEY_OFFSET);
        let low = LOW_SCORE * (width as f64).sqrt() / KEY_OFFSET;
        for row in [0, queries - 1] {
            let _ = query.select(1, row).select(2, 0).fill_(low);
        }
        Inputs {
            query: query.to_device(device),
            key: key.to_device(device),
            value: value.to_device(device),
            mask: case.masked.then(|| mask(keys).to_device(device)),
            gradient: drawn(&[SAMPLES, queries, heads * width], kind, 4).to_device(device),
        }
    }

    /// Returns the inputs of `case`, which has more tokens, by repeating these.
    fn stretched(&self, case: &Case) -> Self {
        let stretch = |tensor: &Tensor, tokens: i64| {
            let own = tensor.size()[1];
            let index = Tensor::arange(tokens, (Kind::Int64, tensor.device())).remainder(own);
            tensor.index_select(1, &index)
        };
        Inputs {
            query: stretch(&self.query, case.queries),
            key: stretch(&self.key, case.keys),
            value: stretch(&self.value, case.keys),
            mask: case.masked.then(|| mask(case.keys).to_device(self.key.device())),
            gradient: stretch(&self.gradient, case.queries),
        }
    }

    /// Returns the output and the gradients of query, key and value, computed in `kind`.
    fn differentiated(&self, backend: AttentionBackend, kind: Kind, used: Use) -> [Tensor; 4] {
        let [query, key, value] = [&self.query, &self.key, &self.value]
            .map(|tensor| tensor.to_kind(kind).detach().set_requires_grad(true));
        let mask = self.mask.as_ref();
        let output = Attention { query: &query, key: &key, value: &value, mask }.by(backend);
        let gradient = self.gradient.to_kind(kind);
        let (used, factor) = match used {
            Use::Alone => (output.shallow_clone(), gradient),
            Use::Joined => (joined(&output), joined(&gradient)),
        };
        // The gradient of the sum of a product is the other factor.
        (used * factor).sum(kind).backward();
        [output.detach(), query.grad(), key.grad(), value.grad()]
    }

    fn taken_by(&self, backend: AttentionBackend) -> Option<AttentionBackend> {
        let [query, key, value] = [&self.query, &self.key, &self.value]
            .map(|tensor| tensor.detach().set_requires_grad(true));
        let mask = self.mask.as_ref();
        Attention { query: &query, key: &key, value: &value, mask }.taken_by(backend)
    }
}

/// Joins `[B, L, D]` with a constant of the same size.
fn joined(x: &Tensor) -> Tensor {
    Tensor::cat(&[x, &x.detach()], 2)
}

/// Returns a mask that hides a quarter of the keys of the second sample, as a text's padding
/// between the text and the image.
fn mask(keys: i64) -> Tensor {
    let mask = Tensor::ones([SAMPLES, 1, 1, keys], (Kind::Bool, Device::Cpu));
    let _ = mask.get(1).narrow(-1, keys / 8, keys / 4).fill_(0);
    mask
}

/// Tries `backend` on `case`: compares its numbers with the exact ones at up to 1152 tokens, for
/// gradients of both layouts, and times it at the case's own number.
///
/// # Panics
/// With libtorch's text if the backend throws.
pub fn measure(case: &Case, backend: AttentionBackend, device: Device) -> Outcome {
    let inputs = Inputs::new(&case.shortened(MOST_COMPARED), device);
    if inputs.taken_by(backend) != Some(backend) {
        return Outcome::NotTaken;
    }
    let kind = case.precision.kind();
    let exact = inputs.differentiated(AttentionBackend::Plain, exact_kind(kind), Use::Alone);
    let plain = inputs.differentiated(AttentionBackend::Plain, kind, Use::Alone);
    let judged =
        |used| judge(&injected(inputs.differentiated(backend, kind, used)), &plain, &exact, kind);
    // One after the other in one process: a backend may keep what it compiled for the first.
    judged(Use::Joined)
        .and_then(|_| judged(Use::Alone))
        .and_then(|errors| timed(case, &inputs.stretched(case), backend, errors))
        .unwrap_or_else(|wrong| wrong)
}

/// Spoils numbers if an injected fault orders it.
fn injected([output, query, key, value]: [Tensor; 4]) -> [Tensor; 4] {
    let factor = |kind, default| fault::argument(kind, Phase::Attention, default).unwrap_or(1.0);
    let of_output = factor(fault::Kind::Spike, 1.1) * factor(fault::Kind::NanLoss, f64::NAN);
    let of_query = factor(fault::Kind::NanGrad, f64::NAN);
    [output * of_output, query * of_query, key, value]
}

/// Compares with the exact tensors, and with what the plain backend makes of them in `kind`.
///
/// # Errors
/// [`Outcome::NotFinite`] or [`Outcome::Differs`] naming the first tensor that is wrong.
fn judge(
    found: &[Tensor; 4],
    plain: &[Tensor; 4],
    exact: &[Tensor; 4],
    kind: Kind,
) -> Result<Errors, Outcome> {
    let errors = errors(found, exact);
    if let Some((name, _)) = errors.named().into_iter().find(|(_, error)| !error.is_finite()) {
        return Err(Outcome::NotFinite { why: format!("the {name}") });
    }
    let own = self::errors(plain, exact).named();
    for ((name, error), (_, own)) in errors.named().into_iter().zip(own) {
        let allowed = ALLOWED * (own + rounding(kind));
        if error > allowed {
            let why = format!("the {name} is off by {error:.1e}, {allowed:.1e} is allowed");
            return Err(Outcome::Differs { errors, why });
        }
    }
    Ok(errors)
}

/// Errors relative to each tensor's norm; of what is exactly zero, as gradients of the scores of a
/// single key, relative to the largest norm.
fn errors(found: &[Tensor; 4], exact: &[Tensor; 4]) -> Errors {
    let norm = |tensor: &Tensor| tensor.norm().double_value(&[]);
    let largest = exact.iter().map(norm).fold(0.0, f64::max);
    let error = |index: usize| {
        let (exact, whole) = (&exact[index], norm(&exact[index]));
        let difference = norm(&(found[index].to_kind(exact.kind()) - exact));
        difference / if whole == 0.0 { largest } else { whole }
    };
    Errors { output: error(0), query: error(1), key: error(2), value: error(3) }
}

/// Times forward and backward at the case's own number of tokens.
///
/// # Errors
/// [`Outcome::NotFinite`] if a number is not finite there.
fn timed(
    case: &Case,
    inputs: &Inputs,
    backend: AttentionBackend,
    errors: Errors,
) -> Result<Outcome, Outcome> {
    let (kind, device) = (case.precision.kind(), inputs.query.device());
    let pass = || {
        wait_for(device);
        let began = Instant::now();
        let numbers = inputs.differentiated(backend, kind, Use::Alone);
        wait_for(device);
        (numbers, began.elapsed().as_secs_f64() * 1e3)
    };
    let (numbers, _) = pass();
    let names = errors.named().map(|(name, _)| name);
    let is_finite = |tensor: &Tensor| tensor.isfinite().all().int64_value(&[]) == 1;
    if let Some((_, name)) = numbers.iter().zip(names).find(|(tensor, _)| !is_finite(tensor)) {
        return Err(Outcome::NotFinite { why: format!("the {name} at {} tokens", case.queries) });
    }
    drop(numbers);
    (1..REHEARSALS).for_each(|_| drop(pass()));
    let milliseconds = median((0..TIMED).map(|_| pass().1), Middle::Lower).expect("some passes");
    Ok(Outcome::Sound { errors, milliseconds })
}

/// Waits until a GPU has computed all that it was given.
fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Precision;

    fn case(precision: Precision, masked: bool) -> Case {
        Case { precision, heads: 2, width: 16, queries: 72, keys: 200, masked }
    }

    #[test]
    fn every_backend_of_a_cpu_is_sound_in_every_kind_with_and_without_a_mask() {
        for precision in [Precision::Float32, Precision::Bfloat16] {
            for masked in [false, true] {
                for backend in [AttentionBackend::Flash, AttentionBackend::Plain] {
                    let outcome = measure(&case(precision, masked), backend, Device::Cpu);
                    assert!(outcome.is_sound(), "{backend} {precision:?} {masked}: {outcome}");
                }
                let outcome =
                    measure(&case(precision, masked), AttentionBackend::Cudnn, Device::Cpu);
                assert_eq!(outcome, Outcome::NotTaken);
            }
        }
    }

    #[test]
    fn a_backend_is_sound_with_a_single_key_whose_scores_have_no_gradient() {
        for precision in [Precision::Float32, Precision::Bfloat16] {
            let one = Case { keys: 1, ..case(precision, false) };
            for backend in [AttentionBackend::Flash, AttentionBackend::Plain] {
                let outcome = measure(&one, backend, Device::Cpu);
                assert!(outcome.is_sound(), "{backend} {precision:?}: {outcome}");
            }
        }
    }

    #[test]
    fn two_rows_have_the_low_scores_at_which_cudnn_has_failed() {
        let inputs = Inputs::new(&case(Precision::Float32, true), Device::Cpu);
        let [query, key] = [&inputs.query, &inputs.key].map(|tensor| tensor.transpose(1, 2));
        let scores = query.matmul(&key.transpose(2, 3)) / 4.0;
        let exponents = scores.logsumexp(-1, false);
        for row in [0, 71] {
            assert!(exponents.select(2, row).max().double_value(&[]) < -88.7, "row {row}");
        }
        assert!(exponents.select(2, 1).min().double_value(&[]) > -88.7);
    }

    /// The tensors of a sound backend with one of them changed.
    fn judged(precision: Precision, change: impl Fn(&mut [Tensor; 4])) -> Result<Errors, Outcome> {
        let (kind, inputs) = (precision.kind(), Inputs::new(&case(precision, true), Device::Cpu));
        let by = |backend, kind| inputs.differentiated(backend, kind, Use::Alone);
        let mut found = by(AttentionBackend::Flash, kind);
        change(&mut found);
        let plain = by(AttentionBackend::Plain, kind);
        judge(&found, &plain, &by(AttentionBackend::Plain, exact_kind(kind)), kind)
    }

    #[test]
    fn each_tensor_that_is_wrong_or_not_finite_is_named() {
        for precision in [Precision::Float32, Precision::Bfloat16] {
            assert!(judged(precision, |_| ()).is_ok());
            for (index, name) in
                ["output", "gradient of the query", "gradient of the key", "gradient of the value"]
                    .into_iter()
                    .enumerate()
            {
                let wrong = judged(precision, |tensors| tensors[index] = &tensors[index] * 1.5);
                let why = wrong.expect_err("half off").fault().expect("a fault");
                assert!(why.starts_with(&format!("the {name} is off by 5.0e-1, ")), "{why}");
                let one = |tensors: &mut [Tensor; 4]| {
                    let _ = tensors[index].view(-1).get(7).fill_(f64::NAN);
                };
                let wrong = judged(precision, one).expect_err("NaN").fault();
                assert_eq!(wrong, Some(format!("the {name} is not finite")));
            }
        }
    }
}
