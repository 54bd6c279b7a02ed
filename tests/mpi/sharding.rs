//! Processes shard as threads do.

use tempfile::TempDir;

use crate::runs::{checkpoint, finish, mpirun, program, with_sets};
use crate::threads::sharding::{SHARDINGS, train_each};

#[test]
fn programs_under_mpirun_shard_as_threads_do() {
    let root = TempDir::new().unwrap();
    for ranks in [2, 4] {
        let batch = format!("train.global_batch_size={}", 8 * ranks);
        let [expected, ..] = train_each(root.path(), ranks, 1, &[]).map(|run| checkpoint(&run, 10));
        for (word, settings) in SHARDINGS {
            let folder = root.path().join(format!("mpi-{ranks}-{word}"));
            let output = format!("output_dir={}", folder.display());
            let overrides = [&["max_steps=10", batch.as_str(), output.as_str()], settings].concat();
            let (code, _, errors) = finish(mpirun(ranks, &with_sets(&["train"], &overrides)));
            assert_eq!(code, 0, "{errors}");
            assert!(checkpoint(&folder, 10) == expected, "{word} on {ranks} ranks");
        }
    }
}

#[test]
fn sharding_for_one_rank_says_that_it_has_no_effect() {
    let root = TempDir::new().unwrap();
    let output = format!("output_dir={}", root.path().join("alone").display());
    let arguments = with_sets(&["train"], &["max_steps=1", "parallel.sharding=optimizer", &output]);
    let (code, _, errors) = finish(program(&arguments));
    assert_eq!(code, 0, "{errors}");
    assert!(
        errors.contains("sharding = \"optimizer\" has no effect: no other rank to share with"),
        "{errors}"
    );
}
