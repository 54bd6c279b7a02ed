//! Noise and timesteps on a GPU are those of the generator that the configuration names, and a step
//! hardly waits for them.

use std::fs;

use fm_dist::adapter::create_pipeline;
use fm_dist::cuda::open_libtorch;
use fm_dist::data::{Batch, DataType};
use fm_dist::flow::time_shift::shifted;
use fm_dist::flow::{DrawPlace, Drawn, FlowMatchingSettings};
use fm_dist::rng::Stream;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::num_gpus;
use crate::runs::{column, finish, program};
use crate::threads::training::Tiny;

/// The draws of FLUX.1 on `device` for four images of 16 x 24 x 32 after `torch.manual_seed(7)`.
fn drawn(device: Device, draws: DrawPlace) -> Drawn {
    let settings = FlowMatchingSettings { draws, ..FlowMatchingSettings::default() };
    let pipeline = create_pipeline("flux", &Default::default(), settings, device, Kind::BFloat16);
    let latents = Tensor::zeros([4, 16, 24, 32], (Kind::BFloat16, Device::Cpu));
    let batch = Batch {
        tensors: [("image_latents".to_string(), latents)].into(),
        data_type: DataType::Image,
        sample_ids: Vec::new(),
        bad_samples: 0,
    };
    let (rules, stream) = (pipeline.unwrap().draw_rules(), Stream::TorchSeed(7));
    let ahead = rules.draw_ahead(&batch, &stream, None).unwrap();
    assert_eq!(ahead.is_some(), draws == DrawPlace::Host, "what the CPU draws is drawn ahead");
    ahead.unwrap_or_else(|| rules.draw(&batch, &stream, None).unwrap()).on(device)
}

/// Asserts that noise, sigma and dropout are those of the calls that NeMo AutoModel makes, in their
/// order, with the generator of `device`.
fn assert_drawn_by(device: Device, drawn: &Drawn) {
    let (float, stream) = ((Kind::Float, device), Stream::TorchSeed(7));
    // Seeds the generators, and locks them until the draws are done.
    let held = stream.open();
    let is_uniform = Tensor::rand([1], (Kind::Float, Device::Cpu)).double_value(&[0]) < 0.1;
    let u = match is_uniform {
        true => Tensor::rand([4], float),
        false => Tensor::empty([4], float).normal_(0.0, 1.0).sigmoid(),
    };
    let noise = Tensor::randn([4, 16, 24, 32], float);
    let dropped = Tensor::rand([4], float).lt(0.1);
    drop(held);
    let equal = |found: &Tensor, expected: &Tensor| {
        found.to_device(Device::Cpu).equal(&expected.to_device(Device::Cpu))
    };
    assert!(equal(&drawn.sampled.sigma, &shifted(&u.clamp_min(1e-5), 3.0)), "sigma, {device:?}");
    assert!(equal(&drawn.noise, &noise), "noise, {device:?}");
    assert!(equal(drawn.drop.as_ref().unwrap(), &dropped), "dropout, {device:?}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_gpu_draws_libtorchs_own_numbers_or_those_of_the_cpu() {
    open_libtorch().unwrap();
    for device in (0..num_gpus()).map(Device::Cuda) {
        assert_drawn_by(device, &drawn(device, DrawPlace::Device));
        let host = drawn(device, DrawPlace::Host);
        assert_eq!(host.noise.device(), device);
        assert_drawn_by(Device::Cpu, &host);
    }
}

/// Wan 2.1 of 1.3 billion parameters, and videos of 81 frames of 720 x 1280.
const WAN_1_3B: Tiny = Tiny {
    model: "[model.wan]\nnum_layers = 30\nattention_head_dim = 128\nnum_attention_heads = 12\nffn_dim = 8960\n",
    adapter: "simple",
    data_type: "video",
    keys: &[("video_latents", &[16, 21, 90, 160]), ("text_embeddings", &[512, 4096])],
};

#[test]
#[ignore = "needs a CUDA device"]
fn draws_hold_a_step_of_a_large_video_up_by_less_than_a_hundredth() {
    let root = TempDir::new().unwrap();
    let data = root.path().join("data");
    WAN_1_3B.write_data(&data);
    for draws in ["host", "device"] {
        let (run, file) = (root.path().join(draws), root.path().join("config.toml"));
        let draws = format!("flow_matching.draws={draws}");
        let overrides = [
            "max_steps=3",
            "model.dtype=bfloat16",
            "data.micro_batch_size_per_gpu=1",
            "parallel.device=cuda",
            "parallel.recompute=always",
            "checkpoint.save_last=false",
            &draws,
        ];
        fs::write(&file, WAN_1_3B.config(&data, &run, &overrides).to_toml()).unwrap();
        let (code, _, told) = finish(program(&["train", "--config", file.to_str().unwrap()]));
        assert_eq!(code, 0, "{told}");
        // The first step waits for its draws, and chooses kernels.
        let seconds = |name: &str| column(&run, name)[1..].iter().map(|(_, s)| s).sum::<f64>();
        let (waits, steps) = (seconds("draw_seconds"), seconds("step_seconds"));
        println!("{draws}: {waits:.4} s of {steps:.2} s, {:.3} %", 100.0 * waits / steps);
        assert!(waits <= 0.01 * steps, "{draws}: waits {waits} s of {steps} s");
    }
}
