//! Every family trains: on two ranks the loss falls, the ranks stay equal bit for bit, and a
//! resumed run is the unbroken one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use fm_dist::commands::{StepRequest, dump_step};
use fm_dist::config::RunConfig;
use fm_dist::files::safetensors;
use fm_dist::files::sha256::HashingWriter;
use fm_dist::rng::{Key, Purpose};
use fm_dist::run::Resume;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::runs::{checkpoint, column, train_in_threads};

pub const SAMPLES: i64 = 8;

/// A family made tiny: its tables, its adapter and the shapes of one sample's tensors.
pub struct Tiny {
    pub model: &'static str,
    pub adapter: &'static str,
    pub data_type: &'static str,
    pub keys: &'static [(&'static str, &'static [i64])],
}

pub const FLUX: Tiny = Tiny {
    model: "[model.flux]\nin_channels = 16\nnum_layers = 1\nnum_single_layers = 1\nattention_head_dim = 16\nnum_attention_heads = 2\n\
            joint_attention_dim = 12\npooled_projection_dim = 10\nguidance_embeds = true\naxes_dims_rope = [4, 6, 6]\n",
    adapter: "flux",
    data_type: "image",
    keys: &[
        ("image_latents", &[4, 8, 12]),
        ("text_embeddings", &[5, 12]),
        ("pooled_prompt_embeds", &[10]),
    ],
};

pub const FLUX2: Tiny = Tiny {
    model: "[model.flux2]\nin_channels = 16\nnum_layers = 1\nnum_single_layers = 1\nattention_head_dim = 16\nnum_attention_heads = 2\n\
            joint_attention_dim = 12\ntimestep_guidance_channels = 32\naxes_dims_rope = [4, 4, 4, 4]\n",
    adapter: "flux2",
    data_type: "image",
    keys: &[("image_latents", &[16, 4, 6]), ("text_embeddings", &[5, 12])],
};

pub const QWEN_IMAGE: Tiny = Tiny {
    model: "[model.qwen_image]\nin_channels = 16\nout_channels = 4\nnum_layers = 2\nattention_head_dim = 16\nnum_attention_heads = 2\n\
            joint_attention_dim = 12\naxes_dims_rope = [4, 6, 6]\n",
    adapter: "qwen_image",
    data_type: "image",
    keys: &[("image_latents", &[4, 8, 12]), ("text_embeddings", &[5, 12])],
};

pub const WAN: Tiny = Tiny {
    model: "[model.wan]\nin_channels = 4\nout_channels = 4\nnum_layers = 2\nattention_head_dim = 12\nnum_attention_heads = 2\n\
            text_dim = 12\nfreq_dim = 32\nffn_dim = 48\n",
    adapter: "simple",
    data_type: "video",
    keys: &[("video_latents", &[4, 3, 4, 6]), ("text_embeddings", &[5, 12])],
};

pub const HUNYUAN_VIDEO15: Tiny = Tiny {
    model: "[model.hunyuan_video15]\nin_channels = 9\nout_channels = 4\nnum_layers = 1\nnum_refiner_layers = 1\nattention_head_dim = 16\n\
            num_attention_heads = 2\ntext_embed_dim = 12\ntext_embed_2_dim = 10\nimage_embed_dim = 8\nrope_axes_dim = [4, 6, 6]\n\
            [flow_matching.adapter]\ndefault_image_embed_shape = [7, 8]\n",
    adapter: "hunyuan",
    data_type: "video",
    keys: &[
        ("video_latents", &[4, 3, 4, 6]),
        ("text_embeddings", &[5, 12]),
        ("text_mask", &[5]),
        ("text_embeddings_2", &[3, 10]),
        ("text_mask_2", &[3]),
        ("image_embeds", &[7, 8]),
    ],
};

impl Tiny {
    /// Random samples under the family's keys; masks let everything through.
    pub fn samples(&self) -> BTreeMap<&'static str, Tensor> {
        let of_key = |(index, (key, shape)): (usize, &(&'static str, &'static [i64]))| {
            let size = [&[SAMPLES], *shape].concat();
            let random = || Tensor::randn(&size, (Kind::Float, Device::Cpu));
            let draw = || Key::new(3, Purpose::Test).scope(index as u64).seeded(random);
            (
                *key,
                if key.contains("mask") {
                    Tensor::ones(&size, (Kind::Int64, Device::Cpu))
                } else {
                    draw()
                },
            )
        };
        self.keys.iter().enumerate().map(of_key).collect()
    }

    /// A dataset of [`samples`](Self::samples) at `folder`.
    pub fn write_data(&self, folder: &Path) {
        self.write(folder, &self.samples());
    }

    /// A dataset of these samples, one resolution group, at `folder`.
    pub fn write(&self, folder: &Path, samples: &BTreeMap<&'static str, Tensor>) {
        fs::create_dir_all(folder).unwrap();
        let borrowed: Vec<(&str, &Tensor)> =
            samples.iter().map(|(key, tensor)| (*key, tensor)).collect();
        let mut file =
            HashingWriter::new(File::create(folder.join("samples.safetensors")).unwrap());
        let metadata = BTreeMap::from([("data_type".to_string(), self.data_type.to_string())]);
        safetensors::write(&mut file, &borrowed, &metadata).unwrap();
        let manifest = serde_json::json!({
            "format": "fm-dist dataset", "version": 1, "name": "random", "source": "a test", "licence": "CC0", "data_type": self.data_type,
            "files": [{"path": "samples.safetensors", "samples": SAMPLES, "group": "one", "sha256": file.finish().1}],
        });
        fs::write(folder.join("dataset.json"), manifest.to_string()).unwrap();
    }

    /// Thirty steps of two samples a rank on the data at `data`, into `output`.
    pub fn config(&self, data: &Path, output: &Path, overrides: &[&str]) -> RunConfig {
        self.config_on(&format!("path = {data:?}\nmicro_batch_size_per_gpu = 2"), output, overrides)
    }

    /// Thirty steps with this text of `[data]`, into `output`.
    pub fn config_on(&self, data: &str, output: &Path, overrides: &[&str]) -> RunConfig {
        let text = format!(
            "max_steps = 30\noutput_dir = {output:?}\n{}[flow_matching]\nadapter_type = \"{}\"\n[data]\n{data}\n\
             [optimizer.adamw]\nlr = 3e-3\n[checkpoint]\nevery_n_steps = 15\n[log]\nprogress = \"never\"\n\
             [parallel]\nseed_scope = \"sample\"\n",
            self.model, self.adapter
        );
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        RunConfig::read(self.adapter, &text, &overrides).unwrap()
    }

    /// Loss, prediction and gradients of one step, as bytes.
    fn step(&self, root: &Path, overrides: &[&str]) -> Vec<u8> {
        let (data, dump) = (root.join("data"), root.join("dump.safetensors"));
        let batch = data.join("samples.safetensors");
        let request = StepRequest {
            batch,
            dump: dump.clone(),
            weights: None,
            torch_seed: Some(11),
            grads: true,
            operators: false,
        };
        dump_step(&self.config(&data, &root.join("unused"), overrides), &request).unwrap();
        fs::read(dump).unwrap()
    }

    /// Every save compares the ranks' parameters bit for bit and refuses a difference, so that a
    /// run that ends has equal ranks.
    fn check_training(&self) {
        let root = TempDir::new().unwrap();
        let data = root.path().join("data");
        self.write_data(&data);
        let config = |name: &str| self.config(&data, &root.path().join(name), &[]);
        let unbroken = train_in_threads(&config("unbroken"), &Resume::Never, 2).unwrap();
        let losses: Vec<f64> =
            column(&unbroken, "loss").into_iter().map(|(_, loss)| loss).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses[..6]), mean(&losses[24..]));
        assert!(last < 0.8 * first, "{}: the loss went from {first} to {last}", self.adapter);
        let resumed = train_in_threads(&config("resumed"), &Resume::Never, 2).unwrap();
        fs::remove_dir_all(resumed.join("step-00000030")).unwrap();
        train_in_threads(&config("resumed"), &Resume::Latest, 2).unwrap();
        assert_eq!(checkpoint(&unbroken, 30), checkpoint(&resumed, 30), "{}", self.adapter);
    }
}

#[test]
fn recomputation_changes_no_bit_of_any_gradient() {
    for family in [FLUX, FLUX2, QWEN_IMAGE, WAN, HUNYUAN_VIDEO15] {
        let root = TempDir::new().unwrap();
        family.write_data(&root.path().join("data"));
        for dtype in ["model.dtype=float32", "model.dtype=bfloat16"] {
            // Of both tasks where a family has them, each sample by itself.
            let step = |recompute| {
                family.step(
                    root.path(),
                    &[
                        dtype,
                        recompute,
                        "flow_matching.task_scope=sample",
                        "flow_matching.i2v_prob=0.5",
                    ],
                )
            };
            let (kept, again) =
                (step("parallel.recompute=never"), step("parallel.recompute=always"));
            assert!(kept == again, "{} {dtype}", family.adapter);
        }
    }
}

#[test]
fn flux_trains() {
    FLUX.check_training();
}

#[test]
fn flux2_trains() {
    FLUX2.check_training();
}

#[test]
fn qwen_image_trains() {
    QWEN_IMAGE.check_training();
}

#[test]
fn wan_trains() {
    WAN.check_training();
}

#[test]
fn hunyuan_video15_trains() {
    HUNYUAN_VIDEO15.check_training();
}
