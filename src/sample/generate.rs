//! Generates samples from a trained model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::assembly::attention::tokens_of_sample;
use crate::assembly::device::{device, open_libraries};
use crate::assembly::{build_pipeline, dataset, trained_replica};
use crate::collective::Solo;
use crate::config::RunConfig;
use crate::data::{Batch, Dataset};
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::files::outputs::{Named, check_files};
use crate::files::safetensors;
use crate::flow::{CfgDropoutValue, FlowMatchingContext, FlowMatchingPipeline, Guide, solver};
use crate::nn::Activations;
use crate::parallel::Replica;
use crate::report::write_grid;
use crate::rng::{Key, Purpose, Stream};
use crate::run::checkpoint::SavedWeights;
use crate::run::folder;
use crate::run::locate::locate;
use crate::run::lora::{AddedLora, AddedLoras};
use crate::sample::conditions::Origin;

/// Number of samples that go through the model together.
const CHUNK: usize = 100;

/// Options of `fm-dist sample`; unset values are the run's own.
#[derive(Clone, Debug)]
pub struct SampleRequest {
    /// A run folder or one of its checkpoints.
    pub run: PathBuf,
    /// Files to write: `.png` for a labelled grid, `.safetensors` for the numbers.
    pub out: Vec<PathBuf>,
    /// A safetensors file of conditions; the dataset's named ones if unset.
    pub conditions: Option<PathBuf>,
    /// `[C, (F,) H, W]`; the given noise's or the dataset's if unset.
    pub shape: Option<Vec<i64>>,
    pub num_steps: Option<i64>,
    pub guidance_scale: Option<f64>,
    pub true_cfg_scale: Option<f64>,
    pub shift: Option<f64>,
    /// Samples for each condition; one for each row if unset and the conditions are a file.
    pub per_condition: Option<i64>,
    pub seed: Option<u64>,
    /// Factor of the run's own LoRA.
    pub lora_scale: f64,
    /// The weights as they are, or averaged.
    pub weights: SavedWeights,
    /// LoRAs from files that are added to the model.
    pub loras: Vec<AddedLora>,
}

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

/// Generates from a run's newest checkpoint, or from the given one, and writes the files.
///
/// # Errors
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`], [`Error::Storage`]; before anything is
/// computed, [`Error::Data`] or [`Error::Config`] if the conditions are missing, malformed or do
/// not fit the model, or a file could not be written.
pub fn sample(request: &SampleRequest) -> Result<()> {
    check_outputs(request)?;
    let (run, folder) = locate(&request.run)?;
    let of_run = folder::config_of(&run)?;
    let config = with_options(of_run.clone(), request);
    open_libraries(&config)?;
    let origin = origin_of(request, &config)?;
    if !origin.is_of_pictures()
        && request.out.iter().any(|path| format_of(path) == Some(Format::Picture))
    {
        let what = format!(
            "latents {:?} are no pictures, which have 1 or 3 channels; write them as .safetensors",
            origin.shape
        );
        return Err(Error::config("--out", what));
    }
    let loras = AddedLoras::open(&request.loras, &of_run.model.family, &of_run.stages()?)?;
    let samples = || vec![tokens_of_sample(&config, &origin.shape, origin.text_tokens())];
    let device = device(&config, samples, &Solo)?.without_log();
    let plan = Plan::new(&config, &origin, device)?;
    plan.rehearse()?;
    let replica = trained_replica(&of_run, &folder, request.weights, device, request.lora_scale)?;
    let replica = loras.added_to(replica, of_run.model.dtype.kind(), device)?;
    let samples = plan.generate(&replica, &|| Ok(()))?;
    request.out.iter().try_for_each(|path| samples.write(path))
}

/// Refuses a dataset whose conditions could not be used for the samples in the report at the end of
/// a run, and conditions that are not finite.
///
/// # Errors
/// [`Error::Data`] or [`Error::Config`] naming the file, the key and what was expected.
pub fn check_conditions(config: &RunConfig, dataset: &Dataset) -> Result<()> {
    let Some(conditions) = dataset.conditions()? else { return Ok(()) };
    let origin = Origin::from_dataset(dataset, conditions, None);
    if origin.is_of_pictures() {
        Plan::new(config, &origin, Device::Cpu)?.rehearse()
    } else {
        Ok(())
    }
}

/// File formats of samples.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    Picture,
    Numbers,
}

fn format_of(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "png" => Some(Format::Picture),
        "safetensors" => Some(Format::Numbers),
        _ => None,
    }
}

fn check_outputs(request: &SampleRequest) -> Result<()> {
    if let Some(path) = request.out.iter().find(|path| format_of(path).is_none()) {
        return Err(Error::config(
            "--out",
            format!("{} must end in .png or .safetensors", path.display()),
        ));
    }
    let outputs: Vec<Named<'_>> =
        request.out.iter().map(|path| Named { argument: "--out", path }).collect();
    let inputs: Vec<Named<'_>> =
        request.conditions.iter().map(|path| Named { argument: "--conditions", path }).collect();
    check_files(&outputs, &inputs)
}

/// Returns the run's configuration with the options of this call.
fn with_options(mut config: RunConfig, request: &SampleRequest) -> RunConfig {
    let sampling = &mut config.sampling;
    sampling.num_steps = request.num_steps.unwrap_or(sampling.num_steps);
    sampling.guidance_scale = request.guidance_scale.unwrap_or(sampling.guidance_scale);
    sampling.true_cfg_scale = request.true_cfg_scale.unwrap_or(sampling.true_cfg_scale);
    sampling.shift = request.shift.unwrap_or(sampling.shift);
    let usual = if request.conditions.is_some() { 1 } else { sampling.per_condition };
    sampling.per_condition = request.per_condition.unwrap_or(usual);
    config.seed = request.seed.unwrap_or(config.seed);
    config
}

fn origin_of(request: &SampleRequest, config: &RunConfig) -> Result<Origin> {
    let shape = request.shape.as_deref();
    let Some(path) = &request.conditions else {
        let dataset = dataset(config)?;
        let conditions = dataset.conditions()?.ok_or_else(|| {
            Error::data(dataset.path(), "names no conditions to generate from; give some with --conditions FILE.safetensors")
        })?;
        return Ok(Origin::from_dataset(&dataset, conditions, shape));
    };
    let origin = Origin::from_file(path, shape, || dataset(config))?;
    if origin.has_noise() && config.sampling.per_condition != 1 {
        let what = format!(
            "{} would be equal: {} holds the `noise` to start from",
            config.sampling.per_condition,
            path.display()
        );
        return Err(Error::config("--per-condition", what));
    }
    Ok(origin)
}

/// A prepared generation: noise levels, guidance, conditions.
pub struct Plan<'a> {
    config: &'a RunConfig,
    origin: &'a Origin,
    pipeline: FlowMatchingPipeline,
    guide: Guide,
    sigmas: Vec<f64>,
    device: Device,
}

impl<'a> Plan<'a> {
    /// # Errors
    /// [`Error::Data`] or [`Error::Config`] if the conditions do not fit the model or the guidance.
    pub fn new(config: &'a RunConfig, origin: &'a Origin, device: Device) -> Result<Self> {
        let pipeline = build_pipeline(config, device);
        let (adapter, sampling) = (pipeline.adapter(), &config.sampling);
        origin.check(&**config.model.family, adapter)?;
        let guidance = adapter.guidance(config.model.family.embeds_guidance());
        let guide = Guide::new(guidance, sampling, origin.has_negative())?;
        let tokens = config.model.family.image_tokens(&origin.shape);
        let own = adapter.noise_levels(&origin.shape, tokens, pipeline.settings(), guidance);
        let levels = if sampling.shift == 0.0 { own } else { own.with_shift(sampling.shift) };
        Ok(Plan {
            config,
            origin,
            guide,
            sigmas: levels.sigmas(sampling.num_steps),
            pipeline,
            device,
        })
    }

    /// Prepares the model's inputs of the first row, which an adapter may refuse, without a model.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Config`] if the conditions do not fit the adapter.
    pub fn rehearse(&self) -> Result<()> {
        let (rows, noise) = (
            [0],
            Tensor::zeros(
                [&[1], self.origin.shape.as_slice()].concat(),
                (Kind::Float, self.device),
            ),
        );
        let clean = self.origin.clean_latents(&rows);
        let unconditional =
            self.origin.unconditional(&rows, &self.pipeline.adapter().condition_keys());
        let batches = [self.origin.batch(&rows), unconditional];
        batches.iter().try_for_each(|batch| {
            self.inputs(&noise, self.sigmas[0], batch, clean.as_ref()).map(drop)
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
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Samples> {
        let per_condition = self.config.sampling.per_condition;
        let rows: Vec<i64> = (0..self.origin.names.len() as i64)
            .flat_map(|row| vec![row; per_condition as usize])
            .collect();
        let chunks = rows.chunks(CHUNK).enumerate();
        let images = chunks
            .map(|(index, chunk)| self.samples(replica, index * CHUNK, chunk, go_on))
            .collect::<Result<Vec<_>>>()?;
        Ok(Samples {
            images: Tensor::cat(&images, 0),
            labels: self.origin.labels(&rows),
            sigmas: self.sigmas.clone(),
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
        let unconditional =
            self.origin.unconditional(rows, &self.pipeline.adapter().condition_keys());
        let solved = solver::euler(noise.to_device(self.device), &self.sigmas, |x, sigma| {
            go_on()?;
            let velocity = |batch: &Batch| self.velocity(replica, x, sigma, batch, clean.as_ref());
            self.guide.velocity(velocity(&batch)?, || velocity(&unconditional))
        })?;
        Ok(solved.to_device(Device::Cpu))
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
        sigma: f64,
        batch: &Batch,
        clean: Option<&Tensor>,
    ) -> Result<Tensor> {
        let inputs = self.inputs(x, sigma, batch, clean)?;
        Ok(self.pipeline.adapter().prediction(&replica.infer(inputs)?))
    }

    fn inputs(
        &self,
        x: &Tensor,
        sigma: f64,
        batch: &Batch,
        clean: Option<&Tensor>,
    ) -> Result<Activations> {
        let (device, dtype) = (x.device(), self.config.model.dtype.kind());
        let sigma = Tensor::full([x.size()[0]], sigma, (Kind::Float, device));
        let x = x.to_kind(dtype);
        let context = FlowMatchingContext {
            noisy_latents: &x,
            latents: &clean
                .map_or_else(|| x.shallow_clone(), |clean| clean.to_device(device).to_kind(dtype)),
            timesteps: &(&sigma * self.pipeline.settings().num_train_timesteps as f64),
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

impl Samples {
    /// Writes a picture or the numbers, depending on the file's extension.
    fn write(&self, path: &Path) -> Result<()> {
        if format_of(path) == Some(Format::Picture) {
            return write_grid(path, &self.images, &self.names, self.per_condition as usize, None);
        }
        let sigmas = Tensor::from_slice(&self.sigmas).to_kind(Kind::Float);
        let tensors = [("samples", &self.images), ("labels", &self.labels), ("sigmas", &sigmas)];
        replace_file(path, |mut file| safetensors::write(&mut file, &tensors, &BTreeMap::new()))
    }
}
