//! One side of `all_reduce.sh`: how long an all-reduce of f32 takes between the ranks of `mpirun`.
//!
//! `all_reduce BYTES REPEATS [LAUNCH]` prints one line of seconds, one number a repeat; `BYTES`
//! below 4096 are timed in batches, and over MPI beside its own all-reduce. `LAUNCH` is that of
//! `fm-dist train --launch`. Without any of these, as `cargo bench` starts it, without a launcher,
//! two threads of this process are the ranks.

use std::time::{Duration, Instant};

use fm_dist::collective::{self, Collective, Launch, ReduceOp, Threads};
use mpi::collective::{CommunicatorCollectives, SystemOperation};
use mpi::topology::SimpleCommunicator;
use tch::{Device, Kind, Tensor};

/// Operations timed as one where a single one takes microseconds.
const BATCH: usize = 1000;
const SMALL_BYTES: usize = 4096;
/// What threads reduce: a few buckets' worth, 10 times.
const BETWEEN_THREADS: (usize, usize) = (64_000_000, 10);

fn main() {
    let arguments: Vec<usize> =
        std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    match arguments[..] {
        [] => between_threads(),
        [bytes, repeats] => between_processes(bytes, repeats),
        _ => panic!("usage: all_reduce [BYTES REPEATS [LAUNCH]]"),
    }
}

fn between_threads() {
    let (bytes, repeats) = BETWEEN_THREADS;
    let seconds = Threads::run(2, |rank| {
        tch::set_num_threads(1);
        measured(rank, repeats, 1, all_reduce(rank, bytes))
    });
    println!(
        "seconds of an all-reduce of {bytes} bytes between 2 threads; tests/bench/all_reduce.sh measures processes"
    );
    println!("threads {}", texts(&seconds[0]));
}

fn between_processes(bytes: usize, repeats: usize) {
    let launch = std::env::args().nth(3).and_then(|text| text.parse().ok()).unwrap_or(Launch::Auto);
    tch::set_num_threads(1);
    let world = collective::connect(launch, Duration::from_secs(60))
        .expect("a launcher put this process among others");
    let batch = if bytes < SMALL_BYTES { BATCH } else { 1 };
    let ours = all_reduce(&*world, bytes);
    let seconds = measured(&*world, repeats, batch, ours);
    if world.rank() == 0 {
        println!("fm-dist {}", texts(&seconds));
    }
    if batch > 1 && launch != Launch::Tcp {
        let seconds = measured(&*world, repeats, batch, library_all_reduce(bytes));
        if world.rank() == 0 {
            println!("MPI_Allreduce {}", texts(&seconds));
        }
    }
    collective::finish(world).expect("a sound world");
}

fn all_reduce(world: &dyn Collective, bytes: usize) -> impl FnMut() + '_ {
    let buffer = Tensor::zeros([bytes as i64 / 4], (Kind::Float, Device::Cpu));
    move || {
        let work =
            world.all_reduce(vec![buffer.shallow_clone()], ReduceOp::Sum).expect("a sound call");
        work.wait().expect("sound peers");
    }
}

fn library_all_reduce(bytes: usize) -> impl FnMut() {
    let (sent, mut received) = (vec![0f32; bytes / 4], vec![0f32; bytes / 4]);
    move || {
        SimpleCommunicator::world().all_reduce_into(
            &sent[..],
            &mut received[..],
            SystemOperation::sum(),
        )
    }
}

/// Seconds of one operation in each repeat, from a moment when all ranks are ready; the first one
/// is a rehearsal.
fn measured(
    world: &dyn Collective,
    repeats: usize,
    batch: usize,
    mut operation: impl FnMut(),
) -> Vec<f64> {
    let mut repeat = || {
        world.barrier().expect("sound peers");
        let began = Instant::now();
        (0..batch).for_each(|_| operation());
        began.elapsed().as_secs_f64() / batch as f64
    };
    repeat();
    (0..repeats).map(|_| repeat()).collect()
}

fn texts(seconds: &[f64]) -> String {
    seconds.iter().map(|seconds| format!("{seconds:.9}")).collect::<Vec<_>>().join(" ")
}
