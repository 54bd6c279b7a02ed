//! Replicas must hold the same parameters, bit for bit; a state in which they do not is never saved.

use tch::{Device, Kind, Tensor};

use crate::collective::{Collective, ReduceOp};
use crate::error::{Error, Result};
use crate::parallel::Replica;

/// Compares every rank's parameters, a sum of their bits for each stage: two small collectives.
///
/// # Errors
/// [`Error::Collective`] on every rank, naming the first stage in which they differ.
///
/// # Ordering
/// Every rank calls it.
pub fn check(replica: &Replica, collective: &dyn Collective) -> Result<()> {
    let bits = |master: &Tensor| master.view_dtype(Kind::Int).sum(Kind::Int64).to_device(Device::Cpu);
    let own = Tensor::stack(&replica.buckets.iter().map(|bucket| bits(bucket.master())).collect::<Vec<_>>(), 0);
    let (low, high) = (own.copy(), own.copy());
    collective.all_reduce(vec![low.shallow_clone()], ReduceOp::Min)?.wait()?;
    collective.all_reduce(vec![high.shallow_clone()], ReduceOp::Max)?.wait()?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Threads;
    use crate::model::{Architecture, Dit};
    use crate::rng::{Key, Purpose};

    fn checked(change_on: Option<usize>) -> Vec<Result<()>> {
        let join = |rank: Threads| {
            std::thread::spawn(move || {
                let stages = Dit { width: 8, depth: 1, num_heads: 2, ..Dit::default() }.stages().expect("sound");
                let mut replica = Replica::new(stages, Kind::Float, Device::Cpu, Some(Key::new(1, Purpose::Test)));
                if change_on == Some(rank.rank()) {
                    replica.buckets[1].update(|master| drop(master.narrow(0, 3, 1).fill_(0.123)));
                }
                check(&replica, &rank)
            })
        };
        let threads: Vec<_> = Threads::world(3).into_iter().map(join).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    }

    #[test]
    fn one_parameter_on_one_rank_is_noticed_by_all() {
        assert!(checked(None).iter().all(Result::is_ok));
        for outcome in checked(Some(2)) {
            let text = outcome.expect_err("rank 2 differs").to_string();
            assert!(text.contains("ranks hold different parameters in stage blocks.0; nothing was saved"), "{text}");
        }
    }
}
