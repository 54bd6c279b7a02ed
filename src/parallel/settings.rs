//! `[parallel]`: where a rank computes, what it shares, what it computes twice.

use crate::settings::{Choice, Keys, Settings};

/// What happens to a stage's graph between forward and backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Keep it: fastest, and memory for every activation.
    #[default]
    Never,
    /// Drop it and run the stage's forward again before its backward: memory for boundaries only, a third more compute.
    Always,
}

impl Choice for Recompute {
    const ALL: &'static [(&'static str, Self)] = &[("never", Recompute::Never), ("always", Recompute::Always)];
}

/// Who holds what of the training state (ZeRO 0–3; never called "stage" here).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharding {
    /// Every rank holds everything; gradients are all-reduced.
    #[default]
    None,
    /// Each rank holds its slice of the optimizer's state.
    Optimizer,
    /// And of the gradients.
    Gradients,
    /// And of the parameters.
    Parameters,
}

impl Choice for Sharding {
    const ALL: &'static [(&'static str, Self)] = &[
        ("none", Sharding::None),
        ("optimizer", Sharding::Optimizer),
        ("gradients", Sharding::Gradients),
        ("parameters", Sharding::Parameters),
    ];
}

/// The kind in which gradients travel between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReduceDtype {
    #[default]
    Float32,
}

impl Choice for ReduceDtype {
    const ALL: &'static [(&'static str, Self)] = &[("float32", ReduceDtype::Float32)];
}

/// Where a rank computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    #[default]
    Cpu,
}

impl Choice for DeviceChoice {
    const ALL: &'static [(&'static str, Self)] = &[("cpu", DeviceChoice::Cpu)];
}

/// Whose stream of randomness a sample's draws come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeedScope {
    /// Each rank its own stream, as the reference does it, hashed so that no two ranks or steps share one.
    #[default]
    Rank,
    /// Each sample its own stream: 1 rank and N ranks see the same draws for the same global batch.
    Sample,
}

impl Choice for SeedScope {
    const ALL: &'static [(&'static str, Self)] = &[("rank", SeedScope::Rank), ("sample", SeedScope::Sample)];
}

/// `[parallel]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ParallelSettings {
    pub device: DeviceChoice,
    pub sharding: Sharding,
    pub recompute: Recompute,
    pub reduce_dtype: ReduceDtype,
    pub seed_scope: SeedScope,
    pub num_threads: i32,
}

impl Default for ParallelSettings {
    fn default() -> Self {
        ParallelSettings {
            device: DeviceChoice::default(),
            sharding: Sharding::default(),
            recompute: Recompute::default(),
            reduce_dtype: ReduceDtype::default(),
            seed_scope: SeedScope::default(),
            num_threads: 1,
        }
    }
}

impl Settings for ParallelSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.choice("device", &mut self.device, "Where each rank computes.");
        keys.choice(
            "sharding",
            &mut self.sharding,
            "What the ranks divide among themselves instead of each holding all of it; this version trains with `none`.",
        );
        keys.choice(
            "recompute",
            &mut self.recompute,
            "Whether a stage's activations are computed again in the backward pass to save memory.",
        );
        keys.choice("reduce_dtype", &mut self.reduce_dtype, "Kind in which gradients are summed over the ranks.");
        keys.choice(
            "seed_scope",
            &mut self.seed_scope,
            "Whose stream noise and timesteps come from; `sample` makes the draws independent of the number of ranks.",
        );
        keys.integer(
            "num_threads",
            &mut self.num_threads,
            1..=1024,
            "Compute threads of each rank on the CPU; ranks times threads should not exceed the cores.",
        );
    }
}
