//! What a rank holds at the worst moment of a step and sends in all of it, by sharding. Integers
//! only.

use crate::parallel::Sharding;

/// A model as memory sees it.
#[derive(Clone, Debug)]
pub struct StateLayout {
    /// Parameters of each stage.
    pub stages: Vec<u64>,
    /// Bytes of a parameter in the compute kind.
    pub compute_bytes: u64,
    /// f32 tensors of the optimizer for each parameter.
    pub optimizer_tensors: u64,
    pub micro_batches: u64,
}

impl StateLayout {
    /// Bytes of weights, gradients and optimizer state that one of `world_size` ranks holds at the
    /// worst moment of a step, activations apart.
    pub fn bytes_per_rank(&self, sharding: Sharding, world_size: u64) -> u64 {
        let shards = if sharding == Sharding::None { 1 } else { world_size };
        // Without another rank to share with, every sharding is none.
        let sharding = if shards == 1 { Sharding::None } else { sharding };
        let all: u64 = self.stages.iter().sum();
        let owned: u64 = self.stages.iter().map(|stage| stage.div_ceil(shards)).sum();
        let largest = self.stages.iter().copied().max().unwrap_or(0);
        let weights = if sharding == Sharding::Parameters { owned } else { all };
        // In f32 the compute copy is the master.
        let masters = if self.compute_bytes == 4 { 0 } else { 4 * owned };
        let between_steps =
            self.compute_bytes * weights + masters + 4 * self.optimizer_tensors * owned;
        between_steps + self.backward_bytes(sharding, all, owned, largest)
    }

    /// Gradients, and what is gathered, when the last stages' buckets are complete.
    fn backward_bytes(&self, sharding: Sharding, all: u64, owned: u64, largest: u64) -> u64 {
        // Of each parameter, before they come together.
        let fresh = self.compute_bytes * largest;
        // One stage at work, and the next one on its way.
        let gathered =
            if sharding == Sharding::Parameters { 2 * self.compute_bytes * largest } else { 0 };
        // Where they come together, to be added to the sums or cut into shards; a single
        // micro-batch's are the sums.
        let joined =
            if sharding == Sharding::None && self.micro_batches == 1 { 0 } else { 4 * largest };
        // The bucket before, whose shards are on their way.
        let travelling = if sharding == Sharding::None { 0 } else { 4 * largest };
        let sums = match sharding {
            Sharding::None => all,
            Sharding::Optimizer if self.micro_batches > 1 => all,
            _ => owned,
        };
        fresh + gathered + joined + travelling + 4 * sums
    }

    /// The collectives of a step.
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
        // 13 + 38 owned of 8 ranks.
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
