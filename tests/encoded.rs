//! Pictures that `configs/encode_flux1.py` encodes are a dataset that trains.

use fm_dist::config::RunConfig;
use fm_dist::data::Dataset;
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::run::Resume;
use tempfile::TempDir;

use crate::oracle::{LOSS, assert_close, oracle};
use crate::runs::{column, train_in_threads};

/// A FLUX.1 for the widths of the made-up encoders in tests/oracle/encoded.py.
const TINY_FLUX: &str = "\
    [model.flux]\nnum_layers = 1\nnum_single_layers = 1\nnum_attention_heads = 1\n\
    joint_attention_dim = 24\npooled_projection_dim = 16\nguidance_embeds = true\n\
    [flow_matching]\nadapter_type = \"flux\"\ncfg_dropout = \"per_sample\"\n\
    cfg_dropout_value = \"empty_prompt\"\ncfg_dropout_prob = 0.5\n";

#[test]
fn encoded_pictures_have_the_latents_of_diffusers_and_train() {
    let root = TempDir::new().unwrap();
    oracle("encoded.py", &[root.path().to_str().unwrap()]);
    let data = root.path().join("data");

    let dataset = Dataset::open(&data).unwrap();
    dataset.verify_hashes().and_then(|()| dataset.verify_numbers()).unwrap();
    assert_eq!(dataset.num_samples(), 5);
    let names = dataset.conditions().unwrap().expect("captions to generate from").names;
    assert_eq!(names, ["a cat", "a cat!", "a cat!!", "a cat!!!"]);
    let expected = SafeTensors::open(root.path().join("expected.safetensors")).unwrap();
    let found = SafeTensors::open(data.join("samples.safetensors")).unwrap();
    let [found, expected] = [&found, &expected].map(|file| file.read("image_latents").unwrap());
    assert_close(&found, &expected, LOSS, "latents");

    let overrides = [
        "max_steps=2".to_string(),
        "data.micro_batch_size_per_gpu=2".into(),
        "train.global_batch_size=4".into(),
        "log.progress=never".into(),
        format!("data.path={}", data.display()),
        format!("output_dir={}", root.path().join("run").display()),
    ];
    let config = RunConfig::read("test", TINY_FLUX, &overrides).unwrap();
    let run = train_in_threads(&config, &Resume::Never, 1).unwrap();
    assert_eq!(column(&run, "loss").len(), 2);
}
