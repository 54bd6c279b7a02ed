//! Pictures by prompts as a user meets them: from a run by `sample`, while it trains, in its report
//! and plan; what cannot be made is refused before anything is computed.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::runs::{finish, kill_at, mpirun, program, with_sets};
use crate::threads::samples::{SAMPLED, pictures, samples};

/// A folder with pictures as data, in which runs are made.
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

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn arguments(&self, command: &str, name: &str, more: &[&str]) -> Vec<String> {
        let output = format!("output_dir={}", self.path(name).display());
        let own = [self.data.as_str(), output.as_str()];
        let all = [&SAMPLED[..], &own, more].concat();
        with_sets(&[command], &all).into_iter().map(String::from).collect()
    }

    fn trains(&self, name: &str, more: &[&str]) -> String {
        let (code, _, errors) = finish(program(&words(&self.arguments("train", name, more))));
        assert_eq!(code, 0, "{errors}");
        errors
    }

    fn refused(&self, command: &str, more: &[&str]) -> String {
        let (code, _, errors) = finish(program(&words(&self.arguments(command, "refused", more))));
        assert_eq!(code, 50, "{errors}");
        errors
    }

    /// `fm-dist sample` of a run; returns its code and errors.
    fn samples(&self, run: &str, arguments: &[&str]) -> (i32, String) {
        let run = self.path(run);
        let own = ["sample", "--run", path(&run), "--steps", "2"];
        let (code, _, errors) = finish(program(&[&own[..], arguments].concat()));
        (code, errors)
    }
}

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn size(file: &Path) -> (u32, u32) {
    image::load_from_memory(&fs::read(file).unwrap()).unwrap().to_rgb8().dimensions()
}

#[test]
fn prompts_become_a_picture_each_and_one_alone_is_the_same() {
    let place = Place::new();
    place.trains("run", &["max_steps=2"]);
    let out = place.path("cat.png");
    let numbers = place.path("cat.safetensors");
    let list = place.path("prompts.jsonl");
    fs::write(&list, "{\"prompt\": \"blue\", \"seed\": 7, \"size\": \"24x16\"}\n").unwrap();
    let asked = ["--prompt", "red", "--prompt", "green", "--guidance", "2", "--negative", "grey"];
    let (code, errors) = place
        .samples("run", &[&asked[..], &["--prompts", path(&list), "--out", path(&out)]].concat());
    assert_eq!(code, 0, "{errors}");
    let picture = |index: usize| place.path(&format!("cat-{index}.png"));
    assert_eq!([0, 1, 2].map(|index| size(&picture(index))), [(16, 16), (16, 16), (24, 16)]);
    assert!(!out.exists() && !picture(3).exists());
    // The second picture's seed is the first one's and one.
    let alone = place.path("alone.png");
    let asked = ["--prompt", "green", "--guidance", "2", "--negative", "grey", "--seed", "43"];
    let (code, errors) = place.samples("run", &[&asked[..], &["--out", path(&alone)]].concat());
    assert_eq!(code, 0, "{errors}");
    assert!(fs::read(&alone).unwrap() == fs::read(picture(1)).unwrap());
    // Latents beside pictures.
    let more = ["--prompt", "red", "--per-condition", "2", "--out", path(&out), "--out"];
    let (code, errors) = place.samples("run", &[&more[..], &[path(&numbers)]].concat());
    assert_eq!(code, 0, "{errors}");
    let latents = fm_dist::files::safetensors::SafeTensors::open(&numbers).unwrap();
    assert_eq!(latents.read("samples").unwrap().size(), [2, 48, 4, 4]);
    assert_eq!(latents.read("sigmas").unwrap().size(), [3]);
}

#[test]
fn what_cannot_be_sampled_is_refused_before_anything_is_computed() {
    let place = Place::new();
    place.trains("run", &["max_steps=1", "sampling.prompts=[]"]);
    let out = place.path("a.png");
    let list = place.path("list.jsonl");
    fs::write(&list, "{\"promt\": \"a cat\"}\n").unwrap();
    let nowhere = place.path("no/a.png");
    let video = place.path("a.mp4");
    let numbers = place.path("a.safetensors");
    fs::create_dir(place.path("b-1.png")).unwrap();
    let taken = place.path("b.png");
    let cat = ["--prompt", "a cat"];
    for (arguments, code, what) in [
        (vec!["--out", path(&out)], 40, "names no conditions to generate from; give a --prompt"),
        (vec!["--prompts", path(&list), "--out", path(&out)], 40, "unknown field `promt`"),
        ([&cat[..], &["--out", path(&nowhere)]].concat(), 50, "no does not exist; make it first"),
        ([&cat[..], &["--out", path(&video)]].concat(), 50, "samples are pictures; end it in .png"),
        (
            [&cat[..], &["--per-condition", "2", "--out", path(&taken)]].concat(),
            50,
            "b-1.png: is a folder",
        ),
        ([&cat[..], &["--size", "18x16", "--out", path(&out)]].concat(), 50, "--size: "),
        ([&cat[..], &["--size", "16x16x5", "--out", path(&out)]].concat(), 50, "--size: "),
        (
            [&cat[..], &["--guidance", "1", "--negative", "a dog", "--out", path(&out)]].concat(),
            50,
            "is 1, which leaves the negative conditions unused",
        ),
        ([&cat[..], &["--size", "16", "--out", path(&out)]].concat(), 2, "WIDTHxHEIGHT"),
        (
            [&cat[..], &["--conditions", path(&numbers), "--out", path(&out)]].concat(),
            2,
            "cannot be used with",
        ),
        (vec!["--negative", "a dog", "--out", path(&out)], 2, "required arguments"),
    ] {
        let (found, errors) = place.samples("run", &arguments);
        assert_eq!(found, code, "{arguments:?}: {errors}");
        assert!(errors.contains(what), "{arguments:?}: {errors}");
    }
    assert!(!out.exists() && !video.exists());
}

#[test]
fn a_published_model_without_a_run_is_looked_for_in_its_folder() {
    let place = Place::new();
    let out = place.path("a.png");
    let sampled = |folder: &Path| {
        let arguments =
            ["sample", "--pipeline", path(folder), "--prompt", "a cat", "--out", path(&out)];
        let (code, _, errors) = finish(program(&arguments));
        assert_eq!(code, 50, "{errors}");
        errors
    };
    assert!(sampled(&place.path("none")).contains("none is no folder; expected that of a"));
    let folder = place.path("pipeline");
    fs::create_dir(&folder).unwrap();
    assert!(sampled(&folder).contains("has no transformer/, the model to generate with"));
    for name in ["transformer", "transformer_2"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    assert!(sampled(&folder).contains("has two models, transformer/ and transformer_2/"));
    fs::remove_dir(folder.join("transformer_2")).unwrap();
    assert!(sampled(&folder).contains("holds no config.json"));
}

#[test]
fn samples_are_told_in_the_log_drawn_in_the_report_and_written_for_tensorboard() {
    let place = Place::new();
    let errors = place.trains("run", &["log.tensorboard=true"]);
    for text in ["[SAMPLES 0] 3 of prompts in ", "[SAMPLES 7] 3 of prompts in "] {
        assert!(errors.contains(text), "{text}: {errors}");
    }
    let report = fs::read_to_string(place.path("run/report.html")).unwrap();
    for text in ["Samples over the run", "<th>a green picture</th>", "<th>step 0</th>"] {
        assert!(report.contains(text), "{text}");
    }
    assert_eq!(report.matches("<img alt=\"red, green, step ").count(), 4);
    let events = fs::read_dir(place.path("run/tensorboard")).unwrap().next().unwrap().unwrap();
    let events = fs::read(events.path()).unwrap();
    let tag = b"samples/1 a green picture";
    assert_eq!(events.windows(tag.len()).filter(|window| window == tag).count(), 4);
}

#[test]
fn check_plans_samples_and_refuses_what_a_run_would_refuse() {
    let place = Place::new();
    let (code, plan, errors) = finish(program(&words(&place.arguments("check", "planned", &[]))));
    assert_eq!(code, 0, "{errors}");
    for text in [
        "samples                3 prompts of 48 x 4 x 4 latents, every 3 steps",
        "  each                 3 a rank x 2 steps x 2 forwards: about as long as ",
        "  its memory ",
    ] {
        assert!(plan.contains(text), "{text}: {plan}");
    }
    for (sets, what) in [
        (&["sampling.size=[18, 16]"][..], "sampling.size: "),
        (&["sampling.size=[16]"], "sampling.size: has 1 numbers; expected [width, height] or"),
        (&["sampling.prompt=\"a cat\""], "sampling.prompts"),
        (
            &["model.dit.condition_width=10", "model.dit.in_channels=48"],
            "model.dit.condition_width",
        ),
        (
            &[
                "data.path=embedded:digits",
                "model.dit.in_channels=1",
                "model.dit.condition_width=10",
            ],
            "sampling.pipeline: the run's latents have 1 channels, and the pipeline's 48",
        ),
    ] {
        for command in ["check", "train"] {
            let errors = place.refused(command, sets);
            assert!(errors.contains(what), "{command} {sets:?}: {errors}");
        }
    }
    assert!(!place.path("refused").join("step-00000001").exists());
}

#[test]
fn a_run_that_is_killed_amid_its_samples_goes_on_as_the_unbroken_one() {
    let place = Place::new();
    let (code, _, errors) = finish(mpirun(2, &words(&place.arguments("train", "unbroken", &[]))));
    assert_eq!(code, 0, "{errors}");
    let fault = ["checkpoint.asynchronous=false", "debug.inject_fault=\"sleep@0:6:sample:60\""];
    let waiting = place.arguments("train", "killed", &fault);
    let mark: &'static str = format!("output_dir={}", place.path("killed").display()).leak();
    kill_at(mpirun(2, &words(&waiting)), "strikes at step 6", mark);
    let mut resumed = place.arguments("train", "killed", &[]);
    resumed.extend(["--resume".into(), "latest".into()]);
    let (code, _, errors) = finish(mpirun(2, &words(&resumed)));
    assert_eq!(code, 0, "{errors}");
    let (killed, unbroken) = (samples(&place.path("killed")), samples(&place.path("unbroken")));
    assert_eq!(killed.keys().collect::<Vec<_>>(), unbroken.keys().collect::<Vec<_>>());
    assert!(killed == unbroken);
}
