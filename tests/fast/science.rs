//! Flow matching does what it says, also where it goes beyond the reference.

use std::cell::RefCell;
use std::collections::BTreeMap;

use fm_dist::adapter::{create_adapter, create_pipeline};
use fm_dist::data::{Batch, DataType};
use fm_dist::error::Result;
use fm_dist::flow::report::{StepFacts, detailed, summary};
use fm_dist::flow::{
    CfgDropout, FlowMatchingPipeline, FlowMatchingSettings, Statistics, StepOptions, StepOutput,
    TaskType,
};
use fm_dist::nn::Activations;
use fm_dist::rng::{Key, Purpose, Stream};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
const OPTIONS: StepOptions =
    StepOptions { global_step: 3, collect_metrics: true, check_loss: true };

fn batch(size: i64) -> Batch {
    let (latents, text) = Key::new(1, Purpose::Test).seeded(|| {
        (Tensor::randn([size, 2, 4, 4], FLOAT), Tensor::rand([size, 3, 5], FLOAT) + 0.5)
    });
    let tensors = BTreeMap::from([
        ("image_latents".to_string(), latents),
        ("text_embeddings".to_string(), text),
    ]);
    Batch {
        tensors,
        data_type: DataType::Image,
        sample_ids: (0..size as u64).collect(),
        bad_samples: 0,
    }
}

fn pipeline(change: impl FnOnce(&mut FlowMatchingSettings)) -> FlowMatchingPipeline {
    let mut settings = FlowMatchingSettings::default();
    change(&mut settings);
    create_pipeline("simple", &Default::default(), settings, Device::Cpu, Kind::Float).unwrap()
}

fn stream() -> Stream {
    Stream::Batch(Key::new(9, Purpose::Test))
}

/// A model that predicts zero everywhere.
fn zero(inputs: Activations) -> Result<Activations> {
    Ok(Activations::new().with("prediction", inputs.get("hidden_states").zeros_like()))
}

fn step(pipeline: &FlowMatchingPipeline, batch: &Batch) -> Result<StepOutput> {
    pipeline.step(zero, batch, &stream(), OPTIONS)
}

#[test]
fn a_mask_takes_elements_out_of_the_mean_and_only_where_asked() {
    let mut batch = batch(4);
    let mask = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 1.0]);
    batch.tensors.insert("loss_mask".into(), mask);
    let carried = step(&pipeline(|_| {}), &batch).unwrap().loss;
    assert!(carried.loss_mask.is_some());
    assert_eq!(carried.average_weighted_loss, carried.weighted_loss.mean(Kind::Float));
    let applied = step(&pipeline(|settings| settings.apply_loss_mask = true), &batch).unwrap().loss;
    let kept =
        applied.weighted_loss.index_select(0, &Tensor::from_slice(&[0i64, 3])).mean(Kind::Float);
    assert!(
        (applied.average_weighted_loss.double_value(&[]) - kept.double_value(&[])).abs() < 1e-6
    );
    batch.tensors.insert("loss_mask".into(), Tensor::ones([3], FLOAT));
    let error = step(&pipeline(|settings| settings.apply_loss_mask = true), &batch)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "batch: `loss_mask` [3] must have the latents' 4 samples");
    batch.tensors.remove("loss_mask");
    assert_eq!(
        step(&pipeline(|settings| settings.apply_loss_mask = true), &batch)
            .unwrap_err()
            .exit_code(),
        40
    );
}

/// Which samples' conditions reached the model.
fn kept_conditions(change: impl FnOnce(&mut FlowMatchingSettings), size: i64) -> Vec<bool> {
    let seen = RefCell::new(Vec::new());
    let model = |inputs: Activations| {
        let text = inputs.get("encoder_hidden_states").abs().amax([1i64, 2].as_slice(), false);
        *seen.borrow_mut() = Vec::<bool>::try_from(text.gt(0.0)).unwrap();
        zero(inputs)
    };
    pipeline(change).step(model, &batch(size), &stream(), OPTIONS).unwrap();
    seen.into_inner()
}

#[test]
fn conditions_are_dropped_sample_by_sample_with_their_probability() {
    let kept = kept_conditions(
        |settings| {
            settings.cfg_dropout = CfgDropout::PerSample;
            settings.cfg_dropout_prob = 0.25;
        },
        4000,
    );
    let dropped = kept.iter().filter(|kept| !**kept).count() as f64 / 4000.0;
    // Standard deviation sqrt(0.25 · 0.75 / 4000) = 0.0068; four of them.
    assert!((dropped - 0.25).abs() < 0.028, "{dropped}");
    assert!(
        kept_conditions(|_| {}, 100).iter().all(|kept| *kept),
        "the simple adapter drops nothing, as in the reference"
    );
}

#[test]
fn a_batch_that_does_not_fit_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Batch)| {
        let mut batch = batch(2);
        change(&mut batch);
        let error = step(&pipeline(|_| {}), &batch).unwrap_err();
        assert_eq!(error.exit_code(), 40);
        error.to_string()
    };
    assert!(
        refused(&|batch| drop(batch.tensors.remove("image_latents")))
            .contains("neither `video_latents` nor `image_latents`")
    );
    assert!(
        refused(&|batch| drop(batch.tensors.remove("text_embeddings")))
            .contains("needs `text_embeddings`")
    );
    let flat = |batch: &mut Batch| {
        drop(batch.tensors.insert("image_latents".into(), Tensor::zeros([2, 3], FLOAT)))
    };
    assert!(refused(&flat).contains("must be [B, C, H, W] or [B, C, F, H, W], found [2, 3]"));
}

#[test]
fn video_latents_win_and_videos_are_sometimes_image_to_video() {
    let mut batch = batch(2);
    batch.data_type = DataType::Video;
    batch.tensors.insert("video_latents".into(), Tensor::zeros([2, 2, 3, 4, 4], FLOAT));
    let tasks = |i2v_prob: f64| {
        let pipeline = pipeline(|settings| settings.i2v_prob = i2v_prob);
        let task = |seed: u64| {
            let stream = Stream::Batch(Key::new(seed, Purpose::Test));
            let output = pipeline.step(zero, &batch, &stream, OPTIONS).unwrap();
            assert_eq!(output.noise.size(), [2, 2, 3, 4, 4]);
            output.task_type
        };
        (0..400).map(task).filter(|task| *task == TaskType::ImageToVideo).count()
    };
    assert_eq!((tasks(0.0), tasks(1.0)), (0, 400));
    // Binomial(400, 0.3): standard deviation 9.2; four of them.
    assert!((83..=157).contains(&tasks(0.3)), "{}", tasks(0.3));
}

#[test]
fn a_loss_that_explodes_is_refused_with_its_step_and_value() {
    let explode = |value: f64| {
        move |inputs: Activations| {
            Ok(Activations::new().with("prediction", inputs.get("hidden_states") * 0.0 + value))
        }
    };
    let error = pipeline(|_| {}).step(explode(1e3), &batch(2), &stream(), OPTIONS).unwrap_err();
    assert_eq!(error.exit_code(), 41);
    assert!(error.to_string().starts_with("step 3: loss exploded: "), "{error}");
    assert!(pipeline(|_| {}).step(explode(f64::NAN), &batch(2), &stream(), OPTIONS).is_err());
    let unchecked = StepOptions { check_loss: false, ..OPTIONS };
    assert!(pipeline(|_| {}).step(explode(1e3), &batch(2), &stream(), unchecked).is_ok());
}

#[test]
fn an_unknown_adapter_names_the_available_ones() {
    let error = create_adapter("smple", &Default::default()).err().unwrap().to_string();
    assert!(error.contains("unknown `smple`; available: simple"), "{error}");
}

#[test]
fn the_logs_have_every_field_of_the_reference() {
    let pipeline = pipeline(|settings| settings.distribution.mix_uniform_ratio = 0.0);
    let output = step(&pipeline, &batch(4)).unwrap();
    let statistics =
        Statistics::from_row(&Vec::<f32>::try_from(output.statistics.unwrap()).unwrap());
    let facts = StepFacts {
        step: 3,
        sampling_method: output.sampling_method,
        shift: output.shift,
        task_type: "t2v",
        data_type: "image",
    };
    let line = summary(facts, &statistics);
    assert_eq!(line.lines().count(), 1);
    for field in ["[STEP 3] σ=[0.", " | t=[", " | noisy=[-", " | logit_normal | Loss: ", " | w=["]
    {
        assert!(line.contains(field), "{field} is not in {line}");
    }
    let block = detailed(facts, &statistics, pipeline.settings());
    for field in [
        "x = (1 - σ)·latents + σ·noise",
        "Shift: 3",
        "Size: 4",
        "mean 0.",
        "std 0.",
        "target = noise - latents",
        "w = 1 + 3·σ",
        "impact ",
    ] {
        assert!(block.contains(field), "{field} is not in\n{block}");
    }
    let expected = output.loss.average_weighted_loss.double_value(&[]);
    assert!(block.contains(&format!("weighted: {expected:.6}")), "{block}");
}
