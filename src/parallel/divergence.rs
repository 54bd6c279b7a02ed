//! Ranks that hold the same parameters must hold the same bits; a state in which they do not is
//! never saved.

use tch::{Device, Kind, Tensor};

use crate::collective::agreement::known_to_all;
use crate::collective::spans;
use crate::collective::{Collective, Sliced};
use crate::error::{Error, Result};
use crate::parallel::{Bucket, Piece, Replica};

/// Parameters that a message names at most.
const NAMED: usize = 4;

/// Compares what ranks hold more than once, a sum of the bits for each stage, in small collectives:
/// masters among replicas, and where the ranks of a shard group hold all of a piece to compute
/// with, this.
///
/// # Errors
/// [`Error::Desync`] on every rank that holds it, naming the ranks that are in the minority and the
/// parameters in which they differ.
///
/// # Ordering
/// Every rank calls it, with its rank in the world: the ranks that are compared may be a part of
/// it.
pub fn check(replica: &Replica<'_>, rank: usize) -> Result<()> {
    let sharing = &replica.sharing;
    compare(replica, rank, sharing.replicas(), |piece| Some(piece.master()))?;
    compare(replica, rank, sharing.shards(), |piece| {
        if piece.layout().is_whole() { None } else { piece.full() }
    })
}

fn compare<'r>(
    replica: &'r Replica<'_>,
    rank: usize,
    ranks: &dyn Collective,
    held: impl Fn(&'r Piece) -> Option<&'r Tensor>,
) -> Result<()> {
    let sum = |bucket: &'r Bucket| {
        bucket.pieces().iter().filter_map(&held).map(bits).fold(0, i64::wrapping_add)
    };
    let own: Vec<i64> = replica.buckets.iter().map(sum).collect();
    let stages = by_rank(&own, ranks)?;
    let differs = |stage: &usize| stages.iter().any(|sums| sums[*stage] != stages[0][*stage]);
    let Some(stage) = (0..own.len()).find(differs) else { return Ok(()) };
    // Ranks that differ are found by now, in the same stage on each: there is time to look closer.
    let (params, pieces) = (replica.stages[stage].params(), replica.buckets[stage].pieces());
    let tensors: Vec<&Tensor> = pieces.iter().filter_map(held).collect();
    let in_the_world: Vec<usize> =
        by_rank(&[rank as i64], ranks)?.iter().map(|of| of[0] as usize).collect();
    let minority = minority(&stages.iter().map(|sums| sums[stage]).collect::<Vec<_>>());
    let minority: Vec<usize> = minority.into_iter().map(|place| in_the_world[place]).collect();
    let where_ = match tensors
        .iter()
        .zip(pieces)
        .all(|(tensor, piece)| tensor.numel() as i64 >= piece.layout().numel)
    {
        true => {
            let sums: Vec<i64> = params.split_pieces(&tensors).iter().map(bits).collect();
            let parameters = by_rank(&sums, ranks)?;
            let differing = params.infos().iter().enumerate().filter(|(index, _)| {
                parameters.iter().any(|of| of[*index] != parameters[0][*index])
            });
            let names: Vec<String> =
                differing.map(|(_, info)| format!("`{}`", info.name)).collect();
            format!(
                "{}{}",
                names[..names.len().min(NAMED)].join(", "),
                if names.len() > NAMED { ", …" } else { "" }
            )
        }
        // A shard begins and ends inside of parameters.
        false => format!("stage {}", params.stage()),
    };
    let who = if minority.len() == 1 { "rank" } else { "ranks" };
    let what = format!(
        "{who} {} holds other parameters than the rest: {where_}; nothing was saved",
        spans(&minority)
    );
    Err(known_to_all(Error::Desync { what }, 0, ranks))
}

/// Every rank's numbers, in rank order.
fn by_rank(own: &[i64], ranks: &dyn Collective) -> Result<Vec<Vec<i64>>> {
    let all =
        Tensor::zeros([ranks.world_size() as i64, own.len() as i64], (Kind::Int64, Device::Cpu));
    ranks
        .all_gather(vec![Sliced { owned: Tensor::from_slice(own), full: all.shallow_clone() }])?
        .wait()?;
    Ok(Vec::<Vec<i64>>::try_from(all).expect("rows of integers"))
}

/// The ranks whose number is not that of most; of two halves, those that differ from rank 0.
fn minority(numbers: &[i64]) -> Vec<usize> {
    let count = |number: &i64| numbers.iter().filter(|other| *other == number).count();
    let most = numbers.iter().map(count).max().unwrap_or(0);
    let common = numbers.iter().find(|number| count(number) == most).expect("a rank");
    (0..numbers.len()).filter(|rank| numbers[*rank] != *common).collect()
}

/// The tensor's bits, of whatever device, as integers added up: as wide ones as begin and end with
/// it, because libtorch copies narrower ones before it adds them.
fn bits(tensor: &Tensor) -> i64 {
    let ends = [tensor.data_ptr() as usize, tensor.numel() * tensor.kind().elt_size_in_bytes()];
    let fits = |kind: &Kind| ends.iter().all(|end| end.is_multiple_of(kind.elt_size_in_bytes()));
    let integers =
        [Kind::Int64, Kind::Int, Kind::Int16].into_iter().find(fits).expect("no kind is narrower");
    tensor.detach().view_dtype(integers).sum(Kind::Int64).to_device(Device::Cpu).int64_value(&[])
}
