//! A run's attention on GPUs: its cases, from the configuration and the data, and the choice of
//! backends.

use std::sync::Arc;

use super::dataset;
use super::validation::ValidationSet;
use crate::attention::{Case, Findings, NodeReport, Trial, asked, cases_of, common, lines};
use crate::collective::Collective;
use crate::collective::agreement::agreed;
use crate::config::RunConfig;
use crate::data::{Dataset, Group};
use crate::error::Result;
use crate::flow::{Note, Role};
use crate::nn::Tokens;
use crate::nn::attention::choose;

/// Key of the text `[B, L, D]` in batches and conditions.
pub const TEXT: &str = "text_embeddings";

/// Stands for the samples where the number of tokens does not matter.
const SOME_TOKENS: Tokens = Tokens { image: 4096, text: 512 };

/// Returns the tokens of a group's samples, with the longest text.
pub fn tokens_of_group(config: &RunConfig, dataset: &Dataset, group: &Group) -> Tokens {
    tokens_of_sample(config, &dataset.latent_shape(group), text_tokens(dataset, group))
}

/// Returns the number of a sample's text tokens, with padding; `None` if samples have no text.
fn text_tokens(dataset: &Dataset, group: &Group) -> Option<i64> {
    dataset.sample_shapes(group).get(TEXT).and_then(|shape| shape.first()).copied()
}

/// Returns the tokens of a sample of `latents` `[C, (F,) H, W]` and so many text tokens.
pub fn tokens_of_sample(config: &RunConfig, latents: &[i64], text: Option<i64>) -> Tokens {
    Tokens { image: config.model.family.image_tokens(latents), text: text.unwrap_or(0) }
}

/// Returns the tokens of every resolution group of the configured data, that to train on and that
/// to judge by; none if they cannot be opened, which ends the run where it opens them to train.
pub fn tokens_of_data(config: &RunConfig) -> Vec<Tokens> {
    let Ok(trained) = dataset(config).map(Arc::new) else { return Vec::new() };
    let judged = ValidationSet::of(config, &trained).ok().flatten().map(|set| set.dataset);
    let others = judged.filter(|judged| !Arc::ptr_eq(judged, &trained));
    let tokens = |dataset: Arc<Dataset>| {
        let of_group = |group: &Group| tokens_of_group(config, &dataset, group);
        dataset.groups().iter().map(of_group).collect::<Vec<_>>()
    };
    [trained].into_iter().chain(others).flat_map(tokens).collect()
}

fn cases(config: &RunConfig, samples: &[Tokens]) -> Result<Vec<Case>> {
    let stages = config.stages()?;
    let attentions = stages.iter().flat_map(|stage| stage.params().attentions());
    let keys = config.flow_matching.adapter.build().keys();
    let has_masks = keys.iter().any(|key| key.role == Role::TokenMask);
    Ok(cases_of(attentions, samples, config.model.dtype.kind(), has_masks))
}

/// Chooses this process's backends of attention on GPUs, and returns what the log says of them.
/// With `auto`, the first rank of each node tries them on its GPU, which no rank may have opened
/// yet. `samples`: the tokens of the run's samples, read where a trial needs them.
///
/// # Errors
/// Errors of the model's settings and of the collective.
///
/// # Ordering
/// Every rank of `world` calls it, before it opens its GPU. `gpu`: its number within its node.
pub fn choose_attention(
    config: &RunConfig,
    samples: impl FnOnce() -> Vec<Tokens>,
    gpu: usize,
    world: &dyn Collective,
) -> Result<Vec<Note>> {
    let (decision, mut notes) = match config.compute.attention.backend() {
        Some(backend) => (asked(backend, &cases(config, &[SOME_TOKENS])?), Vec::new()),
        None => {
            let own = (gpu == 0).then(|| tried(config, &samples())).transpose();
            let own = agreed(own, world)?;
            let report = own.as_ref().map(|own| &own.report);
            (common(report, world)?, own.map_or_else(Vec::new, |own| own.notes))
        }
    };
    choose(decision.choice);
    notes.extend(decision.lines.into_iter().map(Note::Information));
    notes.extend(decision.warnings.into_iter().map(Note::Warning));
    Ok(notes)
}

/// A node's trial: its report for all ranks, and its own notes for the log.
struct NodeTrial {
    report: NodeReport,
    notes: Vec<Note>,
}

fn tried(config: &RunConfig, samples: &[Tokens]) -> Result<NodeTrial> {
    let trial = Trial::on_gpu(0);
    Ok(match trial.run(&cases(config, samples)?) {
        Ok(Findings { tried, not_kept }) => {
            let not_kept = not_kept.map(|why| {
                Note::Warning(format!("attention will be tried anew at the next start: {why}"))
            });
            let lines = lines(&tried).into_iter().map(Note::Information);
            NodeTrial {
                report: NodeReport::new(&trial.machine, &tried),
                notes: lines.chain(not_kept).collect(),
            }
        }
        // A GPU that cannot be opened ends the run where it is opened to train.
        Err(why) => NodeTrial { report: NodeReport::unavailable(&why), notes: Vec::new() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Precision;

    /// Sizes of the cases of a family's default model with 1024 image and 512 text tokens: queries,
    /// keys, true with a mask.
    fn sizes(family: &str, adapter: &str) -> Vec<(i64, i64, bool)> {
        let text = format!("[model.{family}]\n[flow_matching]\n{adapter}");
        let config = RunConfig::read("test", &text, &[]).expect("a sound configuration");
        let cases = cases(&config, &[Tokens { image: 1024, text: 512 }]).expect("a sound model");
        assert!(cases.iter().all(|case| case.precision == Precision::Float32));
        cases.iter().map(|case| (case.queries, case.keys, case.masked)).collect()
    }

    #[test]
    fn each_family_tries_what_its_blocks_compute_and_masks_where_the_adapter_reads_them() {
        let joint = [(1536, 1536, false)];
        let masked =
            [(1536, 1536, false), (1536, 1536, true), (1472, 1472, false), (1472, 1472, true)];
        for family in ["flux", "qwen_image"] {
            let adapter = format!("adapter_type = \"{family}\"\n");
            assert_eq!(sizes(family, &adapter), joint, "{family}");
            let with_mask = adapter + "adapter.use_text_mask = true\n";
            assert_eq!(sizes(family, &with_mask), masked, "{family}");
        }
        assert_eq!(sizes("flux2", "adapter_type = \"flux2\"\n"), joint);
        let wan = [(1024, 1024, false), (1024, 512, false)];
        assert_eq!(sizes("wan", "adapter_type = \"simple\"\n"), wan);
        let hunyuan = sizes("hunyuan_video15", "adapter_type = \"hunyuan\"\n");
        let text_alone = [(512, 512, false), (512, 512, true)];
        for size in masked.into_iter().chain(text_alone) {
            assert!(hunyuan.contains(&size), "{size:?} is not in {hunyuan:?}");
        }
    }
}
