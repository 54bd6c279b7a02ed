//! Checks that ranks which hold the same parameters hold the same bits. A state that diverged is
//! never saved.

use tch::{Device, Kind, Tensor};

use crate::collective::agreement::known_to_all;
use crate::collective::spans;
use crate::collective::{Collective, Sliced};
use crate::error::{Error, Result};
use crate::parallel::{Bucket, Piece, Replica};

/// Most parameters that a message names.
const NAMED: usize = 4;

/// Compares the values that several ranks hold, by a checksum for each stage, in small collectives:
/// the masters and what is frozen among replicas, and the full compute copy among the ranks of a
/// shard group that hold one.
///
/// # Errors
/// [`Error::Desync`] on every rank of the group that differs, naming the ranks in the minority and
/// the parameters in which they differ.
///
/// # Ordering
/// Every rank calls it. `rank` is its rank in the world; the ranks that are compared may be a part
/// of the world.
pub fn check(replica: &Replica<'_>, rank: usize) -> Result<()> {
    let sharing = &replica.sharing;
    compare(replica, rank, sharing.replicas(), |piece| Some(piece.values()))?;
    let is_divided = sharing.cut().num_shards > 1;
    compare(replica, rank, sharing.shards(), |piece| piece.full().filter(|_| is_divided))
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
    // From here on the ranks are known to differ, in the same stage on all of them, so a detailed
    // comparison may take time.
    let (params, pieces) = (replica.stages[stage].params(), replica.buckets[stage].pieces());
    let held: Vec<_> = pieces.iter().filter_map(|piece| Some((piece, held(piece)?))).collect();
    let world_ranks: Vec<usize> =
        by_rank(&[rank as i64], ranks)?.iter().map(|row| row[0] as usize).collect();
    let minority = minority(&stages.iter().map(|sums| sums[stage]).collect::<Vec<_>>());
    let minority: Vec<usize> = minority.into_iter().map(|index| world_ranks[index]).collect();
    let is_whole =
        |(piece, tensor): &(&Piece, &Tensor)| tensor.numel() as i64 >= piece.layout().numel;
    let location = match held.iter().all(is_whole) {
        true => {
            let named =
                held.iter().flat_map(|(piece, tensor)| params.split_class(piece.class(), tensor));
            let (infos, sums): (Vec<_>, Vec<i64>) =
                named.map(|(info, view)| (info, bits(&view))).unzip();
            let parameters = by_rank(&sums, ranks)?;
            let differing = infos.iter().enumerate().filter(|(index, _)| {
                parameters.iter().any(|sums| sums[*index] != parameters[0][*index])
            });
            let names: Vec<String> =
                differing.map(|(_, info)| format!("`{}`", info.name)).collect();
            format!(
                "{}{}",
                names[..names.len().min(NAMED)].join(", "),
                if names.len() > NAMED { ", …" } else { "" }
            )
        }
        // A shard may start and end inside parameters.
        false => format!("stage {}", params.stage()),
    };
    let noun = if minority.len() == 1 { "rank" } else { "ranks" };
    let what = format!(
        "{noun} {} holds other parameters than the rest: {location}; nothing was saved",
        spans(&minority)
    );
    Err(known_to_all(Error::Desync { what }, 0, ranks))
}

/// Gathers every rank's numbers, in rank order.
fn by_rank(own: &[i64], ranks: &dyn Collective) -> Result<Vec<Vec<i64>>> {
    let all =
        Tensor::zeros([ranks.world_size() as i64, own.len() as i64], (Kind::Int64, Device::Cpu));
    ranks
        .all_gather(vec![Sliced { owned: Tensor::from_slice(own), full: all.shallow_clone() }])?
        .wait()?;
    Ok(Vec::<Vec<i64>>::try_from(all).expect("rows of integers"))
}

/// Returns the ranks whose number differs from the most frequent one; of two equally frequent ones,
/// from the first.
fn minority(numbers: &[i64]) -> Vec<usize> {
    let count = |number: &i64| numbers.iter().filter(|other| *other == number).count();
    let most = numbers.iter().map(count).max().unwrap_or(0);
    let common = numbers.iter().find(|number| count(number) == most).expect("a rank");
    (0..numbers.len()).filter(|rank| numbers[*rank] != *common).collect()
}

/// Checksum: the tensor's bytes summed as the widest integer type that its address and length are
/// aligned to. libtorch copies before it sums narrower types. The tensor may be on any device.
fn bits(tensor: &Tensor) -> i64 {
    let ends = [tensor.data_ptr() as usize, tensor.numel() * tensor.kind().elt_size_in_bytes()];
    let fits = |kind: &Kind| ends.iter().all(|end| end.is_multiple_of(kind.elt_size_in_bytes()));
    let integers =
        [Kind::Int64, Kind::Int, Kind::Int16].into_iter().find(fits).expect("no kind is narrower");
    // The last axis alone may be narrower than such an integer.
    let flat = tensor.detach().flatten(0, -1).view_dtype(integers);
    flat.sum(Kind::Int64).to_device(Device::Cpu).int64_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_with_narrow_rows_have_the_sum_of_their_bytes() {
        for (shape, kind) in [
            (vec![8, 11], Kind::Float),
            (vec![4, 3, 1, 1, 1], Kind::Float),
            (vec![4, 2], Kind::BFloat16),
            (vec![3], Kind::BFloat16),
            (vec![], Kind::Float),
        ] {
            let tensor = Tensor::ones(&shape, (kind, Device::Cpu));
            let flat = tensor.reshape([-1]);
            assert_eq!(bits(&tensor), bits(&flat), "{shape:?}");
            let other = Tensor::ones(&shape, (kind, Device::Cpu));
            let _ = other.reshape([-1]).get(0).fill_(1.5);
            assert_ne!(bits(&other), bits(&tensor), "{shape:?}");
        }
    }
}
