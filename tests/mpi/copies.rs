//! Frozen parameters that wait in host memory come to a GPU beside computation, by the rules of the
//! CUDA driver: its double (`tests/nccl_double`) ends a process with code 97 for each one broken.

use std::process::Command;

use fm_dist::parallel::Copies;
use tch::{Device, Kind, Tensor};

use crate::double::{double, with_libraries};
use crate::worlds::{Outcome, run};

fn doubled(program: &str) -> Outcome {
    run(with_libraries(Command::new(std::env::current_exe().unwrap()), double()), program)
}

#[test]
fn copies_run_beside_computation_and_arrive_whole() {
    let Outcome { code, output, .. } = doubled("mpi::copies::process_that_copies");
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("8 of 8 arrived"), "{output}");
}

pub fn process_that_copies() {
    let copies = Copies::beside(0);
    let stages = [1, 1000, 100_000, 1 << 20, 7, 64, 2, 12_345].map(|length| {
        let (mut host, memory) = copies.zeros(length, Kind::BFloat16);
        assert!(memory.is_some(), "pinned");
        host.copy_(&Tensor::arange(length, (Kind::Float, Device::Cpu)).remainder(251.0));
        (host, memory)
    });
    // As stages use them: the next one is on its way while this one computes.
    let mut next = None;
    let mut arrived = 0;
    for round in 0..=stages.len() {
        let start = |(host, _): &(Tensor, _)| copies.start(host, Device::Cpu).unwrap();
        let current = std::mem::replace(&mut next, stages.get(round).map(start));
        if let Some(current) = current {
            arrived += i64::from(current.wait().unwrap().equal(&stages[round - 1].0));
        }
    }
    println!("{arrived} of {} arrived", stages.len());
}

#[test]
fn a_copy_that_nobody_waited_for_is_over_before_its_memory_is_used_again() {
    let Outcome { code, output, .. } = doubled("mpi::copies::process_that_lets_a_copy_go");
    assert_eq!(code, Some(0), "{output}");
}

pub fn process_that_lets_a_copy_go() {
    let copies = Copies::beside(0);
    let (host, _memory) = copies.zeros(1 << 16, Kind::Float);
    drop(copies.start(&host, Device::Cpu).unwrap());
    drop(host);
}

#[test]
fn the_double_notices_memory_that_would_keep_the_host_waiting() {
    let Outcome { code, output, .. } = doubled("mpi::copies::process_that_copies_from_anywhere");
    assert_eq!(code, Some(97), "{output}");
    assert!(output.contains("memory that is not pinned"), "{output}");
}

pub fn process_that_copies_from_anywhere() {
    let host = Tensor::ones([100], (Kind::Float, Device::Cpu));
    drop(Copies::beside(0).start(&host, Device::Cpu));
}
