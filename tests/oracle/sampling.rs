//! Samples are those of diffusers' pipelines, family by family, and `fm-dist sample --conditions`
//! takes nothing for granted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use fm_dist::config::FlowSettings;
use fm_dist::files::outputs::Named;
use fm_dist::files::safetensors::{self, SafeTensors};
use fm_dist::flow::{
    FlowMatchingSettings, Guidance, Guide, ModelAdapter, NoiseLevel, NoiseLevels, SamplingSettings,
    Shift, Solver,
};
use fm_dist::lora::{self, Dialect, Facts, Family, Lora, Pair};
use fm_dist::rng::{Key, Purpose};
use fm_dist::run::Resume;
use fm_dist::sample::Scheduler;
use fm_dist::settings::{Choice, Family as _};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::exported::exported;
use super::packages::{assert_close, entries, fresh_seed, oracle};
use crate::runs::{finish, program, tiny, train_in_threads};
use crate::threads::training::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, Tiny, WAN};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
/// Timesteps of training.
const TIMESTEPS: i64 = 1000;
/// A few roundings to f32 on their side.
const SIGMAS: f64 = 1e-6;
/// Those sums through a dozen steps of a small model in f32.
const TRAJECTORY: f64 = 1e-4;

/// A family's adapter as its users configure it.
fn adapter_of(family: &str) -> (Box<dyn ModelAdapter>, FlowMatchingSettings) {
    let name = match family {
        "flux_dev" | "flux_schnell" => "flux",
        "wan" | "wan_euler" => "simple",
        "hunyuan_video" => "hunyuan",
        other => other,
    };
    let mut settings = FlowSettings::default();
    fm_dist::settings::read(&mut settings, "sampling", "", &[format!("adapter_type={name}")])
        .unwrap();
    (settings.adapter.build(), settings.flow)
}

fn levels_of(family: &str, shape: &[i64], flow_shift: f64) -> NoiseLevels {
    let (adapter, settings) = adapter_of(family);
    let settings = FlowMatchingSettings { flow_shift, ..settings };
    let levels =
        adapter.noise_levels(shape, tokens_of(family, shape), &settings, guidance_of(family));
    if family == "wan_euler" { levels.with_solver(Solver::Euler) } else { levels }
}

/// Tokens of each family's models: of patches of 2 x 2 positions, but FLUX.2's of one.
fn tokens_of(family: &str, shape: &[i64]) -> i64 {
    shape[1..].iter().product::<i64>() / if family == "flux2" { 1 } else { 4 }
}

/// schnell's models embed no guidance, whatever the adapter has at hand.
fn guidance_of(family: &str) -> Guidance {
    adapter_of(family).0.guidance(["flux_dev", "flux2"].contains(&family))
}

fn number(case: &Value, name: &str) -> f64 {
    case[name].as_f64().unwrap()
}

/// The levels of a case, and their solver.
fn followed(case: &Value) -> (Solver, Vec<NoiseLevel>) {
    let shape: Vec<i64> =
        case["shape"].as_array().unwrap().iter().map(|size| size.as_i64().unwrap()).collect();
    let levels = levels_of(case["family"].as_str().unwrap(), &shape, number(case, "flow_shift"));
    (levels.solver(), levels.of_steps(case["steps"].as_i64().unwrap(), TIMESTEPS))
}

/// Compares levels with the sigmas and the timesteps of diffusers.
fn check_levels(case: &Value, found: &[NoiseLevel], file: &SafeTensors) {
    let read = |what: &str| {
        let tensor = file.read(&format!("{}.{what}", case["name"].as_str().unwrap())).unwrap();
        Vec::<f64>::try_from(tensor.to_kind(Kind::Double)).unwrap()
    };
    let (sigmas, timesteps) = (read("sigmas"), read("timesteps"));
    assert_eq!((found.len(), found.len() - 1), (sigmas.len(), timesteps.len()), "{case}");
    for (level, expected) in found.iter().zip(sigmas) {
        let difference = (level.sigma - expected).abs();
        assert!(difference <= SIGMAS, "{case}: a level is {level:?}, expected {expected}");
    }
    // Whole numbers are the same ones.
    for (level, expected) in found.iter().zip(timesteps) {
        let difference = (level.timestep - expected).abs();
        assert!(difference <= SIGMAS * TIMESTEPS as f64, "{case}: {level:?}, expected {expected}");
    }
}

#[test]
fn noise_levels_and_trajectories_are_those_of_each_familys_pipeline() {
    let folder = TempDir::new().unwrap();
    oracle("sampling.py", &["families", folder.path().to_str().unwrap(), &fresh_seed("sampling")]);
    let file = SafeTensors::open(folder.path().join("sampling.safetensors")).unwrap();
    let cases = entries(&folder.path().join("sampling.json"));
    let mut counts = BTreeMap::new();
    for case in cases.as_array().unwrap() {
        check_levels(case, &followed(case).1, &file);
        let trajectory = case["trajectory"].as_bool().unwrap();
        if trajectory {
            check_trajectory(case, &file);
        }
        *counts.entry((case["family"].to_string(), trajectory)).or_insert(0) += 1;
    }
    assert!(counts.len() == 14 && counts.values().all(|&count| count >= 4), "{counts:?}");
}

fn check_trajectory(case: &Value, file: &SafeTensors) {
    let (name, family) = (case["name"].as_str().unwrap(), case["family"].as_str().unwrap());
    let read = |key: &str| file.read(&format!("{name}.{key}")).ok();
    let (noise, text, negative) = (read("noise").unwrap(), read("text").unwrap(), read("negative"));
    let settings = SamplingSettings {
        guidance_scale: number(case, "scale"),
        true_cfg_scale: number(case, "true_cfg_scale"),
        ..SamplingSettings::default()
    };
    let guide = Guide::new(guidance_of(family), &settings, negative.is_some()).unwrap();
    let against = negative.unwrap_or_else(|| text.zeros_like());
    let (solver, levels) = followed(case);
    let end = solver.follow(noise, &levels, |x, level| {
        let time = level.timestep / TIMESTEPS as f64;
        guide.velocity(formula(x, time, &text, guide.embedded), || {
            Ok(formula(x, time, &against, guide.embedded))
        })
    });
    assert_close(&end.unwrap(), &read("samples").unwrap(), TRAJECTORY, &case.to_string());
}

/// The oracle's stand-in for a model.
fn formula(x: &Tensor, time: f64, text: &Tensor, fed: Option<f64>) -> Tensor {
    let mut per_sample = vec![1; x.dim()];
    per_sample[0] = -1;
    let text = text.mean_dim([1i64, 2].as_slice(), false, Kind::Float).view(per_sample.as_slice());
    x.tanh() * (&text + 1.0) + text * (0.25 * time) + 0.05 * fed.unwrap_or(0.0)
}

#[test]
fn a_published_scheduler_is_followed_as_its_file_says() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().to_str().unwrap();
    oracle("sampling.py", &["schedulers", path, &fresh_seed("schedulers")]);
    let file = SafeTensors::open(folder.path().join("schedulers.safetensors")).unwrap();
    let cases = entries(&folder.path().join("schedulers.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 60);
    for case in cases {
        let own = match case["gives_levels"].as_bool().unwrap() {
            true => NoiseLevels::even(Shift::Constant(7.0)),
            false => NoiseLevels::down_to_training(7.0),
        };
        let pipeline = folder.path().join(case["name"].as_str().unwrap());
        let tokens = case["tokens"].as_i64().unwrap();
        let scheduler = Scheduler::open(&pipeline).unwrap().unwrap();
        let levels = scheduler.levels(own, None, tokens, TIMESTEPS).unwrap();
        let found = levels.of_steps(case["steps"].as_i64().unwrap(), TIMESTEPS);
        check_levels(case, &found, &file);
        assert_eq!(levels.solver().word(), case["solver"].as_str().unwrap(), "{case}");
    }
}

/// Trains a tiny family, exports it and follows it from noise under guidance, here and with
/// diffusers' pipeline.
fn check_family(family: &Tiny, pipeline: &str, guidance: &str, negative: bool, scales: &[f64]) {
    let root = TempDir::new().unwrap();
    let (run, folder) = exported(family, root.path());
    let loras = loras(&folder, root.path(), scales);
    let loras: Vec<&str> = loras.iter().flat_map(|lora| ["--lora", lora.as_str()]).collect();
    let path = |name: &str| root.path().join(name);
    let key = Key::new(fresh_seed(pipeline).parse().unwrap(), Purpose::Test);
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for (index, (name, shape)) in family.keys.iter().enumerate() {
        let size = [&[2], *shape].concat();
        let draw = |scope: u64| key.scope(scope).seeded(|| Tensor::randn(&size, FLOAT));
        let index = index as u64;
        match *name {
            "image_latents" | "video_latents" => drop(tensors.insert("noise".into(), draw(index))),
            // Text-to-video is a video without an image.
            "image_embeds" => {
                drop(tensors.insert("image_embeds".into(), Tensor::zeros(&size, FLOAT)))
            }
            mask if mask.contains("mask") => {
                if negative {
                    tensors.insert(format!("negative.{mask}"), Tensor::ones(&size, FLOAT));
                }
                drop(tensors.insert(mask.into(), Tensor::ones(&size, FLOAT)))
            }
            condition => {
                drop(tensors.insert(condition.into(), draw(index)));
                if negative {
                    drop(tensors.insert(format!("negative.{condition}"), draw(100 + index)));
                }
            }
        }
    }
    let borrowed: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write(&path("conditions.safetensors"), &borrowed, &[("data_type", family.data_type)]);
    let ours = path("ours.safetensors");
    let (code, errors) = sample(
        &run,
        &path("conditions.safetensors"),
        &ours,
        &[&["--steps", "5", "--guidance", guidance], loras.as_slice()].concat(),
    );
    assert_eq!(code, 0, "{errors}");
    let files = [folder, path("conditions.safetensors"), path("theirs.safetensors")]
        .map(|file| file.to_str().unwrap().to_string());
    let fixed = ["--steps", "5", "--guidance", guidance, "--shift", "3"];
    oracle(
        "sampling.py",
        &[
            &["exported", pipeline],
            files.each_ref().map(String::as_str).as_slice(),
            &fixed,
            loras.as_slice(),
        ]
        .concat(),
    );
    assert_close(
        &read(&ours, "sigmas"),
        &read(&path("theirs.safetensors"), "sigmas"),
        SIGMAS,
        pipeline,
    );
    assert_close(
        &read(&ours, "samples"),
        &read(&path("theirs.safetensors"), "samples"),
        TRAJECTORY,
        pipeline,
    );
}

#[test]
fn flux_is_sampled_as_by_its_pipeline() {
    check_family(&FLUX, "flux_dev", "3.5", false, &[]);
}

#[test]
fn flux2_is_sampled_as_by_its_pipeline() {
    check_family(&FLUX2, "flux2", "4", false, &[]);
}

#[test]
fn qwen_image_is_sampled_as_by_its_pipeline() {
    check_family(&QWEN_IMAGE, "qwen_image", "4", true, &[]);
}

#[test]
fn wan_is_sampled_as_by_its_pipeline() {
    check_family(&WAN, "wan", "5", true, &[]);
}

#[test]
fn hunyuan_video15_is_sampled_as_by_its_pipeline() {
    check_family(&HUNYUAN_VIDEO15, "hunyuan_video", "6", true, &[]);
}

#[test]
fn several_loras_are_added_as_by_diffusers() {
    check_family(&FLUX, "flux_dev", "3.5", false, &[0.7, -0.4]);
    check_family(&HUNYUAN_VIDEO15, "hunyuan_video", "6", true, &[1.0, 0.5, 2.0]);
}

/// Random adapters of a folder's model in diffusers' dialect, as `FILE:SCALE`: each changes other
/// modules, and most modules are changed by several.
fn loras(model: &Path, folder: &Path, scales: &[f64]) -> Vec<String> {
    let model = fm_dist::model::read_folder(model).unwrap();
    let family = Family::parse(model.name()).unwrap();
    let stages = model.stages().unwrap();
    let infos = stages.iter().flat_map(|stage| stage.params().linears());
    let linears = lora::linears(infos.map(|info| (info.name.as_str(), info.shape.as_slice())));
    let key = Key::new(fresh_seed("loras").parse().unwrap(), Purpose::Test);
    let write = |(number, scale): (usize, &f64)| {
        let rank = 2 + number as i64;
        let pair = |(index, (name, [outputs, inputs])): (usize, (&String, &[i64; 2]))| {
            let random = |shape: [i64; 2]| Tensor::randn(shape, FLOAT) / (*inputs as f64).sqrt();
            let draw = || (random([rank, *inputs]), random([*outputs, rank]));
            let (a, b) = key.scope((1000 * number + index) as u64).seeded(draw);
            let is_left_out = index % 4 == number;
            (!is_left_out).then(|| (name.clone(), Pair { a, b, alpha: 3.0, magnitude: None }))
        };
        let pairs = linears.iter().enumerate().filter_map(pair).collect();
        let path = folder.join(format!("lora-{number}.safetensors"));
        let out = Named { argument: "--out", path: &path };
        let lora = Lora { pairs, facts: Facts::default() };
        lora::write(&lora, family, Dialect::Diffusers, out).unwrap();
        format!("{}:{scale}", path.display())
    };
    scales.iter().enumerate().map(write).collect()
}

/// A digits run of a few steps: its folder, which lives as long as the first value.
fn trained() -> (TempDir, PathBuf) {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let config =
        tiny(&["max_steps=12", "flow_matching.flow_shift=2", "sampling.guidance_scale=1", &output]);
    let run = train_in_threads(&config, &Resume::Never, 1).unwrap();
    (root, run)
}

fn write(path: &Path, tensors: &[(&str, &Tensor)], metadata: &[(&str, &str)]) {
    let metadata = metadata.iter().map(|(key, word)| (key.to_string(), word.to_string())).collect();
    safetensors::write(&mut File::create(path).unwrap(), tensors, &metadata).unwrap();
}

/// Runs `fm-dist sample` on the run with conditions from `path`; its exit code and standard error.
fn sample(run: &Path, conditions: &Path, out: &Path, more: &[&str]) -> (i32, String) {
    let (run, conditions, out) =
        (run.to_str().unwrap(), conditions.to_str().unwrap(), out.to_str().unwrap());
    let fixed = ["sample", "--run", run, "--conditions", conditions, "--out", out];
    let (code, _, errors) = finish(program(&[&fixed, more].concat()));
    (code, errors)
}

fn read(path: &Path, key: &str) -> Tensor {
    SafeTensors::open(path).unwrap().read(key).unwrap()
}

#[test]
fn a_trained_model_is_followed_as_by_diffusers_scheduler() {
    let (root, run) = trained();
    let path = |name: &str| root.path().join(name);
    let draw = || {
        (
            Tensor::randn([3, 1, 8, 12], FLOAT),
            Tensor::randn([3, 2, 10], FLOAT),
            Tensor::randn([3, 4, 10], FLOAT),
        )
    };
    let (noise, text, negative) =
        Key::new(fresh_seed("trajectory").parse().unwrap(), Purpose::Test).seeded(draw);
    let both =
        [("noise", &noise), ("text_embeddings", &text), ("negative.text_embeddings", &negative)];
    for given in [&both[..], &both[..2]] {
        write(&path("conditions.safetensors"), given, &[("data_type", "image")]);
        let ours = path("ours.safetensors");
        let (code, errors) = sample(
            &run,
            &path("conditions.safetensors"),
            &ours,
            &["--steps", "6", "--guidance", "2.5"],
        );
        assert_eq!(code, 0, "{errors}");
        let model = run.join("step-00000012/model-00001-of-00001.safetensors");
        let files = [&model, &path("conditions.safetensors"), &path("theirs.safetensors")]
            .map(|file| file.to_str().unwrap().to_string());
        let fixed =
            ["--steps", "6", "--guidance", "2.5", "--shift", "2", "--heads", "4", "--patch", "2"];
        oracle(
            "sampling.py",
            &[&["digits"], files.each_ref().map(String::as_str).as_slice(), &fixed].concat(),
        );
        assert_close(
            &read(&ours, "samples"),
            &read(&path("theirs.safetensors"), "samples"),
            TRAJECTORY,
            "samples",
        );
        assert_close(
            &read(&ours, "sigmas"),
            &read(&path("theirs.safetensors"), "sigmas"),
            SIGMAS,
            "sigmas",
        );
    }
}

#[test]
fn a_file_of_conditions_needs_no_dataset_where_it_says_the_shape() {
    let (root, run) = trained();
    let (conditions, out) =
        (root.path().join("conditions.safetensors"), root.path().join("out.safetensors"));
    let draw = || (Tensor::randn([2, 1, 4, 6], FLOAT), Tensor::randn([2, 1, 10], FLOAT));
    let (noise, text) = Key::new(1, Purpose::Test).seeded(draw);
    write(&conditions, &[("text_embeddings", &text)], &[]);
    let (code, errors) = sample(&run, &conditions, &out, &["--per-condition", "3"]);
    assert_eq!(
        (code, read(&out, "samples").size()),
        (0, vec![6, 1, 8, 8]),
        "the dataset's shape, {errors}"
    );
    let config = fs::read_to_string(run.join("config.toml")).unwrap();
    fs::write(run.join("config.toml"), config.replace("embedded:digits", "/no/such/dataset"))
        .unwrap();
    let (code, errors) = sample(&run, &conditions, &out, &[]);
    assert_eq!(code, 50, "{errors}");
    assert!(
        errors.contains("--shape: ")
            && errors.contains("holds no `noise`")
            && errors.contains("/no/such/dataset"),
        "{errors}"
    );
    let (code, errors) =
        sample(&run, &conditions, &out, &["--shape", "1,4,6", "--shift", "3", "--steps", "4"]);
    assert_eq!((code, read(&out, "samples").size()), (0, vec![2, 1, 4, 6]), "{errors}");
    assert!(
        (read(&out, "sigmas").double_value(&[2]) - 0.75).abs() < SIGMAS,
        "a shift of 3 is the one asked for"
    );
    write(&conditions, &[("text_embeddings", &text), ("noise", &noise)], &[]);
    let picture = root.path().join("out.png");
    let (code, errors) = sample(&run, &conditions, &picture, &["--out", out.to_str().unwrap()]);
    assert_eq!((code, read(&out, "samples").size()), (0, vec![2, 1, 4, 6]), "{errors}");
    assert!(picture.exists());
}

/// A trained run that is given one unfit file of conditions after another.
struct Refusals {
    root: TempDir,
    run: PathBuf,
}

impl Refusals {
    fn new() -> Self {
        let (root, run) = trained();
        Refusals { root, run }
    }

    /// Code 40, the file and `text` for these tensors and metadata.
    fn file(&self, tensors: &[(&str, &Tensor)], metadata: &[(&str, &str)], text: &str) {
        self.call(tensors, metadata, &[], 40, &format!("conditions.safetensors: {text}"));
    }

    fn call(
        &self,
        tensors: &[(&str, &Tensor)],
        metadata: &[(&str, &str)],
        more: &[&str],
        expected: i32,
        text: &str,
    ) {
        let path = self.root.path().join("conditions.safetensors");
        write(&path, tensors, metadata);
        let (code, errors) =
            sample(&self.run, &path, &self.root.path().join("out.safetensors"), more);
        assert_eq!(code, expected, "{text}: {errors}");
        assert!(errors.contains(text), "{text:?} is not in {errors}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused_with_file_key_and_expectation() {
    let refusals = Refusals::new();
    let (text, noise) = (Tensor::ones([2, 3, 10], FLOAT), Tensor::zeros([2, 1, 8, 8], FLOAT));
    let (given, started) = (("text_embeddings", &text), ("noise", &noise));
    let refused = |tensors: &[(&str, &Tensor)], text: &str| refusals.file(tensors, &[], text);
    refused(&[], "holds no tensors; expected conditions [N, …] under the adapter's keys");
    refused(&[started], "the simple adapter needs `text_embeddings`");
    let rows = Tensor::ones([3, 3, 10], FLOAT);
    refused(
        &[started, ("text_embeddings", &rows)],
        "`text_embeddings` has shape [3, 3, 10]; expected 2 rows as in `noise`",
    );
    let flat = Tensor::ones([2, 10], FLOAT);
    refused(&[("text_embeddings", &flat)], "`text_embeddings` is [10] a sample, expected [L, D]");
    let broken = Tensor::full([2, 3, 10], f64::NAN, FLOAT);
    refused(&[("text_embeddings", &broken)], "`text_embeddings` holds numbers that are not finite");
    refused(
        &[given, ("noise", &text)],
        "`noise` has shape [2, 3, 10]; expected [N, C, H, W] or [N, C, F, H, W]",
    );
    refused(
        &[given, started, ("negative.text", &text)],
        "holds `negative.text`, but no `text` that it is the counterpart of",
    );
    let narrow = Tensor::ones([2, 3, 7], FLOAT);
    let unlike_model = "conditions.safetensors: model.dit.condition_width: is 10, the data's text_embeddings have 7";
    refusals.call(&[("text_embeddings", &narrow)], &[], &[], 50, unlike_model);
    let video = Tensor::zeros([2, 1, 2, 8, 8], FLOAT);
    let no_video = "conditions.safetensors: model.dit.patch_size: takes latents [C, H, W], the data have [1, 2, 8, 8]";
    refusals.call(&[given, ("noise", &video)], &[], &[], 50, no_video);
    let (code, errors) = sample(
        &refusals.run,
        Path::new("/no/such.safetensors"),
        &refusals.root.path().join("out.safetensors"),
        &[],
    );
    assert!(code == 40 && errors.contains("/no/such.safetensors"), "{errors}");
}

#[test]
fn metadata_and_arguments_that_contradict_the_file_are_refused() {
    let refusals = Refusals::new();
    let (text, noise) = (Tensor::ones([2, 3, 10], FLOAT), Tensor::zeros([2, 1, 8, 8], FLOAT));
    let video = Tensor::zeros([2, 1, 2, 8, 8], FLOAT);
    let given = ("text_embeddings", &text);
    let (picture, film) = ([given, ("noise", &noise)], [given, ("noise", &video)]);
    let no_image =
        "data_type in the metadata is \"image\", but samples of shape [1, 2, 8, 8] are \"video\"";
    refusals.file(&film, &[("data_type", "image")], no_image);
    refusals.file(
        &picture,
        &[("task_type", "v2v")],
        "task_type in the metadata is \"v2v\", expected \"t2v\" or \"i2v\"",
    );
    let no_frame =
        "task_type is \"i2v\", but the simple adapter as it is set gives its model no first frame";
    refusals.file(&picture, &[("task_type", "i2v")], no_frame);
    let negative = [given, ("negative.text_embeddings", &text)];
    let configuration = |tensors: &[(&str, &Tensor)], more: &[&str], text: &str| {
        refusals.call(tensors, &[], more, 50, text)
    };
    configuration(
        &negative,
        &[],
        "sampling.guidance_scale: is 1, which leaves the negative conditions unused",
    );
    configuration(
        &[given],
        &["--true-cfg-scale", "2"],
        "sampling.true_cfg_scale: is for families whose models embed",
    );
    configuration(&picture, &["--shape", "1,4,4"], "--shape: is [1, 4, 4], but `noise` in");
    configuration(&picture, &["--per-condition", "2"], "--per-condition: 2 would be equal");
    refusals.call(&[given], &[], &["--shape", "8,8"], 2, "expected C,H,W or C,F,H,W");
}
