//! Positions of values on an axis, and its tick marks.

/// Larger values count as infinite: their differences would overflow.
const LARGEST: f64 = 1e100;

/// True if an axis can show a value.
pub(super) fn showable(value: f64, log: bool) -> bool {
    value.is_finite() && value.abs() < LARGEST && (!log || value > 1.0 / LARGEST)
}

pub(super) struct Axis {
    low: f64,
    high: f64,
    log: bool,
    /// Values of the tick marks within the range, ascending.
    pub ticks: Vec<f64>,
}

impl Axis {
    /// From the smallest to the largest value without a margin: for steps.
    pub fn exact(values: impl Iterator<Item = f64>, wanted: usize) -> Self {
        let (low, high) = range(values, false);
        Axis { low, high, log: false, ticks: ticks(low, high, nice_step(low, high, wanted)) }
    }

    /// Extended to tick marks, and down to zero if that is near.
    pub fn rounded(values: impl Iterator<Item = f64>, wanted: usize) -> Self {
        let (mut low, mut high) = range(values, false);
        if low > 0.0 && low < 0.4 * high {
            low = 0.0;
        }
        let step = nice_step(low, high, wanted);
        (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        Axis { low, high, log: false, ticks: ticks(low, high, step) }
    }

    /// Logarithmic, with a small margin at both ends.
    pub fn logarithmic(values: impl Iterator<Item = f64>, wanted: usize) -> Self {
        let (low, high) = range(values, true);
        let room = (high / low).powf(0.04);
        let (low, high) = (low / room, high * room);
        let ticks = log_ticks(low, high, wanted);
        Axis { low, high, log: true, ticks }
    }

    /// Returns the position of `value`: 0 at the low end of the axis, 1 at the high end.
    pub fn share(&self, value: f64) -> f64 {
        match self.log {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        }
    }
}

/// Returns the smallest and largest showable value, widened if they are equal; 0 to 1 (1 to 10) if
/// there is none.
fn range(values: impl Iterator<Item = f64>, log: bool) -> (f64, f64) {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in values.filter(|&value| showable(value, log)) {
        (low, high) = (low.min(value), high.max(value));
    }
    match (low > high, log) {
        (true, true) => (1.0, 10.0),
        (true, false) => (0.0, 1.0),
        (false, true) if high < low * 1.01 => (low / 2.0, high * 2.0),
        // A constant lies in the upper half above zero, not in a range as narrow as a rounding
        // error.
        (false, false) if high - low <= 1e-9 * high.abs() => {
            (low.min(0.0), if high > 0.0 { high * 1.25 } else { 1.0 })
        }
        _ => (low, high),
    }
}

/// Returns 1, 2 or 5 times a power of ten that divides the range into about `wanted` parts.
fn nice_step(low: f64, high: f64, wanted: usize) -> f64 {
    let rough = (high - low) / wanted.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let factor =
        [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough * 0.75).unwrap_or(10.0);
    factor * power
}

fn ticks(low: f64, high: f64, step: f64) -> Vec<f64> {
    let first = (low / step - 1e-6).ceil();
    let count = ((high - low) / step + 1e-6).floor() as usize;
    let all = (0..=count).map(|i| (first + i as f64) * step);
    all.filter(|&tick| tick <= high + 1e-6 * step).collect()
}

/// Returns the sparsest set with enough ticks, from one every few decades to six in each; evenly
/// spaced ones for a smaller range.
fn log_ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let stride = ((last - first) as usize / (wanted + 2)).max(1);
    for factors in [&[1.0][..], &[1.0, 3.0], &[1.0, 2.0, 5.0], &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0]] {
        let decades = (first..=last).step_by(stride).map(|exponent| 10f64.powi(exponent));
        let marked = decades.flat_map(|decade| factors.iter().map(move |factor| factor * decade));
        let marked: Vec<f64> = marked.filter(|tick| (low..=high).contains(tick)).collect();
        if marked.len() >= 4 {
            return marked;
        }
    }
    ticks(low, high, nice_step(low, high, wanted))
}

/// Formats a number for an axis, as short as possible: `0.5`, `12k`, `2e-4`.
pub(super) fn number_text(value: f64) -> String {
    let size = value.abs();
    let (scaled, suffix) = match size {
        1e4..1e6 => (value / 1e3, "k"),
        1e6..1e9 => (value / 1e6, "M"),
        _ => (value, ""),
    };
    // Six digits are more than a chart resolves, and few enough to hide rounding errors of summed
    // steps.
    let rounded: f64 = format!("{scaled:.5e}").parse().unwrap_or(scaled);
    match size {
        0.0 => "0".into(),
        1e-3..1e9 => format!("{rounded}{suffix}"),
        _ => format!("{rounded:e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis::rounded([0.38, 2.5].into_iter(), 5);
        assert_eq!(axis.ticks, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);
        let steps = Axis::exact((1..=500).map(f64::from), 6);
        assert_eq!(steps.ticks, [100.0, 200.0, 300.0, 400.0, 500.0]);
        assert_eq!((steps.share(1.0), steps.share(500.0)), (0.0, 1.0));
    }

    #[test]
    fn a_range_far_from_zero_stays_there() {
        assert_eq!(
            Axis::rounded([812.0, 899.0].into_iter(), 5).ticks,
            [800.0, 820.0, 840.0, 860.0, 880.0, 900.0]
        );
    }

    #[test]
    fn log_ticks_are_few_at_any_span() {
        for (low, high) in [(0.38, 2.5), (1e-7, 1.0), (1e-90, 1e90), (0.99, 1.01), (3.0, 3.0)] {
            let axis = Axis::logarithmic([low, high].into_iter(), 5);
            assert!((2..=12).contains(&axis.ticks.len()), "{low}..{high}: {:?}", axis.ticks);
            assert!(axis.ticks.iter().all(|&tick| (-0.001..=1.001).contains(&axis.share(tick))));
        }
    }

    #[test]
    fn nothing_to_show_still_makes_an_axis() {
        for values in [
            vec![],
            vec![f64::NAN, f64::INFINITY],
            vec![0.0],
            vec![-3.0],
            vec![1e300],
            vec![5.0; 3],
        ] {
            for axis in [Axis::exact, Axis::rounded, Axis::logarithmic]
                .map(|make| make(values.iter().copied(), 5))
            {
                assert!(
                    (1..=12).contains(&axis.ticks.len())
                        && axis.ticks.iter().all(|tick| axis.share(*tick).is_finite()),
                    "{values:?}"
                );
            }
        }
    }

    #[test]
    fn numbers_are_short() {
        let texts =
            [0.0, 0.30000000000000004, 1500.0, 12_000.0, 3e-4, 1.5e-4, 2_500_000.0, -0.25, 1e12]
                .map(number_text);
        assert_eq!(texts, ["0", "0.3", "1500", "12k", "3e-4", "1.5e-4", "2.5M", "-0.25", "1e12"]);
    }
}
