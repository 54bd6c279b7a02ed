//! A: configurations and launches that cannot work. B: data that cannot be trained on.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use fm_dist::files::safetensors;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::{Case, SHORT, SOON, START, STEPS, Started, signal, turn, unbroken};
use crate::runs::{checkpoint, finish, running};

#[test]
fn a1_a2_a3_mistakes_are_told_all_at_once_with_code_50_before_anything_begins() {
    let sets = ["train.lerning_rate=1", "optimizer.adamw.lr=-1", "max_steps=1e99"];
    let says = [
        "train.lerning_rate (--set): unknown key",
        "optimizer.adamw.lr (--set)",
        "max_steps (--set)",
        "exit 50",
    ];
    let ended =
        Case { ranks: 0, sets: &sets, code: 50, says: &says, seconds: SOON, ..Case::default() }
            .run();
    assert!(!ended.run_folder().exists());
    let excluded = ["parallel.sharding=\"parameters\"", "parallel.recompute=\"never\""];
    Case {
        ranks: 0,
        sets: &excluded,
        code: 50,
        says: &["parallel.recompute: must be `always`"],
        ..Case::default()
    }
    .run();
    let idle = ["parallel.sharding=\"optimizer\""];
    let says = ["WARN sharding = \"optimizer\" has no effect"];
    Case { ranks: 0, sets: &idle, says: &says, never: &[], ..Case::default() }.run();
}

#[test]
fn a4_a_global_batch_that_does_not_divide_names_its_neighbours() {
    let says =
        ["16 is no multiple of micro_batch_size_per_gpu 8 x 3 ranks = 24; nearest: 24", "exit 50"];
    Case { ranks: 3, code: 50, says: &says, seconds: SOON, ..Case::default() }.run();
}

/// The batch that fits no three ranks, told by a rank 0 that needs seconds to speak.
#[test]
fn a4_the_rank_that_speaks_is_waited_for_however_long_it_takes() {
    let says = ["error CONFIG rank 0/3", "nearest: 24", "exit 50"];
    Case { ranks: 3, fault: "sleep@0:0:finalize:4", code: 50, says: &says, ..Case::default() }
        .run();
    let root = TempDir::new().unwrap();
    let data = poisoned(&root);
    let sets = ["data.on_bad=\"skip\"", "data.bad_share=0", &data];
    let says = ["error DATA rank 0/2", "samples of epoch 0 are not finite", "exit 40"];
    Case {
        fault: "sleep@0:every:finalize:4",
        sets: &sets,
        code: 40,
        says: &says,
        ..Case::default()
    }
    .run();
}

#[test]
fn a4_a_rank_that_never_speaks_is_given_up_and_another_one_does() {
    let root = TempDir::new().unwrap();
    let data = poisoned(&root);
    let sets = ["data.on_bad=\"skip\"", "data.bad_share=0", "watchdog.finalize_seconds=3", &data];
    let says = [
        "error PEER rank 1/2",
        "rank 0 failed: ",
        "samples of epoch 0 are not finite",
        "it has not ended the run within 3 s. exit 40",
    ];
    Case {
        fault: "stop@0:every:finalize",
        sets: &sets,
        code: 40,
        says: &says,
        seconds: 10.0 + SOON,
        ..Case::default()
    }
    .run();
    let says = ["error HANG rank 1/3", "missing: 0", "exit 21"];
    let sets = ["watchdog.finalize_seconds=3"];
    Case {
        ranks: 3,
        fault: "stop@0:0:finalize",
        sets: &sets,
        code: 21,
        says: &says,
        seconds: 3.0 + SOON,
        ..Case::default()
    }
    .run();
}

/// `mpirun` of two command lines, one a rank.
fn two_programs(root: &TempDir, first: &str, second: &str) -> Command {
    let one = Case { ranks: 1, ..Case::default() }.command(root);
    let words: Vec<String> = one
        .get_args()
        .skip_while(|word| *word != "1")
        .skip(1)
        .map(|word| word.to_string_lossy().into())
        .collect();
    let mut command = Command::new("mpirun");
    command
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMP_NUM_THREADS", "1");
    command.args(["--oversubscribe", "-n", "1"]).args(&words).args(["--set", first]);
    command.args([":", "-n", "1"]).args(&words).args(["--set", second]);
    command
}

#[test]
fn a5_a_configuration_that_differs_among_ranks_is_told_with_key_and_values() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let command = two_programs(&root, "optimizer.adamw.lr=1e-4", "optimizer.adamw.lr=2e-4");
    let (ended, code) = Started::new(command).end(root, SOON);
    assert_eq!(code, 50, "{}", ended.errors);
    assert!(
        ended.errors.contains("optimizer.adamw.lr: differs: rank 1 has 0.0002, rank 0 0.0001"),
        "{}",
        ended.errors
    );
    assert!(!ended.run_folder().exists());
}

#[test]
fn a6_another_build_on_one_rank_is_refused_with_code_52() {
    let says =
        ["error ENVIRONMENT rank 0/2", "rank 1 has program another build, rank 0 has", "exit 52"];
    let ended = Case {
        fault: "other_build@1:0:bootstrap",
        code: 52,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
    assert!(!ended.run_folder().exists());
}

#[test]
fn a8_a_second_job_on_a_run_that_lives_is_told_whose_it_is() {
    let unbroken = unbroken(2, &[]);
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let mut first = Started::new(Case { fault: "stop@0:6:data", ..Case::default() }.command(&root));
    first.hear("strikes");
    let (code, _, errors) =
        finish(Case { words: &["--resume", "latest"], ..Case::default() }.command(&root));
    running(root.path().to_str().unwrap()).iter().for_each(|pid| signal("CONT", pid));
    assert_eq!(code, 50, "{errors}");
    let said = errors.lines().filter(|line| line.starts_with("fm-dist: error")).collect::<Vec<_>>();
    assert!(said.len() == 1 && said[0].contains("run folder in use by a run on host "), "{errors}");
    let (ended, code) = first.end(root, START);
    assert_eq!(code, 0, "{}", ended.errors);
    assert!(checkpoint(&ended.run_folder(), STEPS) == unbroken, "the first one never noticed");
}

#[test]
fn a7_the_only_task_of_a_slurm_step_trains_alone_without_mpi() {
    let root = TempDir::new().unwrap();
    let step = [
        ("SLURM_JOBID", "1"),
        ("SLURM_NODELIST", "n1"),
        ("SLURM_PROCID", "0"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_NTASKS", "1"),
    ];
    let (code, _, errors) = finish({
        let mut command = Case { ranks: 0, ..Case::default() }.command(&root);
        command.envs(step);
        command
    });
    assert_eq!(code, 0, "{errors}");
    assert!(
        checkpoint(&root.path().join("run"), STEPS) == unbroken(0, &[]),
        "it is the run that no launcher started"
    );
    let mut told = Case { ranks: 0, words: &["--launch", "mpi"], ..Case::default() }.command(&root);
    let (code, _, errors) = finish({
        told.envs(step);
        told
    });
    assert_eq!(code, 52, "{errors}");
    assert!(
        errors.contains(
            "srun gave this task no PMI, without which MPI does not start; leave --launch out"
        ),
        "{errors}"
    );
}

#[test]
fn a9_a_rank_that_dies_before_mpi_begins_ends_the_launch() {
    let _turn = turn();
    let root = TempDir::new().unwrap();
    let inner = Case { ranks: 2, ..Case::default() }.command(&root);
    let mut words: Vec<String> =
        inner.get_args().map(|word| word.to_string_lossy().into()).collect();
    let program = words.iter().position(|word| word.ends_with("fm-dist")).unwrap();
    let script = "[ \"$OMPI_COMM_WORLD_RANK\" = 1 ] && exit 3; exec \"$@\"";
    words.splice(program..program, ["bash", "-c", script, "bash"].map(String::from));
    let mut command = Command::new("mpirun");
    command
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .args(words);
    let (ended, code) = Started::new(command).end(root, SOON);
    assert_eq!(code, 3, "{}", ended.errors);
}

#[test]
fn a10_a_rank_that_never_comes_is_missed_by_name_with_code_22() {
    let says = ["error COMM rank 0/3", "; missing: 1 (never heard of)", "exit 22"];
    // All must have begun to meet within it, on a busy machine too.
    let sets = ["watchdog.init_seconds=6", "train.global_batch_size=24"];
    Case {
        ranks: 3,
        fault: "sleep@1:0:bootstrap:60",
        sets: &sets,
        code: 22,
        says: &says,
        seconds: 6.0 + SOON,
        ..Case::default()
    }
    .run();
}

#[test]
fn a12_one_process_needs_no_launcher_and_computes_the_same() {
    assert!(unbroken(0, &[]) == unbroken(1, &[]));
}

/// A folder of data with one bad number in sample 3, as `data.path`.
fn poisoned(root: &TempDir) -> String {
    let folder = root.path().join("data");
    fs::create_dir(&folder).unwrap();
    let latents = Tensor::ones([40, 1, 8, 8], (Kind::Float, Device::Cpu));
    drop(latents.get(3).flatten(0, -1).get(5).fill_(f64::NAN));
    let text = Tensor::ones([40, 1, 10], (Kind::Float, Device::Cpu));
    let mut file = fs::File::create(folder.join("a.safetensors")).unwrap();
    let tensors = [("image_latents", &latents), ("text_embeddings", &text)];
    safetensors::write(&mut file, &tensors, &BTreeMap::new()).unwrap();
    let json = serde_json::json!({
        "format": "fm-dist dataset", "version": 1, "name": "poisoned", "source": "a test", "licence": "CC0", "data_type": "image",
        "files": [{"path": "a.safetensors", "group": "8x8", "samples": 40, "sha256": "0".repeat(64)}],
    });
    fs::write(folder.join("dataset.json"), json.to_string()).unwrap();
    format!("data.path={:?}", folder.display().to_string())
}

#[test]
fn b1_a_sample_that_is_not_finite_stops_the_run_or_is_skipped_alike_at_every_world_size() {
    let root = TempDir::new().unwrap();
    let data = poisoned(&root);
    let sets = |more: &[&'static str]| -> Vec<String> {
        more.iter().map(ToString::to_string).chain([data.clone()]).collect()
    };
    let run = |ranks: usize, more: &[&'static str], code: i32, says: &[&str]| {
        let sets = sets(more);
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        Case { ranks, sets: &sets, code, says, never: &[], ..Case::default() }.run()
    };
    run(
        2,
        &[],
        40,
        &["`image_latents` of sample 3 (row 3) has 1 numbers that are not finite", "exit 40"],
    );
    let skipping = [
        "data.on_bad=\"skip\"",
        "data.bad_share=0.5",
        "parallel.seed_scope=\"sample\"",
        "parallel.deterministic=true",
    ];
    let ends: Vec<_> = [1, 2]
        .into_iter()
        .map(|ranks| {
            run(ranks, &skipping, 0, &["1 samples are not finite and were skipped"])
                .run_folder_bytes()
        })
        .collect();
    assert!(ends[0] == ends[1], "the same samples stand in for it");
    let strict = ["data.on_bad=\"skip\"", "data.bad_share=0"];
    run(
        2,
        &strict,
        40,
        &["samples of epoch 0 are not finite; data.bad_share allows 0 of 40", "exit 40"],
    );
}

impl super::Ended {
    /// The last checkpoint's.
    fn run_folder_bytes(&self) -> super::Bytes {
        checkpoint(&self.run_folder(), STEPS)
    }
}

#[test]
fn b7_more_samples_in_a_step_than_there_are_are_refused_with_code_40() {
    let sets = ["train.global_batch_size=2048"];
    let says = ["has 1797 samples, fewer than the global batch of 2048", "exit 40"];
    Case { ranks: 4, sets: &sets, code: 40, says: &says, seconds: SOON, ..Case::default() }.run();
}

#[test]
fn b11_a_read_that_hangs_is_told_with_rank_phase_and_file() {
    let says =
        ["error HANG rank 0/2", "missing: 1 (host", "phase data", "reading embedded/", "exit 21"];
    Case {
        fault: "stop@1:7:data",
        sets: &SHORT,
        code: 21,
        says: &says[..1],
        seconds: SOON,
        ..Case::default()
    }
    .run();
    Case {
        fault: "sleep@1:7:read:60",
        sets: &SHORT,
        code: 21,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
    let says = [says[0], says[1], "phase draw", says[4]];
    Case {
        fault: "sleep@1:7:draw:60",
        sets: &SHORT,
        code: 21,
        says: &says,
        seconds: SOON,
        ..Case::default()
    }
    .run();
}
