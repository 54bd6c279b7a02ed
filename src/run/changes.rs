//! Compares configurations key by key: the keys that a checkpoint records, and the differences
//! between two records.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use crate::config::RunConfig;
use crate::settings::{self, Family};

/// TOML texts of values by dotted key. An unset key has no entry.
pub type Values = BTreeMap<String, String>;

/// Keys and tables that a checkpoint does not record: their values do not change the checkpoint
/// that the same steps give, or the manifest holds their effect under another name.
const UNRECORDED: [&str; 26] = [
    "seed",
    "max_steps",
    "max_epochs",
    "output_dir",
    "model.path",
    "model.init",
    "lora.init",
    "lora.init_from",
    "lora.export",
    "flow_matching.log_interval",
    "flow_matching.summary_log_interval",
    "data.path",
    "data.follow_links",
    "data.datasets",
    "data.micro_batch_size_per_gpu",
    "data.micro_batch_tokens_per_gpu",
    "data.prefetch",
    "validation",
    "train.global_batch_size",
    "train.gradient_accumulation_steps",
    "parallel",
    "checkpoint",
    "watchdog",
    "sampling",
    "log",
    "debug",
];

/// Advice at the end of an error about a changed model.
const INSTEAD: &str = "set it back, or begin a new run";

/// Keys and tables that decide which function low-rank changes are, whatever the shapes of their
/// matrices.
const OF_CHANGES: [&str; 6] = [
    "lora.rank",
    "lora.alpha",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.use_rslora",
    "lora.use_dora",
];

/// Keys of these tables that are recorded: one changes the random draws, one what is trained on.
const RECORDED: [&str; 2] = ["parallel.seed_scope", HELD_OUT];

/// The key of the samples that are never trained on.
const HELD_OUT: &str = "validation.share";

/// Returns every set key of a configuration.
pub fn values(config: &RunConfig) -> Values {
    flattened(&config.to_toml())
}

/// Returns every set key of a TOML text.
///
/// # Panics
/// If the text is not TOML.
pub fn flattened(text: &str) -> Values {
    let mut values = Values::new();
    flatten("", &toml::from_str(text).expect("a listing is TOML"), &mut values);
    values
}

fn flatten(path: &str, table: &Table, values: &mut Values) {
    for (name, value) in table {
        let name = settings::key_text(name);
        let path = if path.is_empty() { name } else { format!("{path}.{name}") };
        match value {
            Value::Table(table) => flatten(&path, table, values),
            other => drop(values.insert(path, other.to_string())),
        }
    }
}

/// Returns every key of a run's `config.toml`, which an earlier release may have written: missing
/// keys get their defaults. `None` if the text is empty or not TOML.
pub fn values_of_listing(text: &str) -> Option<Values> {
    let table = settings::table(text).filter(|table| !table.is_empty())?;
    let mut config = RunConfig::default();
    match settings::read_listing(&mut config, "the listing", text) {
        Ok(()) => Some(values(&config)),
        // The text has keys that this release does not know.
        Err(_) => {
            let mut values = Values::new();
            flatten("", &table, &mut values);
            Some(values)
        }
    }
}

/// Returns the keys that a checkpoint records.
pub fn recorded(config: &RunConfig) -> Values {
    only_recorded(values(config))
}

fn only_recorded(values: Values) -> Values {
    values.into_iter().filter(|(key, _)| is_recorded(key)).collect()
}

fn is_recorded(key: &str) -> bool {
    RECORDED.contains(&key) || !UNRECORDED.iter().any(|unrecorded| is_below(key, unrecorded))
}

/// True for a key or table, and for every key in that table.
fn is_below(key: &str, table: &str) -> bool {
    key.strip_prefix(table).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Returns a run's listing with the checkpoint's recorded values in place of its own for all keys
/// that a checkpoint records.
pub fn with_record(listing: &Values, record: &Values) -> Values {
    let others = listing
        .iter()
        .filter(|(key, _)| !is_recorded(key))
        .map(|(key, value)| (key.clone(), value.clone()));
    others.chain(completed(record)).collect()
}

/// Returns the text that a key holds.
pub fn text_of(values: &Values, key: &str) -> Option<String> {
    let table = settings::table(&format!("value = {}", values.get(key)?))?;
    table.get("value").and_then(Value::as_str).map(ToString::to_string)
}

/// Returns a checkpoint's record, with defaults for the keys that were added since it was written.
pub fn completed(record: &Values) -> Values {
    let text: String = record.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
    values_of_listing(&text).map_or_else(|| record.clone(), only_recorded)
}

/// Lists the keys whose values differ, each with both values: `optimizer.adamw.lr: was 0.1, is
/// 0.2`.
pub fn listed(was: &Values, is: &Values) -> Vec<String> {
    let shown =
        |values: &Values, key: &str| values.get(key).cloned().unwrap_or_else(|| "unset".into());
    let keys: BTreeSet<&String> = was.keys().chain(is.keys()).collect();
    let differing = keys.into_iter().filter(|key| was.get(*key) != is.get(*key));
    differing.map(|key| format!("{key}: was {}, is {}", shown(was, key), shown(is, key))).collect()
}

/// Returns the difference between a record's share of held-out samples and the configured one.
pub fn other_share(record: &Values, config: &RunConfig) -> Option<String> {
    let of = |values: &Values| values.get(HELD_OUT).cloned().unwrap_or_else(|| "unset".into());
    let (was, now) = (of(record), of(&values(config)));
    (was != now).then(|| format!("{HELD_OUT} is {now}, the checkpoint's was {was}"))
}

/// Compares a recorded architecture with the configured one. Returns the differing keys as a reason
/// to refuse the recorded parameters; `None` if the architectures are equal. Every key of
/// `[model.<family>]`, and those of `[lora]` that scale, change the function that the model
/// computes, even where all shapes stay the same.
pub fn other_architecture(record: &Values, config: &RunConfig) -> Option<String> {
    let family = config.model.family.name();
    let family_keys = |values: &Values| -> Values {
        let is_of_model = |key: &str| {
            key.strip_prefix("model.").is_some_and(|rest| rest.contains('.'))
                || OF_CHANGES.iter().any(|table| is_below(key, table))
        };
        values
            .iter()
            .filter(|(key, _)| is_of_model(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    let (was, is) = (family_keys(&completed(record)), family_keys(&values(config)));
    let own = format!("model.{family}.");
    if let Some(other) = was.keys().find(|key| key.starts_with("model.") && !key.starts_with(&own))
    {
        let other = other.split('.').nth(1).unwrap_or_default();
        return Some(format!("the model is `{family}`, the checkpoint's was `{other}`; {INSTEAD}"));
    }
    let keys: BTreeSet<&String> =
        was.keys().chain(is.keys()).filter(|key| was.get(*key) != is.get(*key)).collect();
    let shown =
        |values: &Values, key: &str| values.get(key).cloned().unwrap_or_else(|| "unset".into());
    let texts: Vec<String> = keys
        .iter()
        .map(|key| {
            format!("{key} is {}, the checkpoint's was {}", shown(&is, key), shown(&was, key))
        })
        .collect();
    (!texts.is_empty()).then(|| format!("{}: another model; {INSTEAD}", texts.join(", ")))
}

/// Returns a warning if the learning rate jumps where a run resumes after `step`: the schedule does
/// not give `last`, the learning rate of that step. `update` is the optimizer's own number of that
/// step.
pub fn jump_of_lr(config: &RunConfig, last: f64, step: u64, update: u64) -> Option<String> {
    let lr = |update: u64| {
        config.optimizer.rule.lr() * config.lr_scheduler.factor(update, config.max_steps)
    };
    let continues = (lr(update) - last).abs() <= 1e-9 * last.abs().max(lr(update));
    let (before, after) = (short(last), short(lr(update + 1)));
    (!continues).then(|| {
        format!("the learning rate jumps: step {step} had {before}, step {} has {after}", step + 1)
    })
}

/// Formats a number with five significant digits.
fn short(number: f64) -> String {
    let rounded: f64 = format!("{number:.4e}").parse().expect("a number that was just written");
    if rounded == 0.0 { "0".into() } else { format!("{rounded:e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(overrides: &[&str]) -> RunConfig {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        RunConfig::read("test", crate::config::DEFAULT, &overrides).unwrap()
    }

    #[test]
    fn keys_that_differ_are_listed_with_both_values() {
        let (was, is) =
            (config(&[]), config(&["optimizer.adamw.lr=0.5", "checkpoint.keep_every=7"]));
        assert_eq!(
            listed(&values(&was), &values(&is)),
            ["checkpoint.keep_every: was unset, is 7", "optimizer.adamw.lr: was 0.002, is 0.5"]
        );
        assert!(listed(&values(&was), &values(&was)).is_empty());
    }

    #[test]
    fn a_record_holds_what_is_computed_and_nothing_of_where_and_how_fast() {
        let elsewhere = [
            "output_dir=x",
            "max_steps=7",
            "parallel.sharding=gradients",
            "parallel.num_threads=2",
            "data.micro_batch_size_per_gpu=4",
            "data.datasets=[{path='a', weight=2}, {path='b', weight=1}]",
            "checkpoint.keep_last=9",
            "log.level=debug",
            "flow_matching.log_interval=3",
        ];
        assert_eq!(recorded(&config(&elsewhere)), recorded(&config(&[])));
        for other in [
            "model.dtype=bfloat16",
            "compute.kernels=plain",
            "parallel.seed_scope=rank",
            "flow_matching.draws=device",
            "data.on_small_group=repeat",
            "optimizer.adamw.lr=1.0",
            "model.dit.num_heads=2",
        ] {
            assert_ne!(recorded(&config(&[other])), recorded(&config(&[])), "{other}");
        }
    }

    #[test]
    fn another_architecture_is_named_by_its_keys_or_its_family() {
        let record = recorded(&config(&["model.dit.num_heads=2"]));
        assert_eq!(
            other_architecture(
                &record,
                &config(&["model.dit.num_heads=2", "model.dtype=bfloat16"])
            ),
            None
        );
        assert_eq!(
            other_architecture(&record, &config(&[])).unwrap(),
            "model.dit.num_heads is 4, the checkpoint's was 2: another model; set it back, or begin a new run"
        );
        let wan = Values::from([("model.wan.num_layers".into(), "2".into())]);
        assert_eq!(
            other_architecture(&wan, &config(&[])).unwrap(),
            "the model is `dit`, the checkpoint's was `wan`; set it back, or begin a new run"
        );
    }

    #[test]
    fn a_key_that_a_record_lacks_has_its_default() {
        let mut record = recorded(&config(&["model.dit.mlp_ratio=4"]));
        record.remove("model.dit.mlp_ratio").unwrap();
        assert_eq!(other_architecture(&record, &config(&["model.dit.mlp_ratio=4"])), None);
        assert!(other_architecture(&record, &config(&["model.dit.mlp_ratio=2"])).is_some());
    }

    #[test]
    fn a_learning_rate_that_goes_on_as_it_was_led_is_no_jump() {
        let scheduled = |max_steps: u64| {
            config(&[&format!("max_steps={max_steps}"), "lr_scheduler.cosine.warmup_steps=0"])
        };
        let lr = |config: &RunConfig, step| {
            config.optimizer.rule.lr() * config.lr_scheduler.factor(step, config.max_steps)
        };
        let (short, long) = (scheduled(8), scheduled(16));
        assert_eq!(jump_of_lr(&short, lr(&short, 5), 5, 5), None);
        let jump = jump_of_lr(&long, lr(&short, 8), 8, 8).unwrap();
        assert_eq!(jump, "the learning rate jumps: step 8 had 0, step 9 has 8.9547e-4");
    }
}
