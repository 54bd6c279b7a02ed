//! A trained run becomes a diffusers folder that diffusers loads whole and that a run can begin
//! with; a folder that does not fit is refused with everything that is wrong.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use fm_dist::commands::{StepRequest, dump_step};
use fm_dist::files::safetensors::{self, SafeTensors, Shards};
use fm_dist::run::Resume;
use tch::{Kind, Tensor};
use tempfile::TempDir;

use super::packages::{GRADIENT, LOSS, assert_close, fresh_seed, oracle};
use crate::runs::{finish, program, train_in_threads};
use crate::threads::training::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, Tiny, WAN};

/// A family trained for two steps under `root`, and exported in shards of a few tensors.
pub fn exported(family: &Tiny, root: &Path) -> (PathBuf, PathBuf) {
    let data = root.join("data");
    family.write_data(&data);
    let run = train_in_threads(
        &family.config(&data, &root.join("run"), &["max_steps=2"]),
        &Resume::Never,
        1,
    )
    .unwrap();
    let out = root.join("exported");
    let arguments = [
        "export",
        "--run",
        run.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--max-shard-size",
        "20kB",
    ];
    let (code, _, errors) = finish(program(&arguments));
    assert_eq!(code, 0, "{errors}");
    (run, out)
}

fn step(
    family: &Tiny,
    root: &Path,
    weights: Option<PathBuf>,
    seed: i64,
    overrides: &[&str],
) -> Result<SafeTensors, String> {
    let (data, dump) = (root.join("data"), root.join("dump.safetensors"));
    let request = StepRequest {
        batch: data.join("samples.safetensors"),
        dump: dump.clone(),
        weights,
        torch_seed: Some(seed),
        grads: true,
        operators: false,
    };
    let fixed = ["flow_matching.i2v_prob=0", "flow_matching.cfg_dropout_prob=0"];
    let config = family.config(&data, &root.join("unused"), &[&fixed, overrides].concat());
    dump_step(&config, &request).map_err(|error| error.to_string())?;
    Ok(SafeTensors::open(dump).unwrap())
}

fn check_family(family: &Tiny) {
    let root = TempDir::new().unwrap();
    let (run, folder) = exported(family, root.path());
    assert!(
        folder.join("diffusion_pytorch_model.safetensors.index.json").exists(),
        "several shards need an index"
    );
    let (seed, out) = (fresh_seed(family.adapter), root.path().join("expected.safetensors"));
    let batch = root.path().join("data/samples.safetensors");
    let paths =
        [folder.to_str().unwrap(), family.adapter, batch.to_str().unwrap(), out.to_str().unwrap()];
    oracle("exported.py", &[&paths[..], &["--seed", &seed]].concat());
    let (found, expected) = (
        step(family, root.path(), Some(run), seed.parse().unwrap(), &[]).unwrap(),
        SafeTensors::open(out).unwrap(),
    );
    let whole: f64 = expected
        .tensors()
        .iter()
        .map(|info| expected.read(&info.name).unwrap().norm().double_value(&[]))
        .sum();
    for info in expected.tensors() {
        let (found, expected) =
            (found.read(&info.name).unwrap(), expected.read(&info.name).unwrap());
        let negligible = expected.norm().double_value(&[]) < 1e-6 * whole;
        let tolerance = if info.name.starts_with("grad.") { GRADIENT } else { LOSS };
        // A gradient that is zero but for rounding has no direction to compare.
        if !negligible {
            assert_close(
                &found,
                &expected,
                tolerance,
                &format!("{} {}", family.adapter, info.name),
            );
        }
    }
    // A run that begins with the folder begins where the exported one ended, from the folder's own
    // description.
    let path = format!("model.path={folder:?}");
    let again = step(family, root.path(), None, seed.parse().unwrap(), &[&path]).unwrap();
    assert!(
        again.read("model_pred").unwrap().equal(&found.read("model_pred").unwrap()),
        "{}",
        family.adapter
    );
}

#[test]
fn ranks_begin_with_what_one_of_them_read() {
    let root = TempDir::new().unwrap();
    let (_, folder) = exported(&FLUX, root.path());
    let path = format!("model.path={folder:?}");
    let train = |name: &str, ranks| {
        // The least step there is: what is saved is what was loaded, but for weight decay and
        // rounding.
        let overrides =
            [&path, "max_steps=1", "optimizer.adamw.lr=1e-30", "optimizer.adamw.weight_decay=0"];
        train_in_threads(
            &FLUX.config(&root.path().join("data"), &root.path().join(name), &overrides),
            &Resume::Never,
            ranks,
        )
        .unwrap()
    };
    let loaded = Shards::open_stem(&folder, "diffusion_pytorch_model").unwrap();
    for ranks in [1, 3] {
        let run = train(&format!("on-{ranks}"), ranks);
        let saved =
            SafeTensors::open(run.join("step-00000001/model-00001-of-00001.safetensors")).unwrap();
        for info in saved.tensors() {
            assert!(
                saved.read(&info.name).unwrap().equal(&loaded.read(&info.name).unwrap()),
                "{} on {ranks} ranks",
                info.name
            );
        }
    }
}

#[test]
fn an_exported_flux_is_diffusers() {
    check_family(&FLUX);
}

#[test]
fn an_exported_flux2_is_diffusers() {
    check_family(&FLUX2);
}

#[test]
fn an_exported_qwen_image_is_diffusers() {
    check_family(&QWEN_IMAGE);
}

#[test]
fn an_exported_wan_is_diffusers() {
    check_family(&WAN);
}

#[test]
fn an_exported_hunyuan_video15_is_diffusers() {
    check_family(&HUNYUAN_VIDEO15);
}

#[test]
fn bfloat16_is_written_but_for_what_diffusers_keeps_precise() {
    let root = TempDir::new().unwrap();
    let (run, _) = exported(&WAN, root.path());
    let out = root.path().join("half");
    let arguments = [
        "export",
        "--run",
        run.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--dtype",
        "bfloat16",
    ];
    assert_eq!(finish(program(&arguments)).0, 0);
    let shards = Shards::open_stem(&out, "diffusion_pytorch_model").unwrap();
    let kind = |name: &str| shards.read(name).unwrap().kind();
    assert_eq!(kind("blocks.0.attn1.to_q.weight"), Kind::BFloat16);
    assert_eq!(kind("blocks.0.scale_shift_table"), Kind::Float);
    let (code, _, errors) = finish(program(&arguments));
    assert!(
        code == 30 && errors.contains("an export never writes over anything"),
        "{code} {errors}"
    );
}

#[test]
fn a_model_without_a_class_in_diffusers_is_not_exported() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={:?}", root.path().join("digits"));
    let run =
        train_in_threads(&crate::runs::tiny(&["max_steps=1", &output]), &Resume::Never, 1).unwrap();
    let out = root.path().join("out");
    let (code, _, errors) = finish(program(&[
        "export",
        "--run",
        run.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ]));
    assert!(
        code == 50 && errors.contains("trained a `dit`, for which diffusers has no class"),
        "{code} {errors}"
    );
    assert!(!out.exists());
}

/// Rewrites the single file of weights of a folder.
fn tamper(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    tamper_file(&folder.join("diffusion_pytorch_model.safetensors"), change);
}

fn tamper_file(path: &Path, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let file = SafeTensors::open(path).unwrap();
    let mut tensors = file
        .tensors()
        .iter()
        .map(|info| (info.name.clone(), file.read(&info.name).unwrap()))
        .collect();
    change(&mut tensors);
    let borrowed: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    safetensors::write(&mut File::create(path).unwrap(), &borrowed, &BTreeMap::new()).unwrap();
}

/// What a run that begins with the folder says.
fn refusal(root: &Path, folder: &Path) -> String {
    step(&FLUX, root, None, 1, &[&format!("model.path={folder:?}")]).expect_err("refused")
}

#[test]
fn a_folder_that_does_not_fit_is_refused_with_everything_that_is_wrong() {
    let root = TempDir::new().unwrap();
    let (run, _) = exported(&FLUX, root.path());
    let folder = root.path().join("one-file");
    assert_eq!(
        finish(program(&[
            "export",
            "--run",
            run.to_str().unwrap(),
            "--out",
            folder.to_str().unwrap()
        ]))
        .0,
        0
    );
    tamper(&folder, |tensors| {
        assert!(tensors.remove("proj_out.bias").is_some());
        assert!(tensors.remove("x_embedder.weight").is_some());
        let odd = Tensor::ones([3], (Kind::Float, tch::Device::Cpu));
        tensors.insert("proj_out.bais".into(), odd.shallow_clone());
        tensors.insert("context_embedder.bias".into(), odd);
    });
    let text = refusal(root.path(), &folder);
    for part in [
        "missing: proj_out.bias, x_embedder.weight",
        "unexpected: proj_out.bais",
        "of another shape or kind: context_embedder.bias is Float [3] instead of Float or BFloat16 or Half or Float8e4m3fn or Float8e5m2 [32]",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    fs::remove_file(folder.join("diffusion_pytorch_model.safetensors")).unwrap();
    let text = refusal(root.path(), &folder);
    assert!(
        text.contains("holds neither diffusion_pytorch_model.safetensors nor diffusion_pytorch_model.safetensors.index.json"),
        "{text}"
    );
}

#[test]
fn weights_that_are_not_finite_are_refused_by_file_and_tensor() {
    let root = TempDir::new().unwrap();
    let (_, folder) = exported(&FLUX, root.path());
    let holds = |path: &PathBuf| {
        SafeTensors::open(path).is_ok_and(|file| file.info("proj_out.bias").is_ok())
    };
    let path =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).find(holds).unwrap();
    tamper_file(&path, |tensors| drop(tensors["proj_out.bias"].get(2).fill_(f64::NEG_INFINITY)));
    let text = refusal(root.path(), &folder);
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(
        text.ends_with(&format!(
            "{name}: `proj_out.bias` holds numbers that are not finite: 1, the first at [2]"
        )),
        "{text}"
    );
}

/// What the program says of a configuration that begins with a folder of this `config.json`.
fn refused_description(fields: &serde_json::Value) -> String {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("config.json"), fields.to_string()).unwrap();
    let set = format!("model.path={:?}", root.path());
    let arguments = [
        "check",
        "--set",
        &set,
        "--set",
        "flow_matching.adapter_type=flux",
        "--latents",
        "16,64,64",
    ];
    let (code, _, errors) = finish(program(&arguments));
    assert_eq!(code, 50, "{errors}");
    errors
}

#[test]
fn a_field_that_is_not_supported_is_named() {
    let flux = |field: &str, value: serde_json::Value| serde_json::json!({"_class_name": "FluxTransformer2DModel", field: value});
    for (fields, expected) in [
        (flux("num_layer", 3.into()), "num_layer: unknown key; did you mean num_layers?"),
        (flux("patch_size", 2.into()), "patch_size: 2 is out of range"),
        (
            flux("axes_dims_rope", serde_json::json!([16, 56])),
            "axes_dims_rope: expected 3 integers, found 2",
        ),
        (
            flux("axes_dims_rope", serde_json::json!([16, 56, 54])),
            "[16, 56, 54] must be even and add up to attention_head_dim = 128",
        ),
        (
            serde_json::json!({"_class_name": "SD3Transformer2DModel"}),
            "_class_name is \"SD3Transformer2DModel\"; supported are Flux",
        ),
        (
            serde_json::json!({"_class_name": "WanTransformer3DModel", "qk_norm": "layer_norm"}),
            "qk_norm: unknown value `layer_norm`",
        ),
        (
            serde_json::json!({"_class_name": "QwenImageTransformer2DModel", "use_layer3d_rope": true}),
            "use_layer3d_rope",
        ),
    ] {
        let errors = refused_description(&fields);
        assert!(errors.contains(expected), "{expected:?} is not in {errors}");
    }
}
