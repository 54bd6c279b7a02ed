//! A run keeps what it saved: beside the steps or not, on a disk that fails, in a folder that
//! others want, after parts were damaged. What is lost is said; what was committed is never lost,
//! and nothing is deleted that a person may want.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fm_dist::config::RunConfig;
use fm_dist::error::Error;
use fm_dist::run::Resume;
use fm_dist::run::checkpoint::AllowedChanges;
use fm_dist::train::{TrainOptions, train};
use tempfile::TempDir;

use super::{assert_had_disk, on_a_small_disk};
use crate::runs::{checkpoint, finish, program, tiny, train_in_threads, with_sets};

/// Six steps, two checkpoints: at step 5 and at the last.
fn six_steps(output: &Path, overrides: &[&str]) -> RunConfig {
    let output = format!("output_dir={}", output.display());
    tiny(
        &[["max_steps=6", "checkpoint.every_n_steps=5", output.as_str()].as_slice(), overrides]
            .concat(),
    )
}

fn trained(root: &TempDir) -> PathBuf {
    train_in_threads(&six_steps(&root.path().join("run"), &[]), &Resume::Never, 1).unwrap()
}

fn resumed(run: &Path) -> Result<PathBuf, Error> {
    train_in_threads(&six_steps(run, &[]), &Resume::Latest, 1)
}

/// Names in a run folder that begin with `prefix`, in order.
fn names(run: &Path, prefix: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(run)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.retain(|name| name.starts_with(prefix));
    names.sort();
    names
}

fn log(run: &Path) -> String {
    fs::read_to_string(run.join("log/rank-00000.jsonl")).unwrap()
}

#[test]
fn d16_a_save_beside_the_steps_gives_the_bytes_of_one_that_is_waited_for() {
    let root = TempDir::new().unwrap();
    let saved = |word: &str, ranks| {
        let overrides = [
            format!("checkpoint.asynchronous={word}"),
            "checkpoint.every_n_steps=1".into(),
            "checkpoint.keep_last=6".into(),
        ];
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        let output = root.path().join(format!("{word}-{ranks}"));
        let run = train_in_threads(&six_steps(&output, &overrides), &Resume::Never, ranks).unwrap();
        // Each was still being written while the next step changed the parameters.
        (1..=6).map(|step| checkpoint(&run, step)).collect::<Vec<_>>()
    };
    for ranks in [1, 2] {
        assert!(saved("true", ranks) == saved("false", ranks), "{ranks} ranks");
    }
}

#[test]
fn checkpoints_that_are_kept_for_ever_outlive_the_newest() {
    let root = TempDir::new().unwrap();
    let overrides =
        ["checkpoint.every_n_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_every=2"];
    let run = train_in_threads(
        &six_steps(&root.path().join("run"), &[&overrides[..], &["max_steps=5"]].concat()),
        &Resume::Never,
        2,
    )
    .unwrap();
    assert_eq!(names(&run, "step-"), ["step-00000002", "step-00000004", "step-00000005"]);
    assert!(
        names(&run, ".").is_empty() && !run.join("run.lock").exists(),
        "nothing is left lying about"
    );
}

/// Writes each file of a folder anew, changed.
type Damage = fn(&mut BTreeMap<String, Vec<u8>>);

/// Everything that can happen to the files of a checkpoint, with what is said of it.
const DAMAGES: [(&str, Damage); 8] = [
    ("model-00001-of-00001.safetensors: sha256 differs", |files| {
        *files.get_mut("model-00001-of-00001.safetensors").unwrap().last_mut().unwrap() ^= 1
    }),
    ("optimizer-00001-of-00001.safetensors: sha256 differs", |files| {
        files.get_mut("optimizer-00001-of-00001.safetensors").unwrap()[9] ^= 64
    }),
    // The step's last digit becomes another one.
    ("manifest.json: sha256 differs", |files| {
        let manifest = files.get_mut("manifest.json").unwrap();
        let text = String::from_utf8(manifest.clone()).unwrap();
        let place = text.find("\"step\": ").unwrap() + "\"step\": ".len();
        manifest[place] ^= 1;
    }),
    ("model-00001-of-00001.safetensors: has 100 of ", |files| {
        files.get_mut("model-00001-of-00001.safetensors").unwrap().truncate(100)
    }),
    ("manifest.json: is no manifest", |files| files.get_mut("manifest.json").unwrap().clear()),
    ("manifest.json: cannot be read: No such file", |files| drop(files.remove("manifest.json"))),
    ("optimizer-00001-of-00001.safetensors: cannot be read: No such file", |files| {
        drop(files.remove("optimizer-00001-of-00001.safetensors"))
    }),
    ("model-00001-of-00001.safetensors: has ", |files| {
        let model = files.remove("model-00001-of-00001.safetensors").unwrap();
        let optimizer = files.insert("optimizer-00001-of-00001.safetensors".into(), model).unwrap();
        files.insert("model-00001-of-00001.safetensors".into(), optimizer);
    }),
];

#[test]
fn d6_d11_whatever_is_damaged_the_checkpoint_before_is_used_and_nothing_is_deleted() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    let (newest, sound) = (run.join("step-00000006"), checkpoint(&run, 6));
    for (number, (said, damage)) in (1..).zip(DAMAGES) {
        let mut files = sound.clone();
        damage(&mut files);
        fs::remove_dir_all(&newest).unwrap();
        fs::create_dir(&newest).unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(newest.join(name), bytes).unwrap());
        // Each of these starts goes on from step 5, which is the guard's business and not this
        // test's.
        let _ = fs::remove_file(run.join("starts.json"));
        resumed(&run).unwrap();
        let log = log(&run);
        let warnings: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("WARN") && line.contains("failed its check"))
            .collect();
        assert_eq!(warnings.len(), number, "{log}");
        assert!(
            warnings[number - 1].contains(&format!("step-00000006 failed its check ({said}")),
            "{said}: {}",
            warnings[number - 1]
        );
        let rest = format!(
            "); using step-00000005; 1 steps will be redone; bad one kept as step-00000006.bad-{number}"
        );
        assert!(warnings[number - 1].contains(&rest), "{}", warnings[number - 1]);
        assert!(checkpoint(&run, 6) == sound, "{said}: redone to the same bits");
    }
    assert_eq!(names(&run, "step-00000006.bad").len(), DAMAGES.len());
}

#[test]
fn d7_where_none_verifies_nothing_is_set_aside() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    ["step-00000005", "step-00000006"]
        .iter()
        .for_each(|name| fs::write(run.join(name).join("manifest.json"), "").unwrap());
    let error = resumed(&run).unwrap_err();
    assert_eq!(error.exit_code(), 44);
    assert!(
        error.to_string().contains(
            "none of its 2 checkpoints verifies: step-00000006 (manifest.json: is no manifest"
        ),
        "{error}"
    );
    assert_eq!(names(&run, "step-"), ["step-00000005", "step-00000006"]);
}

#[test]
fn d13_a_checkpoint_of_another_version_is_not_taken_for_a_corrupt_one() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    let manifest = run.join("step-00000006/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    // A later version may say things that this one has never heard of.
    fs::write(&manifest, text.replace("\"version\": 3,", "\"version\": 4,\n  \"novelty\": true,"))
        .unwrap();
    let error = resumed(&run).unwrap_err();
    assert_eq!(error.exit_code(), 51);
    assert!(
        error.to_string().contains("is \"fm-dist checkpoint\" version 4, this program reads \"fm-dist checkpoint\" version 3"),
        "{error}"
    );
    assert_eq!(names(&run, "step-"), ["step-00000005", "step-00000006"]);
}

#[test]
fn d8_d18_neither_files_called_latest_nor_times_of_files_tell_the_newest() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    fs::File::open(run.join("step-00000006"))
        .and_then(|newest| newest.set_modified(SystemTime::UNIX_EPOCH))
        .unwrap();
    fs::write(run.join("LATEST"), "step-00000005").unwrap();
    std::os::unix::fs::symlink("../../etc", run.join("latest")).unwrap();
    resumed(&run).unwrap();
    assert!(log(&run).contains("nothing to do: step 6 of 6"), "{}", log(&run));
}

#[test]
fn leftovers_of_a_save_are_removed_at_the_next_start_by_who_has_the_folder() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    let leftovers = [".step-00000003.tmp", ".step-00000007.tmp", ".step-00000001.old"];
    leftovers.iter().for_each(|name| fs::create_dir_all(run.join(name).join("inside")).unwrap());
    fs::write(run.join("run.lock"), lock_of("another-host")).unwrap();
    assert_eq!(resumed(&run).unwrap_err().exit_code(), 50);
    assert_eq!(names(&run, ".step").len(), 3, "another run may be writing them");
    fs::remove_file(run.join("run.lock")).unwrap();
    resumed(&run).unwrap();
    assert!(names(&run, ".").is_empty());
}

fn lock_of(host: &str) -> String {
    let numbers = fs::read_link("/proc/self/ns/pid").unwrap();
    let holder = serde_json::json!({
        "host": host,
        "pid": 7,
        "began": 1,
        "job": "41",
        "numbers": numbers.to_str().unwrap(),
        "since": "2026-01-02T03:04:05Z",
    });
    holder.to_string()
}

#[test]
fn a8_a_folder_in_use_is_refused_with_who_has_it() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    fs::write(run.join("run.lock"), lock_of("n12")).unwrap();
    let error = resumed(&run).unwrap_err();
    assert_eq!(error.exit_code(), 50);
    let who = "run folder in use by job 41 on host n12 since 2026-01-02T03:04:05Z (pid 7)";
    assert!(error.to_string().ends_with(who), "{error}");
    assert_eq!(
        fs::read_to_string(run.join("run.lock")).unwrap(),
        lock_of("n12"),
        "it stays another's"
    );
    train_in_threads(&six_steps(&run, &[]), &Resume::Never, 1).unwrap();
    assert!(root.path().join("run-2").is_dir(), "a new run has a folder of its own");
}

#[test]
fn a_lock_that_its_process_left_behind_is_taken_over_with_a_warning() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    let host = gethostname::gethostname().into_string().unwrap();
    fs::write(run.join("run.lock"), lock_of(&host)).unwrap();
    resumed(&run).unwrap();
    let expected = format!(
        "run.lock over from job 41 on host {host} since 2026-01-02T03:04:05Z (pid 7): process 7 is gone"
    );
    assert!(
        log(&run).lines().any(|line| line.contains("WARN") && line.contains(&expected)),
        "{}",
        log(&run)
    );
    assert!(!run.join("run.lock").exists());
}

#[test]
fn c17_the_third_start_that_leads_nowhere_is_refused_until_somebody_asks_for_the_run() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    // Each of these starts dies after step 5, before the next checkpoint.
    let die = || fs::remove_dir_all(run.join("step-00000006")).unwrap();
    for start in 1..=2 {
        die();
        let failure = r#"{ "code": 40, "name": "DATA", "rank": 1, "message": "cut since it was opened", "time": 7.0 }"#;
        fs::write(run.join("failure-1.json"), failure).unwrap();
        resumed(&run).unwrap();
        assert!(
            names(&run, "failure").is_empty()
                && run.join(format!("log/failure-1.start-{start}.json")).exists()
        );
    }
    die();
    fs::write(
        run.join("failure-0.json"),
        r#"{ "code": 30, "name": "STORAGE", "rank": 0, "message": "disk", "time": 9.0 }"#,
    )
    .unwrap();
    let error = resumed(&run).unwrap_err();
    assert_eq!((error.exit_code(), error.name()), (43, "NO_PROGRESS"));
    let expected = "2 starts in a row went on from step 5 and none saved a newer checkpoint; the last failure was STORAGE (code 30) on rank 0: disk";
    assert!(error.to_string().contains(expected), "{error}");
    train_in_threads(&six_steps(&run, &[]), &Resume::From(run.clone()), 1).unwrap();
    assert_eq!(names(&run, "step-"), ["step-00000005", "step-00000006"]);
    for _ in 0..3 {
        resumed(&run).expect("a run that has arrived may be asked again and again");
    }
}

#[test]
fn a_start_that_is_refused_counts_for_nothing() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    fs::remove_dir_all(run.join("step-00000006")).unwrap();
    for _ in 0..3 {
        let error =
            train_in_threads(&six_steps(&run, &["seed=7"]), &Resume::Latest, 1).unwrap_err();
        assert_eq!(error.exit_code(), 51, "{error}");
    }
    resumed(&run).unwrap();
}

#[test]
fn b13_other_data_are_refused_unless_they_are_wanted() {
    let root = TempDir::new().unwrap();
    let run = trained(&root);
    let newest = run.join("step-00000006/manifest.json");
    assert!(fs::read_to_string(&newest).unwrap().contains("\"data\": "));
    let other = other_dataset(&root);
    let config = six_steps(&run, &["max_steps=7", &format!("data.path={}", other.display())]);
    let resume = |data| {
        let allowed = AllowedChanges { data, batch: false };
        let options = TrainOptions { resume: Resume::Latest, allowed, ..TrainOptions::default() };
        train(&config, &options, &fm_dist::collective::Solo)
    };
    let error = resume(false).unwrap_err();
    assert_eq!(error.exit_code(), 51);
    assert!(
        error.to_string().contains("data fingerprint is ")
            && error.to_string().contains("--allow-data-change"),
        "{error}"
    );
    resume(true).unwrap();
    assert!(
        log(&run)
            .lines()
            .any(|line| line.contains("WARN") && line.contains("going on with other data")),
        "{}",
        log(&run)
    );
    assert_ne!(data_of(&run, 7), data_of(&run, 6));
}

fn data_of(run: &Path, step: u64) -> String {
    let manifest: serde_json::Value =
        serde_json::from_slice(&checkpoint(run, step)["manifest.json"]).unwrap();
    manifest["data"].as_str().unwrap().into()
}

/// The digits, though their description says that they are not.
fn other_dataset(root: &TempDir) -> PathBuf {
    let (digits, other) =
        (Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/digits"), root.path().join("other"));
    fs::create_dir(&other).unwrap();
    for name in ["digits.safetensors", "conditions.safetensors"] {
        fs::copy(digits.join(name), other.join(name)).unwrap();
    }
    let description = fs::read_to_string(digits.join("dataset.json")).unwrap();
    let hash =
        description.find("\"sha256\": \"").expect("hashes of the files") + "\"sha256\": \"".len();
    let changed =
        format!("{}{}{}", &description[..hash], "0".repeat(64), &description[hash + 64..]);
    fs::write(other.join("dataset.json"), changed).unwrap();
    other
}

#[test]
fn d14_pickles_are_refused_with_the_way_to_convert_them() {
    let root = TempDir::new().unwrap();
    let folder = root.path().join("weights");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("checkpoint.pt"), b"\x80\x02}q\x00.").unwrap();
    let output = format!("output_dir={}", root.path().join("run").display());
    let (file, folder) =
        (folder.join("checkpoint.pt").display().to_string(), folder.display().to_string());
    for path in [&file, &folder] {
        let mut arguments = with_sets(&["train"], &[&output]);
        arguments.extend(["--resume", path]);
        let (code, _, errors) = finish(program(&arguments));
        assert_eq!(code, 51, "{errors}");
        assert!(
            errors.contains("is a pickle") && errors.contains("safetensors.torch.save_file"),
            "{errors}"
        );
        // A model that is named by its folder has no table of its own.
        let config = root.path().join("config.toml");
        fs::write(&config, format!("[model]\npath = {path:?}\n")).unwrap();
        let (code, _, errors) = finish(program(&["train", "--config", config.to_str().unwrap()]));
        assert_eq!(code, 51, "{errors}");
        assert!(errors.contains("CKPT_MISMATCH") && errors.contains("is a pickle"), "{errors}");
    }
    assert!(!root.path().join("run").exists(), "nothing was written");
}

/// On a disk of its own, which is too small for a second checkpoint.
#[test]
fn d3_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before() {
    let root = TempDir::new().unwrap();
    let control = trained(&root);
    let bytes: usize = checkpoint(&control, 5).values().map(Vec::len).sum();
    let (small, kept) = (root.path().join("small"), root.path().join("kept"));
    let output = format!("output_dir={}", small.join("run").display());
    let sets = ["max_steps=6", "checkpoint.every_n_steps=5", &output];
    let keep = format!("cp -r {} {}", small.join("run").display(), kept.display());
    // Logs and metrics are told in warnings, if at all.
    let trains = program(&with_sets(&["train"], &sets));
    let (code, _, errors) = finish(on_a_small_disk(bytes * 3 / 2, &small, &trains, &keep));
    assert_had_disk(code, &errors);
    assert_eq!(code, 30, "{errors}");
    let said = errors
        .lines()
        .find(|line| line.contains("error STORAGE"))
        .unwrap_or_else(|| panic!("{errors}"));
    assert!(
        said.contains("No space left on device (os error 28); it needs ")
            && said.contains(" bytes, the disk has "),
        "{said}"
    );
    assert!(said.contains("/run/.step-00000006.tmp/"), "{said}");
    assert!(checkpoint(&kept, 5) == checkpoint(&control, 5), "intact");
    assert_eq!(names(&kept, ".step"), Vec::<String>::new(), "what was written in vain is gone");
}
