//! Ranks that hold the same parameters must hold the same bits; a state in which they do not is never saved.

use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, ReduceOp};
use crate::error::{Error, Result};
use crate::parallel::{Bucket, Piece, Replica};

/// Compares what ranks hold more than once, a sum of the bits for each stage, in small collectives: masters among replicas,
/// and where the ranks of a shard group hold whole leaves, these.
///
/// # Errors
/// [`Error::Collective`] on every rank that holds it, naming the first stage in which ranks differ.
///
/// # Ordering
/// Every rank calls it.
pub fn check(replica: &Replica<'_>) -> Result<()> {
    let sharing = &replica.sharing;
    compare(replica, sharing.replicas(), |piece| Some(piece.master()))?;
    compare(replica, sharing.shards(), |piece| if piece.layout().is_whole() { None } else { piece.leaf() })
}

fn compare<'r>(replica: &'r Replica<'_>, ranks: &dyn Collective, held: impl Fn(&'r Piece) -> Option<&'r Tensor>) -> Result<()> {
    let sum = |bucket: &'r Bucket| bucket.pieces().iter().filter_map(&held).map(bits).sum::<i64>();
    let own: Vec<i64> = replica.buckets.iter().map(sum).collect();
    let (low, high) = (Tensor::from_slice(&own), Tensor::from_slice(&own));
    ranks.all_reduce(vec![low.shallow_clone()], ReduceOp::Min)?.wait()?;
    ranks.all_reduce(vec![high.shallow_clone()], ReduceOp::Max)?.wait()?;
    let differs = |(stage, (low, high)): (usize, (i64, i64))| (low != high).then_some(stage);
    let sums = |tensor: &Tensor| Vec::<i64>::try_from(tensor).expect("i64");
    match sums(&low).into_iter().zip(sums(&high)).enumerate().find_map(differs) {
        Some(stage) => {
            let what = format!("ranks hold different parameters in stage {}; nothing was saved", replica.stages[stage].params().stage());
            Err(Error::Collective { backend: "replicas", operation: "compare", what })
        }
        None => Ok(()),
    }
}

/// The tensor's bits as integers, added up.
fn bits(tensor: &Tensor) -> i64 {
    let as_integers = if tensor.kind() == Kind::Float { Kind::Int } else { Kind::Int16 };
    tensor.detach().view_dtype(as_integers).sum(Kind::Int64).to_device(Device::Cpu).int64_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Threads;
    use crate::model::{Architecture, Dit};
    use crate::parallel::{Sharding, ShardingGroup, Sharing};
    use crate::rng::{Key, Purpose};

    /// Three ranks, on one of which one parameter changes.
    fn checked(sharding: Sharding, change_on: Option<usize>) -> Vec<Result<()>> {
        let join = |rank: Threads| {
            std::thread::spawn(move || {
                let stages = Dit { width: 8, depth: 1, num_heads: 2, ..Dit::default() }.stages().expect("sound");
                let sharing = Sharing::new(&rank, sharding, ShardingGroup::World, 1).expect("sound");
                let (key, devices) = (Key::new(1, Purpose::Test), (Device::Cpu, Device::Cpu));
                let mut replica = Replica::shared(stages, Kind::BFloat16, devices, Some(key), sharing);
                if change_on == Some(rank.rank()) {
                    replica.buckets[1].update(|_, master, _| drop(master.narrow(0, 3, 1).fill_(0.123)));
                }
                check(&replica)
            })
        };
        let threads: Vec<_> = Threads::world(3).into_iter().map(join).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    }

    #[test]
    fn one_parameter_on_one_rank_is_noticed_by_all() {
        for sharding in [Sharding::None, Sharding::Optimizer] {
            assert!(checked(sharding, None).iter().all(Result::is_ok));
            for outcome in checked(sharding, Some(2)) {
                let text = outcome.expect_err("rank 2 differs").to_string();
                assert!(text.contains("ranks hold different parameters in stage blocks.0; nothing was saved"), "{text}");
            }
        }
        assert!(checked(Sharding::Parameters, Some(2)).iter().all(Result::is_ok), "nobody else holds it");
    }
}
