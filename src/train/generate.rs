//! Samples of a trained model.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::{build_pipeline, checkpoint, device, empty_replica, run_folder};
use crate::config::RunConfig;
use crate::data::{Batch, Conditions, Dataset, safetensors};
use crate::error::{Error, Result};
use crate::flow::{CfgDropoutValue, FlowMatchingContext, FlowMatchingPipeline, solver};
use crate::parallel::Replica;
use crate::rng::{Key, Purpose, Stream};
use crate::telemetry::write_grid;

/// Samples that go through the model together.
const CHUNK: usize = 100;

/// What `fm-dist sample` was asked for; unset values are the run's own.
#[derive(Clone, Debug)]
pub struct SampleRequest {
    /// A run folder or one of its checkpoints.
    pub run: PathBuf,
    /// Files to write: `.png` for a labelled grid, `.safetensors` for the numbers.
    pub out: Vec<PathBuf>,
    pub num_steps: Option<i64>,
    pub guidance_scale: Option<f64>,
    pub per_condition: Option<i64>,
    pub seed: Option<u64>,
}

/// Generated samples, condition by condition.
pub struct Samples {
    /// `[N, C, …]` f32.
    pub images: Tensor,
    /// `[N]` i64.
    pub labels: Tensor,
    /// One name a condition, in order.
    pub names: Vec<String>,
    pub per_condition: i64,
}

/// Generates from a run's newest checkpoint, or from the given one, and writes the files.
///
/// # Errors
/// [`Error::NoCheckpoint`], [`Error::CheckpointMismatch`], [`Error::Storage`]; [`Error::Data`] if the dataset names no conditions.
pub fn sample(request: &SampleRequest) -> Result<()> {
    let (run, folder) = run_folder::locate(&request.run)?;
    let mut config = run_folder::config_of(&run)?;
    let sampling = &mut config.sampling;
    sampling.num_steps = request.num_steps.unwrap_or(sampling.num_steps);
    sampling.guidance_scale = request.guidance_scale.unwrap_or(sampling.guidance_scale);
    sampling.per_condition = request.per_condition.unwrap_or(sampling.per_condition);
    config.seed = request.seed.unwrap_or(config.seed);
    let mut replica = empty_replica(&config, device(config.parallel.device))?;
    checkpoint::load_parameters(&folder, &mut replica)?;
    let dataset = Dataset::named(&config.data.path)?;
    let conditions = dataset.conditions()?.ok_or_else(|| Error::data(dataset.path(), "names no conditions to generate from"))?;
    let samples = generate(&config, &replica, &dataset, conditions)?;
    request.out.iter().try_for_each(|path| samples.write(path))
}

/// `per_condition` samples for each of the dataset's conditions, in the shape of its first resolution group.
///
/// Each sample's noise follows from the seed and its place alone, so that more samples leave the first ones as they are.
pub fn generate(config: &RunConfig, replica: &Replica, dataset: &Dataset, conditions: Conditions) -> Result<Samples> {
    let per_condition = config.sampling.per_condition;
    let group = &dataset.groups()[0].name;
    let shape = dataset.latent_shape(group).expect("a group of the dataset has latents").to_vec();
    let pipeline = build_pipeline(config, device(config.parallel.device));
    let rows: Vec<i64> = (0..conditions.names.len() as i64).flat_map(|row| vec![row; per_condition as usize]).collect();
    let mut images = Vec::new();
    for (index, chunk) in rows.chunks(CHUNK).enumerate() {
        let first = (index * CHUNK) as u64;
        let keys = (0..chunk.len() as u64).map(|place| Key::new(config.seed, Purpose::Sampling).scope(first + place)).collect();
        let size = [&[chunk.len() as i64], shape.as_slice()].concat();
        let noise = Stream::PerSample(keys).open().normal(0.0, 1.0, &size);
        let batch = condition_batch(&conditions, chunk, dataset);
        images.push(solve(config, &pipeline, replica, noise, &batch)?);
    }
    let labels = conditions
        .tensors
        .get("labels")
        .map_or_else(|| Tensor::from_slice(&rows), |labels| labels.index_select(0, &Tensor::from_slice(&rows)));
    Ok(Samples { images: Tensor::cat(&images, 0), labels: labels.to_kind(Kind::Int64), names: conditions.names, per_condition })
}

fn condition_batch(conditions: &Conditions, rows: &[i64], dataset: &Dataset) -> Batch {
    let rows = Tensor::from_slice(rows);
    let tensors = conditions.tensors.iter().map(|(key, tensor)| (key.clone(), tensor.index_select(0, &rows))).collect();
    Batch { tensors, data_type: dataset.data_type(), sample_ids: Vec::new() }
}

fn solve(config: &RunConfig, pipeline: &FlowMatchingPipeline, replica: &Replica, noise: Tensor, batch: &Batch) -> Result<Tensor> {
    let scale = config.sampling.guidance_scale;
    let unconditional = without_conditions(batch, pipeline.adapter().condition_keys());
    let levels = solver::sigmas(config.sampling.num_steps, pipeline.settings().flow_shift);
    let solved = solver::euler(noise, &levels, |x, sigma| {
        let conditional = velocity(config, pipeline, replica, x, sigma, batch)?;
        if scale == 1.0 {
            return Ok(conditional);
        }
        Ok(solver::guided(&velocity(config, pipeline, replica, x, sigma, &unconditional)?, &conditional, scale))
    })?;
    Ok(solved.to_device(Device::Cpu))
}

fn velocity(
    config: &RunConfig,
    pipeline: &FlowMatchingPipeline,
    replica: &Replica,
    x: &Tensor,
    sigma: f64,
    batch: &Batch,
) -> Result<Tensor> {
    let dtype = config.model.dtype.kind();
    let sigma = Tensor::full([x.size()[0]], sigma, (Kind::Float, x.device()));
    let x = x.to_kind(dtype);
    // Adapters draw only to drop conditions, which sampling never does.
    let stream = Stream::Batch(Key::new(config.seed, Purpose::Sampling));
    let inputs = pipeline.adapter().prepare_inputs(&FlowMatchingContext {
        noisy_latents: &x,
        latents: &x,
        timesteps: &(&sigma * pipeline.settings().num_train_timesteps as f64),
        sigma: &sigma,
        image_to_video: &Tensor::zeros([x.size()[0]], (Kind::Bool, x.device())),
        data_type: batch.data_type,
        device: x.device(),
        dtype,
        batch,
        cfg_dropout_prob: 0.0,
        cfg_dropout_value: CfgDropoutValue::default(),
        draws: &stream.open(),
    })?;
    Ok(pipeline.adapter().prediction(&replica.infer(inputs)))
}

/// Conditions as training drops them: zeros.
fn without_conditions(batch: &Batch, keys: &[&str]) -> Batch {
    let drop = |(key, tensor): (&String, &Tensor)| {
        let dropped = if keys.contains(&key.as_str()) { tensor.zeros_like() } else { tensor.shallow_clone() };
        (key.clone(), dropped)
    };
    Batch { tensors: batch.tensors.iter().map(drop).collect(), data_type: batch.data_type, sample_ids: Vec::new() }
}

impl Samples {
    /// Whether the samples can be shown: grey or coloured pictures.
    pub fn are_pictures(&self) -> bool {
        matches!(self.images.size().as_slice(), [_, 1 | 3, _, _])
    }

    /// A picture or numbers, as the file's ending says.
    fn write(&self, path: &Path) -> Result<()> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("png") if !self.are_pictures() => {
                let what = format!("latents {:?} are no pictures; write them as .safetensors", self.images.size());
                Err(Error::config("--out", what))
            }
            Some("png") => write_grid(path, &self.images, &self.names, self.per_condition as usize, None),
            Some("safetensors") => {
                let mut file = File::create(path).map_err(Error::storage(path, "create"))?;
                let tensors = [("samples", &self.images), ("labels", &self.labels)];
                safetensors::write(&mut file, &tensors, &BTreeMap::new()).map(drop).map_err(Error::storage(path, "write"))
            }
            _ => Err(Error::config("--out", format!("{} must end in .png or .safetensors", path.display()))),
        }
    }
}
