//! `fm-dist convert`, as a user meets it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use fm_dist::files::safetensors::{self, SafeTensors};
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::cli::only_error;
use crate::runs::{finish, program};

/// A LoRA of FLUX.1's first block as kohya's trainers write it, with further tensors.
fn of_kohya(path: &Path, further: &[&str]) {
    let random = |scope: u64, shape: [i64; 2]| {
        let draw = || Tensor::randn(shape, (Kind::BFloat16, Device::Cpu));
        Key::new(1, Purpose::Test).scope(scope).seeded(draw)
    };
    let stem = "lora_unet_double_blocks_0_img_attn_qkv";
    let mut tensors = vec![
        (format!("{stem}.lora_down.weight"), random(0, [4, 3072])),
        (format!("{stem}.lora_up.weight"), random(1, [9216, 4])),
        (format!("{stem}.alpha"), Tensor::from_slice(&[2.0f32]).squeeze()),
    ];
    tensors.extend(further.iter().map(|name| (name.to_string(), random(2, [4, 4]))));
    let named: Vec<(&str, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata = BTreeMap::from([
        ("ss_base_model_version".to_string(), "flux1".to_string()),
        ("ss_network_dim".into(), "4".into()),
        ("ss_steps".into(), "300".into()),
    ]);
    safetensors::write(&mut File::create(path).unwrap(), &named, &metadata).unwrap();
}

fn convert(arguments: &[&str]) -> (i32, String, String) {
    finish(program(&[&["convert"], arguments].concat()))
}

#[test]
fn a_lora_is_converted_and_told_in_one_line() {
    let root = TempDir::new().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_string();
    of_kohya(Path::new(&path("kohya.safetensors")), &[]);
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/flux1-dev");
    let arguments = [
        "--lora",
        &path("kohya.safetensors"),
        "--format",
        "diffusers",
        "--out",
        &path("out.safetensors"),
        "--base",
        base.to_str().unwrap(),
    ];
    let (code, output, errors) = convert(&arguments);
    assert_eq!(code, 0, "{errors}");
    assert!(
        output.ends_with("out.safetensors: 3 modules of FLUX.1, from kohya to diffusers; read back and compared\n"),
        "{output}"
    );
    let file = SafeTensors::open(path("out.safetensors")).unwrap();
    let names: Vec<&str> = file.tensors().iter().map(|info| info.name.as_str()).collect();
    assert!(
        names.contains(&"transformer.transformer_blocks.0.attn.to_v.lora_B.weight"),
        "{names:?}"
    );
    let description = &file.metadata()["lora_adapter_metadata"];
    assert!(description.contains("\"transformer.r\": 4"), "{description}");
    assert_eq!(file.metadata()["training.steps"], "300");
    // Nothing is written over.
    let (code, _, errors) = convert(&arguments);
    assert!(code == 30 && only_error(&errors).contains("exists already"), "{code} {errors}");
    // PEFT's is a folder, and the folder is read again.
    let to = |lora: &str, format: &str, out: &str| {
        convert(&[
            "--lora",
            &path(lora),
            "--format",
            format,
            "--out",
            &path(out),
            "--family",
            "flux",
        ])
    };
    let (code, output, errors) = to("out.safetensors", "peft", "peft");
    assert!(code == 0 && output.contains("from diffusers to peft"), "{errors}");
    let mut files: Vec<String> = fs::read_dir(path("peft"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"]);
    let (code, output, errors) = to("peft", "kohya", "again.safetensors");
    assert!(code == 0 && output.contains("from peft to kohya"), "{errors}");
}

#[test]
fn a_wrong_conversion_is_refused_in_one_line() {
    let root = TempDir::new().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_string();
    of_kohya(Path::new(&path("kohya.safetensors")), &[]);
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let told = |arguments: &[&str]| {
        let lora = path("kohya.safetensors");
        let fixed = ["--lora", &lora, "--out", &path("out")].map(String::from);
        let fixed: Vec<&str> = fixed.iter().map(String::as_str).collect();
        let (code, _, errors) = convert(&[&fixed, arguments].concat());
        assert!(!Path::new(&path("out")).exists());
        (code, errors)
    };
    let (code, errors) = told(&["--format", "comfy"]);
    assert!(
        code == 2 && errors.contains("expected one of diffusers, comfyui, kohya, peft"),
        "{errors}"
    );
    let (code, errors) = told(&["--format", "peft", "--family", "wan"]);
    assert!(
        code == 50
            && only_error(&errors)
                .contains("is not of Wan: unknown `double_blocks_0_img_attn_qkv`"),
        "{errors}"
    );
    let klein = models.join("flux2-klein-9b");
    let (code, errors) = told(&["--format", "peft", "--base", klein.to_str().unwrap()]);
    assert!(
        code == 50
            && only_error(&errors).contains("does not fit --base: the model has `transformer_blocks.0.attn.to_k` of 4096 inputs and 4096 outputs, the LoRA's has 3072 and 3072"),
        "{errors}"
    );
    let (code, errors) =
        told(&["--format", "peft", "--family", "flux", "--base", klein.to_str().unwrap()]);
    assert!(
        code == 50 && only_error(&errors).contains("--family: is flux, the base is flux2"),
        "{errors}"
    );
    let (code, errors) = told(&["--format", "peft", "--base", "/nowhere"]);
    assert!(
        code == 50 && only_error(&errors).contains("--base: /nowhere does not exist"),
        "{errors}"
    );
}

#[test]
fn a_text_encoders_lora_is_left_out_on_demand_only() {
    let root = TempDir::new().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_string();
    let stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1";
    let further = ["lora_down", "lora_up"].map(|half| format!("{stem}.{half}.weight"));
    of_kohya(Path::new(&path("in.safetensors")), &[&further[0], &further[1]]);
    let (lora, out) = (path("in.safetensors"), path("out.safetensors"));
    let arguments = ["--lora", &lora, "--format", "comfyui", "--out", &out];
    let (code, _, errors) = convert(&arguments);
    assert!(
        code == 50 && only_error(&errors).contains("also holds 2 tensors of text encoders, which are not converted; leave them out by --drop-text-encoders"),
        "{errors}"
    );
    let (code, output, errors) = convert(&[&arguments[..], &["--drop-text-encoders"]].concat());
    assert!(code == 0 && output.contains("3 modules of FLUX.1"), "{errors}");
    let names = |name: &str| name.starts_with("transformer.transformer_blocks.0.attn.to_");
    assert!(SafeTensors::open(&out).unwrap().tensors().iter().all(|info| names(&info.name)));
}
