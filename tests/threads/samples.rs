//! Samples of prompts while a run trains are the same pictures at every number of ranks and under
//! every sharding, before and after a run is broken off, and cost training nothing but time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use fm_dist::collective::Threads;
use fm_dist::encoding::{Family, Pipeline};
use fm_dist::files::safetensors;
use fm_dist::run::Resume;
use fm_dist::train::{Ending, TrainOptions, train};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::sharding::SHARDINGS;
use crate::runs::{checkpoint, column, tiny, train_in_threads};

/// Prompts and their pictures, 16 x 16 pixels of one colour each.
const CAPTIONS: [&str; 4] = ["red", "green", "blue", "grey"];

/// Overrides of a run on [`pictures`] that samples three prompts after every third step.
pub const SAMPLED: [&str; 8] = [
    "model.dit.in_channels=48",
    "model.dit.condition_width=64",
    "flow_matching.cfg_dropout_value=zeros",
    "sampling.prompts=[\"red\", \"a green picture\", \"red, green\"]",
    "sampling.every_n_steps=3",
    "sampling.guidance_scale=2",
    "max_steps=7",
    "checkpoint.every_n_steps=3",
];

/// Writes a dataset of pictures of the demo's encoding into a folder of `root`; returns its path.
pub fn pictures(root: &Path) -> PathBuf {
    let folder = root.join("data");
    fs::create_dir(&folder).unwrap();
    let pipeline = Pipeline::open(Family::Dit, None).unwrap();
    let samples = 64;
    let captions: Vec<&str> = CAPTIONS.into_iter().cycle().take(samples).collect();
    let colours = Tensor::linspace(-1.0, 1.0, 3 * samples as i64, (Kind::Float, Device::Cpu));
    let pixels = colours.view([-1, 3, 1, 1]).expand([-1, 3, 16, 16], false).contiguous();
    let latents = pipeline.encode_pixels(&pixels, &vec![0; samples]).unwrap();
    let texts = pipeline.encode_prompts(&captions).unwrap();
    let texts: Vec<&Tensor> = texts.iter().map(|text| &text["text_embeddings"]).collect();
    let texts = Tensor::stack(&texts, 0);
    let tensors = [("image_latents", &latents), ("text_embeddings", &texts)];
    let mut file = File::create(folder.join("a.safetensors")).unwrap();
    safetensors::write(&mut file, &tensors, &BTreeMap::new()).unwrap();
    let dataset = json!({
        "format": "fm-dist dataset", "version": 2, "name": "colours", "source": "a test", "licence": "CC0",
        "data_type": "image",
        "files": [{"path": "a.safetensors", "samples": samples, "group": "16x16", "sha256": "0".repeat(64)}],
    });
    fs::write(folder.join("dataset.json"), dataset.to_string()).unwrap();
    folder
}

/// A folder with the data, and the overrides of runs in it.
struct Place {
    root: TempDir,
    data: String,
}

impl Place {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let data = format!("data.path={}", pictures(root.path()).display());
        Place { root, data }
    }

    fn config(&self, name: &str, overrides: &[&str]) -> fm_dist::config::RunConfig {
        let output = format!("output_dir={}", self.root.path().join(name).display());
        tiny(&[&SAMPLED[..], &[self.data.as_str(), output.as_str()], overrides].concat())
    }

    fn run(&self, name: &str, ranks: usize, overrides: &[&str]) -> PathBuf {
        train_in_threads(&self.config(name, overrides), &Resume::Never, ranks).unwrap()
    }
}

/// Every file below the samples of a run, by its path in there.
pub fn samples(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let Ok(steps) = fs::read_dir(run.join("samples")) else { return found };
    for step in steps.map(|entry| entry.unwrap().path()) {
        for file in fs::read_dir(&step).unwrap().map(|entry| entry.unwrap().path()) {
            let name = file.strip_prefix(run.join("samples")).unwrap();
            found.insert(name.display().to_string(), fs::read(&file).unwrap());
        }
    }
    found
}

/// The names of the files of these steps.
fn names(steps: &[u64]) -> Vec<String> {
    let files = ["0.png", "1.png", "2.png", "prompts.json"];
    let of_step = |step: &u64| {
        let step = *step;
        files.map(|file| format!("step-{step:08}/{file}"))
    };
    steps.iter().flat_map(of_step).collect()
}

const DETERMINISTIC: [&str; 2] = ["parallel.deterministic=true", "parallel.seed_scope=sample"];

#[test]
fn pictures_have_equal_bytes_at_every_number_of_ranks_and_under_every_sharding() {
    let place = Place::new();
    let settings = [&DETERMINISTIC[..], &["ema.decay=0.5"]].concat();
    let expected = samples(&place.run("alone", 1, &settings));
    assert_eq!(expected.keys().cloned().collect::<Vec<_>>(), names(&[0, 3, 6, 7]));
    let picture = |step: u64, number: usize| &expected[&format!("step-{step:08}/{number}.png")];
    assert_ne!(picture(0, 0), picture(7, 0), "training changes them");
    assert_ne!(picture(7, 0), picture(7, 1), "prompts and seeds differ");
    for ranks in [2, 4] {
        for (word, sharding) in SHARDINGS {
            let name = format!("{word}-{ranks}");
            let other = place.run(&name, ranks, &[&settings[..], sharding].concat());
            assert!(samples(&other) == expected, "{name}");
        }
    }
}

#[test]
fn samples_change_nothing_of_what_is_trained() {
    let place = Place::new();
    let sampled = place.run("sampled", 2, &[]);
    let never = place.run("never", 2, &["sampling.prompts=[]"]);
    assert!(samples(&never).is_empty() && !samples(&sampled).is_empty());
    assert_eq!(checkpoint(&sampled, 7), checkpoint(&never, 7));
    assert_eq!(column(&sampled, "loss"), column(&never, "loss"));
}

#[test]
fn a_row_goes_on_where_a_run_goes_on() {
    let place = Place::new();
    let settings = [&DETERMINISTIC[..], &["checkpoint.keep_last=9"]].concat();
    let expected = samples(&place.run("unbroken", 1, &settings));
    let broken = place.run("broken", 2, &settings);
    for (ranks, missing) in [(4, false), (1, true)] {
        for step in [6, 7] {
            fs::remove_dir_all(broken.join(format!("step-{step:08}"))).unwrap();
        }
        // Samples of steps that will be done again, and half of those of the step before them.
        fs::write(broken.join("samples/step-00000006/0.png"), "of another future").unwrap();
        fs::create_dir_all(broken.join("samples/step-00000005")).unwrap();
        if missing {
            fs::remove_file(broken.join("samples/step-00000003/prompts.json")).unwrap();
            fs::write(broken.join("samples/step-00000003/1.png"), "half").unwrap();
        }
        train_in_threads(&place.config("broken", &settings), &Resume::Latest, ranks).unwrap();
        assert!(samples(&broken) == expected, "{ranks} ranks");
    }
}

#[test]
fn a_run_that_is_asked_to_stop_makes_its_samples_where_it_goes_on() {
    let place = Place::new();
    let settings = [&DETERMINISTIC[..], &["sampling.every_n_steps=1", "max_steps=3"]].concat();
    let unbroken = samples(&place.run("unbroken", 2, &settings));
    let config = place.config("stopped", &settings);
    // The time is over before the first step.
    let options = || TrainOptions { stop_at: Some(Instant::now()), ..TrainOptions::default() };
    let ended = Threads::run(2, |world| train(&config, &options(), world).unwrap());
    let (stopped, ending) = ended.into_iter().next().unwrap();
    assert_eq!(ending, Ending::Stopped);
    assert!(samples(&stopped).is_empty(), "no grace is spent on samples");
    train_in_threads(&config, &Resume::Latest, 2).unwrap();
    let mut of_later = unbroken.clone();
    of_later.retain(|name, _| !name.starts_with("step-00000000"));
    assert!(samples(&stopped) == of_later, "those before training are gone by");
}
