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
pub fn only_error(errors: &str) -> &str {
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
fn what_all_ranks_of_a_launch_would_print_is_printed_once() {
    let (code, text, errors) = finish(mpirun(3, &["config"]));
    assert_eq!(code, 0, "{errors}");
    assert_eq!(text.lines().filter(|line| *line == "[parallel]").count(), 1, "{text}");
    // Each rank tells of its own machine.
    let (code, text, errors) = finish(mpirun(2, &["doctor"]));
    assert_eq!(code, 0, "{errors}");
    assert_eq!(text.matches("fm-dist      0.1.0").count(), 2, "{text}");
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
