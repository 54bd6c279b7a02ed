//! The rules of a run are those that people know: learning rates, shifts by resolution, weights and
//! losses, beside diffusers, transformers and torch.

use fm_dist::adapter::create_pipeline;
use fm_dist::config::RunConfig;
use fm_dist::flow::FlowMatchingSettings;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{entries, fresh_seed, oracle};

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn answer() -> Value {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("rules.json");
    oracle("rules.py", &[path.to_str().unwrap(), &fresh_seed("rules")]);
    entries(&path)
}

/// Asserts that numbers agree to `tolerance` of the expected ones.
fn assert_near(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let near = |(found, expected): (&f64, &f64)| {
        (found - expected).abs() <= tolerance * expected.abs().max(1e-3)
    };
    let fits = found.iter().zip(expected).all(near);
    assert!(fits, "{what}: {found:?}, expected {expected:?}");
}

fn flow(text: &str) -> FlowMatchingSettings {
    let config = RunConfig::read("oracle", &format!("[flow_matching]\n{text}"), &[]).unwrap();
    config.flow_matching.flow
}

/// Weighted loss of each error at its sigma.
fn losses(text: &str, error: &Tensor, sigma: &Tensor) -> Vec<f64> {
    let pipeline =
        create_pipeline("simple", &Default::default(), flow(text), Device::Cpu, Kind::Float)
            .unwrap();
    let loss = pipeline.compute_loss(error, &error.zeros_like(), sigma, None, None).unwrap();
    Vec::try_from(loss.weighted_loss.flatten(0, -1).to_kind(Kind::Double)).unwrap()
}

#[test]
fn rules_are_those_of_diffusers_transformers_and_torch() {
    let answer = answer();
    for case in answer["schedules"].as_array().unwrap() {
        let text = case["set"].as_str().unwrap();
        let schedule = RunConfig::read("oracle", text, &[]).unwrap().lr_scheduler;
        let expected = numbers(&case["factors"]);
        let steps = expected.len() as u64;
        let found: Vec<f64> = (1..=steps).map(|step| schedule.factor(step, steps)).collect();
        assert_near(&found, &expected, 1e-12, text);
    }
    let tokens = numbers(&answer["tokens"]);
    for case in answer["shifts"].as_array().unwrap() {
        let text = case["set"].as_str().unwrap();
        let settings = flow(text);
        let found: Vec<f64> =
            tokens.iter().map(|tokens| settings.shift(*tokens as i64).ln()).collect();
        assert_near(&found, &numbers(&case["mu"]), 1e-12, text);
    }
    let column = |key: &str| Tensor::from_slice(&numbers(&answer[key])).to_kind(Kind::Float);
    let (sigma, error) = (column("sigma"), column("error").view([-1, 1, 1, 1]));
    // f32 rounding of a few operations.
    const FLOAT32: f64 = 1e-6;
    for (scheme, expected) in answer["weights"].as_object().unwrap() {
        let text = format!("loss_weighting_scheme = '{scheme}'");
        let found = losses(&text, &error.ones_like(), &sigma);
        assert_near(&found, &numbers(expected), FLOAT32, scheme);
    }
    let text =
        format!("loss_type = 'huber'\nuse_loss_weighting = false\nhuber_c = {}", answer["huber_c"]);
    assert_near(&losses(&text, &error, &sigma), &numbers(&answer["huber"]), FLOAT32, &text);
}
