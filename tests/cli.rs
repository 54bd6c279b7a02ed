//! Messages and exit codes, as a user meets them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fm_dist::files::safetensors;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::runs::{finish, mpirun, program, with_sets};

/// The single line that says what went wrong.
fn only_error(errors: &str) -> &str {
    let lines: Vec<&str> =
        errors.lines().filter(|line| line.starts_with("fm-dist: error")).collect();
    assert_eq!(lines.len(), 1, "one line says why:\n{errors}");
    lines[0]
}

#[test]
fn every_mistake_in_a_configuration_is_named_at_once_with_its_line() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("wrong.toml");
    let text = "seed = \"x\"\n[flow_matching]\nflow_shfit = 3.0\ntimestep_sampling = \"logitnormal\"\n[optimizer.adamw]\nlr = nan\n[train]\nmax_grad_norm = -1\n";
    fs::write(&file, text).unwrap();
    for mut command in [program(&[]), mpirun(2, &[])] {
        let began = Instant::now();
        command.args(["train", "-c", file.to_str().unwrap()]).current_dir(folder.path());
        let (code, _, errors) = finish(command);
        assert_eq!(code, 50, "{errors}");
        let line = only_error(&errors);
        for part in [
            "error CONFIG rank 0/",
            "seed (line 1): expected an integer, found the text \"x\"",
            "flow_matching.flow_shfit (line 3): unknown key; did you mean flow_matching.flow_shift?",
            "flow_matching.timestep_sampling (line 4): unknown value `logitnormal`; did you mean `logit_normal`?",
            "optimizer.adamw.lr (line 6): NaN is not a finite number",
            "train.max_grad_norm (line 8): -1 is out of range",
            "exit 50",
        ] {
            assert!(line.contains(part), "{part:?} is not in {line}");
        }
        // Loaded machines start programs slowly; alone this takes half a second.
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert!(
            !folder.path().join("runs").exists(),
            "nothing is written before the configuration is valid"
        );
    }
}

#[test]
fn a_global_batch_that_does_not_divide_names_the_nearest_that_do() {
    let (code, _, errors) =
        finish(mpirun(3, &with_sets(&["train"], &["output_dir=/nonexistent/never"])));
    assert_eq!(code, 50, "{errors}");
    let line = only_error(&errors);
    assert!(
        line.contains("train.global_batch_size: 32 is no multiple of micro_batch_size_per_gpu 8 x 3 ranks = 24; nearest: 24 or 48"),
        "{line}"
    );
}

#[test]
fn the_debug_mode_is_for_one_process() {
    let (code, _, errors) = finish(mpirun(2, &with_sets(&["train", "--debug"], &[])));
    assert_eq!(code, 50, "{errors}");
    assert!(
        only_error(&errors)
            .contains("--debug: is for one process, found 2; start it without mpirun"),
        "{errors}"
    );
}

#[test]
fn the_debug_mode_logs_every_field_of_every_step() {
    let folder = TempDir::new().unwrap();
    let output = format!("output_dir={}", folder.path().join("run").display());
    let (code, _, errors) =
        finish(program(&with_sets(&["train", "--debug"], &["max_steps=2", &output])));
    assert_eq!(code, 0, "{errors}");
    for step in ["[STEP 1]", "[STEP 2]"] {
        assert!(
            errors.contains(&format!("{step} FLOW MATCHING"))
                && errors.contains(&format!("{step} LOSS DEBUG")),
            "{errors}"
        );
    }
    for field in [
        "[SAMPLING] Method:",
        "[FLOW] Shift:",
        "[BATCH] Size: 32",
        "[SIGMA] Range:",
        "[TIMESTEPS] Range:",
        "[RANGES] Clean latents:",
        "[CHECK] OK",
    ] {
        assert!(errors.contains(field), "{field} is not in\n{errors}");
    }
    for field in ["[RANGES] Prediction:", "[WEIGHTS] w =", "[LOSS] Unweighted:", "impact 1.000x"] {
        assert!(errors.contains(field), "{field} is not in\n{errors}");
    }
}

#[test]
fn a_missing_configuration_or_run_is_named() {
    let (code, _, errors) = finish(program(&["-c", "no-such.toml"]));
    assert_eq!(code, 50);
    assert!(
        only_error(&errors).contains("--config: no-such.toml cannot be read: No such file"),
        "{errors}"
    );
    let (code, _, errors) = finish(program(&["sample", "--run", "no-such-run", "--out", "x.png"]));
    assert_eq!(code, 44);
    assert!(only_error(&errors).contains("no-such-run: there is no such folder"), "{errors}");
    let (code, _, errors) = finish(program(&["--resume", "no-such-run"]));
    assert_eq!(code, 44);
    let expected = "no-such-run: there is no such folder; --resume takes never, auto, latest, or the folder of a run or a checkpoint";
    assert!(only_error(&errors).contains(expected), "{errors}");
}

#[test]
fn a_file_that_is_no_configuration_is_called_what_it_is() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("run.toml");
    let said = |arguments: &[&str]| {
        let (code, _, errors) = finish(program(&[&["check"], arguments].concat()));
        assert_eq!(code, 50, "{errors}");
        only_error(&errors).to_string()
    };
    let utf_16: Vec<u8> = "seed = 1".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (contents, what) in [
        (&b"model:\n  path: x\n"[..], "is YAML; a configuration is TOML"),
        (b"{\n  \"seed\": 1\n}", "is JSON; a configuration is TOML"),
        (b"\xef\xbb\xbfseed = 1\n", "begins with a byte order mark"),
        (&utf_16, "is UTF-16; save it as UTF-8"),
        (b"<!DOCTYPE html><html>", "is a web page (HTML), not TOML"),
        (b"\x40\0\0\0\0\0\0\0{\"a\":{}}", "is a safetensors file; expected TOML"),
        (b"\xff\x00\xff\x01", "is no text: invalid utf-8 sequence"),
    ] {
        fs::write(&file, contents).unwrap();
        let line = said(&["-c", file.to_str().unwrap()]);
        assert!(line.contains(what), "{what:?} is not in {line}");
    }
    let line = said(&["-c", folder.path().to_str().unwrap()]);
    assert!(line.contains("is a folder; expected a TOML file"), "{line}");
}

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
fn a_wrong_argument_is_an_error_of_usage_with_code_2() {
    let (code, _, errors) = finish(program(&["trian"]));
    assert_eq!(code, 2);
    assert!(errors.contains("train"), "the nearest command is offered:\n{errors}");
}

#[test]
fn a_rank_that_cannot_write_ends_the_world_with_the_storage_code() {
    let began = Instant::now();
    let (code, _, errors) =
        finish(mpirun(2, &with_sets(&["train"], &["output_dir=/proc/no-folder-here"])));
    assert_eq!(code, 30, "{errors}");
    assert!(only_error(&errors).contains("error STORAGE rank 0/2"), "{errors}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_loss_that_explodes_stops_every_rank_before_the_update() {
    let folder = TempDir::new().unwrap();
    let output = format!("output_dir={}", folder.path().join("run").display());
    let (code, _, errors) = finish(mpirun(
        2,
        &with_sets(
            &["train"],
            &[
                "max_steps=40",
                "optimizer.adamw.lr=10",
                "lr_scheduler.cosine.warmup_steps=0",
                &output,
            ],
        ),
    ));
    assert_eq!(code, 41, "{errors}");
    let line = only_error(&errors);
    assert!(
        line.contains("error NUMERIC")
            && line.contains("loss exploded")
            && line.contains("nothing was updated"),
        "{line}"
    );
    assert!(
        line.contains("NaN")
            || line.contains(" (above 100, the bound of train.check_loss) in samples "),
        "{line}"
    );
    assert!(!line.contains("normalised"), "digits are: {line}");
}

#[test]
fn latents_that_are_not_normalized_are_asked_about_where_the_loss_explodes() {
    let folder = TempDir::new().unwrap();
    let float = (Kind::Float, Device::Cpu);
    let latents = Tensor::from_slice(&[-12.0f32, 12.0]).repeat([32 * 64]).view([64, 1, 8, 8]);
    write_dataset(
        folder.path(),
        &[("image_latents", &latents), ("text_embeddings", &Tensor::ones([64, 1, 10], float))],
    );
    let (path, output) = (
        format!("data.path={}", folder.path().display()),
        format!("output_dir={}", folder.path().join("run").display()),
    );
    let (code, _, errors) =
        finish(program(&with_sets(&["train"], &["max_steps=4", &path, &output])));
    assert_eq!(code, 41, "{errors}");
    let line = only_error(&errors);
    let asked = "; latents have standard deviation 12.000, about 1 was expected; are they normalised (scaling and shift factor of the VAE)?";
    assert!(
        line.contains(" (above 100, the bound of train.check_loss) in samples ")
            && line.contains(asked),
        "{line}"
    );
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
        let rows = predicted(&command(&[]));
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
    let known = include_str!("../src/plan/prediction/clusters.toml");
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

#[test]
fn the_doctor_finds_what_training_needs() {
    let (code, text, errors) = finish(program(&["doctor"]));
    assert_eq!(code, 0, "{errors}");
    for part in ["libtorch", "2.13.0", "MPI", "NCCL", "CUDA driver", "cores", "operations"] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn other_ranks_keep_logs_of_their_own_and_only_rank_zero_speaks() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    let output = format!("output_dir={}", run.display());
    let (code, _, errors) = finish(mpirun(
        2,
        &with_sets(&["train"], &["max_steps=3", "flow_matching.summary_log_interval=1", &output]),
    ));
    assert_eq!(code, 0, "{errors}");
    // The first step has the two headings of the detailed log, the others a line each.
    for (step, lines) in [(1, 2), (2, 1), (3, 1)] {
        assert_eq!(errors.matches(&format!("[STEP {step}]")).count(), lines, "{errors}");
    }
    for rank in 0..2 {
        let log = fs::read_to_string(run.join(format!("log/rank-{rank:05}.jsonl"))).unwrap();
        let lines =
            log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        assert!(lines.count() > 0, "rank {rank}");
    }
}

#[test]
fn data_that_the_model_cannot_take_are_refused_by_the_name_of_the_setting() {
    for (setting, text) in [
        ("model.dit.in_channels=4", "model.dit.in_channels: is 4, the data's latents have 1"),
        (
            "model.dit.condition_width=7",
            "model.dit.condition_width: is 7, the data's text_embeddings have 10",
        ),
        (
            "model.dit.patch_size=3",
            "model.dit.patch_size: 3 does not divide the data's latents of 8 x 8",
        ),
    ] {
        let (code, _, errors) = finish(program(&["check", "--set", setting]));
        assert_eq!(code, 50, "{errors}");
        assert!(only_error(&errors).contains(text), "{errors}");
    }
}

#[test]
fn a_dataset_that_is_not_there_is_said_once_and_nothing_is_written() {
    let folder = TempDir::new().unwrap();
    let mut command = mpirun(2, &["--set", "data.path=no-such-data"]);
    command.current_dir(folder.path());
    let (code, _, errors) = finish(command);
    assert_eq!(code, 40, "{errors}");
    assert!(
        only_error(&errors).contains("error DATA rank 0/2") && errors.contains("no-such-data"),
        "{errors}"
    );
    assert!(!folder.path().join("runs").exists());
}

/// A dataset of 64 pictures in the digits' form, of which one has a number that is not one.
fn dataset_with_a_bad_sample(folder: &Path) {
    let float = (Kind::Float, Device::Cpu);
    let latents = Tensor::zeros([64, 1, 8, 8], float);
    let _ = latents.get(37).get(0).get(2).narrow(0, 3, 1).fill_(f64::NAN);
    write_dataset(
        folder,
        &[("image_latents", &latents), ("text_embeddings", &Tensor::ones([64, 1, 10], float))],
    );
}

/// A dataset of 64 pictures in the digits' form.
fn write_dataset(folder: &Path, tensors: &[(&str, &Tensor)]) {
    let mut file = fs::File::create(folder.join("a.safetensors")).unwrap();
    safetensors::write(&mut file, tensors, &BTreeMap::new()).unwrap();
    let hash = "0".repeat(64);
    let text = format!(
        r#"{{"format":"fm-dist dataset","version":1,"name":"bad","source":"test","licence":"none","data_type":"image",
            "files":[{{"path":"a.safetensors","samples":64,"group":"8x8","sha256":"{hash}"}}]}}"#
    );
    fs::write(folder.join("dataset.json"), text).unwrap();
}

#[test]
fn a_bad_sample_on_one_rank_ends_the_world_with_its_number() {
    let folder = TempDir::new().unwrap();
    dataset_with_a_bad_sample(folder.path());
    let (path, output) = (
        format!("data.path={}", folder.path().display()),
        format!("output_dir={}", folder.path().join("run").display()),
    );
    let began = Instant::now();
    let (code, _, errors) =
        finish(mpirun(2, &with_sets(&["train"], &["max_steps=4", &path, &output])));
    assert_eq!(code, 40, "{errors}");
    let line = only_error(&errors);
    assert!(
        line.contains("error DATA rank ")
            && line.contains("image_latents")
            && line.contains("sample 37"),
        "{line}"
    );
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let (code, _, errors) = finish(program(&["check", "--verify-data", "--set", &path]));
    assert_eq!(code, 40, "{errors}");
    assert!(only_error(&errors).contains("a.safetensors: has sha256 "), "{errors}");
}

#[test]
fn a_command_line_that_is_wrong_is_told_once_by_all_ranks_of_a_launch() {
    for mut command in [program(&["train", "--bogus"]), mpirun(4, &["train", "--bogus"])] {
        command.env_remove("RUST_BACKTRACE");
        let (code, _, errors) = finish(command);
        assert_eq!(code, 2, "{errors}");
        assert_eq!(errors.matches("unexpected argument '--bogus' found").count(), 1, "{errors}");
    }
    let (code, output, errors) = finish(mpirun(2, &["--version"]));
    assert_eq!((code, output.lines().count()), (0, 1), "{output}{errors}");
}

#[test]
fn a_time_that_no_clock_counts_to_is_a_mistake_of_the_command_line() {
    for time in ["300000000000years", "99999999999999999999s", "soon"] {
        let (code, _, errors) = finish(program(&["train", "--stop-after", time]));
        assert_eq!(code, 2, "{errors}");
        assert!(errors.contains("--stop-after") && !errors.contains("fm-dist: error"), "{errors}");
    }
}

/// A dataset of twenty files.
fn many_files(root: &Path) -> String {
    let entry = |file: usize| {
        let path = format!("{file:02}.safetensors");
        let (latents, text) = (
            Tensor::ones([2, 1, 8, 8], (Kind::Float, Device::Cpu)),
            Tensor::ones([2, 1, 10], (Kind::Float, Device::Cpu)),
        );
        let tensors = [("image_latents", &latents), ("text_embeddings", &text)];
        safetensors::write(
            &mut fs::File::create(root.join(&path)).unwrap(),
            &tensors,
            &BTreeMap::new(),
        )
        .unwrap();
        serde_json::json!({"path": path, "group": "8x8", "samples": 2, "sha256": "0".repeat(64)})
    };
    let files: Vec<_> = (0..20).map(entry).collect();
    let json = serde_json::json!({
        "format": "fm-dist dataset", "version": 1, "name": "many", "source": "a test", "licence": "CC0", "data_type": "image", "files": files,
    });
    fs::write(root.join("dataset.json"), json.to_string()).unwrap();
    format!("data.path={:?}", root.display().to_string())
}

/// Whatever it is that finds no descriptor left: data, libtorch's source of random numbers, the
/// log.
#[test]
fn open_files_that_run_out_are_one_line_with_code_52_wherever_that_is() {
    let root = TempDir::new().unwrap();
    let data = many_files(root.path());
    let mut codes = Vec::new();
    for limit in [4, 5, 6, 8].into_iter().chain(20..34) {
        let output = format!("output_dir={}", root.path().join(limit.to_string()).display());
        let words = with_sets(&["train"], &["max_steps=1", &output, &data]);
        let mut command = Command::new("bash");
        command
            .args([
                "-c",
                &format!("ulimit -n {limit} && exec \"$@\""),
                "bash",
                env!("CARGO_BIN_EXE_fm-dist"),
            ])
            .args(words);
        let (code, _, errors) = finish(command);
        if code != 0 {
            assert_eq!(code, 52, "at {limit}: {errors}");
            assert!(only_error(&errors).contains("ulimit -n"), "{errors}");
        }
        codes.push(code);
    }
    assert!(codes.contains(&0) && codes.contains(&52), "{codes:?}");
}
