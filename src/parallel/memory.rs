//! What a rank holds between steps and sends in one, by sharding. Integers only.

use super::Sharding;

/// A model as memory sees it.
#[derive(Clone, Debug)]
pub struct StateLayout {
    /// Parameters of each stage.
    pub stages: Vec<u64>,
    /// Bytes of a parameter in the compute kind.
    pub compute_bytes: u64,
    /// f32 tensors of the optimizer for each parameter.
    pub optimizer_tensors: u64,
}

impl StateLayout {
    /// Bytes of weights, gradients and optimizer state that one of `world_size` ranks holds at the worst moment.
    pub fn bytes_per_rank(&self, sharding: Sharding, world_size: u64) -> u64 {
        let all: u64 = self.stages.iter().sum();
        let owned: u64 = self.stages.iter().map(|stage| stage.div_ceil(world_size)).sum();
        let largest = self.stages.iter().copied().max().unwrap_or(0);
        let (master, state) = if sharding == Sharding::None { (all, all) } else { (owned, owned) };
        // In f32 the compute copy is the master.
        let master_bytes = if self.compute_bytes == 4 { 0 } else { 4 * master };
        let compute = match sharding {
            // The stage at work and the next one, on its way.
            Sharding::Parameters => owned + 2 * largest,
            _ => all,
        };
        let gradients = match sharding {
            Sharding::None | Sharding::Optimizer => all,
            // The bucket that is being scattered.
            Sharding::Gradients | Sharding::Parameters => owned + largest,
        };
        self.compute_bytes * compute + master_bytes + 4 * gradients + 4 * self.optimizer_tensors * state
    }

    /// The collectives of a step of so many micro-batches.
    pub fn collectives(&self, sharding: Sharding, micro_batches: usize) -> String {
        let stages = self.stages.iter().filter(|&&parameters| parameters > 0).count();
        let each = stages * micro_batches;
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

    const SHARDINGS: [Sharding; 4] = [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];

    #[test]
    fn bfloat16_with_adamw_is_eighteen_bytes_a_parameter_unsharded() {
        let layout = StateLayout { stages: vec![100, 300], compute_bytes: 2, optimizer_tensors: 2 };
        assert_eq!(layout.bytes_per_rank(Sharding::None, 8), 400 * (2 + 4 + 4 + 8));
        // 13 + 38 owned of 8 ranks.
        assert_eq!(layout.bytes_per_rank(Sharding::Optimizer, 8), 400 * (2 + 4) + 51 * (4 + 8));
        assert_eq!(layout.bytes_per_rank(Sharding::Gradients, 8), 400 * 2 + (51 + 300) * 4 + 51 * (4 + 8));
        assert_eq!(layout.bytes_per_rank(Sharding::Parameters, 8), (51 + 600) * 2 + (51 + 300) * 4 + 51 * (4 + 8));
    }

    #[test]
    fn more_sharding_never_holds_more_on_many_ranks() {
        let layout = StateLayout { stages: vec![1000; 50], compute_bytes: 2, optimizer_tensors: 2 };
        let bytes = SHARDINGS.map(|sharding| layout.bytes_per_rank(sharding, 64));
        assert!(bytes.is_sorted_by(|a, b| a > b), "{bytes:?}");
    }
}
