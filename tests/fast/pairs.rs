//! Every model with every adapter, under every flag of both: the first step runs, or the
//! configuration is refused with a hint that works. The same for the edges of what a model's
//! settings may be.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use fm_dist::commands::{StepRequest, dump_step};
use fm_dist::config::RunConfig;
use fm_dist::error::Error;
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::plan::{CheckRequest, check};
use tempfile::TempDir;

use crate::threads::training::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, Tiny, WAN};

const DIT: Tiny = Tiny {
    model: "[model.dit]\nin_channels = 4\ncondition_width = 12\npatch_size = 2\nwidth = 16\ndepth = 1\nnum_heads = 2\n",
    adapter: "simple",
    data_type: "image",
    keys: &[("image_latents", &[4, 8, 12]), ("text_embeddings", &[5, 12])],
};

const IMAGE_TO_VIDEO: Tiny = Tiny {
    model: "[model.wan]\nin_channels = 9\nout_channels = 4\nnum_layers = 1\nattention_head_dim = 12\nnum_attention_heads = 2\n\
            text_dim = 12\nfreq_dim = 32\nffn_dim = 48\n",
    ..WAN
};

/// Wan that attends to images, too; then it takes 512 tokens of text.
const WITH_CLIP: Tiny = Tiny {
    model: "[model.wan]\nin_channels = 9\nout_channels = 4\nnum_layers = 1\nattention_head_dim = 12\nnum_attention_heads = 2\n\
            text_dim = 12\nfreq_dim = 32\nffn_dim = 48\nimage_dim = 8\nadded_kv_proj_dim = 24\n",
    ..WAN
};

/// Without the channels of condition latents.
const TEXT_TO_VIDEO: Tiny = Tiny {
    model: "[model.hunyuan_video15]\nin_channels = 4\nout_channels = 4\nnum_layers = 1\nnum_refiner_layers = 1\nattention_head_dim = 16\n\
            num_attention_heads = 2\ntext_embed_dim = 12\ntext_embed_2_dim = 10\nimage_embed_dim = 8\nrope_axes_dim = [4, 6, 6]\n",
    ..HUNYUAN_VIDEO15
};

/// As [`HUNYUAN_VIDEO15`], whose text ends in the adapter's table.
const HUNYUAN: Tiny = Tiny {
    model: "[model.hunyuan_video15]\nin_channels = 9\nout_channels = 4\nnum_layers = 1\nnum_refiner_layers = 1\nattention_head_dim = 16\n\
            num_attention_heads = 2\ntext_embed_dim = 12\ntext_embed_2_dim = 10\nimage_embed_dim = 8\nrope_axes_dim = [4, 6, 6]\n",
    ..HUNYUAN_VIDEO15
};

/// The models, each with the flags of its own that change what it takes.
const MODELS: [(&str, Tiny, &[&str]); 9] = [
    ("dit", DIT, &[""]),
    ("flux", FLUX, &["model.flux.guidance_embeds=true", "model.flux.guidance_embeds=false"]),
    ("flux2", FLUX2, &["model.flux2.guidance_embeds=true", "model.flux2.guidance_embeds=false"]),
    ("qwen_image", QWEN_IMAGE, &[""]),
    ("wan", WAN, &[""]),
    ("wan", IMAGE_TO_VIDEO, &[""]),
    ("wan", WITH_CLIP, &[""]),
    ("hunyuan_video15", HUNYUAN, &[""]),
    ("hunyuan_video15", TEXT_TO_VIDEO, &[""]),
];

/// The adapters and their flags, both values of each.
const ADAPTERS: [(&str, &[&str]); 5] = [
    ("simple", &["image_conditioning"]),
    ("flux", &["use_guidance_embeds", "use_text_mask"]),
    ("flux2", &["use_guidance_embeds"]),
    ("qwen_image", &["use_guidance_embeds", "use_text_mask"]),
    ("hunyuan", &["use_condition_latents", "exclude_condition_frame", "exact_text_lengths"]),
];

/// Every key that any adapter reads, in the shapes of these models.
fn data(tiny: &Tiny, folder: &Path) {
    let attends = tiny.model.contains("image_dim = 8\nadded");
    let text: (&str, &[i64]) =
        if attends { ("text_embeddings", &[512, 12]) } else { ("text_embeddings", &[5, 12]) };
    let mask: (&str, &[i64]) = if attends { ("text_mask", &[512]) } else { ("text_mask", &[5]) };
    let images = [tiny.keys[0], text, mask, ("pooled_prompt_embeds", &[10])];
    let videos = [
        ("text_embeddings_2", &[3, 10][..]),
        ("text_mask_2", &[3]),
        ("image_embeds", &[7, 8]),
        ("condition_latents", &[5, 3, 4, 6]),
    ];
    let keys =
        if tiny.data_type == "image" { images.to_vec() } else { [&images[..3], &videos].concat() };
    Tiny { keys: keys.leak(), ..*tiny }.write_data(folder);
}

fn read(tiny: &Tiny, folder: &Path, overrides: &[String]) -> Result<RunConfig, Error> {
    let text = format!("{}\n[data]\npath = {folder:?}\nmicro_batch_size_per_gpu = 2\n", tiny.model);
    RunConfig::read("pair", &text, overrides)
}

/// The first step, with gradients.
fn step(config: &RunConfig, folder: &Path) -> Result<(), Error> {
    let (batch, dump) = (folder.join("samples.safetensors"), folder.join("dump.safetensors"));
    let request = StepRequest {
        batch,
        dump: dump.clone(),
        weights: None,
        torch_seed: Some(1),
        grads: true,
        operators: false,
    };
    let told = dump_step(config, &request)?;
    let expected =
        "noise and timesteps are what the CPU's generator draws after seed 1, on every device\n";
    assert_eq!(told, expected);
    assert_eq!(SafeTensors::open(&dump)?.metadata()["draws"], "host");
    Ok(())
}

/// All ways to set the flags.
fn settings_of(flags: &[&str]) -> Vec<Vec<String>> {
    let set = |bits: usize| {
        (0..flags.len())
            .map(move |at| format!("flow_matching.adapter.{}={}", flags[at], bits >> at & 1 == 1))
    };
    (0..1 << flags.len()).map(|bits| set(bits).collect()).collect()
}

/// The assignments that the hints of a refusal name, and true if the adapter's own arguments are to
/// be left out.
fn hinted(refusal: &str) -> (Vec<String>, bool) {
    let hints = refusal.split("; ").filter_map(|part| part.strip_prefix("set "));
    let assignments = hints.flat_map(|hint| {
        hint.split(", and no arguments of").next().unwrap().split(" and ").map(String::from)
    });
    (assignments.collect(), refusal.contains(", and no arguments of"))
}

#[test]
fn every_model_with_every_adapter_takes_its_first_step_or_is_refused_with_a_hint_that_works() {
    let (mut ran, mut refused) = (0, 0);
    for (model, tiny, model_flags) in MODELS {
        let root = TempDir::new().unwrap();
        data(&tiny, root.path());
        for model_flag in model_flags {
            for (adapter, flags) in ADAPTERS {
                for settings in settings_of(flags) {
                    let what = format!("{model} {model_flag} with {adapter} {settings:?}");
                    let mut overrides: Vec<String> =
                        vec![format!("flow_matching.adapter_type={adapter}")];
                    overrides.extend((!model_flag.is_empty()).then(|| model_flag.to_string()));
                    let whole = [&overrides[..], &settings].concat();
                    match read(&tiny, root.path(), &whole) {
                        Ok(config) => {
                            step(&config, root.path())
                                .unwrap_or_else(|error| panic!("{what}: {error}"));
                            ran += 1;
                        }
                        Err(error) => {
                            assert_eq!(error.exit_code(), 50, "{what}: {error}");
                            let text = error.to_string();
                            assert!(
                                text.contains(&format!("`{model}`"))
                                    || text.contains("the model's"),
                                "{what}: {text}"
                            );
                            let (hints, without_arguments) = hinted(&text);
                            assert!(!hints.is_empty(), "{what}: {text}");
                            let kept = if without_arguments { &overrides[..] } else { &whole };
                            let followed = [kept, &hints].concat();
                            let config = read(&tiny, root.path(), &followed)
                                .unwrap_or_else(|again| panic!("{what}: {text}\nthen {again}"));
                            step(&config, root.path())
                                .unwrap_or_else(|error| panic!("{what}, as hinted: {error}"));
                            refused += 1;
                        }
                    }
                }
            }
        }
    }
    println!("{ran} pairs ran, {refused} were refused");
    assert!(ran > 10 && refused > 100, "{ran} ran, {refused} were refused");
}

/// Values at the edges and beyond.
const EDGES: [&str; 14] = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "5",
    "7",
    "11",
    "64",
    "65",
    "65536",
    "1048576",
    "9223372036854775807",
    "1e300",
];
/// Parameters of a model that a test can take a step with.
const SMALL: i64 = 2_000_000;

/// Overrides that set each key of the model's table, and each place of its arrays, to an edge.
fn edges(config: &RunConfig) -> Vec<String> {
    let listing: toml::Table = toml::from_str(&config.to_toml()).unwrap();
    let tables = listing["model"].as_table().unwrap();
    let (name, table) =
        tables.iter().find_map(|(name, value)| Some((name, value.as_table()?))).unwrap();
    let mut found = Vec::new();
    for (key, value) in table {
        for edge in EDGES {
            match value {
                toml::Value::Array(items) => found.extend((0..items.len()).map(|at| {
                    let mut changed: Vec<String> = items.iter().map(ToString::to_string).collect();
                    changed[at] = edge.into();
                    format!("model.{name}.{key}=[{}]", changed.join(","))
                })),
                toml::Value::Integer(_) | toml::Value::Float(_) => {
                    found.push(format!("model.{name}.{key}={edge}"))
                }
                _ => {}
            }
        }
    }
    found
}

/// A configuration that is read and planned either takes its step or is refused as one that does
/// not fit the data; none panics.
#[test]
fn the_edges_of_a_models_settings_are_refused_as_configuration_or_train() {
    let (mut ran, mut refused, mut wrong) = (0, 0, Vec::new());
    for (model, tiny, _) in MODELS {
        let root = TempDir::new().unwrap();
        data(&tiny, root.path());
        let adapter = vec![format!("flow_matching.adapter_type={}", tiny.adapter)];
        let hint = hinted(
            &read(&tiny, root.path(), &adapter)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default(),
        )
        .0;
        let base = [adapter, hint].concat();
        let config = read(&tiny, root.path(), &base).unwrap();
        for edge in edges(&config) {
            let attempt = || -> Result<(), Error> {
                let config =
                    read(&tiny, root.path(), &[&base[..], std::slice::from_ref(&edge)].concat())?;
                check(
                    &config,
                    &CheckRequest { world_size: 1, latents: None, text_tokens: 512, scaling: None },
                )?;
                let parameters: i64 =
                    config.model.family.stages()?.iter().map(|stage| stage.params().numel()).sum();
                if parameters < SMALL { step(&config, root.path()) } else { Ok(()) }
            };
            match catch_unwind(AssertUnwindSafe(attempt)) {
                Ok(Ok(())) => ran += 1,
                Ok(Err(error)) if error.exit_code() == 50 => refused += 1,
                Ok(Err(error)) => wrong.push(format!("{model} {edge}: {error}")),
                Err(_) => wrong.push(format!("{model} {edge}: panicked")),
            }
        }
    }
    println!("{ran} trained or could, {refused} were refused");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(ran > 100 && refused > 500, "{ran} ran, {refused} were refused");
}
