//! Predicts the time of a step on a cluster, and how much of its communication computation hides.
//!
//! `cluster.rs` gives the time of a stage's computation, `links.rs` the time of a collective;
//! `rank.rs` simulates a step with both. Congestion, late ranks, data loading and checkpoints are
//! not modelled.

mod cluster;
mod links;
mod rank;

use tch::Kind;

use crate::collective::Spent;
use crate::ops::Kernels;
use crate::parallel::{Recompute, ReduceDtype, Sharding, ShardingGroup};
pub use cluster::{Cluster, KNOWN_NAME};
use rank::Rank;

/// The cost of one micro-batch in one stage.
#[derive(Clone, Debug, PartialEq)]
pub struct StageWork {
    pub parameters: u64,
    /// Those that are trained.
    pub trained: u64,
    /// Floating-point operations of the forward's matrix products.
    pub product_flop: f64,
    /// The share of it of matrices that have a gradient.
    pub trained_flop: f64,
    /// Floating-point operations of the forward's attention.
    pub attention_flop: f64,
    /// The forward's passes between products.
    pub forward: Passes,
    /// The backward's.
    pub backward: Passes,
}

/// Operators, and the bytes that those between products read and write.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Passes {
    /// Number of operators that launch work, products among them.
    pub operators: f64,
    pub bytes: f64,
}

impl StageWork {
    fn parameter_bytes(&self, kind: Kind) -> f64 {
        (self.parameters * kind.elt_size_in_bytes() as u64) as f64
    }

    fn trained_bytes(&self, kind: Kind) -> f64 {
        (self.trained * kind.elt_size_in_bytes() as u64) as f64
    }
}

/// A rank's step; it is the same at any number of ranks.
#[derive(Clone, Debug)]
pub struct Workload {
    pub stages: Vec<StageWork>,
    /// Kind of the computation.
    pub kind: Kind,
    pub kernels: Kernels,
    pub micro_batches: usize,
    pub sharding: Sharding,
    pub sharding_group: ShardingGroup,
    pub recompute: Recompute,
    pub reduce_dtype: ReduceDtype,
    /// Bytes of a parameter's average, which each update reads and writes; 0 without averages.
    pub average_bytes: u64,
    pub num_threads: usize,
}

/// The parts of a step's time. Its total is the sum of computation, optimizer and exposed
/// communication.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    pub step_seconds: f64,
    /// Seconds of forwards and backwards.
    pub compute_seconds: f64,
    pub optimizer_seconds: f64,
    pub spent: Spent,
}

impl Workload {
    /// The first stage that the backward pass reaches.
    fn first_trained(&self) -> usize {
        let first = self.stages.iter().position(|stage| stage.trained > 0);
        first.unwrap_or(self.stages.len())
    }

    /// Predicts a step of each of `ranks` on the cluster.
    pub fn predict(&self, cluster: &Cluster, ranks: usize) -> Prediction {
        Rank::new(self, cluster, ranks).step()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARDINGS: [Sharding; 4] =
        [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];
    const GROUPS: [ShardingGroup; 2] = [ShardingGroup::World, ShardingGroup::Node];

    /// Nodes of 8 workers that do 1 operation per second and everything else in no time, with the
    /// given links.
    fn cluster(links: &str, hop: f64) -> Cluster {
        let rates = "peak = 1.0\nproducts = 1.0\nattention = 1.0";
        let protocol =
            format!("begin = 1e-30\nwithin = {hop:e}\nacross = {hop:e}\nbandwidth = 1.0");
        let text = format!(
            "[[nccl.ring]]\n{protocol}\n[[nccl.tree]]\n{protocol}\n[cluster.test]\nabout = \"\"\nworkers = 8\nmemory = 1e30\n\
             update = 28.0\nlaunch = 1e-30\nmessage = 1e-30\nfloat32 = {{ {rates} }}\nbfloat16 = {{ {rates} }}\nlinks = {links}\n",
            rates = rates.replace('\n', ", ")
        );
        Cluster::named("test", Some(("a test", &text))).expect("sound")
    }

    fn gpus(within: f64, across: f64) -> Cluster {
        cluster(&format!("{{ nccl = {{ within = {within:e}, across = {across:e} }} }}"), 1e-30)
    }

    /// Four stages of 64 parameters, 10 s forward and 20 s backward each.
    fn workload(sharding: Sharding) -> Workload {
        let stage = StageWork {
            parameters: 64,
            trained: 64,
            product_flop: 10.0,
            trained_flop: 10.0,
            attention_flop: 0.0,
            forward: Passes { operators: 1.0, bytes: 0.0 },
            backward: Passes { operators: 2.0, bytes: 0.0 },
        };
        Workload {
            stages: vec![stage; 4],
            kind: Kind::Float,
            kernels: Kernels::Fused,
            micro_batches: 1,
            sharding,
            sharding_group: ShardingGroup::World,
            recompute: if sharding == Sharding::Parameters {
                Recompute::Always
            } else {
                Recompute::Never
            },
            reduce_dtype: ReduceDtype::Float32,
            average_bytes: 0,
            num_threads: 1,
        }
    }

    fn assert_near(found: f64, expected: f64) {
        assert!(
            (found - expected).abs() < 1e-6 * expected.abs().max(1.0),
            "{found}, expected {expected}"
        );
    }

    /// Bandwidth at which a stage's gradient takes `seconds` around a ring of 8.
    fn all_reduced_in(seconds: f64) -> f64 {
        14.0 / 8.0 * 64.0 * 4.0 / seconds
    }

    #[test]
    fn one_rank_computes_updates_and_exposes_nothing_under_every_sharding() {
        for sharding in SHARDINGS {
            let Prediction { step_seconds, compute_seconds, optimizer_seconds, spent } =
                Workload { recompute: Recompute::Never, ..workload(sharding) }
                    .predict(&gpus(1.0, 1.0), 1);
            assert_eq!(spent, Spent::default());
            assert_near(compute_seconds, 4.0 * 30.0);
            assert_near(optimizer_seconds, 4.0 * 64.0);
            assert_near(step_seconds, compute_seconds + optimizer_seconds);
        }
    }

    #[test]
    fn gradients_hide_behind_the_next_backward_and_the_first_stages_hides_behind_nothing() {
        let Spent { communication_seconds, exposed_seconds } =
            workload(Sharding::None).predict(&gpus(all_reduced_in(5.0), 1.0), 8).spent;
        assert_near(communication_seconds, 4.0 * 5.0);
        assert_near(exposed_seconds, 5.0);
    }

    #[test]
    fn links_that_are_slower_than_the_backward_are_busy_from_its_first_stage_to_the_end() {
        let Spent { communication_seconds, exposed_seconds } =
            workload(Sharding::None).predict(&gpus(all_reduced_in(50.0), 1.0), 8).spent;
        assert_near(communication_seconds, 4.0 * 50.0);
        assert_near(exposed_seconds, 4.0 * 50.0 - 3.0 * 20.0);
    }

    #[test]
    fn what_is_gathered_hides_behind_the_stage_before_and_parameters_are_published_behind_nothing()
    {
        // Half of an all-reduce each.
        let links = gpus(all_reduced_in(10.0), 1.0);
        // 8 gathers, of which the first in each direction is exposed; 4 gradients, of which the
        // last is exposed.
        let parameters = workload(Sharding::Parameters).predict(&links, 8).spent;
        assert_near(parameters.communication_seconds, (8.0 + 4.0) * 5.0);
        assert_near(parameters.exposed_seconds, 2.0 * 5.0 + 5.0);
        let optimizer = workload(Sharding::Optimizer).predict(&links, 8).spent;
        assert_near(optimizer.communication_seconds, (4.0 + 4.0) * 5.0);
        assert_near(optimizer.exposed_seconds, 5.0 + 4.0 * 5.0);
    }

    #[test]
    fn recomputation_adds_a_forward_of_the_stages_that_it_drops() {
        let compute = |recompute| {
            Workload { recompute, ..workload(Sharding::None) }
                .predict(&gpus(1.0, 1.0), 1)
                .compute_seconds
        };
        assert_near(compute(Recompute::Always) - compute(Recompute::Never), 4.0 * 10.0);
        assert_near(compute(Recompute::Every(2)) - compute(Recompute::Never), 2.0 * 10.0);
    }

    #[test]
    fn what_is_frozen_has_no_gradient_to_compute_to_sum_or_to_apply() {
        let links = gpus(all_reduced_in(10.0), 1.0);
        let frozen =
            |stage: &StageWork| StageWork { trained: 0, trained_flop: 0.0, ..stage.clone() };
        let whole = workload(Sharding::None);
        let predict =
            |stages: Vec<StageWork>| Workload { stages, ..whole.clone() }.predict(&links, 8);
        let last: Vec<StageWork> = whole
            .stages
            .iter()
            .enumerate()
            .map(|(index, stage)| if index < 3 { frozen(stage) } else { stage.clone() })
            .collect();
        let of_last = predict(last.clone());
        assert_near(of_last.compute_seconds, 4.0 * 10.0 + 20.0);
        assert_near(of_last.optimizer_seconds, 64.0);
        assert_near(of_last.spent.communication_seconds, 10.0);
        // A gradient passes through the frozen stages behind the first trained one.
        let of_first = predict(last.into_iter().rev().collect());
        assert_near(of_first.compute_seconds, 4.0 * 10.0 + 20.0 + 3.0 * 10.0);
    }

    #[test]
    fn sums_of_micro_batches_travel_once_unless_nobody_may_hold_them() {
        let links = gpus(all_reduced_in(10.0), 1.0);
        let communication = |sharding, micro_batches| {
            Workload { micro_batches, ..workload(sharding) }
                .predict(&links, 8)
                .spent
                .communication_seconds
        };
        for sharding in [Sharding::None, Sharding::Optimizer] {
            assert_near(communication(sharding, 3), communication(sharding, 1));
        }
        assert_near(
            communication(Sharding::Gradients, 3) - communication(Sharding::Gradients, 1),
            2.0 * 4.0 * 5.0,
        );
        assert_near(
            communication(Sharding::Parameters, 3),
            3.0 * communication(Sharding::Parameters, 1),
        );
    }

    #[test]
    fn endless_links_expose_nothing() {
        for (sharding, sharding_group) in
            SHARDINGS.into_iter().flat_map(|sharding| GROUPS.map(|group| (sharding, group)))
        {
            let work = Workload { sharding_group, ..workload(sharding) };
            assert_near(work.predict(&gpus(1e30, 1e30), 4096).spent.exposed_seconds, 0.0);
        }
    }

    #[test]
    fn a_stream_of_its_own_is_never_slower_than_taking_turns() {
        for (sharding, sharding_group) in
            SHARDINGS.into_iter().flat_map(|sharding| GROUPS.map(|group| (sharding, group)))
        {
            for bandwidth in [0.1, 10.0, 1000.0] {
                let work = Workload { sharding_group, micro_batches: 2, ..workload(sharding) };
                let Prediction { step_seconds, compute_seconds, optimizer_seconds, spent } =
                    work.predict(&gpus(bandwidth, bandwidth), 64);
                assert!(spent.exposed_seconds <= spent.communication_seconds * (1.0 + 1e-9));
                assert!(
                    step_seconds
                        <= (compute_seconds + optimizer_seconds + spent.communication_seconds)
                            * (1.0 + 1e-9)
                );
            }
        }
    }

    #[test]
    fn more_ranks_and_slower_links_never_communicate_or_expose_less() {
        for sharding in SHARDINGS {
            let spent = |ranks, bandwidth, hop: f64| {
                let links = format!(
                    "{{ nccl = {{ within = {bandwidth:e}, across = {:e} }} }}",
                    bandwidth / 8.0
                );
                workload(sharding).predict(&cluster(&links, hop), ranks).spent
            };
            let sizes = (0..13).map(|power| spent(1 << power, 20.0, 0.01)).collect::<Vec<_>>();
            let links =
                [100.0, 30.0, 10.0, 3.0, 1.0].map(|bandwidth| spent(64, bandwidth, 0.01)).to_vec();
            let hops = [0.001, 0.01, 0.1].map(|hop| spent(64, 20.0, hop)).to_vec();
            for series in [sizes, links, hops] {
                assert!(
                    series.is_sorted_by_key(|spent| spent.communication_seconds),
                    "{sharding:?}: {series:?}"
                );
                assert!(
                    series.is_sorted_by(|a, b| a.exposed_seconds <= b.exposed_seconds + 1e-9),
                    "{sharding:?}: {series:?}"
                );
            }
        }
    }

    #[test]
    fn shards_within_a_node_leave_it_only_as_gradients() {
        let links = gpus(1000.0, 1.0);
        let communication = |sharding_group| {
            Workload { sharding_group, ..workload(Sharding::Parameters) }
                .predict(&links, 64)
                .spent
                .communication_seconds
        };
        // A shard of each gradient crosses 8 nodes by cards of 1 B/s; everything else is as on one
        // node.
        let across = 4.0 * 14.0 / 8.0 * (64.0 * 4.0 / 8.0);
        let within = workload(Sharding::Parameters).predict(&links, 8).spent.communication_seconds;
        assert_near(communication(ShardingGroup::Node), within + across);
        assert!(communication(ShardingGroup::World) > communication(ShardingGroup::Node));
    }

    #[test]
    fn through_memory_everything_is_exposed_and_ranks_share_what_cores_there_are() {
        let cores = cluster("{ memory = { pass = 1000.0 } }", 1e-30);
        for sharding in SHARDINGS {
            let spent = workload(sharding).predict(&cores, 8).spent;
            assert!(spent.communication_seconds > 0.0);
            assert_eq!(spent.communication_seconds, spent.exposed_seconds);
        }
        let compute = |ranks| workload(Sharding::None).predict(&cores, ranks).compute_seconds;
        assert_near(compute(8), compute(1));
        assert_near(compute(32), 4.0 * compute(1));
    }
}
