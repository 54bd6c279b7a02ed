//! LoRA, rsLoRA and DoRA on every family are PEFT's on diffusers' models: predictions, losses and
//! the gradient of every matrix, of new tiny random models each run.

use serde_json::Value;
use tempfile::TempDir;

use super::families::{CPU, check_case};
use super::packages::{entries, fresh_seed, oracle};

/// New cases of one family, computed by both sides.
fn check_family(family: &str) {
    let root = TempDir::new().unwrap();
    let (out, seed) = (root.path().to_str().unwrap(), fresh_seed(family));
    oracle("lora.py", &[out, &seed, "--families", family]);
    let cases = entries(&root.path().join("cases.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 4, "{family} has {} cases", cases.len());
    for case in cases {
        let folder = root.path().join(case["folder"].as_str().unwrap());
        let mut case = case.clone();
        let lora = folder.join("lora.safetensors");
        case["settings"]["lora.init_from"] = Value::from(lora.to_str().unwrap());
        check_case(&case, &folder, CPU);
    }
    println!("| LoRA on {family} | {} cases hold", cases.len());
}

#[test]
fn a_lora_on_flux_is_pefts() {
    check_family("flux");
}

#[test]
fn a_lora_on_flux2_is_pefts() {
    check_family("flux2");
}

#[test]
fn a_lora_on_qwen_image_is_pefts() {
    check_family("qwen_image");
}

#[test]
fn a_lora_on_wan_is_pefts() {
    check_family("wan");
}

#[test]
fn a_lora_on_hunyuan_video15_is_pefts() {
    check_family("hunyuan_video15");
}
