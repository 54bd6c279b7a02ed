//! `[parallel]`: a rank's device, the sharding, the recomputation of graphs, and the order of sums.

use std::fmt;
use std::str::FromStr;

use crate::parallel::Summation;
use crate::settings::{Limits, Misfit, Node, Value, choice, one_or_several, parsed, settings};

/// Handling of a stage's graph between forward and backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Keep it: fastest, but needs memory for every activation.
    #[default]
    Never,
    /// Drop it and run the stage's forward again before its backward: needs memory for boundaries
    /// only, and a third more compute.
    Always,
    /// Drop the graph of every n-th stage, starting with the first.
    Every(usize),
}

impl Recompute {
    /// True if the graph of this stage is dropped.
    pub fn drops(self, stage: usize) -> bool {
        match self {
            Recompute::Never => false,
            Recompute::Always => true,
            Recompute::Every(count) => stage.is_multiple_of(count),
        }
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Recompute::Never => write!(f, "never"),
            Recompute::Always => write!(f, "always"),
            Recompute::Every(count) => write!(f, "every_{count}"),
        }
    }
}

impl FromStr for Recompute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let every = || {
            text.strip_prefix("every_")?
                .parse()
                .ok()
                .filter(|count| *count > 1)
                .map(Recompute::Every)
        };
        match text {
            "never" => Ok(Recompute::Never),
            "always" => Ok(Recompute::Always),
            _ => every().ok_or_else(|| {
                format!("unknown value `{text}`; expected never, always, or every_2, every_3, …")
            }),
        }
    }
}

parsed!(Recompute);

choice! {
    /// Parts of the training state that ranks divide (ZeRO 0–3; never called "stage" here).
    pub enum Sharding {
        /// Every rank holds everything; gradients are all-reduced.
        "none" => None,
        /// Each rank holds its slice of the optimizer's state.
        "optimizer" => Optimizer,
        /// Also of the gradients.
        "gradients" => Gradients,
        /// Also of the parameters.
        "parameters" => Parameters,
    }
}

choice! {
    /// Ranks that hold one copy of the state together.
    pub enum ShardingGroup {
        /// All of them: the least memory.
        "world" => World,
        /// Those of one node; each node repeats it: what is gathered never leaves a node, gradients
        /// cross as shards.
        "node" => Node,
    }
}

choice! {
    /// The kind in which gradients travel between ranks.
    pub enum ReduceDtype {
        /// As they are computed and summed.
        "float32" => Float32,
        /// Gradients of parameters that compute in bfloat16; each sum is rounded.
        "bfloat16" => BFloat16,
    }
}

choice! {
    /// Tensors that can lie in host memory while the device does not need them.
    pub enum Offloaded {
        /// Nothing.
        "none" => None,
        /// Stage boundaries between forward and backward.
        "activations" => Activations,
        /// The optimizer's state, and master values where they are not what is computed with,
        /// between steps.
        "optimizer" => Optimizer,
        /// Parameters that are not trained: two stages' at a time are on the device.
        "frozen" => Frozen,
        /// All three.
        "all" => All,
    }
}

/// State that lies in host memory while the device does not need it. Written as a word or as a list
/// of words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    pub activations: bool,
    pub optimizer: bool,
    pub frozen: bool,
}

impl Offload {
    /// Everything stays on the device.
    pub const NONE: Offload = Offload { activations: false, optimizer: false, frozen: false };
    pub const ALL: Offload = Offload { activations: true, optimizer: true, frozen: true };

    /// The same and what the word says.
    pub fn with(self, word: Offloaded) -> Self {
        match word {
            Offloaded::None => self,
            Offloaded::Activations => Offload { activations: true, ..self },
            Offloaded::Optimizer => Offload { optimizer: true, ..self },
            Offloaded::Frozen => Offload { frozen: true, ..self },
            Offloaded::All => Offload::ALL,
        }
    }

    /// The words of its parts.
    pub fn words(self) -> Vec<Offloaded> {
        let parts = [Offloaded::Activations, Offloaded::Optimizer, Offloaded::Frozen];
        parts.into_iter().filter(|part| self.with(*part) == self).collect()
    }
}

impl FromIterator<Offloaded> for Offload {
    fn from_iter<W: IntoIterator<Item = Offloaded>>(words: W) -> Self {
        words.into_iter().fold(Offload::NONE, Offload::with)
    }
}

impl Value for Offload {
    type Limit = ();

    fn read(found: &Node, limits: &Limits<()>) -> Result<Self, Vec<Misfit>> {
        one_or_several::<Offloaded>(found, limits).map(|words| words.into_iter().collect())
    }

    fn shown(&self) -> Option<String> {
        Value::shown(&self.words())
    }

    fn words() -> Vec<&'static str> {
        <Offloaded as Value>::words()
    }
}

choice! {
    /// The device of a rank.
    pub enum DeviceChoice {
        /// The processor, with `num_threads` threads.
        "cpu" => Cpu,
        /// The GPU of the rank's number within its node.
        "cuda" => Cuda,
    }
}

choice! {
    /// The library that carries tensors between ranks.
    pub enum Backend {
        /// NCCL between GPUs, MPI between CPUs.
        "auto" => Auto,
        /// MPI; on CPUs only.
        "mpi" => Mpi,
        /// NCCL.
        "nccl" => Nccl,
    }
}

choice! {
    /// The stream of randomness that a sample's draws come from.
    pub enum SeedScope {
        /// Each rank its own stream, as the reference does it, hashed so that no two ranks or steps
        /// share one.
        "rank" => Rank,
        /// Each sample its own stream: 1 rank and N ranks see the same draws for the same global
        /// batch.
        "sample" => Sample,
    }
}

settings! {
    /// `[parallel]`: the work of each rank.
    pub struct ParallelSettings {
        /// Where each rank computes.
        pub device: DeviceChoice = DeviceChoice::Cpu;
        /// What carries tensors between ranks; `auto`: NCCL between GPUs, MPI between CPUs.
        pub backend: Backend = Backend::Auto;
        /// What the ranks divide among themselves instead of each holding all of it; each word
        /// includes those before it.
        pub sharding: Sharding = Sharding::None;
        /// Who divides: all ranks, or those of each node, the nodes repeating one another.
        pub sharding_group: ShardingGroup = ShardingGroup::World;
        /// Which stages' activations are computed again in the backward pass to save memory. One
        /// of: never, always, every_2, every_3, ….
        pub recompute: Recompute = Recompute::default();
        /// Tensors that wait in host memory while the GPU does not need them: a word or a list.
        pub offload: Offload = Offload::NONE;
        /// Kind in which gradients of bfloat16 parameters are summed over the ranks.
        pub reduce_dtype: ReduceDtype = ReduceDtype::Float32;
        /// Sum everything in one order whatever the number of ranks: weights are bit-equal at 1, 2,
        /// 4, … ranks for one global batch (CPU).
        pub deterministic: bool = false;
        /// Whose stream noise and timesteps come from; `sample` makes the draws independent of the
        /// number of ranks.
        pub seed_scope: SeedScope = SeedScope::Rank;
        /// Compute threads of each rank on the CPU; ranks times threads should not exceed the
        /// cores.
        pub num_threads: i32 = 1, in 1..=1024;
    }
}

impl ParallelSettings {
    /// The order in which a rank sums its micro-batches.
    pub fn summation(&self) -> Summation {
        if self.deterministic { Summation::Pairwise } else { Summation::Running }
    }

    /// Number of grains into which each rank divides its shard for gradient norms. With
    /// `deterministic` all ranks together have the same number for any number of ranks.
    pub fn grains(&self, micro_batches: usize) -> usize {
        if self.deterministic { micro_batches } else { 1 }
    }

    /// True if consecutive blocks of the global batch belong to one rank. Then the rank sums them
    /// before the sum over ranks, and the tree over blocks is the same for any number of ranks.
    pub fn neighbours_to_one_rank(&self) -> bool {
        self.deterministic && !self.sharding.scatters_each_micro_batch()
    }

    /// Returns the combinations of settings that no run can honour, as `(key, reason)`.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut refuse = |wrong: bool, key: &'static str, what: &str| {
            if wrong {
                problems.push((key, what.to_string()));
            }
        };
        let on_cpu = self.device == DeviceChoice::Cpu;
        let keeps_graphs = self.recompute != Recompute::Always;
        refuse(
            self.sharding == Sharding::Parameters && keeps_graphs,
            "parallel.recompute",
            "must be `always` with sharding = \"parameters\": a kept graph holds the parameters that the sharding lets go",
        );
        refuse(
            on_cpu && self.offload != Offload::NONE,
            "parallel.offload",
            "moves from a GPU to host memory; with device = \"cpu\" there is nothing to move",
        );
        refuse(
            self.offload.activations && self.recompute == Recompute::Never,
            "parallel.offload",
            "has no activations to move with recompute = \"never\": kept graphs hold them",
        );
        refuse(
            !on_cpu && self.backend == Backend::Mpi,
            "parallel.backend",
            "`mpi` carries no tensors of GPUs here; leave it at `auto`",
        );
        if self.deterministic {
            refuse(
                !on_cpu,
                "parallel.deterministic",
                "holds on a CPU only: NCCL sums in orders of its own",
            );
            refuse(
                self.seed_scope != SeedScope::Sample,
                "parallel.seed_scope",
                "must be `sample` with deterministic = true: a rank's stream depends on their number",
            );
            refuse(
                self.reduce_dtype != ReduceDtype::Float32,
                "parallel.reduce_dtype",
                "must be `float32` with deterministic = true: where a sum is rounded depends on the number of ranks",
            );
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings;

    fn refused(change: impl FnOnce(&mut ParallelSettings)) -> Vec<&'static str> {
        let mut settings = ParallelSettings::default();
        change(&mut settings);
        settings.problems().into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn what_would_not_do_what_it_says_is_refused() {
        assert!(refused(|_| ()).is_empty());
        assert_eq!(
            refused(|settings| settings.sharding = Sharding::Parameters),
            ["parallel.recompute"]
        );
        let optimizer = Offload { optimizer: true, ..Offload::NONE };
        assert_eq!(refused(|settings| settings.offload = optimizer), ["parallel.offload"]);
        let deterministic = |settings: &mut ParallelSettings| settings.deterministic = true;
        assert_eq!(refused(deterministic), ["parallel.seed_scope"]);
        let on_gpus = |settings: &mut ParallelSettings| {
            *settings = ParallelSettings {
                device: DeviceChoice::Cuda,
                backend: Backend::Mpi,
                offload: Offload::ALL,
                ..settings.clone()
            };
        };
        assert_eq!(refused(on_gpus), ["parallel.offload", "parallel.backend"]);
    }

    #[test]
    fn what_is_offloaded_reads_as_a_word_or_as_a_list() {
        let read = |text: &str| {
            let mut settings = ParallelSettings::default();
            let overrides = [format!("offload={text}")];
            settings::read(&mut settings, "test", "", &overrides).map(|()| settings.offload)
        };
        let frozen = Offload { frozen: true, ..Offload::NONE };
        for (text, expected) in [
            ("none", Offload::NONE),
            ("[]", Offload::NONE),
            ("all", Offload::ALL),
            ("frozen", frozen),
            ("['frozen']", frozen),
            ("['optimizer', 'frozen']", Offload { optimizer: true, ..frozen }),
            ("['frozen', 'activations', 'optimizer']", Offload::ALL),
        ] {
            let found = read(text).expect("sound words");
            assert_eq!(found, expected, "{text}");
            let shown = Value::shown(&found).expect("a list");
            assert_eq!(read(&shown).expect("as it is shown"), expected);
        }
        let told = |text| read(text).expect_err("an unknown word").to_string();
        assert!(told("frosen").contains("did you mean `frozen`?"), "{}", told("frosen"));
        let told = told("['frozen', 'optimiser']");
        assert!(told.contains("offload[1]") && told.contains("`optimizer`"), "{told}");
    }

    #[test]
    fn recomputation_reads_as_it_is_written() {
        for recompute in [Recompute::Never, Recompute::Always, Recompute::Every(3)] {
            assert_eq!(recompute.to_string().parse(), Ok(recompute));
        }
        assert!("every_1".parse::<Recompute>().is_err() && "every_k".parse::<Recompute>().is_err());
        assert_eq!(
            [0, 1, 2, 3].map(|stage| Recompute::Every(3).drops(stage)),
            [true, false, false, true]
        );
    }
}
