//! `[data]`: the dataset, the size of micro-batches, and bad samples.

use std::collections::BTreeSet;

use super::manifest::Links;
use crate::settings::{choice, settings};

/// Samples of a micro-batch where the configuration says nothing about them.
const USUAL_MICRO_BATCH: usize = 64;
/// Most times that a setting takes a sample in an epoch.
pub(super) const MOST_REPEATS: u64 = 1 << 20;

settings! {
    /// `[data]`: the dataset, and how many samples at a time.
    pub struct DataSettings {
        /// Folder with dataset.json, or `embedded:digits` for the handwritten digits in the binary.
        pub path: String = PATH.into();
        /// In its place, several datasets that are mixed.
        pub datasets: Vec<DatasetSettings>, as tables;
        /// Whether links in a dataset's folder may lead out of it, as in Hugging Face's cache.
        pub follow_links: bool = false;
        /// Samples in one forward and backward pass of one rank; what fits into memory. Unset: 64.
        pub micro_batch_size_per_gpu: Option<usize> = None, in 1..=1 << 20;
        /// In its place, tokens of latents and text in one pass: the smaller a group's samples, the
        /// more of them; 0: off. It needs train.global_batch_size.
        pub micro_batch_tokens_per_gpu: i64 = 0, in 0..=1 << 40;
        /// When a resolution group has fewer samples than a global batch, counted with their
        /// repeats.
        pub on_small_group: OnSmallGroup = OnSmallGroup::Stop;
        /// Tokens to which texts are padded. 0: those of unequal length to the batch's longest, or
        /// to the number of the family's pipeline where the model gets no mask of valid tokens.
        pub text_tokens: i64 = 0, in 0..=1 << 16;
        /// Batches read ahead, each by a thread; 2 hide a read behind a step.
        pub prefetch: usize = 2, in 1..=64;
        /// When a sample holds NaN or infinity; `skip`: its next sound neighbour takes its place.
        pub on_bad: OnBad = OnBad::Stop;
        /// Share of an epoch's samples that may be skipped; more stops the run.
        pub bad_share: f64 = 0.001, in 0.0..=1.0;
    }
}

/// The dataset where none is named.
const PATH: &str = "embedded:digits";

settings! {
    /// `[[data.datasets]]`: one of several datasets.
    pub struct DatasetSettings {
        /// Folder with dataset.json, or `embedded:digits`.
        pub path: String;
        /// Its share of an epoch's samples, relative to the other datasets' weights; 0: by its
        /// size. All have one, or none.
        pub weight: f64 = 0.0, in 0.0..=1e6;
        /// Times that an epoch takes each of its samples; with weights, at least.
        pub repeats: u64 = 1, in 1..=MOST_REPEATS as i64;
    }
}

impl DataSettings {
    /// Returns where links in a dataset's folder may lead.
    pub fn links(&self) -> Links {
        Links::followed(self.follow_links)
    }

    /// Returns the samples of a micro-batch where no number of tokens says how many there are.
    pub fn micro_batch_size(&self) -> usize {
        self.micro_batch_size_per_gpu.unwrap_or(USUAL_MICRO_BATCH)
    }

    /// True if micro-batches have as many samples as a number of tokens allows.
    pub fn counts_tokens(&self) -> bool {
        self.micro_batch_tokens_per_gpu > 0
    }

    /// Returns the combinations of settings that no run can honour, as `(key, reason)`.
    pub fn problems(&self) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        let mut say = |key: &str, what: String| problems.push((key.to_string(), what));
        if self.counts_tokens()
            && let Some(samples) = self.micro_batch_size_per_gpu
        {
            let tokens = self.micro_batch_tokens_per_gpu;
            say(
                "data.micro_batch_tokens_per_gpu",
                format!(
                    "{tokens} tokens and micro_batch_size_per_gpu = {samples} samples both say what a \
                     micro-batch holds; leave one out"
                ),
            );
        }
        if !self.datasets.is_empty() && self.path != PATH {
            let what = format!("{:?} stands beside [[data.datasets]]; leave one out", self.path);
            say("data.path", what);
        }
        let weighs = self.datasets.iter().any(|dataset| dataset.weight > 0.0);
        let mut paths = BTreeSet::new();
        for (place, DatasetSettings { path, weight, .. }) in self.datasets.iter().enumerate() {
            let key = |name: &str| format!("data.datasets[{place}].{name}");
            if path.is_empty() {
                say(&key("path"), "must name a folder".into());
            } else if !paths.insert(path) {
                let what =
                    format!("{path:?} is listed twice; repeats takes its samples more often");
                say(&key("path"), what);
            }
            if weighs && *weight == 0.0 {
                let what =
                    format!("{path:?} has none, another dataset has one; all have one, or none");
                say(&key("weight"), what);
            }
        }
        problems
    }
}

choice! {
    /// Treatment of a resolution group that is smaller than a global batch.
    pub enum OnSmallGroup {
        /// The run ends before its first step.
        "stop" => Stop,
        /// It is left out.
        "drop" => Drop,
        /// Its samples are repeated until they fill a global batch.
        "repeat" => Repeat,
    }
}

choice! {
    /// Treatment of a sample that holds a number which is not finite.
    pub enum OnBad {
        /// The run ends.
        "stop" => Stop,
        /// Its next sound neighbour takes its place, the same one at every world size.
        "skip" => Skip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{read, write};

    #[test]
    fn settings_read_back_and_keep_their_bounds() {
        let mut settings = DataSettings::default();
        assert_eq!(settings.micro_batch_size(), 64);
        let others = "path = 'data/shapes'\nmicro_batch_size_per_gpu = 3\nprefetch = 5\n\
                      text_tokens = 226\nfollow_links = true\non_small_group = 'repeat'\n\
                      on_bad = 'skip'\nbad_share = 0.5\n";
        read(&mut settings, "test", others, &[]).expect("in range");
        assert_eq!((settings.on_bad, settings.bad_share), (OnBad::Skip, 0.5));
        assert_eq!(settings.on_small_group, OnSmallGroup::Repeat);
        let text = write(&mut settings);
        let mut back = DataSettings::default();
        read(&mut back, "test", &text, &[]).expect("own text is valid");
        assert_eq!(back, settings);
        let error = read(&mut back, "test", "micro_batch_size_per_gpu = 0\nprefetch = 0", &[])
            .expect_err("two zeros")
            .to_string();
        assert_eq!(error.matches("0 is out of range").count(), 2, "{error}");
    }

    fn problems(text: &str) -> Vec<String> {
        let mut settings = DataSettings::default();
        read(&mut settings, "test", text, &[]).expect("in range");
        settings.problems().into_iter().map(|(key, what)| format!("{key}: {what}")).collect()
    }

    #[test]
    fn several_datasets_read_back_with_their_weights_and_repeats() {
        let text = "[[datasets]]\npath = 'a'\nweight = 2\n[[datasets]]\npath = 'b'\nweight = 0.5\nrepeats = 3\n";
        let mut settings = DataSettings::default();
        read(&mut settings, "test", text, &[]).expect("in range");
        let (a, b) = (&settings.datasets[0], &settings.datasets[1]);
        assert_eq!((a.path.as_str(), a.weight, a.repeats), ("a", 2.0, 1));
        assert_eq!((b.path.as_str(), b.weight, b.repeats), ("b", 0.5, 3));
        assert!(settings.problems().is_empty());
        let mut back = DataSettings::default();
        read(&mut back, "test", &write(&mut settings), &[]).expect("own text is valid");
        assert_eq!(back, settings);
    }

    #[test]
    fn settings_that_contradict_each_other_are_named() {
        assert!(problems("path = 'a'").is_empty());
        assert_eq!(
            problems(
                "path = 'c'\n[[datasets]]\nweight = 1\n[[datasets]]\npath = 'b'\n[[datasets]]\npath = 'b'\nweight = 1\n"
            ),
            [
                "data.path: \"c\" stands beside [[data.datasets]]; leave one out",
                "data.datasets[0].path: must name a folder",
                "data.datasets[1].weight: \"b\" has none, another dataset has one; all have one, or none",
                "data.datasets[2].path: \"b\" is listed twice; repeats takes its samples more often",
            ]
        );
        let both = "micro_batch_size_per_gpu = 4\nmicro_batch_tokens_per_gpu = 4096";
        assert_eq!(
            problems(both),
            [
                "data.micro_batch_tokens_per_gpu: 4096 tokens and micro_batch_size_per_gpu = 4 samples both say what a micro-batch holds; leave one out"
            ]
        );
    }
}
