//! The numbers are NeMo AutoModel's and PyTorch's: the real packages run as oracle, on new cases
//! each time.
//!
//! The seed of the cases is printed, so that a failure can be had again. What must hold: draws bit
//! for bit, or one unit in the last place where `scalar / tensor` rounds twice; losses and
//! gradients to f32 rounding.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fm_dist::adapter::create_adapter;
use fm_dist::config::RunConfig;
use fm_dist::data::{Batch, DataType};
use fm_dist::files::safetensors::{self, SafeTensors};
use fm_dist::flow::time_shift::{TimeShift, WeightShift, get_flow_match_loss_weight, time_shift};
use fm_dist::flow::timestep_sampling::{
    Density, WeightingScheme, compute_density_for_timestep_sampling,
};
use fm_dist::flow::{FlowMatchingPipeline, Statistics, StepOptions, bsmntw_table};
use fm_dist::model::Dtype;
use fm_dist::nn::Activations;
use fm_dist::rng::{Key, Purpose, Stream};
use fm_dist::run::Resume;
use fm_dist::settings::Choice;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{
    BFLOAT16, GRADIENT, LOSS, assert_close, assert_within_one_ulp, entries, fresh_seed, oracle,
};
use crate::runs::{finish, program, tiny, train_in_threads};

fn assert_bits(found: &Tensor, expected: &Tensor, what: &str) {
    let found = found.to_kind(Kind::Float);
    assert!(found.equal(expected), "{what}: found {found}, expected {expected}");
}

/// The formula of the oracle's stand-in model.
fn formula(inputs: &Activations) -> Activations {
    let hidden = inputs.get("hidden_states");
    let kind = hidden.kind();
    let per_sample = |tensor: Tensor| {
        let mut shape = vec![1; hidden.dim()];
        shape[0] = -1;
        tensor.view(shape.as_slice())
    };
    let time = per_sample(inputs.get("timestep") / 1000.0) * 0.25;
    let text = inputs
        .get("encoder_hidden_states")
        .to_kind(Kind::Float)
        .mean_dim([1i64, 2].as_slice(), false, Kind::Float)
        .to_kind(kind);
    Activations::new().with("prediction", hidden * 0.5 + time + per_sample(text))
}

/// A case's settings through the configuration file's own names.
fn settings_of(case: &Value) -> RunConfig {
    let set = |(key, value): (&String, &Value)| format!("flow_matching.{key}={value}");
    let overrides: Vec<String> = case["pipeline"].as_object().unwrap().iter().map(set).collect();
    RunConfig::read("oracle", "", &overrides).unwrap()
}

fn batch_of(file: &SafeTensors, data_type: &str) -> Batch {
    let named =
        |name: &str| Some((name.strip_prefix("batch.")?.to_string(), file.read(name).unwrap()));
    let tensors = file.tensors().iter().filter_map(|info| named(&info.name)).collect();
    let data_type = if data_type == "image" { DataType::Image } else { DataType::Video };
    Batch { tensors, data_type, sample_ids: Vec::new(), bad_samples: 0 }
}

#[test]
fn a_step_is_nemo_automodels_step() {
    let folder = TempDir::new().unwrap();
    oracle("flow_matching.py", &[folder.path().to_str().unwrap(), &fresh_seed("flow matching")]);
    let cases = entries(&folder.path().join("cases.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 60, "the grid has {} cases", cases.len());
    for case in cases {
        check_case(case, folder.path());
    }
}

fn check_case(case: &Value, folder: &Path) {
    let what = format!("{} {}", case["file"], case["pipeline"]);
    let file = SafeTensors::open(folder.join(case["file"].as_str().unwrap())).unwrap();
    let expected = |name: &str| file.read(name).unwrap();
    let dtype = Dtype::ALL.iter().find(|(word, _)| *word == case["dtype"]).unwrap().1;
    let settings = settings_of(case).flow_matching.flow;
    let pipeline = FlowMatchingPipeline::new(
        settings,
        create_adapter("simple", &Default::default()).unwrap(),
        Device::Cpu,
        dtype.kind(),
    );
    let batch = batch_of(&file, case["data_type"].as_str().unwrap());
    let stream = Stream::TorchSeed(case["seed"].as_i64().unwrap());
    let options = StepOptions { global_step: 1, collect_metrics: true, check_loss: false };
    let output = pipeline.step(|inputs| Ok(formula(&inputs)), &batch, &stream, options).unwrap();
    assert_eq!(output.sampling_method, case["sampling_method"].as_str().unwrap(), "{what}");
    assert_within_one_ulp(&output.sigma, &expected("sigma"), &format!("{what}: sigma"));
    assert_within_one_ulp(&output.timesteps, &expected("timesteps"), &format!("{what}: timesteps"));
    assert_bits(&output.noise, &expected("noise"), &format!("{what}: noise"));
    if output.sigma.equal(&expected("sigma")) {
        assert_bits(
            &output.noisy_latents,
            &expected("noisy_latents"),
            &format!("{what}: noisy_latents"),
        );
    } else {
        assert_close(
            &output.noisy_latents,
            &expected("noisy_latents"),
            BFLOAT16.0,
            &format!("{what}: noisy_latents"),
        );
    }
    let tolerance = if dtype == Dtype::Float32 { LOSS } else { BFLOAT16.0 };
    assert_close(
        &output.model_pred,
        &expected("model_pred"),
        tolerance,
        &format!("{what}: model_pred"),
    );
    assert_bits(&output.target, &expected("target"), &format!("{what}: target"));
    let loss = &output.loss;
    assert_close(
        &loss.loss_weight,
        &expected("loss_weight"),
        LOSS,
        &format!("{what}: loss_weight"),
    );
    assert_close(
        &loss.unweighted_loss,
        &expected("unweighted_loss"),
        tolerance,
        &format!("{what}: unweighted_loss"),
    );
    assert_close(
        &loss.weighted_loss,
        &expected("weighted_loss"),
        tolerance,
        &format!("{what}: weighted_loss"),
    );
    assert_close(
        &loss.average_unweighted_loss,
        &expected("average_unweighted_loss"),
        tolerance,
        &format!("{what}: mean"),
    );
    assert_close(
        &loss.average_weighted_loss,
        &expected("average_weighted_loss"),
        tolerance,
        &format!("{what}: weighted mean"),
    );
    assert_eq!(
        loss.loss_mask.is_some(),
        batch.get("loss_mask").is_some(),
        "{what}: the mask is carried along"
    );
    check_metrics(&case["metrics"], &output.statistics.unwrap(), tolerance, &what);
    // A video of one frame is never image-to-video here.
    let is_still =
        output.noise.dim() == 5 && output.noise.size()[2] == 1 || output.noise.dim() == 4;
    let task_type = if is_still { "t2v" } else { case["metrics"]["task_type"].as_str().unwrap() };
    assert_eq!(output.task_type.word(), task_type, "{what}");
}

fn check_metrics(expected: &Value, row: &Tensor, tolerance: f64, what: &str) {
    let found = Statistics::from_row(&Vec::<f32>::try_from(row).unwrap());
    let pairs = [
        ("loss", found.loss),
        ("unweighted_loss", found.unweighted_loss),
        ("sigma_min", found.sigma.min),
        ("sigma_max", found.sigma.max),
        ("sigma_mean", found.sigma.mean),
        ("weight_min", found.weight.min),
        ("weight_max", found.weight.max),
        ("timestep_min", found.timesteps.min),
        ("timestep_max", found.timesteps.max),
        ("noisy_min", found.noisy_latents.min),
        ("noisy_max", found.noisy_latents.max),
    ];
    for (name, found) in pairs {
        let expected = expected[name].as_f64().unwrap();
        assert!(
            (found - expected).abs() <= tolerance * expected.abs().max(1e-6),
            "{what}: metric {name} is {found}, expected {expected}"
        );
    }
}

#[test]
fn the_free_functions_are_nemo_automodels() {
    let folder = TempDir::new().unwrap();
    oracle("flow_matching.py", &[folder.path().to_str().unwrap(), &fresh_seed("free functions")]);
    let calls = entries(&folder.path().join("time_shift_utils.json"));
    let file = SafeTensors::open(folder.path().join("time_shift_utils.safetensors")).unwrap();
    let mut counts = BTreeMap::new();
    for call in calls.as_array().unwrap() {
        let function = call["function"].as_str().unwrap();
        *counts.entry(function.to_string()).or_insert(0) += 1;
        let expected = file.read(call["output"].as_str().unwrap()).unwrap();
        let input = |name: &str| file.read(call["inputs"][name].as_str().unwrap()).unwrap();
        let found = match function {
            "time_shift" => match time_shift_arguments(&call["arguments"]) {
                Some(arguments) => time_shift(
                    &input("t"),
                    call["arguments"]["image_seq_len"].as_i64().unwrap(),
                    arguments,
                ),
                // Unknown names return their input there; here they cannot be spelled.
                None => continue,
            },
            "compute_density_for_timestep_sampling" => density(&call["arguments"]),
            "get_flow_match_loss_weight" => {
                let shift =
                    WeightShift(number(&call["arguments"], "shift", WeightShift::default().0));
                get_flow_match_loss_weight(&input("sigma"), shift)
            }
            "bsmntw_table" => {
                bsmntw_table(call["arguments"]["num_train_timesteps"].as_i64().unwrap())
            }
            "beta" => beta(&call["arguments"]),
            other => panic!("the oracle calls {other}"),
        };
        assert_within_one_ulp(&found, &expected, &call.to_string());
    }
    assert_eq!(counts.len(), 5, "{counts:?}");
}

fn number(arguments: &Value, name: &str, default: f64) -> f64 {
    arguments.get(name).map_or(default, |value| value.as_f64().unwrap())
}

fn time_shift_arguments(arguments: &Value) -> Option<TimeShift> {
    let default = TimeShift::default();
    let shift_type = match arguments.get("shift_type") {
        Some(word) => word.as_str().unwrap().parse().ok()?,
        None => default.shift_type,
    };
    Some(TimeShift {
        shift_type,
        base_shift: number(arguments, "base_shift", default.base_shift),
        max_shift: number(arguments, "max_shift", default.max_shift),
        constant: number(arguments, "constant", default.constant),
    })
}

fn density(arguments: &Value) -> Tensor {
    let default = Density::default();
    let density = Density {
        // The reference draws uniformly for any name that it does not know.
        weighting_scheme: arguments["weighting_scheme"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap_or(WeightingScheme::Uniform),
        logit_mean: number(arguments, "logit_mean", default.logit_mean),
        logit_std: number(arguments, "logit_std", default.logit_std),
        mode_scale: number(arguments, "mode_scale", default.mode_scale),
    };
    let stream = Stream::TorchSeed(arguments["seed"].as_i64().unwrap());
    compute_density_for_timestep_sampling(
        density,
        arguments["batch_size"].as_i64().unwrap(),
        &stream.open(),
    )
}

fn beta(arguments: &Value) -> Tensor {
    let stream = Stream::TorchSeed(arguments["seed"].as_i64().unwrap());
    stream.open().beta(
        number(arguments, "alpha", 2.5),
        number(arguments, "beta", 1.5),
        arguments["batch_size"].as_i64().unwrap(),
    )
}

#[test]
fn a_trained_model_predicts_and_learns_as_in_pytorch() {
    let root = TempDir::new().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_string();
    let output = format!("output_dir={}", path("run"));
    let config = tiny(&["max_steps=12", &output]);
    let run = train_in_threads(&config, &Resume::Never, 1).unwrap();
    let weights = run.join("step-00000012/model-00001-of-00001.safetensors");
    write_batch(Path::new(&path("batch.safetensors")), fresh_seed("batch").parse().unwrap());
    let pipeline = r#"{"timestep_sampling":"mode","flow_shift":2.5,"mix_uniform_ratio":0.3,"loss_weighting_scheme":"bsmntw"}"#;
    for (dtype, loss, gradient) in
        [("float32", LOSS, GRADIENT), ("bfloat16", BFLOAT16.0, BFLOAT16.1)]
    {
        let seed = fresh_seed("trained model");
        let ours = step_of_the_program(
            &run,
            dtype,
            &seed,
            &path("batch.safetensors"),
            &path("ours.safetensors"),
        );
        let arguments = [
            weights.to_str().unwrap(),
            &path("batch.safetensors"),
            &path("theirs.safetensors"),
            "--seed",
            &seed,
            "--dtype",
            dtype,
        ];
        oracle(
            "dit.py",
            &[
                &arguments,
                ["--depth", "2", "--heads", "4", "--patch", "2", "--pipeline", pipeline].as_slice(),
            ]
            .concat(),
        );
        let theirs = SafeTensors::open(path("theirs.safetensors")).unwrap();
        let mut gradients = 0;
        for info in theirs.tensors() {
            let is_gradient = info.name.starts_with("grad.");
            gradients += usize::from(is_gradient);
            let (found, expected) =
                (ours.read(&info.name).unwrap(), theirs.read(&info.name).unwrap());
            assert_close(
                &found,
                &expected,
                if is_gradient { gradient } else { loss },
                &format!("{dtype} {}", info.name),
            );
        }
        assert_eq!(gradients, 31, "every parameter has a gradient");
    }
}

fn write_batch(path: &Path, seed: u64) {
    let float = (Kind::Float, Device::Cpu);
    let draw = || (Tensor::randn([5, 1, 8, 12], float), Tensor::randn([5, 3, 10], float));
    let (latents, text) = Key::new(seed, Purpose::Test).seeded(draw);
    let mut file = std::fs::File::create(path).unwrap();
    let metadata = BTreeMap::from([("data_type".to_string(), "image".to_string())]);
    safetensors::write(
        &mut file,
        &[("image_latents", &latents), ("text_embeddings", &text)],
        &metadata,
    )
    .unwrap();
}

fn step_of_the_program(
    run: &Path,
    dtype: &str,
    seed: &str,
    batch: &str,
    dump: &str,
) -> SafeTensors {
    let config: PathBuf = run.join("config.toml");
    let dtype = format!("model.dtype={dtype}");
    let overrides = [
        dtype.as_str(),
        "flow_matching.timestep_sampling=mode",
        "flow_matching.flow_shift=2.5",
        "flow_matching.mix_uniform_ratio=0.3",
        "flow_matching.use_loss_weighting=true",
        "flow_matching.loss_weighting_scheme=bsmntw",
        "flow_matching.cfg_dropout=adapter",
    ];
    let sets = overrides.into_iter().flat_map(|text| ["--set", text]);
    let fixed = [
        "step",
        "--config",
        config.to_str().unwrap(),
        "--batch",
        batch,
        "--dump",
        dump,
        "--torch-seed",
        seed,
        "--grads",
    ];
    let weights = ["--weights", run.to_str().unwrap()];
    let arguments: Vec<&str> = fixed.into_iter().chain(weights).chain(sets).collect();
    let (code, _, errors) = finish(program(&arguments));
    assert_eq!(code, 0, "{errors}");
    SafeTensors::open(dump).unwrap()
}
