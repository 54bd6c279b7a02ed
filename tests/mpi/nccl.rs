//! NCCL keeps the contract of the collectives and gives up in time; the real library answers.
//!
//! Without a GPU the backend runs against a double of NCCL and of the CUDA driver, which moves the
//! host's memory between the ranks of `mpirun` and ends a rank with code 97 for each rule of both
//! libraries that is broken.

use std::path::Path;
use std::process::Command;

use fm_dist::collective::{
    self, Collective, Limits, Nccl, ReduceOp, Solo, Work, nccl_library_version,
};
use fm_dist::error::Result;
use tch::{Device, Kind, Tensor};

use crate::contract::{brought, contract, expected, sliced};
use crate::double::{double, project, with_libraries};
use crate::runs::{checkpoint, column, finish, mpirun, with_sets};
use crate::worlds::{Outcome, end_with, join_the_world, run, world_of};

/// A world of ranks that find the double, told by its switches what to do.
pub fn doubled(ranks: usize, switches: &[(&str, &str)], program: &str) -> Outcome {
    let mut command = with_libraries(world_of(ranks), double());
    command.envs(switches.iter().copied());
    run(command, program)
}

/// The world of `mpirun`, and NCCL on top of it. Warnings of the library are printed.
pub fn join_by_nccl(limits: Limits) -> (Box<dyn Collective>, Nccl) {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::WARN)
        .without_time()
        .with_ansi(false)
        .init();
    let control = join_the_world();
    let nccl =
        Nccl::connect(&*control, Device::Cpu, limits).unwrap_or_else(|error| end_with(&error));
    (control, nccl)
}

/// Takes leave of NCCL, then of MPI: the double looks at what is left when the process ends.
pub fn leave((control, nccl): (Box<dyn Collective>, Nccl)) {
    drop(nccl);
    collective::finish(control).unwrap_or_else(|error| end_with(&error));
}

fn succeeds(outcome: &Outcome, ranks: usize, said: &str) {
    assert_eq!(outcome.code, Some(0), "{}", outcome.output);
    assert!(!outcome.output.contains("WARN"), "{}", outcome.output);
    for rank in 0..ranks {
        assert!(
            outcome.output.contains(&format!("rank {rank} of {ranks} {said}")),
            "{}",
            outcome.output
        );
    }
}

#[test]
fn the_nccl_of_the_wheel_is_opened_and_answers() {
    let folder = project(".deps/nvidia/nccl/lib");
    assert!(
        folder.join("libnccl.so").exists(),
        "there is no libnccl.so in {}: run launch/setup.sh",
        folder.display()
    );
    let command = with_libraries(Command::new(std::env::current_exe().unwrap()), &folder);
    let Outcome { code, output, .. } = run(command, "mpi::nccl::process_with_the_real_nccl");
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("the real NCCL answers"), "{output}");
}

#[allow(unsafe_code)]
pub fn process_with_the_real_nccl() {
    use cudarc::nccl::{result, sys};
    let version = nccl_library_version().unwrap();
    let pinned = format!("nvidia-nccl-cu13=={version} ");
    assert!(
        include_str!("../../launch/requirements/cuda.txt").contains(&pinned),
        "{version} is not the version that is pinned"
    );
    let ids = [result::get_uniqueid(), result::get_uniqueid()]
        .map(|id| id.map_err(|error| error.0).unwrap());
    assert_eq!(ids[0].internal.len(), 128);
    assert_ne!(ids[0], ids[1]);
    // SAFETY: NCCL keeps these texts for the life of the process, and ends them with a zero.
    let words =
        |code| unsafe { std::ffi::CStr::from_ptr(sys::ncclGetErrorString(code)) }.to_string_lossy();
    assert_eq!(words(sys::ncclResult_t::ncclSuccess), "no error");
    assert!(words(sys::ncclResult_t::ncclInvalidUsage).starts_with("invalid usage"));
    assert!(words(sys::ncclResult_t::ncclRemoteError).starts_with("remote process exited"));
    println!("the real NCCL answers");
}

#[test]
fn a_machine_without_the_libraries_is_told_what_was_looked_for() {
    let has_driver = Path::new("/proc/driver/nvidia/version").exists();
    match Nccl::connect(&Solo, Device::Cpu, Limits::default()) {
        Ok(world) => assert!(has_driver, "a world of {} without a driver", world.world_size()),
        Err(error) => {
            assert_eq!(error.exit_code(), 52);
            assert!(
                has_driver
                    || error.to_string().contains("found neither libcuda.so nor libcuda.so.1"),
                "{error}"
            );
        }
    }
    match nccl_library_version() {
        Ok(version) => assert_eq!(
            version.split('.').filter(|part| part.parse::<u32>().is_ok()).count(),
            3,
            "{version}"
        ),
        Err(error) => {
            assert_eq!(error.exit_code(), 52);
            assert!(
                error.to_string().contains("looked for libnccl.so in LD_LIBRARY_PATH"),
                "{error}"
            );
        }
    }
}

#[test]
fn a_rank_keeps_to_the_gpu_of_its_place() {
    let error =
        Nccl::connect(&Solo, Device::Cuda(3), Limits::default()).err().expect("rank 0 has GPU 0");
    assert_eq!(error.exit_code(), 52);
    assert_eq!(
        error.to_string(),
        "rank 0 is number 0 of its host and was given Cuda(3), not GPU 0"
    );
}

#[test]
fn worlds_of_nccl_keep_the_contract() {
    for ranks in [1, 2, 4] {
        succeeds(
            &doubled(ranks, &[], "mpi::nccl::rank_of_the_contract"),
            ranks,
            "kept the contract",
        );
    }
}

#[test]
fn the_contract_holds_however_slow_and_disordered_the_streams_are() {
    for seed in ["1", "2"] {
        let switches = [("NCCL_DOUBLE_DELAY_MS", "1"), ("NCCL_DOUBLE_SHUFFLE", seed)];
        succeeds(&doubled(2, &switches, "mpi::nccl::rank_of_many_works"), 2, "saw all works end");
    }
}

pub fn rank_of_the_contract() {
    let world = join_by_nccl(Limits::default());
    let nccl = &world.1;
    contract(nccl)
        .and_then(|()| several_at_once(nccl))
        .and_then(|()| worlds_within(nccl))
        .unwrap_or_else(|error| end_with(&error));
    println!("rank {} of {} kept the contract", nccl.rank(), nccl.world_size());
    leave(world);
}

#[test]
fn training_over_nccl_gives_the_bits_of_mpi() {
    let root = tempfile::TempDir::new().unwrap();
    let cases: [(usize, &[&str]); 5] = [
        (2, &[]),
        (2, &["parallel.sharding=parameters", "parallel.recompute=always"]),
        (
            2,
            &[
                "parallel.sharding=optimizer",
                "model.dtype=bfloat16",
                "parallel.reduce_dtype=bfloat16",
            ],
        ),
        (4, &["parallel.sharding=gradients"]),
        (4, &["parallel.deterministic=true", "parallel.seed_scope=sample"]),
    ];
    for (case, (ranks, settings)) in cases.into_iter().enumerate() {
        let trained = |backend: &str| {
            let folder = root.path().join(format!("{backend}-{case}"));
            let (output, backend) =
                (format!("output_dir={}", folder.display()), format!("parallel.backend={backend}"));
            let overrides =
                [&["max_steps=5", output.as_str(), backend.as_str()], settings].concat();
            let command =
                with_libraries(mpirun(ranks, &with_sets(&["train"], &overrides)), double());
            let (code, _, errors) = finish(command);
            assert_eq!(code, 0, "{errors}");
            assert!(!errors.contains("double: "), "{errors}");
            (checkpoint(&folder, 5), column(&folder, "communication_seconds"))
        };
        let ((by_mpi, _), (by_nccl, seconds)) = (trained("mpi"), trained("nccl"));
        assert!(by_mpi == by_nccl, "{ranks} ranks, {settings:?}");
        assert!(seconds.iter().any(|(_, seconds)| *seconds > 0.0), "{seconds:?}");
    }
}

/// Tensors of several kinds in one operation, among them bf16 and an empty one.
fn several_at_once(world: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (world.rank(), world.world_size());
    let forms = [
        (5, Kind::BFloat16),
        (0, Kind::Float),
        (1000, Kind::Float),
        (3, Kind::Double),
        (7, Kind::Int64),
    ];
    let of_all = |size: i64, kind: Kind| {
        expected(world_size, size, Kind::Int64, ReduceOp::Sum).to_kind(kind)
    };
    let buffers = forms.map(|(size, kind)| brought(rank, size, kind));
    world.all_reduce(buffers.iter().map(Tensor::shallow_clone).collect(), ReduceOp::Sum)?.wait()?;
    for ((size, kind), buffer) in forms.into_iter().zip(&buffers) {
        assert!(buffer.equal(&of_all(size, kind)), "all_reduce of {size} {kind:?} among others");
    }
    let fulls = forms.map(|(size, kind)| brought(rank, size * world_size as i64, kind));
    // Every other slice is a view of its whole, in this rank's place or in another's.
    let place = |index: usize| if index < 2 { rank } else { 0 } as i64;
    let owned: Vec<Tensor> = (0..forms.len())
        .map(|index| match index % 2 {
            0 => fulls[index].narrow(0, place(index) * forms[index].0, forms[index].0),
            _ => Tensor::zeros([forms[index].0], (forms[index].1, Device::Cpu)),
        })
        .collect();
    let all = || owned.iter().zip(&fulls).map(|(owned, full)| sliced(owned, full)).collect();
    world.reduce_scatter(all(), ReduceOp::Sum)?.wait()?;
    for ((size, kind), owned) in forms.into_iter().zip(&owned) {
        let mine = of_all(size * world_size as i64, kind).narrow(0, rank as i64 * size, size);
        assert!(owned.equal(&mine), "reduce_scatter of {size} {kind:?} among others");
    }
    world.all_gather(all())?.wait()?;
    for ((size, kind), full) in forms.into_iter().zip(&fulls) {
        assert!(
            full.equal(&of_all(size * world_size as i64, kind)),
            "all_gather of {size} {kind:?} among others"
        );
    }
    let spent = world.spent();
    assert!(spent.communication_seconds > 0.0 && spent.exposed_seconds >= 0.0, "{spent:?}");
    Ok(())
}

/// Neighbours and those of equal parity, each in a world of their own, used in turns with the
/// whole.
fn worlds_within(world: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (world.rank(), world.world_size());
    let (near, far) = (world.split(rank / 2)?, world.split(rank % 2)?);
    let near_ranks: Vec<usize> = (0..world_size).filter(|other| other / 2 == rank / 2).collect();
    let far_ranks: Vec<usize> = (0..world_size).filter(|other| other % 2 == rank % 2).collect();
    assert_eq!((near.world_size(), far.world_size()), (near_ranks.len(), far_ranks.len()));
    let sum = |ranks: &[usize]| {
        ranks.iter().map(|rank| brought(*rank, 1000, Kind::Float)).sum::<Tensor>()
    };
    for _ in 0..3 {
        let buffers = [0; 3].map(|_| brought(rank, 1000, Kind::Float));
        let start = |world: &dyn Collective, index: usize| {
            world.all_reduce(vec![buffers[index].shallow_clone()], ReduceOp::Sum)
        };
        let works = [start(&*near, 0)?, start(world, 1)?, start(&*far, 2)?];
        works.into_iter().rev().try_for_each(Work::wait)?;
        assert!(buffers[0].equal(&sum(&near_ranks)) && buffers[2].equal(&sum(&far_ranks)));
        assert!(buffers[1].equal(&expected(world_size, 1000, Kind::Float, ReduceOp::Sum)));
    }
    contract_of_places(&*near, &near_ranks, rank)
}

/// A world within has its own ranks, in the order of the whole's.
fn contract_of_places(part: &dyn Collective, ranks: &[usize], rank: usize) -> Result<()> {
    let texts = collective::gather_texts(part, &rank.to_string())?;
    assert_eq!(texts, ranks.iter().map(ToString::to_string).collect::<Vec<_>>());
    part.barrier()
}

pub fn rank_of_many_works() {
    let world = join_by_nccl(Limits::default());
    many_works(&world.1).unwrap_or_else(|error| end_with(&error));
    println!("rank {} of {} saw all works end", world.1.rank(), world.1.world_size());
    leave(world);
}

/// Works of two worlds under way together, waited for from the last to the first, with results that
/// feed the next.
fn many_works(world: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (world.rank(), world.world_size());
    let other = world.split(0)?;
    for _ in 0..5 {
        let buffers: Vec<Tensor> =
            (1..=6).map(|size| brought(rank, size * 50, Kind::Double)).collect();
        let start = |index: usize| {
            let world = if index.is_multiple_of(2) { world } else { &*other };
            world.all_reduce(vec![buffers[index].shallow_clone()], ReduceOp::Sum)
        };
        let works = (0..buffers.len()).map(start).collect::<Result<Vec<Work>>>()?;
        works.into_iter().rev().try_for_each(Work::wait)?;
        (0..buffers.len())
            .map(start)
            .collect::<Result<Vec<Work>>>()?
            .into_iter()
            .try_for_each(Work::wait)?;
        for buffer in &buffers {
            let sum = expected(world_size, buffer.numel() as i64, Kind::Double, ReduceOp::Sum);
            assert!(buffer.equal(&(sum * world_size as f64)));
        }
    }
    Ok(())
}
