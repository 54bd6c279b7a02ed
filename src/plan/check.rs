//! `fm-dist check`: reports what a configuration would do, without running it.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::Arc;

use bytesize::ByteSize;

use crate::assembly::attention::{tokens_of_group, tokens_of_sample};
use crate::assembly::validation::ValidationSet;
use crate::assembly::{dataset, order};
use crate::config::{MicroBatches, RunConfig};
use crate::data::{Dataset, Group};
use crate::error::{Error, Result};
use crate::model::SampleShapes;
use crate::nn::{Stage, Tokens};
use crate::optim::lr;
use crate::parallel::{DeviceChoice, Offload, ParallelSettings, Recompute, Sharding};
use crate::plan::RankMemory;
use crate::plan::attention::attention;
use crate::plan::data::{check_data, rehearse_data, shares, trained_groups};
use crate::plan::sampling::plan_sampling;
use crate::plan::scaling::{ScalingRequest, scaling};
use crate::plan::validation::{check_validation, plan_validation};
use crate::run::runs::OutputDir;
use crate::sample::generate::check_conditions;
use crate::settings::{Choice, Family};

/// Options of a plan.
#[derive(Clone, Debug)]
pub struct CheckRequest {
    pub world_size: usize,
    /// `[C, (F,) H, W]` to plan for without data; if unset, the resolution group of the data that
    /// takes most memory.
    pub latents: Option<Vec<i64>>,
    /// Number of prompt tokens to assume without data.
    pub text_tokens: i64,
    pub scaling: Option<ScalingRequest>,
}

/// Most resolution groups whose micro-batches are listed.
const MOST_GROUPS: usize = 12;

/// World sizes whose memory is listed besides the planned one.
const WORLD_SIZES: [u64; 3] = [1, 8, 64];

/// Returns the plan of a run as text. Opens the data's headers, reads one sample of each resolution
/// group and the masks of some; needs no weights, no device and little memory.
///
/// # Errors
/// Errors that would stop the run at its start: [`Error::Config`](crate::error::Error::Config),
/// [`Error::Data`](crate::error::Error::Data).
pub fn check(config: &RunConfig, request: &CheckRequest) -> Result<String> {
    OutputDir::new(&config.output_dir)?;
    let stages = config.stages()?;
    let mut plan = Plan(String::new());
    plan.add_model(config, &stages);
    let (memory, tokens) = match &request.latents {
        Some(latents) => {
            let tokens = tokens_of_sample(config, latents, Some(request.text_tokens));
            let shape = StepShape { latents: latents.clone(), tokens };
            (plan.add_shape(config, &stages, request.world_size, &shape, None)?, shape.tokens)
        }
        None => plan.add_data(config, &stages, request.world_size)?,
    };
    plan.add_ranks(config, request.world_size, &memory);
    if let Some(request) = &request.scaling {
        scaling(config, tokens, request)?.iter().for_each(|(name, value)| plan.line(name, value));
    }
    Ok(plan.0)
}

/// The latents of one sample, and the tokens that they and a prompt become.
struct StepShape {
    /// `[C, (F,) H, W]`.
    latents: Vec<i64>,
    tokens: Tokens,
}

struct Plan(String);

impl Plan {
    fn line(&mut self, name: &str, value: &str) {
        writeln!(self.0, "{name:<22} {value}").expect("writing to a String");
    }

    fn add_model(&mut self, config: &RunConfig, stages: &[Box<dyn Stage>]) {
        let sizes = || stages.iter().map(|stage| stage.params().numel());
        let (parameters, largest) = (sizes().sum::<i64>(), sizes().max().unwrap_or(0));
        let (name, count) = (config.model.family.name(), stages.len());
        self.line(
            "model",
            &format!("{name}: {parameters} parameters in {count} stages, the largest {largest}"),
        );
        let trained = stages.iter().map(|stage| stage.params().num_trained()).sum::<i64>();
        if trained < parameters {
            let changes = stages.iter().map(|stage| stage.params().low_ranks().len()).sum();
            let what = match changes {
                0usize => String::new(),
                _ => format!(", those of {changes} low-rank changes"),
            };
            let form = config.model.frozen_dtype.map(Choice::word);
            let held = form.map(|form| format!(", in {form} where they are blocks' linear maps"));
            let held = held.unwrap_or_default();
            self.line(
                "trained",
                &format!("{trained} of the parameters{what}; the others are frozen{held}"),
            );
        }
    }

    /// Adds lines about one micro-batch of samples of this shape; `dataset`: the data, if there are
    /// any.
    fn add_shape(
        &mut self,
        config: &RunConfig,
        stages: &[Box<dyn Stage>],
        world_size: usize,
        StepShape { latents, tokens }: &StepShape,
        dataset: Option<&Dataset>,
    ) -> Result<RankMemory> {
        config.model.family.check_data(&SampleShapes { latents, of: Default::default() })?;
        let memory = RankMemory::new(config, stages, *tokens, world_size)?;
        let (samples, dtype) =
            (config.micro_batches(*tokens, world_size)?.samples, config.model.dtype);
        let word = dtype.word();
        self.line("micro-batch", &format!("{samples} samples of {}", shape_text(latents, *tokens)));
        self.line("attention", &attention(config, dataset, world_size)?);
        let bytes = |recompute| shown(memory.activations.on_device(recompute, Offload::NONE));
        let (kept, again) = (bytes(Recompute::Never), bytes(Recompute::Always));
        self.line(
            "activations, estimated",
            &format!("{kept} in {word}; {again} with recompute = \"always\""),
        );
        Ok(memory)
    }

    fn add_data(
        &mut self,
        config: &RunConfig,
        stages: &[Box<dyn Stage>],
        world_size: usize,
    ) -> Result<(RankMemory, Tokens)> {
        config.global_batch(world_size)?;
        let dataset = dataset(config).map_err(|error| or_without_data(error, config))?;
        let dataset = Arc::new(dataset);
        let mut notes = check_data(config, &dataset)?;
        rehearse_data(config, &dataset)?;
        check_conditions(config, &dataset)?;
        let order = order(config, &dataset, world_size)?;
        let groups = trained_groups(&dataset, &order);
        let tokens: Vec<Tokens> =
            groups.iter().map(|group| tokens_of_group(config, &dataset, group)).collect();
        let (largest, _) = RankMemory::largest(config, stages, &tokens, world_size)?;
        let latents = dataset.latent_shape(groups[largest]);
        let shape = StepShape { latents, tokens: tokens[largest] };
        let memory = self.add_shape(config, stages, world_size, &shape, Some(&dataset))?;
        let (name, count) = (dataset.name(), dataset.groups().len());
        self.line(
            "data",
            &format!("{name}: {} samples; resolution groups: {count}", dataset.num_samples()),
        );
        for (name, value) in shares(&dataset, &order) {
            self.line(&format!("  {name}"), &value);
        }
        self.add_batches(config, &dataset, &groups, &tokens, world_size)?;
        let steps = order.batches_per_epoch();
        self.line(
            "epoch",
            &format!("{steps} steps, {} samples left out of each", order.left_out_per_epoch()),
        );
        let of_run = config.num_steps(steps);
        self.line("run", &format!("{of_run} steps, {:.1} epochs", of_run as f64 / steps as f64));
        if let Some(set) = ValidationSet::of(config, &dataset)? {
            notes.extend(check_validation(config, &set, &dataset)?);
            rehearse_data(config, &set.dataset)?;
            let planned = plan_validation(config, stages, &set, &memory, world_size)?;
            planned.iter().for_each(|(name, value)| self.line(name, value));
        }
        let planned = plan_sampling(config, stages, &dataset, &memory, world_size)?;
        planned.iter().for_each(|(name, value)| self.line(name, value));
        notes.iter().for_each(|note| self.line("note", &note.to_string()));
        order.small_groups().iter().for_each(|what| self.line("note", what));
        if let Some(what) = lr::warning(&config.lr_scheduler, of_run) {
            self.line("warning", &what);
        }
        Ok((memory, shape.tokens))
    }

    /// Adds lines about the samples of a step, and how they are cut into micro-batches; `tokens`:
    /// of the samples of each group.
    fn add_batches(
        &mut self,
        config: &RunConfig,
        dataset: &Dataset,
        groups: &[&Group],
        tokens: &[Tokens],
        world_size: usize,
    ) -> Result<()> {
        let global_batch = config.global_batch(world_size)?;
        if !config.data.counts_tokens() {
            let MicroBatches { count, samples } = config.micro_batches(tokens[0], world_size)?;
            let text = format!(
                "{global_batch} = {samples} samples x {world_size} ranks x {count} micro-batches"
            );
            self.line("global batch", &text);
            return Ok(());
        }
        let most = config.data.micro_batch_tokens_per_gpu;
        let text = format!(
            "{global_batch} samples over {world_size} ranks, micro-batches of up to {most} tokens:"
        );
        self.line("global batch", &text);
        for (group, tokens) in groups.iter().zip(tokens).take(MOST_GROUPS) {
            let MicroBatches { count, samples } = config.micro_batches(*tokens, world_size)?;
            let shape = shape_text(&dataset.latent_shape(group), *tokens);
            let text = format!("{count} micro-batches of {samples} samples of {shape}");
            self.line(&format!("  {}", group.name), &text);
        }
        if let Some(more @ 1..) = tokens.len().checked_sub(MOST_GROUPS) {
            self.line("", &format!("and {more} more resolution groups"));
        }
        Ok(())
    }

    /// Adds lines about memory at the peak of a step and about collectives, by sharding.
    fn add_ranks(&mut self, config: &RunConfig, world_size: usize, memory: &RankMemory) {
        let RankMemory { layout, .. } = memory;
        let world_sizes = BTreeSet::from_iter(WORLD_SIZES.into_iter().chain([world_size as u64]));
        let columns: Vec<String> = world_sizes
            .iter()
            .map(|ranks| {
                format!("{:>10}", format!("{ranks} rank{}", if *ranks == 1 { "" } else { "s" }))
            })
            .collect();
        self.line("a rank, by sharding", &format!("{}  collectives a step", columns.join(" ")));
        for (word, sharding) in Sharding::ALL {
            let parallel = ParallelSettings { sharding: *sharding, ..config.parallel.clone() };
            let bytes = world_sizes.iter().map(|&ranks| memory.on_device(&parallel, ranks));
            self.line(
                &format!("  {word}"),
                &format!("{}  {}", columns_of(bytes), layout.collectives(*sharding)),
            );
        }
        let copies =
            columns_of(world_sizes.iter().map(|&ranks| layout.copied_bytes(ranks as usize)));
        self.line(
            "  a save's copy",
            &format!("{copies}  of host memory besides, on the rank that writes most"),
        );
        self.add_explanations(config, world_sizes, memory);
    }

    /// Adds lines about what the table of ranks contains and leaves out.
    fn add_explanations(
        &mut self,
        config: &RunConfig,
        world_sizes: BTreeSet<u64>,
        memory: &RankMemory,
    ) {
        let ParallelSettings { recompute, offload, device, .. } = config.parallel;
        let layout = &memory.layout;
        if offload != Offload::NONE {
            let bytes = world_sizes.iter().map(|&ranks| memory.on_host(&config.parallel, ranks));
            let words: Vec<&str> = offload.words().into_iter().map(Choice::word).collect();
            let words = words.join(", ");
            let columns = columns_of(bytes);
            self.line(
                "  offloaded",
                &format!("{columns}  of host memory, with offload of {words}"),
            );
        }
        let around = match device {
            DeviceChoice::Cpu => "the process itself",
            DeviceChoice::Cuda => "without what CUDA and NCCL take on each GPU",
        };
        let averages = if layout.average_bytes > 0 { ", averages" } else { "" };
        let saved = shown(layout.saved_bytes());
        self.line("  a checkpoint", &format!("{saved} on the disk: weights, optimizer{averages}"));
        self.line("  in all", &format!("weights, gradients, optimizer{averages}, activations with recompute = \"{recompute}\", {around}"));
        self.line("  and", "1 all-gather of statistics; `parameters` always recomputes");
    }
}

/// `16 x 64 x 64: 1024 image tokens, 512 text tokens`.
fn shape_text(latents: &[i64], tokens: Tokens) -> String {
    let shape: Vec<String> = latents.iter().map(i64::to_string).collect();
    let (shape, Tokens { image, text }) = (shape.join(" x "), tokens);
    format!("{shape}: {image} image tokens, {text} text tokens")
}

/// Adds to the error how to plan without the data.
fn or_without_data(error: Error, config: &RunConfig) -> Error {
    match error {
        Error::Data { path, what } if what.starts_with("does not exist") => {
            let key = match config.data.datasets.len() {
                0 => format!("data.path (now {:?})", config.data.path),
                _ => "its path in data.datasets".into(),
            };
            let set = format!("set {key}, or plan with --latents C,H,W (videos: C,F,H,W)");
            Error::Data { path, what: format!("{what}; {set}") }
        }
        other => other,
    }
}

fn columns_of(bytes: impl Iterator<Item = u64>) -> String {
    bytes.map(|bytes| format!("{:>10}", shown(bytes))).collect::<Vec<_>>().join(" ")
}

/// `12.34 GiB`.
pub(super) fn shown(bytes: u64) -> String {
    format!("{:.2}", ByteSize(bytes))
}
