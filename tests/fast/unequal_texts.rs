//! Texts of unequal length: what a run is told about their padding before it starts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use fm_dist::data::Links;
use fm_dist::datasets::About;
use fm_dist::datasets::index::{IndexRequest, index};
use fm_dist::error::Result;
use fm_dist::files::safetensors::write;
use fm_dist::plan::{CheckRequest, check};
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};

use crate::threads::training::{FLUX, QWEN_IMAGE, Tiny, WAN};

const LENGTHS: [i64; 8] = [5, 9, 1, 12, 3, 8, 2, 7];

type Samples = Vec<(&'static str, Tensor)>;

fn random(size: &[i64]) -> Tensor {
    let draw = || Tensor::randn(size, (Kind::Float, Device::Cpu));
    Key::new(1, Purpose::Test).seeded(draw)
}

/// Eight samples for the tiny families of images.
fn images() -> Samples {
    vec![
        ("image_latents", random(&[8, 4, 8, 12])),
        ("pooled_prompt_embeds", random(&[8, 10])),
        ("text_embeddings", random(&[LENGTHS.iter().sum(), 12])),
        ("text_embeddings.lengths", Tensor::from_slice(&LENGTHS)),
    ]
}

/// Eight videos with texts of one length, as NeMo AutoModel stores them, or of unequal lengths.
fn videos(tokens: Option<i64>) -> Samples {
    let mut tensors = vec![("video_latents", random(&[8, 4, 3, 4, 6]))];
    match tokens {
        Some(tokens) => tensors.push(("text_embeddings", random(&[8, tokens, 12]))),
        None => tensors.extend(images().into_iter().skip(2)),
    }
    tensors
}

fn write_data(folder: &Path, tensors: &Samples) {
    fs::create_dir_all(folder).unwrap();
    let borrowed: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(key, tensor)| (*key, tensor)).collect();
    let mut file = File::create(folder.join("a.safetensors")).unwrap();
    write(&mut file, &borrowed, &BTreeMap::new()).unwrap();
    let (folder, about) = (folder.into(), About::default());
    index(&IndexRequest { folder, links: Links::Inside, about }).unwrap();
}

fn plan(family: &Tiny, sets: &[&str]) -> Result<String> {
    plan_of(family, &images(), sets)
}

fn plan_of(family: &Tiny, samples: &Samples, sets: &[&str]) -> Result<String> {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    write_data(&data, samples);
    let config = family.config(&data, &root.path().join("run"), sets);
    check(&config, &CheckRequest { world_size: 1, latents: None, text_tokens: 0, scaling: None })
}

#[test]
fn padding_that_a_model_attends_to_is_told() {
    let text = plan(&QWEN_IMAGE, &[]).unwrap();
    let warning = "texts have unequal lengths and the qwen_image adapter reads no text_mask: the \
                   model attends to their padding, and a sample's loss depends on the others of its \
                   micro-batch";
    assert!(text.contains(warning) && text.contains("16 text tokens"), "{text}");
    let fixed = plan(&QWEN_IMAGE, &["data.text_tokens=24"]).unwrap();
    assert!(
        fixed.contains("padded with zeros to 24 tokens") && fixed.contains("24 text tokens"),
        "{fixed}"
    );
    assert!(!fixed.contains("`text_mask`"), "it is not in the data: {fixed}");
    let usual = plan(&FLUX, &[]).unwrap();
    assert!(usual.contains("padded with zeros to 512 tokens"), "as the pipeline does: {usual}");
}

#[test]
fn padding_behind_a_mask_is_no_matter() {
    for family in [&QWEN_IMAGE, &FLUX] {
        let text = plan(family, &["flow_matching.adapter.use_text_mask=true"]).unwrap();
        assert!(!text.contains("texts have unequal lengths"), "{text}");
        assert!(text.contains("their `text_mask` differs"), "attention will need a mask: {text}");
        assert!(text.contains("16 text tokens"), "{text}");
    }
}

#[test]
fn wan_keeps_the_cache_s_length_and_pads_unequal_texts_as_its_pipeline() {
    let kept = plan_of(&WAN, &videos(Some(226)), &[]).unwrap();
    assert!(kept.contains("226 text tokens") && !kept.contains("padded"), "{kept}");
    let padded = plan_of(&WAN, &videos(None), &[]).unwrap();
    assert!(padded.contains("512 text tokens"), "{padded}");
    assert!(padded.contains("texts have unequal lengths and the simple adapter reads no text_mask: they are padded with zeros to 512 tokens"), "{padded}");
    let set = plan_of(&WAN, &videos(None), &["data.text_tokens=16"]).unwrap();
    assert!(set.contains("padded with zeros to 16 tokens"), "{set}");
    let further = plan_of(&WAN, &videos(Some(226)), &["data.text_tokens=300"]).unwrap();
    assert!(further.contains("300 text tokens"), "{further}");
    assert!(further.contains("texts of 226 tokens are padded with zeros to 300"), "{further}");
}

#[test]
fn texts_get_the_512_rows_without_which_wan_does_not_attend_to_images() {
    let sets = [
        "model.wan.in_channels=8",
        "model.wan.image_dim=8",
        "model.wan.added_kv_proj_dim=24",
        "flow_matching.adapter.image_conditioning=true",
    ];
    for tokens in [Some(226), None, Some(512)] {
        let mut samples = videos(tokens);
        samples.push(("condition_latents", random(&[8, 4, 3, 4, 6])));
        samples.push(("image_embeds", random(&[8, 3, 8])));
        let text = plan_of(&WAN, &samples, &sets).unwrap();
        assert!(text.contains("512 text tokens"), "{text}");
        let told = text.contains("texts of 226 tokens are padded with zeros to 512");
        assert_eq!(told, tokens == Some(226), "{text}");
    }
}

#[test]
fn a_text_longer_than_its_padding_is_refused() {
    let error = plan(&QWEN_IMAGE, &["data.text_tokens=8"]).unwrap_err();
    assert_eq!(error.exit_code(), 40);
    assert!(
        error.to_string().contains("has a text of 12 tokens, and data.text_tokens pads"),
        "{error}"
    );
}
