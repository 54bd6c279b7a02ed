//! Stage-wise backward gives the gradients of plain autograd, bit for bit, and autograd those of
//! the mathematics.

use fm_dist::model::{Architecture, Dit};
use fm_dist::nn::{Activations, Builder, Init, Linear, ParamSet, Rows, Stage, Tuned, Views};
use fm_dist::parallel::{Bucket, Joining, Recompute, ReduceDtype, Replica, Sharding, Sharing};
use fm_dist::rng::{Key, Purpose};
use fm_dist::tuning::{LoraSettings, Tuning};
use tch::{Device, Kind, Tensor};

use crate::runs::compute_as_in_training;

const KEY: Key = Key { seed: 17, purpose: Purpose::Test, step: 0, micro_batch: 0, scope: 0 };

/// A small model whose every parameter is away from zero, so that no gradient vanishes by
/// construction.
fn replica(kind: Kind) -> Replica<'static> {
    replica_with_frozen(kind, &[])
}

/// The same, some of whose stages are frozen.
fn replica_with_frozen(kind: Kind, frozen: &[usize]) -> Replica<'static> {
    compute_as_in_training();
    let model = Dit {
        in_channels: 2,
        condition_width: 5,
        width: 32,
        depth: 3,
        num_heads: 2,
        ..Dit::default()
    };
    let freeze = |(index, stage): (usize, Box<dyn Stage>)| match frozen.contains(&index) {
        true => Box::new(Tuned::frozen(stage)) as Box<dyn Stage>,
        false => stage,
    };
    let stages = model.stages().unwrap().into_iter().enumerate().map(freeze).collect();
    let mut replica = Replica::alone(stages, kind, Device::Cpu, Some(KEY));
    shake(&mut replica);
    replica
}

fn shake(replica: &mut Replica<'_>) {
    for (index, bucket) in replica.buckets.iter_mut().enumerate() {
        let noise =
            |values: &Tensor| KEY.step(1).scope(index as u64).seeded(|| values.randn_like() * 0.05);
        let values = bucket.parameters(&Sharing::alone()).unwrap();
        bucket.set(&(&values + noise(&values)));
    }
}

fn inputs(kind: Kind) -> (Activations, Tensor) {
    KEY.step(2).seeded(|| {
        let float = (Kind::Float, Device::Cpu);
        let latents = Tensor::randn([3, 2, 4, 6], float);
        let activations = Activations::new()
            .with_constant("hidden_states", latents.to_kind(kind))
            .with_constant("timestep", (Tensor::rand([3], float) * 1000.0).to_kind(kind))
            .with_constant("encoder_hidden_states", Tensor::randn([3, 4, 5], float).to_kind(kind));
        (activations, Tensor::randn([3, 2, 4, 6], float))
    })
}

fn loss(output: &Activations, target: &Tensor) -> Tensor {
    // Never below f32, and in f64 where the model is.
    let difference = output.get("prediction") - target;
    let kind = difference.kind();
    difference.square().mean(kind)
}

/// Loss and flat gradients, stage by stage through a tape.
fn stage_wise(replica: &Replica<'_>, recompute: Recompute) -> (f64, Vec<(usize, Tensor)>) {
    joined(replica, recompute, Joining::default())
}

/// The same, with gradients joined in these kinds.
fn joined(
    replica: &Replica<'_>,
    recompute: Recompute,
    joining: Joining,
) -> (f64, Vec<(usize, Tensor)>) {
    let (input, target) = inputs(replica.buckets[0].pieces()[0].kind());
    let mut tape = replica.tape(recompute).joining(joining);
    let loss = loss(&tape.forward(input).unwrap(), &target);
    let mut gradients = Vec::new();
    tape.backward(&loss, |stage, mut pieces| {
        gradients.push((stage, pieces.remove(0)));
        Ok(())
    })
    .unwrap();
    (loss.double_value(&[]), gradients)
}

/// The same through one graph and libtorch's own accumulation.
fn plain(replica: &Replica<'_>) -> (f64, Vec<Tensor>) {
    let kind = replica.buckets[0].pieces()[0].kind();
    let (mut activations, target) = inputs(kind);
    let leaf = |bucket: &Bucket| {
        bucket.pieces()[0].values().to_kind(kind).detach().set_requires_grad(true)
    };
    let leaves: Vec<Tensor> = replica.buckets.iter().map(leaf).collect();
    for (stage, leaf) in replica.stages.iter().zip(&leaves) {
        activations = stage
            .forward(&stage.params().split(leaf), &activations)
            .carrying_constants_of(&activations);
    }
    let loss = loss(&activations, &target);
    loss.backward();
    (loss.double_value(&[]), leaves.iter().map(Tensor::grad).collect())
}

#[test]
fn stage_wise_gradients_are_plain_autograds_bit_for_bit() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let replica = replica(kind);
        let (plain_loss, expected) = plain(&replica);
        for recompute in [Recompute::Never, Recompute::Always, Recompute::Every(2)] {
            // Joined to be added to, and computed where they stay.
            for (micro_batches, of_gradient) in [(2, Kind::Float), (1, kind)] {
                let dtype = ReduceDtype::Float32;
                let joining = Joining::new(1, Sharding::None, dtype, micro_batches);
                let (loss, gradients) = joined(&replica, recompute, joining);
                let what = format!("{kind:?} {recompute:?} {micro_batches}");
                assert_eq!(loss, plain_loss, "{what}");
                let order: Vec<usize> = gradients.iter().map(|(stage, _)| *stage).collect();
                assert_eq!(order, [4, 3, 2, 1, 0], "last stage first");
                for (stage, gradient) in &gradients {
                    assert_eq!(gradient.kind(), of_gradient, "{what}");
                    let expected = expected[*stage].to_kind(of_gradient);
                    assert!(gradient.equal(&expected), "{what} stage {stage}");
                    let largest = gradient.abs().max().double_value(&[]);
                    assert!(largest > 0.0, "stage {stage} has a gradient at all");
                }
            }
        }
    }
}

#[test]
fn boundaries_that_wait_in_host_memory_change_no_bit() {
    let replica = replica(Kind::BFloat16);
    let gradients = |offload| {
        let (input, target) = inputs(Kind::BFloat16);
        let mut tape = replica.tape(Recompute::Every(2)).offloading(offload);
        let loss = loss(&tape.forward(input).unwrap(), &target);
        let mut gradients = Vec::new();
        tape.backward(&loss, |_, mut pieces| {
            gradients.append(&mut pieces);
            Ok(())
        })
        .unwrap();
        gradients
    };
    let (here, elsewhere) = (gradients(false), gradients(true));
    assert_eq!(here.len(), 5);
    assert!(here.iter().zip(&elsewhere).all(|(a, b)| a.equal(b)));
}

#[test]
fn frozen_stages_before_the_first_trained_one_are_never_entered() {
    let reference = stage_wise(&replica(Kind::Float), Recompute::Never).1;
    for recompute in [Recompute::Never, Recompute::Always] {
        let replica = replica_with_frozen(Kind::Float, &[0, 1, 2]);
        let (_, gradients) = stage_wise(&replica, recompute);
        assert_eq!(gradients.iter().map(|(stage, _)| *stage).collect::<Vec<_>>(), [4, 3]);
        assert!(gradients.iter().zip(&reference).all(|((_, a), (_, b))| a.equal(b)));
    }
}

#[test]
fn a_frozen_stage_in_the_middle_passes_gradients_on() {
    let reference = stage_wise(&replica(Kind::Float), Recompute::Never).1;
    let replica = replica_with_frozen(Kind::Float, &[2]);
    let (_, gradients) = stage_wise(&replica, Recompute::Never);
    let expected: Vec<_> = reference.iter().filter(|(stage, _)| *stage != 2).collect();
    assert_eq!(gradients.len(), expected.len());
    assert!(
        gradients.iter().zip(expected).all(|((stage, a), (known, b))| stage == known && a.equal(b))
    );
}

/// Compares gradients with central differences in f64: error of order step² plus rounding / step.
/// Masters are f32; what is computed with holds the same values in f64, and the check moves these.
fn check_slopes(replica: &Replica<'_>) {
    const STEP: f64 = 1e-5;
    const TOLERANCE: f64 = 1e-7;
    let (_, gradients) = stage_wise(replica, Recompute::Never);
    assert!(!gradients.is_empty());
    for (stage, gradient) in gradients {
        let piece = replica.buckets[stage].trained().next().unwrap();
        for probe in 0..5 {
            let index =
                KEY.step(3).scope(stage as u64).below(probe, piece.layout().numel as u64) as i64;
            let loss_at = |offset: f64| {
                let full = piece.full().unwrap();
                let original = full.double_value(&[index]);
                let place = |value: f64| drop(full.narrow(0, index, 1).fill_(value));
                place(original + offset);
                let loss = stage_wise(replica, Recompute::Never).0;
                place(original);
                loss
            };
            let slope = (loss_at(STEP) - loss_at(-STEP)) / (2.0 * STEP);
            let found = gradient.double_value(&[index]);
            assert!(
                (slope - found).abs() < TOLERANCE,
                "stage {stage} parameter {index}: slope {slope}, gradient {found}"
            );
        }
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    check_slopes(&replica(Kind::Double));
}

/// The model frozen, with low-rank changes of what they target.
fn replica_with_lora(kind: Kind, targets: &str) -> Replica<'static> {
    compute_as_in_training();
    let lora = LoraSettings {
        rank: Some(3),
        alpha: Some(5.0),
        target_modules: vec![targets.into()],
        ..LoraSettings::default()
    };
    let model = Dit {
        in_channels: 2,
        condition_width: 5,
        width: 32,
        depth: 3,
        num_heads: 2,
        ..Dit::default()
    };
    let stages = Tuning { trainable: &[], lora: &lora, frozen_form: None }.of(&model).unwrap();
    let mut replica = Replica::alone(stages, kind, Device::Cpu, Some(KEY));
    shake(&mut replica);
    replica
}

#[test]
fn gradients_of_low_rank_changes_are_slopes_too() {
    for targets in ["all-linear", "attention"] {
        check_slopes(&replica_with_lora(Kind::Double, targets));
    }
}

#[test]
fn nothing_that_only_frozen_parameters_made_has_a_gradient() {
    // The conditions reach every block, and no trained parameter before them: what modulates the
    // blocks is a constant to all of them.
    let replica = replica_with_lora(Kind::Float, "attention");
    let (input, target) = inputs(Kind::Float);
    let mut tape = replica.tape(Recompute::Never);
    let output = tape.forward(input).unwrap();
    assert_eq!(output.flowing().map(|(name, _)| name).collect::<Vec<_>>(), ["prediction"]);
    let loss = loss(&output, &target);
    let mut stages = Vec::new();
    tape.backward(&loss, |stage, gradients| {
        assert!(
            gradients.iter().all(|gradient| gradient.isfinite().all().double_value(&[]) == 1.0)
        );
        stages.push(stage);
        Ok(())
    })
    .unwrap();
    assert_eq!(stages, [3, 2, 1], "the blocks alone");
    for recompute in [Recompute::Always, Recompute::Every(2)] {
        let [kept, again] = [Recompute::Never, recompute].map(|way| stage_wise(&replica, way).1);
        assert!(kept.iter().zip(&again).all(|((_, a), (_, b))| a.equal(b)), "{recompute:?}");
    }
}

/// A stage that adds an output which nobody uses, and holds a parameter that its graph does not
/// reach.
struct Idle {
    params: ParamSet,
    used: Linear,
}

impl Idle {
    fn new() -> Self {
        let mut params = ParamSet::new("idle");
        let mut builder = Builder::new(&mut params, "idle", Rows::Image);
        let used = Linear::new(&mut builder.at("used"), 4, 4, Init::Normal { std: 1.0 });
        builder.param("unreached", &[3], Init::Ones);
        Idle { params, used }
    }
}

impl Stage for Idle {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let hidden = self.used.forward(params, input.get("prediction"));
        Activations::new().with("aside", &hidden * 2.0).with("prediction", hidden)
    }
}

#[test]
fn what_the_loss_does_not_reach_has_a_zero_gradient() {
    let replica = Replica::alone(
        vec![Box::new(Idle::new()), Box::new(Idle::new())],
        Kind::Float,
        Device::Cpu,
        Some(KEY),
    );
    let input = Activations::new()
        .with_constant("prediction", Tensor::ones([2, 4], (Kind::Float, Device::Cpu)));
    let mut tape = replica.tape(Recompute::Always);
    let loss = tape.forward(input).unwrap().get("prediction").sum(Kind::Float);
    let mut stages = Vec::new();
    tape.backward(&loss, |stage, pieces| {
        let gradient = &pieces[0];
        assert_eq!(gradient.narrow(0, 20, 3).abs().max().double_value(&[]), 0.0);
        assert!(gradient.narrow(0, 0, 20).abs().max().double_value(&[]) > 0.0);
        stages.push(stage);
        Ok(())
    })
    .unwrap();
    assert_eq!(stages, [1, 0]);
}

#[test]
fn the_debug_mode_names_the_stage_and_the_tensor() {
    let mut replica = replica(Kind::Float);
    // The last bias: attention itself would turn a row of NaN scores into zeros on a CPU.
    let last = replica.stages[2].params().numel() - 1;
    replica.buckets[2].update(|master| drop(master.narrow(0, last, 1).fill_(f64::NAN)));
    let (input, _) = inputs(Kind::Float);
    let error = replica.tape(Recompute::Never).checking_finite(Some(7)).forward(input).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("step 7: stage blocks.1: output `hidden` [3, 6, 32] has"), "{text}");
}
