//! Masks, conditions and tasks of a sample are its own: what one big batch gives, every cut of it
//! into micro-batches and ranks gives.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fm_dist::commands::{StepRequest, dump_step};
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::plan::{CheckRequest, check};
use fm_dist::run::Resume;
use fm_dist::telemetry::metrics;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::training::{FLUX, HUNYUAN_VIDEO15, QWEN_IMAGE, SAMPLES, Tiny, WAN};
use crate::runs::{checkpoint, column, train_in_threads};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
/// Sums of f32 numbers in another order, relative.
const ROUNDING: f64 = 2e-5;

type Samples = BTreeMap<&'static str, Tensor>;

/// A dataset of a family in a folder of its own, and runs on it whose global batch is the whole
/// dataset.
struct Bench {
    root: TempDir,
    family: Tiny,
}

impl Bench {
    fn new(family: Tiny, change: impl FnOnce(&mut Samples)) -> Self {
        let (root, mut samples) = (TempDir::new().unwrap(), family.samples());
        change(&mut samples);
        family.write(&root.path().join("data"), &samples);
        Bench { root, family }
    }

    fn run(
        &self,
        name: &str,
        ranks: usize,
        micro_batch: usize,
        overrides: &[&str],
    ) -> Result<PathBuf, fm_dist::error::Error> {
        let micro_batch = format!("data.micro_batch_size_per_gpu={micro_batch}");
        let whole = ["max_steps=3", "train.global_batch_size=8", micro_batch.as_str()];
        let output = self.root.path().join(name);
        let config = self.family.config(
            &self.root.path().join("data"),
            &output,
            &[&whole, overrides].concat(),
        );
        train_in_threads(&config, &Resume::Never, ranks)
    }

    fn check(&self, overrides: &[&str]) -> Result<String, fm_dist::error::Error> {
        let config =
            self.family.config(&self.root.path().join("data"), Path::new("unused"), overrides);
        check(
            &config,
            &CheckRequest { world_size: 1, latents: None, text_tokens: 0, scaling: None },
        )
    }

    /// Every cut of the batch into micro-batches and ranks has the numbers of the whole one, under
    /// every sharding.
    fn assert_cuts_agree(&self, overrides: &[&str]) {
        let whole = self.run("whole", 1, 8, overrides).unwrap();
        let cuts = [
            (1, 4, "none"),
            (1, 1, "none"),
            (2, 4, "none"),
            (2, 1, "optimizer"),
            (2, 2, "gradients"),
            (4, 1, "parameters"),
        ];
        for (ranks, micro_batch, sharding) in cuts {
            let name = format!("{ranks}-{micro_batch}-{sharding}");
            let sharding = format!("parallel.sharding={sharding}");
            let settings = [overrides, &[&sharding, "parallel.recompute=always"]].concat();
            let cut = self.run(&name, ranks, micro_batch, &settings).unwrap();
            for number in ["loss", "unweighted_loss", "grad_norm"] {
                for ((step, whole), (_, cut)) in
                    column(&whole, number).iter().zip(column(&cut, number))
                {
                    assert!(
                        (whole - cut).abs() <= ROUNDING * whole.abs(),
                        "{name}: {number} at step {step}: {whole} and {cut}"
                    );
                }
            }
            assert_eq!(tasks(&cut).len(), 3);
            for (whole, cut) in by_sigma(&whole).iter().zip(by_sigma(&cut)) {
                assert!(
                    (whole - cut).abs() <= ROUNDING * whole.abs(),
                    "{name}: loss_per_sigma {whole} and {cut}"
                );
            }
        }
    }
}

fn lines(run: &Path) -> Vec<serde_json::Map<String, Value>> {
    let lines = metrics::read(&run.join("metrics.jsonl")).unwrap();
    lines
        .into_iter()
        .map(|line| serde_json::to_value(line).unwrap().as_object().unwrap().clone())
        .collect()
}

/// The losses by sigma of all steps, where there are any.
fn by_sigma(run: &Path) -> Vec<f64> {
    lines(run)
        .iter()
        .flat_map(|line| line["loss_per_sigma"].as_array().unwrap().clone())
        .filter_map(|loss| loss.as_f64())
        .collect()
}

fn tasks(run: &Path) -> Vec<String> {
    lines(run).iter().map(|line| line["task_type"].as_str().unwrap().to_string()).collect()
}

/// Weights `[8, …]` by the number of the sample and the place of an element in it.
fn weights(size: &[i64], weight: impl Fn(usize, usize) -> f32) -> Tensor {
    let elements: i64 = size.iter().product();
    let of = |index: i64| weight((index / elements) as usize, (index % elements) as usize);
    Tensor::from_slice(&(0..SAMPLES * elements).map(of).collect::<Vec<_>>())
        .reshape([&[SAMPLES], size].concat())
}

/// Samples that keep nothing, a row, half of themselves by weight, everything.
fn uneven(sample: usize, element: usize) -> f32 {
    match sample % 4 {
        0 => 0.0,
        1 => f32::from(element < 12),
        2 => 0.5,
        _ => 1.0,
    }
}

const MASKED: &str = "flow_matching.apply_loss_mask=true";

fn refused(outcome: Result<impl Sized, fm_dist::error::Error>, code: i32) -> String {
    let error = outcome.err().expect("refused");
    assert_eq!(error.exit_code(), code, "{error}");
    error.to_string()
}

#[test]
fn a_masked_loss_is_that_of_one_big_batch_however_it_is_cut() {
    let bench =
        Bench::new(FLUX, |samples| drop(samples.insert("loss_mask", weights(&[1, 8, 12], uneven))));
    for weighting in ["true", "false"] {
        bench
            .assert_cuts_agree(&[MASKED, &format!("flow_matching.use_loss_weighting={weighting}")]);
    }
}

#[test]
fn the_frames_that_are_given_are_left_out_of_one_big_batch_however_it_is_cut() {
    let bench = Bench::new(HUNYUAN_VIDEO15, |samples| {
        drop(samples.insert("loss_mask", weights(&[3, 4, 6], uneven)))
    });
    let tasks = [
        "flow_matching.task_scope=sample",
        "flow_matching.i2v_prob=0.5",
        "flow_matching.adapter.exclude_condition_frame=true",
    ];
    bench.assert_cuts_agree(&tasks);
    bench.assert_cuts_agree(&[&tasks[..], &[MASKED]].concat());
}

#[test]
fn a_masked_run_has_the_same_bits_on_any_number_of_ranks() {
    let bench =
        Bench::new(FLUX, |samples| drop(samples.insert("loss_mask", weights(&[8, 12], uneven))));
    let of = |ranks: usize| {
        checkpoint(
            &bench
                .run(&format!("on-{ranks}"), ranks, 1, &[MASKED, "parallel.deterministic=true"])
                .unwrap(),
            3,
        )
    };
    let alone = of(1);
    assert!([2, 4, 8].into_iter().all(|ranks| of(ranks) == alone));
}

#[test]
fn equal_weights_are_no_mask_however_small() {
    let bench =
        Bench::new(FLUX, |samples| drop(samples.insert("loss_mask", weights(&[], |_, _| 1e-3))));
    let (plain, masked) =
        (bench.run("plain", 1, 8, &[]).unwrap(), bench.run("masked", 1, 8, &[MASKED]).unwrap());
    for number in ["loss", "unweighted_loss", "grad_norm"] {
        for ((_, plain), (_, masked)) in column(&plain, number).iter().zip(column(&masked, number))
        {
            assert!((plain - masked).abs() <= ROUNDING * plain, "{number}: {plain} and {masked}");
        }
    }
}

#[test]
fn a_batch_that_keeps_nothing_is_skipped_and_counted() {
    let bench =
        Bench::new(FLUX, |samples| drop(samples.insert("loss_mask", weights(&[], |_, _| 0.0))));
    let skipped = bench.run("skipped", 2, 4, &[MASKED]).unwrap();
    assert_eq!(
        column(&skipped, "loss").iter().map(|(_, loss)| *loss).collect::<Vec<_>>(),
        [0.0; 3]
    );
    let error = refused(bench.run("stopped", 2, 4, &[MASKED, "train.skip_budget=2"]), 41);
    assert!(
        error.contains("the loss masks keep nothing of the global batch's 8 samples"),
        "{error}"
    );
    assert!(
        error.contains("3 of the last 100 steps would be skipped, train.skip_budget is 2"),
        "{error}"
    );
}

#[test]
fn the_axes_of_a_mask_are_rows_and_columns_and_frames() {
    let loss = |family: Tiny, size: &[i64], weight: fn(usize, usize) -> f32| {
        let bench =
            Bench::new(family, |samples| drop(samples.insert("loss_mask", weights(size, weight))));
        column(&bench.run("run", 1, 8, &[MASKED]).unwrap(), "loss")[0].1
    };
    let top = |_: usize, element: usize| f32::from(element % 96 < 48);
    assert_eq!(loss(FLUX, &[8, 12], top), loss(FLUX, &[1, 8, 12], top));
    assert_eq!(loss(FLUX, &[8, 12], top), loss(FLUX, &[4, 8, 12], top));
    let first_frame = |_: usize, element: usize| f32::from(element < 24);
    assert_eq!(loss(WAN, &[3, 4, 6], first_frame), loss(WAN, &[1, 3, 4, 6], first_frame));
    let left = |_: usize, element: usize| f32::from(element % 6 < 3);
    assert_eq!(loss(WAN, &[4, 6], left), loss(WAN, &[1, 3, 4, 6], left));
}

#[test]
fn masks_that_do_not_fit_or_are_no_weights_are_refused_at_check() {
    let of = |mask: Option<Tensor>| {
        let bench = Bench::new(FLUX, |samples| {
            mask.and_then(|mask| samples.insert("loss_mask", mask));
        });
        refused(bench.check(&[MASKED]), 40)
    };
    assert!(
        of(None).contains(
            "resolution group one: apply_loss_mask is set and the data have no `loss_mask`"
        )
    );
    let axes = of(Some(weights(&[12, 8], |_, _| 1.0)));
    assert!(
        axes.contains(
            "`loss_mask` is [12, 8] a sample, its latents [4, 8, 12]; expected one number, [H, W]"
        ),
        "{axes}"
    );
    let negative = of(Some(weights(&[8, 12], |_, element| if element == 5 { -0.5 } else { 1.0 })));
    assert!(
        negative.contains("`loss_mask` of sample 0 holds -0.5; weights are finite and at least 0"),
        "{negative}"
    );
}

#[test]
fn a_video_of_one_frame_is_never_begun_with_that_frame() {
    let still = |samples: &mut Samples| {
        let first = samples["video_latents"].narrow(2, 0, 1);
        samples.insert("video_latents", first.contiguous());
    };
    let settings =
        ["flow_matching.i2v_prob=1.0", "flow_matching.adapter.exclude_condition_frame=true"];
    for scope in ["batch", "sample"] {
        let scope = format!("flow_matching.task_scope={scope}");
        for seeds in ["rank", "sample"] {
            let seeds = format!("parallel.seed_scope={seeds}");
            let bench = Bench::new(HUNYUAN_VIDEO15, still);
            let run = bench.run("run", 1, 8, &[&settings[..], &[&scope, &seeds]].concat()).unwrap();
            assert!(column(&run, "loss").iter().all(|(_, loss)| *loss > 0.1), "{scope} {seeds}");
            assert!(tasks(&run).iter().all(|task| task == "t2v"), "{scope} {seeds}");
        }
    }
}

#[test]
fn conditions_without_their_axes_are_refused_at_check() {
    let refusal = |family: Tiny, key: &'static str, size: &[i64], overrides: &[&str]| {
        let bench = Bench::new(family, |samples| {
            drop(samples.insert(key, Tensor::ones([&[SAMPLES], size].concat(), FLOAT)))
        });
        refused(bench.check(overrides), 40)
    };
    let text = refusal(FLUX, "text_embeddings", &[12], &[]);
    assert!(
        text.ends_with("resolution group one: `text_embeddings` is [12] a sample, expected [L, D]"),
        "{text}"
    );
    let pooled = refusal(FLUX, "pooled_prompt_embeds", &[], &[]);
    assert!(pooled.ends_with("`pooled_prompt_embeds` is [] a sample, expected [P]"), "{pooled}");
    let image = refusal(HUNYUAN_VIDEO15, "image_embeds", &[8], &[]);
    assert!(image.ends_with("`image_embeds` is [8] a sample, expected [Li, Di]"), "{image}");
    let mask = refusal(HUNYUAN_VIDEO15, "text_mask", &[4], &[]);
    assert!(mask.ends_with("`text_mask` is [4] a sample, expected [L] with L = 5"), "{mask}");
    let masked =
        refusal(QWEN_IMAGE, "text_mask", &[1, 5], &["flow_matching.adapter.use_text_mask=true"]);
    assert!(masked.ends_with("`text_mask` is [1, 5] a sample, expected [L]"), "{masked}");
}

#[test]
fn a_missing_key_is_told_before_anything_is_loaded() {
    let bench = Bench::new(FLUX, |samples| drop(samples.remove("text_embeddings")));
    let error = refused(bench.check(&[]), 40);
    assert!(error.contains("the flux adapter needs `text_embeddings` [L, D] of each sample; the data have image_latents"), "{error}");
    let empty = Bench::new(FLUX, |_| ());
    let error = refused(empty.check(&["flow_matching.cfg_dropout_value=empty_prompt"]), 40);
    assert!(error.ends_with("cfg_dropout_value is \"empty_prompt\" and the data's empty prompt has no `text_embeddings`"), "{error}");
}

#[test]
fn keys_that_nobody_reads_and_what_stands_in_for_others_are_told() {
    let bench = Bench::new(FLUX, |samples| {
        let pooled = samples.remove("pooled_prompt_embeds").unwrap();
        samples.insert("pooled_prompt_embed", pooled);
    });
    let plan = bench.check(&["model.flux.pooled_projection_dim=768"]).unwrap();
    let zeros = "the data have no `pooled_prompt_embeds` or `clip_pooled` (is their `pooled_prompt_embed` meant?); \
                 the model is given zeros [768]";
    assert!(plan.contains(zeros), "{plan}");
    assert!(plan.contains("keys of the data that nobody reads: `pooled_prompt_embed`"), "{plan}");
    let error = refused(bench.check(&[]), 50);
    assert!(
        error.contains("is 10, but the data have no `pooled_prompt_embeds`")
            && error.contains(zeros),
        "{error}"
    );
    let plan = Bench::new(WAN, |_| ()).check(&["flow_matching.cfg_dropout_prob=1.0"]).unwrap();
    assert!(
        plan.contains("cfg_dropout_prob = 1 drops nothing: the simple adapter drops no conditions"),
        "{plan}"
    );
    let plan = Bench::new(WAN, |_| ()).check(&["flow_matching.cfg_dropout=per_sample"]).unwrap();
    assert!(!plan.contains("drops nothing"), "{plan}");
}

/// Hunyuan's data with a prompt of three tokens, in five places from `first` on.
fn prompt(seed: i64, first: i64) -> impl FnOnce(&mut Samples) {
    move |samples| {
        let tokens = (Tensor::arange(SAMPLES * 3 * 12, FLOAT) * 0.37 + seed as f64)
            .sin()
            .view([SAMPLES, 3, 12]);
        let (text, mask) =
            (Tensor::zeros([SAMPLES, 5, 12], FLOAT), Tensor::zeros([SAMPLES, 5], FLOAT));
        text.narrow(1, first, 3).copy_(&tokens);
        let _ = mask.narrow(1, first, 3).fill_(1.0);
        samples.extend([("text_embeddings", text), ("text_mask", mask)]);
    }
}

#[test]
fn a_prompt_counts_on_whichever_side_its_padding_is() {
    let loss = |seed, first| {
        let bench = Bench::new(HUNYUAN_VIDEO15, prompt(seed, first));
        // After two large updates a prompt tells more than a new model lets through.
        column(
            &bench
                .run("run", 1, 8, &["flow_matching.i2v_prob=0.0", "optimizer.adamw.lr=0.02"])
                .unwrap(),
            "loss",
        )[2]
        .1
    };
    let (right, middle, left, other) = (loss(1, 0), loss(1, 1), loss(1, 2), loss(2, 2));
    assert!(
        (right - left).abs() <= ROUNDING * right && (right - middle).abs() <= ROUNDING * right,
        "{right} {middle} {left}"
    );
    assert!((left - other).abs() > 1e-4 * left, "another prompt has another loss: {left} {other}");
}

#[test]
fn a_mask_of_tokens_that_is_none_is_refused_at_check() {
    let additive = |samples: &mut Samples| {
        let mask =
            Tensor::from_slice(&[0f32, 0.0, 0.0, -10_000.0, -10_000.0]).expand([SAMPLES, 5], false);
        samples.insert("text_mask", mask.contiguous());
    };
    let error = refused(Bench::new(HUNYUAN_VIDEO15, additive).check(&[]), 40);
    let expected = "`text_mask` of sample 0 holds -10000 at token 3; expected 1 where a token counts and 0 where it is padding";
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn what_is_drawn_for_a_sample_does_not_depend_on_its_neighbours() {
    let dropout = ["flow_matching.cfg_dropout_prob=0.5", "flow_matching.mix_uniform_ratio=0.5"];
    Bench::new(QWEN_IMAGE, |_| ()).assert_cuts_agree(&dropout);
    let tasks = ["flow_matching.i2v_prob=0.5", "flow_matching.task_scope=batch"];
    Bench::new(HUNYUAN_VIDEO15, |_| ()).assert_cuts_agree(&tasks);
    let spread = [
        "flow_matching.stratified_timesteps=true",
        "flow_matching.cfg_dropout=per_sample",
        "flow_matching.cfg_dropout_prob=0.5",
    ];
    Bench::new(FLUX, |_| ()).assert_cuts_agree(&spread);
}

/// A mask of five tokens: as many as the sample's number says, on either side.
fn sides(samples: &mut Samples) {
    let counts = |sample: i64, token: i64| match (sample % 2, 2 + sample % 3) {
        (0, tokens) => token < tokens,
        (_, tokens) => token >= 5 - tokens,
    };
    let row = |sample| (0..5).map(|token| i64::from(counts(sample, token))).collect::<Vec<_>>();
    let rows: Vec<i64> = (0..SAMPLES).flat_map(row).collect();
    samples.insert("text_mask", Tensor::from_slice(&rows).view([SAMPLES, 5]));
}

#[test]
fn what_a_lora_drops_of_a_sample_does_not_depend_on_its_neighbours() {
    let lora = [
        "lora.rank=4",
        "lora.alpha=8",
        "lora.dropout=0.25",
        "lora.target_modules=['all-linear']",
        "optimizer.adamw.lr=0.01",
    ];
    for family in [FLUX, QWEN_IMAGE] {
        let masked = ["flow_matching.adapter.use_text_mask=true"];
        Bench::new(family, sides).assert_cuts_agree(&[&lora[..], &masked].concat());
    }
    let glyphs = |samples: &mut Samples| {
        sides(samples);
        let mask = [[0i64, 0, 1], [1, 1, 0]].concat().repeat(SAMPLES as usize / 2);
        samples.insert("text_mask_2", Tensor::from_slice(&mask).view([SAMPLES, 3]));
    };
    let tasks = ["flow_matching.i2v_prob=0.5", "flow_matching.task_scope=sample"];
    Bench::new(HUNYUAN_VIDEO15, glyphs).assert_cuts_agree(&[&lora[..], &tasks].concat());
}

#[test]
fn a_dumped_step_holds_its_mask_and_the_references_metrics() {
    let bench =
        Bench::new(FLUX, |samples| drop(samples.insert("loss_mask", weights(&[8, 12], uneven))));
    let (data, dump) = (bench.root.path().join("data"), bench.root.path().join("dump.safetensors"));
    let request = StepRequest {
        batch: data.join("samples.safetensors"),
        dump: dump.clone(),
        weights: None,
        torch_seed: Some(3),
        grads: false,
        operators: false,
    };
    dump_step(
        &bench.family.config(
            &data,
            Path::new("unused"),
            &[MASKED, "flow_matching.mix_uniform_ratio=0.0"],
        ),
        &request,
    )
    .unwrap();
    let dumped = SafeTensors::open(&dump).unwrap();
    assert!(dumped.read("loss_mask").unwrap().equal(&weights(&[8, 12], uneven)));
    let number = |name: &str| dumped.read(name).unwrap().double_value(&[]);
    let (sigma, weight) = (dumped.read("sigma").unwrap(), dumped.read("loss_weight").unwrap());
    for (metric, expected) in [
        ("loss", number("average_weighted_loss")),
        ("unweighted_loss", number("average_unweighted_loss")),
        ("sigma_min", sigma.min().double_value(&[])),
        ("sigma_max", sigma.max().double_value(&[])),
        ("weight_min", weight.min().double_value(&[])),
        ("weight_max", weight.max().double_value(&[])),
        ("timestep_max", dumped.read("timesteps").unwrap().max().double_value(&[])),
        ("noisy_min", dumped.read("noisy_latents").unwrap().min().double_value(&[])),
        ("noisy_max", dumped.read("noisy_latents").unwrap().max().double_value(&[])),
    ] {
        assert_eq!(number(&format!("metrics.{metric}")), expected, "{metric}");
    }
    assert_eq!(dumped.metadata()["sampling_method"], "logit_normal");
}
