//! Who holds what changes no number: every sharding, on any number of ranks, trains as one rank
//! does.

use std::path::{Path, PathBuf};

use fm_dist::collective::{Collective, Threads};
use fm_dist::model::{Architecture, Dit};
use fm_dist::nn::{Activations, Builder, Init, Param, ParamSet, Rows, Stage, Tuned, Views};
use fm_dist::parallel::{
    Devices, Joining, Recompute, ReduceDtype, Reducer, Replica, Sharding, ShardingGroup, Sharing,
    Summation, divergence,
};
use fm_dist::rng::{Key, Purpose};
use fm_dist::run::Resume;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::equivalence::assert_same_curve;
use super::training::WAN;
use crate::runs::{checkpoint, compute_as_in_training, tiny, train_in_threads};

/// Each sharding as its settings.
pub const SHARDINGS: [(&str, &[&str]); 4] = [
    ("none", &[]),
    ("optimizer", &["parallel.sharding=optimizer"]),
    ("gradients", &["parallel.sharding=gradients"]),
    ("parameters", &["parallel.sharding=parameters", "parallel.recompute=always"]),
];

fn train(root: &Path, name: &str, ranks: usize, overrides: &[&str]) -> PathBuf {
    let output = format!("output_dir={}", root.join(name).display());
    train_in_threads(
        &tiny(&[&["max_steps=10", output.as_str()], overrides].concat()),
        &Resume::Never,
        ranks,
    )
    .unwrap()
}

/// One run of each sharding on so many ranks with so many micro-batches each.
pub fn train_each(
    root: &Path,
    ranks: usize,
    micro_batches: usize,
    overrides: &[&str],
) -> [PathBuf; 4] {
    let batch = format!("train.global_batch_size={}", 8 * ranks * micro_batches);
    SHARDINGS.map(|(word, settings)| {
        train(
            root,
            &format!("{word}-{ranks}-{micro_batches}"),
            ranks,
            &[&[batch.as_str()], overrides, settings].concat(),
        )
    })
}

#[test]
fn with_one_micro_batch_every_sharding_gives_the_bits_of_none() {
    for (ranks, dtype) in [(2, "float32"), (3, "float32"), (4, "bfloat16")] {
        let root = TempDir::new().unwrap();
        let [none, rest @ ..] =
            train_each(root.path(), ranks, 1, &[&format!("model.dtype={dtype}")])
                .map(|run| checkpoint(&run, 10));
        assert!(rest.iter().all(|sharded| *sharded == none), "{ranks} ranks in {dtype}");
    }
}

#[test]
fn with_many_micro_batches_shardings_that_sum_alike_have_equal_bits() {
    for ranks in [2, 3] {
        let root = TempDir::new().unwrap();
        let runs = train_each(root.path(), ranks, 2, &[]);
        let alone =
            train(root.path(), "alone", 1, &[&format!("train.global_batch_size={}", 16 * ranks)]);
        runs.iter().for_each(|run| assert_same_curve(&alone, run, &run.display().to_string()));
        let [none, optimizer, gradients, parameters] = runs.map(|run| checkpoint(&run, 10));
        assert!(none == optimizer, "{ranks} ranks: sums over micro-batches, then over ranks");
        assert!(gradients == parameters, "{ranks} ranks: sums over ranks, then over micro-batches");
    }
}

#[test]
fn precise_parameters_travel_in_float32_beside_the_others() {
    let root = TempDir::new().unwrap();
    let data = root.path().join("data");
    WAN.write_data(&data);
    let runs = SHARDINGS.map(|(word, settings)| {
        let overrides = [&["max_steps=5", "model.dtype=bfloat16"], settings].concat();
        checkpoint(
            &train_in_threads(
                &WAN.config(&data, &root.path().join(word), &overrides),
                &Resume::Never,
                3,
            )
            .unwrap(),
            5,
        )
    });
    assert!(runs[1..].iter().all(|sharded| *sharded == runs[0]));
}

#[test]
fn gradients_that_travel_in_bfloat16_train_as_well() {
    let root = TempDir::new().unwrap();
    let settings = ["model.dtype=bfloat16", "parallel.reduce_dtype=bfloat16"];
    let [none, rest @ ..] = train_each(root.path(), 2, 1, &settings);
    let precise =
        train(root.path(), "precise", 2, &["train.global_batch_size=16", "model.dtype=bfloat16"]);
    assert_ne!(checkpoint(&none, 10), checkpoint(&precise, 10), "gradients were rounded");
    assert!(rest.iter().all(|run| checkpoint(run, 10) == checkpoint(&none, 10)));
    let last = |run: &Path| crate::runs::column(run, "loss").last().unwrap().1;
    assert!(
        (last(&none) - last(&precise)).abs() < 0.02 * last(&precise),
        "{} and {}",
        last(&none),
        last(&precise)
    );
}

const KEY: Key = Key { seed: 23, purpose: Purpose::Test, step: 0, micro_batch: 0, scope: 0 };

/// The embedder, two blocks, a door, a third block and the head of a small model.
fn stages(door_is_open: bool) -> Vec<Box<dyn Stage>> {
    let model = Dit {
        in_channels: 2,
        condition_width: 5,
        width: 32,
        depth: 3,
        num_heads: 2,
        ..Dit::default()
    };
    let mut stages = model.stages().unwrap();
    stages.insert(3, Box::new(Door::new(door_is_open)));
    stages
}

/// Lets gradients through, or not: then nothing before it is reached.
struct Door {
    params: ParamSet,
    scale: Param,
    is_open: bool,
}

impl Door {
    fn new(is_open: bool) -> Self {
        let mut params = ParamSet::new("door");
        let scale = Builder::new(&mut params, "door", Rows::Image).param("scale", &[1], Init::Ones);
        Door { params, scale, is_open }
    }
}

impl Stage for Door {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let through =
            |tensor: &Tensor| if self.is_open { tensor.shallow_clone() } else { tensor.detach() };
        input.flowing().fold(Activations::new(), |output, (name, tensor)| {
            output.with(name, through(tensor) * &params[self.scale])
        })
    }
}

/// How one step is shared.
#[derive(Clone, Copy)]
struct Shape {
    sharding: Sharding,
    recompute: Recompute,
    node_of_rank: &'static [usize],
    frozen: &'static [usize],
    /// The rank on which no gradient passes the door in this step.
    behind_a_door: Option<usize>,
}

const SHAPE: Shape = Shape {
    sharding: Sharding::None,
    recompute: Recompute::Always,
    node_of_rank: &[0, 0, 0, 0],
    frozen: &[],
    behind_a_door: None,
};

/// Rank `rank`'s own data.
fn inputs(rank: usize) -> Activations {
    KEY.step(2).scope(rank as u64).seeded(|| {
        let float = (Kind::Float, Device::Cpu);
        Activations::new()
            .with_constant("hidden_states", Tensor::randn([3, 2, 4, 6], float))
            .with_constant("timestep", Tensor::rand([3], float) * 1000.0)
            .with_constant("encoder_hidden_states", Tensor::randn([3, 4, 5], float))
    })
}

/// Two micro-batches on each of four ranks; the summed gradient of each stage, whole, as rank 0
/// sees it.
fn summed(shape: Shape) -> Vec<Option<Tensor>> {
    let mut gradients = Threads::run(shape.node_of_rank.len(), |world| on_rank(world, shape));
    let first = gradients.remove(0);
    let equal = |other: &Vec<Option<Tensor>>| {
        first
            .iter()
            .zip(other)
            .all(|(a, b)| a.as_ref().zip(b.as_ref()).is_none_or(|(a, b)| a.equal(b)))
    };
    assert!(gradients.iter().all(equal), "ranks differ");
    first
}

fn on_rank(world: &dyn Collective, shape: Shape) -> Vec<Option<Tensor>> {
    compute_as_in_training();
    let sharing = Sharing::within_nodes(world, shape.sharding, shape.node_of_rank, 1).unwrap();
    let stages = stages(shape.behind_a_door != Some(world.rank()));
    let freeze = |(index, stage): (usize, Box<dyn Stage>)| match shape.frozen.contains(&index) {
        true => Box::new(Tuned::frozen(stage)) as Box<dyn Stage>,
        false => stage,
    };
    let stages = stages.into_iter().enumerate().map(freeze).collect();
    let mut replica =
        Replica::shared(stages, Kind::Float, Devices::one(Device::Cpu), Some(KEY), sharing);
    for bucket in &mut replica.buckets {
        // Away from zero, so that no gradient vanishes by construction; alike on every rank.
        let values = bucket.parameters(&replica.sharing).unwrap();
        bucket.set(&(values + 0.01));
    }
    let joining = Joining::new(world.world_size(), shape.sharding, ReduceDtype::Float32, 2);
    let mut reducer = Reducer::new(&replica.sharing, &replica.buckets, joining, Summation::Running);
    for micro_batch in 0..2 {
        let mut tape = replica.tape(shape.recompute).joining(joining);
        let output = tape.forward(inputs(10 * micro_batch + world.rank())).unwrap();
        let loss = output.get("prediction").square().mean(Kind::Float);
        tape.backward(&loss, |stage, gradients| reducer.add(stage, gradients, micro_batch == 1))
            .unwrap();
    }
    let gradients = reducer.finish().unwrap();
    let whole = |(stage, owned): (usize, &Vec<Tensor>)| {
        (!owned.is_empty()).then(|| replica.buckets[stage].whole(owned, &replica.sharing).unwrap())
    };
    gradients.iter().enumerate().map(whole).collect()
}

fn assert_equal(found: &[Option<Tensor>], expected: &[Option<Tensor>], what: &str) {
    for (stage, (found, expected)) in found.iter().zip(expected).enumerate() {
        match (found, expected) {
            (Some(found), Some(expected)) => {
                assert!(found.equal(expected), "{what}: stage {stage}")
            }
            (found, expected) => {
                assert!(found.is_none() && expected.is_none(), "{what}: stage {stage}")
            }
        }
    }
}

#[test]
fn nodes_that_repeat_the_state_sum_as_the_whole_world_does() {
    for sharding in [Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters] {
        let world = summed(Shape { sharding, ..SHAPE });
        let nodes = summed(Shape { sharding, node_of_rank: &[0, 0, 1, 1], ..SHAPE });
        assert_equal(&nodes, &world, &format!("{sharding:?}"));
        // Neighbours in the tree stand on different nodes: other sums, the same but for rounding.
        let scattered = summed(Shape { sharding, node_of_rank: &[0, 1, 0, 1], ..SHAPE });
        for (found, expected) in scattered.iter().flatten().zip(world.iter().flatten()) {
            assert!(found.allclose(expected, 1e-5, 1e-6, false), "{sharding:?}");
        }
    }
}

#[test]
fn frozen_stages_have_no_gradient_under_any_sharding() {
    for frozen in [&[0, 1][..], &[2], &[0, 3]] {
        let expected = summed(Shape { frozen, ..SHAPE });
        assert_eq!(
            expected.iter().map(Option::is_none).collect::<Vec<_>>(),
            (0..6).map(|stage| frozen.contains(&stage)).collect::<Vec<_>>()
        );
        for recompute in [Recompute::Never, Recompute::Every(2)] {
            assert_equal(
                &summed(Shape { frozen, recompute, ..SHAPE }),
                &expected,
                &format!("{recompute:?}"),
            );
        }
        assert_equal(
            &summed(Shape { frozen, sharding: Sharding::Optimizer, ..SHAPE }),
            &expected,
            "optimizer",
        );
        let scattered = summed(Shape { frozen, sharding: Sharding::Gradients, ..SHAPE });
        assert_equal(
            &summed(Shape { frozen, sharding: Sharding::Parameters, ..SHAPE }),
            &scattered,
            "parameters",
        );
    }
}

#[test]
fn stages_that_one_rank_does_not_reach_hold_nobody_up() {
    let all = summed(SHAPE);
    let three = summed(Shape { behind_a_door: Some(1), ..SHAPE });
    let equal: Vec<bool> = all
        .iter()
        .zip(&three)
        .map(|(all, three)| all.as_ref().unwrap().equal(three.as_ref().unwrap()))
        .collect();
    assert_eq!(
        equal,
        [false, false, false, true, true, true],
        "before the door one rank adds nothing"
    );
    for sharding in [Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters] {
        let found = summed(Shape { sharding, behind_a_door: Some(1), ..SHAPE });
        for (found, expected) in found.iter().flatten().zip(three.iter().flatten()) {
            assert!(found.allclose(expected, 1e-5, 1e-6, false), "{sharding:?}");
        }
    }
}

/// Settings under which every number of ranks sums alike; eight blocks of eight samples.
const DETERMINISTIC: [&str; 3] =
    ["parallel.deterministic=true", "train.global_batch_size=64", "max_steps=50"];

#[test]
fn weights_are_bit_equal_at_every_world_size_and_under_every_sharding() {
    let root = TempDir::new().unwrap();
    let run = |name: &str, ranks: usize, settings: &[&str]| {
        let run = train(root.path(), name, ranks, &[&DETERMINISTIC, settings].concat());
        checkpoint(&run, 50)
    };
    let alone = run("alone", 1, &[]);
    for ranks in [2, 4, 8] {
        assert!(run(&format!("ranks-{ranks}"), ranks, &[]) == alone, "{ranks} ranks");
    }
    for (word, settings) in &SHARDINGS[1..] {
        assert!(run(&format!("{word}-2"), 2, settings) == alone, "{word} on 2 ranks");
        assert!(run(&format!("{word}-4"), 4, settings) == alone, "{word} on 4 ranks");
    }
    // The usual sums depend on the number of ranks: otherwise this test would show nothing.
    let usual = |ranks| {
        checkpoint(&train(root.path(), &format!("usual-{ranks}"), ranks, &DETERMINISTIC[1..]), 50)
    };
    assert!(usual(1) != usual(4));
}

#[test]
fn a_resume_at_another_world_size_and_sharding_changes_no_bit() {
    let root = TempDir::new().unwrap();
    let config = |folder: &Path, steps: &str, settings: &[&str]| {
        let output = format!("output_dir={}", folder.display());
        tiny(
            &[
                &DETERMINISTIC[..2],
                &["checkpoint.every_n_steps=10", "checkpoint.keep_last=4", steps, output.as_str()],
                settings,
            ]
            .concat(),
        )
    };
    let unbroken = train_in_threads(
        &config(&root.path().join("unbroken"), "max_steps=40", &[]),
        &Resume::Never,
        1,
    )
    .unwrap();
    let folder = root.path().join("wandering");
    // The learning rate depends on the whole run's length, so a run is cut short by taking its
    // later checkpoints away.
    for (round, (ranks, sharding)) in [(4, 1), (2, 3), (8, 2), (1, 0)].into_iter().enumerate() {
        let resume = if round == 0 { Resume::Never } else { Resume::Latest };
        train_in_threads(&config(&folder, "max_steps=40", SHARDINGS[sharding].1), &resume, ranks)
            .unwrap();
        for later in round + 2..=4 {
            let _ = std::fs::remove_dir_all(folder.join(format!("step-{:08}", 10 * later)));
        }
    }
    assert_eq!(checkpoint(&unbroken, 40), checkpoint(&folder, 40));
}

/// Three ranks, on one of which one parameter changes.
fn with_a_change(
    sharding: Sharding,
    change_on: Option<usize>,
) -> Vec<Result<(), fm_dist::error::Error>> {
    Threads::run(3, |rank| {
        let stages =
            Dit { width: 8, depth: 1, num_heads: 2, ..Dit::default() }.stages().expect("sound");
        let sharing = Sharing::new(rank, sharding, ShardingGroup::World, 1).expect("sound");
        let (key, devices) = (Key::new(1, Purpose::Test), Devices::one(Device::Cpu));
        let mut replica = Replica::shared(stages, Kind::BFloat16, devices, Some(key), sharing);
        if change_on == Some(rank.rank()) {
            replica.buckets[1].update(|master| drop(master.narrow(0, 3, 1).fill_(0.123)));
        }
        divergence::check(&replica, rank.rank())
    })
}

#[test]
fn one_parameter_on_one_rank_is_noticed_by_all() {
    for sharding in [Sharding::None, Sharding::Optimizer] {
        assert!(with_a_change(sharding, None).iter().all(Result::is_ok));
        for outcome in with_a_change(sharding, Some(2)) {
            let text = outcome.expect_err("rank 2 differs").to_string();
            assert!(text.contains("rank 2 holds other parameters than the rest: "), "{text}");
            let names = if sharding == Sharding::None { "`blocks.0." } else { "blocks.0" };
            assert!(text.contains(names) && text.ends_with("nothing was saved"), "{text}");
        }
    }
    assert!(
        with_a_change(Sharding::Parameters, Some(2)).iter().all(Result::is_ok),
        "nobody else holds it"
    );
}

#[test]
fn among_nodes_the_rank_is_named_by_its_number_in_the_world() {
    let outcomes = Threads::run(4, |world| {
        let stages =
            Dit { width: 8, depth: 1, num_heads: 2, ..Dit::default() }.stages().expect("sound");
        let sharing =
            Sharing::within_nodes(world, Sharding::Gradients, &[0, 0, 1, 1], 1).expect("sound");
        let (key, devices) = (Key::new(1, Purpose::Test), Devices::one(Device::Cpu));
        let mut replica = Replica::shared(stages, Kind::Float, devices, Some(key), sharing);
        if world.rank() == 3 {
            replica.buckets[1].update(|master| drop(master.narrow(0, 3, 1).fill_(0.123)));
        }
        divergence::check(&replica, world.rank())
    });
    for rank in [1, 3] {
        let text = outcomes[rank].as_ref().expect_err("they hold one shard").to_string();
        assert!(text.contains("rank 3 holds other parameters than the rest"), "{text}");
    }
}
