//! Generates samples from a trained model.

use tch::{Device, Kind, Tensor};

use crate::assembly::build_pipeline;
use crate::config::RunConfig;
use crate::data::{Batch, Dataset};
use crate::error::Result;
use crate::flow::{
    CfgDropoutValue, FlowMatchingContext, FlowMatchingPipeline, Guide, NoiseLevel, NoiseLevels,
    Solver,
};
use crate::nn::Activations;
use crate::parallel::Replica;
use crate::rng::{Key, Purpose, Stream};
use crate::sample::conditions::Origin;
use crate::sample::scheduler::Scheduler;

/// Most samples that go through the model together, and most tokens if they are several.
const SAMPLES: i64 = 100;
const TOKENS: i64 = 1 << 16;

/// Generated samples, condition by condition.
pub struct Samples {
    /// `[N, C, …]` f32.
    pub images: Tensor,
    /// `[N]` i64.
    pub labels: Tensor,
    /// The noise levels of the trajectory; the last one is 0.
    pub sigmas: Vec<f64>,
    /// One name for each condition, in order.
    pub names: Vec<String>,
    pub per_condition: i64,
}

/// Refuses a dataset whose conditions could not be used for the samples in the report at the end of
/// a run, and conditions that are not finite.
///
/// # Errors
/// [`Error::Data`](crate::error::Error::Data) or [`Error::Config`](crate::error::Error::Config)
/// naming the file, the key and what was expected.
pub fn check_conditions(config: &RunConfig, dataset: &Dataset) -> Result<()> {
    let Some(conditions) = dataset.conditions()? else { return Ok(()) };
    let origin = Origin::from_dataset(dataset, conditions, None);
    if origin.is_of_pictures() {
        Plan::new(config, &origin, Scheduler::of(config)?.as_ref(), Device::Cpu)?.rehearse()
    } else {
        Ok(())
    }
}

/// A prepared generation: noise levels, guidance, conditions.
pub struct Plan<'a> {
    config: &'a RunConfig,
    origin: &'a Origin,
    pipeline: FlowMatchingPipeline,
    guide: Guide,
    /// Number of one sample's tokens.
    image_tokens: i64,
    solver: Solver,
    levels: Vec<NoiseLevel>,
    device: Device,
}

impl<'a> Plan<'a> {
    /// `scheduler`: that of the configured pipeline, if it has one.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) or [`Error::Config`](crate::error::Error::Config)
    /// if the conditions do not fit the model or the guidance, or if the scheduler is not followed.
    pub fn new(
        config: &'a RunConfig,
        origin: &'a Origin,
        scheduler: Option<&Scheduler>,
        device: Device,
    ) -> Result<Self> {
        let pipeline = build_pipeline(config, device);
        let (adapter, sampling) = (pipeline.adapter(), &config.sampling);
        origin.check(&**config.model.family, adapter)?;
        let guidance = adapter.guidance(config.model.family.embeds_guidance());
        let guide = Guide::new(guidance, sampling, origin.has_negative())?;
        let image_tokens = config.model.family.image_tokens(&origin.shape);
        let own = adapter.noise_levels(&origin.shape, image_tokens, pipeline.settings(), guidance);
        let num_timesteps = pipeline.settings().num_train_timesteps;
        let rule = chosen_levels(config, scheduler, own, image_tokens, num_timesteps)?;
        let (solver, levels) = (rule.solver(), rule.of_steps(sampling.num_steps, num_timesteps));
        Ok(Plan { config, origin, guide, image_tokens, solver, levels, pipeline, device })
    }

    /// Returns the noise levels of the trajectory; the last one is 0.
    pub fn sigmas(&self) -> Vec<f64> {
        self.levels.iter().map(|level| level.sigma).collect()
    }

    /// Prepares the model's inputs of the first row, which an adapter may refuse, without a model.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) or [`Error::Config`](crate::error::Error::Config)
    /// if the conditions do not fit the adapter.
    pub fn rehearse(&self) -> Result<()> {
        let (rows, noise) = (
            [0],
            Tensor::zeros(
                [&[1], self.origin.shape.as_slice()].concat(),
                (Kind::Float, self.device),
            ),
        );
        let clean = self.origin.clean_latents(&rows);
        let batches = [Some(self.origin.batch(&rows)), self.unconditional(&rows)?];
        batches.iter().flatten().try_for_each(|batch| {
            self.inputs(&noise, self.levels[0], batch, clean.as_ref()).map(drop)
        })
    }

    /// Generates `per_condition` samples for each row of the origin.
    ///
    /// Each sample's noise follows only from the seed and its index, so that generating more
    /// samples leaves the first ones unchanged.
    ///
    /// # Errors
    /// Errors of the adapter, the model and `go_on`, which is called before each step from noise to
    /// data.
    ///
    /// # Ordering
    /// Every rank of a shard group calls it.
    pub fn generate(
        &self,
        replica: &Replica<'_>,
        per_condition: i64,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Samples> {
        let rows: Vec<i64> = (0..self.origin.names.len() as i64)
            .flat_map(|row| vec![row; per_condition as usize])
            .collect();
        let together = (TOKENS / self.image_tokens.max(1)).clamp(1, SAMPLES) as usize;
        let chunks = rows.chunks(together).enumerate();
        let images = chunks
            .map(|(index, chunk)| self.samples(replica, index * together, chunk, go_on))
            .collect::<Result<Vec<_>>>()?;
        Ok(Samples {
            images: Tensor::cat(&images, 0),
            labels: self.origin.labels(&rows),
            sigmas: self.sigmas(),
            names: self.origin.names.clone(),
            per_condition,
        })
    }

    /// Returns samples `[rows, C, …]` f32 on the CPU; `first` is the index of the first one among
    /// all samples.
    fn samples(
        &self,
        replica: &Replica<'_>,
        first: usize,
        rows: &[i64],
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Tensor> {
        let noise = self.origin.noise(rows).unwrap_or_else(|| self.draw_noise(first, rows.len()));
        let (batch, clean) = (self.origin.batch(rows), self.origin.clean_latents(rows));
        let unconditional = self.unconditional(rows)?;
        let noise = noise.to_device(self.device);
        let solved = self.solver.follow(noise, &self.levels, |x, level| {
            go_on()?;
            let velocity = |batch: &Batch| self.velocity(replica, x, level, batch, clean.as_ref());
            let without = || velocity(unconditional.as_ref().expect("guidance is used"));
            self.guide.velocity(velocity(&batch)?, without)
        })?;
        Ok(solved.to_device(Device::Cpu))
    }

    /// Returns what guidance leads away from, if it is used: the negative conditions, or none, as
    /// training drops them.
    pub(super) fn unconditional(&self, rows: &[i64]) -> Result<Option<Batch>> {
        let dropped = || {
            if self.pipeline.settings().cfg_dropout_value == CfgDropoutValue::EmptyPrompt {
                self.origin.check_empty_prompt()?;
            }
            let batch = self.origin.batch(rows);
            let without = self.pipeline.without_conditions(&batch, rows.len() as i64);
            without.map_err(|error| self.origin.named(error))
        };
        let batch = || self.origin.negative(rows).map_or_else(dropped, Ok);
        self.guide.is_used().then(batch).transpose()
    }

    fn draw_noise(&self, first: usize, count: usize) -> Tensor {
        let key = |place: usize| Key::new(self.config.seed, Purpose::Sampling).scope(place as u64);
        let size = [&[count as i64], self.origin.shape.as_slice()].concat();
        Stream::PerSample((first..first + count).map(key).collect()).open().normal(0.0, 1.0, &size)
    }

    /// Returns the model's prediction at this noise level. `clean`: the frames with which a video
    /// starts, if given.
    fn velocity(
        &self,
        replica: &Replica<'_>,
        x: &Tensor,
        level: NoiseLevel,
        batch: &Batch,
        clean: Option<&Tensor>,
    ) -> Result<Tensor> {
        let inputs = self.inputs(x, level, batch, clean)?;
        Ok(self.pipeline.adapter().prediction(&replica.infer(inputs)?))
    }

    fn inputs(
        &self,
        x: &Tensor,
        level: NoiseLevel,
        batch: &Batch,
        clean: Option<&Tensor>,
    ) -> Result<Activations> {
        let (device, dtype) = (x.device(), self.config.model.dtype.kind());
        let full = |value: f64| Tensor::full([x.size()[0]], value, (Kind::Float, device));
        let (sigma, timesteps) = (full(level.sigma), full(level.timestep));
        let x = x.to_kind(dtype);
        let context = FlowMatchingContext {
            noisy_latents: &x,
            latents: &clean
                .map_or_else(|| x.shallow_clone(), |clean| clean.to_device(device).to_kind(dtype)),
            timesteps: &timesteps,
            sigma: &sigma,
            image_to_video: &self.origin.image_to_video(x.size()[0]),
            data_type: batch.data_type,
            device,
            dtype,
            batch,
            drop: None,
            cfg_dropout_value: CfgDropoutValue::Zeros,
            guidance_scale: self.guide.embedded,
        };
        self.pipeline.adapter().prepare_inputs(&context).map_err(|error| self.origin.named(error))
    }
}

/// Returns the noise levels that the settings choose: the scheduler's or the family's `own`, with
/// the solver and the shift that are set.
fn chosen_levels(
    config: &RunConfig,
    scheduler: Option<&Scheduler>,
    own: NoiseLevels,
    image_tokens: i64,
    num_train_timesteps: i64,
) -> Result<NoiseLevels> {
    let sampling = &config.sampling;
    let own = sampling.solver.map_or(own, |solver| own.with_solver(solver));
    let levels = match scheduler {
        Some(scheduler) => {
            scheduler.levels(own, sampling.solver, image_tokens, num_train_timesteps)?
        }
        None => own,
    };
    Ok(if sampling.shift == 0.0 { levels } else { levels.with_shift(sampling.shift) })
}
