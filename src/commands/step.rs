//! `fm-dist step`: writes every number of one flow-matching step, to compare with another
//! implementation.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::assembly::attention::{TEXT, tokens_of_sample};
use crate::assembly::device::{device, open_libraries};
use crate::assembly::{build_pipeline, fresh_replica, trained_replica};
use crate::collective::Solo;
use crate::config::RunConfig;
use crate::data::{Batch, DataType, EMPTY};
use crate::error::{Error, Result};
use crate::files::durable::replace_file;
use crate::files::outputs::{Named, check_files};
use crate::files::safetensors::{self, SafeTensors};
use crate::flow::{
    DataShapes, Statistics, StepOptions, StepOutput, check_keys, latents_of, with_sample_axis,
};
use crate::libtorch::{Operators, Ran, count_operators};
use crate::model::SampleShapes;
use crate::nn::Tokens;
use crate::ops;
use crate::parallel::{Joining, Replica, Sharding, Sharing};
use crate::rng::Stream;
use crate::run::checkpoint::SavedWeights;
use crate::run::locate::locate;

/// Options of `fm-dist step`.
#[derive(Clone, Debug)]
pub struct StepRequest {
    /// File of batch tensors under the reference's keys, with `data_type` in the metadata.
    pub batch: PathBuf,
    pub dump: PathBuf,
    /// A run or checkpoint folder with the parameters; the initial parameters of a run if unset.
    pub weights: Option<PathBuf>,
    /// Argument of `torch.manual_seed` in the other implementation; the configured seed if unset.
    pub torch_seed: Option<i64>,
    /// True if gradients of the average weighted loss are computed and written as well.
    pub grads: bool,
    /// True if the operators of the computation are counted and told.
    pub operators: bool,
}

/// Runs one step without an optimizer and writes everything it computed. Returns a line saying
/// which generator drew, and the operators if they are asked for.
///
/// # Errors
/// [`Error::Data`] if the batch is malformed or does not fit; [`Error::Storage`] if the dump cannot
/// be written.
pub fn dump_step(config: &RunConfig, request: &StepRequest) -> Result<String> {
    check_files(
        &[Named { argument: "--dump", path: &request.dump }],
        &[Named { argument: "--batch", path: &request.batch }],
    )?;
    open_libraries(config)?;
    tch::set_num_threads(config.parallel.num_threads);
    let batch = read_batch(&request.batch)?;
    check_batch(config, &request.batch, &batch)?;
    let device = device(config, || tokens_of(config, &batch), &Solo)?.without_log();
    let replica = match &request.weights {
        Some(path) => {
            trained_replica(config, &locate(path)?.1, SavedWeights::Trained, device, 1.0)?
        }
        None => fresh_replica(config, device, Sharing::alone(), &Solo)?.replica,
    };
    let pipeline = build_pipeline(config, device);
    let seed = request.torch_seed.unwrap_or(config.seed as i64);
    let options = StepOptions { check_loss: false, ..StepOptions::default() };
    // This batch is the whole step of one rank.
    let joining = Joining::new(1, Sharding::None, config.parallel.reduce_dtype, 1);
    let computed = || {
        let mut tape = replica.tape(config.parallel.recompute).joining(joining);
        let stream = Stream::TorchSeed(seed);
        let output = pipeline.step(|inputs| tape.forward(inputs), &batch, &stream, options)?;
        let mut gradients = BTreeMap::new();
        if request.grads {
            tape.backward(&output.loss.average_weighted_loss, |stage, pieces| {
                gradients.insert(stage, pieces);
                Ok(())
            })?;
        }
        Ok::<_, Error>((output, gradients))
    };
    let (computed, operators) = match request.operators {
        true => count_operators(computed),
        false => (computed(), Operators::default()),
    };
    let (output, gradients) = computed?;
    let mut tensors = tensors_of(&output);
    tensors.extend(
        gradients.iter().flat_map(|(stage, pieces)| named_gradients(&replica, *stage, pieces)),
    );
    let generator = pipeline.draw_rules().generator();
    write(&request.dump, &tensors, &output, batch.data_type, generator)?;
    let told = if request.operators { told(operators) } else { String::new() };
    Ok(drawn_by(generator, seed) + &told)
}

/// Returns the counts of libtorch's operators and of ours, the most frequent first.
fn told(operators: Operators) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let (between, ours) = (operators.between_products(), operators.ours.values().copied());
    let ours: Ran = ours.collect();
    let all: u64 = operators.theirs.values().map(|ran| ran.times).sum();
    let mut text = format!(
        "{all} operators of libtorch that compute or move numbers, {} single passes of our own\n\
         beside products and attention: {} operators that move {:.1} MB, passes that move {:.1} MB\n",
        ours.times,
        between.times,
        megabytes(between.bytes),
        megabytes(ours.bytes),
    );
    let passes = operators.ours.iter().map(|(name, ran)| (format!("{name}, our own"), *ran));
    let mut sorted: Vec<(String, Ran)> = operators.theirs.into_iter().chain(passes).collect();
    sorted.sort_by_key(|(_, ran)| Reverse(ran.times));
    text += "   times        MB\n";
    for (name, ran) in sorted {
        text += &format!("{:>8} {:>9.1} {name}\n", ran.times, megabytes(ran.bytes));
    }
    text + &ops::fallbacks().map_or_else(String::new, |ours| ours + "\n")
}

/// Returns a line about the generator that drew noise and timesteps.
fn drawn_by(generator: Device, seed: i64) -> String {
    let (who, devices) = match generator {
        Device::Cpu => ("the CPU's generator", "every device"),
        _ => ("NeMo AutoModel", "this model of GPU"),
    };
    format!("noise and timesteps are what {who} draws after seed {seed}, on {devices}\n")
}

/// Returns the generator's word in the metadata of a dump.
fn word(generator: Device) -> &'static str {
    if generator == Device::Cpu { "host" } else { "device" }
}

fn read_batch(path: &Path) -> Result<Batch> {
    let file = SafeTensors::open(path)?;
    // The reference's default if a batch does not name its type.
    let word = file.metadata().get("data_type").map_or(DataType::Video.word(), String::as_str);
    let known = [DataType::Image, DataType::Video];
    let unknown = || {
        Error::data(
            path,
            format!("data_type in the metadata is {word:?}, expected \"image\" or \"video\""),
        )
    };
    let data_type =
        known.into_iter().find(|data_type| data_type.word() == word).ok_or_else(unknown)?;
    let tensors = file
        .tensors()
        .iter()
        .map(|info| Ok((info.name.clone(), file.read(&info.name)?)))
        .collect::<Result<_>>()?;
    Ok(Batch { tensors, data_type, sample_ids: Vec::new(), bad_samples: 0 })
}

/// Returns the tokens of the batch's samples, which are alike.
fn tokens_of(config: &RunConfig, batch: &Batch) -> Vec<Tokens> {
    let Ok(latents) = latents_of(batch).map(Tensor::size) else { return Vec::new() };
    let text = batch.tensors.get(TEXT).map(|text| text.size()[1]);
    vec![tokens_of_sample(config, &latents[1..], text)]
}

/// Refuses a batch that the adapter or the model cannot take.
fn check_batch(config: &RunConfig, path: &Path, batch: &Batch) -> Result<()> {
    let (latents, adapter) = (latents_of(batch)?.size(), config.flow_matching.adapter.build());
    let whole = with_sample_axis(adapter.as_ref(), batch);
    let shapes = SampleShapes::of_batch(latents[0], &latents[1..], &whole.tensors);
    let empty_prompt = whole
        .tensors
        .iter()
        .filter_map(|(key, tensor)| Some((key.strip_prefix(EMPTY)?.to_string(), tensor.size())));
    let data = DataShapes {
        latents: &latents[1..],
        sample: &shapes.of,
        empty_prompt: &empty_prompt.collect(),
    };
    check_keys(adapter.as_ref(), &config.flow_matching.flow, data)
        .map_err(|what| Error::data(path, what))?;
    config.model.family.check_data(&shapes)
}

fn tensors_of(output: &StepOutput) -> Vec<(String, Tensor)> {
    let loss = &output.loss;
    let named = [
        ("sigma", &output.sigma),
        ("timesteps", &output.timesteps),
        ("noise", &output.noise),
        ("noisy_latents", &output.noisy_latents),
        ("model_pred", &output.model_pred),
        ("target", &output.target),
        ("loss_weight", &loss.loss_weight),
        ("unweighted_loss", &loss.unweighted_loss),
        ("weighted_loss", &loss.weighted_loss),
        ("average_unweighted_loss", &loss.average_unweighted_loss),
        ("average_weighted_loss", &loss.average_weighted_loss),
    ];
    let mask = loss.loss_mask.iter().map(|mask| ("loss_mask", mask));
    let tensors =
        named.into_iter().chain(mask).map(|(name, tensor)| (name.to_string(), tensor.detach()));
    tensors.chain(metrics_of(output)).collect()
}

/// Returns the reference's numeric metrics as `metrics.<name>`, f64 scalars; textual ones are in
/// the metadata.
fn metrics_of(output: &StepOutput) -> impl Iterator<Item = (String, Tensor)> {
    let row = output.statistics.as_ref().expect("metrics are collected").to_device(Device::Cpu);
    let statistics = Statistics::from_row(&Vec::<f32>::try_from(row).expect("an f32 row"));
    let Statistics { sigma, timesteps, weight, noisy_latents, loss, unweighted_loss, .. } =
        statistics;
    let named = [
        ("loss", loss),
        ("unweighted_loss", unweighted_loss),
        ("sigma_min", sigma.min),
        ("sigma_max", sigma.max),
        ("sigma_mean", sigma.mean),
        ("weight_min", weight.min),
        ("weight_max", weight.max),
        ("timestep_min", timesteps.min),
        ("timestep_max", timesteps.max),
        ("noisy_min", noisy_latents.min),
        ("noisy_max", noisy_latents.max),
    ];
    named.into_iter().map(|(name, number)| (format!("metrics.{name}"), Tensor::from(number)))
}

fn named_gradients(
    replica: &Replica<'_>,
    stage: usize,
    pieces: &[Tensor],
) -> Vec<(String, Tensor)> {
    let named = replica.buckets[stage].by_name(replica.stages[stage].params(), pieces);
    let in_float = |view: Tensor| view.to_kind(Kind::Float);
    named.map(|(info, view)| (format!("grad.{}", info.name), in_float(view))).collect()
}

fn write(
    path: &Path,
    tensors: &[(String, Tensor)],
    output: &StepOutput,
    data_type: DataType,
    generator: Device,
) -> Result<()> {
    let metadata = [
        ("sampling_method", output.sampling_method.to_string()),
        ("shift", output.shift.to_string()),
        ("task_type", output.task_type.word().to_string()),
        ("data_type", data_type.word().to_string()),
        ("draws", word(generator).to_string()),
    ];
    let metadata = metadata.map(|(key, word)| (key.to_string(), word)).into();
    let borrowed: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    replace_file(path, |mut file| safetensors::write(&mut file, &borrowed, &metadata))
}
