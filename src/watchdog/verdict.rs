//! Decides which ranks a run without progress waits for, from the last known state of each rank.
//! Pure functions.

use std::time::Duration;

use super::beats::{Overview, RankState};
use crate::collective::spans;
use crate::error;
use crate::phase::Phase;
use crate::pulse::Pulse;

/// The reason for ending a run: exit code, error name and message.
#[derive(Debug, PartialEq)]
pub struct Verdict {
    pub code: i32,
    pub name: &'static str,
    pub what: String,
}

/// The rank that decides, and its own state.
pub struct Observer<'w> {
    pub rank: usize,
    pub world_size: usize,
    pub host: &'w str,
    pub now: &'w Pulse,
    /// Time since it last made progress.
    pub still: Duration,
    /// Silence after which a rank counts as gone.
    pub silence_limit: Duration,
    /// The file that it waits for.
    pub reading: Option<String>,
}

const HANG: (i32, &str) = (21, "HANG");
const COMM: (i32, &str) = (error::COMM, "COMM");

impl Observer<'_> {
    /// Returns the verdict on a run that makes no progress.
    pub fn verdict(&self, overview: &Overview) -> Verdict {
        let still = format!("no progress for {:.1} s", self.still.as_secs_f64());
        let verdict = |(code, name): (i32, &'static str), what: String| Verdict {
            code,
            name,
            what: format!("{still}; {what}"),
        };
        if self.world_size <= 1 {
            return Verdict { code: HANG.0, name: HANG.1, what: still + &reading(&self.reading) };
        }
        if self.rank > 0 && overview.silence > self.silence_limit {
            let cause = if overview.hub_host == self.host { HANG } else { COMM };
            return verdict(
                cause,
                format!(
                    "missing: 0 (host {}, silent for {:.1} s)",
                    overview.hub_host,
                    overview.silence.as_secs_f64()
                ),
            );
        }
        let missing: Vec<&RankState> =
            overview.states.iter().filter(|state| self.is_missing(state, overview)).collect();
        if let Some(host) = self.lost_host(overview) {
            // A rank that still sends beats may be behind only because it waits for the silent
            // ones.
            let silent: Vec<&RankState> =
                missing.into_iter().filter(|state| state.silence > self.silence_limit).collect();
            let (arrived, silent) =
                (self.arrived(overview, &silent), describe(&silent, overview, self.silence_limit));
            return verdict(
                COMM,
                format!("host {host} is silent: node or link lost; {arrived}missing: {silent}"),
            );
        }
        let arrived = self.arrived(overview, &missing);
        if overview.states.is_empty() && overview.unknown.is_empty() {
            return verdict(COMM, "the ranks have not met yet".into());
        }
        if missing.is_empty() && overview.unknown.is_empty() {
            return verdict(HANG, "all ranks stand at the same place".into());
        }
        // A rank that is missing before the first step never connected.
        let cause = if self.now.phase as u8 <= Phase::Open as u8 { COMM } else { HANG };
        verdict(
            cause,
            format!("{arrived}missing: {}", describe(&missing, overview, self.silence_limit)),
        )
    }

    /// True if a rank is silent, or is behind the most advanced one. Being behind counts only if
    /// all ranks have sent a beat: otherwise the rank may be waiting for those that have not.
    fn is_missing(&self, state: &RankState, overview: &Overview) -> bool {
        let progress = |pulse: &Pulse| (pulse.step, pulse.collectives);
        let front = overview
            .states
            .iter()
            .map(|state| progress(&state.pulse))
            .chain([progress(self.now)])
            .max();
        (overview.unknown.is_empty() && Some(progress(&state.pulse)) < front)
            || state.silence > self.silence_limit
    }

    /// Lists the ranks that are not missing. Only rank 0 receives beats from all.
    fn arrived(&self, overview: &Overview, missing: &[&RankState]) -> String {
        if self.rank > 0 {
            return String::new();
        }
        let gone = |rank: &usize| missing.iter().any(|state| state.rank == *rank);
        let ranks: Vec<usize> =
            overview.states.iter().map(|state| state.rank).filter(|rank| !gone(rank)).collect();
        format!("arrived: {}; ", spans(&ranks))
    }

    /// Returns another machine if all its ranks are silent.
    fn lost_host<'r>(&self, overview: &'r Overview) -> Option<&'r str> {
        let others = overview.states.iter().filter(|state| state.host != self.host);
        let silent = |host: &str| {
            overview
                .states
                .iter()
                .filter(|other| other.host == host)
                .all(|other| other.silence > self.silence_limit)
        };
        others.map(|state| state.host.as_str()).find(|host| silent(host))
    }
}

fn describe(missing: &[&RankState], overview: &Overview, silence_limit: Duration) -> String {
    let one = |state: &&RankState| {
        let RankState { rank, host, pulse, silence, reading: file } = state;
        let seconds = if *silence > silence_limit { *silence } else { pulse.age }.as_secs_f64();
        let heard = if *silence > silence_limit { "last heard" } else { "there for" };
        let ago = if *silence > silence_limit { " ago" } else { "" };
        format!("{rank} (host {host}, {pulse}, {heard} {seconds:.1} s{ago}{})", reading(file))
    };
    let unknown = overview.unknown.iter().map(|rank| format!("{rank} (never heard of)"));
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
        Pulse { step, phase, stage: None, collectives, age: Duration::from_secs(age) }
    }

    fn state(rank: usize, host: &str, pulse: Pulse, silence: u64) -> RankState {
        RankState {
            rank,
            host: host.into(),
            pulse,
            silence: Duration::from_secs(silence),
            reading: None,
        }
    }

    fn judged(rank: usize, now: Pulse, overview: &Overview) -> (i32, String) {
        let observer = Observer {
            rank,
            world_size: 4,
            host: "a",
            now: &now,
            still: Duration::from_secs(3),
            silence_limit: QUIET,
            reading: None,
        };
        let verdict = observer.verdict(overview);
        (verdict.code, verdict.what)
    }

    #[test]
    fn the_rank_that_is_behind_is_named_with_its_place() {
        let waiting = at(10, Phase::Reduce, 7, 3);
        let mut states: Vec<RankState> = (0..4).map(|rank| state(rank, "a", waiting, 0)).collect();
        states[1].pulse = at(10, Phase::Backward, 4, 3);
        let overview = Overview { states: states.clone(), ..Overview::default() };
        let text = "no progress for 3.0 s; arrived: 0 2-3; missing: 1 (host a, step 10 phase backward#4, there for 3.0 s)";
        assert_eq!(judged(0, waiting, &overview), (21, text.into()));
        states[1].silence = Duration::from_secs(5);
        let overview = Overview { states, ..Overview::default() };
        assert!(
            judged(0, waiting, &overview)
                .1
                .ends_with("missing: 1 (host a, step 10 phase backward#4, last heard 5.0 s ago)")
        );
        let (code, text) = judged(2, waiting, &overview);
        assert!(code == 21 && !text.contains("arrived"), "{text}");
    }

    #[test]
    fn c14_a_machine_of_which_nobody_is_heard_is_a_matter_of_communication() {
        let waiting = at(10, Phase::Reduce, 7, 3);
        // Rank 1 waits for a rank of its own node, which waits for the other node.
        let place = |rank: usize| if rank == 1 { at(10, Phase::Reduce, 8, 3) } else { waiting };
        let states = (0..4)
            .map(|rank| {
                state(
                    rank,
                    if rank < 2 { "a" } else { "b" },
                    place(rank),
                    if rank < 2 { 0 } else { 4 },
                )
            })
            .collect();
        let (code, text) = judged(0, waiting, &Overview { states, ..Overview::default() });
        assert!(
            code == 22
                && text.contains(
                    "host b is silent: node or link lost; arrived: 0-1; missing: 2 (host b"
                ),
            "{text}"
        );
        let lost = Overview {
            silence: Duration::from_secs(4),
            hub_host: "b".into(),
            ..Overview::default()
        };
        assert_eq!(
            judged(2, waiting, &lost),
            (22, "no progress for 3.0 s; missing: 0 (host b, silent for 4.0 s)".into())
        );
    }

    #[test]
    fn a_rank_that_never_came_is_missing() {
        let joining = at(0, Phase::Bootstrap, 1, 3);
        let states = [0, 2, 3].map(|rank| state(rank, "a", joining, 0)).to_vec();
        let overview = Overview { states, unknown: vec![1], ..Overview::default() };
        assert_eq!(
            judged(0, joining, &overview),
            (22, "no progress for 3.0 s; arrived: 0 2-3; missing: 1 (never heard of)".into())
        );
    }

    #[test]
    fn where_nobody_is_behind_that_is_said() {
        let waiting = at(10, Phase::Reduce, 7, 3);
        let states = (0..4).map(|rank| state(rank, "a", waiting, 0)).collect();
        let (code, text) = judged(0, waiting, &Overview { states, ..Overview::default() });
        assert_eq!(
            (code, text.as_str()),
            (21, "no progress for 3.0 s; all ranks stand at the same place")
        );
    }
}
