//! Simulates a step of one of equal ranks.
//!
//! The simulation follows the schedule of `tape.rs`, `ahead.rs`, `reducer.rs` and `replica.rs`.
//! NCCL's operations run one after the other on one stream beside the computation, and start once
//! the computation before their call is done; over MPI transfers run only while a rank waits.

use std::collections::VecDeque;

use tch::Kind;

use super::links::{Group, Links, Operation, memory_seconds};
use super::{Cluster, Prediction, Workload};
use crate::collective::Spent;
use crate::ops::Kernels;
use crate::parallel::reducer::BUCKETS_UNDER_WAY;
use crate::parallel::{Joining, Sharding, ShardingGroup};

/// One of equal ranks, and the progress of its step.
pub(super) struct Rank<'w> {
    work: &'w Workload,
    cluster: &'w Cluster,
    world: Group,
    /// Ranks that share one copy of the state.
    shards: Group,
    /// Ranks that hold the same shard.
    replicas: Group,
    /// Workers of this rank's computation.
    workers: f64,
    /// Share of a core that this rank has for sending; 1 if another device sends.
    sender: f64,
    under_way: VecDeque<UnderWay>,
    /// Seconds from the start of the step to the end of the computation issued so far.
    compute_end: f64,
    /// Seconds from the start of the step to the end of the collectives issued so far.
    links_end: f64,
    spent: Spent,
}

/// A bucket in flight, as in the reducer.
struct UnderWay {
    stage: usize,
    arrival: f64,
}

impl<'w> Rank<'w> {
    pub fn new(work: &'w Workload, cluster: &'w Cluster, ranks: usize) -> Self {
        let on_node =
            if cluster.is_asynchronous() { ranks.min(cluster.constants.workers) } else { ranks };
        let nodes = ranks.div_ceil(on_node);
        let (world, alone) = (Group { ranks, nodes }, Group { ranks: 1, nodes: 1 });
        let (shards, replicas) = match (work.sharding, work.sharding_group) {
            (Sharding::None, _) => (alone, world),
            (_, ShardingGroup::World) => (world, alone),
            (_, ShardingGroup::Node) => {
                (Group { ranks: on_node, nodes: 1 }, Group { ranks: nodes, nodes })
            }
        };
        let (workers, sender) = (
            cluster.workers_of_a_rank(ranks, work.num_threads),
            cluster.workers_of_a_rank(ranks, 1),
        );
        let (under_way, spent) = Default::default();
        Rank {
            work,
            cluster,
            world,
            shards,
            replicas,
            workers,
            sender,
            under_way,
            compute_end: 0.0,
            links_end: 0.0,
            spent,
        }
    }

    pub fn step(mut self) -> Prediction {
        let stages = 0..self.work.stages.len();
        for micro_batch in 0..self.work.micro_batches {
            self.one_ahead(stages.clone(), |rank, stage| rank.compute(rank.forward_seconds(stage)));
            let is_last = micro_batch + 1 == self.work.micro_batches;
            let reached = (self.work.first_trained()..stages.end).rev();
            self.one_ahead(reached, |rank, stage| rank.backward(stage, is_last));
        }
        while !self.under_way.is_empty() {
            self.settle();
        }
        // Each rank's statistics and norms go from host to host, to every other rank.
        self.block((self.world.ranks - 1) as f64 * self.cluster.constants.message);
        let optimizer_seconds = self.optimizer_seconds();
        self.compute(optimizer_seconds);
        self.publish();
        let (step_seconds, spent) = (self.compute_end, self.spent);
        Prediction {
            step_seconds,
            compute_seconds: step_seconds - optimizer_seconds - spent.exposed_seconds,
            optimizer_seconds,
            spent,
        }
    }

    /// Computes every stage while the parameters of the next one are gathered, if they are sharded.
    fn one_ahead(
        &mut self,
        mut order: impl Iterator<Item = usize>,
        mut each: impl FnMut(&mut Self, usize),
    ) {
        let mut next = order.next().map(|stage| (stage, self.gather(stage)));
        while let Some((stage, arrival)) = next {
            next = order.next().map(|stage| (stage, self.gather(stage)));
            self.wait(arrival);
            each(self, stage);
        }
    }

    fn backward(&mut self, stage: usize, is_last: bool) {
        let work = self.work;
        if work.recompute.drops(stage) {
            self.compute(self.forward_seconds(stage));
        }
        let joined = self.joining().joined(work.kind);
        let copied = (joined != work.kind || work.kernels == Kernels::Plain).then_some(joined);
        let seconds = self.cluster.backward_seconds(&work.stages[stage], work.kind, copied);
        self.compute(seconds / self.workers);
        if work.stages[stage].trained > 0 {
            self.reduce(stage, is_last);
        }
    }

    /// Simulates `Reducer::add`.
    fn reduce(&mut self, stage: usize, is_last: bool) {
        let sharding = self.work.sharding;
        while self.under_way.len() >= BUCKETS_UNDER_WAY && sharding != Sharding::None {
            self.settle();
        }
        if is_last || sharding.scatters_each_micro_batch() {
            let bytes = self.gradient_bytes(stage);
            let arrival = match self.is_cut() {
                true => self.send(Operation::ReduceScatter, bytes, self.shards),
                false => self.send(Operation::AllReduce, bytes, self.replicas),
            };
            self.under_way.push_back(UnderWay { stage, arrival });
        }
    }

    /// Simulates `Reducer::settle`.
    fn settle(&mut self) {
        let Some(UnderWay { stage, arrival }) = self.under_way.pop_front() else { return };
        self.wait(arrival);
        if self.is_cut() {
            let bytes = self.gradient_bytes(stage) / self.shards.ranks as f64;
            let arrival = self.send(Operation::AllReduce, bytes, self.replicas);
            self.wait(arrival);
        }
    }

    /// Simulates `Replica::publish`: all stages are sent before the first is awaited.
    fn publish(&mut self) {
        if self.is_cut() && self.work.sharding != Sharding::Parameters {
            let works: Vec<f64> = (0..self.work.stages.len())
                .map(|stage| {
                    let bytes = self.work.stages[stage].trained_bytes(self.work.kind);
                    self.send(Operation::AllGather, bytes, self.shards)
                })
                .collect();
            works.into_iter().for_each(|arrival| self.wait(arrival));
        }
    }

    fn gather(&mut self, stage: usize) -> f64 {
        let holds_shards = self.is_cut() && self.work.sharding == Sharding::Parameters;
        if !holds_shards {
            return self.compute_end;
        }
        let bytes = self.work.stages[stage].parameter_bytes(self.work.kind);
        self.send(Operation::AllGather, bytes, self.shards)
    }

    fn is_cut(&self) -> bool {
        self.shards.ranks > 1
    }

    fn gradient_bytes(&self, stage: usize) -> f64 {
        self.work.stages[stage].trained_bytes(self.joining().sent(self.work.kind))
    }

    /// The kinds of the step's gradients.
    fn joining(&self) -> Joining {
        let Workload { sharding, reduce_dtype, micro_batches, .. } = *self.work;
        Joining::new(self.world.ranks, sharding, reduce_dtype, micro_batches)
    }

    fn forward_seconds(&self, stage: usize) -> f64 {
        self.cluster.forward_seconds(&self.work.stages[stage], self.work.kind) / self.workers
    }

    /// Seconds of the optimizer: gradient, parameter and AdamW's two moments are read, all but the
    /// gradient are written, and the copy in the compute kind is written if it differs; an average
    /// is read and written.
    fn optimizer_seconds(&self) -> f64 {
        let copy =
            if self.work.kind == Kind::Float { 0 } else { self.work.kind.elt_size_in_bytes() };
        let owned: u64 = self
            .work
            .stages
            .iter()
            .map(|stage| stage.trained.div_ceil(self.shards.ranks as u64))
            .sum();
        let gradient = self.joining().kept(self.work.kind).elt_size_in_bytes();
        (owned * (2 * 3 * 4 + (gradient + copy) as u64 + 2 * self.work.average_bytes)) as f64
            / self.cluster.constants.update
            / self.workers
    }

    fn compute(&mut self, seconds: f64) {
        self.compute_end += seconds;
    }

    /// Starts an operation; returns the time at which it ends.
    fn send(&mut self, operation: Operation, bytes: f64, group: Group) -> f64 {
        match self.cluster.constants.links {
            Links::Nccl { within, across } => {
                let seconds = self.cluster.nccl.seconds(operation, bytes, group, (within, across));
                self.spent.communication_seconds += seconds;
                self.links_end = self.links_end.max(self.compute_end) + seconds;
                self.links_end
            }
            // The order of the waits does not change the sum.
            Links::Memory { pass } => {
                self.block(
                    memory_seconds(
                        operation,
                        bytes,
                        group.ranks,
                        pass,
                        self.cluster.constants.message,
                    ) / self.sender,
                );
                self.compute_end
            }
        }
    }

    fn wait(&mut self, arrival: f64) {
        let stall = (arrival - self.compute_end).max(0.0);
        self.spent.exposed_seconds += stall;
        self.compute_end += stall;
    }

    /// Adds communication during which nothing computes.
    fn block(&mut self, seconds: f64) {
        self.spent =
            self.spent + Spent { communication_seconds: seconds, exposed_seconds: seconds };
        self.compute_end += seconds;
    }
}
