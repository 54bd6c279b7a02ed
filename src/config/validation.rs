//! `[validation]`: the loss of samples that are not trained on.

use std::ops::Bound;

use crate::data::DataSettings;
use crate::flow::Levels;
use crate::settings::{above_up_to, settings};

/// Noise levels of a validation that names none.
const SIGMAS: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

settings! {
    /// `[validation]`: the loss of samples that are not trained on, at fixed noise levels.
    pub struct ValidationSettings {
        /// Folder with dataset.json whose samples are judged. Without it and share nothing is.
        pub path: Option<String> = None;
        /// In its place, a share of the training data's samples, chosen by their hash and never
        /// trained on.
        pub share: Option<f64> = None, in above_up_to(0.0, 0.5);
        /// Steps between validations; before the first step and after the last there is one, too.
        pub every_n_steps: u64 = 500, in 1..;
        /// Noise levels at which every sample is judged.
        pub sigmas: Vec<f64> = SIGMAS.to_vec(), in 0.0..=1.0;
        /// In their place, quantiles of the noise levels that training draws.
        pub quantiles: Vec<f64>, in (Bound::Excluded(0.0), Bound::Excluded(1.0));
        /// Most samples that are judged, the same ones each time; unset: all.
        pub max_samples: Option<u64> = None, in 1..;
    }
}

impl ValidationSettings {
    /// True if there is something to judge on.
    pub fn is_on(&self) -> bool {
        self.path.is_some() || self.share.is_some()
    }

    /// True if there is a validation after this step of so many; step 0 is before the first.
    pub fn is_due(&self, step: u64, max_steps: u64) -> bool {
        self.is_on() && (step.is_multiple_of(self.every_n_steps) || step == max_steps)
    }

    /// Returns the noise levels at which samples are judged.
    pub fn levels(&self) -> Levels {
        match self.quantiles.is_empty() {
            true => Levels::Sigmas(self.sigmas.clone()),
            false => Levels::Quantiles(self.quantiles.clone()),
        }
    }

    /// Returns the combinations of settings that no run can honour, as `(key, reason)`.
    pub(super) fn problems(&self, data: &DataSettings) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut say = |key, what: String| problems.push((key, what));
        if !self.is_on() && *self != ValidationSettings::default() {
            let what = "must be set, or validation.share: there is nothing to judge on";
            say("validation.path", what.into());
        }
        if let (Some(path), Some(share)) = (&self.path, self.share) {
            let what = format!("{share} stands beside validation.path = {path:?}; leave one out");
            say("validation.share", what);
        }
        if let Some(path) = &self.path {
            let trained = data.datasets.iter().map(|dataset| &dataset.path);
            let trained: Vec<&String> =
                trained.chain(data.datasets.is_empty().then_some(&data.path)).collect();
            if path.is_empty() {
                say("validation.path", "must name a folder".into());
            } else if trained.contains(&path) {
                let what = format!("{path:?} is trained on; validation.share holds samples out");
                say("validation.path", what);
            }
        }
        if !self.quantiles.is_empty() && self.sigmas != SIGMAS {
            let what = "stand beside validation.sigmas; leave one out";
            say("validation.quantiles", what.into());
        }
        let levels = self.levels();
        if levels.values().is_empty() {
            say("validation.sigmas", "names no noise level".into());
        }
        if let Some(twice) = levels.named_twice() {
            let key = match levels {
                Levels::Sigmas(_) => "validation.sigmas",
                Levels::Quantiles(_) => "validation.quantiles",
            };
            say(key, format!("{twice} is named twice"));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::read;

    fn settings(text: &str) -> ValidationSettings {
        let mut settings = ValidationSettings::default();
        read(&mut settings, "test", text, &[]).expect("in range");
        settings
    }

    fn problems(text: &str) -> Vec<String> {
        let data = DataSettings { path: "trained".into(), ..DataSettings::default() };
        let problems = settings(text).problems(&data).into_iter();
        problems.map(|(key, what)| format!("{key}: {what}")).collect()
    }

    #[test]
    fn settings_that_contradict_each_other_are_named() {
        for sound in
            ["", "share = 0.1", "path = 'a'\nquantiles = [0.5]", "share = 0.1\nsigmas = [1]"]
        {
            assert!(problems(sound).is_empty(), "{sound}");
        }
        for (text, expected) in [
            (
                "every_n_steps = 3",
                "validation.path: must be set, or validation.share: there is nothing to judge on",
            ),
            (
                "path = 'a'\nshare = 0.1",
                "validation.share: 0.1 stands beside validation.path = \"a\"; leave one out",
            ),
            (
                "path = 'trained'",
                "validation.path: \"trained\" is trained on; validation.share holds samples out",
            ),
            ("path = ''", "validation.path: must name a folder"),
            (
                "share = 0.1\nsigmas = [0.3]\nquantiles = [0.5]",
                "validation.quantiles: stand beside validation.sigmas; leave one out",
            ),
            ("share = 0.1\nsigmas = []", "validation.sigmas: names no noise level"),
            ("share = 0.1\nsigmas = [0.5, 0.1, 0.5]", "validation.sigmas: 0.5 is named twice"),
            ("share = 0.1\nquantiles = [0.25, 0.25]", "validation.quantiles: 0.25 is named twice"),
        ] {
            assert_eq!(problems(text), [expected], "{text}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for text in
            ["share = 0", "share = 0.6", "sigmas = [1.1]", "quantiles = [0]", "max_samples = 0"]
        {
            let mut settings = ValidationSettings::default();
            let error = read(&mut settings, "test", text, &[]).expect_err("out of range");
            assert!(error.to_string().contains("out of range"), "{text}: {error}");
        }
    }

    #[test]
    fn a_validation_is_due_at_its_interval_and_at_both_ends() {
        let settings = settings("share = 0.1\nevery_n_steps = 4");
        let due = |step| settings.is_due(step, 10);
        assert_eq!((0..=10).filter(|step| due(*step)).collect::<Vec<_>>(), [0, 4, 8, 10]);
        assert!(!ValidationSettings::default().is_due(0, 10));
    }
}
