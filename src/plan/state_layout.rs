//! Weights, gradients and optimizer state of a rank, and the collectives of a step, by sharding.
//! Integers only.

use tch::Kind;

use crate::ops::Kernels;
use crate::parallel::{Joining, Offload, ReduceDtype, Sharding};
use crate::run::checkpoint::{copied_bytes, saved_bytes};

/// The numbers of a model that determine its memory.
#[derive(Clone, Debug)]
pub struct StateLayout {
    /// Number of trained parameters of each stage.
    pub stages: Vec<u64>,
    /// Bytes of the frozen parameters of each stage.
    pub frozen: Vec<u64>,
    /// Bytes of a parameter in the compute kind.
    pub compute_bytes: u64,
    /// Number of f32 optimizer tensors for each parameter.
    pub optimizer_tensors: u64,
    /// Bytes of a parameter's average; 0 without averages.
    pub average_bytes: u64,
    pub micro_batches: u64,
    pub reduce_dtype: ReduceDtype,
    pub kernels: Kernels,
}

impl StateLayout {
    /// Returns the bytes of weights, gradients and optimizer state that one of `world_size` ranks
    /// holds on its device at the peak of a step, without activations.
    pub fn bytes_per_rank(&self, sharding: Sharding, offload: Offload, world_size: u64) -> u64 {
        let joining = self.joining(sharding, world_size);
        let shares = self.shares(sharding, world_size);
        let Shares { sharding, all, owned, largest_owned, frozen, .. } = shares;
        let weights = if sharding == Sharding::Parameters { owned } else { all };
        let frozen = if offload.frozen { 0 } else { frozen };
        let kept = self.compute_bytes * weights + frozen;
        let backward =
            self.gathered_bytes(sharding, offload) + self.backward_bytes(joining, &shares);
        if !offload.optimizer {
            return kept + self.updated_bytes() * owned + backward;
        }
        // One stage's state at a time visits the device, while every gradient lies there.
        let gradients = bytes_of(joining.kept(self.kind())) * owned;
        let update = gradients + self.updated_bytes() * largest_owned;
        kept + backward.max(update)
    }

    /// Returns the bytes of weights and optimizer state that one of `world_size` ranks holds on its
    /// device between steps, and of the stages that a forward gathers.
    pub(super) fn resting_bytes(
        &self,
        sharding: Sharding,
        offload: Offload,
        world_size: u64,
    ) -> u64 {
        let Shares { sharding, all, owned, frozen, .. } = self.shares(sharding, world_size);
        let weights = if sharding == Sharding::Parameters { owned } else { all };
        let frozen = if offload.frozen { 0 } else { frozen };
        let state = if offload.optimizer { 0 } else { self.updated_bytes() * owned };
        self.compute_bytes * weights + frozen + state + self.gathered_bytes(sharding, offload)
    }

    /// Returns the bytes of weights and master values that one of `world_size` ranks holds.
    pub(super) fn values_per_rank(
        &self,
        sharding: Sharding,
        offload: Offload,
        world_size: u64,
    ) -> u64 {
        let Shares { sharding, all, owned, frozen, .. } = self.shares(sharding, world_size);
        let weights = if sharding == Sharding::Parameters { owned } else { all };
        let frozen = if offload.frozen { 0 } else { frozen };
        self.compute_bytes * weights + frozen + self.master_bytes() * owned
    }

    /// Returns the bytes of state that one of `world_size` ranks keeps in host memory.
    pub fn offloaded_bytes(&self, sharding: Sharding, offload: Offload, world_size: u64) -> u64 {
        let Shares { owned, frozen, .. } = self.shares(sharding, world_size);
        let updated = if offload.optimizer { self.updated_bytes() * owned } else { 0 };
        updated + if offload.frozen { frozen } else { 0 }
    }

    /// Bytes of a parameter's optimizer state, average and master value. In f32 the compute copy is
    /// the master copy.
    fn updated_bytes(&self) -> u64 {
        self.master_bytes() + 4 * self.optimizer_tensors + self.average_bytes
    }

    fn master_bytes(&self) -> u64 {
        if self.compute_bytes == 4 { 0 } else { 4 }
    }

    fn shares(&self, sharding: Sharding, world_size: u64) -> Shares {
        let shards = if sharding == Sharding::None { 1 } else { world_size };
        let largest = self.stages.iter().copied().max().unwrap_or(0);
        let frozen_shards = if sharding == Sharding::Parameters { shards } else { 1 };
        Shares {
            // A single rank shards nothing.
            sharding: if shards == 1 { Sharding::None } else { sharding },
            frozen: self.frozen.iter().map(|stage| stage.div_ceil(frozen_shards)).sum(),
            all: self.stages.iter().sum(),
            owned: self.stages.iter().map(|stage| stage.div_ceil(shards)).sum(),
            largest,
            largest_owned: largest.div_ceil(shards),
        }
    }

    /// Returns the bytes of parameters that are brought for their use: one stage is computing, and
    /// the next one's are on their way.
    fn gathered_bytes(&self, sharding: Sharding, offload: Offload) -> u64 {
        let whole = |(trained, frozen): (&u64, &u64)| match sharding {
            Sharding::Parameters => self.compute_bytes * trained + frozen,
            _ if offload.frozen => *frozen,
            _ => 0,
        };
        2 * self.stages.iter().zip(&self.frozen).map(whole).max().unwrap_or(0)
    }

    /// Returns the bytes of gradients at the moment when the last stages' buckets are complete.
    fn backward_bytes(&self, joining: Joining, shares: &Shares) -> u64 {
        let Shares { sharding, all, owned, largest, .. } = *shares;
        let [of_joined, of_sent, of_kept] = [Joining::joined, Joining::sent, Joining::kept]
            .map(|of| bytes_of(of(joining, self.kind())));
        // Each parameter's own gradient, before they are joined in a bucket. Our products compute
        // theirs there where both are of one kind.
        let is_in_place = of_joined == self.compute_bytes && self.kernels == Kernels::Fused;
        let fresh = if is_in_place { 0 } else { self.compute_bytes * largest };
        // The joined gradients, before they are added to the sums or cut into shards; with a single
        // micro-batch these are the sums.
        let is_sum = sharding == Sharding::None && self.micro_batches == 1;
        let joined = if is_sum { 0 } else { of_joined * largest };
        // The previous bucket, whose shards are in flight.
        let travelling = if sharding == Sharding::None { 0 } else { of_sent * largest };
        let sums = match sharding {
            Sharding::None => of_joined * all,
            Sharding::Optimizer if self.micro_batches > 1 => of_joined * all,
            _ => of_kept * owned,
        };
        fresh + joined + travelling + sums
    }

    /// The kinds of the gradients on each of `world_size` ranks.
    fn joining(&self, sharding: Sharding, world_size: u64) -> Joining {
        let micro_batches = self.micro_batches as usize;
        Joining::new(world_size as usize, sharding, self.reduce_dtype, micro_batches)
    }

    /// The compute kind.
    fn kind(&self) -> Kind {
        if self.compute_bytes == 4 { Kind::Float } else { Kind::BFloat16 }
    }

    /// Returns the host memory that a save takes on the rank that keeps most.
    pub fn copied_bytes(&self, world_size: usize) -> u64 {
        copied_bytes(&self.stages, self.optimizer_tensors, self.average_bytes > 0, world_size)
    }

    /// Returns the bytes of a checkpoint.
    pub fn saved_bytes(&self) -> u64 {
        saved_bytes(&self.stages, self.optimizer_tensors, self.average_bytes > 0)
    }

    /// Describes the collectives of a step.
    pub fn collectives(&self, sharding: Sharding) -> String {
        let is_filled = |stage: &usize| self.stages[*stage] + self.frozen[*stage] > 0;
        let is_trained = |stage: &usize| self.stages[*stage] > 0;
        let all = 0..self.stages.len();
        let stages = all.clone().filter(is_trained).count() as u64;
        let each = stages * self.micro_batches;
        // Once for the forward pass, and where a gradient comes, once for the backward pass.
        let reached = all.clone().find(is_trained).unwrap_or(all.end)..all.end;
        let gathers = all.filter(is_filled).count() + reached.filter(is_filled).count();
        let gathers = gathers as u64 * self.micro_batches;
        match sharding {
            Sharding::None => format!("{stages} all-reduces"),
            Sharding::Optimizer => format!("{stages} reduce-scatters, {stages} all-gathers"),
            Sharding::Gradients => format!("{each} reduce-scatters, {stages} all-gathers"),
            Sharding::Parameters => format!("{each} reduce-scatters, {gathers} all-gathers"),
        }
    }
}

/// Bytes of a number.
fn bytes_of(kind: Kind) -> u64 {
    kind.elt_size_in_bytes() as u64
}

/// Numbers of trained parameters under a sharding.
struct Shares {
    /// The sharding that takes effect.
    sharding: Sharding,
    all: u64,
    /// Those that one rank updates.
    owned: u64,
    /// Those of the largest stage.
    largest: u64,
    largest_owned: u64,
    /// Bytes of the frozen parameters that one rank holds.
    frozen: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::Offloaded;

    const SHARDINGS: [Sharding; 4] =
        [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];

    /// Two stages that are trained whole, with AdamW in bfloat16.
    fn two_stages() -> StateLayout {
        StateLayout {
            stages: vec![100, 300],
            frozen: vec![0; 2],
            compute_bytes: 2,
            optimizer_tensors: 2,
            average_bytes: 0,
            micro_batches: 1,
            reduce_dtype: ReduceDtype::Float32,
            kernels: Kernels::Fused,
        }
    }

    #[test]
    fn bfloat16_with_adamw_is_eighteen_bytes_a_parameter_and_a_stage_in_passing() {
        let layout = two_stages();
        assert_eq!(
            layout.bytes_per_rank(Sharding::None, Offload::NONE, 8),
            400 * (2 + 4 + 8 + 4) + 300 * 2
        );
        // 13 + 38 are owned by each of 8 ranks.
        assert_eq!(
            layout.bytes_per_rank(Sharding::Optimizer, Offload::NONE, 8),
            400 * 2 + 51 * (4 + 8 + 4) + 300 * (2 + 4 + 4)
        );
        assert_eq!(
            layout.bytes_per_rank(Sharding::Gradients, Offload::NONE, 8),
            400 * 2 + 51 * (4 + 8 + 4) + 300 * (2 + 4 + 4)
        );
        assert_eq!(
            layout.bytes_per_rank(Sharding::Parameters, Offload::NONE, 8),
            51 * (2 + 4 + 8 + 4) + 300 * (2 + 4 + 4 + 4)
        );
    }

    #[test]
    fn gradients_that_nobody_adds_to_are_as_narrow_as_parameters() {
        let layout = two_stages();
        let bytes = |layout: &StateLayout, ranks| {
            layout.bytes_per_rank(Sharding::None, Offload::NONE, ranks)
        };
        assert_eq!(bytes(&layout, 1), 400 * (2 + 4 + 8 + 2));
        let layout = StateLayout { reduce_dtype: ReduceDtype::BFloat16, ..layout };
        assert_eq!(bytes(&layout, 8), 400 * (2 + 4 + 8 + 2));
        let layout = StateLayout { micro_batches: 2, ..layout };
        assert_eq!([1, 8].map(|ranks| bytes(&layout, ranks)), [400 * 18 + 300 * (2 + 4); 2]);
    }

    #[test]
    fn one_rank_has_nobody_to_share_with() {
        let layout = StateLayout { compute_bytes: 4, micro_batches: 2, ..two_stages() };
        assert!(SHARDINGS.iter().all(|sharding| layout.bytes_per_rank(
            *sharding,
            Offload::NONE,
            1
        ) == layout.bytes_per_rank(
            Sharding::None,
            Offload::NONE,
            1
        )));
    }

    #[test]
    fn only_gradient_sharding_saves_the_sums_of_many_micro_batches() {
        let layout = StateLayout { compute_bytes: 4, micro_batches: 4, ..two_stages() };
        let bytes = |sharding| layout.bytes_per_rank(sharding, Offload::NONE, 8);
        assert_eq!(bytes(Sharding::Optimizer) - bytes(Sharding::Gradients), 4 * (400 - 51));
    }

    #[test]
    fn more_sharding_never_holds_more_on_many_ranks() {
        let layout = StateLayout {
            stages: vec![1000; 50],
            frozen: vec![0; 50],
            micro_batches: 2,
            ..two_stages()
        };
        let bytes = SHARDINGS.map(|sharding| layout.bytes_per_rank(sharding, Offload::NONE, 64));
        assert!(bytes.is_sorted_by(|a, b| a > b), "{bytes:?}");
    }

    #[test]
    fn a_frozen_parameter_is_what_is_computed_with_and_nothing_else() {
        let layout = StateLayout { stages: vec![0, 16], frozen: vec![200, 600], ..two_stages() };
        let bytes = |sharding| layout.bytes_per_rank(sharding, Offload::NONE, 4);
        assert_eq!(bytes(Sharding::None), 400 * 2 + 16 * (2 + 4 + 8 + 4) + 16 * 2);
        let sharded = 4 * (4 + 8 + 4) + 16 * (2 + 4 + 4);
        assert_eq!(bytes(Sharding::Gradients), 400 * 2 + 16 * 2 + sharded);
        assert_eq!(bytes(Sharding::Parameters), 100 * 2 + 4 * 2 + sharded + 2 * 2 * 316);
        let offload = Offload { frozen: true, ..Offload::NONE };
        let offloaded = |sharding| layout.bytes_per_rank(sharding, offload, 4);
        assert_eq!(offloaded(Sharding::None), bytes(Sharding::None) - 800 + 2 * 600);
        assert_eq!(offloaded(Sharding::Parameters), bytes(Sharding::Parameters) - 200);
        assert_eq!(layout.offloaded_bytes(Sharding::None, offload, 4), 800);
        assert_eq!(layout.offloaded_bytes(Sharding::Parameters, offload, 4), 200);
        assert_eq!(layout.collectives(Sharding::None), "1 all-reduces");
        assert_eq!(layout.collectives(Sharding::Parameters), "1 reduce-scatters, 3 all-gathers");
    }

    #[test]
    fn judging_takes_the_state_and_no_gradient() {
        let layout = two_stages();
        let bytes = |sharding, offload| layout.resting_bytes(sharding, offload, 8);
        let of_optimizer = Offload { optimizer: true, ..Offload::NONE };
        assert_eq!(bytes(Sharding::None, Offload::NONE), 400 * (2 + 4 + 8));
        assert_eq!(bytes(Sharding::None, of_optimizer), 400 * 2);
        assert_eq!(bytes(Sharding::Gradients, Offload::NONE), 400 * 2 + 51 * (4 + 8));
        assert_eq!(bytes(Sharding::Parameters, Offload::NONE), 51 * (2 + 4 + 8) + 2 * 300 * 2);
    }

    #[test]
    fn offloading_the_optimizer_leaves_weights_gradients_and_one_stages_state() {
        let layout = two_stages();
        let bytes = |offload| layout.bytes_per_rank(Sharding::None, offload, 1);
        let [activations, optimizer] =
            [Offloaded::Activations, Offloaded::Optimizer].map(|word| Offload::NONE.with(word));
        assert_eq!(bytes(activations), bytes(Offload::NONE));
        assert_eq!(bytes(optimizer), 400 * 2 + 400 * 2 + 300 * (4 + 8));
        assert_eq!(layout.offloaded_bytes(Sharding::None, Offload::ALL, 1), 400 * (4 + 8));
        assert_eq!(layout.offloaded_bytes(Sharding::Gradients, Offload::ALL, 8), 51 * (4 + 8));
    }
}
