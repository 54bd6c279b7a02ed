//! The whole configuration: one field a room, and what only the whole can know.

mod habits;
mod validation;

use crate::adapter::AdapterChoice;
use crate::data::{DataSettings, TextPadding};
use crate::error::{ConfigProblem, Error, Result};
use crate::fault::DebugSettings;
use crate::flow::{FlowMatchingSettings, Role, SamplingSettings, SigmaWindow};
use crate::model::ModelSettings;
use crate::nn::{ComputeSettings, Stage, Tokens};
use crate::optim::lr::LrScheduleChoice;
use crate::optim::{Decay, EmaSettings, OptimizerSettings};
use crate::parallel::{ParallelSettings, Recompute};
use crate::settings::{self, choice, settings};
use crate::telemetry::LogSettings;
use crate::tuning::{Factors, LoraSettings, Tuning};
use crate::watchdog::WatchdogSettings;
pub use validation::ValidationSettings;

/// The configuration that runs when none is named, embedded in the binary.
pub const DEFAULT: &str = include_str!("../configs/digits.toml");

/// Most samples of a step: beyond any batch, and few enough for products of it to fit 64 bits.
const MOST_SAMPLES: usize = 1 << 40;
/// Most steps of a run, and most epochs.
const MOST_STEPS: u64 = 1 << 40;

/// Reason to ask for `train.global_batch_size`.
const NEEDS_GLOBAL_BATCH: &str = "must be set beside data.micro_batch_tokens_per_gpu: micro-batches \
                                  of several sizes do not say how many samples a step has";

/// Name of [`DEFAULT`] in messages.
pub const DEFAULT_NAME: &str = "configs/digits.toml (embedded)";

settings! {
    /// `[flow_matching]` with its adapter, which lives one room further up.
    pub struct FlowSettings {
        /// The reference's parameters and fm-dist's own, in the same table.
        pub flow: FlowMatchingSettings, as flat;
        /// Which model family's inputs are prepared.
        pub adapter: AdapterChoice, as named_family;
    }
}

settings! {
    /// `[train]`: one optimizer step.
    pub struct TrainSettings {
        /// Samples of one optimizer step over all ranks; unset: micro-batch x ranks x accumulation.
        pub global_batch_size: Option<usize> = None, in 1..=MOST_SAMPLES as i64;
        /// Micro-batches of each rank in a step; follows from global_batch_size where that is set,
        /// 1 otherwise.
        pub gradient_accumulation_steps: Option<usize> = None, in 1..;
        /// Parameters that are trained, by patterns of their names or of modules'; all others are
        /// frozen. Empty: all are trained, or with `[lora]` none beside its own.
        pub trainable: Vec<String>;
        /// Gradients are scaled down to this global norm; 0: never.
        pub max_grad_norm: f64 = 1.0, in 0.0..;
        /// Refuse the update when any rank's loss is not a number or above 100.
        pub check_loss: bool = true;
        /// When a loss is refused, or the gradient is not finite on all ranks.
        pub on_non_finite: OnNonFinite = OnNonFinite::Stop;
        /// When the loss stands out from those of the last 128 steps.
        pub on_loss_spike: OnLossSpike = OnLossSpike::Warn;
        /// Robust standard deviations (from median and median absolute deviation) above which a
        /// loss stands out.
        pub loss_spike_height: f64 = 10.0, in 1.0..;
        /// Skipped steps among the last 100 that a run bears; one more stops it.
        pub skip_budget: u64 = 5, in 0..;
    }
}

choice! {
    /// Treatment of a step with a loss or gradient that is not finite, or a loss above the bound.
    pub enum OnNonFinite {
        /// The run ends.
        "stop" => Stop,
        /// The step changes no parameter, and the run goes on.
        "skip" => Skip,
    }
}

choice! {
    /// Treatment of a step whose loss stands out from those before it.
    pub enum OnLossSpike {
        /// Nothing is done.
        "ignore" => Ignore,
        /// The log has a warning.
        "warn" => Warn,
        /// The step changes no parameter, and the run goes on.
        "skip" => Skip,
        /// The run ends.
        "stop" => Stop,
    }
}

choice! {
    /// Effect of a save that fails on the run.
    pub enum OnFailure {
        /// The run ends.
        "stop" => Stop,
        /// The run goes on with a warning, and the next save tries again. The last save of a run
        /// stops it in any case.
        "continue" => Continue,
    }
}

settings! {
    /// `[checkpoint]`: checkpoints, how often and how many.
    pub struct CheckpointSettings {
        /// Steps between checkpoints; the last step has one, too.
        pub every_n_steps: u64 = 100, in 1..;
        /// Epochs between checkpoints at the end of an epoch, beside those of every_n_steps.
        pub every_n_epochs: Option<u64> = None, in 1..;
        /// Save at the last step; false: only where every_n_steps says, and a resume does the steps
        /// behind it again.
        pub save_last: bool = true;
        /// Write beside the steps, which stop for a copy in host memory only; false: wait for the
        /// disk at each save.
        pub asynchronous: bool = true;
        /// What a save that fails does to the run; the last save of a run always stops it.
        pub on_failure: OnFailure = OnFailure::Stop;
        /// Newest checkpoints that are kept; older ones go after a newer one is safe.
        ///
        /// Two, so that a run can go on where the newest one turns out to be damaged.
        pub keep_last: u64 = 2, in 1..;
        /// Checkpoints whose step is a multiple of this are kept for ever: a file `keep` in one
        /// keeps it, whatever a later start says.
        pub keep_every: Option<u64> = None, in 1..;
        /// If there is a validation, save where its loss is the lowest so far, and keep that
        /// checkpoint, to which the link `best` in the run folder leads.
        pub keep_best: bool = true;
    }
}

settings! {
    /// Everything a run is made of.
    pub struct RunConfig {
        /// Everything random follows from this number.
        pub seed: u64 = 42, in 0..;
        /// Optimizer steps of the whole run, resumed or not.
        pub max_steps: u64 = 1000, in 1..=MOST_STEPS as i64;
        /// Passes over the data that the whole run makes, instead of max_steps.
        pub max_epochs: Option<u64> = None, in 1..=MOST_STEPS as i64;
        /// Run folder; where it holds a run already, a new one gets a number behind its name.
        pub output_dir: String = "runs/fm-dist".into();
        /// What is trained.
        pub model: ModelSettings, as table;
        /// Timesteps, noise and loss.
        pub flow_matching: FlowSettings, as table;
        /// What it is trained on.
        pub data: DataSettings, as table;
        /// The samples that it is judged on.
        pub validation: ValidationSettings, as table;
        /// An optimizer step.
        pub train: TrainSettings, as table;
        /// Low-rank changes that are trained instead of the model.
        pub lora: LoraSettings, as table;
        /// The update rule, and the parameters that it treats otherwise.
        pub optimizer: OptimizerSettings, as table;
        /// Learning rate over the run, as a share of the optimizer's lr.
        pub lr_scheduler: LrScheduleChoice, as family;
        /// An average of the weights beside them.
        pub ema: EmaSettings, as table;
        /// How ranks share the work.
        pub parallel: ParallelSettings, as table;
        /// By which kernels.
        pub compute: ComputeSettings, as table;
        /// What survives a crash.
        pub checkpoint: CheckpointSettings, as table;
        /// What is done about ranks that stand still, fall behind or drift apart.
        pub watchdog: WatchdogSettings, as table;
        /// Generated samples: `fm-dist sample`, those of prompts while a run trains, and the report
        /// at its end.
        pub sampling: SamplingSettings, as table;
        /// What is said meanwhile.
        pub log: LogSettings, as table;
        /// For those who test fm-dist itself.
        pub debug: DebugSettings, as table;
    }
}

/// The micro-batches of one rank in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroBatches {
    pub count: usize,
    /// Samples of each.
    pub samples: usize,
}

/// Returns the largest divisor of a number that is at most `most`, which is at least 1.
fn largest_divisor(number: usize, most: usize) -> usize {
    let small = (1..=number.isqrt()).filter(|divisor| number.is_multiple_of(*divisor));
    let both = small.flat_map(|divisor| [divisor, number / divisor]);
    both.filter(|divisor| *divisor <= most).max().unwrap_or(1)
}

/// Returns the multiples of `unit` around a number that is none: `24 or 48`.
fn nearest(number: usize, unit: usize) -> String {
    match number / unit * unit {
        0 => unit.to_string(),
        below => format!("{below} or {}", below + unit),
    }
}

impl RunConfig {
    /// Reads TOML text with overrides on top of the defaults, and checks the whole.
    ///
    /// # Errors
    /// [`Error::Config`] with every problem.
    pub fn read(source_name: &str, text: &str, overrides: &[String]) -> Result<Self> {
        let mut config = RunConfig::default();
        settings::read_with_habits(&mut config, habits::HABITS, source_name, text, overrides)?;
        config.checked(source_name)
    }

    /// Reads what [`to_toml`](Self::to_toml) wrote, of any length.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_listing(source_name: &str, text: &str) -> Result<Self> {
        let mut config = RunConfig::default();
        settings::read_listing(&mut config, source_name, text)?;
        config.checked(source_name)
    }

    fn checked(mut self, source_name: &str) -> Result<Self> {
        self.model.resolve()?;
        let problems = self.problems();
        if problems.is_empty() {
            Ok(self)
        } else {
            Err(Error::Config { source_name: source_name.into(), problems })
        }
    }

    /// The complete configuration as TOML with one comment line a key.
    pub fn to_toml(&self) -> String {
        settings::write(&mut self.clone())
    }

    /// Samples of a step over all ranks.
    ///
    /// # Errors
    /// [`Error::Config`] if they cannot be divided among the ranks, naming the nearest number that
    /// can.
    pub fn global_batch(&self, world_size: usize) -> Result<usize> {
        if !self.data.counts_tokens() {
            let MicroBatches { count, samples } = self.equal_micro_batches(world_size)?;
            return Ok(count * samples * world_size);
        }
        let key = "train.global_batch_size";
        let Some(global) = self.train.global_batch_size else {
            return Err(Error::config(key, NEEDS_GLOBAL_BATCH));
        };
        if global % world_size != 0 {
            let near = nearest(global, world_size);
            let what = format!("{global} is no multiple of {world_size} ranks; nearest: {near}");
            return Err(Error::config(key, what));
        }
        Ok(global)
    }

    /// Micro-batches of each rank in a step whose samples have these tokens.
    ///
    /// # Errors
    /// [`Error::Config`] if the global batch cannot be divided, naming the nearest that can.
    pub fn micro_batches(&self, tokens: Tokens, world_size: usize) -> Result<MicroBatches> {
        if !self.data.counts_tokens() {
            return self.equal_micro_batches(world_size);
        }
        let of_rank = self.global_batch(world_size)? / world_size;
        let fitting = self.data.micro_batch_tokens_per_gpu / (tokens.image + tokens.text).max(1);
        let samples = largest_divisor(of_rank, fitting.max(1) as usize);
        Ok(MicroBatches { count: of_rank / samples, samples })
    }

    fn equal_micro_batches(&self, world_size: usize) -> Result<MicroBatches> {
        let count = self.divided(world_size)?;
        let blocks = world_size * count;
        if self.parallel.deterministic
            && !(blocks.is_power_of_two() && world_size.is_power_of_two())
        {
            let what = format!(
                "needs powers of two: found {world_size} ranks x {count} micro-batches = {blocks} blocks"
            );
            return Err(Error::config("parallel.deterministic", what));
        }
        Ok(MicroBatches { count, samples: self.data.micro_batch_size() })
    }

    /// The number of steps of a run whose epochs have so many.
    pub fn num_steps(&self, steps_per_epoch: u64) -> u64 {
        let of_epochs = |epochs: u64| epochs.saturating_mul(steps_per_epoch).min(MOST_STEPS);
        self.max_epochs.map_or(self.max_steps, of_epochs)
    }

    /// The model as stages, with the frozen parameters and the changes of what is trained.
    ///
    /// # Errors
    /// [`Error::Config`] if the model's settings contradict each other, or a pattern of parameters
    /// matches nothing.
    pub fn stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        self.factors().applied_to(self.tuning().of(&**self.model.family)?)
    }

    /// The factors with which parameters are updated.
    fn factors(&self) -> Factors<'_> {
        let OptimizerSettings { decay, lr_factors, decay_factors, .. } = &self.optimizer;
        Factors { decays_all: *decay == Decay::All, lr: lr_factors, decay: decay_factors }
    }

    /// The part of the model that is trained.
    pub fn tuning(&self) -> Tuning<'_> {
        Tuning {
            trainable: &self.train.trainable,
            lora: &self.lora,
            frozen_form: self.model.frozen_form(),
        }
    }

    /// True if the adapter reads which tokens of `text_embeddings` are valid.
    pub fn reads_text_mask(&self) -> bool {
        let keys = self.flow_matching.adapter.build().keys();
        keys.iter().any(|key| key.role == Role::TokenMask)
    }

    /// The length to which texts are padded.
    pub fn text_padding(&self) -> TextPadding {
        let family = &self.model.family;
        match self.data.text_tokens {
            0 if self.reads_text_mask() => TextPadding::Longest,
            0 => match (family.required_text_tokens(), family.text_tokens()) {
                (Some(required), _) => TextPadding::All(required),
                (None, Some(usual)) => TextPadding::Tokens(usual),
                (None, None) => TextPadding::Longest,
            },
            tokens => TextPadding::All(tokens),
        }
    }

    fn divided(&self, world_size: usize) -> Result<usize> {
        let told = self.train.gradient_accumulation_steps;
        let counted = |count: Option<usize>| count.filter(|count| *count <= MOST_SAMPLES);
        let samples = self.data.micro_batch_size();
        let per_round = counted(samples.checked_mul(world_size));
        let step = per_round.and_then(|samples| counted(samples.checked_mul(told.unwrap_or(1))));
        let (Some(per_round), Some(_)) = (per_round, step) else {
            let micro_batches = told.unwrap_or(1);
            let what = format!(
                "{micro_batches} x {samples} samples x {world_size} ranks are more than {MOST_SAMPLES} samples in a step"
            );
            return Err(Error::config("train.gradient_accumulation_steps", what));
        };
        let Some(global) = self.train.global_batch_size else { return Ok(told.unwrap_or(1)) };
        let one_round = format!("{samples} x {world_size} ranks = {per_round}");
        if global % per_round != 0 {
            let near = nearest(global, per_round);
            let what = format!(
                "{global} is no multiple of micro_batch_size_per_gpu {one_round}; nearest: {near}"
            );
            return Err(Error::config("train.global_batch_size", what));
        }
        let follows = global / per_round;
        match told {
            Some(told) if told != follows => {
                let what = format!(
                    "{told} contradicts global_batch_size {global}: with {one_round} it must be {follows}; leave it out"
                );
                Err(Error::config("train.gradient_accumulation_steps", what))
            }
            _ => Ok(follows),
        }
    }

    fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let mut say = |key: &str, what: String| {
            problems.push(ConfigProblem { key: key.into(), place: String::new(), what })
        };
        let flow = &self.flow_matching.flow;
        if flow.sigma_min > flow.sigma_max {
            say(
                "flow_matching.sigma_min",
                format!("{} must not be above sigma_max = {}", flow.sigma_min, flow.sigma_max),
            );
        }
        if flow.sigma_min == flow.sigma_max && flow.sigma_window == SigmaWindow::Truncate {
            let what = format!(
                "\"truncate\" leaves nothing to draw from between sigma_min and sigma_max = {}; \"clamp\" does",
                flow.sigma_max
            );
            say("flow_matching.sigma_window", what);
        }
        self.parallel.problems().into_iter().for_each(|(key, what)| say(key, what));
        let of_lora = self.lora.problems(self.model.dtype);
        of_lora.into_iter().for_each(|(key, what)| say(key, what));
        self.ema.problems().into_iter().for_each(|(key, what)| say(key, what));
        let keeps_graphs = self.parallel.recompute != Recompute::Always;
        if self.parallel.offload.frozen && keeps_graphs && !self.tuning().is_whole() {
            let what =
                "must be `always` with offload of frozen parameters: a kept graph holds them";
            say("parallel.recompute", what.into());
        }
        if self.model.frozen_dtype.is_some() && self.tuning().is_whole() {
            let what = "is set, and nothing is frozen; set lora.rank or train.trainable";
            say("model.frozen_dtype", what.into());
        }
        self.data.problems().into_iter().for_each(|(key, what)| say(&key, what));
        self.sampling.problems().into_iter().for_each(|(key, what)| say(key, what));
        self.validation.problems(&self.data).into_iter().for_each(|(key, what)| say(key, what));
        if self.data.counts_tokens() {
            if self.train.global_batch_size.is_none() {
                say("train.global_batch_size", NEEDS_GLOBAL_BATCH.into());
            }
            if let Some(count) = self.train.gradient_accumulation_steps {
                let what = format!(
                    "{count} stands beside data.micro_batch_tokens_per_gpu, from which the micro-batches \
                     of each resolution group follow; leave it out"
                );
                say("train.gradient_accumulation_steps", what);
            }
            if self.parallel.deterministic {
                let what = "needs micro-batches of one size at every number of ranks; \
                            data.micro_batch_tokens_per_gpu makes them larger where there are fewer ranks: \
                            set data.micro_batch_size_per_gpu in its place";
                say("parallel.deterministic", what.into());
            }
        }
        if self.output_dir.is_empty() {
            say("output_dir", "must name a folder".into());
        }
        let misfits = self.flow_matching.adapter.misfits(&self.model.family);
        misfits.into_iter().for_each(|(key, what)| say(&key, what));
        let stages = self.model.family.checked_stages().and_then(|_| self.stages());
        if let Err(Error::Config { problems: of_model, .. }) = stages {
            problems.extend(of_model);
        }
        problems
    }
}

#[cfg(test)]
mod tests;
