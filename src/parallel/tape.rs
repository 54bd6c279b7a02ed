//! Runs the stages forward with the graph cut at every boundary, then backward stage by stage.

use tch::{Device, Tensor, no_grad};

use crate::error::{Error, Result};
use crate::fault;
use crate::nn::{Activations, Stage};
use crate::ops::computes_in_place;
use crate::parallel::ahead::Ahead;
use crate::parallel::backward::{loss_backward, stage_backward};
use crate::parallel::bucket::Weights;
use crate::parallel::joining::Places;
use crate::parallel::{Joining, Recompute, Replica};
use crate::pulse;

/// The state that one micro-batch's forward leaves for its backward: the boundaries, and the graphs
/// that are kept.
pub struct Tape<'m> {
    replica: &'m Replica<'m>,
    recompute: Recompute,
    /// True if boundaries are kept in host memory until the backward.
    offload: bool,
    /// The step that errors name if every stage's outputs and gradients are checked for non-finite
    /// values, which costs a host synchronization each.
    check_finite: Option<u64>,
    joining: Joining,
    kept: Vec<Boundary>,
    output: Activations,
}

struct Boundary {
    /// Empty if no gradient reaches the stage.
    input: Activations,
    /// The stage's outputs with their graph, and the parameters at its start; `None` if the stage
    /// is recomputed or needs no gradient.
    graph: Option<(Weights, Activations)>,
}

impl<'m> Tape<'m> {
    pub fn new(replica: &'m Replica<'m>, recompute: Recompute) -> Self {
        Tape {
            replica,
            recompute,
            offload: false,
            check_finite: None,
            joining: Joining::default(),
            kept: Vec::new(),
            output: Activations::new(),
        }
    }

    /// Keeps boundaries in host memory between forward and backward, at the cost of two copies
    /// each.
    pub fn offloading(mut self, offload: bool) -> Self {
        self.offload = offload;
        self
    }

    /// Joins gradients in these kinds, and not in those in which others can be added to them.
    pub fn joining(mut self, joining: Joining) -> Self {
        self.joining = joining;
        self
    }

    /// Makes forward and backward fail at the stage and tensor with the first non-finite value (a
    /// debug mode); `None` turns the check off.
    pub fn checking_finite(mut self, step: Option<u64>) -> Self {
        self.check_finite = step;
        self
    }

    /// Runs all stages. The returned activations are leaves; [`Tape::backward`] takes a loss
    /// computed from them.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the check is on and finds such a value; errors of collectives.
    pub fn forward(&mut self, input: Activations) -> Result<Activations> {
        let Replica { stages, buckets, .. } = self.replica;
        let mut weights = Ahead::new(self.replica, 0..stages.len());
        // True from the first trained stage on: only then is there a gradient to propagate back.
        let mut reached = false;
        let mut input = input.leaves(false);
        for (index, stage) in stages.iter().enumerate() {
            reached |= buckets[index].is_trained();
            let weights = weights.next()?;
            let keep_graph = reached && !self.recompute.drops(index);
            let forward = || run(index, stage.as_ref(), &weights, &input);
            let output = if keep_graph { forward() } else { no_grad(forward) };
            if let Some(step) = self.check_finite {
                check_finite(step, stage.params().stage(), "output", output.flowing())?;
            }
            let next = output.leaves(reached);
            let input = std::mem::replace(&mut input, next);
            let graph = keep_graph.then_some((weights, output));
            let input = match (reached, &graph) {
                (false, _) => Activations::new(),
                (true, None) if self.offload => input.to_device(Device::Cpu),
                // A graph keeps its input on the device anyway.
                (true, _) => input,
            };
            self.kept.push(Boundary { input, graph });
        }
        pulse::leave_stages();
        self.output = input;
        Ok(self.output.alias())
    }

    /// Propagates the gradient of `loss` back. `on_gradient(stage, gradients)` gets each trained
    /// stage's flat gradients, one for each trained piece, as soon as they are known, last stage
    /// first.
    ///
    /// # Errors
    /// As [`Tape::forward`], and errors of `on_gradient`.
    pub fn backward(
        self,
        loss: &Tensor,
        mut on_gradient: impl FnMut(usize, Vec<Tensor>) -> Result<()>,
    ) -> Result<()> {
        let Replica { stages, buckets, .. } = self.replica;
        // Stages before the first trained one need no gradient.
        let Some(first) = buckets.iter().position(|bucket| bucket.is_trained()) else {
            return Ok(());
        };
        let dropped: Vec<usize> =
            (first..stages.len()).rev().filter(|index| self.kept[*index].graph.is_none()).collect();
        let mut gathered = Ahead::new(self.replica, dropped.into_iter());
        let mut grad_output = loss_backward(loss, &self.output);
        let device = loss.device();
        let has_places = computes_in_place(device);
        for (index, Boundary { input, graph }) in
            self.kept.into_iter().enumerate().skip(first).rev()
        {
            enter_stage(index);
            let stage = &stages[index];
            let input =
                if self.offload && graph.is_none() { input.to_device(device) } else { input };
            let (weights, output) = match graph {
                Some(kept) => kept,
                None => {
                    let weights = gathered.next()?;
                    let output = run(index, stage.as_ref(), &weights, &input);
                    (weights, output)
                }
            };
            let bucket = &buckets[index];
            let places = match has_places {
                true => bucket.places(stage.params(), &weights, self.joining),
                false => Places::none(self.joining),
            };
            let (gradients, grad_input) =
                stage_backward(&weights.trained(), &input, &output, &grad_output);
            // Freed before other gradients are flattened, and before they are reduced: the next
            // stage uses the memory of the graph and the gathered parameters.
            drop((weights, output, input));
            let gradients = bucket.joined(stage.params(), places, gradients);
            if let Some(step) = self.check_finite {
                check_finite(
                    step,
                    stage.params().stage(),
                    "gradient",
                    gradients.iter().map(|gradient| ("parameters", gradient)),
                )?;
            }
            if !gradients.is_empty() {
                on_gradient(index, gradients)?;
            }
            grad_output = grad_input;
        }
        pulse::leave_stages();
        Ok(())
    }
}

/// Records which stage computes, and breaks it if a fault is due there.
fn enter_stage(index: usize) {
    pulse::enter_stage(index);
    fault::strike_in_stage(index);
}

/// Runs the stage of this index forward.
pub(super) fn run(
    index: usize,
    stage: &dyn Stage,
    weights: &Weights,
    input: &Activations,
) -> Activations {
    enter_stage(index);
    stage.forward(weights.leaves(), input).carrying_constants_of(input)
}

fn check_finite<'t>(
    step: u64,
    stage: &str,
    what: &str,
    tensors: impl Iterator<Item = (&'static str, &'t Tensor)>,
) -> Result<()> {
    for (name, tensor) in tensors.filter(|(_, tensor)| tensor.defined()) {
        let bad = tensor.isfinite().logical_not().sum(tch::Kind::Int64).int64_value(&[]);
        if bad > 0 {
            let what = format!(
                "stage {stage}: {what} `{name}` {:?} has {bad} non-finite values",
                tensor.size()
            );
            return Err(Error::NotFinite { step, what });
        }
    }
    Ok(())
}
