//! AdamW and the clipping of gradients are PyTorch's.

use std::path::Path;

use fm_dist::files::safetensors::SafeTensors;
use fm_dist::optim::{AdamW, Optimizer, Slice, clip};
use fm_dist::parallel::global_norm;
use serde_json::Value;
use tch::Device;
use tempfile::TempDir;

use super::packages::{assert_close, entries, fresh_seed, oracle};

#[test]
fn adamw_and_clipping_are_pytorchs() {
    let folder = TempDir::new().unwrap();
    oracle("optimizer.py", &[folder.path().to_str().unwrap(), &fresh_seed("optimizer")]);
    let cases = entries(&folder.path().join("optimizer.json"));
    for case in cases["adamw"].as_array().unwrap() {
        check_adamw(case, folder.path());
    }
    for case in cases["clip"].as_array().unwrap() {
        check_clipping(case, folder.path());
    }
}

fn check_adamw(case: &Value, folder: &Path) {
    let file = SafeTensors::open(folder.join(case["file"].as_str().unwrap())).unwrap();
    let mut adamw = AdamW::default();
    fm_dist::settings::read(&mut adamw, "oracle", &adamw_toml(case), &[]).unwrap();
    let on_cpu = adamw.on(Device::Cpu).unwrap();
    let mut params = file.read("parameter").unwrap();
    let mut state = [params.zeros_like(), params.zeros_like()];
    let (gradients, learning_rates) = (file.read("gradients").unwrap(), file.read("lr").unwrap());
    let steps = gradients.size()[0];
    assert!(steps >= 10);
    for step in 0..steps {
        let decayed = [(0, params.numel() as i64)];
        let gradient = &gradients.get(step);
        let slice = Slice {
            params: &mut params,
            gradient,
            gradient_factor: 1.0,
            state: &mut state,
            computed: None,
            average: None,
            decayed: &decayed,
            decay_factor: 1.0,
        };
        on_cpu.update(slice, learning_rates.double_value(&[step]), step as u64 + 1);
        let expected = |name: &str| file.read(name).unwrap().get(step);
        assert_close(
            &params,
            &expected("parameters"),
            1e-6,
            &format!("{case}: parameters after step {step}"),
        );
        assert_close(
            &state[0],
            &expected("exp_avg"),
            1e-6,
            &format!("{case}: exp_avg after step {step}"),
        );
        assert_close(
            &state[1],
            &expected("exp_avg_sq"),
            1e-6,
            &format!("{case}: exp_avg_sq after step {step}"),
        );
    }
}

/// The oracle's settings under our names.
fn adamw_toml(case: &Value) -> String {
    let betas = case["betas"].as_array().unwrap();
    format!(
        "beta1 = {}\nbeta2 = {}\neps = {}\nweight_decay = {}\n",
        betas[0], betas[1], case["eps"], case["weight_decay"]
    )
}

fn check_clipping(case: &Value, folder: &Path) {
    let file = SafeTensors::open(folder.join(case["file"].as_str().unwrap())).unwrap();
    let named = |prefix: &str| {
        let names: Vec<&str> = file
            .tensors()
            .iter()
            .map(|info| info.name.as_str())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.into_iter().map(|name| file.read(name).unwrap()).collect::<Vec<_>>()
    };
    let gradients = named("gradient.");
    let norm = global_norm(gradients.iter());
    assert_close(&norm, &file.read("total_norm").unwrap(), 1e-6, &format!("{case}: norm"));
    let coefficient = clip::coefficient(norm.double_value(&[]), case["max_norm"].as_f64().unwrap());
    for (gradient, clipped) in gradients.iter().zip(named("clipped.")) {
        assert_close(&(gradient * coefficient), &clipped, 1e-6, &format!("{case}: clipped"));
    }
}
