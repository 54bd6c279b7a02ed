//! Tokens that no sample of a micro-batch sees are cut, a mask is left only where samples see
//! different ones, and neither changes a number.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use fm_dist::config::RunConfig;
use fm_dist::data::{Batch, DataType};
use fm_dist::files::safetensors;
use fm_dist::files::sha256::HashingWriter;
use fm_dist::flow::{CfgDropoutValue, FlowMatchingContext};
use fm_dist::nn::{Activations, Stage};
use fm_dist::parallel::{Recompute, Replica};
use fm_dist::plan::{CheckRequest, check};
use fm_dist::rng::{Key, Purpose};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::threads::training::{FLUX, HUNYUAN_VIDEO15, QWEN_IMAGE, Tiny};

const KEY: Key = Key { seed: 41, purpose: Purpose::Test, step: 0, micro_batch: 0, scope: 0 };
const MASKED: &str = "flow_matching.adapter.use_text_mask=true";

/// The model's name of a condition's tokens, the name of their mask, and the mask's key in a batch.
const CONDITIONS: [(&str, &str, &str, &str); 4] = [
    ("encoder_hidden_states", "text_mask", "text_embeddings", "text_mask"),
    ("encoder_hidden_states", "encoder_attention_mask", "text_embeddings", "text_mask"),
    ("encoder_hidden_states_2", "encoder_attention_mask_2", "text_embeddings_2", "text_mask_2"),
    ("image_embeds", "image_mask", "image_embeds", "image"),
];

/// What each sample sees of each condition: `1` is a token that it sees.
struct Case {
    text: [&'static str; 3],
    glyphs: [&'static str; 3],
    image: [bool; 3],
    /// True if no sample sees another token of the text than the others.
    alike: bool,
    /// The same of glyphs, image and text together.
    all_alike: bool,
}

const CASES: [Case; 7] = [
    Case { text: ["11100"; 3], glyphs: ["110"; 3], image: [true; 3], alike: true, all_alike: true },
    Case {
        text: ["00111"; 3],
        glyphs: ["011"; 3],
        image: [false; 3],
        alike: true,
        all_alike: true,
    },
    Case { text: ["01011"; 3], glyphs: ["101"; 3], image: [true; 3], alike: true, all_alike: true },
    Case {
        text: ["10000"; 3],
        glyphs: ["000"; 3],
        image: [false; 3],
        alike: true,
        all_alike: true,
    },
    Case {
        text: ["11111"; 3],
        glyphs: ["110", "000", "100"],
        image: [true, false, true],
        alike: true,
        all_alike: false,
    },
    Case {
        text: ["11000", "01110", "10000"],
        glyphs: ["000", "011", "011"],
        image: [true; 3],
        alike: false,
        all_alike: false,
    },
    Case {
        text: ["00000"; 3],
        glyphs: ["000"; 3],
        image: [false; 3],
        alike: false,
        all_alike: false,
    },
];

impl Case {
    /// The mask of a condition by its key, `[3, L]` boolean.
    fn mask(&self, key: &str) -> Tensor {
        let rows = |rows: [&str; 3]| {
            let row = |row: &str| row.bytes().map(|byte| byte == b'1').collect::<Vec<_>>();
            Tensor::from_slice2(&rows.map(row))
        };
        match key {
            "text_mask" => rows(self.text),
            "text_mask_2" => rows(self.glyphs),
            _ => Tensor::from_slice(&self.image).unsqueeze(1).expand([3, 7], false),
        }
    }
}

fn config(family: &Tiny) -> RunConfig {
    let masked = if family.adapter == "hunyuan" { &[][..] } else { &[MASKED] };
    family.config(Path::new("unused"), Path::new("unused"), masked)
}

/// Three samples of the family whose masks are the case's.
fn batch(family: &Tiny, case: &Case) -> Batch {
    let mut tensors: BTreeMap<String, Tensor> = family
        .samples()
        .into_iter()
        .map(|(key, tensor)| (key.to_string(), tensor.narrow(0, 0, 3)))
        .collect();
    for key in ["text_mask", "text_mask_2"] {
        tensors.insert(key.into(), case.mask(key));
    }
    let data_type = if family.data_type == "image" { DataType::Image } else { DataType::Video };
    Batch { tensors, data_type, sample_ids: Vec::new(), bad_samples: 0 }
}

/// The inputs that the family's adapter prepares in `kind`.
fn cut(family: &Tiny, batch: &Batch, case: &Case, kind: Kind) -> Activations {
    let latents = batch.latents().unwrap().to_kind(kind);
    let sigma = Tensor::from_slice(&[0.1f32, 0.6, 0.9]);
    let context = FlowMatchingContext {
        noisy_latents: &latents,
        latents: &latents,
        timesteps: &(&sigma * 1000.0),
        sigma: &sigma,
        image_to_video: &Tensor::from_slice(&case.image),
        data_type: batch.data_type,
        device: Device::Cpu,
        dtype: kind,
        batch,
        drop: None,
        cfg_dropout_value: CfgDropoutValue::Zeros,
        guidance_scale: None,
    };
    config(family).flow_matching.adapter.build().prepare_inputs(&context).unwrap()
}

/// The same inputs with every token, and a mask of each condition.
fn whole(cut: &Activations, batch: &Batch, case: &Case, kind: Kind) -> Activations {
    let is_hunyuan = cut.find("image_embeds").is_some();
    let conditions = CONDITIONS.iter().filter(|(_, mask, ..)| is_hunyuan == (*mask != "text_mask"));
    let mut inputs = Activations::new();
    for (tokens, mask, key, mask_key) in conditions {
        inputs = inputs
            .with_constant(tokens, batch.get(key).unwrap().to_kind(kind))
            .with_constant(mask, case.mask(mask_key));
    }
    let kept = cut.names().into_iter().filter(|name| *name != "text_places");
    for name in kept {
        if inputs.find(name).is_none() {
            inputs = inputs.with_constant(name, cut.get(name).shallow_clone());
        }
    }
    inputs
}

/// A tiny model of the family, none of whose parameters is zero.
fn replica(family: &Tiny, kind: Kind) -> Replica<'static> {
    let stages = config(family).model.family.stages().unwrap();
    let mut replica = Replica::alone(stages, kind, Device::Cpu, Some(KEY));
    for (index, bucket) in replica.buckets.iter_mut().enumerate() {
        bucket.update(|master| {
            let noise = KEY.step(1).scope(index as u64).seeded(|| master.randn_like());
            *master += noise * 0.05;
        });
    }
    replica
}

/// The prediction, and each stage's flat gradients.
fn computed(replica: &Replica<'_>, inputs: Activations) -> Vec<Tensor> {
    let mut tape = replica.tape(Recompute::Never);
    let prediction = tape.forward(inputs).unwrap().get("prediction").shallow_clone();
    let loss = (prediction.square() * 0.5 + prediction.sin()).mean(prediction.kind());
    let mut tensors = vec![prediction.detach()];
    tape.backward(&loss, |_, mut pieces| {
        tensors.append(&mut pieces);
        Ok(())
    })
    .unwrap();
    tensors
}

/// The largest difference, relative to the largest number.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    assert!(a.isfinite().all().int64_value(&[]) == 1 && a.size() == b.size());
    largest(&(a - b)) / largest(b).max(f64::MIN_POSITIVE)
}

/// A masked key has the weight 0 exactly, so that only the order of sums changes, by a few units in
/// the last place of the largest number: 2.5e-7 was the most in f32, and 5e-16 in f64.
#[test]
fn cut_inputs_have_the_predictions_and_gradients_of_masked_ones() {
    for (kind, bound) in [(Kind::Float, 2e-6), (Kind::Double, 1e-14)] {
        let mut farthest = 0f64;
        for family in [FLUX, QWEN_IMAGE, HUNYUAN_VIDEO15] {
            let replica = replica(&family, kind);
            for case in &CASES {
                let batch = batch(&family, case);
                let cut = cut(&family, &batch, case, kind);
                let whole = whole(&cut, &batch, case, kind);
                let masks = ["text_mask", "encoder_attention_mask"];
                assert_eq!(masks.iter().all(|mask| cut.find(mask).is_none()), case.alike);
                let (cut, whole) = (computed(&replica, cut), computed(&replica, whole));
                assert_eq!(cut.len(), whole.len());
                for (part, (cut, whole)) in cut.iter().zip(&whole).enumerate() {
                    let far = distance(cut, whole);
                    farthest = farthest.max(far);
                    assert!(
                        far <= bound,
                        "{} {:?} part {part}: {far:e}",
                        family.adapter,
                        case.text
                    );
                }
            }
        }
        println!("{kind:?}: at most {farthest:e}");
    }
}

/// Every attention of the family reads the one mask that its first stages leave.
#[test]
fn no_mask_reaches_a_block_where_all_samples_see_the_same() {
    let stages = config(&HUNYUAN_VIDEO15).model.family.stages().unwrap();
    for case in &CASES {
        let batch = batch(&HUNYUAN_VIDEO15, case);
        let inputs = cut(&HUNYUAN_VIDEO15, &batch, case, Kind::Float);
        let first = |inputs: Activations, stage: &dyn Stage| {
            let flat = Tensor::zeros([stage.params().numel()], (Kind::Float, Device::Cpu));
            stage.forward(&stage.params().split(&flat), &inputs).carrying_constants_of(&inputs)
        };
        let blocks = stages.iter().take(2).map(AsRef::as_ref).fold(inputs, first);
        assert_eq!(blocks.find("mask").is_none(), case.all_alike, "{:?}", case.text);
        let seen = |key| case.mask(key).any_dim(0, false).sum(Kind::Int64).int64_value(&[]);
        let tokens = seen("text_mask").max(1) + seen("text_mask_2") + seen("image");
        assert_eq!(blocks.get("text").size()[1], tokens, "{:?}", case.text);
    }
}

/// The plan's line about attention for the family's random data after a change.
fn line(
    family: &Tiny,
    overrides: &[&str],
    change: impl FnOnce(&mut BTreeMap<&'static str, Tensor>),
) -> String {
    let (root, mut samples) = (TempDir::new().unwrap(), family.samples());
    change(&mut samples);
    family.write(root.path(), &samples);
    planned(family, overrides, &root)
}

fn planned(family: &Tiny, overrides: &[&str], root: &TempDir) -> String {
    let request = CheckRequest { world_size: 1, latents: None, text_tokens: 0, scaling: None };
    let plan =
        check(&family.config(root.path(), Path::new("unused"), overrides), &request).unwrap();
    let line = plan.lines().find_map(|line| line.strip_prefix("attention")).expect("a line");
    line.trim_start().to_string()
}

const WITHOUT: &str = "without a mask, so that it can be flash attention";
const WITH: &str =
    "with a mask, so not flash attention, in micro-batches whose 2 samples see different tokens";

#[test]
fn check_tells_that_no_mask_is_needed_and_why() {
    let samples = |key: &str, line: &str| {
        assert_eq!(line, format!("{WITHOUT}: {key}"));
    };
    samples("the flux adapter masks no text", &line(&FLUX, &[], |_| ()));
    let shortened = |samples: &mut BTreeMap<&'static str, Tensor>| {
        let _ = samples["text_mask"].narrow(1, 3, 2).fill_(0);
    };
    let alike = "all samples of a resolution group see the same tokens, by `text_mask` of 8 \
                 and `text_mask_2` of 8";
    let text = line(&HUNYUAN_VIDEO15, &["flow_matching.i2v_prob=0"], shortened);
    samples(&format!("{alike} of 8 samples"), &text);
    let images = line(&HUNYUAN_VIDEO15, &["flow_matching.i2v_prob=1"], shortened);
    samples(&format!("{alike} and `image_embeds` of 8 of 8 samples"), &images);
    let one = "a micro-batch of one sample has the tokens that it sees";
    samples(one, &line(&HUNYUAN_VIDEO15, &["data.micro_batch_size_per_gpu=1"], |_| ()));
}

#[test]
fn check_tells_where_a_mask_is_needed_and_why() {
    let told = |line: &str, why: &str| {
        let end = "with data.micro_batch_size_per_gpu = 1 there is none";
        assert_eq!(line, format!("{WITH} ({why}); {end}"));
    };
    let unequal = |key: &'static str| {
        move |samples: &mut BTreeMap<&'static str, Tensor>| {
            let _ = samples[key].get(7).narrow(0, 1, 2).fill_(0);
        }
    };
    let text = ["flow_matching.i2v_prob=0"];
    told(&line(&HUNYUAN_VIDEO15, &text, unequal("text_mask")), "their `text_mask` differs");
    told(&line(&HUNYUAN_VIDEO15, &text, unequal("text_mask_2")), "their `text_mask_2` differs");
    let qwen = line(&QWEN_IMAGE, &[MASKED], |samples| {
        let mask = Tensor::ones([8, 5], (Kind::Int64, Device::Cpu));
        let _ = mask.get(1).narrow(0, 4, 1).fill_(0);
        samples.insert("text_mask", mask);
    });
    told(&qwen, "their `text_mask` differs");
    told(&line(&HUNYUAN_VIDEO15, &[], |_| ()), "only some are image-to-video");
    let batches = ["flow_matching.i2v_prob=0.5", "parallel.seed_scope=rank"];
    assert!(line(&HUNYUAN_VIDEO15, &batches, |_| ()).starts_with(WITHOUT));
    let zeros = line(&HUNYUAN_VIDEO15, &batches, |samples| {
        let _ = samples["image_embeds"].get(3).fill_(0.0);
    });
    told(&zeros, "`image_embeds` of some are zeros");
}

/// A dataset whose texts are of five tokens and whose empty prompt is of `tokens`.
fn with_empty_prompt(tokens: i64) -> TempDir {
    let (root, mut samples) = (TempDir::new().unwrap(), QWEN_IMAGE.samples());
    samples.insert("text_mask", Tensor::ones([8, 5], (Kind::Int64, Device::Cpu)));
    QWEN_IMAGE.write(root.path(), &samples);
    let mut file = HashingWriter::new(File::create(root.path().join("empty.safetensors")).unwrap());
    let text = Tensor::ones([tokens, 12], (Kind::Float, Device::Cpu));
    let mask = Tensor::ones([tokens], (Kind::Int64, Device::Cpu));
    let tensors = [("text_embeddings", &text), ("text_mask", &mask)];
    safetensors::write(&mut file, &tensors, &BTreeMap::new()).unwrap();
    let manifest = root.path().join("dataset.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    json["empty_prompt"] = json!({"path": "empty.safetensors", "sha256": file.finish().1});
    fs::write(manifest, json.to_string()).unwrap();
    root
}

#[test]
fn check_tells_of_empty_prompts_that_meet_others_in_a_micro_batch() {
    let plan = |tokens, scope: &str, dropout: &str| {
        let usual = [MASKED, "flow_matching.cfg_dropout_value=empty_prompt", scope, dropout];
        planned(&QWEN_IMAGE, &usual, &with_empty_prompt(tokens))
    };
    let (by_rank, by_sample) = ("parallel.seed_scope=rank", "parallel.seed_scope=sample");
    let (adapter, each) =
        ("flow_matching.cfg_dropout=adapter", "flow_matching.cfg_dropout=per_sample");
    let why = "(the empty prompt has another `text_mask`)";
    for line in [plan(1, by_rank, each), plan(1, by_sample, adapter)] {
        assert!(line.starts_with(WITH) && line.contains(why), "{line}");
    }
    for line in [plan(1, by_rank, adapter), plan(5, by_rank, each)] {
        assert!(line.starts_with(WITHOUT), "{line}");
    }
}
