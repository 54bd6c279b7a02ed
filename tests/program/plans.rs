//! `fm-dist check` plans runs and predicts their steps on clusters, and refuses what it cannot plan
//! with what it can.

use std::fs;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::cli::only_error;
use crate::runs::{finish, program};

#[test]
fn a_model_is_planned_by_its_path_alone_and_a_path_that_is_none_is_told_what_was_meant() {
    let flux = format!("model.path={}/tests/fixtures/models/flux1-dev", env!("CARGO_MANIFEST_DIR"));
    let plan = |path: &str| {
        let sets =
            ["--set", path, "--set", "flow_matching.adapter_type=flux", "--latents", "16,128,128"];
        finish(program(&[&["check"], &sets[..]].concat()))
    };
    let (code, text, errors) = plan(&flux);
    assert_eq!(code, 0, "{errors}");
    assert!(text.contains("flux: 11901408320 parameters"), "{text}");
    for (path, what) in [
        (
            "model.path=black-forest-labs/FLUX.1-dev".to_string(),
            "does not exist; expected a folder with config.json and safetensors; nothing is downloaded",
        ),
        (
            format!("{flux}/config.json"),
            "config.json is a file; expected a folder with config.json and safetensors; did you mean",
        ),
    ] {
        let (code, _, errors) = plan(&path);
        assert_eq!(code, 50, "{errors}");
        assert!(only_error(&errors).contains(what), "{what:?} is not in {errors}");
    }
}

#[test]
fn a_check_without_data_says_how_to_plan_without_them() {
    let (code, _, errors) = finish(program(&["check", "--set", "data.path=no-such-data"]));
    assert_eq!(code, 40, "{errors}");
    let line = only_error(&errors);
    assert!(line.contains("no-such-data: does not exist; set data.path (now \"no-such-data\"), or plan with --latents C,H,W"), "{line}");
}

#[test]
fn check_plans_a_run_without_starting_it() {
    let began = Instant::now();
    let (code, plan, errors) = finish(program(&["check", "--world", "8"]));
    assert_eq!(code, 0, "{errors}");
    for part in [
        "1272196 parameters in 6 stages",
        "128 = 16 samples x 8 ranks x 1 micro-batches",
        "14 steps, 5 samples left out of each",
        "6 all-reduces",
    ] {
        assert!(plan.contains(part), "{part:?} is not in\n{plan}");
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(finish(program(&["check", "--world", "3"])).0, 50);
}

/// The rows of a plan's prediction: number of ranks, then the columns.
fn predicted(plan: &str) -> Vec<(usize, Vec<String>)> {
    let rows = plan.lines().filter_map(|line| {
        let mut words = line.strip_prefix("  ")?.split_whitespace().map(String::from);
        Some((words.next()?.parse().ok()?, words.collect()))
    });
    rows.collect()
}

#[test]
fn check_predicts_a_step_on_a_cluster_at_every_power_of_two_of_ranks() {
    let (code, plan, errors) =
        finish(program(&["check", "--world", "8..4096", "--cluster", "h100"]));
    assert_eq!(code, 0, "{errors}");
    let rows = predicted(&plan);
    assert_eq!(
        rows.iter().map(|row| row.0).collect::<Vec<_>>(),
        [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096],
        "{plan}"
    );
    for (ranks, cells) in &rows {
        assert_eq!(
            cells[0].parse::<usize>().unwrap(),
            16 * ranks,
            "each rank has the 16 samples that it has at 8: {plan}"
        );
        let seconds: Vec<f64> = cells[1..6].iter().map(|cell| cell.parse().unwrap()).collect();
        let [step, compute, optimizer, communication, exposed] = seconds[..] else {
            panic!("{plan}")
        };
        assert!(
            (step - compute - optimizer - exposed).abs() < 1e-3 * step && exposed <= communication,
            "{plan}"
        );
    }
    for part in [
        "predicted for h100",
        "8 H100 SXM5 a node",
        "1 micro-batches of 16 samples a rank at every number of ranks; train.global_batch_size = 128 holds at 8 ranks and grows with them",
        "congestion, stragglers, data, checkpoints are not in it; no GPU has been measured against it",
        "clusters.toml",
    ] {
        assert!(plan.contains(part), "{part:?} is not in\n{plan}");
    }
}

#[test]
fn large_models_are_predicted_without_data_weights_or_gpu() {
    for (config, latents, micro_batches) in [
        ("flux1-dev", "16,128,128", 4),
        ("flux2-dev", "128,64,64", 4),
        ("qwen-image", "16,128,128", 4),
        ("wan2.1-t2v-14b", "16,21,60,104", 2),
        ("hunyuanvideo1.5-720p", "32,31,45,80", 2),
    ] {
        let file = format!("{}/configs/{config}.toml", env!("CARGO_MANIFEST_DIR"));
        let command = |more: &[&str]| {
            let all = [
                &[
                    "check",
                    "-c",
                    &file,
                    "--latents",
                    latents,
                    "--cluster",
                    "h100",
                    "--world",
                    "8..4096",
                ],
                more,
            ]
            .concat();
            let (code, plan, errors) = finish(program(&all));
            assert_eq!(code, 0, "{config}: {errors}");
            plan
        };
        let efficiencies = |rows: &[(usize, Vec<String>)]| {
            rows.iter().map(|row| row.1[6].parse().unwrap()).collect::<Vec<f64>>()
        };
        let plan = command(&[]);
        let attention = plan.lines().find(|line| line.starts_with("attention")).unwrap();
        assert!(attention.contains("without a mask"), "each rank's one sample: {attention}");
        let rows = predicted(&plan);
        assert_eq!(rows[9].1[0].parse::<usize>().unwrap(), 4096 * micro_batches, "{config}");
        let of_world = efficiencies(&rows);
        // Above 100 because ranks share the optimizer's pass; the rings' hops grow with the ranks
        // and end that.
        assert!(
            of_world[0] > 90.0 && of_world[0] < 110.0 && of_world[9] < of_world[0],
            "{config}: {of_world:?}"
        );
        // Within a node hops stay what they are.
        let of_nodes =
            efficiencies(&predicted(&command(&["--set", "parallel.sharding_group=node"])));
        assert_eq!(of_nodes[0], of_world[0], "{config}");
        assert!(
            of_nodes[8] - of_nodes[9] <= of_world[8] - of_world[9],
            "{config}: {of_nodes:?} within nodes, {of_world:?} in the world"
        );
    }
}

#[test]
fn what_cannot_be_predicted_is_refused_with_what_can() {
    for (arguments, code, text) in [
        (
            vec!["--world", "8..64"],
            50,
            "--world: a range is for a prediction: name a --cluster, one of a100, cpu2, h100, h200",
        ),
        (
            vec!["--world", "8", "--cluster", "h1000"],
            50,
            "--cluster: unknown cluster `h1000`; src/plan/prediction/clusters.toml has a100, cpu2, h100, h200",
        ),
        (
            vec!["--world", "12", "--set", "train.global_batch_size=192", "--cluster", "h100"],
            50,
            "--world: 12 ranks fill no nodes of 8 on h100; nearest: 8 or 16",
        ),
        (
            vec!["--cluster", "h100", "--clusters", "no-such.toml"],
            50,
            "--clusters: no-such.toml cannot be read: No such file",
        ),
    ] {
        let (found, _, errors) = finish(program(&[&["check"], &arguments[..]].concat()));
        assert_eq!(found, code, "{errors}");
        assert!(only_error(&errors).contains(text), "{text:?} is not in {errors}");
    }
    for world in ["3..24", "64..8", "0..8", "8..", "many"] {
        let (code, _, errors) = finish(program(&["check", "--world", world, "--cluster", "h100"]));
        assert_eq!(code, 2, "{errors}");
        assert!(
            errors.contains("expected two powers of two, the smaller one first, as in 8..4096")
                || world == "many",
            "{errors}"
        );
    }
}

#[test]
fn a_file_of_clusters_takes_the_place_of_those_that_are_built_in() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("mine.toml");
    let known = include_str!("../../src/plan/prediction/clusters.toml");
    let step = |text: &str| {
        fs::write(&file, text).unwrap();
        let arguments =
            ["check", "--world", "8", "--cluster", "h100", "--clusters", file.to_str().unwrap()];
        let (code, plan, errors) = finish(program(&arguments));
        assert_eq!(code, 0, "{errors}");
        predicted(&plan)[0].1[1].parse::<f64>().unwrap()
    };
    assert!(step(&known.replace("launch = 5e-6", "launch = 1e-2")) > 100.0 * step(known));
    fs::write(&file, known.replace("launch", "lunch")).unwrap();
    let (code, _, errors) =
        finish(program(&["check", "--cluster", "h100", "--clusters", file.to_str().unwrap()]));
    assert_eq!(code, 50, "{errors}");
    assert!(
        only_error(&errors).contains("mine.toml") && errors.contains("unknown field `lunch`"),
        "{errors}"
    );
}
