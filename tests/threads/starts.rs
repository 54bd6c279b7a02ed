//! Starts that are no plain resume: runs that are counted in epochs, another global batch, and
//! branches.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use fm_dist::collective::Threads;
use fm_dist::config::RunConfig;
use fm_dist::error::Error;
use fm_dist::optim::lr::LrScheduleChoice;
use fm_dist::run::Resume;
use fm_dist::run::checkpoint::AllowedChanges;
use fm_dist::settings::Family;
use fm_dist::train::{Ending, TrainOptions, train};
use tempfile::TempDir;

use super::resume::{self, said};
use crate::runs::{checkpoint, column, tiny, train_in_threads};

/// Four steps an epoch of the digits, and five samples left out.
const FOUR_STEPS: &str = "train.global_batch_size=448";
/// Eight steps an epoch.
const EIGHT_STEPS: &str = "train.global_batch_size=224";

fn config(folder: &Path, overrides: &[&str]) -> RunConfig {
    let output = format!("output_dir={}", folder.display());
    let all = ["data.micro_batch_size_per_gpu=56", "checkpoint.keep_last=9", output.as_str()];
    let lr_scheduler = LrScheduleChoice::named("constant").unwrap();
    RunConfig { lr_scheduler, ..tiny(&[&all, overrides].concat()) }
}

fn steps_saved(run: &Path) -> Vec<u64> {
    let names = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name());
    let step = |name: String| name.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = names.filter_map(|name| step(name.into_string().unwrap())).collect();
    steps.sort_unstable();
    steps
}

#[test]
fn a_run_of_epochs_ends_with_the_last_of_them_and_saves_where_epochs_end() {
    let root = TempDir::new().unwrap();
    let epochs = |name: &str, max_epochs: &str| {
        let overrides = [FOUR_STEPS, "max_steps=1", "checkpoint.every_n_epochs=2", max_epochs];
        config(&root.path().join(name), &overrides)
    };
    let unbroken =
        train_in_threads(&epochs("unbroken", "max_epochs=5"), &Resume::Never, 2).unwrap();
    assert_eq!(steps_saved(&unbroken), [8, 16, 20]);
    let of_steps: Vec<f64> =
        column(&unbroken, "epoch").into_iter().map(|(_, epoch)| epoch).collect();
    assert_eq!(of_steps, (0..20).map(|step| f64::from(step / 4)).collect::<Vec<_>>());

    let run = train_in_threads(&epochs("run", "max_epochs=3"), &Resume::Never, 2).unwrap();
    assert_eq!(steps_saved(&run), [8, 12]);
    train_in_threads(&epochs("run", "max_epochs=3"), &Resume::Latest, 1).unwrap();
    let told = said(&run, "nothing to do: step 12 of 12 is done in ");
    assert!(told.len() == 1 && told[0].contains("a larger max_epochs goes on"), "{told:?}");
    train_in_threads(&epochs("run", "max_epochs=5"), &Resume::Latest, 2).unwrap();
    assert!(checkpoint(&run, 20) == checkpoint(&unbroken, 20), "the unbroken run");
}

#[test]
fn another_global_batch_goes_on_after_the_samples_seen_if_it_is_wanted() {
    let root = TempDir::new().unwrap();
    let epochs = |batch: &str, max_epochs: &str| {
        let overrides = [batch, max_epochs, "checkpoint.every_n_steps=2"];
        config(&root.path().join("run"), &overrides)
    };
    let run = train_in_threads(&epochs(FOUR_STEPS, "max_epochs=1"), &Resume::Never, 2).unwrap();
    let changed = epochs(EIGHT_STEPS, "max_epochs=2");
    let resume = |batch: bool| -> Result<PathBuf, Error> {
        let allowed = AllowedChanges { data: false, batch };
        let options =
            || TrainOptions { resume: Resume::Latest, allowed, ..TrainOptions::default() };
        let ended =
            |world: &dyn fm_dist::collective::Collective| train(&changed, &options(), world);
        let mut folders = Threads::run(2, |world| ended(world).map(|(folder, _)| folder));
        folders.swap_remove(0)
    };
    let refused = resume(false).unwrap_err();
    assert_eq!(refused.exit_code(), 51);
    let told = "global batch is 224, the checkpoint's was 448 (--allow-batch-change goes on after";
    assert!(refused.to_string().contains(told), "{refused}");
    resume(true).unwrap();
    let told = "going on after the 1792 samples that were seen, as was asked";
    assert_eq!(said(&run, told).len(), 1);

    // Four steps of the first epoch, and eight of the second.
    let last = |name: &str| *column(&run, name).last().unwrap();
    assert_eq!(last("samples_seen"), (12.0, 2.0 * 1792.0));
    let epochs_of: Vec<f64> = column(&run, "epoch").into_iter().map(|(_, epoch)| epoch).collect();
    assert_eq!(epochs_of, [[0.0; 4].as_slice(), &[1.0; 8]].concat());

    let unbroken = checkpoint(&run, 12);
    for step in [10, 12] {
        fs::remove_dir_all(run.join(format!("step-{step:08}"))).unwrap();
    }
    train_in_threads(&changed, &Resume::Latest, 2).unwrap();
    assert!(checkpoint(&run, 12) == unbroken, "a resume after the change");
}

#[test]
fn a_branch_is_a_run_of_its_own_that_goes_on_as_the_other_one_did() {
    let root = TempDir::new().unwrap();
    let trunk = root.path().join("trunk");
    train_in_threads(&resume::config(&trunk, &[]), &Resume::Never, 2).unwrap();
    let before = [checkpoint(&trunk, 5), checkpoint(&trunk, 10)];
    let branch = |overrides: &[&str], from: PathBuf| {
        let config = resume::config(&root.path().join("branch"), overrides);
        train_in_threads(&config, &Resume::Branch(from), 2).unwrap()
    };
    let same = branch(&[], trunk.join("step-00000005"));
    assert!(checkpoint(&same, 10) == before[1], "a branch that changes nothing");
    assert_eq!(column(&same, "loss"), column(&trunk, "loss")[5..]);
    let told = format!("branches off {} at step 5", trunk.join("step-00000005").display());
    assert_eq!(said(&same, &told).len(), 1);
    assert_eq!(steps_saved(&same), [5, 10], "it can be resumed before its first own checkpoint");

    let other = branch(&["max_steps=12", "optimizer.adamw.lr=0.0001"], trunk.clone());
    assert!(other.ends_with("branch-2") && steps_saved(&other) == [10, 12]);
    assert_eq!(said(&other, "optimizer.adamw.lr: was").len(), 1);
    assert!(fs::read_to_string(other.join("config.toml")).unwrap().contains("max_steps = 12"));
    assert!([checkpoint(&trunk, 5), checkpoint(&trunk, 10)] == before, "nothing changed");

    let error = train_in_threads(
        &resume::config(&root.path().join("branch"), &[]),
        &Resume::Branch(root.path().join("nowhere")),
        1,
    );
    assert_eq!(error.unwrap_err().exit_code(), 44);
}

#[test]
fn a_branch_that_was_killed_at_its_begin_is_what_latest_goes_on_with() {
    let root = TempDir::new().unwrap();
    let trunk = root.path().join("trunk");
    let config = resume::config(&trunk, &[]);
    train_in_threads(&config, &Resume::Never, 1).unwrap();
    let from = Resume::Branch(trunk.join("step-00000005"));
    let branch = train_in_threads(&config, &from, 1).unwrap();
    let unbroken = checkpoint(&branch, 10);
    fs::remove_dir_all(branch.join("step-00000010")).unwrap();
    assert_eq!(train_in_threads(&config, &Resume::Latest, 1).unwrap(), branch);
    assert!(checkpoint(&branch, 10) == unbroken && branch.ends_with("trunk-2"));

    // A refused one leaves nothing that could be gone on with.
    let other = resume::config(&trunk, &["seed=1"]);
    let error = train_in_threads(&other, &from, 2).unwrap_err();
    assert_eq!(error.exit_code(), 51, "{error}");
    let refused = root.path().join("trunk-3");
    assert!(refused.exists() && steps_saved(&refused).is_empty());
    assert_eq!(train_in_threads(&config, &Resume::Latest, 1).unwrap(), branch);

    let short = resume::config(&root.path().join("short"), &["max_steps=5"]);
    let error = train_in_threads(&short, &from, 1).unwrap_err();
    assert!(error.to_string().contains("would have nothing to do"), "{error}");
    assert!(!root.path().join("short").exists());
}

#[test]
fn a_report_of_an_earlier_end_does_not_end_the_run_again() {
    let root = TempDir::new().unwrap();
    let run = root.path().join("run");
    train_in_threads(&resume::config(&run, &[]), &Resume::Never, 1).unwrap();
    assert!(run.join("report.html").exists());
    let longer = resume::config(&run, &["max_steps=12"]);
    let options = || TrainOptions {
        resume: Resume::Latest,
        stop_at: Some(Instant::now()),
        ..TrainOptions::default()
    };
    let ended = Threads::run(1, |world| train(&longer, &options(), world).unwrap().1);
    assert_eq!(ended, [Ending::Stopped]);
    assert!(steps_saved(&run).contains(&11) && !run.join("report.html").exists());
    train_in_threads(&longer, &Resume::Latest, 1).unwrap();
    assert!(run.join("report.html").exists());
}
