//! TensorBoard reads what a run writes for it, also after a resume; Weights & Biases would get the
//! same steps.

use std::path::Path;

use fm_dist::config::RunConfig;
use fm_dist::run::Resume;
use serde_json::Value;
use tempfile::TempDir;

use super::packages::{entries, oracle};
use crate::runs::{column, tiny, train_in_threads};

fn pairs(value: &Value) -> Vec<(u64, f64)> {
    let pair = |pair: &Value| (pair[0].as_u64().unwrap(), pair[1].as_f64().unwrap());
    value.as_array().unwrap().iter().map(pair).collect()
}

#[test]
fn tensorboard_reads_the_numbers_the_configuration_and_the_samples_of_a_resumed_run() {
    let root = TempDir::new().unwrap();
    let config = |sets: &[&str]| -> RunConfig {
        let output = format!("output_dir={}", root.path().join("run").display());
        tiny(
            &[
                &[
                    &output,
                    "log.tensorboard=true",
                    "checkpoint.every_n_steps=4",
                    "validation.share=0.1",
                    "validation.every_n_steps=4",
                    "validation.sigmas=[0.1, 0.125]",
                    "validation.max_samples=16",
                ],
                sets,
            ]
            .concat(),
        )
    };
    // The two steps behind the checkpoint are done again.
    let first =
        config(&["max_steps=6", "checkpoint.save_last=false", "checkpoint.keep_best=false"]);
    train_in_threads(&first, &Resume::Never, 2).unwrap();
    let run = train_in_threads(&config(&["max_steps=9"]), &Resume::Latest, 2).unwrap();
    let (folder, answer) = (run.join("tensorboard"), root.path().join("answer.json"));
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "a file for each start");
    oracle("event_files.py", &[folder.to_str().unwrap(), answer.to_str().unwrap()]);
    let answer = entries(&answer);
    let scalars = &answer["scalars"];
    for (tag, key) in [("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")]
    {
        let (found, expected) = (pairs(&scalars[tag]), column(&run, key));
        assert_eq!(found.len(), 9, "{tag}: every step once, {found:?}");
        for ((step, number), (expected_step, expected)) in found.into_iter().zip(expected) {
            assert_eq!((step as f64, number as f32), (expected_step, expected as f32), "{tag}");
        }
    }
    for (tag, key) in [("validation/loss", "validation_loss"), ("validation/val_loss", "val_loss")]
    {
        let expected: Vec<(u64, f64)> = column(&run, key)
            .iter()
            .map(|(step, loss)| (*step as u64, f64::from(*loss as f32)))
            .collect();
        let steps: Vec<u64> = expected.iter().map(|(step, _)| *step).collect();
        assert_eq!(
            steps,
            [0, 4, 8, 9],
            "{tag}: that of step 6, where the first start ended, is void"
        );
        assert_eq!(pairs(&scalars[tag]), expected, "{tag}");
    }
    for tag in ["validation/loss_sigma_0.10", "validation/loss_sigma_0.125"] {
        assert_eq!(pairs(&scalars[tag]).len(), 4, "{tag}");
    }
    let by_sigma = scalars.as_object().unwrap().keys();
    assert!(by_sigma.filter(|tag| tag.starts_with("train/loss_sigma_0.")).count() > 3, "{scalars}");
    assert_eq!(pairs(&scalars["performance/step_seconds"]).len(), 9);
    let image = &answer["images"]["samples"][0];
    assert!(
        image[0] == 9 && image[1].as_u64() > Some(20) && image[2].as_u64() > Some(20),
        "{image}"
    );
    assert_eq!(answer["pictures"]["samples"], "89504e470d0a1a0a", "a PNG");
    assert_eq!(answer["plugins"]["configuration"], "text");
    let text = answer["texts"]["configuration"][0].as_str().unwrap();
    assert!(text.starts_with("```toml\n") && text.contains("\nmax_steps = "), "{text}");
    sent_to_wandb(&run, &root.path().join("sent.json"));
}

/// Checks that launch/to_wandb.py sends each line of the metrics at its step, once, to one run
/// whenever it is called, and to another for a folder of the same name elsewhere.
fn sent_to_wandb(run: &Path, out: &Path) {
    let sent_of = |run: &Path| {
        oracle("sent_metrics.py", &[run.to_str().unwrap(), out.to_str().unwrap()]);
        match entries(out).as_array().unwrap().as_slice() {
            [sent] => sent.clone(),
            sent => panic!("one run: {sent:?}"),
        }
    };
    let sent = sent_of(run);
    assert_eq!(sent["init"]["name"], run.file_name().unwrap().to_str().unwrap());
    assert_eq!(sent["init"]["id"], sent_of(run)["init"]["id"]);
    let namesake = out.with_file_name("elsewhere").join(run.file_name().unwrap());
    std::fs::create_dir_all(&namesake).unwrap();
    for name in ["config.toml", "metrics.jsonl"] {
        std::fs::copy(run.join(name), namesake.join(name)).unwrap();
    }
    let other = sent_of(&namesake);
    assert_eq!(sent["init"]["name"], other["init"]["name"]);
    assert_ne!(sent["init"]["id"], other["init"]["id"]);
    assert_eq!(sent["init"]["config"]["max_steps"], 9);
    let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| {
            let mut numbers: Value = serde_json::from_str(line).unwrap();
            let step = numbers.as_object_mut().unwrap().remove("step").unwrap();
            Value::Array(vec![step, numbers])
        })
        .collect();
    assert!(lines.len() > 9 && sent["log"] == Value::Array(lines), "{sent}");
}
