//! Meters: seconds by phase, throughput over a window, durations as text, peak memory.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Seconds by phase of a step. Each lap assigns the time since the previous lap to a phase, so that
/// no time is counted twice.
pub struct Stopwatch {
    lap_began: Instant,
    /// Seconds by phase, in order of first use.
    phases: Vec<(&'static str, f64)>,
}

impl Stopwatch {
    pub fn start() -> Self {
        Stopwatch { lap_began: Instant::now(), phases: Vec::new() }
    }

    /// Adds the time since the last lap to `phase`, e.g. `data`, `draw`, `forward`, `backward`,
    /// `reduce`, `optimizer`.
    pub fn lap(&mut self, phase: &'static str) {
        self.lap_at(Instant::now(), phase);
    }

    fn lap_at(&mut self, now: Instant, phase: &'static str) {
        let seconds = now.saturating_duration_since(self.lap_began).as_secs_f64();
        self.lap_began = now;
        match self.phases.iter_mut().find(|(name, _)| *name == phase) {
            Some((_, sum)) => *sum += seconds,
            None => self.phases.push((phase, seconds)),
        }
    }

    /// Returns the seconds of one phase so far.
    pub fn seconds(&self, phase: &str) -> f64 {
        self.phases.iter().find(|(name, _)| *name == phase).map_or(0.0, |(_, seconds)| *seconds)
    }

    /// Returns the seconds of each phase since the last call, and resets them.
    pub fn take(&mut self) -> Vec<(&'static str, f64)> {
        std::mem::take(&mut self.phases)
    }
}

/// Amount per second over the last records, e.g. samples over the last hundred steps.
pub struct Throughput {
    window: usize,
    /// Time of each record, and the amount since the previous one.
    records: VecDeque<(Instant, f64)>,
}

impl Throughput {
    /// Averages over `window` intervals.
    pub fn new(window: usize) -> Self {
        Throughput { window: window.max(1), records: VecDeque::new() }
    }

    pub fn record(&mut self, amount: f64) {
        self.record_at(Instant::now(), amount);
    }

    pub(super) fn record_at(&mut self, now: Instant, amount: f64) {
        self.records.push_back((now, amount));
        if self.records.len() > self.window + 1 {
            self.records.pop_front();
        }
    }

    /// Leaves out a time since the last record that belongs to none of the amounts.
    pub fn leave_out(&mut self, time: Duration) {
        self.records.iter_mut().for_each(|(when, _)| *when += time);
    }

    /// `None` before the second record: the first one only starts the clock.
    pub fn per_second(&self) -> Option<f64> {
        let (first, _) = self.records.front()?;
        let (last, _) = self.records.back()?;
        let seconds = last.duration_since(*first).as_secs_f64();
        let amount: f64 = self.records.iter().skip(1).map(|(_, amount)| amount).sum();
        (seconds > 0.0).then(|| amount / seconds)
    }
}

/// Formats a duration: `45 s`, `12 min`, `1 h 04 min`, `2 d 03 h`; rounded down, but at least `1
/// s`.
pub fn duration_text(seconds: f64) -> String {
    // `as` saturates, so that an infinite or undefined time gives a text too.
    let seconds = seconds.max(1.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min"),
        3600..86400 => format!("{hours} h {:02} min", minutes % 60),
        _ => format!("{days} d {:02} h", hours % 24),
    }
}

/// Returns the peak resident memory of this process in bytes; `None` if the system does not report
/// it.
pub fn peak_resident_bytes() -> Option<u64> {
    peak_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_is_left_out_is_in_no_speed() {
        let (mut speed, start) = (Throughput::new(5), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        speed.record_at(at(0), 0.0);
        speed.record_at(at(2), 8.0);
        speed.leave_out(Duration::from_secs(100));
        speed.record_at(at(104), 8.0);
        assert_eq!(speed.per_second(), Some(4.0));
    }

    #[test]
    fn laps_add_up_to_the_time_that_passed() {
        let mut watch = Stopwatch::start();
        let start = watch.lap_began;
        for (seconds, phase) in [(1, "data"), (3, "forward"), (4, "data"), (9, "backward")] {
            watch.lap_at(start + Duration::from_secs(seconds), phase);
        }
        assert_eq!(watch.take(), [("data", 2.0), ("forward", 2.0), ("backward", 5.0)]);
        assert!(watch.take().is_empty());
    }

    #[test]
    fn throughput_forgets_what_left_the_window() {
        let (start, mut meter) = (Instant::now(), Throughput::new(2));
        meter.record_at(start, 1000.0);
        assert_eq!(meter.per_second(), None);
        for (second, amount) in [(10, 1.0), (11, 8.0), (12, 12.0)] {
            meter.record_at(start + Duration::from_secs(second), amount);
        }
        assert_eq!(meter.per_second(), Some(10.0));
    }

    #[test]
    fn durations_read_like_a_clock() {
        let texts = [0.2, 45.9, 724.0, 3840.0, 183_600.0].map(duration_text);
        assert_eq!(texts, ["1 s", "45 s", "12 min", "1 h 04 min", "2 d 03 h"]);
        assert_eq!(duration_text(f64::NAN), "1 s");
    }

    #[test]
    fn peak_memory_is_read_in_bytes() {
        assert_eq!(peak_of("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2 << 20));
        assert_eq!(peak_of("Name:\tx\n"), None);
        assert!(peak_resident_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
