//! Memory of a rank at the peak of a step, and the bytes that it sends in a step, by sharding.
//! Integers only.

use crate::parallel::Sharding;

/// The numbers of a model that determine its memory.
#[derive(Clone, Debug)]
pub struct StateLayout {
    /// Number of parameters of each stage.
    pub stages: Vec<u64>,
    /// Bytes of a parameter in the compute kind.
    pub compute_bytes: u64,
    /// Number of f32 optimizer tensors for each parameter.
    pub optimizer_tensors: u64,
    pub micro_batches: u64,
}

impl StateLayout {
    /// Returns the bytes of weights, gradients and optimizer state that one of `world_size` ranks
    /// holds at the peak of a step, without activations.
    pub fn bytes_per_rank(&self, sharding: Sharding, world_size: u64) -> u64 {
        let shards = if sharding == Sharding::None { 1 } else { world_size };
        // A single rank shards nothing.
        let sharding = if shards == 1 { Sharding::None } else { sharding };
        let all: u64 = self.stages.iter().sum();
        let owned: u64 = self.stages.iter().map(|stage| stage.div_ceil(shards)).sum();
        let largest = self.stages.iter().copied().max().unwrap_or(0);
        let weights = if sharding == Sharding::Parameters { owned } else { all };
        // In f32 the compute copy is the master copy.
        let masters = if self.compute_bytes == 4 { 0 } else { 4 * owned };
        let between_steps =
            self.compute_bytes * weights + masters + 4 * self.optimizer_tensors * owned;
        between_steps + self.backward_bytes(sharding, all, owned, largest)
    }

    /// Returns the bytes of gradients and gathered parameters at the moment when the last stages'
    /// buckets are complete.
    fn backward_bytes(&self, sharding: Sharding, all: u64, owned: u64, largest: u64) -> u64 {
        // Each parameter's own gradient, before they are joined in a bucket.
        let fresh = self.compute_bytes * largest;
        // One stage is computing, and the next one is being gathered.
        let gathered =
            if sharding == Sharding::Parameters { 2 * self.compute_bytes * largest } else { 0 };
        // The joined gradients, before they are added to the sums or cut into shards; with a single
        // micro-batch these are the sums.
        let joined =
            if sharding == Sharding::None && self.micro_batches == 1 { 0 } else { 4 * largest };
        // The previous bucket, whose shards are in flight.
        let travelling = if sharding == Sharding::None { 0 } else { 4 * largest };
        let sums = match sharding {
            Sharding::None => all,
            Sharding::Optimizer if self.micro_batches > 1 => all,
            _ => owned,
        };
        fresh + gathered + joined + travelling + 4 * sums
    }

    /// Describes the collectives of a step.
    pub fn collectives(&self, sharding: Sharding) -> String {
        let stages = self.stages.iter().filter(|&&parameters| parameters > 0).count() as u64;
        let each = stages * self.micro_batches;
        match sharding {
            Sharding::None => format!("{stages} all-reduces"),
            Sharding::Optimizer => format!("{stages} reduce-scatters, {stages} all-gathers"),
            Sharding::Gradients => format!("{each} reduce-scatters, {stages} all-gathers"),
            Sharding::Parameters => format!("{each} reduce-scatters, {} all-gathers", 2 * each),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARDINGS: [Sharding; 4] =
        [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];

    #[test]
    fn bfloat16_with_adamw_is_eighteen_bytes_a_parameter_and_a_stage_in_passing() {
        let layout = StateLayout {
            stages: vec![100, 300],
            compute_bytes: 2,
            optimizer_tensors: 2,
            micro_batches: 1,
        };
        assert_eq!(layout.bytes_per_rank(Sharding::None, 8), 400 * (2 + 4 + 8 + 4) + 300 * 2);
        // 13 + 38 are owned by each of 8 ranks.
        assert_eq!(
            layout.bytes_per_rank(Sharding::Optimizer, 8),
            400 * 2 + 51 * (4 + 8 + 4) + 300 * (2 + 4 + 4)
        );
        assert_eq!(
            layout.bytes_per_rank(Sharding::Gradients, 8),
            400 * 2 + 51 * (4 + 8 + 4) + 300 * (2 + 4 + 4)
        );
        assert_eq!(
            layout.bytes_per_rank(Sharding::Parameters, 8),
            51 * (2 + 4 + 8 + 4) + 300 * (2 + 4 + 4 + 4)
        );
    }

    #[test]
    fn one_rank_has_nobody_to_share_with() {
        let layout = StateLayout {
            stages: vec![100, 300],
            compute_bytes: 4,
            optimizer_tensors: 2,
            micro_batches: 2,
        };
        assert!(SHARDINGS.iter().all(|sharding| layout.bytes_per_rank(*sharding, 1)
            == layout.bytes_per_rank(Sharding::None, 1)));
    }

    #[test]
    fn only_gradient_sharding_saves_the_sums_of_many_micro_batches() {
        let layout = StateLayout {
            stages: vec![100, 300],
            compute_bytes: 4,
            optimizer_tensors: 2,
            micro_batches: 4,
        };
        let bytes = |sharding| layout.bytes_per_rank(sharding, 8);
        assert_eq!(bytes(Sharding::Optimizer) - bytes(Sharding::Gradients), 4 * (400 - 51));
    }

    #[test]
    fn more_sharding_never_holds_more_on_many_ranks() {
        let layout = StateLayout {
            stages: vec![1000; 50],
            compute_bytes: 2,
            optimizer_tensors: 2,
            micro_batches: 2,
        };
        let bytes = SHARDINGS.map(|sharding| layout.bytes_per_rank(sharding, 64));
        assert!(bytes.is_sorted_by(|a, b| a > b), "{bytes:?}");
    }
}
