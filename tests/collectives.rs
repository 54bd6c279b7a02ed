//! Every backend of the collectives keeps one contract, and a rank that fails ends its world.
//!
//! Real MPI runs as children: a test starts `mpirun` with this very binary and the name of an
//! ignored test. Longer than most files, because the contract and its worlds are read together.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use fm_dist::collective::{
    self, Collective, Launch, Mpi, ReduceOp, Sliced, Solo, Threads, broadcast_text, gather_texts,
    local_rank,
};
use fm_dist::error::{BUG, Error, Result};
use mpi::collective::CommunicatorCollectives;
use mpi::topology::SimpleCommunicator;
use tch::{Device, Kind, Tensor};

/// No element, one, fewer than ranks, not a power of two.
const SIZES: [i64; 4] = [0, 1, 3, 1000];
/// A little more than whole pieces of MPI's backend.
const LARGE: i64 = (1 << 20) + 7;
const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64];
const OPS: [ReduceOp; 3] = [ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max];

/// What rank `rank` brings along: small integers, so that every order of summation gives the same
/// numbers.
pub(crate) fn brought(rank: usize, size: i64, kind: Kind) -> Tensor {
    let index = Tensor::arange(size, (Kind::Int64, Device::Cpu));
    ((index * 7 + 13 * rank as i64).remainder(101) - 50).to_kind(kind)
}

/// What the ranks' tensors must become.
pub(crate) fn expected(world_size: usize, size: i64, kind: Kind, op: ReduceOp) -> Tensor {
    reduced((0..world_size).map(|rank| brought(rank, size, kind)).collect(), op)
}

/// The promised order: adjacent ranks, then adjacent sums, an odd last one carried up.
fn reduced(mut all: Vec<Tensor>, op: ReduceOp) -> Tensor {
    let join = |left: &Tensor, right: &Tensor| match op {
        ReduceOp::Sum => left + right,
        ReduceOp::Min => left.minimum(right),
        ReduceOp::Max => left.maximum(right),
    };
    while let [_, _, ..] = &all[..] {
        let pairs = all.chunks(2);
        all =
            pairs
                .map(|pair| {
                    if let [left, right] = pair {
                        join(left, right)
                    } else {
                        pair[0].shallow_clone()
                    }
                })
                .collect();
    }
    all.remove(0)
}

/// Numbers whose sum depends on the order, of which rank `rank` brings these.
fn uneven(rank: usize, size: i64, kind: Kind) -> Tensor {
    let sign = [1.0, -0.7][rank % 2];
    ((brought(rank, size, Kind::Double) * 0.1 + rank as f64 / 3.0).exp() * sign).to_kind(kind)
}

pub(crate) fn sliced(owned: &Tensor, full: &Tensor) -> Sliced {
    Sliced { owned: owned.shallow_clone(), full: full.shallow_clone() }
}

/// Every operation, op and kind at every awkward size; the same body for all backends.
pub(crate) fn contract(collective: &dyn Collective) -> Result<()> {
    let small = SIZES.into_iter().flat_map(|size| KINDS.map(|kind| (size, kind)));
    for (size, kind) in small.chain([(LARGE, Kind::Float)]) {
        for op in OPS {
            reductions(collective, size, kind, op)?;
        }
        copies(collective, size, kind)?;
    }
    views_of_the_whole(collective)?;
    works_in_flight(collective)?;
    many_tensors_at_once(collective)?;
    bits_of_the_tree(collective)?;
    worlds_apart(collective)?;
    texts(collective)?;
    refusals(collective);
    collective.barrier()?;
    same_ledger(collective)
}

/// Ranks have counted the same operations; what was refused is not among them.
fn same_ledger(collective: &dyn Collective) -> Result<()> {
    let issued = collective.issued();
    let ledgers = gather_texts(collective, &format!("{issued} {:016x}", issued.digest))?;
    assert!(ledgers.iter().all(|ledger| *ledger == ledgers[0]), "{ledgers:?}");
    let before = collective.issued();
    refusals(collective);
    assert_eq!(collective.issued(), before);
    if let Some(last) = before.last {
        assert!(
            before.to_string().starts_with("all_gather#") && last.to_string().ends_with(" Int64"),
            "{before}"
        );
        collective.all_reduce(vec![brought(0, 7, Kind::Float)], ReduceOp::Max)?.wait()?;
        let after = collective.issued();
        assert_eq!(
            (after.count, after.to_string()),
            (before.count + 1, format!("all_reduce#{} (Max of 7 Float)", before.count + 1))
        );
        assert_ne!(after.digest, before.digest);
    }
    Ok(())
}

fn reductions(collective: &dyn Collective, size: i64, kind: Kind, op: ReduceOp) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let buffer = brought(rank, size, kind);
    collective.all_reduce(vec![buffer.shallow_clone()], op)?.wait()?;
    assert!(
        buffer.equal(&expected(world_size, size, kind, op)),
        "all_reduce {op:?} of {size} {kind:?}"
    );

    let full = brought(rank, size * world_size as i64, kind);
    let owned = Tensor::zeros([size], (kind, Device::Cpu));
    collective.reduce_scatter(vec![sliced(&owned, &full)], op)?.wait()?;
    let reduced = expected(world_size, size * world_size as i64, kind, op);
    assert!(
        owned.equal(&reduced.narrow(0, rank as i64 * size, size)),
        "reduce_scatter {op:?} of {size} {kind:?}"
    );
    Ok(())
}

fn copies(collective: &dyn Collective, size: i64, kind: Kind) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let full = Tensor::zeros([world_size as i64 * size], (kind, Device::Cpu));
    collective.all_gather(vec![sliced(&brought(rank, size, kind), &full)])?.wait()?;
    let joined: Vec<Tensor> = (0..world_size).map(|rank| brought(rank, size, kind)).collect();
    assert!(full.equal(&Tensor::cat(&joined, 0)), "all_gather of {size} {kind:?}");
    for root in 0..world_size {
        let buffer = brought(rank, size, kind);
        collective.broadcast(buffer.shallow_clone(), root)?.wait()?;
        assert!(
            buffer.equal(&brought(root, size, kind)),
            "broadcast of {size} {kind:?} from {root}"
        );
    }
    Ok(())
}

/// A rank's slice may be a view of the whole; shapes do not matter, only elements.
fn views_of_the_whole(collective: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let full = brought(rank, 6 * world_size as i64, Kind::Float).view([-1, 2]);
    let owned = full.narrow(0, 3 * rank as i64, 3);
    collective.reduce_scatter(vec![sliced(&owned, &full)], ReduceOp::Sum)?.wait()?;
    collective.all_gather(vec![sliced(&owned, &full)])?.wait()?;
    assert!(full.flatten(0, -1).equal(&expected(
        world_size,
        6 * world_size as i64,
        Kind::Float,
        ReduceOp::Sum
    )));
    Ok(())
}

/// Works may be waited for in any order, differently on each rank, or not at all; tensors may be
/// let go before.
fn works_in_flight(collective: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let buffers: Vec<Tensor> =
        (1..=5).map(|number| brought(rank, number * 100_000, Kind::Float)).collect();
    let mut works = buffers
        .iter()
        .map(|buffer| collective.all_reduce(vec![buffer.shallow_clone()], ReduceOp::Sum))
        .collect::<Result<Vec<_>>>()?;
    works.push(collective.all_reduce(vec![brought(rank, 100_000, Kind::Float)], ReduceOp::Sum)?);
    for number in [[3, 0, 2, 1, 1, 0], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0]][rank % 3] {
        works.remove(number).wait()?;
    }
    for buffer in &buffers {
        assert!(buffer.equal(&expected(
            world_size,
            buffer.numel() as i64,
            Kind::Float,
            ReduceOp::Sum
        )));
    }
    let last = brought(rank, 1000, Kind::Float);
    drop(collective.broadcast(brought(rank, 1000, Kind::Float), 0)?);
    collective.all_reduce(vec![last.shallow_clone()], ReduceOp::Sum)?.wait()?;
    assert!(
        last.equal(&expected(world_size, 1000, Kind::Float, ReduceOp::Sum)),
        "the sum after a work that was let go"
    );
    Ok(())
}

/// Tensors of one operation differ in size and kind, and each gets what is its own.
fn many_tensors_at_once(collective: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let forms =
        [(200_001, Kind::Float), (0, Kind::Double), (3, Kind::Int64), (70_000, Kind::BFloat16)];
    let buffers: Vec<Tensor> =
        forms.iter().map(|(size, kind)| brought(rank, *size, *kind)).collect();
    collective
        .all_reduce(buffers.iter().map(Tensor::shallow_clone).collect(), ReduceOp::Max)?
        .wait()?;
    let fulls: Vec<Tensor> =
        forms.iter().map(|(size, kind)| brought(rank, size * world_size as i64, *kind)).collect();
    let owned: Vec<Tensor> =
        forms.iter().map(|(size, kind)| Tensor::zeros([*size], (*kind, Device::Cpu))).collect();
    let slices = || owned.iter().zip(&fulls).map(|(owned, full)| sliced(owned, full)).collect();
    collective.reduce_scatter(slices(), ReduceOp::Sum)?.wait()?;
    collective.all_gather(slices())?.wait()?;
    for (((size, kind), buffer), full) in forms.iter().zip(&buffers).zip(&fulls) {
        assert!(
            buffer.equal(&expected(world_size, *size, *kind, ReduceOp::Max)),
            "all_reduce of {size} {kind:?} among others"
        );
        let sums = expected(world_size, size * world_size as i64, *kind, ReduceOp::Sum);
        assert!(full.equal(&sums), "reduce_scatter and all_gather of {size} {kind:?} among others");
    }
    Ok(())
}

/// Sums have the bits of the pairwise tree, at sizes that are summed in one place, in slices and in
/// several pieces.
fn bits_of_the_tree(collective: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let sizes = SIZES.into_iter().chain([30_001, 150_001]);
    for (size, kind) in
        sizes.flat_map(|size| [Kind::Float, Kind::BFloat16].map(|kind| (size, kind)))
    {
        let sums = |size| {
            reduced((0..world_size).map(|rank| uneven(rank, size, kind)).collect(), ReduceOp::Sum)
        };
        let buffer = uneven(rank, size, kind);
        collective.all_reduce(vec![buffer.shallow_clone()], ReduceOp::Sum)?.wait()?;
        assert!(buffer.equal(&sums(size)), "all_reduce of {size} {kind:?} among {world_size}");

        let full = uneven(rank, size * world_size as i64, kind);
        let owned = Tensor::zeros([size], (kind, Device::Cpu));
        collective.reduce_scatter(vec![sliced(&owned, &full)], ReduceOp::Sum)?.wait()?;
        let mine = sums(size * world_size as i64).narrow(0, rank as i64 * size, size);
        assert!(owned.equal(&mine), "reduce_scatter of {size} {kind:?} among {world_size}");
    }
    Ok(())
}

/// Even and odd ranks as two worlds: each reduces by itself while the one that they come from lives
/// on.
fn worlds_apart(collective: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let part = collective.split(rank % 2)?;
    let members: Vec<usize> = (rank % 2..world_size).step_by(2).collect();
    assert_eq!((members[part.rank()], part.world_size()), (rank, members.len()));
    let (inside, outside) = (uneven(rank, 50_000, Kind::Float), uneven(rank, 50_000, Kind::Float));
    let of_all = collective.all_reduce(vec![outside.shallow_clone()], ReduceOp::Sum)?;
    let of_part = part.all_reduce(vec![inside.shallow_clone()], ReduceOp::Sum)?;
    let (first, second) = if rank == 0 { (of_part, of_all) } else { (of_all, of_part) };
    first.wait()?;
    second.wait()?;
    let sum = |ranks: Vec<usize>| {
        reduced(
            ranks.into_iter().map(|rank| uneven(rank, 50_000, Kind::Float)).collect(),
            ReduceOp::Sum,
        )
    };
    assert!(inside.equal(&sum(members)), "the sum of one part");
    assert!(outside.equal(&sum((0..world_size).collect())), "the sum of all");
    part.barrier()
}

fn texts(collective: &dyn Collective) -> Result<()> {
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let text_of = |rank: usize| "naïve Größe 🦀 ".repeat(rank);
    for root in 0..world_size {
        assert_eq!(broadcast_text(collective, &text_of(rank), root)?, text_of(root));
    }
    assert_eq!(
        gather_texts(collective, &text_of(rank))?,
        (0..world_size).map(text_of).collect::<Vec<_>>()
    );
    assert_eq!(local_rank(collective)?, rank, "all ranks of this test run on one machine");
    Ok(())
}

/// What no backend carries is refused before it travels, on each rank alike.
fn refusals(collective: &dyn Collective) {
    let world_size = collective.world_size();
    let floats = |size: i64| Tensor::zeros([size], (Kind::Float, Device::Cpu));
    let refused = |what: Result<collective::Work>, words: &str| {
        let error = what.err().expect("must be refused").to_string();
        assert!(error.contains(words), "{error}");
    };
    let halves = Tensor::zeros([2], (Kind::Half, Device::Cpu));
    refused(collective.all_reduce(vec![halves], ReduceOp::Sum), "cannot carry Half");
    refused(collective.broadcast(floats(6).view([2, 3]).tr(), 0), "[3, 2] is not contiguous");
    refused(
        collective.broadcast(floats(1), world_size),
        &format!("no rank {world_size} among {world_size}"),
    );
    refused(
        collective.all_gather(vec![sliced(&floats(2), &floats(2 * world_size as i64 + 1))]),
        "2 each",
    );
    refused(
        collective
            .all_gather(vec![sliced(&floats(2), &brought(0, 2 * world_size as i64, Kind::Int64))]),
        "full is Int64",
    );
}

#[test]
fn a_world_of_one_keeps_the_contract() {
    contract(&Solo).expect("no peer can fail");
}

#[test]
fn worlds_of_threads_keep_the_contract() {
    for world_size in 1..=4 {
        let ranks = Threads::world(world_size)
            .into_iter()
            .map(|rank| thread::spawn(move || contract(&rank)))
            .collect::<Vec<_>>();
        ranks
            .into_iter()
            .for_each(|rank| rank.join().expect("no rank panics").expect("no rank fails"));
    }
}

/// What `body` gives on each thread of a world, in rank order.
fn on_threads<T: Send + 'static>(world_size: usize, body: fn(Threads) -> T) -> Vec<T> {
    let ranks = Threads::world(world_size)
        .into_iter()
        .map(|rank| thread::spawn(move || body(rank)))
        .collect::<Vec<_>>();
    ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
}

#[test]
fn a_thread_rank_that_leaves_early_is_named_to_the_others() {
    let errors = on_threads(3, |rank| {
        let world = rank.rank();
        if world == 1 { None } else { rank.barrier().err() }
    });
    assert!(errors[1].is_none());
    for rank in [0, 2] {
        let error = errors[rank].as_ref().expect("the barrier cannot be passed");
        assert!(matches!(error, Error::Collective { operation: "barrier", .. }), "{error}");
        assert!(error.to_string().contains("rank 1 is gone"), "{error}");
    }
}

#[test]
fn what_a_rank_posted_before_it_left_still_arrives() {
    let sums = on_threads(2, |rank| {
        let buffer = brought(rank.rank(), 10, Kind::Float);
        let work =
            rank.all_reduce(vec![buffer.shallow_clone()], ReduceOp::Sum).expect("a sound call");
        drop(rank);
        work.wait().map(|()| buffer)
    });
    assert!(sums.into_iter().all(|sum| sum.expect("both had posted").equal(&expected(
        2,
        10,
        Kind::Float,
        ReduceOp::Sum
    ))));
}

#[test]
fn thread_ranks_that_disagree_are_told_of_both_calls() {
    let floats = |size: i64| Tensor::zeros([size], (Kind::Float, Device::Cpu));
    type Start = fn(&Threads, Tensor) -> Result<collective::Work>;
    let sum: Start = |rank, buffer| rank.all_reduce(vec![buffer], ReduceOp::Sum);
    let max: Start = |rank, buffer| rank.all_reduce(vec![buffer], ReduceOp::Max);
    let broadcast: Start = |rank, buffer| rank.broadcast(buffer, 0);
    let cases = [
        (
            sum,
            floats(3),
            sum,
            floats(4),
            [
                "rank 1 is at all_reduce#1 (Sum of 4 Float)",
                "rank 0 at all_reduce#1 (Sum of 3 Float)",
            ],
        ),
        (sum, floats(3), max, floats(3), ["Sum of", "Max of"]),
        (sum, floats(3), broadcast, floats(3), ["all_reduce", "broadcast#1 (3 Float from rank 0)"]),
        (sum, floats(3), sum, brought(0, 3, Kind::Int64), ["3 Float", "3 Int64"]),
    ];
    for (first, first_buffer, second, second_buffer, words) in cases {
        let mut ranks = Threads::world(2).into_iter();
        let mut start = |start: Start, buffer: Tensor| {
            let rank = ranks.next().expect("two ranks");
            thread::spawn(move || start(&rank, buffer).and_then(collective::Work::wait))
        };
        for rank in [start(first, first_buffer), start(second, second_buffer)] {
            let error = rank.join().expect("no rank panics").expect_err("the ranks disagree");
            assert!(matches!(error, Error::Desync { .. }), "{error}");
            let error = error.to_string();
            assert!(
                error.contains("ranks disagree") && words.iter().all(|word| error.contains(word)),
                "{error}"
            );
        }
    }
}

/// What became of a world of MPI ranks.
pub(crate) struct Outcome {
    pub code: Option<i32>,
    pub output: String,
    /// From the line in which a rank said that it fails to the end of the world.
    pub survived: Option<Duration>,
}

/// The line with which a failing rank starts the clock.
pub(crate) const FAILS_NOW: &str = "this rank fails now";

/// How long a world may outlive a rank that fails: 5 s are promised, and a busy machine may take
/// four times as long.
const SOON: Duration = Duration::from_secs(20);

/// No world of this file takes a minute, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn mpirun(ranks: usize, test: &str) -> Outcome {
    run(world_of(ranks), test)
}

/// This binary under `mpirun`.
pub(crate) fn world_of(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--allow-run-as-root", "-n", &ranks.to_string()]);
    command.arg(std::env::current_exe().expect("this binary has a path"));
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command
}

/// Runs an ignored test of this binary in children, one world at a time: there are more ranks than
/// cores already.
pub(crate) fn run(mut command: Command, test: &str) -> Outcome {
    static ONE_WORLD: Mutex<()> = Mutex::new(());
    let _alone = ONE_WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    command
        .args(["--ignored", "--exact", test, "--nocapture", "--test-threads=1"])
        .env("OMP_NUM_THREADS", "1");
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mpirun of Open MPI is in PATH");
    let (stdout, mut stderr) =
        (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let (sender, done) = mpsc::channel();
    thread::spawn(move || sender.send(read_lines(stdout)));
    let Ok((mut output, failed_at)) = done.recv_timeout(PATIENCE) else {
        child.kill().expect("a child can be killed");
        panic!(
            "{test} hangs: {}",
            errors.join().expect("a reader does not panic").expect("a pipe can be read")
        );
    };
    let code = child.wait().expect("a child can be waited for").code();
    let survived = failed_at.map(|instant| instant.elapsed());
    output += &errors.join().expect("a reader does not panic").expect("a pipe can be read");
    Outcome { code, output, survived }
}

/// All lines until the pipe closes, and when a rank said that it fails.
fn read_lines(pipe: impl Read) -> (String, Option<Instant>) {
    let (mut text, mut failed_at) = (String::new(), None);
    for line in BufReader::new(pipe).lines().map_while(std::io::Result::ok) {
        failed_at = failed_at.or_else(|| line.contains(FAILS_NOW).then(Instant::now));
        text += &(line + "\n");
    }
    (text, failed_at)
}

/// Joins the world of `mpirun`; from here on a panic of this rank ends all ranks, as it does in
/// `main`.
pub(crate) fn join_the_world() -> Box<dyn Collective> {
    let world = collective::connect(Launch::Auto, Duration::from_secs(60));
    end_all_on_panic();
    world.unwrap_or_else(|error| end_with(&error))
}

pub(crate) fn end_all_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        collective::abort(BUG);
    }));
}

pub(crate) fn end_with(error: &Error) -> ! {
    eprintln!("{error}");
    collective::abort(error.exit_code())
}

#[test]
fn worlds_of_mpi_ranks_keep_the_contract() {
    for ranks in [2, 3, 4] {
        let Outcome { code, output, .. } = mpirun(ranks, "collectives::rank_of_the_mpi_contract");
        assert_eq!(code, Some(0), "{output}");
        for rank in 0..ranks {
            assert!(
                output.contains(&format!("rank {rank} of {ranks} kept the contract")),
                "{output}"
            );
        }
    }
}

/// As between machines: messages alone.
#[test]
fn worlds_without_shared_memory_keep_the_contract() {
    for ranks in [2, 4] {
        let Outcome { code, output, .. } =
            mpirun(ranks, "collectives::rank_of_the_contract_by_messages");
        assert_eq!(code, Some(0), "{output}");
        assert_eq!(output.matches("kept the contract by messages").count(), ranks, "{output}");
    }
}

#[test]
#[ignore = "started by mpirun from another test"]
fn rank_of_the_contract_by_messages() {
    end_all_on_panic();
    let world = Mpi::connect().unwrap_or_else(|error| end_with(&error)).by_messages();
    contract(&world).unwrap_or_else(|error| end_with(&error));
    println!("rank {} kept the contract by messages", world.rank());
    collective::finish(Box::new(world)).unwrap_or_else(|error| end_with(&error));
}

#[test]
#[ignore = "started by mpirun from another test"]
fn rank_of_the_mpi_contract() {
    let world = join_the_world();
    contract(&*world).unwrap_or_else(|error| end_with(&error));
    let full = brought(0, 2 * world.world_size() as i64, Kind::Float);
    let foreign = full.narrow(0, 2 * ((world.rank() + 1) % world.world_size()) as i64, 2);
    let error = world
        .all_gather(vec![sliced(&foreign, &full)])
        .err()
        .expect("its peers' places are not its own");
    assert!(error.to_string().contains("another place than this rank's slice"), "{error}");
    println!("rank {} of {} kept the contract", world.rank(), world.world_size());
    collective::finish(world).unwrap_or_else(|error| end_with(&error));
}

/// Rank 1 fails in its own way while the others wait for it in an all-reduce.
fn world_in_which_rank_1(fails: fn()) {
    let world = join_the_world();
    world.barrier().unwrap_or_else(|error| end_with(&error));
    if world.rank() == 1 {
        println!("{FAILS_NOW}");
        fails();
    }
    let waited = world
        .all_reduce(vec![brought(0, 1 << 20, Kind::Float)], ReduceOp::Sum)
        .and_then(collective::Work::wait);
    println!("rank {} left the all-reduce: {waited:?}", world.rank());
}

fn ends_in_time(test: &str, code: i32) -> String {
    let outcome = mpirun(2, test);
    assert_eq!(outcome.code, Some(code), "{}", outcome.output);
    let survived = outcome.survived.expect("rank 1 said that it fails");
    assert!(survived < SOON, "the world lived on for {survived:?}");
    assert!(!outcome.output.contains("left the all-reduce"), "{}", outcome.output);
    outcome.output
}

#[test]
fn an_error_on_one_rank_ends_the_world_with_its_code() {
    let output = ends_in_time("collectives::rank_of_a_world_with_an_error", 41);
    assert!(output.contains("step 7: the loss is not finite"), "{output}");
}

#[test]
#[ignore = "started by mpirun from another test"]
fn rank_of_a_world_with_an_error() {
    world_in_which_rank_1(|| {
        end_with(&Error::NotFinite { step: 7, what: "the loss is not finite".into() })
    });
}

#[test]
fn a_panic_on_one_rank_ends_the_world_within_five_seconds() {
    let output = ends_in_time("collectives::rank_of_a_world_with_a_panic", BUG);
    assert!(output.contains("an invariant is broken"), "{output}");
}

#[test]
#[ignore = "started by mpirun from another test"]
fn rank_of_a_world_with_a_panic() {
    world_in_which_rank_1(|| panic!("an invariant is broken"));
}

#[test]
fn another_thread_ends_a_world_whose_main_thread_waits() {
    ends_in_time("collectives::rank_of_a_world_with_a_watchdog", 21);
}

#[test]
#[ignore = "started by mpirun from another test"]
fn rank_of_a_world_with_a_watchdog() {
    let world = join_the_world();
    world.barrier().unwrap_or_else(|error| end_with(&error));
    if world.rank() == 1 {
        thread::park();
    }
    let (ring, bell) = mpsc::channel::<()>();
    thread::spawn(move || {
        // Nobody rings while the main thread waits below: the time-out is the watchdog's verdict.
        assert!(bell.recv_timeout(Duration::from_millis(300)).is_err());
        println!("{FAILS_NOW}");
        collective::abort(21);
    });
    let waited = world
        .all_reduce(vec![brought(0, 3, Kind::Float)], ReduceOp::Sum)
        .and_then(collective::Work::wait);
    println!("left the all-reduce: {waited:?} {:?}", ring.send(()));
}

#[test]
fn ranks_of_mpi_that_disagree_each_say_what_arrived_instead() {
    let Outcome { code, output, .. } = mpirun(2, "collectives::rank_of_a_world_that_disagrees");
    assert_eq!(code, Some(42), "{output}");
    // MPI itself takes a message that is too short for whole.
    let (ten, twenty) = ("all_reduce#1 (Sum of 10 Float)", "all_reduce#1 (Sum of 20 Float)");
    let texts = [
        &format!(
            "ranks disagree: rank 1 sent 80 bytes of another operation, rank 0 is at {ten} and expected 40"
        ),
        &format!(
            "ranks disagree: rank 0 sent 40 bytes of another operation, rank 1 is at {twenty} and expected 80"
        ),
        "mpi broadcast: an earlier operation failed: ranks disagree",
    ];
    assert!(texts.iter().all(|text| output.contains(text)), "{output}");
}

#[test]
#[ignore = "started by mpirun from another test"]
fn rank_of_a_world_that_disagrees() {
    let world = join_the_world();
    let buffer = brought(0, 10 * (1 + world.rank() as i64), Kind::Float);
    let error = world
        .all_reduce(vec![buffer], ReduceOp::Sum)
        .and_then(collective::Work::wait)
        .expect_err("the ranks disagree");
    let later = world
        .broadcast(brought(0, 10, Kind::Float), 0)
        .and_then(collective::Work::wait)
        .expect_err("nothing is in step");
    eprintln!("{error}\n{later}");
    // Each has said what it saw before one ends the world.
    SimpleCommunicator::world().barrier();
    end_with(&error);
}

/// Ranks that disagree about what a message of equal size means.
#[test]
fn ranks_of_mpi_that_disagree_about_an_operation_end_with_a_code_of_its_own() {
    let Outcome { code, output, .. } =
        mpirun(2, "collectives::rank_of_a_world_at_different_operations");
    assert_eq!(code, Some(42), "{output}");
    assert!(output.contains("sent 4096 bytes of another operation, rank"), "{output}");
    assert!(output.contains("of 1024 Float) and expected 4096"), "{output}");
}

#[test]
#[ignore = "started by mpirun from another test"]
fn rank_of_a_world_at_different_operations() {
    let world = join_the_world();
    let op = if world.rank() == 0 { ReduceOp::Min } else { ReduceOp::Max };
    let result =
        world.all_reduce(vec![brought(0, 1024, Kind::Float)], op).and_then(collective::Work::wait);
    end_with(&result.expect_err("the ranks disagree"));
}

/// Row A7 of the fault matrix, by each launcher's variables.
#[test]
fn a7_a_launcher_whose_tasks_do_not_find_each_other_is_refused() {
    let launchers: [&[(&str, &str)]; 3] = [
        &[("OMPI_COMM_WORLD_SIZE", "8")],
        &[("PMI_SIZE", "8")],
        &[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0")],
    ];
    for variables in launchers {
        let mut command = Command::new(std::env::current_exe().expect("this binary has a path"));
        command.envs(variables.iter().copied());
        let Outcome { code, output, .. } = run(command, "collectives::rank_of_the_mpi_contract");
        assert_eq!(code, Some(52), "{variables:?}: {output}");
        assert!(output.contains("launcher says 8 tasks, "), "{output}");
        assert!(
            output.contains(": wrong --mpi= plugin? try srun --mpi=pmix or mpirun"),
            "{output}"
        );
    }
}

#[test]
fn without_a_launcher_mpi_is_never_initialized() {
    let world = collective::connect(Launch::Auto, Duration::from_secs(60))
        .expect("no launcher started this test");
    assert_eq!((world.rank(), world.world_size()), (0, 1));
    assert!(!mpi::is_initialized());
    collective::finish(world).expect("a world of one");
    assert!(!mpi::is_initialized());
}
