//! The whole configuration: one field a room, and what only the whole can know.

mod habits;

use crate::adapter::AdapterChoice;
use crate::data::DataSettings;
use crate::error::{ConfigProblem, Error, Result};
use crate::fault::DebugSettings;
use crate::flow::{FlowMatchingSettings, SamplingSettings, SigmaWindow};
use crate::model::ModelSettings;
use crate::nn::ComputeSettings;
use crate::optim::OptimizerChoice;
use crate::optim::lr::LrScheduleChoice;
use crate::parallel::ParallelSettings;
use crate::settings::{self, Choice, Habit, Keys, Settings};
use crate::telemetry::LogSettings;
use crate::watchdog::WatchdogSettings;

/// The configuration that runs when none is named, embedded in the binary.
pub const DEFAULT: &str = include_str!("../configs/digits.toml");

/// Most samples of a step: beyond any batch, and few enough for products of it to fit 64 bits.
const MOST_SAMPLES: usize = 1 << 40;

/// Name of [`DEFAULT`] in messages.
pub const DEFAULT_NAME: &str = "configs/digits.toml (embedded)";

/// `[flow_matching]` with its adapter, which lives one room further up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FlowSettings {
    pub flow: FlowMatchingSettings,
    pub adapter: AdapterChoice,
}

impl Settings for FlowSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        self.flow.visit(keys);
        keys.named_family(
            "adapter_type",
            "adapter",
            &mut self.adapter,
            "Which model family's inputs are prepared.",
        );
    }
}

/// `[train]`.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainSettings {
    pub global_batch_size: Option<usize>,
    pub gradient_accumulation_steps: Option<usize>,
    pub max_grad_norm: f64,
    pub check_loss: bool,
    pub on_non_finite: OnNonFinite,
    pub on_loss_spike: OnLossSpike,
    pub loss_spike_height: f64,
    pub skip_budget: u64,
}

/// What becomes of a step that has a loss or gradient which is no finite number, or a loss above
/// the bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNonFinite {
    #[default]
    Stop,
    Skip,
}

impl Choice for OnNonFinite {
    const ALL: &'static [(&'static str, Self)] =
        &[("stop", OnNonFinite::Stop), ("skip", OnNonFinite::Skip)];
}

/// What becomes of a step whose loss stands out from those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLossSpike {
    Ignore,
    #[default]
    Warn,
    Skip,
    Stop,
}

impl Choice for OnLossSpike {
    const ALL: &'static [(&'static str, Self)] = &[
        ("ignore", OnLossSpike::Ignore),
        ("warn", OnLossSpike::Warn),
        ("skip", OnLossSpike::Skip),
        ("stop", OnLossSpike::Stop),
    ];
}

impl Default for TrainSettings {
    fn default() -> Self {
        TrainSettings {
            global_batch_size: None,
            gradient_accumulation_steps: None,
            max_grad_norm: 1.0,
            check_loss: true,
            on_non_finite: OnNonFinite::default(),
            on_loss_spike: OnLossSpike::default(),
            loss_spike_height: 10.0,
            skip_budget: 5,
        }
    }
}

impl Settings for TrainSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        let accumulation = "Micro-batches of each rank in a step; follows from global_batch_size where that is set, 1 otherwise.";
        keys.optional_integer(
            "global_batch_size",
            &mut self.global_batch_size,
            1..=MOST_SAMPLES as i64,
            "Samples of one optimizer step over all ranks; unset: micro-batch x ranks x accumulation.",
        );
        keys.optional_integer(
            "gradient_accumulation_steps",
            &mut self.gradient_accumulation_steps,
            1..,
            accumulation,
        );
        keys.number(
            "max_grad_norm",
            &mut self.max_grad_norm,
            0.0..,
            "Gradients are scaled down to this global norm; 0: never.",
        );
        keys.flag(
            "check_loss",
            &mut self.check_loss,
            "Refuse the update when any rank's loss is not a number or above 100.",
        );
        keys.choice(
            "on_non_finite",
            &mut self.on_non_finite,
            "When a loss is refused, or the gradient is not finite on all ranks.",
        );
        keys.choice(
            "on_loss_spike",
            &mut self.on_loss_spike,
            "When the loss stands out from those of the last 128 steps.",
        );
        let height = "Robust standard deviations (from median and median absolute deviation) above which a loss stands out.";
        keys.number("loss_spike_height", &mut self.loss_spike_height, 1.0.., height);
        keys.integer(
            "skip_budget",
            &mut self.skip_budget,
            0..,
            "Skipped steps among the last 100 that a run bears; one more stops it.",
        );
    }
}

/// What a save that fails does to the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    #[default]
    Stop,
    /// The run goes on with a warning, and the next save tries again. The last save of a run stops
    /// in any case.
    Continue,
}

impl Choice for OnFailure {
    const ALL: &'static [(&'static str, Self)] =
        &[("stop", OnFailure::Stop), ("continue", OnFailure::Continue)];
}

/// `[checkpoint]`.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointSettings {
    pub every_n_steps: u64,
    pub save_last: bool,
    pub asynchronous: bool,
    pub on_failure: OnFailure,
    pub keep_last: u64,
    pub keep_every: Option<u64>,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        CheckpointSettings {
            every_n_steps: 100,
            save_last: true,
            asynchronous: true,
            on_failure: OnFailure::Stop,
            keep_last: 2,
            keep_every: None,
        }
    }
}

impl Settings for CheckpointSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.integer(
            "every_n_steps",
            &mut self.every_n_steps,
            1..,
            "Steps between checkpoints; the last step has one, too.",
        );
        let save_last = "Save at the last step; false: only where every_n_steps says, and a resume does the steps behind it again.";
        keys.flag("save_last", &mut self.save_last, save_last);
        let asynchronous = "Write beside the steps, which stop for a copy in host memory only; false: wait for the disk at each save.";
        keys.flag("asynchronous", &mut self.asynchronous, asynchronous);
        keys.choice(
            "on_failure",
            &mut self.on_failure,
            "What a save that fails does to the run; the last save of a run always stops it.",
        );
        keys.integer(
            "keep_last",
            &mut self.keep_last,
            1..,
            "Newest checkpoints that are kept; older ones go after a newer one is safe.",
        );
        let keep_every = "Checkpoints whose step is a multiple of this are kept for ever.";
        keys.optional_integer("keep_every", &mut self.keep_every, 1.., keep_every);
    }
}

/// Everything a run is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    pub seed: u64,
    pub max_steps: u64,
    pub output_dir: String,
    pub model: ModelSettings,
    pub flow_matching: FlowSettings,
    pub data: DataSettings,
    pub train: TrainSettings,
    pub optimizer: OptimizerChoice,
    pub lr_scheduler: LrScheduleChoice,
    pub parallel: ParallelSettings,
    pub compute: ComputeSettings,
    pub checkpoint: CheckpointSettings,
    pub watchdog: WatchdogSettings,
    pub sampling: SamplingSettings,
    pub log: LogSettings,
    pub debug: DebugSettings,
}

impl Default for RunConfig {
    fn default() -> Self {
        RunConfig {
            seed: 42,
            max_steps: 1000,
            output_dir: "runs/fm-dist".into(),
            model: ModelSettings::default(),
            flow_matching: FlowSettings::default(),
            data: DataSettings::default(),
            train: TrainSettings::default(),
            optimizer: OptimizerChoice::default(),
            lr_scheduler: LrScheduleChoice::default(),
            parallel: ParallelSettings::default(),
            compute: ComputeSettings::default(),
            checkpoint: CheckpointSettings::default(),
            watchdog: WatchdogSettings::default(),
            sampling: SamplingSettings::default(),
            log: LogSettings::default(),
            debug: DebugSettings::default(),
        }
    }
}

impl Settings for RunConfig {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.integer("seed", &mut self.seed, 0.., "Everything random follows from this number.");
        keys.integer(
            "max_steps",
            &mut self.max_steps,
            1..,
            "Optimizer steps of the whole run, resumed or not.",
        );
        keys.text(
            "output_dir",
            &mut self.output_dir,
            "Run folder; where it holds a run already, a new one gets a number behind its name.",
        );
        keys.table("model", &mut self.model, "What is trained.");
        keys.table("flow_matching", &mut self.flow_matching, "Timesteps, noise and loss.");
        keys.table("data", &mut self.data, "What it is trained on.");
        keys.table("train", &mut self.train, "An optimizer step.");
        keys.family("optimizer", &mut self.optimizer, "The update rule.");
        keys.family(
            "lr_scheduler",
            &mut self.lr_scheduler,
            "Learning rate over the run, as a share of the optimizer's lr.",
        );
        keys.table("parallel", &mut self.parallel, "How ranks share the work.");
        keys.table("compute", &mut self.compute, "By which kernels.");
        keys.table("checkpoint", &mut self.checkpoint, "What survives a crash.");
        keys.table(
            "watchdog",
            &mut self.watchdog,
            "What is done about ranks that stand still, fall behind or drift apart.",
        );
        keys.table(
            "sampling",
            &mut self.sampling,
            "Generated samples: `fm-dist sample`, and the report at the end of a run.",
        );
        keys.table("log", &mut self.log, "What is said meanwhile.");
        keys.table("debug", &mut self.debug, "For those who test fm-dist itself.");
    }

    fn habits(&self) -> &'static [Habit] {
        habits::HABITS
    }
}

impl RunConfig {
    /// Reads TOML text with overrides on top of the defaults, and checks the whole.
    ///
    /// # Errors
    /// [`Error::Config`] with every problem.
    pub fn read(source_name: &str, text: &str, overrides: &[String]) -> Result<Self> {
        let mut config = RunConfig::default();
        settings::read(&mut config, source_name, text, overrides)?;
        config.model.resolve()?;
        let problems = config.problems();
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(Error::Config { source_name: source_name.into(), problems })
        }
    }

    /// The complete configuration as TOML with one comment line a key.
    pub fn to_toml(&self) -> String {
        settings::write(&mut self.clone())
    }

    /// Micro-batches of each rank in one step.
    ///
    /// # Errors
    /// [`Error::Config`] if the global batch cannot be divided, naming the nearest that can.
    pub fn micro_batches(&self, world_size: usize) -> Result<usize> {
        let micro_batches = self.divided(world_size)?;
        let blocks = world_size * micro_batches;
        if self.parallel.deterministic
            && !(blocks.is_power_of_two() && world_size.is_power_of_two())
        {
            let what = format!(
                "needs powers of two: found {world_size} ranks x {micro_batches} micro-batches = {blocks} blocks"
            );
            return Err(Error::config("parallel.deterministic", what));
        }
        Ok(micro_batches)
    }

    fn divided(&self, world_size: usize) -> Result<usize> {
        let told = self.train.gradient_accumulation_steps;
        let counted = |count: Option<usize>| count.filter(|count| *count <= MOST_SAMPLES);
        let per_round = counted(self.data.micro_batch_size_per_gpu.checked_mul(world_size));
        let step = per_round.and_then(|samples| counted(samples.checked_mul(told.unwrap_or(1))));
        let (Some(per_round), Some(_)) = (per_round, step) else {
            let (samples, micro_batches) = (self.data.micro_batch_size_per_gpu, told.unwrap_or(1));
            let what = format!(
                "{micro_batches} x {samples} samples x {world_size} ranks are more than {MOST_SAMPLES} samples in a step"
            );
            return Err(Error::config("train.gradient_accumulation_steps", what));
        };
        let Some(global) = self.train.global_batch_size else { return Ok(told.unwrap_or(1)) };
        let one_round =
            format!("{} x {world_size} ranks = {per_round}", self.data.micro_batch_size_per_gpu);
        if global % per_round != 0 {
            let below = global / per_round * per_round;
            let near = if below == 0 {
                format!("{per_round}")
            } else {
                format!("{below} or {}", below + per_round)
            };
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
        if self.output_dir.is_empty() {
            say("output_dir", "must name a folder".into());
        }
        let misfits = self.flow_matching.adapter.misfits(&self.model.family);
        misfits.into_iter().for_each(|(key, what)| say(&key, what));
        if let Err(Error::Config { problems: of_model, .. }) = self.model.family.checked_stages() {
            problems.extend(of_model);
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_more_samples_than_can_be_counted_is_refused() {
        let most = i64::MAX;
        let config = |text: &str| RunConfig::read("test", text, &[]).expect("in range");
        let text = config(&format!("[train]\ngradient_accumulation_steps = {most}"))
            .micro_batches(1)
            .expect_err("too many")
            .to_string();
        assert!(text.contains("train.gradient_accumulation_steps: 9223372036854775807 x 64 samples x 1 ranks are more than"), "{text}");
        for ranks in [1 << 60, usize::MAX] {
            assert_eq!(config("").micro_batches(ranks).expect_err("too many").exit_code(), 50);
        }
        assert!(
            RunConfig::read("test", &format!("[train]\nglobal_batch_size = {most}"), &[]).is_err()
        );
        assert_eq!(
            config("[train]\ngradient_accumulation_steps = 3").micro_batches(8).expect("sound"),
            3
        );
    }
}
