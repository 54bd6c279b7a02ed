//! Encodings are those of diffusers' pipelines: prompts, latents and decoded pixels of tiny random
//! ones, new ones each run. Pictures become a dataset by them, the dataset trains, and what is
//! sampled becomes pictures.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::collective::Threads;
use fm_dist::data::{DataType, Dataset, latents_key};
use fm_dist::datasets::About;
use fm_dist::datasets::encode::{EncodeRequest, encode};
use fm_dist::datasets::pictures::{BucketOptions, CaptionOptions, FrameOptions, PictureOptions};
use fm_dist::encoding::{Family, Pipeline};
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::media::{Limits, Picture, Size};
use fm_dist::rng::{Key, Purpose, Stream};
use fm_dist::run::Resume;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{LOSS, assert_close, entries, fresh_seed, oracle};
use crate::runs::{column, finish, program, train_in_threads};
use crate::threads::training::Tiny;

/// Whole bytes of random pixels, whose rounding is another in a batch of another size.
const COMPOSITION: f64 = 2e-6;

/// A pipeline of the oracle's by its name, and a model for the sizes of its tensors.
struct Case {
    name: &'static str,
    family: Family,
    model: Tiny,
    /// True if latents are drawn.
    draws: bool,
}

const fn tiny(model: &'static str, adapter: &'static str) -> Tiny {
    Tiny { model, adapter, data_type: "", keys: &[] }
}

const FLUX: Tiny = tiny(
    "[model.flux]\nin_channels = 64\nnum_layers = 1\nnum_single_layers = 1\nattention_head_dim = 16\n\
     num_attention_heads = 2\njoint_attention_dim = 24\npooled_projection_dim = 16\n\
     guidance_embeds = true\naxes_dims_rope = [4, 6, 6]\n",
    "flux",
);
const FLUX2: Tiny = tiny(
    "[model.flux2]\nin_channels = 32\nnum_layers = 1\nnum_single_layers = 1\nattention_head_dim = 16\n\
     num_attention_heads = 2\njoint_attention_dim = 48\ntimestep_guidance_channels = 32\n\
     axes_dims_rope = [4, 4, 4, 4]\n",
    "flux2",
);
const QWEN_IMAGE: Tiny = tiny(
    "[model.qwen_image]\nin_channels = 64\nout_channels = 16\nnum_layers = 1\nattention_head_dim = 16\n\
     num_attention_heads = 2\njoint_attention_dim = 16\naxes_dims_rope = [4, 6, 6]\n",
    "qwen_image",
);
const WAN: Tiny = tiny(
    "[model.wan]\nin_channels = 16\nout_channels = 16\nnum_layers = 1\nattention_head_dim = 12\n\
     num_attention_heads = 2\ntext_dim = 24\nfreq_dim = 32\nffn_dim = 48\n",
    "simple",
);
const HUNYUAN_VIDEO15: Tiny = tiny(
    "[model.hunyuan_video15]\nin_channels = 9\nout_channels = 4\nnum_layers = 1\n\
     num_refiner_layers = 1\nattention_head_dim = 16\nnum_attention_heads = 2\ntext_embed_dim = 16\n\
     text_embed_2_dim = 32\nimage_embed_dim = 16\nrope_axes_dim = [4, 6, 6]\n\
     [flow_matching.adapter]\ndefault_image_embed_shape = [4, 16]\n",
    "hunyuan",
);

impl Case {
    fn new(name: &'static str) -> Self {
        let (family, model, draws) = match name {
            "flux" => (Family::Flux, FLUX, true),
            "flux2_dev" | "flux2_klein" => (Family::Flux2, FLUX2, false),
            "qwen_image" => (Family::QwenImage, QWEN_IMAGE, true),
            "wan" => (Family::Wan, WAN, false),
            _ => (Family::HunyuanVideo15, HUNYUAN_VIDEO15, false),
        };
        Case { name, family, model, draws }
    }

    /// Makes the pipeline anew, and compares everything with it.
    fn check(&self) {
        let root = TempDir::new().unwrap();
        let (out, seed) = (root.path().to_str().unwrap(), fresh_seed(self.name));
        oracle("family_pipelines.py", &[out, &seed, "--families", self.name]);
        let folder = root.path().join(self.name);
        self.check_prompts(&folder);
        self.check_pixels(&folder);
        self.check_way(&folder, root.path());
    }

    fn pipeline(&self, folder: &Path) -> Pipeline {
        Pipeline::open(self.family, Some(&folder.join("pipeline"))).unwrap()
    }

    fn check_prompts(&self, folder: &Path) {
        let pipeline = self.pipeline(folder);
        let prompts: Vec<String> =
            serde_json::from_value(entries(&folder.join("prompts.json"))).unwrap();
        let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let expected = SafeTensors::open(folder.join("prompts.safetensors")).unwrap();
        let found = pipeline.encode_prompts(&prompts).unwrap();
        for (number, (prompt, found)) in prompts.iter().zip(&found).enumerate() {
            let layout = pipeline.prompt_shapes(prompt);
            let described: Vec<_> = layout
                .iter()
                .map(|(key, tensor)| (key, tensor.shape.clone(), tensor.kind))
                .collect();
            let made: Vec<_> =
                found.iter().map(|(key, tensor)| (key, tensor.size(), tensor.kind())).collect();
            assert_eq!(described, made, "{} prompt {number}", self.name);
            let alone = pipeline.encode_prompts(&[prompt]).unwrap().remove(0);
            for (key, tensor) in found {
                let what = format!("{} prompt {number} {key}", self.name);
                assert_close(&alone[key], tensor, COMPOSITION, &what);
                match expected.read(&format!("{number}.{key}")) {
                    Ok(expected) => assert_close(tensor, &expected, LOSS, &what),
                    Err(_) => assert_eq!(tensor.numel(), 0, "{what}"),
                }
            }
        }
    }

    fn check_pixels(&self, folder: &Path) {
        let pipeline = self.pipeline(folder);
        let expected = SafeTensors::open(folder.join("pixels.safetensors")).unwrap();
        let read = |name: &str| expected.read(name).unwrap();
        let (pixels, key) = (read("pixels"), 77);
        let found = pipeline.encode_pixels(&pixels, &[key]).unwrap();
        let latents = if self.draws { self.drawn(&read, key) } else { read("latents") };
        assert_close(&found, &latents, LOSS, &format!("{} latents", self.name));
        let shape = pipeline.latents_shape(&pixels.size()[1..]);
        assert_eq!(shape, Ok(found.size()[1..].to_vec()));
        let decoded = pipeline.decode(&read("latents")).unwrap();
        assert_close(&decoded, &read("decoded"), LOSS, &format!("{} pixels", self.name));
        let conditions = pipeline.pixel_conditions(&pixels).unwrap().remove(0);
        assert_eq!(
            conditions.keys().collect::<Vec<_>>(),
            pipeline.pixel_shapes().keys().collect::<Vec<_>>()
        );
        if let Some(found) = conditions.get("image_embeds") {
            assert_close(found, &read("image_embeds"), LOSS, &format!("{} image", self.name));
        }
        assert_eq!(conditions.is_empty(), self.name != "hunyuan_video15_images");
    }

    /// Latents from the posterior of diffusers by the draws of the key, normalized.
    fn drawn(&self, read: &dyn Fn(&str) -> Tensor, key: u64) -> Tensor {
        let stream = Stream::PerSample(vec![Key::new(0, Purpose::Encoding).scope(key)]);
        let mean = read("mean");
        let noise = stream.open().normal(0.0, 1.0, &mean.size());
        (mean + read("std") * noise - read("shift")) * read("scale")
    }

    fn request(&self, folder: &Path, pictures: &Path, out: &Path) -> EncodeRequest {
        let is_video = self.family.data_type == DataType::Video;
        EncodeRequest {
            family: self.family,
            pipeline: Some(folder.join("pipeline")),
            device: Device::Cpu,
            kind: Kind::Float,
            pictures: PictureOptions {
                folder: pictures.into(),
                frames: is_video.then_some(FrameOptions { most: 5, step: 1 }),
                captions: CaptionOptions::default(),
                masks: None,
                controls: Vec::new(),
                buckets: BucketOptions::One(Size::new(48, 32)),
                ffmpeg: None,
                limits: Limits::default(),
                most_bad: 0.2,
                jobs: 2,
            },
            out: out.into(),
            // A few rows of each sort.
            batch_tokens: 1100,
            shard_bytes: 200 << 10,
            jobs: 2,
            about: About::default(),
        }
    }

    /// Pictures or folders of frames with captions; the first are the pixels that diffusers
    /// encoded.
    fn write_pictures(&self, folder: &Path, pictures: &Path) {
        fs::create_dir_all(pictures).unwrap();
        let pixels = SafeTensors::open(folder.join("pixels.safetensors")).unwrap();
        let pixels = pixels.read("pixels").unwrap().get(0);
        let bytes = ((pixels + 1.0) * 127.5).round().to_kind(Kind::Uint8);
        for number in 0..5i64 {
            // The third and the fourth are equal.
            let bytes = (&bytes + 9 * number.min(3)).to_kind(Kind::Uint8);
            let name = format!("{number}");
            match self.family.data_type {
                DataType::Image => {
                    let path = pictures.join(format!("{name}.png"));
                    Picture::from_tensor(&bytes).write_png(&path).unwrap();
                }
                DataType::Video => {
                    let frames = pictures.join(&name);
                    fs::create_dir(&frames).unwrap();
                    for frame in 0..bytes.size()[1] {
                        let path = frames.join(format!("{frame}.png"));
                        Picture::from_tensor(&bytes.select(1, frame)).write_png(&path).unwrap();
                    }
                }
            }
            let caption = ["a cat", "a \"dog\"", "a cat", "a cow", "birds"][number as usize];
            fs::write(pictures.join(format!("{name}.txt")), caption).unwrap();
        }
    }

    /// Encodes on 1, 2 and 3 ranks, trains, samples and decodes.
    fn check_way(&self, folder: &Path, root: &Path) {
        let pictures = root.join("pictures");
        self.write_pictures(folder, &pictures);
        let made = [1, 2, 3].map(|ranks| {
            let out = root.join(format!("data-{ranks}"));
            let request = self.request(folder, &pictures, &out);
            let written = Threads::run(ranks, |world| encode(&request, world).unwrap().written);
            assert_eq!(written[0].samples, 5);
            assert!(!root.join(format!("data-{ranks}.encoded")).exists());
            contents(&out)
        });
        assert!(made[0] == made[1] && made[0] == made[2], "{}", self.name);

        let data = root.join("data-1");
        let dataset = Dataset::open(&data).unwrap();
        dataset.verify_hashes().and_then(|()| dataset.verify_numbers()).unwrap();
        let names = dataset.conditions().unwrap().expect("captions to sample from").names;
        assert_eq!(names, ["a cat", "a \"dog\"", "a cow", "birds"]);
        if !self.draws {
            let expected = SafeTensors::open(folder.join("pixels.safetensors")).unwrap();
            let found = &dataset.sample(0).unwrap()[latents_key(self.family.data_type)];
            let expected = expected.read("latents").unwrap().get(0);
            assert_close(found, &expected, LOSS, &format!("{} sample", self.name));
        }

        let sets = [
            "max_steps=2",
            "checkpoint.every_n_steps=2",
            "sampling.num_steps=2",
            "flow_matching.cfg_dropout=per_sample",
            "flow_matching.cfg_dropout_value=empty_prompt",
            "flow_matching.cfg_dropout_prob=0.5",
            // Latents of random autoencoders have any scale.
            "train.check_loss=false",
        ];
        let config = self.model.config(&data, &root.join("run"), &sets);
        let run = train_in_threads(&config, &Resume::Never, 1).unwrap();
        assert_eq!(column(&run, "loss").len(), 2);
        self.check_sampled(folder, &run, &root.join("samples.safetensors"));
    }

    fn check_sampled(&self, folder: &Path, run: &Path, out: &Path) {
        let arguments = [
            "sample",
            "--run",
            run.to_str().unwrap(),
            "--per-condition",
            "1",
            "--out",
            out.to_str().unwrap(),
        ];
        let (code, _, errors) = finish(program(&arguments));
        assert_eq!(code, 0, "{}: {errors}", self.name);
        let samples = SafeTensors::open(out).unwrap();
        let latents = samples.read("samples").unwrap();
        let pixels = self.pipeline(folder).decode(&latents).unwrap();
        let expected = SafeTensors::open(folder.join("pixels.safetensors")).unwrap();
        let shape = expected.read("pixels").unwrap().size();
        assert_eq!(pixels.size(), [&[4], &shape[1..]].concat(), "{}", self.name);
        assert!(
            pixels.isfinite().all().int64_value(&[]) == 1
                && pixels.abs().max().double_value(&[]) <= 1.0
        );
    }
}

/// Bytes of every file of a folder by name.
fn contents(folder: &PathBuf) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    files
        .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
        .collect()
}

#[test]
fn flux_is_encoded_as_diffusers_does_and_goes_the_whole_way() {
    Case::new("flux").check();
}

#[test]
fn flux2_is_encoded_as_diffusers_does_and_goes_the_whole_way() {
    Case::new("flux2_dev").check();
    Case::new("flux2_klein").check();
}

#[test]
fn qwen_image_is_encoded_as_diffusers_does_and_goes_the_whole_way() {
    Case::new("qwen_image").check();
}

#[test]
fn wan_is_encoded_as_diffusers_does_and_goes_the_whole_way() {
    Case::new("wan").check();
}

#[test]
fn hunyuan_video15_is_encoded_as_diffusers_does_and_goes_the_whole_way() {
    Case::new("hunyuan_video15").check();
    Case::new("hunyuan_video15_images").check();
}
