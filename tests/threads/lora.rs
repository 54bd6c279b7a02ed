//! A part of a model trains as the whole does: the same bits on any number of ranks and under every
//! sharding, an exact resume, checkpoints of nothing but the part. The rest stays what it was.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use fm_dist::assembly::trained_replica;
use fm_dist::commands::{ExportRequest, StepRequest, dump_step, export};
use fm_dist::error::Error;
use fm_dist::files::safetensors::{self, SafeTensors};
use fm_dist::lora::Dialect;
use fm_dist::rng::{Key, Purpose};
use fm_dist::run::Resume;
use fm_dist::run::checkpoint::SavedWeights;
use fm_dist::run::lora::AddedLora;
use fm_dist::sample::{SampleRequest, sample};
use fm_dist::settings::Choice;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::sharding::SHARDINGS;
use super::training::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, Tiny, WAN};
use crate::runs::{checkpoint, column, tiny, train_in_threads};

/// A LoRA with everything that could depend on who computes what.
const LORA: &[&str] =
    &["lora.rank=4", "lora.alpha=8", "lora.dropout=0.25", "lora.target_modules=['all-linear']"];

/// Names and bytes of the tensors of a checkpoint's parameters.
fn saved(run: &Path, step: u64) -> BTreeMap<String, Vec<i64>> {
    let folder = run.join(format!("step-{step:08}"));
    let file = SafeTensors::open(folder.join("model-00001-of-00001.safetensors")).unwrap();
    file.tensors().iter().map(|info| (info.name.clone(), info.shape.clone())).collect()
}

fn digits(root: &Path, name: &str, ranks: usize, overrides: &[&str]) -> PathBuf {
    let output = format!("output_dir={}", root.join(name).display());
    let config = tiny(&[LORA, &["max_steps=8", output.as_str()], overrides].concat());
    train_in_threads(&config, &Resume::Never, ranks).unwrap()
}

/// Settings under which every number of ranks sums alike.
const DETERMINISTIC: &[&str] =
    &["parallel.deterministic=true", "parallel.seed_scope=sample", "train.global_batch_size=64"];

#[test]
fn a_lora_with_dropout_is_bit_equal_at_every_world_size_and_under_every_sharding() {
    for dtype in ["model.dtype=float32", "model.dtype=bfloat16"] {
        let root = TempDir::new().unwrap();
        let run = |name: &str, ranks: usize, settings: &[&str]| {
            let overrides = [DETERMINISTIC, &[dtype], settings].concat();
            checkpoint(&digits(root.path(), name, ranks, &overrides), 8)
        };
        let alone = run("alone", 1, &[]);
        for ranks in [2, 4, 8] {
            assert!(run(&format!("ranks-{ranks}"), ranks, &[]) == alone, "{ranks} ranks, {dtype}");
        }
        assert!(run("again", 2, &["parallel.recompute=always"]) == alone, "recomputed, {dtype}");
        for (word, settings) in &SHARDINGS[1..] {
            assert!(run(word, 2, settings) == alone, "{word} on 2 ranks, {dtype}");
        }
        assert!(run("other", 1, &["lora.dropout=0.0"]) != alone, "dropout does something");
    }
}

#[test]
fn every_sharding_gives_the_bits_of_none() {
    let root = TempDir::new().unwrap();
    let runs = SHARDINGS.map(|(word, settings)| {
        let overrides =
            [&["train.global_batch_size=24", "model.dtype=bfloat16"], settings].concat();
        checkpoint(&digits(root.path(), word, 3, &overrides), 8)
    });
    assert!(runs[1..].iter().all(|sharded| *sharded == runs[0]));
}

#[test]
fn a_resume_at_another_world_size_and_sharding_changes_no_bit() {
    let root = TempDir::new().unwrap();
    let config = |name: &str, settings: &[&str]| {
        let output = format!("output_dir={}", root.path().join(name).display());
        let steps = ["checkpoint.every_n_steps=4", "checkpoint.keep_last=9", "max_steps=12"];
        tiny(&[LORA, DETERMINISTIC, &steps[..], &[output.as_str()], settings].concat())
    };
    let unbroken = train_in_threads(&config("unbroken", &[]), &Resume::Never, 1).unwrap();
    let folder = root.path().join("wandering");
    for (round, (ranks, sharding)) in [(4, 3), (2, 0), (1, 2)].into_iter().enumerate() {
        let resume = if round == 0 { Resume::Never } else { Resume::Latest };
        train_in_threads(&config("wandering", SHARDINGS[sharding].1), &resume, ranks).unwrap();
        for later in round + 2..=3 {
            let _ = fs::remove_dir_all(folder.join(format!("step-{:08}", 4 * later)));
        }
    }
    assert_eq!(checkpoint(&unbroken, 12), checkpoint(&folder, 12));
}

/// A family's run of few steps, with these settings.
fn run_of(family: &Tiny, root: &Path, name: &str, overrides: &[&str]) -> Result<PathBuf, Error> {
    let data = root.join("data");
    if !data.exists() {
        family.write_data(&data);
    }
    let overrides = [&["max_steps=10", "checkpoint.every_n_steps=5"], overrides].concat();
    train_in_threads(&family.config(&data, &root.join(name), &overrides), &Resume::Never, 2)
}

/// The model of a run as a folder.
fn exported(run: &Path, out: &Path, merge: bool) -> Result<(), Error> {
    export(&ExportRequest {
        run: run.into(),
        out: out.into(),
        max_shard_bytes: 1 << 30,
        dtype: None,
        merge,
        format: None,
        weights: SavedWeights::Trained,
    })
}

/// A folder of a family's weights; no parameter is what it begins as.
fn base(family: &Tiny, root: &Path, name: &str, seed: u64) -> String {
    let run = run_of(family, root, &format!("{name}-run"), &[&format!("seed={seed}")]).unwrap();
    let folder = root.join(name);
    exported(&run, &folder, false).unwrap();
    format!("model.path={:?}", folder.to_str().unwrap())
}

#[test]
fn adapters_of_every_family_train_alone_and_resume_exactly() {
    for family in [FLUX, FLUX2, QWEN_IMAGE, WAN, HUNYUAN_VIDEO15] {
        let root = TempDir::new().unwrap();
        let data = root.path().join("data");
        family.write_data(&data);
        let lr = ["optimizer.adamw.lr=2e-2"];
        let config =
            |name: &str| family.config(&data, &root.path().join(name), &[LORA, &lr].concat());
        let unbroken = train_in_threads(&config("unbroken"), &Resume::Never, 2).unwrap();
        let losses: Vec<f64> =
            column(&unbroken, "loss").into_iter().map(|(_, loss)| loss).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses[..6]), mean(&losses[24..]));
        assert!(last < 0.9 * first, "{}: the loss went from {first} to {last}", family.adapter);
        let names = saved(&unbroken, 30);
        assert!(names.keys().all(|name| name.contains(".lora_")), "{:?}", names.keys());
        let resumed = train_in_threads(&config("resumed"), &Resume::Never, 2).unwrap();
        fs::remove_dir_all(resumed.join("step-00000030")).unwrap();
        train_in_threads(&config("resumed"), &Resume::Latest, 2).unwrap();
        assert_eq!(checkpoint(&unbroken, 30), checkpoint(&resumed, 30), "{}", family.adapter);
    }
}

/// Loss, prediction and gradients of one step.
fn step(family: &Tiny, root: &Path, weights: Option<&Path>, overrides: &[&str]) -> SafeTensors {
    let (data, dump) = (root.join("data"), root.join("dump.safetensors"));
    let request = StepRequest {
        batch: data.join("samples.safetensors"),
        dump: dump.clone(),
        weights: weights.map(Path::to_path_buf),
        torch_seed: Some(11),
        grads: true,
        operators: false,
    };
    dump_step(&family.config(&data, &root.join("unused"), overrides), &request).unwrap();
    SafeTensors::open(&dump).unwrap()
}

fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    let norm = |tensor: &Tensor| tensor.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(found - expected)) / norm(expected)
}

/// A LoRA written in every format that holds it is the LoRA.
fn check_files(family: &Tiny, root: &Path, run: &Path, settings: &[&str], prediction: &Tensor) {
    for (word, format) in Dialect::ALL {
        let out = root.join(format!("lora-{word}.safetensors"));
        let request = ExportRequest {
            run: run.into(),
            out: out.clone(),
            max_shard_bytes: 1,
            dtype: None,
            merge: false,
            format: Some(*format),
            weights: SavedWeights::Trained,
        };
        if settings.iter().any(|set| set.starts_with("train.trainable")) {
            let said = export(&request).unwrap_err().to_string();
            assert!(said.contains("beside its LoRA, which no LoRA file holds"), "{said}");
            continue;
        }
        export(&request).unwrap();
        let first = format!("lora.init_from={:?}", out.to_str().unwrap());
        let settings = [settings, &["lora.dropout=0.0", first.as_str()]].concat();
        let found = step(family, root, None, &settings).read("model_pred").unwrap();
        let off = distance(&found, prediction);
        assert!(off < 2e-5, "{} as {word}: {off}", family.adapter);
    }
}

#[test]
fn each_checkpoint_holds_the_formats_that_were_chosen() {
    let root = TempDir::new().unwrap();
    let export = "lora.export=['diffusers', 'peft']";
    let run = run_of(&FLUX, root.path(), "run", &[LORA, &[export]].concat()).unwrap();
    for step in ["step-00000005", "step-00000010"] {
        let file = SafeTensors::open(run.join(step).join("lora-diffusers.safetensors")).unwrap();
        assert_eq!(file.tensors().len(), saved(&run, 10).len());
        assert!(run.join(step).join("lora-peft/adapter_config.json").is_file());
    }
    // A format that is asked for later, of a LoRA whose patterns give every module a rank.
    let patterns = ["lora.rank_pattern={'*' = 8}", "lora.export=['diffusers']"];
    let other = run_of(&FLUX, root.path(), "other", &[LORA, &patterns].concat()).unwrap();
    let last = other.join("step-00000010");
    assert!(last.join("lora-diffusers.safetensors").is_file());
    let more = [LORA, &patterns[..1], &["max_steps=11", "lora.export=['diffusers', 'kohya']"]];
    let config = FLUX.config(&root.path().join("data"), &other, &more.concat());
    train_in_threads(&config, &Resume::Latest, 2).unwrap();
    assert!(last.join("lora-kohya.safetensors").is_file(), "made up for");

    // Other files in its folder are no part of a checkpoint.
    fs::remove_dir_all(run.join("step-00000010")).unwrap();
    let config = FLUX.config(&root.path().join("data"), &run, &[LORA, &["max_steps=10"]].concat());
    train_in_threads(&config, &Resume::Latest, 2).unwrap();
}

#[test]
fn a_merged_model_predicts_what_the_base_with_its_lora_does() {
    for (family, kind) in [
        (FLUX, &[][..]),
        (FLUX2, &["lora.use_dora=true"]),
        (QWEN_IMAGE, &["lora.use_rslora=true"]),
        (WAN, &["train.trainable=['proj_out', 'blocks.1.attn2']"]),
        (HUNYUAN_VIDEO15, &["lora.use_dora=true", "lora.use_rslora=true"]),
    ] {
        let root = TempDir::new().unwrap();
        let base = base(&family, root.path(), "base", 1);
        let settings = [LORA, &[&base, "optimizer.adamw.lr=2e-2"], kind].concat();
        let run = run_of(&family, root.path(), "run", &settings).unwrap();
        let refused = exported(&run, &root.path().join("no"), false).unwrap_err();
        assert!(refused.to_string().contains("--merge the whole model"), "{refused}");
        let merged = root.path().join("merged");
        exported(&run, &merged, true).unwrap();
        let merged = format!("model.path={:?}", merged.to_str().unwrap());
        let prediction = |weights, settings: &[&str]| {
            let settings = [settings, &["lora.dropout=0.0"]].concat();
            step(&family, root.path(), weights, &settings).read("model_pred").unwrap()
        };
        let changed = prediction(Some(run.as_path()), &settings);
        let without = [&settings[LORA.len() + 2..], &[merged.as_str()]].concat();
        let without: Vec<&str> =
            without.into_iter().filter(|set| !set.starts_with("lora")).collect();
        let whole = step(&family, root.path(), None, &without).read("model_pred").unwrap();
        assert!(distance(&whole, &changed) < 2e-5, "{}", distance(&whole, &changed));
        check_files(&family, root.path(), &run, &settings, &changed);
        let base = step(&family, root.path(), None, &[&base]).read("model_pred").unwrap();
        assert!(distance(&base, &changed) > 1e-3, "{}: the LoRA does something", family.adapter);
    }
}

#[test]
fn a_lora_begins_as_the_base_and_its_strength_can_be_chosen() {
    for kind in ["lora.use_dora=false", "lora.use_dora=true"] {
        let root = TempDir::new().unwrap();
        let base = base(&WAN, root.path(), "base", 1);
        let settings = [LORA, &[base.as_str(), "lora.dropout=0.0", kind]].concat();
        let of_base = step(&WAN, root.path(), None, &[&base]).read("model_pred").unwrap();
        let begun = step(&WAN, root.path(), None, &settings).read("model_pred").unwrap();
        assert!(distance(&begun, &of_base) < 1e-6, "{kind}");
        let run = run_of(&WAN, root.path(), "run", &settings).unwrap();
        let config = WAN.config(&root.path().join("data"), &run, &settings);
        let newest = run.join("step-00000010");
        let parameters = |strength| {
            let replica =
                trained_replica(&config, &newest, SavedWeights::Trained, Device::Cpu, strength)
                    .unwrap();
            let scales = replica.stages.iter().flat_map(|stage| stage.params().low_ranks());
            scales.map(|change| change.scale()).collect::<Vec<_>>()
        };
        let (one, half) = (parameters(1.0), parameters(0.5));
        assert!(!one.is_empty() && one.iter().zip(&half).all(|(one, half)| 0.5 * one == *half));
    }
}

#[test]
fn what_is_not_named_is_frozen_and_in_no_checkpoint() {
    let root = TempDir::new().unwrap();
    let base = base(&FLUX, root.path(), "base", 1);
    let only = "train.trainable=['single_transformer_blocks', '*.attn.to_q']";
    let run = run_of(&FLUX, root.path(), "run", &[&base, only]).unwrap();
    let names = saved(&run, 10);
    let is_named =
        |name: &str| name.starts_with("single_transformer_blocks.") || name.contains(".attn.to_q.");
    assert!(names.len() > 10 && names.keys().all(|name| is_named(name)), "{:?}", names.keys());
    exported(&run, &root.path().join("out"), false).unwrap();
    let open = |folder: &str| {
        let file = "diffusion_pytorch_model.safetensors";
        SafeTensors::open(root.path().join(folder).join(file)).unwrap()
    };
    let (before, after) = (open("base"), open("out"));
    assert_eq!(before.tensors().len(), after.tensors().len());
    for info in before.tensors() {
        let [before, after] = [&before, &after].map(|file| file.read(&info.name).unwrap());
        assert_eq!(before.equal(&after), !is_named(&info.name), "{}", info.name);
    }
}

#[test]
fn a_run_goes_on_upon_its_own_base_alone() {
    let root = TempDir::new().unwrap();
    let (one, other) = (base(&FLUX, root.path(), "one", 1), base(&FLUX, root.path(), "other", 2));
    let run = run_of(&FLUX, root.path(), "run", &[LORA, &[&one]].concat()).unwrap();
    let again = |path: &str, settings: &[&str]| {
        let overrides = [LORA, &[path, "max_steps=12"], settings].concat();
        let config = FLUX.config(&root.path().join("data"), &run, &overrides);
        train_in_threads(&config, &Resume::Latest, 2).map(drop)
    };
    let said = again(&other, &[]).unwrap_err();
    assert_eq!(said.exit_code(), 51, "{said}");
    let text = said.to_string();
    assert!(
        text.contains("the frozen parameters are those of")
            && text.contains("the checkpoint's were those of"),
        "{text}"
    );
    let said = again(&one, &["lora.alpha=16"]).unwrap_err().to_string();
    assert!(said.contains("lora.alpha is 16.0, the checkpoint's was 8.0: another model"), "{said}");
    let said = again(&one, &["lora.target_modules=['attention']"]).unwrap_err().to_string();
    assert!(said.contains("unexpected"), "{said}");
    // The same weights at another place.
    fs::rename(root.path().join("one"), root.path().join("moved")).unwrap();
    again(&one.replace("/one", "/moved"), &[]).unwrap();
}

#[test]
fn a_file_of_another_model_begins_no_lora() {
    let root = TempDir::new().unwrap();
    let run = run_of(&FLUX, root.path(), "run", LORA).unwrap();
    let file = run.join("step-00000010").join("model-00001-of-00001.safetensors");
    let first = format!("lora.init_from={:?}", file.to_str().unwrap());
    let begin = |name: &str, overrides: &[&str]| {
        let overrides = [LORA, &[first.as_str()], overrides].concat();
        run_of(&FLUX, root.path(), name, &overrides)
    };
    begin("more", &["max_steps=1"]).unwrap();
    for (name, overrides, says) in [
        ("rank", &["lora.rank=3"][..], "[lora] needs [3, "),
        ("fewer", &["lora.target_modules=['attention']"], "which is no target of [lora]"),
    ] {
        let said = begin(name, overrides).unwrap_err();
        assert!(said.to_string().contains(says), "{said}");
    }
}

/// Samples of a FLUX run from given noise, with its own LoRA at a strength and others beside it.
fn sampled(root: &Path, run: &Path, own: f64, loras: Vec<AddedLora>) -> Result<Tensor, Error> {
    let (conditions, out) = (root.join("conditions.safetensors"), root.join("out.safetensors"));
    let draw = |scope: u64, size: &[i64]| {
        let draw = || Tensor::randn(size, (Kind::Float, Device::Cpu));
        Key::new(8, Purpose::Test).scope(scope).seeded(draw)
    };
    let tensors = [
        ("noise", draw(0, &[2, 4, 8, 12])),
        ("text_embeddings", draw(1, &[2, 5, 12])),
        ("pooled_prompt_embeds", draw(2, &[2, 10])),
    ];
    let named = tensors.each_ref().map(|(name, tensor)| (*name, tensor));
    let metadata = BTreeMap::from([("data_type".to_string(), "image".to_string())]);
    safetensors::write(&mut File::create(&conditions).unwrap(), &named, &metadata).unwrap();
    sample(&SampleRequest {
        run: Some(run.into()),
        out: vec![out.clone()],
        conditions: Some(conditions),
        num_steps: Some(3),
        lora_scale: own,
        loras,
        ..SampleRequest::default()
    })?;
    SafeTensors::open(&out).unwrap().read("samples")
}

#[test]
fn loras_beside_a_runs_own_sum_up_whatever_the_base_is_held_in() {
    for form in ["bfloat16", "float8_e4m3", "nf4"] {
        let root = TempDir::new().unwrap();
        let form = format!("model.frozen_dtype={form}");
        let settings = [LORA, &["optimizer.adamw.lr=2e-2", form.as_str()]].concat();
        let run = run_of(&FLUX, root.path(), "run", &settings).unwrap();
        let file = root.path().join("own.safetensors");
        export(&ExportRequest {
            run: run.clone(),
            out: file.clone(),
            max_shard_bytes: 1,
            dtype: None,
            merge: false,
            format: Some(Dialect::Diffusers),
            weights: SavedWeights::Trained,
        })
        .unwrap();
        let of = |own: f64, scales: &[f64]| {
            let lora = |scale: &f64| AddedLora { file: file.clone(), scale: *scale };
            sampled(root.path(), &run, own, scales.iter().map(lora).collect()).unwrap()
        };
        let whole = of(1.0, &[]);
        for (own, scales) in
            [(0.5, &[0.5][..]), (0.0, &[1.0]), (0.0, &[0.75, 0.25]), (2.0, &[-1.0])]
        {
            let off = distance(&of(own, scales), &whole);
            assert!(off < 1e-5, "{form}, {own} and {scales:?}: {off}");
        }
        assert!(distance(&of(0.0, &[]), &whole) > 1e-3, "{form}: the LoRA does something");
        let other = AddedLora { file: run.join("none.safetensors"), scale: 1.0 };
        let said = sampled(root.path(), &run, 1.0, vec![other]).unwrap_err().to_string();
        assert!(said.contains("none.safetensors"), "{said}");
    }
}
