//! Detects ranks that slow the others down, by phase.

use crate::median::{Middle, median};
use crate::train::step_report::{OWN_PHASES, Tally};

/// Steps over which a rank's seconds are compared, by their median: one slow step proves nothing.
const STEPS: usize = 20;
/// Smallest difference in seconds that is reported.
const LEAST_SECONDS: f64 = 0.01;
/// Smallest reported difference from the usual time, as a share of the step.
const LEAST_SHARE: f64 = 0.1;

/// Every rank's seconds in the last steps.
#[derive(Debug, Default)]
pub struct Stragglers {
    /// Seconds by step, rank and phase.
    steps: Vec<Vec<[f64; OWN_PHASES.len()]>>,
}

impl Stragglers {
    /// Adds a step. After every 20th step, returns a line for each rank and phase that takes more
    /// than `ratio` times the median rank's time.
    pub fn take(&mut self, tallies: &[Tally], ratio: f64) -> Vec<String> {
        self.steps.push(tallies.iter().map(|tally| tally.seconds).collect());
        if self.steps.len() < STEPS {
            return Vec::new();
        }
        let steps = std::mem::take(&mut self.steps);
        let seconds =
            |rank: usize, phase: usize| lower_median(steps.iter().map(|step| step[rank][phase]));
        let total =
            |rank: usize| (0..OWN_PHASES.len()).map(|phase| seconds(rank, phase)).sum::<f64>();
        let step = lower_median((0..tallies.len()).map(total));
        let mut lines = Vec::new();
        for (phase, word) in OWN_PHASES.iter().enumerate() {
            let rank_seconds: Vec<f64> =
                (0..tallies.len()).map(|rank| seconds(rank, phase)).collect();
            let usual = lower_median(rank_seconds.iter().copied());
            let slow = |own: f64| {
                own > ratio * usual && own - usual > LEAST_SECONDS.max(LEAST_SHARE * step)
            };
            lines.extend(rank_seconds.iter().enumerate().filter(|(_, own)| slow(**own)).map(|(rank, own)| {
                let times = if usual > 0.0 { format!(", {:.1} times", own / usual) } else { String::new() };
                format!("straggler: rank {rank} takes {own:.3} s a step in {word}, the median rank {usual:.3} s{times}")
            }));
        }
        lines
    }
}

/// Returns the lower median of an even number of values, so that of two ranks the faster is the
/// reference.
fn lower_median(values: impl Iterator<Item = f64>) -> f64 {
    median(values, Middle::Lower).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::requests::Request;

    fn tally(data: f64, backward: f64) -> Tally {
        let seconds = [data, 0.0, 0.1, backward];
        Tally {
            statistics: Vec::new(),
            norms: Vec::new(),
            request: Request::Nothing,
            seconds,
            saving: 0,
            bad_samples: 0,
            issued: (0, 0),
        }
    }

    /// Returns the lines after 20 steps of ranks like these.
    fn lines(ranks: &[Tally]) -> Vec<String> {
        let mut stragglers = Stragglers::default();
        let mut said: Vec<String> = (1..STEPS).flat_map(|_| stragglers.take(ranks, 1.5)).collect();
        assert!(said.is_empty(), "20 steps are looked at together");
        said.extend(stragglers.take(ranks, 1.5));
        said
    }

    #[test]
    fn a_rank_that_holds_the_others_up_is_named_with_its_phase() {
        let ranks = [tally(0.0, 0.2), tally(0.3, 0.2), tally(0.001, 0.2)];
        assert_eq!(
            lines(&ranks),
            [
                "straggler: rank 1 takes 0.300 s a step in data, the median rank 0.001 s, 300.0 times"
            ]
        );
        let two = [tally(0.0, 0.2), tally(0.0, 0.4)];
        assert_eq!(
            lines(&two),
            [
                "straggler: rank 1 takes 0.400 s a step in backward, the median rank 0.200 s, 2.0 times"
            ]
        );
    }

    #[test]
    fn ranks_that_differ_a_little_are_left_in_peace() {
        assert!(lines(&[tally(0.0, 0.2), tally(0.005, 0.25), tally(0.0, 0.21)]).is_empty());
        assert!(lines(&[tally(0.0, 0.2)]).is_empty(), "a world of one");
    }
}
