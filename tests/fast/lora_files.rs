//! Files of LoRAs have the names of the programs that load them, and what is no LoRA of a
//! known model is refused in one line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use fm_dist::error::Error;
use fm_dist::files::outputs::Named;
use fm_dist::files::safetensors::{self, SafeTensors};
use fm_dist::lora::family::Part;
use fm_dist::lora::{self, Dialect, Facts, Family, Found, Linears, Lora, Pair};
use fm_dist::model;
use fm_dist::rng::{Key, Purpose};
use fm_dist::settings::{Choice, Family as _};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
const KEY: Key = Key { seed: 1, purpose: Purpose::Test, step: 0, micro_batch: 0, scope: 0 };

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The linear maps of a list, one for each block.
fn listed(file: &Path) -> Linears {
    let text = fs::read_to_string(file).unwrap();
    let mut linears = Linears::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<i64>().unwrap();
        let shape = [number(1), number(2)];
        match words[0].split_once('*') {
            Some((before, after)) => linears
                .extend((0..number(3)).map(|block| (format!("{before}{block}{after}"), shape))),
            None => drop(linears.insert(words[0].into(), shape)),
        }
    }
    linears
}

fn diffusers_list(model: &str) -> Linears {
    listed(&fixtures().join(format!("linears/diffusers/{model}.txt")))
}

/// Without the blocks behind the first two.
fn beginning(linears: Linears) -> Linears {
    let is_first = |name: &str| match name.split_once("blocks.") {
        Some((_, rest)) => rest.starts_with("0.") || rest.starts_with("1."),
        None => true,
    };
    linears.into_iter().filter(|(name, _)| is_first(name)).collect()
}

fn family_of(model: &str) -> Family {
    let folder = fixtures().join("models").join(model);
    Family::parse(model::read_folder(&folder).unwrap().name()).unwrap()
}

fn published() -> Vec<String> {
    let entries = fs::read_dir(fixtures().join("linears/diffusers")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(names.len() >= 13, "{names:?}");
    names
}

fn random_pair(name: &str, [outputs, inputs]: [i64; 2], rank: i64, alpha: f64) -> Pair {
    let random = |shape: [i64; 2]| Tensor::randn(shape, FLOAT);
    let draw = || (random([rank, inputs]), random([outputs, rank]));
    let (a, b) = KEY.named(name).seeded(draw);
    Pair { a, b, alpha, magnitude: None }
}

fn random_lora(linears: &Linears, rank: i64, alpha: f64) -> Lora {
    let pair = |(name, shape): (&String, &[i64; 2])| {
        (name.clone(), random_pair(name, *shape, rank, alpha))
    };
    Lora { pairs: linears.iter().map(pair).collect(), facts: Facts::default() }
}

fn out(path: &Path) -> Named<'_> {
    Named { argument: "--out", path }
}

fn read(path: &Path, family: Option<Family>) -> Result<Found, Error> {
    lora::read(Named { argument: "--lora", path }, family)
}

/// The file of tensors of a written LoRA.
fn tensors(dialect: Dialect, path: &Path) -> SafeTensors {
    let inside = path.join("adapter_model.safetensors");
    SafeTensors::open(if dialect == Dialect::Peft { &inside } else { path }).unwrap()
}

fn assert_same_updates(found: &Lora, expected: &Lora, what: &str) {
    let names = |lora: &Lora| lora.pairs.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for (name, pair) in &expected.pairs {
        let (found, expected) = (found.pairs[name].product(), pair.product());
        let difference = (found - &expected).norm().double_value(&[]);
        assert!(difference <= 1e-5 * expected.norm().double_value(&[]), "{what}: {name}");
    }
}

#[test]
fn every_linear_map_of_every_published_model_has_its_name_and_shape() {
    let mut reached: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for name in published() {
        let (family, list) = (family_of(&name), diffusers_list(&name));
        let model = model::read_folder(&fixtures().join("models").join(&name)).unwrap();
        let stages = model.stages().unwrap();
        let infos = stages.iter().flat_map(|stage| stage.params().infos());
        let ours = lora::linears(infos.map(|info| (info.name.as_str(), info.shape.as_slice())));
        for (linear, shape) in &list {
            assert_eq!(ours.get(linear), Some(shape), "{name}: {linear}");
            let found = family.linear(linear).unwrap_or_else(|| panic!("{name}: {linear}"));
            reached.entry(family.word()).or_default().insert(found.linear.diffusers.into());
        }
        random_lora(&list, 1, 1.0).fit(&ours).unwrap();
    }
    for (word, family) in Family::ALL {
        let unreached = |name: &&str| !reached[word].contains(*name);
        let names = family.linears.iter().map(|linear| linear.diffusers).filter(unreached);
        // Models with mean flow are not published.
        let others: Vec<&str> = names.filter(|name| !name.contains("embedder_r.")).collect();
        assert!(others.is_empty(), "{word}: no model has {others:?}");
    }
}

/// Checks that the file's pairs are those of the native list, by name and shape.
fn assert_native(file: &SafeTensors, list: &Linears, prefix: &str, is_flat: bool, what: &str) {
    let [a, b] = if is_flat {
        [".lora_down.weight", ".lora_up.weight"]
    } else {
        [".lora_A.weight", ".lora_B.weight"]
    };
    let spelled = |name: &String| {
        let name = if is_flat { name.replace('.', "_") } else { name.clone() };
        format!("{prefix}{name}")
    };
    let stems: BTreeSet<&str> =
        file.tensors().iter().filter_map(|info| info.name.strip_suffix(a)).collect();
    let expected: BTreeSet<String> = list.keys().map(spelled).collect();
    assert_eq!(stems, expected.iter().map(String::as_str).collect(), "{what}");
    for (name, [outputs, inputs]) in list {
        let stem = spelled(name);
        let shape = |suffix| file.info(&format!("{stem}{suffix}")).unwrap().shape.clone();
        assert_eq!((shape(a)[1], shape(b)[0]), (*inputs, *outputs), "{what}: {stem}");
    }
}

#[test]
fn files_of_published_models_have_the_names_and_shapes_of_the_programs_that_load_them() {
    let root = TempDir::new().unwrap();
    // A model, its list in kohya's names, and its list in ComfyUI's where diffusers' are not taken.
    let cases = [
        ("flux1-dev", "flux1-dev", None),
        ("flux2-dev", "flux2-dev", None),
        ("wan2.1-t2v-14b", "wan2.1-t2v-14b", Some("wan2.1-t2v-14b")),
        ("wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-480p", Some("wan2.1-i2v-14b-480p")),
        (
            "hunyuanvideo1.5-t2v-720p",
            "hunyuanvideo1.5-t2v-720p",
            Some("hunyuanvideo1.5-t2v-720p.comfyui"),
        ),
    ];
    let native =
        |name: &str| beginning(listed(&fixtures().join(format!("linears/native/{name}.txt"))));
    for (model, kohya, comfyui) in cases {
        let (family, linears) = (family_of(model), beginning(diffusers_list(model)));
        let lora = random_lora(&linears, 1, 2.0);
        let write = |dialect: Dialect| {
            let path = root.path().join(format!("{model}.{}", dialect.word()));
            lora::write(&lora, family, dialect, out(&path)).unwrap();
            tensors(dialect, &path)
        };
        assert_native(&write(Dialect::Kohya), &native(kohya), "lora_unet_", true, model);
        if let Some(comfyui) = comfyui {
            let file = write(Dialect::Comfyui);
            assert_native(&file, &native(comfyui), "diffusion_model.", false, model);
        }
    }
}

/// Rows of a matrix as ComfyUI's table has them.
fn rows(part: Part) -> String {
    match part {
        Part::Whole => "whole".into(),
        Part::Swapped => "swapped".into(),
        Part::Slice { of, index } => format!("{} {}", of[..index].iter().sum::<i64>(), of[index]),
    }
}

#[test]
fn comfyui_finds_flux_under_diffusers_names_and_the_rest_under_its_own() {
    let table = fs::read_to_string(fixtures().join("linears/comfyui-flux.txt")).unwrap();
    let table: BTreeMap<&str, &str> =
        table.lines().map(|line| line.split_once(' ').unwrap()).collect();
    assert!(table.len() >= 36);
    let root = TempDir::new().unwrap();
    for (model, family) in [("flux1-dev", Family::Flux), ("flux2-dev", Family::Flux2)] {
        let path = root.path().join(model);
        let lora = random_lora(&beginning(diffusers_list(model)), 1, 1.0);
        lora::write(&lora, family, Dialect::Comfyui, out(&path)).unwrap();
        let file = tensors(Dialect::Comfyui, &path);
        for name in lora.pairs.keys() {
            let found = family.linear(name).unwrap();
            let native = found.linear.native;
            let stem = match table.get(found.linear.diffusers) {
                Some(target) => {
                    assert_eq!(*target, format!("{} {}", native.name, rows(native.part)), "{name}");
                    format!("transformer.{name}")
                }
                None => {
                    assert!(family == Family::Flux2 && native.part == Part::Whole, "{name}");
                    format!("diffusion_model.{}", native.name.replace('*', found.number))
                }
            };
            file.info(&format!("{stem}.lora_A.weight")).unwrap();
        }
    }
}

#[test]
fn queries_keys_and_values_are_the_rows_of_one_matrix_in_that_order() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("lora.safetensors");
    let parts = ["add_q_proj", "add_k_proj", "add_v_proj"];
    let names = parts.map(|part| format!("transformer_blocks.4.attn.{part}"));
    let linears: Linears = names.iter().map(|name| (name.clone(), [6, 6])).collect();
    let lora = random_lora(&linears, 2, 5.0);
    lora::write(&lora, Family::HunyuanVideo15, Dialect::Comfyui, out(&path)).unwrap();
    let file = SafeTensors::open(&path).unwrap();
    let stem = "diffusion_model.double_blocks.4.txt_attn.qkv";
    let read = |end: &str| file.read(&format!("{stem}{end}")).unwrap();
    let [a, b, alpha] = [".lora_A.weight", ".lora_B.weight", ".alpha"].map(read);
    // As ComfyUI computes it.
    let found = b.matmul(&a) * (alpha.double_value(&[]) / a.size()[0] as f64);
    assert_eq!((a.size(), alpha.double_value(&[])), (vec![6, 6], 15.0));
    let products = names.map(|name| lora.pairs[&name].product());
    let difference = (found - Tensor::cat(&products, 0)).abs().max().double_value(&[]);
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn a_lora_goes_through_all_dialects_and_comes_back() {
    let root = TempDir::new().unwrap();
    for model in [
        "flux1-schnell",
        "flux2-klein-4b",
        "qwen-image",
        "wan2.1-t2v-1.3b",
        "hunyuanvideo1.5-i2v-720p",
    ] {
        let family = family_of(model);
        // Small matrices; the multiples of a width stay.
        let small =
            |(name, shape): (String, [i64; 2])| (name, shape.map(|size| (size / 64).max(1)));
        let linears: Linears = beginning(diffusers_list(model)).into_iter().map(small).collect();
        let mut lora = random_lora(&linears, 2, 1.0);
        // Some modules have ranks and alphas of their own.
        let odd = lora.pairs.keys().nth(5).unwrap().clone();
        lora.pairs.insert(odd.clone(), random_pair(&odd, linears[&odd], 3, 6.0));
        lora.facts = Facts { steps: Some(7), dataset: Some("cats".into()), ..Facts::default() };
        let mut path = root.path().join(format!("{model}-0"));
        lora::write(&lora, family, Dialect::Diffusers, out(&path)).unwrap();
        let around = [
            Dialect::Comfyui,
            Dialect::Kohya,
            Dialect::Peft,
            Dialect::Comfyui,
            Dialect::Peft,
            Dialect::Kohya,
            Dialect::Diffusers,
        ];
        let mut before = Dialect::Diffusers;
        for (index, dialect) in around.into_iter().enumerate() {
            let what = format!("{model} from {} to {}", before.word(), dialect.word());
            let found = read(&path, None).unwrap();
            assert_eq!((found.family, found.dialect), (family, before), "{what}");
            assert_eq!(found.lora.facts.steps, Some(7), "{what}");
            assert_eq!(found.lora.facts.dataset.as_deref(), Some("cats"), "{what}");
            assert_same_updates(&found.lora, &lora, &what);
            path = root.path().join(format!("{model}-{}", index + 1));
            lora::write(&found.lora, family, dialect, out(&path)).unwrap();
            before = dialect;
        }
        let found = read(&path, None).unwrap();
        assert_same_updates(&found.lora, &lora, model);
    }
}

#[test]
fn dora_goes_through_the_dialects_too() {
    let root = TempDir::new().unwrap();
    let linears = diffusers_list("hunyuanvideo1.5-t2v-720p");
    let linears =
        linears.into_iter().filter(|(name, _)| name.starts_with("transformer_blocks.3.")).collect();
    let mut lora = random_lora(&linears, 2, 3.0);
    for (name, pair) in &mut lora.pairs {
        let draw = || Tensor::rand([pair.outputs()], FLOAT);
        pair.magnitude = Some(KEY.named(name).step(1).seeded(draw));
    }
    for (word, dialect) in Dialect::ALL {
        let path = root.path().join(word);
        lora::write(&lora, Family::HunyuanVideo15, *dialect, out(&path)).unwrap();
        let found = read(&path, None).unwrap();
        assert_same_updates(&found.lora, &lora, word);
        for (name, pair) in &lora.pairs {
            let magnitude = |pair: &Pair| pair.magnitude.as_ref().unwrap().shallow_clone();
            assert!(magnitude(&found.lora.pairs[name]).equal(&magnitude(pair)), "{word}: {name}");
        }
    }
    // Queries alone cannot have a magnitude where keys and values stand in the same matrix.
    lora.pairs.retain(|name, _| name.ends_with("to_q"));
    let path = root.path().join("queries");
    let error =
        lora::write(&lora, Family::HunyuanVideo15, Dialect::Comfyui, out(&path)).unwrap_err();
    assert!(
        error.exit_code() == 50 && error.to_string().ends_with("only 1 have DoRA's magnitudes"),
        "{error}"
    );
    assert!(!path.exists());
}

/// Writes a file as another program might.
fn save(path: &Path, tensors: &[(&str, Tensor)], metadata: &[(&str, Value)]) {
    let borrowed: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), String::from);
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), text(value))).collect();
    safetensors::write(&mut File::create(path).unwrap(), &borrowed, &metadata).unwrap();
}

fn ones(shape: &[i64]) -> Tensor {
    Tensor::ones(shape, FLOAT)
}

#[test]
fn names_as_other_programs_write_them_are_understood() {
    let root = TempDir::new().unwrap();
    let cases = [
        ("base_model.model.blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight", Dialect::Peft),
        (
            "blocks.0.attn1.to_q",
            ".lora_A.default.weight",
            ".lora_B.default.weight",
            Dialect::Diffusers,
        ),
        (
            "transformer.blocks.0.attn1.to_q",
            ".lora.down.weight",
            ".lora.up.weight",
            Dialect::Diffusers,
        ),
        (
            "model.diffusion_model.blocks.0.self_attn.q",
            ".lora_down.weight",
            ".lora_up.weight",
            Dialect::Comfyui,
        ),
        (
            "diffusion_model.blocks.0.attn1.to_q",
            ".lora_A.weight",
            ".lora_B.weight",
            Dialect::Comfyui,
        ),
        (
            "lora_transformer_blocks_0_attn1_to_q",
            ".lora_down.weight",
            ".lora_up.weight",
            Dialect::Kohya,
        ),
        ("lora_unet_blocks_0_self_attn_q", ".lora_down.weight", ".lora_up.weight", Dialect::Kohya),
    ];
    for (index, (stem, a, b, dialect)) in cases.into_iter().enumerate() {
        let folder = root.path().join(index.to_string());
        fs::create_dir(&folder).unwrap();
        let config =
            json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]});
        fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
        let path = folder.join("adapter_model.safetensors");
        let (a, b) = (format!("{stem}{a}"), format!("{stem}{b}"));
        save(&path, &[(&a, ones(&[2, 6])), (&b, ones(&[8, 2]))], &[]);
        let found = read(&path, None).unwrap();
        assert_eq!((found.family, found.dialect), (Family::Wan, dialect), "{stem}");
        let pair = &found.lora.pairs["blocks.0.attn1.to_q"];
        assert_eq!((pair.rank(), pair.inputs(), pair.outputs(), pair.scale()), (2, 6, 8, 1.0));
        let of_folder = read(&folder, None).unwrap();
        assert_same_updates(&of_folder.lora, &found.lora, stem);
    }
}

#[test]
fn scales_are_those_of_the_programs_that_wrote_them() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("lora.safetensors");
    let stem = "transformer.single_transformer_blocks.0.proj_mlp";
    let (a, b) = (format!("{stem}.lora_A.weight"), format!("{stem}.lora_B.weight"));
    let alpha = format!("{stem}.alpha");
    let scale = |with_alpha: bool, config: Option<Value>| {
        let mut tensors = vec![(a.as_str(), ones(&[4, 6])), (b.as_str(), ones(&[24, 4]))];
        if with_alpha {
            tensors.push((alpha.as_str(), Tensor::from_slice(&[2.0f32]).squeeze()));
        }
        let metadata: Vec<_> =
            config.into_iter().map(|config| ("lora_adapter_metadata", config)).collect();
        save(&path, &tensors, &metadata);
        read(&path, None).unwrap().lora.pairs["single_transformer_blocks.0.proj_mlp"].scale()
    };
    assert_eq!(scale(false, None), 1.0);
    assert_eq!(scale(true, None), 0.5);
    let config = json!({"transformer.r": 4, "transformer.lora_alpha": 8});
    assert_eq!(scale(false, Some(config)), 2.0);
    let config = json!({"r": 4, "lora_alpha": 8, "use_rslora": true});
    assert_eq!(scale(false, Some(config)), 4.0);
    let config = json!({"r": 2, "lora_alpha": 8, "rank_pattern": {"proj_mlp": 4}, "alpha_pattern": {"proj_mlp": 1}});
    assert_eq!(scale(false, Some(config)), 0.25);
}

#[test]
fn families_with_equal_names_are_told_apart() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("lora.safetensors");
    let told = |width: i64, blocks: &[u32], metadata: &[(&str, Value)]| {
        let names: Vec<[String; 2]> = blocks
            .iter()
            .map(|block| {
                ["A", "B"].map(|half| {
                    format!("transformer.transformer_blocks.{block}.attn.to_q.lora_{half}.weight")
                })
            })
            .collect();
        let tensors: Vec<(&str, Tensor)> = names
            .iter()
            .flat_map(|[a, b]| [(a.as_str(), ones(&[1, width])), (b.as_str(), ones(&[width, 1]))])
            .collect();
        save(&path, &tensors, metadata);
        read(&path, None).map(|found| found.family).map_err(|error| error.to_string())
    };
    let all = |blocks: u32| (0..blocks).collect::<Vec<u32>>();
    assert_eq!(told(3072, &all(19), &[]), Ok(Family::Flux));
    assert_eq!(told(3072, &all(60), &[]), Ok(Family::QwenImage));
    assert_eq!(told(3072, &all(5), &[]), Ok(Family::Flux2));
    assert_eq!(told(2048, &[3], &[]), Ok(Family::HunyuanVideo15));
    assert_eq!(told(6144, &[3], &[]), Ok(Family::Flux2));
    assert_eq!(told(3072, &[50], &[]), Ok(Family::QwenImage));
    let metadata = [("modelspec.architecture", json!("flux-1-dev/lora"))];
    assert_eq!(told(8, &[0], &metadata), Ok(Family::Flux));
    let error = told(3072, &[3], &[]).unwrap_err();
    assert!(
        error.ends_with("has names that FLUX.1 (flux) and FLUX.2 (flux2) and Qwen-Image (qwen_image) have; say which it is by --family"),
        "{error}"
    );
    assert_eq!(read(&path, Some(Family::QwenImage)).unwrap().family, Family::QwenImage);
}

/// Tensors and metadata of a file, and what is said of it.
type Case = (Vec<(String, Tensor)>, Vec<(&'static str, Value)>, &'static str);

#[test]
fn what_is_no_lora_of_a_known_model_is_refused_in_one_line() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("lora.safetensors");
    const Q: &str = "transformer.single_transformer_blocks.0.attn.to_q";
    let key = |stem: &str, end: &str| format!("{stem}.{end}");
    let pair = |stem: &str| {
        vec![
            (key(stem, "lora_A.weight"), ones(&[4, 6])),
            (key(stem, "lora_B.weight"), ones(&[6, 4])),
        ]
    };
    let with = |mut tensors: Vec<(String, Tensor)>, name: String, tensor: Tensor| {
        tensors.push((name, tensor));
        tensors
    };
    let both = |mut some: Vec<(String, Tensor)>, others: Vec<(String, Tensor)>| {
        some.extend(others);
        some
    };
    let nan = Tensor::from_slice(&[f32::NAN; 24]).view([4, 6]);
    let config = |fields: Value| vec![("lora_adapter_metadata", fields)];
    let cases: Vec<Case> = vec![
        (
            vec![(key(Q, "lora_A.weight"), ones(&[4, 6]))],
            vec![],
            "to_q` has A (down) and no B (up)",
        ),
        (
            vec![(key(Q, "lora_B.weight"), ones(&[6, 4]))],
            vec![],
            "to_q` has B (up) and no A (down)",
        ),
        (vec![(key(Q, "alpha"), ones(&[]))], vec![], "to_q` has no matrices and no use"),
        (
            vec![
                (key(Q, "lora_A.weight"), ones(&[4, 6])),
                (key(Q, "lora_B.weight"), ones(&[6, 5])),
            ],
            vec![],
            "has A Float [4, 6] and B Float [6, 5], expected [r, inputs] and [outputs, r] of one kind",
        ),
        (
            vec![
                (key(Q, "lora_A.weight"), ones(&[4, 6, 1, 1])),
                (key(Q, "lora_B.weight"), ones(&[6, 4, 1, 1])),
            ],
            vec![],
            "LoRAs of convolutions are not known here",
        ),
        (
            vec![(key(Q, "lora_A.weight"), nan), (key(Q, "lora_B.weight"), ones(&[6, 4]))],
            vec![],
            "to_q.lora_A.weight` holds numbers that are not finite",
        ),
        (
            vec![
                (key(Q, "lora_A.weight"), ones(&[4, 6]).to_kind(Kind::Int)),
                (key(Q, "lora_B.weight"), ones(&[6, 4])),
            ],
            vec![],
            "is Int, no kind of numbers that a LoRA has",
        ),
        (with(pair(Q), key(Q, "alpha"), ones(&[2])), vec![], "to_q.alpha` is no alpha"),
        (
            with(pair(Q), key(Q, "alpha"), ones(&[]) * 0.0),
            vec![],
            "expected one number other than 0",
        ),
        (
            with(pair(Q), key(Q, "dora_scale"), ones(&[7])),
            vec![],
            "expected one magnitude for each of 6 outputs",
        ),
        (with(pair(Q), key(Q, "lora_down.weight"), ones(&[4, 6])), vec![], "are the same matrix"),
        (with(pair(Q), key(Q, "lokr_w1"), ones(&[2, 2])), vec![], "to_q.lokr_w1` is a LoKr"),
        (
            vec![("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha".into(), ones(&[]))],
            vec![],
            "holds no LoRA of a transformer",
        ),
        (
            with(pair(Q), "transformer.proj_out.weight".into(), ones(&[2])),
            vec![],
            "`transformer.proj_out.weight` is no part of a LoRA",
        ),
        (
            pair("lora_unet_input_blocks_1_1_proj_in"),
            vec![],
            "a name of no family that is known here: FLUX.1, FLUX.2,",
        ),
        (
            both(pair(Q), pair("transformer.single_transformer_blocks.0.attn.to_qq")),
            vec![],
            "is not of FLUX.1: unknown `single_transformer_blocks.0.attn.to_qq`, the nearest is `single_transformer_blocks.0.attn.to_q`",
        ),
        (
            both(
                pair("diffusion_model.single_blocks.0.linear1"),
                pair("diffusion_model.single_blocks.0.modulation.lin"),
            ),
            vec![],
            "`single_blocks.0.linear1` of FLUX.1 maps 6 inputs to 6 outputs, expected 42",
        ),
        (
            both(pair(Q), pair("single_transformer_blocks.0.attn.to_q")),
            vec![],
            "adapts `single_transformer_blocks.0.attn.to_q` twice",
        ),
        (
            pair(Q),
            vec![("ss_network_dim", json!("16"))],
            "its metadata tell of rank 16, its matrices have 4",
        ),
        (
            pair(Q),
            config(json!({"r": 8, "lora_alpha": 8})),
            "give `single_transformer_blocks.0.attn.to_q` rank 8, its matrices have 4",
        ),
        (
            with(pair(Q), key(Q, "alpha"), ones(&[])),
            config(json!({"r": 4, "lora_alpha": 8})),
            "alpha 8, its tensor 1",
        ),
        (pair(Q), config(json!({"r": 4, "lora_alpha": 4, "use_dora": true})), "tell of DoRA, and"),
        (pair(Q), config(json!({"lora_alpha": 4})), "lora_adapter_metadata: names no `r`"),
        (pair(Q), config(json!([1])), "lora_adapter_metadata: is no JSON object"),
        (
            pair("base_model.model.single_transformer_blocks.0.attn.to_q"),
            vec![],
            "has PEFT's names, and no adapter_config.json beside it",
        ),
    ];
    for (tensors, metadata, told) in cases {
        let tensors: Vec<(&str, Tensor)> =
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shallow_clone())).collect();
        save(&path, &tensors, &metadata);
        let error = read(&path, None).map(|found| found.family).expect_err(told);
        let text = error.to_string();
        assert_eq!(error.exit_code(), 50, "{text}");
        assert!(text.contains("--lora") && text.contains("lora.safetensors: "), "{text}");
        assert!(
            text.contains(told) && !text.contains('\n') && text.len() < 700,
            "{told:?} is not in {text}"
        );
    }
}

#[test]
fn a_lora_is_never_written_over_anything_and_nothing_is_left_of_a_refused_one() {
    let root = TempDir::new().unwrap();
    let linears = Linears::from([("blocks.0.ffn.net.2".to_string(), [6, 4])]);
    let lora = random_lora(&linears, 2, 2.0);
    for (word, dialect) in Dialect::ALL {
        let path = root.path().join(word);
        fs::write(&path, "mine").unwrap();
        let error = lora::write(&lora, Family::Wan, *dialect, out(&path)).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        fs::remove_file(&path).unwrap();
        let error = lora::write(&lora, Family::Flux, *dialect, out(&path)).unwrap_err();
        assert!(
            error.to_string().contains("`blocks.0.ffn.net.2` is no linear map of FLUX.1"),
            "{error}"
        );
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}
