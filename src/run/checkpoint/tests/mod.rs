//! Checkpoints stay sound whatever fails while they are written, read or deleted.

mod failing_disk;
mod keeping_best;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::collective::{Collective, Solo, Threads};
use crate::config::{CheckpointSettings, OnFailure, RunConfig};
use crate::files::disk::tests::on_a_disk_that_fails_after;
use crate::files::disk::{Disk, FileOperation};
use crate::model::{Architecture, Dit};
use crate::optim::{EmaSettings, OptimizerChoice};
use crate::parallel::{Devices, Replica, Sharding, ShardingGroup, Sharing};
use crate::phase::Phase;
use crate::rng::{Key, Purpose};
use crate::run::folder::RunFolder;
use crate::run::length::Length;
use crate::run::optimizer_state::{Averages, OptimizerState};
use crate::run::resume::Resume;

const SHARDINGS: [Sharding; 4] =
    [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];

fn manifest() -> Manifest {
    Manifest {
        step: 7,
        lr: Some(0.1),
        averages_began: Some(3),
        ..Manifest::new(&config(), 8, "these data".into())
    }
}

/// With averages of the weights.
fn config() -> RunConfig {
    let ema = EmaSettings { decay: Some(0.9), ..EmaSettings::default() };
    RunConfig { ema, ..RunConfig::default() }
}

fn optimizer() -> OptimizerChoice {
    OptimizerChoice::default()
}

fn small() -> Dit {
    Dit { width: 24, depth: 1, num_heads: 2, ..Dit::default() }
}

fn empty(world: &dyn Collective, sharding: Sharding) -> (Replica<'_>, OptimizerState) {
    empty_of(&small(), world, sharding)
}

fn empty_of<'c>(
    model: &Dit,
    world: &'c dyn Collective,
    sharding: Sharding,
) -> (Replica<'c>, OptimizerState) {
    let stages = model.stages().expect("sound");
    let sharing = Sharing::new(world, sharding, ShardingGroup::World, 1).expect("sound");
    let replica = Replica::shared(stages, Kind::BFloat16, Devices::one(Device::Cpu), None, sharing);
    let state =
        OptimizerState::fresh(&replica, &config(), Devices::one(Device::Cpu)).expect("a CPU");
    (replica, state)
}

/// Values of a stage's parameters (0), optimizer tensors (1, 2) and averages (3) in an invented
/// state.
fn number(stage: usize, tensor: u64, numel: i64) -> Tensor {
    let key = Key::new(5, Purpose::Test).step(tensor).scope(stage as u64);
    key.seeded(|| Tensor::randn([numel], (Kind::Float, Device::Cpu)))
}

fn save_on(model: &Dit, world: &dyn Collective, sharding: Sharding, output: &str) -> PathBuf {
    let (mut replica, mut state) = empty_of(model, world, sharding);
    for (stage, bucket) in replica.buckets.iter_mut().enumerate() {
        let numel = replica.stages[stage].params().numel();
        bucket.set(&number(stage, 0, numel));
        (0..2).for_each(|name| {
            state.set(stage, name, &number(stage, 1 + name as u64, numel), bucket)
        });
        averages(&mut state).set(stage, &number(stage, 3, numel), bucket);
    }
    let folder = RunFolder::open(
        &RunConfig { output_dir: output.into(), ..config() },
        &Resume::Never,
        Length::Steps(1000),
        world,
    )
    .expect("a fresh folder");
    let saved = Saved {
        manifest: &manifest(),
        judged: None,
        replica: &replica,
        optimizer: &*optimizer(),
        state: &state,
    };
    let mut saver = Saver::new(folder.path().into(), CheckpointSettings::default());
    saver.begin(&saved, world).and_then(|()| saver.finish(world)).expect("no rank fails");
    folder.path().join(folder_name(7))
}

fn check_on(model: &Dit, world: &dyn Collective, sharding: Sharding, folder: &Path) {
    let (mut replica, mut state) = empty_of(model, world, sharding);
    let loaded = load(
        folder,
        &config(),
        &manifest(),
        AllowedChanges::default(),
        &mut replica,
        &*optimizer(),
        &mut state,
    )
    .expect("a checkpoint");
    assert_eq!(loaded, manifest());
    for stage in 0..replica.stages.len() {
        let numel = replica.stages[stage].params().numel();
        assert!(
            replica.parameters(stage).expect("no rank fails").equal(&number(stage, 0, numel)),
            "{sharding:?} stage {stage}"
        );
        for name in 0..2 {
            let whole = state.whole(stage, name, &replica).expect("no rank fails");
            assert!(
                whole.equal(&number(stage, 1 + name as u64, numel)),
                "{sharding:?} stage {stage}, optimizer tensor {name}"
            );
        }
        let averages = averages(&mut state);
        let whole = averages.whole(stage, &replica).expect("no rank fails");
        assert!(whole.equal(&number(stage, 3, numel)), "{sharding:?} stage {stage}, averages");
        assert_eq!(averages.began, 3);
    }
}

fn averages(state: &mut OptimizerState) -> &mut Averages {
    state.averages.as_mut().expect("the configuration has [ema]")
}

#[test]
fn d12_a_checkpoint_of_any_sharding_and_world_size_loads_into_any_other() {
    let root = tempfile::tempdir().expect("a folder");
    let mut bytes = Vec::new();
    for (ranks, sharding) in (1..=4).flat_map(|ranks| SHARDINGS.map(|sharding| (ranks, sharding))) {
        let output = root.path().join(format!("{ranks}-{}", sharding as u8)).display().to_string();
        let folder =
            Threads::run(ranks, |world| save_on(&small(), world, sharding, &output)).swap_remove(0);
        let files: Vec<Vec<u8>> = verify(&folder)
            .expect("a committed checkpoint")
            .parts
            .iter()
            .map(|part| fs::read(folder.join(&part.file)).expect("a part"))
            .collect();
        bytes.push(files);
        for (ranks, sharding) in
            (1..=4).flat_map(|ranks| SHARDINGS.map(|sharding| (ranks, sharding)))
        {
            Threads::run(ranks, |world| check_on(&small(), world, sharding, &folder));
        }
    }
    assert!(bytes.iter().all(|files| *files == bytes[0]), "equal state gives equal bytes");
}

#[test]
fn a_model_of_several_parts_comes_back_whole() {
    // A block is 19 MB in f32: two exceed the maximum of a part.
    let large = Dit { width: 512, depth: 3, num_heads: 8, ..Dit::default() };
    let root = tempfile::tempdir().expect("a folder");
    let output = root.path().join("run").display().to_string();
    let folder = Threads::run(2, |world| save_on(&large, world, Sharding::Optimizer, &output))
        .swap_remove(0);
    let files: Vec<String> = verify(&folder)
        .expect("a committed checkpoint")
        .parts
        .into_iter()
        .map(|part| part.file)
        .collect();
    let named = |word: &'static str| {
        (1..=3).map(move |part| format!("{word}-0000{part}-of-00003.safetensors"))
    };
    let expected = named("ema").chain(named("model")).chain(named("optimizer"));
    assert_eq!(files, expected.collect::<Vec<_>>());
    Threads::run(3, |world| check_on(&large, world, Sharding::Parameters, &folder));
}

/// Calls `act` with a one-rank state whose numbers all follow from `step`.
fn with_state<T>(step: u64, act: impl FnOnce(&Saved<'_>) -> T) -> T {
    let (mut replica, mut state) = empty(&Solo, Sharding::None);
    fill(&mut replica, &mut state, step);
    let manifest = Manifest { step, ..manifest() };
    act(&Saved {
        manifest: &manifest,
        judged: None,
        replica: &replica,
        optimizer: &*optimizer(),
        state: &state,
    })
}

fn fill(replica: &mut Replica<'_>, state: &mut OptimizerState, step: u64) {
    for (stage, bucket) in replica.buckets.iter_mut().enumerate() {
        let numel = replica.stages[stage].params().numel();
        bucket.set(&(number(stage, 0, numel) + step as f64));
        (0..2).for_each(|name| {
            state.set(stage, name, &(number(stage, 1 + name as u64, numel) + step as f64), bucket)
        });
        averages(state).set(stage, &(number(stage, 3, numel) + step as f64), bucket);
    }
}

/// Runs a whole save on this thread, in the order of [`Saver`].
fn save_here(run: &Path, step: u64) -> Result<()> {
    save_judged(run, step, None)
}

fn save_judged(run: &Path, step: u64, judged: Option<&Judged>) -> Result<()> {
    save_by(&CheckpointSettings::default(), run, step, judged)
}

fn save_by(
    settings: &CheckpointSettings,
    run: &Path,
    step: u64,
    judged: Option<&Judged>,
) -> Result<()> {
    let copies = with_state(step, |saved| saved.copy(&Solo)).expect("alone");
    commit::prepare(run, step)?;
    let (staged, disk) = (commit::staged(run, step), Disk::saving(step, Phase::Write));
    let parts = copies.into_iter().map(|copy| copy.write(&staged, disk)).collect::<Result<_>>()?;
    commit::commit(run, &Manifest { step, ..manifest() }, settings, judged, parts)
}

fn sound_steps(run: &Path) -> Vec<u64> {
    let found = list(run).expect("a run folder");
    found
        .into_iter()
        .map(|(step, path)| verify(&path).map(|_| step).expect("what is listed is whole"))
        .collect()
}

#[test]
fn what_an_earlier_start_kept_for_ever_stays_whatever_a_later_one_says() {
    let root = tempfile::tempdir().expect("a folder");
    let run = root.path();
    let keeping = CheckpointSettings { keep_every: Some(3), ..CheckpointSettings::default() };
    for step in 1..=7 {
        let settings = if step < 5 { &keeping } else { &CheckpointSettings::default() };
        save_by(settings, run, step, None)
            .and_then(|()| commit::prune(run, step, settings, None))
            .expect("a sound disk");
    }
    assert_eq!(sound_steps(run), [3, 6, 7], "6 is one of the newest two");
    fs::remove_file(run.join("step-00000003/keep")).expect("it is there");
    commit::prune(run, 7, &CheckpointSettings::default(), None).expect("a sound disk");
    assert_eq!(sound_steps(run), [6, 7]);
}

#[test]
fn d15_whoever_reads_while_checkpoints_come_and_go_finds_whole_ones() {
    let root = tempfile::tempdir().expect("a folder");
    let run = root.path().to_path_buf();
    save_here(&run, 1).expect("a sound disk");
    let (over, read) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (is_over, has_read, its_run) = (Arc::clone(&over), Arc::clone(&read), run.clone());
    let reader = thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            let (_, newest) =
                list(&its_run).expect("a run folder").pop().expect("there is always one");
            match verify(&newest) {
                Ok(_) => drop(has_read.fetch_add(1, Ordering::Relaxed)),
                Err(unfit) => assert!(!newest.exists(), "{unfit:?} of a checkpoint that stands"),
            }
        }
    });
    let settings = CheckpointSettings { keep_last: 1, ..CheckpointSettings::default() };
    // On a busy machine the reader may start late.
    for step in (2..).take_while(|step| {
        *step < 40 || (read.load(Ordering::Relaxed) < 10 && !reader.is_finished())
    }) {
        save_here(&run, step)
            .and_then(|()| commit::prune(&run, step, &settings, None))
            .expect("a sound disk");
    }
    over.store(true, Ordering::Relaxed);
    reader.join().expect("no half checkpoint");
}

#[test]
fn a_copy_shares_nothing_with_what_goes_on_training() {
    for sharding in SHARDINGS {
        let root = tempfile::tempdir().expect("a folder");
        let run = root.path().to_path_buf();
        save_here(&run, 5).expect("a sound disk");
        Threads::run(2, |world| {
            let (mut replica, mut state) = empty(world, sharding);
            fill(&mut replica, &mut state, 5);
            let manifest = Manifest { step: 5, ..manifest() };
            let copies = Saved {
                manifest: &manifest,
                judged: None,
                replica: &replica,
                optimizer: &*optimizer(),
                state: &state,
            }
            .copy(world);
            // Training changes the state before anything is written.
            fill(&mut replica, &mut state, 6);
            let rank = world.rank().to_string();
            fs::create_dir(run.join(&rank)).expect("a folder");
            for copy in copies.expect("no rank fails") {
                let part = copy
                    .write(&run.join(&rank), Disk::saving(5, Phase::Write))
                    .expect("a sound disk");
                let [now, expected] = [run.join(&rank), run.join(folder_name(5))]
                    .map(|folder| fs::read(folder.join(&part.file)));
                assert!(
                    now.expect("a part") == expected.expect("a part"),
                    "{sharding:?} {}",
                    part.file
                );
            }
        });
    }
}

/// Returns each of two ranks' results of two saves and of the end, where the second rank cannot
/// write the first save.
fn with_a_rank_that_cannot_write(on_failure: OnFailure) -> (Vec<u64>, Vec<[String; 3]>) {
    let root = tempfile::tempdir().expect("a folder");
    let run = root.path().join("run");
    fs::create_dir(&run).expect("a folder");
    let outcomes = Threads::run(2, |world| {
        // Another path to the same folder, which does not exist at first.
        let elsewhere = run.with_file_name("elsewhere");
        let own = if world.rank() == 1 { &elsewhere } else { &run };
        let settings =
            CheckpointSettings { on_failure, asynchronous: false, ..CheckpointSettings::default() };
        let mut saver = Saver::new(own.clone(), settings);
        let (mut replica, mut state) = empty(world, Sharding::Optimizer);
        fill(&mut replica, &mut state, 5);
        let told = |outcome: Result<()>| {
            outcome.map_or_else(|error| error.to_string(), |()| "fine".into())
        };
        let mut save = |step| {
            let manifest = Manifest { step, ..manifest() };
            let (replica, optimizer, state) = (&replica, &*optimizer(), &state);
            told(saver.begin(
                &Saved { manifest: &manifest, judged: None, replica, optimizer, state },
                world,
            ))
        };
        let first = save(5);
        if world.rank() == 1 {
            std::os::unix::fs::symlink(&run, &elsewhere).expect("a link");
        }
        world.barrier().expect("both are here");
        [first, save(10), told(saver.finish(world))]
    });
    (sound_steps(&run), outcomes)
}

#[test]
fn d5_one_rank_that_cannot_write_keeps_all_from_committing_and_all_know_why() {
    let (steps, outcomes) = with_a_rank_that_cannot_write(OnFailure::Stop);
    assert_eq!(steps, [10], "nothing of step 5");
    let cause = "elsewhere/.step-00000005.tmp/model-00001-of-00001.safetensors: No such file or directory (os error 2)";
    assert!(
        outcomes[1][0].starts_with("cannot create ") && outcomes[1][0].ends_with(cause),
        "{outcomes:?}"
    );
    assert!(
        outcomes[0][0].starts_with("rank 1 failed: cannot create ")
            && outcomes[0][0].ends_with(cause),
        "{outcomes:?}"
    );
}

#[test]
fn where_a_run_goes_on_the_next_save_tries_again() {
    let (steps, outcomes) = with_a_rank_that_cannot_write(OnFailure::Continue);
    assert_eq!(steps, [10]);
    let fine = ["fine"; 3].map(String::from);
    assert_eq!(outcomes, [fine.clone(), fine]);
}

#[test]
fn the_last_save_of_a_run_is_never_given_up_in_silence() {
    let settings =
        CheckpointSettings { on_failure: OnFailure::Continue, ..CheckpointSettings::default() };
    let root = tempfile::tempdir().expect("a folder");
    let mut saver = Saver::new(root.path().join("missing"), settings);
    with_state(5, |saved| saver.begin(saved, &Solo)).expect("the run goes on");
    assert_eq!(saver.finish(&Solo).expect_err("but it does not end well").exit_code(), 30);
}

#[test]
fn one_save_is_in_flight_at_a_time_and_moves_on_with_the_steps() {
    let root = tempfile::tempdir().expect("a folder");
    let run = root.path();
    let mut saver = Saver::new(
        run.into(),
        CheckpointSettings { keep_last: 1, ..CheckpointSettings::default() },
    );
    assert_eq!(saver.advance(&[0], &Solo).expect("alone"), None);
    for step in [5, 6] {
        with_state(step, |saved| saver.begin(saved, &Solo)).expect("a sound disk");
        assert_eq!(
            sound_steps(run),
            if step == 5 { vec![] } else { vec![5] },
            "an earlier save comes to its end first"
        );
    }
    assert_eq!(saver.advance(&[1, 0], &Solo).expect("alone"), None, "another rank is not done");
    let committed =
        std::iter::repeat_with(|| saver.advance(&[saver.progress()], &Solo).expect("a sound disk"))
            .find_map(|path| path);
    assert_eq!(committed, Some(run.join(folder_name(6))));
    assert_eq!((sound_steps(run), saver.progress()), (vec![6], 0));
}
