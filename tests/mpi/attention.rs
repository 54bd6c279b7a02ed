//! Ranks that find different backends sound choose alike, and a trial's process is no rank.

use std::process::Command;

use fm_dist::attention::{Case, NodeReport, Precision, common};
use fm_dist::collective::{self, without_launcher};

use crate::program::attention::trial;
use crate::worlds::{Outcome, end_with, join_the_world, run, world_of};

const CASE: Case = Case {
    precision: Precision::Bfloat16,
    heads: 2,
    width: 16,
    queries: 64,
    keys: 64,
    masked: false,
};

#[test]
fn a_backend_that_is_unsound_on_one_node_is_left_out_on_all() {
    let Outcome { code, output, .. } = run(world_of(2), "mpi::attention::rank_that_tries");
    assert_eq!(code, Some(0), "{output}");
    for rank in 0..2 {
        assert!(output.contains(&format!("rank {rank} computes by Plain")), "{output}");
        let warned =
            format!("rank {rank} was warned: attention by flash (libtorch 2.13.0) is left");
        let line = output.lines().find(|line| line.contains(&warned));
        assert!(line.is_some_and(|line| line.contains(": ended by SIGSEGV")), "{output}");
    }
}

/// Each rank stands for a node of its own; a fault strikes the fused backend on rank 1 alone.
pub fn rank_that_tries() {
    let world = join_the_world();
    let own = std::env::var("OMPI_COMM_WORLD_SIZE").expect("mpirun started this rank");
    assert_eq!(own, "2");
    let child = without_launcher(&mut Command::new("env")).output().expect("env");
    let variables = String::from_utf8(child.stdout).expect("text");
    assert!(variables.contains("PATH="), "{variables}");
    for launcher in ["OMPI_", "PMIX_"] {
        let left = variables.lines().find(|line| line.starts_with(launcher));
        assert_eq!(left, None, "rank {}", world.rank());
    }
    let trial = trial(Some("segv@1:1:attention"));
    let report = match trial.run(&[CASE]) {
        Ok(findings) => NodeReport::new(&trial.machine, &findings.tried),
        Err(why) => panic!("{why}"),
    };
    let decision = common(Some(&report), &*world).unwrap_or_else(|error| end_with(&error));
    println!("rank {} computes by {:?}", world.rank(), decision.choice.unmasked);
    for warning in &decision.warnings {
        println!("rank {} was warned: {warning}", world.rank());
    }
    collective::finish(world).unwrap_or_else(|error| end_with(&error));
}
