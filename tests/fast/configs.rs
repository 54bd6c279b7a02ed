//! Every file in configs/ is valid, and what the program prints is the documented listing.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::config::{DEFAULT, DEFAULT_NAME, RunConfig};
use fm_dist::model;
use fm_dist::plan::{CheckRequest, check};
use serde_json::Value;

use crate::clock::processor_time;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

#[test]
fn every_shipped_configuration_is_valid_and_opens_with_its_launch_line() {
    let entries = fs::read_dir(root().join("configs")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    assert!(!files.is_empty());
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        RunConfig::read(&file.display().to_string(), &text, &[]).unwrap();
        let head: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        for word in ["Reaches:", "Takes:", "Launch: mpirun"] {
            assert!(
                head.iter().any(|line| line.contains(word)),
                "{} opens without {word:?}",
                file.display()
            );
        }
    }
}

/// The number before a word in a line, as 8 of `8 GPUs of 80 GB`.
fn number_before(line: &str, word: &str) -> Option<f64> {
    line.split_once(word)?.0.split_whitespace().next_back()?.parse().ok()
}

#[test]
fn a_configurations_head_tells_the_memory_that_check_predicts() {
    let files = ["flux1-dev", "flux2-dev", "qwen-image", "wan2.1-t2v-14b", "hunyuanvideo1.5-720p"];
    for file in files {
        let text = fs::read_to_string(root().join(format!("configs/{file}.toml"))).unwrap();
        let line = |word: &str| text.lines().find(|line| line.contains(word)).unwrap();
        let (needs, takes) = (line("# Needs:"), line("--latents "));
        let latents = takes.split_once("--latents ").unwrap().1.split('`').next().unwrap();
        let latents = latents.split(',').map(|size| size.parse().unwrap()).collect();
        let world_size = number_before(needs, " GPUs").unwrap() as usize;
        let config = RunConfig::read(file, &text, &[]).unwrap();
        let request =
            CheckRequest { world_size, latents: Some(latents), text_tokens: 512, scaling: None };
        let plan = check(&config, &request).unwrap();
        let of = |begin: &str| plan.lines().find(|line| line.trim().starts_with(begin)).unwrap();
        let heads: Vec<&str> = of("a rank, by sharding").split_whitespace().collect();
        let worlds: Vec<&str> = heads
            .windows(2)
            .filter(|pair| pair[1].starts_with("rank"))
            .map(|pair| pair[0])
            .filter(|word| word.parse::<usize>().is_ok())
            .collect();
        let place = worlds.iter().position(|world| *world == world_size.to_string()).unwrap();
        let row: Vec<&str> = of("parameters").split_whitespace().collect();
        let predicted: f64 = row[1 + 2 * place].parse().unwrap();
        let told = number_before(needs, " GiB each").unwrap();
        assert_eq!(told, predicted.ceil(), "{file}: {needs}\n{plan}");
    }
}

#[test]
fn the_printed_configuration_reads_back_as_itself() {
    let config = RunConfig::read(DEFAULT_NAME, DEFAULT, &[]).unwrap();
    assert_eq!(RunConfig::read("printed", &config.to_toml(), &[]).unwrap(), config);
}

fn published(name: &str) -> PathBuf {
    root().join("tests/fixtures/models").join(name)
}

/// Latents, adapter and tokens of a prompt with which each published family is planned.
fn plan_for(class: &str) -> (&'static str, Vec<i64>, i64) {
    match class {
        "FluxTransformer2DModel" => ("flux", vec![16, 128, 128], 512),
        "Flux2Transformer2DModel" => ("flux2", vec![128, 64, 64], 512),
        "QwenImageTransformer2DModel" => ("qwen_image", vec![16, 128, 128], 512),
        "WanTransformer3DModel" => ("simple", vec![16, 21, 60, 104], 512),
        "HunyuanVideo15Transformer3DModel" => ("hunyuan", vec![32, 31, 45, 80], 1256),
        other => panic!("{other} is no family"),
    }
}

#[test]
fn published_models_are_planned_without_weights_and_have_diffusers_number_of_parameters() {
    let counts: Value =
        serde_json::from_slice(&fs::read(published("parameters.json")).unwrap()).unwrap();
    let counts = counts.as_object().unwrap();
    assert!(counts.len() >= 10);
    for (name, entry) in counts {
        let (adapter, mut latents, text_tokens) = plan_for(entry["class"].as_str().unwrap());
        // 5B has an autoencoder of its own, and image-conditioned models are told their latents
        // with the conditions'.
        if name.starts_with("wan2.2-ti2v") {
            latents[0] = 48;
        }
        let conditioned = name.contains("-i2v-14b");
        let mut overrides = vec![
            format!("model.path={:?}", published(name)),
            format!("flow_matching.adapter_type={adapter}"),
        ];
        overrides.push("model.dtype=bfloat16".into());
        overrides
            .extend(conditioned.then(|| "flow_matching.adapter.image_conditioning=true".into()));
        let before = processor_time();
        let config = RunConfig::read(name, "", &overrides).unwrap();
        let plan = check(
            &config,
            &CheckRequest { world_size: 8, latents: Some(latents), text_tokens, scaling: None },
        )
        .unwrap();
        assert!(
            plan.contains(&format!("{} parameters", entry["parameters"])),
            "{name}: {entry} is not in\n{plan}"
        );
        for part in [
            "image tokens",
            "activations, estimated",
            "none",
            "optimizer",
            "gradients",
            "parameters",
            "all-reduces",
        ] {
            assert!(plan.contains(part), "{name}: {part:?} is not in\n{plan}");
        }
        // Ten times what it takes.
        let took = processor_time() - before;
        assert!(took.as_secs_f64() < 1.0, "{name}: {took:?}");
    }
}

#[test]
fn each_familys_configuration_describes_the_published_model() {
    for (file, folder) in [
        ("flux1-dev", "flux1-dev"),
        ("flux2-dev", "flux2-dev"),
        ("qwen-image", "qwen-image"),
        ("wan2.1-t2v-14b", "wan2.1-t2v-14b"),
        ("hunyuanvideo1.5-720p", "hunyuanvideo1.5-t2v-720p"),
    ] {
        let expected = model::read_folder(&published(folder)).unwrap();
        let read = |file: &str| {
            let text = fs::read_to_string(root().join(format!("configs/{file}.toml"))).unwrap();
            RunConfig::read(file, &text, &[]).unwrap()
        };
        let (whole, lora) = (read(file), read(&format!("{file}-lora")));
        assert!(*whole.model.family == expected && *lora.model.family == expected, "{file}");
        assert!(whole.tuning().is_whole() && lora.lora.rank == Some(16), "{file}");
    }
}
