//! Whom a run that stands still waits for, from where each rank was last heard of. Pure.

use std::time::Duration;

use super::beats::{Roll, Standing};
use crate::collective::spans;
use crate::error;
use crate::phase::Phase;
use crate::pulse::Pulse;

/// Why a run is ended.
#[derive(Debug, PartialEq)]
pub struct Verdict {
    pub code: i32,
    pub name: &'static str,
    pub what: String,
}

/// Who judges, and where it stands.
pub struct Witness<'w> {
    pub rank: usize,
    pub world_size: usize,
    pub host: &'w str,
    pub now: &'w Pulse,
    /// How long it has not moved.
    pub still: Duration,
    /// Silence after which a rank counts as gone.
    pub quiet: Duration,
    /// The file that it waits for.
    pub reading: Option<String>,
}

const HANG: (i32, &str) = (21, "HANG");
const COMM: (i32, &str) = (error::COMM, "COMM");

impl Witness<'_> {
    /// What to say of a run that stands still.
    pub fn verdict(&self, roll: &Roll) -> Verdict {
        let still = format!("no progress for {:.1} s", self.still.as_secs_f64());
        let said = |(code, name): (i32, &'static str), what: String| Verdict {
            code,
            name,
            what: format!("{still}; {what}"),
        };
        if self.world_size <= 1 {
            return Verdict { code: HANG.0, name: HANG.1, what: still + &reading(&self.reading) };
        }
        if self.rank > 0 && roll.silence > self.quiet {
            let cause = if roll.hub_host == self.host { HANG } else { COMM };
            return said(
                cause,
                format!(
                    "missing: 0 (host {}, silent for {:.1} s)",
                    roll.hub_host,
                    roll.silence.as_secs_f64()
                ),
            );
        }
        let missing: Vec<&Standing> =
            roll.standings.iter().filter(|standing| self.lacks(standing, roll)).collect();
        if let Some(host) = self.lost_host(roll) {
            // Who is heard of may be behind only for waiting on those.
            let silent: Vec<&Standing> =
                missing.into_iter().filter(|standing| standing.silence > self.quiet).collect();
            let (arrived, silent) = (self.arrived(roll, &silent), named(&silent, roll, self.quiet));
            return said(
                COMM,
                format!("host {host} is silent: node or link lost; {arrived}missing: {silent}"),
            );
        }
        let arrived = self.arrived(roll, &missing);
        if roll.standings.is_empty() && roll.unknown.is_empty() {
            return said(COMM, "the ranks have not met yet".into());
        }
        if missing.is_empty() && roll.unknown.is_empty() {
            return said(HANG, "all ranks stand at the same place".into());
        }
        // Before the first step a rank that is missing never came.
        let cause = if self.now.phase as u8 <= Phase::Open as u8 { COMM } else { HANG };
        said(cause, format!("{arrived}missing: {}", named(&missing, roll, self.quiet)))
    }

    /// Whether a rank is silent, or behind the foremost: which says nothing where others never
    /// came, whom it may wait for.
    fn lacks(&self, standing: &Standing, roll: &Roll) -> bool {
        let place = |pulse: &Pulse| (pulse.step, pulse.collectives);
        let front = roll
            .standings
            .iter()
            .map(|standing| place(&standing.pulse))
            .chain([place(self.now)])
            .max();
        (roll.unknown.is_empty() && Some(place(&standing.pulse)) < front)
            || standing.silence > self.quiet
    }

    /// Only rank 0 hears of everybody.
    fn arrived(&self, roll: &Roll, missing: &[&Standing]) -> String {
        if self.rank > 0 {
            return String::new();
        }
        let gone = |rank: &usize| missing.iter().any(|standing| standing.rank == *rank);
        let ranks: Vec<usize> = roll
            .standings
            .iter()
            .map(|standing| standing.rank)
            .filter(|rank| !gone(rank))
            .collect();
        format!("arrived: {}; ", spans(&ranks))
    }

    /// Another machine of which no rank is heard any more.
    fn lost_host<'r>(&self, roll: &'r Roll) -> Option<&'r str> {
        let others = roll.standings.iter().filter(|standing| standing.host != self.host);
        let silent = |host: &str| {
            roll.standings
                .iter()
                .filter(|other| other.host == host)
                .all(|other| other.silence > self.quiet)
        };
        others.map(|standing| standing.host.as_str()).find(|host| silent(host))
    }
}

fn named(missing: &[&Standing], roll: &Roll, quiet: Duration) -> String {
    let one = |standing: &&Standing| {
        let Standing { rank, host, pulse, silence, reading: file } = standing;
        let seconds = if *silence > quiet { *silence } else { pulse.age }.as_secs_f64();
        let heard = if *silence > quiet { "last heard" } else { "there for" };
        let ago = if *silence > quiet { " ago" } else { "" };
        format!("{rank} (host {host}, {pulse}, {heard} {seconds:.1} s{ago}{})", reading(file))
    };
    let unknown = roll.unknown.iter().map(|rank| format!("{rank} (never heard of)"));
    missing.iter().map(one).chain(unknown).collect::<Vec<_>>().join(", ")
}

fn reading(file: &Option<String>) -> String {
    file.as_ref().map(|file| format!(", reading {file}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Duration = Duration::from_secs(1);

    fn at(step: u64, phase: Phase, collectives: u64, age: u64) -> Pulse {
        Pulse { step, phase, collectives, age: Duration::from_secs(age) }
    }

    fn standing(rank: usize, host: &str, pulse: Pulse, silence: u64) -> Standing {
        Standing {
            rank,
            host: host.into(),
            pulse,
            silence: Duration::from_secs(silence),
            reading: None,
        }
    }

    fn judged(rank: usize, now: Pulse, roll: &Roll) -> (i32, String) {
        let witness = Witness {
            rank,
            world_size: 4,
            host: "a",
            now: &now,
            still: Duration::from_secs(3),
            quiet: QUIET,
            reading: None,
        };
        let verdict = witness.verdict(roll);
        (verdict.code, verdict.what)
    }

    #[test]
    fn the_rank_that_is_behind_is_named_with_its_place() {
        let waiting = at(10, Phase::Reduce, 7, 3);
        let mut standings: Vec<Standing> =
            (0..4).map(|rank| standing(rank, "a", waiting, 0)).collect();
        standings[1].pulse = at(10, Phase::Backward, 4, 3);
        let roll = Roll { standings: standings.clone(), ..Roll::default() };
        let text = "no progress for 3.0 s; arrived: 0 2-3; missing: 1 (host a, step 10 phase backward#4, there for 3.0 s)";
        assert_eq!(judged(0, waiting, &roll), (21, text.into()));
        standings[1].silence = Duration::from_secs(5);
        let roll = Roll { standings, ..Roll::default() };
        assert!(
            judged(0, waiting, &roll)
                .1
                .ends_with("missing: 1 (host a, step 10 phase backward#4, last heard 5.0 s ago)")
        );
        let (code, text) = judged(2, waiting, &roll);
        assert!(code == 21 && !text.contains("arrived"), "{text}");
    }

    #[test]
    fn c14_a_machine_of_which_nobody_is_heard_is_a_matter_of_communication() {
        let waiting = at(10, Phase::Reduce, 7, 3);
        // Rank 1 waits for a rank of its own node, which waits for the other node.
        let place = |rank: usize| if rank == 1 { at(10, Phase::Reduce, 8, 3) } else { waiting };
        let standings = (0..4)
            .map(|rank| {
                standing(
                    rank,
                    if rank < 2 { "a" } else { "b" },
                    place(rank),
                    if rank < 2 { 0 } else { 4 },
                )
            })
            .collect();
        let (code, text) = judged(0, waiting, &Roll { standings, ..Roll::default() });
        assert!(
            code == 22
                && text.contains(
                    "host b is silent: node or link lost; arrived: 0-1; missing: 2 (host b"
                ),
            "{text}"
        );
        let lost =
            Roll { silence: Duration::from_secs(4), hub_host: "b".into(), ..Roll::default() };
        assert_eq!(
            judged(2, waiting, &lost),
            (22, "no progress for 3.0 s; missing: 0 (host b, silent for 4.0 s)".into())
        );
    }

    #[test]
    fn a_rank_that_never_came_is_missing() {
        let joining = at(0, Phase::Bootstrap, 1, 3);
        let standings = [0, 2, 3].map(|rank| standing(rank, "a", joining, 0)).to_vec();
        let roll = Roll { standings, unknown: vec![1], ..Roll::default() };
        assert_eq!(
            judged(0, joining, &roll),
            (22, "no progress for 3.0 s; arrived: 0 2-3; missing: 1 (never heard of)".into())
        );
    }

    #[test]
    fn where_nobody_is_behind_that_is_said() {
        let waiting = at(10, Phase::Reduce, 7, 3);
        let standings = (0..4).map(|rank| standing(rank, "a", waiting, 0)).collect();
        let (code, text) = judged(0, waiting, &Roll { standings, ..Roll::default() });
        assert_eq!(
            (code, text.as_str()),
            (21, "no progress for 3.0 s; all ranks stand at the same place")
        );
    }
}
