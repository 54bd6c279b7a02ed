//! Parts of a step by themselves, on one thread: `cargo bench --bench parts`, or `-- adamw`, `--
//! loader`, `-- texts`, `-- pipeline` for one.
//!
//! `compare.sh data` and `compare.sh pipeline` run `loader` and `pipeline` in turns with the peer.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use fm_dist::adapter::create_pipeline;
use fm_dist::data::{Batch, DataType, Dataset, Loaded, Loader, Order, Share, Steps};
use fm_dist::files::safetensors;
use fm_dist::files::sha256::HashingWriter;
use fm_dist::flow::{FlowMatchingSettings, Statistics, StepOptions};
use fm_dist::libtorch;
use fm_dist::nn::Activations;
use fm_dist::optim::{AdamW, Average, Optimizer, Slice};
use fm_dist::rng::{Key, Purpose, Stream};
use tch::{Device, Kind, Tensor};

const KEY_SEED: u64 = 5;
/// Samples of a batch.
const BATCH: i64 = 4;

fn normal(scope: u64, shape: &[i64]) -> Tensor {
    Key::new(KEY_SEED, Purpose::Test)
        .scope(scope)
        .seeded(|| Tensor::randn(shape, (Kind::Float, Device::Cpu)))
}

/// A stage's parameters with what an update needs, and the weights that bfloat16 computes with.
struct Updated {
    params: Tensor,
    gradient: Tensor,
    state: [Tensor; 2],
    computed: Tensor,
    average: Tensor,
}

/// The 71 million parameters of the benchmark's FLUX, in slices of a stage's size.
fn adamw(criterion: &mut Criterion) {
    const SLICES: u64 = 12;
    const SLICE: i64 = 5_925_000;
    let fresh = |scope| {
        let params = normal(scope, &[SLICE]);
        let (gradient, computed) =
            (normal(scope + SLICES, &[SLICE]) * 1e-3, params.to_kind(Kind::BFloat16));
        let state = [params.zeros_like(), params.zeros_like()];
        Updated { gradient, state, computed, average: params.copy(), params }
    };
    // Made when they are first asked for: a filter may leave these benchmarks out.
    let update = AdamW::default().on(Device::Cpu).expect("a CPU has what it needs");
    let (mut slices, mut step) = (None, 0);
    let mut group = criterion.benchmark_group("adamw");
    group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Elements(SLICES * SLICE as u64));
    for (name, computes_in_bfloat16, averages) in [
        ("71M float32", false, false),
        ("71M float32 and averages", false, true),
        ("71M float32 and bfloat16 weights", true, false),
        ("71M float32, bfloat16 weights and averages", true, true),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                step += 1;
                let slices =
                    slices.get_or_insert_with(|| (0..SLICES).map(fresh).collect::<Vec<_>>());
                for Updated { params, gradient, state, computed, average } in slices {
                    let computed = computes_in_bfloat16.then_some(computed);
                    update.update(
                        Slice {
                            params,
                            gradient,
                            gradient_factor: 1.0,
                            state,
                            computed,
                            average: averages.then_some(Average { values: average, share: 1e-4 }),
                            decayed: &[(0, SLICE)],
                            decay_factor: 1.0,
                        },
                        1e-4,
                        step,
                    );
                }
            })
        });
    }
    group.finish();
}

/// Batches of cached latents and text as fast as they are asked for.
fn loader(criterion: &mut Criterion) {
    loaded(criterion, "loader", "16x64x64 + 512x4096", cached_samples);
}

/// The same with texts that a batch does not hold as they are stored.
fn texts(criterion: &mut Criterion) {
    loaded(criterion, "texts", "of unequal length", unequal_samples);
    loaded(criterion, "texts", "of 8 bits", eight_bit_samples);
}

fn loaded(criterion: &mut Criterion, group: &str, name: &str, samples: fn() -> PathBuf) {
    let start = || {
        let dataset = Arc::new(Dataset::open(samples()).expect("the benchmark's own dataset"));
        let order = Order::new(dataset.groups(), BATCH as usize, KEY_SEED)
            .expect("more samples than a batch");
        let share = Share {
            rank: 0,
            world_size: 1,
            micro_batches: 1,
            micro_batch_size: BATCH as usize,
            neighbours: false,
        };
        let steps = Steps::alike(order, share);
        Loader::start(dataset, steps, 0, 2, |_, _| Ok(())).expect("a thread to read ahead")
    };
    let mut loader = None;
    let mut group = criterion.benchmark_group(group);
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            let Loaded { batch, ahead } =
                loader.get_or_insert_with(start).next_batch().expect("sound data");
            ahead.wait().expect("nothing is made of it");
            batch
        })
    });
    group.finish();
}

const SAMPLES: i64 = 128;

/// Latents of 1024 x 1024 pixels.
fn latents() -> Tensor {
    normal(0, &[SAMPLES, 16, 64, 64]).to_kind(Kind::Half)
}

/// Latents in float16 and a text of 512 tokens in bfloat16, 4.3 MB a sample.
fn cached_samples() -> PathBuf {
    written("loader", 1, || {
        let text = normal(1, &[SAMPLES, 512, 4096]).to_kind(Kind::BFloat16);
        vec![("image_latents", latents()), ("text_embeddings", text)]
    })
}

/// The same with texts of 64 to 512 tokens.
fn unequal_samples() -> PathBuf {
    written("unequal", 2, || {
        let lengths: Vec<i64> = (0..SAMPLES).map(|sample| 64 + sample * 149 % 449).collect();
        let text = normal(1, &[lengths.iter().sum(), 4096]).to_kind(Kind::BFloat16);
        let lengths = Tensor::from_slice(&lengths);
        vec![
            ("image_latents", latents()),
            ("text_embeddings", text),
            ("text_embeddings.lengths", lengths),
        ]
    })
}

/// The same with texts of 512 tokens in float8, 2.2 MB a sample.
fn eight_bit_samples() -> PathBuf {
    written("eight", 2, || {
        let text = normal(1, &[SAMPLES, 512, 4096]).to_kind(Kind::Float8e4m3fn);
        let scale = Tensor::full([SAMPLES], 0.02, (Kind::Float, Device::Cpu));
        vec![
            ("image_latents", latents()),
            ("text_embeddings", text),
            ("text_embeddings.scale", scale),
        ]
    })
}

/// Writes a dataset once.
fn written(name: &str, version: u64, tensors: fn() -> Vec<(&'static str, Tensor)>) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench").join(name);
    if !folder.exists() {
        let unfinished = folder.with_extension("new");
        fs::create_dir_all(&unfinished).expect("target/ can be written to");
        let file = BufWriter::new(
            File::create(unfinished.join("samples.safetensors")).expect("a new file"),
        );
        let mut file = HashingWriter::new(file);
        let tensors = tensors();
        let borrowed: Vec<(&str, &Tensor)> =
            tensors.iter().map(|(key, tensor)| (*key, tensor)).collect();
        safetensors::write(&mut file, &borrowed, &BTreeMap::new()).expect("room on the disk");
        let (mut file, sha256, _) = file.finish();
        file.flush().expect("room on the disk");
        let manifest = serde_json::json!({
            "format": "fm-dist dataset", "version": version, "name": "random", "source": "a benchmark", "licence": "CC0", "data_type": "image",
            "files": [{"path": "samples.safetensors", "samples": SAMPLES, "group": "one", "sha256": sha256}],
        });
        fs::write(unfinished.join("dataset.json"), manifest.to_string()).expect("room on the disk");
        fs::rename(&unfinished, &folder).expect("nobody else makes it");
    }
    folder
}

/// A step of flow matching around a model that costs nothing, down to the numbers of the log.
fn pipeline(criterion: &mut Criterion) {
    let pipeline = create_pipeline(
        "flux",
        &Default::default(),
        FlowMatchingSettings::default(),
        Device::Cpu,
        Kind::Float,
    )
    .expect("a known adapter");
    let mut group = criterion.benchmark_group("pipeline");
    for (name, channels, side) in [("4x32x32", 4, 32), ("16x64x64", 16, 64)] {
        let tensors = [
            ("image_latents", normal(0, &[BATCH, channels, side, side])),
            ("text_embeddings", normal(1, &[BATCH, 64, 256])),
            ("pooled_prompt_embeds", normal(2, &[BATCH, 128])),
        ];
        let tensors = tensors.into_iter().map(|(key, tensor)| (key.to_string(), tensor)).collect();
        let batch =
            Batch { tensors, data_type: DataType::Image, sample_ids: Vec::new(), bad_samples: 0 };
        let prediction = normal(3, &[BATCH, side * side / 4, channels * 4]).set_requires_grad(true);
        let model = |inputs: Activations| {
            Ok(Activations::new()
                .with("prediction", prediction.shallow_clone())
                .carrying_constants_of(&inputs))
        };
        let mut step = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                step += 1;
                let stream = Stream::Batch(Key::new(KEY_SEED, Purpose::FlowMatching).step(step));
                let options =
                    StepOptions { global_step: step, collect_metrics: true, check_loss: false };
                let output = pipeline.step(model, &batch, &stream, options).expect("a sound batch");
                let row = output.statistics.as_ref().expect("metrics were asked for");
                black_box(Statistics::from_row(&Vec::try_from(row).expect("a row of f32")));
                output
            })
        });
    }
    group.finish();
}

/// As a rank of one thread sets itself up.
fn one_thread() -> Criterion {
    libtorch::share_memory_among_threads();
    tch::set_num_threads(1);
    libtorch::keep_freed_memory();
    Criterion::default().sample_size(20)
}

criterion_group! {
    name = parts;
    config = one_thread();
    targets = adamw, loader, texts, pipeline
}
criterion_main!(parts);
