//! `[watchdog]`: time that each phase of a run may take without progress.

use std::time::Duration;

use crate::phase::Phase;
use crate::pulse::Pulse;
use crate::settings::settings;

settings! {
    /// `[watchdog]`. Seconds without any movement on any rank after which the run is ended.
    pub struct WatchdogSettings {
        /// End the run when no rank moves for longer than its phase may take.
        pub enabled: bool = true;
        /// Launch, joining the world, opening data, loading parameters.
        pub init_seconds: f64 = 300.0, in 0.1..=1e6;
        /// The first step of a start, which warms everything up, a validation, and a step of
        /// samples from noise to data.
        pub first_step_seconds: f64 = 300.0, in 0.1..=1e6;
        /// Every other step; the next key raises it where steps are long.
        pub step_seconds: f64 = 60.0, in 0.1..=1e6;
        /// A step may stand still for this many times the median of the last 50.
        pub step_medians: f64 = 10.0, in 0.1..=1e6;
        /// Comparing parameters, copying, writing and committing a checkpoint; the next key raises
        /// it where saves are long.
        pub save_seconds: f64 = 600.0, in 0.1..=1e6;
        /// A save may stand still for this many times what the last one took in all.
        pub save_multiple: f64 = 10.0, in 0.1..=1e6;
        /// Samples and report at the end.
        pub report_seconds: f64 = 600.0, in 0.1..=1e6;
        /// Taking leave of the other ranks.
        pub finalize_seconds: f64 = 60.0, in 0.1..=1e6;
        /// A rank whose phase takes this many times the median rank's over 20 steps is reported as
        /// a straggler.
        pub straggler_ratio: f64 = 1.5, in 1.1..;
        /// Steps between comparisons of the parameters that several ranks hold; 0: at saves only,
        /// which always compare.
        pub compare_every_n_steps: u64 = 1000, in 0..;
    }
}

/// Durations measured since this start of the run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// The first step of this start; 0 before it.
    pub first_step: u64,
    /// Median of the last steps, in seconds; zero until the watching thread has measured one.
    pub step_median: f64,
    /// Duration of the last save, in seconds; zero before it.
    pub last_save: f64,
}

impl WatchdogSettings {
    /// Returns the time that a rank at `pulse` may take without progress.
    pub fn limit(&self, pulse: &Pulse, pace: Pace) -> Duration {
        let seconds = match pulse.phase {
            Phase::Launch | Phase::Connect | Phase::Bootstrap | Phase::Open | Phase::Attention => {
                self.init_seconds
            }
            Phase::Read
            | Phase::Data
            | Phase::Draw
            | Phase::Forward
            | Phase::Backward
            | Phase::Reduce
            | Phase::Optimizer
            | Phase::Diagnose => match pulse.step > pace.first_step {
                true => self.step_seconds.max(self.step_medians * pace.step_median),
                false => self.first_step_seconds,
            },
            // They may be the first to compute their shapes.
            Phase::Validate | Phase::Sample => {
                self.first_step_seconds.max(self.step_medians * pace.step_median)
            }
            Phase::Compare
            | Phase::Snapshot
            | Phase::Write
            | Phase::Sync
            | Phase::Commit
            | Phase::Prune
            | Phase::Save => self.save_seconds.max(self.save_multiple * pace.last_save),
            Phase::Report => self.report_seconds,
            Phase::Finalize => self.finalize_seconds,
        };
        Duration::from_secs_f64(seconds)
    }

    /// Returns the time that ranks wait for each other when they connect: a little less than the
    /// watchdog's limit, because their own error names the missing ranks.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_secs_f64(0.9 * self.init_seconds)
    }

    /// Returns the time limit of one collective, for hangs that the watchdog does not end: twice
    /// the longest limit of a phase.
    pub fn operation_timeout(&self) -> Duration {
        Duration::from_secs_f64(2.0 * self.limits().into_iter().fold(0.0, f64::max))
    }

    fn limits(&self) -> [f64; 6] {
        [
            self.init_seconds,
            self.first_step_seconds,
            self.step_seconds,
            self.save_seconds,
            self.report_seconds,
            self.finalize_seconds,
        ]
    }

    /// Returns the time between two beats: a tenth of the shortest limit, within 0.01 to 1 s.
    pub fn beat_interval(&self) -> Duration {
        Duration::from_secs_f64(
            (self.limits().into_iter().fold(f64::INFINITY, f64::min) / 10.0).clamp(0.01, 1.0),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(phase: Phase, step: u64, step_median: f64, last_save: f64) -> f64 {
        let pulse = Pulse { step, phase, stage: None, collectives: 0, age: Duration::ZERO };
        WatchdogSettings::default()
            .limit(&pulse, Pace { first_step: 100, step_median, last_save })
            .as_secs_f64()
    }

    #[test]
    fn each_phase_has_its_limit_and_long_steps_and_saves_raise_theirs() {
        assert_eq!(limit(Phase::Connect, 0, 0.0, 0.0), 300.0);
        assert_eq!(limit(Phase::Forward, 100, 0.0, 0.0), 300.0, "the first step of a start");
        assert_eq!(
            limit(Phase::Forward, 101, 0.0, 0.0),
            60.0,
            "nobody has seen how long steps take"
        );
        assert_eq!(limit(Phase::Forward, 101, 0.2, 0.0), 60.0);
        assert_eq!(limit(Phase::Reduce, 101, 20.0, 100.0), 200.0);
        assert_eq!(limit(Phase::Validate, 101, 0.2, 0.0), 300.0);
        assert_eq!(limit(Phase::Validate, 101, 50.0, 0.0), 500.0);
        assert_eq!(limit(Phase::Sample, 101, 50.0, 0.0), 500.0);
        assert_eq!(limit(Phase::Save, 101, 0.2, 0.0), 600.0);
        assert_eq!(limit(Phase::Write, 101, 0.2, 20.0), 600.0);
        assert_eq!(limit(Phase::Save, 101, 0.2, 100.0), 1000.0);
    }

    #[test]
    fn ten_beats_fit_into_the_shortest_limit() {
        assert_eq!(WatchdogSettings::default().beat_interval(), Duration::from_secs(1));
        let short = WatchdogSettings { step_seconds: 3.0, ..WatchdogSettings::default() };
        assert_eq!(short.beat_interval(), Duration::from_millis(300));
    }
}
