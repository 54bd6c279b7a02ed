//! A validation's numbers: in `metrics.jsonl`, in a line of the log, for TensorBoard and in the
//! report.

use serde_json::{Map, Value, json};

use crate::assembly::validation::ValidationSet;
use crate::flow::Levels;
use crate::report::{Chart, Figure, Series};
use crate::telemetry::metrics;
use crate::telemetry::tensorboard::EventValue;

/// The key of the loss, which every line of a validation has and no other.
pub const LOSS: &str = "validation_loss";
/// The reference's number, under the reference's name.
const OBJECTIVE: &str = "val_loss";

/// The losses of a validation, over all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    pub levels: Levels,
    /// Mean squared error at each noise level, over what masks keep.
    pub by_level: Vec<f64>,
    /// Mean of the losses at all noise levels.
    pub loss: f64,
    /// Mean of the objective of training, as the reference's `val_loss`.
    pub objective: f64,
    pub samples: u64,
    pub seconds: f64,
}

impl Judgement {
    /// `by_block`: a loss and what is kept of it for each noise level, then for the objective.
    pub(super) fn new(set: &ValidationSet, by_block: &[Vec<[f64; 2]>], seconds: f64) -> Self {
        let mean = |place: usize| {
            let sum = |part: usize| by_block.iter().map(|rows| rows[place][part]).sum::<f64>();
            sum(0) / sum(1)
        };
        let levels = set.levels.clone();
        let count = levels.values().len();
        let by_level: Vec<f64> = (0..count).map(mean).collect();
        let loss = by_level.iter().sum::<f64>() / count as f64;
        Judgement {
            levels,
            by_level,
            loss,
            objective: mean(count),
            samples: set.num_samples(),
            seconds,
        }
    }

    /// Returns the object of `metrics.jsonl`; a number that is not finite is null.
    pub fn metrics(&self, step: u64) -> Map<String, Value> {
        let word = self.levels.word();
        let of_levels = [
            (format!("validation_{word}s"), json!(self.levels.values())),
            (format!("validation_loss_per_{word}"), json!(self.by_level)),
        ];
        let others = [
            (LOSS, json!(self.loss)),
            (OBJECTIVE, json!(self.objective)),
            ("validation_samples", json!(self.samples)),
            ("validation_seconds", json!(self.seconds)),
        ];
        let others = others.map(|(key, value)| (key.to_string(), value));
        [("step".to_string(), json!(step))].into_iter().chain(others).chain(of_levels).collect()
    }

    /// Returns the numbers for TensorBoard by their tags.
    pub fn scalars(&self) -> Vec<(String, EventValue<'static>)> {
        let word = self.levels.word();
        let by_level = self.levels.labels().into_iter().zip(&self.by_level);
        let by_level = by_level.map(|(label, loss)| (format!("loss_{word}_{label}"), *loss));
        let whole = [("loss", self.loss), (OBJECTIVE, self.objective), ("seconds", self.seconds)];
        let whole = whole.map(|(name, number)| (name.to_string(), number));
        let scalar = |(name, number): (String, f64)| {
            (format!("validation/{name}"), EventValue::Scalar(number as f32))
        };
        whole.into_iter().chain(by_level).map(scalar).collect()
    }

    /// Returns the line of the log.
    pub fn line(&self, step: u64) -> String {
        let (word, labels) = (self.levels.word(), self.levels.labels());
        let by_level = labels.iter().zip(&self.by_level);
        let by_level: Vec<String> =
            by_level.map(|(label, loss)| format!("{label}: {loss:.4}")).collect();
        format!(
            "[VALIDATION {step}] loss {:.6} | by {word} {} | val_loss {:.6} | {} samples, {:.1} s",
            self.loss,
            by_level.join(", "),
            self.objective,
            self.samples,
            self.seconds
        )
    }
}

/// Returns the charts of a run's validations; none without validations.
pub fn figures(lines: &[Map<String, Value>]) -> Vec<Figure> {
    let validations: Vec<&Map<String, Value>> =
        lines.iter().filter(|line| line.contains_key(LOSS)).collect();
    let by_level = ["sigma", "quantile"].into_iter().find_map(|word| by_level(&validations, word));
    let over_run = (!validations.is_empty()).then(|| over_run(lines));
    over_run.into_iter().chain(by_level).map(Figure::Chart).collect()
}

fn over_run(lines: &[Map<String, Value>]) -> Chart {
    let series = [LOSS, OBJECTIVE]
        .map(|key| Series { name: key.into(), points: metrics::column(lines, key) });
    Chart {
        title: "Validation".into(),
        x_label: "step".into(),
        y_label: "of samples that are not trained on".into(),
        series: series.into(),
        log_y: false,
    }
}

/// Returns the losses of the first, the best and the last validation over their noise levels.
fn by_level(validations: &[&Map<String, Value>], word: &str) -> Option<Chart> {
    let curve = |line: &Map<String, Value>| {
        let numbers = |key: String| line.get(&key)?.as_array();
        let levels = numbers(format!("validation_{word}s"))?;
        let losses = numbers(format!("validation_loss_per_{word}"))?;
        let pairs = levels.iter().zip(losses);
        let mut points: Vec<(f64, f64)> =
            pairs.filter_map(|(level, loss)| Some((level.as_f64()?, loss.as_f64()?))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let step = line.get("step")?;
        Some((step.as_u64()?, Series { name: format!("step {step}"), points }))
    };
    let loss = |line: &&&Map<String, Value>| line.get(LOSS).and_then(Value::as_f64);
    let sound = validations.iter().filter(|line| loss(line).is_some());
    let best =
        sound.min_by(|a, b| loss(a).unwrap_or(f64::NAN).total_cmp(&loss(b).unwrap_or(f64::NAN)));
    let chosen = [validations.first(), best, validations.last()];
    let mut curves: Vec<(u64, Series)> =
        chosen.into_iter().flatten().filter_map(|line| curve(line)).collect();
    curves.dedup_by_key(|(step, _)| *step);
    (!curves.is_empty()).then(|| Chart {
        title: format!("Validation by {word}"),
        x_label: if word == "sigma" { "sigma (0 = data, 1 = noise)".into() } else { word.into() },
        y_label: "squared error".into(),
        series: curves.into_iter().map(|(_, series)| series).collect(),
        log_y: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judgement(levels: Levels) -> Judgement {
        Judgement {
            levels,
            by_level: vec![2.0, f64::NAN],
            loss: f64::NAN,
            objective: 0.5,
            samples: 7,
            seconds: 1.25,
        }
    }

    #[test]
    fn a_validation_has_one_line_in_each_place() {
        let found = judgement(Levels::Sigmas(vec![0.1, 0.125]));
        let line = Value::Object(found.metrics(40));
        assert_eq!(
            line,
            json!({
                "step": 40, "validation_loss": null, "val_loss": 0.5, "validation_samples": 7,
                "validation_seconds": 1.25, "validation_sigmas": [0.1, 0.125],
                "validation_loss_per_sigma": [2.0, null],
            })
        );
        assert_eq!(
            found.line(40),
            "[VALIDATION 40] loss NaN | by sigma 0.10: 2.0000, 0.125: NaN | val_loss 0.500000 | 7 samples, 1.2 s"
        );
        let tags: Vec<String> = found.scalars().into_iter().map(|(tag, _)| tag).collect();
        assert_eq!(
            tags,
            [
                "validation/loss",
                "validation/val_loss",
                "validation/seconds",
                "validation/loss_sigma_0.10",
                "validation/loss_sigma_0.125"
            ]
        );
        let quantiles = judgement(Levels::Quantiles(vec![0.5, 0.75])).metrics(0);
        assert!(quantiles.contains_key("validation_loss_per_quantile"));
    }

    #[test]
    fn the_report_shows_the_first_the_best_and_the_last() {
        let line = |step: u64, loss: f64| {
            let found = Judgement {
                by_level: vec![loss, 2.0 * loss],
                loss,
                ..judgement(Levels::Sigmas(vec![0.5, 0.1]))
            };
            found.metrics(step)
        };
        let training =
            Map::from_iter([("step".to_string(), json!(3)), ("loss".into(), json!(1.0))]);
        assert!(figures(std::slice::from_ref(&training)).is_empty());
        let lines = [line(0, 3.0), training, line(4, 1.0), line(8, 2.0), line(9, 2.5)];
        let figures = figures(&lines);
        let [Figure::Chart(over_run), Figure::Chart(by_level)] = &figures[..] else {
            panic!("two charts")
        };
        assert_eq!(over_run.series[0].points, [(0.0, 3.0), (4.0, 1.0), (8.0, 2.0), (9.0, 2.5)]);
        let names: Vec<&str> = by_level.series.iter().map(|series| series.name.as_str()).collect();
        assert_eq!(names, ["step 0", "step 4", "step 9"]);
        assert_eq!(by_level.series[1].points, [(0.1, 2.0), (0.5, 1.0)], "in the order of sigma");
    }
}
