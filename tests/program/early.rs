//! Nothing is computed in vain: numbers that nobody could use, files that could not be written and
//! samples that could not be drawn are met before anything is computed, and limits on open files
//! stop nobody.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use fm_dist::files::safetensors;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::runs::{TINY, column, finish, mpirun, program};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A folder of data in the digits' form, one file a sample, and the arguments that train a small
/// model on it.
struct Small {
    root: TempDir,
    files: Vec<Value>,
    more: serde_json::Map<String, Value>,
    channels: i64,
    more_sets: Vec<String>,
}

impl Small {
    fn new(files: usize, channels: i64, spread: f64) -> Self {
        let mut small = Small {
            root: TempDir::new().unwrap(),
            files: Vec::new(),
            more: Default::default(),
            channels,
            more_sets: Vec::new(),
        };
        fs::create_dir(small.root.path().join("data")).unwrap();
        for index in 0..files {
            // Standard deviation 1.016 times `spread`, and no two files alike.
            let latents = Tensor::linspace(-3f64.sqrt(), 3f64.sqrt(), channels * 64, FLOAT)
                .roll([index as i64], [0])
                * spread;
            let (latents, text) =
                (latents.view([1, channels, 8, 8]), Tensor::ones([1, 1, 10], FLOAT));
            let path = format!("{index:05}.safetensors");
            small.save(&path, &[("image_latents", &latents), ("text_embeddings", &text)]);
            small.files.push(
                json!({"path": path, "group": "8x8", "samples": 1, "sha256": "0".repeat(64)}),
            );
        }
        small
    }

    fn save(&self, name: &str, tensors: &[(&str, &Tensor)]) {
        let mut file = File::create(self.root.path().join("data").join(name)).unwrap();
        safetensors::write(&mut file, tensors, &BTreeMap::new()).unwrap();
    }

    fn with_conditions(mut self, text: &Tensor) -> Self {
        self.save("conditions.safetensors", &[("text_embeddings", text)]);
        self.more.insert("conditions".into(), json!({"path": "conditions.safetensors", "names": ["a", "b"], "sha256": "0".repeat(64)}));
        self
    }

    fn with_empty_prompt(mut self, text: &Tensor) -> Self {
        self.save("empty.safetensors", &[("text_embeddings", text)]);
        self.more.insert(
            "empty_prompt".into(),
            json!({"path": "empty.safetensors", "sha256": "0".repeat(64)}),
        );
        let dropping = [
            "cfg_dropout=\"per_sample\"",
            "cfg_dropout_value=\"empty_prompt\"",
            "cfg_dropout_prob=0.5",
        ];
        self.more_sets.extend(dropping.map(|set| format!("flow_matching.{set}")));
        self
    }

    fn run(&self) -> PathBuf {
        self.root.path().join("run")
    }

    fn arguments(&self, command: &str, sets: &[&str]) -> Vec<String> {
        let mut json = json!({"format": "fm-dist dataset", "version": 1, "name": "small", "source": "a test", "licence": "CC0",
            "data_type": "image", "files": self.files});
        json.as_object_mut().unwrap().extend(self.more.clone());
        fs::write(self.root.path().join("data/dataset.json"), json.to_string()).unwrap();
        let data = format!("data.path={:?}", self.root.path().join("data"));
        let (output, channels) = (
            format!("output_dir={:?}", self.run()),
            format!("model.dit.in_channels={}", self.channels),
        );
        let own = [
            "max_steps=2",
            "data.micro_batch_size_per_gpu=4",
            "train.global_batch_size=8",
            &data,
            &output,
            &channels,
        ];
        let sets = TINY
            .iter()
            .chain(&own)
            .copied()
            .chain(self.more_sets.iter().map(String::as_str))
            .chain(sets.iter().copied());
        std::iter::once(command.to_string())
            .chain(sets.flat_map(|set| ["--set".to_string(), set.to_string()]))
            .collect()
    }

    fn command(&self, command: &str, sets: &[&str]) -> Command {
        let arguments = self.arguments(command, sets);
        program(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Code 40 and `text` from `check` and `train` alike, before there is a run folder.
    fn is_refused(&self, text: &str) {
        for command in ["check", "train"] {
            let (code, _, errors) = finish(self.command(command, &[]));
            assert!(code == 40 && errors.contains(text), "{command}: {code} {errors}");
        }
        let arguments = self.arguments("train", &[]);
        let (code, _, errors) =
            finish(mpirun(2, &arguments.iter().map(String::as_str).collect::<Vec<_>>()));
        assert!(
            code == 40 && errors.matches("fm-dist: error").count() == 1 && errors.contains(text),
            "{code} {errors}"
        );
        assert!(!self.run().exists());
    }

    fn trains(&self, sets: &[&str]) -> String {
        let (code, _, errors) = finish(self.command("train", sets));
        assert_eq!(code, 0, "{errors}");
        errors
    }
}

fn with(number: f64, shape: &[i64]) -> Tensor {
    let tensor = Tensor::full(shape, 0.1, (Kind::Double, Device::Cpu));
    let _ = tensor.flatten(0, -1).get(3).fill_(number);
    tensor
}

#[test]
fn an_empty_prompt_of_unusable_numbers_is_refused_by_file_and_tensor() {
    let text = |what: &str| {
        format!("empty.safetensors: `text_embeddings` holds numbers {what}, the first")
    };
    Small::new(8, 1, 1.0)
        .with_empty_prompt(&with(f64::NAN, &[1, 10]))
        .is_refused(&text("that are not finite: 1"));
    Small::new(8, 1, 1.0)
        .with_empty_prompt(&with(1e300, &[1, 10]))
        .is_refused(&text("beyond what float32 and bfloat16 hold: 1"));
}

#[test]
fn conditions_from_which_nothing_could_be_drawn_at_the_end_are_refused_at_the_start() {
    let text = "conditions.safetensors: `text_embeddings` holds numbers that are not finite: 1, the first at [0, 0, 3]";
    Small::new(8, 1, 1.0).with_conditions(&with(f64::INFINITY, &[2, 1, 10])).is_refused(text);
    let narrow = Small::new(8, 1, 1.0).with_conditions(&Tensor::ones([2, 1, 7], FLOAT));
    let (code, _, errors) = finish(narrow.command("train", &[]));
    assert!(
        code == 50
            && errors
                .contains("model.dit.condition_width: is 10, the data's text_embeddings have 7"),
        "{code} {errors}"
    );
    assert!(!narrow.run().exists());
    let nameless = Small::new(8, 1, 1.0).with_conditions(&Tensor::ones([2, 1, 10], FLOAT));
    nameless
        .save("conditions.safetensors", &[("text_embedding", &Tensor::ones([2, 1, 10], FLOAT))]);
    nameless.is_refused("the simple adapter needs `text_embeddings`");
}

#[test]
fn samples_that_are_no_pictures_are_not_generated_for_the_report() {
    let small = Small::new(8, 4, 1.0).with_conditions(&Tensor::ones([2, 1, 10], FLOAT));
    // So many steps that a sample would take minutes.
    let errors = small.trains(&["sampling.num_steps=10000", "sampling.per_condition=100"]);
    let said =
        "report without samples: latents [4, 8, 8] are no pictures, which have 1 or 3 channels";
    assert!(errors.contains(said) && small.run().join("report.html").exists(), "{errors}");
}

#[test]
fn files_that_could_not_be_written_are_refused_before_anything_is_read() {
    let root = TempDir::new().unwrap();
    let at = |name: &str| root.path().join(name).display().to_string();
    let refused = |arguments: &[&str], text: &str| {
        let (code, _, errors) = finish(program(arguments));
        assert!(code == 50 && errors.contains(text), "{arguments:?}: {code} {errors}");
    };
    // There is no such run: it would be the next thing to be missed.
    let sample = |outs: &[&str], text: &str| {
        let outs: Vec<&str> = outs.iter().flat_map(|out| ["--out", out]).collect();
        refused(&[&["sample", "--run", "no-such-run"], &outs[..]].concat(), text);
    };
    sample(&[&at("o.jpg")], "o.jpg must end in .png, .mp4 or .safetensors");
    sample(&[&at("o")], "o must end in .png, .mp4 or .safetensors");
    sample(&[&at("missing/o.png")], "missing does not exist; make it first");
    sample(&["/proc/o.png"], "cannot write into folder /proc");
    sample(&[&at("o.png"), &at("./o.png")], "o.png: is given twice");
    refused(
        &["export", "--run", "no-such-run", "--out", "/proc/new/folder"],
        "--out: /proc/new/folder: cannot write into folder /proc",
    );
    refused(
        &["step", "--batch", "no-such-batch", "--dump", &at("missing/d")],
        "missing does not exist; make it first",
    );
    File::create(root.path().join("b")).unwrap();
    refused(
        &["step", "--batch", &at("b"), "--dump", &at("./b")],
        "b: is what --batch reads; give another name",
    );
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no trial is left behind");
}

#[test]
fn samples_that_are_no_pictures_are_refused_as_a_picture_before_they_are_generated() {
    let small = Small::new(8, 4, 1.0).with_conditions(&Tensor::ones([2, 1, 10], FLOAT));
    small.trains(&[]);
    let (run, out) = (small.run(), small.root.path().join("o.png"));
    let arguments = [
        "sample",
        "--run",
        run.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--steps",
        "100000",
    ];
    let (code, _, errors) = finish(program(&arguments));
    assert!(
        code == 50 && errors.contains("--out: latents [4, 8, 8] are no pictures"),
        "{code} {errors}"
    );
}

#[test]
fn latents_that_look_unnormalised_are_told_once_at_the_first_step() {
    let question = "WARN step 1: latents have ";
    for (spread, told) in [
        (12.0, Some("standard deviation 12.189")),
        (1.0, None),
        (0.2, Some("standard deviation 0.203")),
    ] {
        let small = Small::new(8, 1, spread);
        let arguments = small.arguments("train", &[]);
        let (_, _, errors) =
            finish(mpirun(2, &arguments.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!(errors.matches(question).count(), usize::from(told.is_some()), "{errors}");
        assert!(told.is_none_or(|told| errors.contains(&format!("{question}{told}"))), "{errors}");
    }
}

#[test]
fn a_limit_on_open_files_below_the_number_of_data_files_changes_no_number() {
    let small = Small::new(60, 1, 1.0);
    let limited = |limit: &str| {
        let mut command = Command::new("bash");
        let plain = small.command("train", &["max_steps=12", "data.prefetch=3"]);
        command
            .args(["-c", &format!("ulimit {limit}; exec \"$@\""), "bash"])
            .arg(plain.get_program())
            .args(plain.get_args());
        let _ = fs::remove_dir_all(small.run());
        let (code, _, errors) = finish(command);
        (code, errors, if code == 0 { column(&small.run(), "loss") } else { Vec::new() })
    };
    let (code, errors, unlimited) = limited("-Sn 1024");
    assert_eq!(code, 0, "{errors}");
    // Soft limits are raised; hard ones are lived with.
    for limit in ["-Sn 46", "-Sn 20", "-n 66", "-n 46", "-n 20"] {
        let (code, errors, losses) = limited(limit);
        assert_eq!(code, 0, "ulimit {limit}: {errors}");
        assert_eq!(losses, unlimited, "ulimit {limit}");
    }
    // Here not even the run folder's own files can be opened.
    let (code, errors, _) = limited("-n 5");
    assert_eq!((code, errors.matches("fm-dist: error").count()), (52, 1), "{errors}");
    assert!(errors.contains("too many open files, this process may have 5; raise the limit before the start with ulimit -n"), "{errors}");
}

/// Checks of the data draw random numbers, for which libtorch asks for its CUDA library, once for
/// the life of a process.
#[test]
fn the_library_of_a_gpu_is_opened_before_any_number_is_drawn() {
    let command = ["train", "--set", "parallel.device=\"cuda\"", "--set", "data.path=\"nowhere\""];
    let has_driver = Path::new("/proc/driver/nvidia/version").exists();
    let (code, _, errors) = finish(program(&command));
    let (expected, words) =
        if has_driver { (40, "nowhere") } else { (52, "cannot open libtorch_cuda.so") };
    assert_eq!(code, expected, "{errors}");
    assert!(errors.contains(words), "{errors}");
}
