//! Factors of learning rate and weight decay are PyTorch's parameter groups, and decay of "all" is
//! its AdamW over all parameters.

use std::fs;

use fm_dist::config::RunConfig;
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::nn::ParamInfo;
use fm_dist::parallel::{Devices, Replica};
use fm_dist::run::optimizer_state::{Change, OptimizerState};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{assert_close, fresh_seed, oracle};
use crate::runs::tiny;

const LR: f64 = 0.01;
const WEIGHT_DECAY: f64 = 0.1;

/// What a parameter's factors must be: of the learning rate, and of the weight decay.
type Expected = fn(&ParamInfo) -> (f64, f64);

#[test]
fn factors_are_pytorchs_parameter_groups() {
    let matrices: Expected = |info| (1.0, if info.shape.len() > 1 { 1.0 } else { 0.0 });
    let all: Expected = |_| (1.0, 1.0);
    let factors: Expected = |info| {
        let is_bias = info.name.ends_with(".bias");
        let lr = match info.name.starts_with("blocks.") {
            true if is_bias => 2.0,
            true => 0.3,
            false => 1.0,
        };
        (
            lr,
            if is_bias { 0.0 } else { 1.0 }
                * if info.name.starts_with("blocks.1.") { 5.0 } else { 1.0 },
        )
    };
    let with_factors = [
        "optimizer.decay=all",
        "optimizer.lr_factors={'blocks.*'=0.3, 'blocks.*.bias'=2.0}",
        "optimizer.decay_factors={'blocks.1'=5.0, '*.bias'=0.0, 'blocks.1.*.bias'=0.0}",
    ];
    check(&[], matrices);
    check(&["optimizer.decay=all"], all);
    check(&with_factors, factors);
}

fn check(overrides: &[&str], expected: Expected) {
    let rates = [
        format!("optimizer.adamw.lr={LR}"),
        format!("optimizer.adamw.weight_decay={WEIGHT_DECAY}"),
    ];
    let betas = ["optimizer.adamw.beta1=0.9", "optimizer.adamw.beta2=0.999"];
    let config = tiny(&[&[rates[0].as_str(), rates[1].as_str()], &betas, overrides].concat());
    let folder = TempDir::new().unwrap();
    let file = asked(&config, &folder, expected);
    let one = Devices::one(Device::Cpu);
    let mut replica = Replica::alone(config.stages().unwrap(), Kind::Float, Device::Cpu, None);
    let flat = |stage: usize, replica: &Replica<'_>, read: &dyn Fn(&str) -> Tensor| {
        let infos = replica.stages[stage].params().infos();
        let values: Vec<Tensor> =
            infos.iter().map(|info| read(&info.name).flatten(0, -1)).collect();
        Tensor::cat(&values, 0)
    };
    for stage in 0..replica.stages.len() {
        let begin = flat(stage, &replica, &|name| file.read(&format!("begin.{name}")).unwrap());
        replica.buckets[stage].set(&begin);
    }
    let mut state = OptimizerState::fresh(&replica, &config, one).unwrap();
    for step in 0..12 {
        for stage in 0..replica.stages.len() {
            let of_step =
                |word: &str, name: &str| file.read(&format!("{word}.{name}")).unwrap().get(step);
            let gradient = flat(stage, &replica, &|name| of_step("gradients", name));
            let owned = replica.buckets[stage].owned(&gradient);
            let change = Change { gradient_factor: 1.0, lr: LR, step: step as u64 + 1 };
            state.update(stage, &mut replica.buckets[stage], &owned, change);
            let found = replica.parameters(stage).unwrap();
            let wanted = flat(stage, &replica, &|name| of_step("parameters", name));
            assert_close(&found, &wanted, 1e-6, &format!("{overrides:?}, stage {stage}, {step}"));
        }
    }
}

/// What PyTorch makes of the parameters of a configuration's model.
fn asked(config: &RunConfig, folder: &TempDir, expected: Expected) -> SafeTensors {
    let (case, out) = (folder.path().join("case.json"), folder.path().join("out.safetensors"));
    let stages = config.stages().unwrap();
    let infos = stages.iter().flat_map(|stage| stage.params().infos());
    let parameters = infos.map(|info| {
        let (lr_factor, decay_factor) = expected(info);
        json!({ "name": info.name, "shape": info.shape, "lr_factor": lr_factor, "decay_factor": decay_factor })
    });
    let text = json!({ "lr": LR, "weight_decay": WEIGHT_DECAY, "parameters": parameters.collect::<Vec<_>>() });
    fs::write(&case, text.to_string()).unwrap();
    let (case, path) = (case.to_str().unwrap(), out.to_str().unwrap());
    oracle("param_groups.py", &[case, path, &fresh_seed("param_groups")]);
    SafeTensors::open(out).unwrap()
}
