//! Learning-rate schedules: pure functions of the step, so that a resume has nothing to restore.

mod constant;
mod cosine;
mod inverse_sqrt;
mod linear;
mod polynomial;
mod rex;
mod wsd;

pub use constant::Constant;
pub use cosine::Cosine;
pub use inverse_sqrt::InverseSqrt;
pub use linear::Linear;
pub use polynomial::Polynomial;
pub use rex::Rex;
pub use wsd::WarmupStableDecay;

use crate::registry::registry;
use crate::settings::{Family, settings};

/// A schedule scales the optimizer's peak learning rate.
pub trait LrSchedule {
    /// Factor for optimizer step `step`, which counts from 1 to `max_steps`.
    fn factor(&self, step: u64, max_steps: u64) -> f64;

    /// Steps of linear rise to the peak.
    fn warmup_steps(&self) -> u64;
}

registry! {
    /// `[lr_scheduler.<name>]`: one file, one line a schedule.
    pub enum LrScheduleChoice: LrSchedule {
        "constant" => Constant(Constant),
        "linear" => Linear(Linear),
        "cosine" => Cosine(Cosine),
        "polynomial" => Polynomial(Polynomial),
        "inverse_sqrt" => InverseSqrt(InverseSqrt),
        "rex" => Rex(Rex),
        "wsd" => WarmupStableDecay(WarmupStableDecay),
    }
}

/// The warning of a schedule that never reaches its peak within `max_steps`, because its warm-up is
/// too long for them.
pub fn warning(schedule: &LrScheduleChoice, max_steps: u64) -> Option<String> {
    let steps = schedule.warmup_steps();
    let reached = steps == 0 || schedule.factor(steps.min(max_steps), max_steps) >= 1.0;
    let name = schedule.name();
    (!reached)
        .then(|| format!("lr_scheduler.{name}.warmup_steps = {steps}: the learning rate never reaches its peak in max_steps = {max_steps}"))
}

settings! {
    /// A rise, then a fall to a floor: what schedules share that decay from their first step on.
    struct RiseAndFall {
        /// Steps of linear rise to the peak.
        warmup_steps: u64 = 0, in 0..;
        /// Share of the peak that is left at the last step.
        min_factor: f64 = 0.0, in 0.0..=1.0;
    }
}

impl RiseAndFall {
    /// Factor at `step`, where `remaining` maps the fall's progress in `[0, 1]` to what is left
    /// above the floor, 1 to 0.
    fn factor(&self, step: u64, max_steps: u64, remaining: impl Fn(f64) -> f64) -> f64 {
        warmup(step, self.warmup_steps).unwrap_or_else(|| {
            // The first step after the warm-up stands at the peak, also without a warm-up.
            let progress = progress(step, self.warmup_steps.max(1), max_steps);
            self.min_factor + (1.0 - self.min_factor) * remaining(progress)
        })
    }
}

/// Linear rise from 1/`steps` to 1 over the first `steps` steps, then none.
fn warmup(step: u64, steps: u64) -> Option<f64> {
    (step <= steps).then(|| step as f64 / steps as f64)
}

/// How far `step` is between `from` and `to`, within `[0, 1]`.
fn progress(step: u64, from: u64, to: u64) -> f64 {
    if to <= from {
        1.0
    } else {
        (step.saturating_sub(from) as f64 / (to - from) as f64).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schedule_rises_to_its_peak_and_never_leaves_zero_to_one() {
        for name in LrScheduleChoice::NAMES {
            let schedule = LrScheduleChoice::named(name).expect("a registered name");
            let factors: Vec<f64> = (1..=200).map(|step| schedule.factor(step, 200)).collect();
            assert!(
                factors.iter().all(|factor| (0.0..=1.0).contains(factor)),
                "{name}: {factors:?}"
            );
            assert!(factors.contains(&1.0), "{name} reaches its peak");
        }
    }

    #[test]
    fn a_warm_up_that_is_too_long_for_the_run_is_warned_of() {
        let warned = |name: &str, warmup_steps: u64, max_steps: u64| {
            let mut schedule = LrScheduleChoice::named(name).expect("a registered name");
            let text = format!("warmup_steps = {warmup_steps}");
            crate::settings::read_json(
                schedule.settings(),
                &text,
                &serde_json::Map::from_iter([("warmup_steps".into(), warmup_steps.into())]),
            )
            .expect("every schedule has a warm-up");
            warning(&schedule, max_steps)
        };
        for name in LrScheduleChoice::NAMES {
            assert_eq!(warned(name, 0, 100), None, "{name}");
            assert_eq!(warned(name, 80, 100), None, "{name}");
            let expected = format!(
                "lr_scheduler.{name}.warmup_steps = 200: the learning rate never reaches its peak in max_steps = 100"
            );
            assert_eq!(warned(name, 200, 100), Some(expected));
        }
        assert_eq!(warned("cosine", 100, 100), None, "the last step stands at the peak");
        assert!(warned("wsd", 100, 100).is_some(), "the decay has begun before");
    }

    #[test]
    fn decaying_schedules_end_at_their_floor() {
        for name in ["linear", "cosine", "polynomial", "rex", "wsd"] {
            let schedule = LrScheduleChoice::named(name).expect("a registered name");
            assert!((schedule.factor(200, 200) - 0.0).abs() < 1e-12, "{name}");
        }
    }
}
