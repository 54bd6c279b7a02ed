//! Conditions of a dataset and of a file: what is taken, refused, and guided away from.

use std::fs::File;

use super::*;
use crate::adapter::{Arguments, create_adapter};
use crate::config::{DEFAULT, RunConfig};
use crate::data::Links;
use crate::files::safetensors::write;
use crate::model::{Dit, Wan};
use crate::sample::generate::Plan;

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn origin(tensors: &[(&str, &Tensor)], metadata: &[(&str, &str)]) -> Result<Origin> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("conditions.safetensors");
    let metadata = metadata.iter().map(|(key, word)| (key.to_string(), word.to_string())).collect();
    write(&mut File::create(&path).expect("a new file"), tensors, &metadata).expect("a sound file");
    Origin::from_file(&path, None, || Dataset::named("/no/such/dataset", Links::Inside))
}

/// Returns rows that are each filled with their own number, counted from `first`.
fn numbered(first: i64, shape: &[i64]) -> Tensor {
    let mut column = vec![1; shape.len()];
    column[0] = -1;
    Tensor::arange_start(first, first + shape[0], FLOAT).view(column.as_slice())
        + Tensor::zeros(shape, FLOAT)
}

#[test]
fn a_video_begins_with_the_frame_given_and_goes_on_with_none() {
    let (noise, frames) = (Tensor::zeros([2, 3, 5, 4, 4], FLOAT), numbered(1, &[2, 3, 1, 4, 4]));
    let tensors = [("noise", &noise), ("condition_latents", &frames)];
    let clean = origin(&tensors, &[("task_type", "i2v")])
        .expect("sound conditions")
        .clean_latents(&[1, 0])
        .expect("i2v");
    assert_eq!(clean.size(), [2, 3, 5, 4, 4]);
    assert_eq!(
        clean.select(2, 0).select(0, 0),
        Tensor::full([3, 4, 4], 2.0, FLOAT),
        "row 1 comes first"
    );
    assert_eq!(clean.narrow(2, 1, 4), Tensor::zeros([2, 3, 4, 4, 4], FLOAT));
    assert!(
        origin(&tensors, &[]).expect("sound conditions").clean_latents(&[0]).is_none(),
        "text-to-video has no such frames"
    );
    let refused = |noise: &Tensor, frames: &[(&str, &Tensor)]| {
        let tensors = [&[("noise", noise)], frames].concat();
        let origin = origin(&tensors, &[("task_type", "i2v")]).expect("sound numbers");
        origin.check_frames().expect_err("refused").to_string()
    };
    let still = Tensor::zeros([2, 3, 1, 4, 4], FLOAT);
    let whole = refused(&still, &[("condition_latents", &still)]);
    let told = "but a video of one frame would be given whole; leave task_type out";
    assert!(whole.ends_with(told), "{whole}");
    let many = refused(&noise, &[("condition_latents", &Tensor::zeros([2, 3, 6, 4, 4], FLOAT))]);
    let told = "`condition_latents` has shape [2, 3, 6, 4, 4]; expected one frame, [N, 3, 1, 4, 4]";
    assert!(many.ends_with(told), "{many}");
    let none = refused(&noise, &[]);
    assert!(
        none.ends_with("there is no `condition_latents` [N, C, 1, H, W] to begin with"),
        "{none}"
    );
    let picture = refused(&Tensor::zeros([2, 1, 8, 8], FLOAT), &[]);
    let told = "task_type is \"i2v\", which is for videos [C, F, H, W], not [1, 8, 8]";
    assert!(picture.ends_with(told), "{picture}");
}

/// The demo's configuration for texts of width 10, under guidance.
fn config(overrides: &[&str]) -> RunConfig {
    let own = ["model.dit.condition_width=10", "sampling.guidance_scale=2.0"];
    let all: Vec<String> = own.iter().chain(overrides).map(ToString::to_string).collect();
    RunConfig::read("test", DEFAULT, &all).expect("a sound configuration")
}

/// Returns the text that guidance leads the second row away from.
fn away(origin: &Origin, overrides: &[&str]) -> Result<Tensor> {
    let config = config(overrides);
    let plan = Plan::new(&config, origin, None, Device::Cpu).expect("sound conditions");
    plan.rehearse()?;
    let batch = plan.unconditional(&[1])?.expect("guidance is used");
    assert_eq!(batch.tensors["text_mask"], Tensor::ones([1, 3], FLOAT), "masks stay");
    Ok(batch.tensors["text_embeddings"].shallow_clone())
}

#[test]
fn rows_are_guided_away_from_their_negatives_or_from_what_training_puts_in_their_place() {
    let noise = Tensor::zeros([2, 1, 8, 8], FLOAT);
    let (text, mask) = (numbered(1, &[2, 3, 10]), Tensor::ones([2, 3], FLOAT));
    let negative = numbered(5, &[2, 4, 10]);
    let plain = [("noise", &noise), ("text_embeddings", &text), ("text_mask", &mask)];
    let mut dropped = origin(&plain, &[]).expect("sound conditions");
    assert_eq!(away(&dropped, &[]).expect("zeros"), Tensor::zeros([1, 3, 10], FLOAT));
    let by_empty_prompt = ["flow_matching.cfg_dropout_value='empty_prompt'"];
    let error = away(&dropped, &by_empty_prompt).expect_err("none is known").to_string();
    assert!(error.contains("add its conditions as `negative.<key>`"), "{error}");
    dropped.empty_prompt =
        vec![("empty.text_embeddings".into(), Tensor::full([2, 10], 9.0, FLOAT))];
    let found = away(&dropped, &by_empty_prompt).expect("an empty prompt");
    assert_eq!(found.narrow(1, 0, 2), Tensor::full([1, 2, 10], 9.0, FLOAT));
    assert_eq!(found.narrow(1, 2, 1), Tensor::zeros([1, 1, 10], FLOAT));

    let with_negative = [&plain[..], &[("negative.text_embeddings", &negative)]].concat();
    let guided = origin(&with_negative, &[]).expect("sound conditions");
    assert_eq!(away(&guided, &[]).expect("known"), Tensor::full([1, 4, 10], 6.0, FLOAT));
    let own = guided.batch(&[1]).tensors["text_embeddings"].shallow_clone();
    assert_eq!(own, Tensor::full([1, 3, 10], 2.0, FLOAT));
}

#[test]
fn conditions_are_as_long_as_the_empty_prompt_that_may_take_their_place() {
    let (text, mask) = (numbered(1, &[2, 3, 10]), Tensor::ones([2, 3], FLOAT));
    let conditions = [("text_embeddings", &text), ("text_mask", &mask)]
        .map(|(key, tensor)| (key.to_string(), tensor.shallow_clone()));
    let empty = [("empty.text_embeddings", vec![5, 10]), ("empty.text_mask", vec![5])]
        .map(|(name, shape)| (name.to_string(), Tensor::ones(shape, FLOAT)));
    let long = lengthened(BTreeMap::from(conditions), &empty);
    assert_eq!(long["text_embeddings"].size(), [2, 5, 10]);
    assert_eq!(long["text_embeddings"].narrow(1, 0, 3), text);
    assert_eq!(long["text_mask"].narrow(1, 3, 2), Tensor::zeros([2, 2], FLOAT));
}

#[test]
fn a_first_frame_is_refused_where_no_model_is_given_it() {
    let (noise, frame) =
        (Tensor::zeros([1, 16, 5, 4, 4], FLOAT), Tensor::zeros([1, 16, 1, 4, 4], FLOAT));
    let text = Tensor::ones([1, 3, 10], FLOAT);
    let tensors = [("noise", &noise), ("text_embeddings", &text), ("condition_latents", &frame)];
    let origin = origin(&tensors, &[("task_type", "i2v")]).expect("sound numbers");
    let refusal = |name: &str, arguments: serde_json::Value| {
        let arguments = arguments.as_object().expect("an object").clone();
        let adapter = create_adapter(name, &arguments).expect("a known one");
        origin.check(&Wan::default(), &*adapter).expect_err("refused").to_string()
    };
    let none = "adapter as it is set gives its model no first frame";
    assert!(refusal("simple", serde_json::json!({})).contains(none));
    let without = serde_json::json!({"use_condition_latents": false});
    assert!(refusal("hunyuan", without).contains(none));
    assert!(!refusal("hunyuan", serde_json::json!({})).contains(none), "it lacks a text");
}

#[test]
fn every_condition_needs_its_negative_once_one_has_it() {
    let (noise, text, pooled) = (
        Tensor::zeros([2, 1, 8, 8], FLOAT),
        Tensor::ones([2, 3, 10], FLOAT),
        Tensor::ones([2, 6], FLOAT),
    );
    let tensors = [
        ("noise", &noise),
        ("text_embeddings", &text),
        ("negative.text_embeddings", &text),
        ("pooled_prompt_embeds", &pooled),
    ];
    let (origin, adapter) = (
        origin(&tensors, &[]).expect("sound conditions"),
        create_adapter("flux", &Arguments::new()),
    );
    let error = origin
        .check(&Dit::default(), &*adapter.expect("a known one"))
        .expect_err("one negative is missing")
        .to_string();
    let expected = "holds negative conditions, but no `negative.pooled_prompt_embeds`; expected one for every condition and its mask";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn conditions_without_their_token_axis_are_refused() {
    let (noise, text) = (Tensor::zeros([2, 1, 8, 8], FLOAT), Tensor::ones([2, 10], FLOAT));
    let origin =
        origin(&[("noise", &noise), ("text_embeddings", &text)], &[]).expect("sound numbers");
    let adapter = create_adapter("simple", &Arguments::new()).expect("a known one");
    let error = origin.check(&Dit::default(), &*adapter).expect_err("no tokens").to_string();
    assert!(error.ends_with("`text_embeddings` is [10] a sample, expected [L, D]"), "{error}");
}
