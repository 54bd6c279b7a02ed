//! Averages of the weights are those of diffusers' EMAModel, bit for bit, in both kinds that they
//! are kept in: by operators, and within the optimizer's pass.

use std::path::Path;

use fm_dist::files::safetensors::SafeTensors;
use fm_dist::optim::{AdamW, Average, EmaSettings, Optimizer, Slice, Update, ema};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::packages::{entries, fresh_seed, oracle};

#[test]
fn averages_are_those_of_diffusers_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    oracle("averages.py", &[folder.path().to_str().unwrap(), &fresh_seed("averages")]);
    let cases = entries(&folder.path().join("averages.json"));
    let still = AdamW::default().on(Device::Cpu).unwrap();
    for (kind, cases) in cases.as_object().unwrap() {
        for case in cases.as_array().unwrap() {
            let settings = settings(case, kind);
            check(case, folder.path(), &settings, &mut |average, weights, share| {
                ema::advance(average, weights, share)
            });
            check(case, folder.path(), &settings, &mut |average, weights, share| {
                move_within_the_pass(&*still, average, weights, share)
            });
        }
    }
}

/// The oracle's settings, whose names are ours.
fn settings(case: &Value, kind: &str) -> EmaSettings {
    let named = case["settings"].as_object().unwrap();
    let mut text = format!("dtype = {kind:?}\nevery_n_steps = {}\n", case["every_n_steps"]);
    named.iter().for_each(|(name, value)| text += &format!("{name} = {value}\n"));
    let mut ema = EmaSettings::default();
    fm_dist::settings::read(&mut ema, "oracle", &text, &[]).unwrap();
    assert!(ema.problems().is_empty(), "{case}: {:?}", ema.problems());
    ema
}

fn check(
    case: &Value,
    folder: &Path,
    settings: &EmaSettings,
    advance: &mut dyn FnMut(&mut Tensor, &Tensor, f64),
) {
    let file = SafeTensors::open(folder.join(case["file"].as_str().unwrap())).unwrap();
    let [weights, averages, decays] =
        ["weights", "averages", "decays"].map(|name| file.read(name).unwrap());
    let mut average = weights.get(0).to_kind(settings.dtype.kind());
    let steps = averages.size()[0];
    assert!(steps >= 100);
    for step in 1..=steps {
        if let Some(share) = settings.share_after(step as u64) {
            assert_eq!(share, 1.0 - decays.double_value(&[step - 1]), "{case}: step {step}");
            advance(&mut average, &weights.get(step), share);
        }
        let found = average.to_kind(Kind::Float);
        assert!(found.equal(&averages.get(step - 1)), "{case}: step {step}");
    }
}

fn move_within_the_pass(still: &dyn Update, average: &mut Tensor, weights: &Tensor, share: f64) {
    let (mut params, gradient) = (weights.copy(), weights.ones_like());
    let slice = Slice {
        params: &mut params,
        gradient: &gradient,
        gradient_factor: 1.0,
        state: &mut [weights.zeros_like(), weights.zeros_like()],
        computed: None,
        average: Some(Average { values: average, share }),
        decayed: &[],
        decay_factor: 1.0,
    };
    // Without a learning rate the pass changes no weight.
    still.update(slice, 0.0, 1);
    assert!(params.equal(weights));
}
