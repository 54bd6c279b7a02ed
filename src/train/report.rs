//! Writes `report.html`, `loss.png` and `samples.png` at the end of a run.

use serde_json::{Map, Value};

use crate::collective::agreement::{agreed, on_rank_zero};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::parallel::Replica;
use crate::report::{Bars, Chart, Figure, ReportData, Series, grid_png, write_report};
use crate::run::requests::{Request, Requests};
use crate::sample::Scheduler;
use crate::sample::conditions::Origin;
use crate::sample::generate::Plan;
use crate::telemetry::metrics;
use crate::telemetry::tensorboard::EventValue;
use crate::train::sampling;
use crate::train::trainer::Trainer;
use crate::train::validation;

/// Size of `loss.png` in pixels.
const LOSS_PICTURE: (u32, u32) = (1200, 560);

/// Draws the run from its own `metrics.jsonl` on rank 0, with samples that all ranks generate,
/// since each may hold only a part of the model. The samples are left out if a rank is requested to
/// stop meanwhile.
pub fn write(trainer: &mut Trainer<'_>, requests: &Requests) -> Result<()> {
    let collective = trainer.collective;
    let samples = match drawn_samples(trainer, &|| requests.go_on_together(collective)) {
        Err(Error::Stopped { .. }) => {
            let run = trainer.folder.path().display();
            tracing::info!(
                "asked to stop after the last step: the report has no samples; \
                 `fm-dist sample --run {run}` draws them"
            );
            requests.done(Request::Stop);
            Ok(None)
        }
        // All ranks have already agreed on this error.
        Err(error @ Error::Peer { .. }) => return Err(error),
        drawn => drawn,
    };
    let samples = agreed(samples, collective)?;
    if let Some((_, picture)) = &samples {
        let step = trainer.manifest.step;
        trainer.events.append(step, || vec![("samples".into(), EventValue::Png(picture))]);
    }
    on_rank_zero(collective, || draw(trainer, samples).map(|()| String::new())).map(drop)
}

/// A caption and a PNG.
type Picture = (String, Vec<u8>);

fn draw(trainer: &Trainer<'_>, samples: Option<Picture>) -> Result<()> {
    let Trainer { config, replica, dataset, .. } = trainer;
    let path = trainer.folder.path();
    let lines = metrics::read(&path.join("metrics.jsonl"))?;
    let loss = curve("Loss", "weighted, over all ranks", "loss", &lines);
    loss.write_png(&path.join("loss.png"), LOSS_PICTURE.0, LOSS_PICTURE.1)?;
    let of_training = [
        Figure::Bars(loss_per_sigma(&lines)),
        Figure::Chart(curve("Learning rate", "", "lr", &lines)),
        Figure::Chart(curve("Gradient norm", "before clipping", "grad_norm", &lines)),
        Figure::Chart(curve(
            "Throughput",
            "samples a second, over all ranks",
            "samples_per_second",
            &lines,
        )),
    ];
    let first = [Figure::Chart(loss)].into_iter();
    let figures = first.chain(validation::figures(&lines)).chain(of_training).collect();
    let data = ReportData {
        title: format!("fm-dist: {}", path.file_name().unwrap_or_default().to_string_lossy()),
        summary: format!("Flow matching on {}.", dataset.name()),
        facts: facts(config, replica, &lines, trainer.collective.world_size()),
        figures,
        samples,
        history: sampling::row(path),
        configuration: config.to_toml(),
    };
    write_report(&path.join("report.html"), &data)
}

/// Generates pictures for each of the dataset's conditions, with averaged weights if there are any;
/// `None` if it names no conditions or its latents are not pictures.
fn drawn_samples(
    trainer: &mut Trainer<'_>,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Option<Picture>> {
    let Trainer { config, replica, dataset, device, optimizer_state, .. } = trainer;
    let Some(conditions) = dataset.conditions()? else { return Ok(None) };
    let origin = Origin::from_dataset(dataset, conditions, None);
    if !origin.is_of_pictures() {
        let shape = &origin.shape;
        if !config.sampling.prompts.is_empty() {
            return Ok(None);
        }
        tracing::info!(
            "report without samples: latents {shape:?} are no pictures, which have 1 or 3 channels; `fm-dist sample` writes them"
        );
        return Ok(None);
    }
    let plan = Plan::new(config, &origin, Scheduler::of(config)?.as_ref(), *device)?;
    let samples = optimizer_state.with_averages(replica, |replica| {
        plan.generate(replica, config.sampling.per_condition, go_on)
    })?;
    let averaged = if config.ema.is_on() { ", of the averaged weights (EMA)" } else { "" };
    let caption = format!("{} samples for each condition{averaged}", samples.per_condition);
    Ok(Some((
        caption,
        grid_png(&samples.images, &samples.names, samples.per_condition as usize, None),
    )))
}

fn curve(title: &str, unit: &str, key: &str, lines: &[Map<String, Value>]) -> Chart {
    let series = Series { name: key.into(), points: metrics::column(lines, key) };
    Chart {
        title: title.into(),
        x_label: "step".into(),
        y_label: unit.into(),
        series: vec![series],
        log_y: false,
    }
}

/// Returns the loss in each tenth of sigma, at the start of the run and at its end.
fn loss_per_sigma(lines: &[Map<String, Value>]) -> Bars {
    let bin_of = |line: &Map<String, Value>, bin: usize| {
        let loss = line.get("loss_per_sigma")?.get(bin)?.as_f64()?;
        Some((line.get("step")?.as_f64()?, loss))
    };
    let bins: Vec<Vec<(f64, f64)>> = (0..crate::flow::SIGMA_BINS)
        .map(|bin| lines.iter().filter_map(|line| bin_of(line, bin)).collect())
        .collect();
    Bars::over_run(
        "Loss by noise level",
        "sigma (0 = data, 1 = noise)",
        "unweighted loss",
        (0.0, 1.0),
        &bins,
    )
}

fn facts(
    config: &RunConfig,
    replica: &Replica<'_>,
    lines: &[Map<String, Value>],
    ranks: usize,
) -> Vec<(String, String)> {
    // Lines of validations have other keys.
    let last = |key: &str| {
        lines.iter().rev().find_map(|line| line.get(key)).map_or("-".into(), Value::to_string)
    };
    let seconds: f64 = metrics::column(lines, "step_seconds").iter().map(|point| point.1).sum();
    let facts = [
        ("steps", last("step")),
        ("samples seen", last("samples_seen")),
        ("parameters", replica.num_parameters().to_string()),
        ("ranks", ranks.to_string()),
        ("time in steps", crate::telemetry::duration_text(seconds)),
        ("seed", config.seed.to_string()),
        ("version", env!("CARGO_PKG_VERSION").into()),
    ];
    facts.into_iter().map(|(name, value)| (name.into(), value)).collect()
}
