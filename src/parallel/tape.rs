//! Stages forward with the graph cut at every boundary, then backward stage by stage.

use tch::{Tensor, no_grad};

use super::backward::{loss_backward, stage_backward};
use super::{Bucket, Recompute};
use crate::error::{Error, Result};
use crate::nn::{Activations, Stage};

/// What one micro-batch's forward leaves for its backward: the boundaries, and the graphs that are kept.
pub struct Tape<'m> {
    stages: &'m [Box<dyn Stage>],
    buckets: &'m [Bucket],
    recompute: Recompute,
    /// The step in whose name every stage's outputs and gradients are searched for non-finite values, which costs a host
    /// synchronization each.
    check_finite: Option<u64>,
    kept: Vec<Boundary>,
    output: Activations,
}

struct Boundary {
    input: Activations,
    /// The stage's outputs with their graph, unless it is recomputed or has no gradient to give.
    graph: Option<Activations>,
}

impl<'m> Tape<'m> {
    pub fn new(stages: &'m [Box<dyn Stage>], buckets: &'m [Bucket], recompute: Recompute) -> Self {
        Tape { stages, buckets, recompute, check_finite: None, kept: Vec::new(), output: Activations::new() }
    }

    /// Names the stage and tensor where the first non-finite value appears (the debug mode).
    pub fn checking_finite(mut self, step: Option<u64>) -> Self {
        self.check_finite = step;
        self
    }

    /// Runs all stages. The returned activations are leaves: a loss built on them is what [`Tape::backward`] takes.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the check is on and finds something.
    pub fn forward(&mut self, input: Activations) -> Result<Activations> {
        // True once something trained lies behind: only then is there a gradient to send back.
        let mut reached = false;
        let mut input = input.leaves(false);
        for (stage, bucket) in self.stages.iter().zip(self.buckets) {
            reached |= bucket.is_trained();
            let keep_graph = reached && self.recompute == Recompute::Never;
            let output = if keep_graph { run(stage.as_ref(), bucket, &input) } else { no_grad(|| run(stage.as_ref(), bucket, &input)) };
            if let Some(step) = self.check_finite {
                check_finite(step, stage.params().stage(), "output", output.flowing())?;
            }
            let next = output.leaves(reached);
            self.kept.push(Boundary { input, graph: keep_graph.then_some(output) });
            input = next;
        }
        self.output = input;
        Ok(self.output.alias())
    }

    /// Sends the gradient of `loss` back; `on_gradient(stage, gradient)` gets each trained stage's flat gradient as soon as
    /// it is known, last stage first.
    pub fn backward(self, loss: &Tensor, mut on_gradient: impl FnMut(usize, Tensor) -> Result<()>) -> Result<()> {
        let mut grad_output = loss_backward(loss, &self.output);
        for (index, Boundary { input, graph }) in self.kept.into_iter().enumerate().rev() {
            let (stage, bucket) = (&self.stages[index], &self.buckets[index]);
            if grad_output.is_empty() {
                break; // nothing trained at or before this stage
            }
            let output = graph.unwrap_or_else(|| run(stage.as_ref(), bucket, &input));
            let (gradient, grad_input) = stage_backward(bucket.leaves(), &input, &output, &grad_output);
            if let Some(step) = self.check_finite {
                let named = gradient.iter().map(|gradient| ("parameters", gradient));
                check_finite(step, stage.params().stage(), "gradient", named)?;
            }
            if let Some(gradient) = gradient {
                on_gradient(index, gradient)?;
            }
            grad_output = grad_input;
        }
        Ok(())
    }
}

pub(super) fn run(stage: &dyn Stage, bucket: &Bucket, input: &Activations) -> Activations {
    stage.forward(&bucket.views(stage.params()), input).carrying_constants_of(input)
}

fn check_finite<'t>(step: u64, stage: &str, what: &str, tensors: impl Iterator<Item = (&'static str, &'t Tensor)>) -> Result<()> {
    for (name, tensor) in tensors.filter(|(_, tensor)| tensor.defined()) {
        let bad = tensor.isfinite().logical_not().sum(tch::Kind::Int64).int64_value(&[]);
        if bad > 0 {
            let what = format!("stage {stage}: {what} `{name}` {:?} has {bad} non-finite values", tensor.size());
            return Err(Error::NotFinite { step, what });
        }
    }
    Ok(())
}
