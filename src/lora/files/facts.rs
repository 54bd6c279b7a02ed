//! Metadata beside the scales: what made the LoRA.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Alpha;
use crate::lora::family::Family;
use crate::lora::{Facts, Lora};
use crate::settings::Choice;

type Metadata = BTreeMap<String, String>;

const ARCHITECTURE: &str = "modelspec.architecture";
const VERSION: &str = "ss_base_model_version";
const NETWORK_RANK: &str = "ss_network_dim";
/// Our own entries, in every dialect.
const BASE_MODEL: &str = "training.base_model";
const DATASET: &str = "training.dataset";
const STEPS: &str = "training.steps";
const RANK: &str = "training.rank";
const ALPHA: &str = "training.alpha";
const TARGETS: &str = "training.targets";

/// Returns the entries of every dialect.
pub fn common(lora: &Lora, family: Family) -> Metadata {
    let facts = &lora.facts;
    let targets = (!facts.targets.is_empty()).then(|| json!(facts.targets).to_string());
    let optional = [
        (BASE_MODEL, facts.base_model.clone()),
        (DATASET, facts.dataset.clone()),
        (STEPS, facts.steps.map(|steps| steps.to_string())),
        (RANK, facts.rank.map(|rank| rank.to_string())),
        (ALPHA, facts.alpha.map(|alpha| alpha.to_string())),
        (TARGETS, targets),
    ];
    let fixed = [
        // Without this entry diffusers takes the file for another framework's.
        ("format", "pt".to_string()),
        ("modelspec.sai_model_spec", "1.0.0".into()),
        (ARCHITECTURE, format!("{}/lora", family.architecture)),
        ("software", format!("fm-dist {}", env!("CARGO_PKG_VERSION"))),
    ];
    let optional = optional.into_iter().filter_map(|(key, text)| Some((key, text?)));
    fixed.into_iter().chain(optional).map(|(key, text)| (key.into(), text)).collect()
}

/// Returns the entries of kohya's trainers, which other programs show their users.
pub fn kohya(lora: &Lora, family: Family, alpha: Alpha) -> Metadata {
    let (facts, (rank, usual)) = (&lora.facts, lora.usual());
    let usual = if alpha.is_folded() { rank as f64 } else { usual };
    let dataset = |name: &String| json!({ name.as_str(): { "n_repeats": 1 } }).to_string();
    let entries = [
        ("ss_network_module", Some(family.network.to_string())),
        (NETWORK_RANK, Some(rank.to_string())),
        ("ss_network_alpha", Some(usual.to_string())),
        (VERSION, Some(family.version.into())),
        ("ss_sd_model_name", facts.base_model.clone()),
        ("ss_steps", facts.steps.map(|steps| steps.to_string())),
        ("ss_dataset_dirs", facts.dataset.as_ref().map(dataset)),
    ];
    entries.into_iter().filter_map(|(key, text)| Some((key.into(), text?))).collect()
}

/// Reads what the metadata tell of the run, in our entries or kohya's.
pub fn read(metadata: &Metadata) -> Facts {
    let text = |keys: &[&str]| keys.iter().find_map(|key| metadata.get(*key)).cloned();
    let known = |text: &String| !text.is_empty() && text != "None";
    let number = |keys: &[&str]| text(keys).and_then(|text| text.parse::<f64>().ok());
    let folders = |text: String| {
        let folders: Value = serde_json::from_str(&text).ok()?;
        folders.as_object()?.keys().next().cloned()
    };
    let targets = |text: String| serde_json::from_str::<Vec<String>>(&text).ok();
    Facts {
        base_model: text(&[BASE_MODEL, "ss_sd_model_name"]).filter(known),
        dataset: text(&[DATASET]).or_else(|| text(&["ss_dataset_dirs"]).and_then(folders)),
        steps: number(&[STEPS, "ss_steps"]).map(|steps| steps as u64),
        rank: number(&[RANK, NETWORK_RANK]).map(|rank| rank as i64),
        alpha: number(&[ALPHA, "ss_network_alpha"]).filter(|alpha| alpha.is_finite()),
        targets: text(&[TARGETS]).and_then(targets).unwrap_or_default(),
    }
}

/// Returns the family that the metadata name.
pub fn family(metadata: &Metadata) -> Option<Family> {
    let flat = |text: &str| text.to_lowercase().replace(['-', '.', '_', ' '], "");
    let begins = |key: &str, start: fn(Family) -> &'static str| {
        let text = flat(metadata.get(key)?);
        let mut families = Family::ALL.iter().map(|(_, family)| *family);
        families.find(|family| text.starts_with(&flat(start(*family))))
    };
    begins(VERSION, |family| family.version)
        .or_else(|| begins(ARCHITECTURE, |family| family.architecture))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::tests::pair;

    fn facts() -> Facts {
        Facts {
            base_model: Some("models/FLUX.1-dev".into()),
            dataset: Some("cats".into()),
            steps: Some(1200),
            rank: Some(16),
            alpha: Some(8.0),
            targets: vec!["attention".into(), "*.ff.*".into()],
        }
    }

    #[test]
    fn what_is_known_of_a_run_comes_back() {
        let pairs = BTreeMap::from([("proj_out".to_string(), pair(0, [4, 4], 16, 8.0))]);
        let lora = Lora { pairs, facts: facts() };
        for (_, name) in Family::ALL {
            let mut metadata = common(&lora, *name);
            assert_eq!(read(&metadata), facts());
            assert_eq!(family(&metadata), Some(*name));
            metadata = kohya(&lora, *name, Alpha::Tensor);
            assert_eq!(read(&metadata), Facts { targets: Vec::new(), ..facts() });
            assert_eq!(family(&metadata), Some(*name));
        }
        let folded = kohya(&lora, Family::Flux, Alpha::Folded);
        assert_eq!(folded["ss_network_alpha"], "16");
    }

    #[test]
    fn what_others_write_is_read_or_left_alone() {
        let entry = |key: &str, text: &str| Metadata::from([(key.to_string(), text.to_string())]);
        assert_eq!(read(&entry("ss_sd_model_name", "None")), Facts::default());
        assert_eq!(read(&entry("ss_network_dim", "Dynamic")), Facts::default());
        assert_eq!(family(&entry("modelspec.architecture", "flux-1-dev/lora")), Some(Family::Flux));
        assert_eq!(
            family(&entry("modelspec.architecture", "Flux.2-klein-4b/lora")),
            Some(Family::Flux2)
        );
        assert_eq!(family(&entry("ss_base_model_version", "wan")), Some(Family::Wan));
        assert_eq!(family(&entry("modelspec.architecture", "stable-diffusion-xl")), None);
    }
}
