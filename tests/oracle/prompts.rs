//! Prompts become pictures by whole pipelines as published, tiny and random, new ones each run:
//! from a run and while it trains, and from a pipeline's own model, which is the run that wrote it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::files::safetensors::SafeTensors;
use tch::Tensor;
use tempfile::TempDir;

use super::exported::exported;
use super::packages::{fresh_seed, oracle};
use crate::runs::{finish, program};
use crate::threads::training::Tiny;

/// Models for the oracle's pipelines, and latents of 48 x 32 pixels, or five frames of them.
const FLUX: Tiny = Tiny {
    model: "[model.flux]\nin_channels = 64\nnum_layers = 1\nnum_single_layers = 1\nattention_head_dim = 16\n\
            num_attention_heads = 2\njoint_attention_dim = 24\npooled_projection_dim = 16\n\
            guidance_embeds = true\naxes_dims_rope = [4, 6, 6]\n",
    adapter: "flux",
    data_type: "image",
    keys: &[
        ("image_latents", &[16, 4, 6]),
        ("text_embeddings", &[5, 24]),
        ("pooled_prompt_embeds", &[16]),
    ],
};
const WAN: Tiny = Tiny {
    model: "[model.wan]\nin_channels = 16\nout_channels = 16\nnum_layers = 1\nattention_head_dim = 12\n\
            num_attention_heads = 2\ntext_dim = 24\nfreq_dim = 32\nffn_dim = 48\n",
    adapter: "simple",
    data_type: "video",
    keys: &[("video_latents", &[16, 2, 4, 6]), ("text_embeddings", &[5, 24])],
};

/// A tiny run, and the oracle's pipeline of its family with the run's model as `transformer`.
struct Published {
    root: TempDir,
    run: PathBuf,
    pipeline: PathBuf,
}

impl Published {
    fn new(name: &str, family: &Tiny) -> Self {
        let root = TempDir::new().unwrap();
        let (run, transformer) = exported(family, root.path());
        let made = root.path().join("made");
        fs::create_dir(&made).unwrap();
        let seed = fresh_seed("prompts");
        oracle("family_pipelines.py", &[made.to_str().unwrap(), &seed, "--families", name]);
        let pipeline = made.join(name).join("pipeline");
        fs::rename(transformer, pipeline.join("transformer")).unwrap();
        Published { root, run, pipeline }
    }

    /// Samples two prompts; returns the latents and the bytes of the other files.
    fn samples(&self, name: &str, from: &[&str]) -> (Tensor, BTreeMap<String, Vec<u8>>) {
        let folder = self.root.path().join(format!("samples-{name}"));
        fs::create_dir(&folder).unwrap();
        let (pictures, numbers) = (folder.join("a.png"), folder.join("a.safetensors"));
        let own = ["--prompt", "a red house", "--prompt", "", "--seed", "5", "--steps", "3"];
        let pipeline = ["sample", "--pipeline", self.pipeline.to_str().unwrap()];
        let out = ["--out", pictures.to_str().unwrap(), "--out", numbers.to_str().unwrap()];
        let (code, _, errors) = finish(program(&[&pipeline[..], &own, from, &out].concat()));
        assert_eq!(code, 0, "{errors}");
        (SafeTensors::open(&numbers).unwrap().read("samples").unwrap(), files(&folder, "png"))
    }
}

fn files(folder: &Path, ending: &str) -> BTreeMap<String, Vec<u8>> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let wanted = paths.filter(|path| path.extension().is_some_and(|found| found == ending));
    let named = |path: PathBuf| {
        (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read(&path).unwrap())
    };
    wanted.map(named).collect()
}

/// On the CPU whatever this machine has.
const ON_CPU: [&str; 4] = ["--set", "parallel.device=cpu", "--set", "model.dtype=float32"];

#[test]
fn a_published_model_without_a_run_is_the_run_that_it_is_of() {
    let flux = Published::new("flux", &FLUX);
    let size = ["--size", "48x32"];
    let run = ["--run", flux.run.to_str().unwrap()];
    let (of_run, pictures) = flux.samples("run", &[&run[..], &size].concat());
    let (of_base, others) = flux.samples("base", &[&ON_CPU[..], &size].concat());
    assert_eq!(of_run.size(), [2, 16, 4, 6]);
    assert!(of_run.equal(&of_base) && pictures == others);
    assert_eq!(pictures.keys().collect::<Vec<_>>(), ["a-0.png", "a-1.png"]);
    let picture = image::load_from_memory(&pictures["a-0.png"]).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (48, 32));
    // The data's size, where none is given.
    let (usual, _) = flux.samples("usual", &run);
    assert!(usual.equal(&of_run));
    // Another seed and another guidance are another picture.
    let (guided, _) = flux.samples("guided", &[&run[..], &["--guidance", "9"]].concat());
    assert!(!guided.equal(&of_run));
    let error = |arguments: &[&str]| {
        let out = flux.root.path().join("b.png");
        let pipeline = ["sample", "--pipeline", flux.pipeline.to_str().unwrap(), "--prompt", "a"];
        let out = ["--out", out.to_str().unwrap()];
        let (code, _, errors) = finish(program(&[&pipeline[..], &out, arguments].concat()));
        assert_ne!(code, 0);
        errors
    };
    assert!(error(&ON_CPU).contains("--size: must be given: without --run"));
    let missing = "true_cfg_scale: is 1, which leaves the negative conditions unused";
    assert!(error(&[&run[..], &["--negative", "b"]].concat()).contains(missing));
    fs::remove_dir_all(flux.pipeline.join("tokenizer_2")).unwrap();
    assert!(error(&run).contains("lacks tokenizer_2/"));
}

#[test]
fn a_run_of_videos_samples_pictures_of_one_frame_while_it_trains() {
    let wan = Published::new("wan", &WAN);
    let run = ["--run", wan.run.to_str().unwrap(), "--size", "48x32", "--guidance", "3"];
    let (latents, pictures) = wan.samples("picture", &run);
    assert_eq!((latents.size(), pictures.len()), (vec![2, 16, 1, 4, 6], 2));
    let config = WAN.config(
        &wan.root.path().join("data"),
        &wan.root.path().join("sampled"),
        &[
            "max_steps=2",
            &format!("sampling.pipeline={:?}", wan.pipeline.to_str().unwrap()),
            "sampling.prompts=[\"a red house\", \"\"]",
            "sampling.every_n_steps=2",
            "sampling.num_steps=3",
            "sampling.guidance_scale=3.0",
            "sampling.size=[48, 32]",
            "seed=5",
        ],
    );
    let never = fm_dist::run::Resume::Never;
    let sampled = crate::runs::train_in_threads(&config, &never, 2).unwrap();
    let of_run = files(&sampled.join("samples/step-00000002"), "png");
    assert_eq!(of_run.len(), 2);
    // What `sample` draws from the checkpoint of the same step.
    let run = ["--run", sampled.to_str().unwrap()];
    let (_, drawn) = wan.samples("drawn", &run);
    for number in 0..2 {
        assert!(of_run[&format!("{number}.png")] == drawn[&format!("a-{number}.png")]);
    }
}
