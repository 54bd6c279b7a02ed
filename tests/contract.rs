//! The contract of the collectives, which every backend is put through.

use fm_dist::collective::{
    self, Collective, ReduceOp, Sliced, broadcast_text, gather_texts, local_rank,
};
use fm_dist::error::Result;
use tch::{Device, Kind, Tensor};

/// No element, one, fewer than ranks, not a power of two.
const SIZES: [i64; 4] = [0, 1, 3, 1000];
/// A little more than whole pieces of MPI's backend.
const LARGE: i64 = (1 << 20) + 7;
const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64];
const OPS: [ReduceOp; 3] = [ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max];

/// What rank `rank` brings along: small integers, so that every order of summation gives the same
/// numbers.
pub fn brought(rank: usize, size: i64, kind: Kind) -> Tensor {
    let index = Tensor::arange(size, (Kind::Int64, Device::Cpu));
    ((index * 7 + 13 * rank as i64).remainder(101) - 50).to_kind(kind)
}

/// What the ranks' tensors must become.
pub fn expected(world_size: usize, size: i64, kind: Kind, op: ReduceOp) -> Tensor {
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

pub fn sliced(owned: &Tensor, full: &Tensor) -> Sliced {
    Sliced { owned: owned.shallow_clone(), full: full.shallow_clone() }
}

/// Every operation, op and kind at every awkward size; the same body for all backends.
pub fn contract(collective: &dyn Collective) -> Result<()> {
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
