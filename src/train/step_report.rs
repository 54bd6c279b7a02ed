//! The report that each rank sends to all others in a step's one small collective: statistics of
//! its micro-batches, requests, and where its time went. All ranks then take every decision of the
//! step from the same numbers.

use tch::{Device, Kind, Tensor};

use crate::collective::agreement::known_to_all;
use crate::collective::{Collective, Issued, Sliced};
use crate::error::{Error, Result};
use crate::flow::Statistics;
use crate::run::requests::Request;

/// Phases whose seconds are compared between ranks; in these a rank does not wait for another.
pub const OWN_PHASES: [&str; 4] = ["data", "draw", "forward", "backward"];

/// Mask of the integer bits that an f32 holds exactly.
const EXACT: u64 = (1 << f32::MANTISSA_DIGITS) - 1;

/// One rank's own contribution.
pub struct Own<'t> {
    /// One row for each micro-batch, all of one width.
    pub statistics: &'t [Tensor],
    /// Norm of each grain of its gradients, f32 scalars.
    pub norms: &'t [Tensor],
    pub request: Request,
    /// Seconds of [`OWN_PHASES`].
    pub seconds: [f64; OWN_PHASES.len()],
    /// Progress of a checkpoint save, see `Saver::progress`.
    pub saving: u8,
    pub bad_samples: usize,
    /// The collectives that this rank has issued.
    pub issued: Issued,
}

/// One rank's report, as all ranks receive it.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Statistics by micro-batch.
    pub statistics: Vec<Statistics>,
    pub norms: Vec<f32>,
    pub request: Request,
    /// Seconds of [`OWN_PHASES`].
    pub seconds: [f64; OWN_PHASES.len()],
    pub saving: u8,
    pub bad_samples: usize,
    /// Number and digest of its collectives, truncated to the bits that an f32 holds exactly.
    pub issued: (u32, u32),
}

/// Exchanges the reports and returns every rank's, in rank order; the step's only host
/// synchronization.
///
/// # Ordering
/// Every rank calls it, with equal numbers of micro-batches and norms.
pub fn exchange(own: &Own<'_>, collective: &dyn Collective) -> Result<Vec<Tally>> {
    let (num_rows, num_norms) = (own.statistics.len(), own.norms.len());
    let width = own.statistics[0].numel();
    let device = own.statistics[0].device();
    let words = Tensor::from_slice(&own.words()).to_device(device);
    let norms: Vec<Tensor> = own.norms.iter().map(|norm| norm.to_device(device)).collect();
    let row = Tensor::cat(
        &[Tensor::stack(own.statistics, 0).flatten(0, -1), Tensor::stack(&norms, 0), words],
        0,
    );
    let all = Tensor::zeros([collective.world_size() as i64, row.size()[0]], (Kind::Float, device));
    collective.all_gather(vec![Sliced { owned: row, full: all.shallow_clone() }])?.wait()?;
    let all = Vec::<f32>::try_from(all.to_device(Device::Cpu).flatten(0, -1)).expect("f32 rows");
    Ok(all
        .chunks(all.len() / collective.world_size())
        .map(|row| Tally::read(row, num_rows, width, num_norms))
        .collect())
}

impl Own<'_> {
    fn words(&self) -> Vec<f32> {
        let seconds = self.seconds.map(|seconds| seconds as f32);
        let Issued { count, digest, .. } = self.issued;
        let issued = [count, digest].map(|number| (number & EXACT) as f32);
        [
            &[self.request.number(), f32::from(self.saving), self.bad_samples as f32],
            &issued[..],
            &seconds[..],
        ]
        .concat()
    }
}

impl Tally {
    fn read(row: &[f32], num_rows: usize, width: usize, num_norms: usize) -> Self {
        let (rows, rest) = row.split_at(num_rows * width);
        let (norms, words) = rest.split_at(num_norms);
        let mut seconds = [0.0; OWN_PHASES.len()];
        seconds.iter_mut().zip(&words[5..]).for_each(|(seconds, word)| *seconds = f64::from(*word));
        Tally {
            statistics: rows.chunks(width).map(Statistics::from_row).collect(),
            norms: norms.to_vec(),
            request: Request::from_number(words[0]),
            seconds,
            saving: words[1] as u8,
            bad_samples: words[2] as usize,
            issued: (words[3] as u32, words[4] as u32),
        }
    }
}

/// Checks that all ranks have issued the same collectives.
///
/// # Errors
/// [`Error::Desync`] on every rank, naming the first rank that differs.
pub fn check_in_step(tallies: &[Tally], own: &Issued, collective: &dyn Collective) -> Result<()> {
    let Some(other) = tallies.iter().position(|tally| tally.issued != tallies[0].issued) else {
        return Ok(());
    };
    let (first, found) = (tallies[0].issued.0, tallies[other].issued.0);
    let numbers = if first == found {
        format!("as many collectives, {found}, but others")
    } else {
        format!("{found} collectives, rank 0 {first}")
    };
    let what = format!(
        "ranks are out of step: rank {other} has begun {numbers}; the last of rank {}: {own}",
        collective.rank()
    );
    Err(known_to_all(Error::Desync { what }, 0, collective))
}

/// Returns the strongest request of any rank.
pub fn request(tallies: &[Tally]) -> Request {
    tallies.iter().map(|tally| tally.request).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::{Solo, Threads};

    fn exchanged_by(world: &Threads, num_norms: usize) -> Result<Vec<Tally>> {
        let number = world.rank() as f64;
        let row = Tensor::full([Statistics::width(3) as i64], number, (Kind::Float, Device::Cpu));
        let norm = Tensor::from(number as f32 + 0.5);
        let own = Own {
            statistics: &[row.shallow_clone(), row],
            norms: &(0..num_norms).map(|_| norm.shallow_clone()).collect::<Vec<_>>(),
            request: if world.rank() == 1 { Request::Stop } else { Request::Nothing },
            seconds: [0.0, 0.0, 0.0, 2.0 + number],
            saving: world.rank() as u8,
            bad_samples: 3,
            issued: Issued { count: 7, digest: (1 << 40) + world.rank() as u64, last: None },
        };
        exchange(&own, world)
    }

    #[test]
    fn every_rank_reads_what_each_said() {
        for tallies in Threads::run(2, |world| exchanged_by(world, 1).expect("both ranks are here"))
        {
            assert_eq!(tallies.iter().map(|tally| tally.norms[0]).collect::<Vec<_>>(), [0.5, 1.5]);
            assert_eq!(tallies[1].seconds, [0.0, 0.0, 0.0, 3.0]);
            assert_eq!([tallies[0].issued, tallies[1].issued], [(7, 0), (7, 1)]);
            let error =
                check_in_step(&tallies, &Issued::default(), &Solo).expect_err("digests differ");
            assert!(
                error.to_string().contains("rank 1 has begun as many collectives, 7, but others"),
                "{error}"
            );
            assert!(check_in_step(&tallies[..1], &Issued::default(), &Solo).is_ok());
            assert_eq!((tallies[0].saving, tallies[1].saving, tallies[1].bad_samples), (0, 1, 3));
            assert_eq!((tallies[1].statistics.len(), tallies[1].statistics[1].loss), (2, 1.0));
            assert_eq!(request(&tallies), Request::Stop);
        }
    }

    #[test]
    fn e12_ranks_that_tell_different_things_are_out_of_step() {
        let outcomes = Threads::run(2, |world| exchanged_by(world, 1 + world.rank()));
        assert!(outcomes.into_iter().all(|outcome| matches!(outcome, Err(Error::Desync { .. }))));
    }
}
