//! The memory that a run is predicted to take, and the changes of its configuration that take less,
//! in the order in which to try them. The message when memory runs out quotes them.

use crate::assembly::attention::tokens_of_group;
use crate::assembly::order;
use crate::config::{MicroBatches, RunConfig};
use crate::data::Dataset;
use crate::error::{Place, Result};
use crate::failure::{MemoryChange, MemoryForecast};
use crate::nn::Stage;
use crate::nn::Tokens;
use crate::parallel::{DeviceChoice, Offload, Offloaded, Recompute, Sharding};
use crate::plan::RankMemory;
use crate::plan::data::trained_groups;
use crate::settings::{Choice, Value};

/// A configuration that differs from the run's, and the keys in which it does.
struct Changed {
    settings: String,
    config: RunConfig,
}

/// Predicts the memory of one of `world_size` ranks that train on this dataset, as
/// [`check`](crate::plan::check) does.
///
/// # Errors
/// As [`check`](crate::plan::check).
pub fn memory_forecast(
    config: &RunConfig,
    dataset: &Dataset,
    world_size: usize,
) -> Result<MemoryForecast> {
    let stages = config.stages()?;
    let groups = trained_groups(dataset, &order(config, dataset, world_size)?);
    let samples: Vec<Tokens> =
        groups.into_iter().map(|group| tokens_of_group(config, dataset, group)).collect();
    forecast(config, &stages, &samples, world_size)
}

/// `samples`: the tokens of each resolution group's.
fn forecast(
    config: &RunConfig,
    stages: &[Box<dyn Stage>],
    samples: &[Tokens],
    world_size: usize,
) -> Result<MemoryForecast> {
    let (largest, memory) = RankMemory::largest(config, stages, samples, world_size)?;
    let change = |Changed { settings, config }: Changed| {
        // A change that no run can honour is none.
        let (_, memory) = RankMemory::largest(&config, stages, samples, world_size).ok()?;
        let bytes = memory.on_device(&config.parallel, world_size as u64);
        config.parallel.problems().is_empty().then_some(MemoryChange { settings, bytes })
    };
    Ok(MemoryForecast {
        place: match config.parallel.device {
            DeviceChoice::Cpu => Place::Host,
            DeviceChoice::Cuda => Place::Gpu,
        },
        step: memory.on_device(&config.parallel, world_size as u64),
        changes: changes(config, samples[largest], world_size)
            .into_iter()
            .filter_map(change)
            .collect(),
        copy: memory.layout.copied_bytes(world_size),
        offloaded: memory.on_host(&config.parallel, world_size as u64),
    })
}

/// Returns the changes, those that cost least speed first; `largest`: the tokens of the samples
/// that take most memory.
fn changes(config: &RunConfig, largest: Tokens, world_size: usize) -> Vec<Changed> {
    let mut changes = Vec::new();
    changes.extend(with_recomputation(config));
    changes.extend(with_smaller_micro_batch(config, largest, world_size));
    if world_size > 1 {
        changes.extend(with_more_sharding(config));
    }
    if config.parallel.device == DeviceChoice::Cuda {
        changes.extend(with_more_offload(config));
    }
    changes
}

const ALWAYS: &str = "parallel.recompute = \"always\"";

fn with_recomputation(config: &RunConfig) -> Option<Changed> {
    let mut config = config.clone();
    let was = std::mem::replace(&mut config.parallel.recompute, Recompute::Always);
    (was != Recompute::Always).then(|| Changed { settings: ALWAYS.into(), config })
}

/// Divides the micro-batch by its smallest factor, and takes as many more of them.
fn with_smaller_micro_batch(
    config: &RunConfig,
    largest: Tokens,
    world_size: usize,
) -> Option<Changed> {
    let MicroBatches { count, samples } = config.micro_batches(largest, world_size).ok()?;
    let factor = (2..=samples).find(|factor| samples.is_multiple_of(*factor))?;
    let micro_batches = count * factor;
    let mut config = config.clone();
    if config.data.counts_tokens() {
        let tokens = (samples / factor) as i64 * (largest.image + largest.text);
        config.data.micro_batch_tokens_per_gpu = tokens;
        let settings = format!("data.micro_batch_tokens_per_gpu = {tokens}");
        return Some(Changed { settings, config });
    }
    config.data.micro_batch_size_per_gpu = Some(samples / factor);
    let mut settings = format!("data.micro_batch_size_per_gpu = {}", samples / factor);
    if config.train.global_batch_size.is_none()
        || config.train.gradient_accumulation_steps.is_some()
    {
        config.train.gradient_accumulation_steps = Some(micro_batches);
        settings += &format!(" and train.gradient_accumulation_steps = {micro_batches}");
    }
    Some(Changed { settings, config })
}

fn with_more_sharding(config: &RunConfig) -> Vec<Changed> {
    let more = Sharding::ALL
        .iter()
        .skip_while(|(_, sharding)| *sharding != config.parallel.sharding)
        .skip(1);
    more.map(|(word, sharding)| {
        let mut config = config.clone();
        config.parallel.sharding = *sharding;
        let mut settings = format!("parallel.sharding = \"{word}\"");
        if *sharding == Sharding::Parameters && config.parallel.recompute != Recompute::Always {
            config.parallel.recompute = Recompute::Always;
            settings += &format!(" and {ALWAYS}");
        }
        Changed { settings, config }
    })
    .collect()
}

fn with_more_offload(config: &RunConfig) -> Vec<Changed> {
    let held = config.parallel.offload;
    let is_useful = |word: Offloaded| {
        let is_vain = word == Offloaded::Frozen && config.tuning().is_whole();
        held.with(word) != held && !is_vain
    };
    let useful = Offloaded::ALL.iter().filter(|(_, word)| is_useful(*word));
    useful
        .map(|(word, offloaded)| {
            let mut config = config.clone();
            config.parallel.offload = held.with(*offloaded);
            let listed = || Value::shown(&config.parallel.offload).unwrap_or_default();
            let is_word = held == Offload::NONE || *offloaded == Offloaded::All;
            let words = if is_word { format!("\"{word}\"") } else { listed() };
            Changed { settings: format!("parallel.offload = {words}"), config }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: Tokens = Tokens { image: 16, text: 1 };

    /// The forecast of the demo's model on `ranks` ranks.
    fn forecast_of(ranks: usize, overrides: &[&str]) -> MemoryForecast {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        let config = RunConfig::read("test", "", &overrides).expect("a sound configuration");
        let stages = config.model.family.stages().expect("a sound model");
        forecast(&config, &stages, &[TOKENS], ranks).expect("a batch that divides")
    }

    fn settings(forecast: &MemoryForecast) -> Vec<&str> {
        forecast.changes.iter().map(|change| change.settings.as_str()).collect()
    }

    const CUDA: &str = "parallel.device=cuda";

    #[test]
    fn the_cheapest_change_comes_first() {
        let found = forecast_of(8, &[CUDA, "data.micro_batch_size_per_gpu=6"]);
        assert_eq!(
            settings(&found),
            [
                "parallel.recompute = \"always\"",
                "data.micro_batch_size_per_gpu = 3 and train.gradient_accumulation_steps = 2",
                "parallel.sharding = \"optimizer\"",
                "parallel.sharding = \"gradients\"",
                "parallel.sharding = \"parameters\" and parallel.recompute = \"always\"",
                "parallel.offload = \"optimizer\"",
            ]
        );
        assert!(found.changes.iter().all(|change| change.bytes < found.step), "{found:?}");
        assert_eq!((found.place, found.offloaded), (Place::Gpu, 0));
    }

    #[test]
    fn a_change_is_predicted_as_a_run_with_it() {
        let sets = [CUDA, "parallel.recompute=always", "model.dtype=bfloat16"];
        let found = forecast_of(4, &sets);
        for (settings, key) in [
            ("parallel.sharding = \"gradients\"", "parallel.sharding=gradients"),
            ("parallel.offload = \"all\"", "parallel.offload=all"),
        ] {
            let change = found.changes.iter().find(|change| change.settings == settings);
            let run = forecast_of(4, &[&sets[..], &[key]].concat());
            assert_eq!(change.expect("an offer").bytes, run.step, "{settings}");
        }
        assert!(forecast_of(4, &[&sets[..], &["parallel.offload=all"]].concat()).offloaded > 0);
    }

    #[test]
    fn what_is_taken_already_or_no_run_could_do_is_not_offered() {
        let full = ["parallel.recompute=always", "parallel.sharding=parameters"];
        let one = "data.micro_batch_size_per_gpu=1";
        assert!(settings(&forecast_of(2, &[&full[..], &[one]].concat())).is_empty());
        assert_eq!(settings(&forecast_of(1, &[one])), ["parallel.recompute = \"always\""]);
        let ordered = ["parallel.deterministic=true", "parallel.seed_scope=sample"];
        let found = forecast_of(1, &[&ordered[..], &["data.micro_batch_size_per_gpu=9"]].concat());
        // Three micro-batches are no power of two.
        assert_eq!(settings(&found), ["parallel.recompute = \"always\""]);
    }

    #[test]
    fn of_several_groups_the_one_that_takes_most_counts_and_fewer_tokens_are_offered() {
        let overrides = ["data.micro_batch_tokens_per_gpu=100", "train.global_batch_size=32"];
        let overrides = overrides.map(ToString::to_string);
        let config = RunConfig::read("test", "", &overrides).expect("a sound configuration");
        let stages = config.model.family.stages().expect("a sound model");
        let large = Tokens { image: 64, text: 1 };
        // Four of 17 tokens, and one of 65.
        let of = |samples: &[Tokens]| forecast(&config, &stages, samples, 1).expect("sound");
        let both = of(&[large, TOKENS]);
        assert_eq!(both.step, of(&[TOKENS]).step);
        assert!(both.step > of(&[large]).step);
        assert_eq!(settings(&both)[1], "data.micro_batch_tokens_per_gpu = 34");
    }

    #[test]
    fn a_smaller_micro_batch_keeps_the_global_batch() {
        let smaller = |overrides: &[&str]| settings(&forecast_of(2, overrides))[1].to_string();
        let both = |samples: usize, micro_batches: usize| {
            format!(
                "data.micro_batch_size_per_gpu = {samples} and \
                 train.gradient_accumulation_steps = {micro_batches}"
            )
        };
        let accumulated = "train.gradient_accumulation_steps=2";
        assert_eq!(smaller(&["data.micro_batch_size_per_gpu=9", accumulated]), both(3, 6));
        let global = ["data.micro_batch_size_per_gpu=8", "train.global_batch_size=32"];
        assert_eq!(smaller(&global), "data.micro_batch_size_per_gpu = 4");
        assert_eq!(smaller(&[&global[..], &[accumulated]].concat()), both(4, 4));
    }
}
