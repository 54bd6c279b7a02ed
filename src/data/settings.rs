//! `[data]`: the dataset, the size of micro-batches, and bad samples.

use crate::settings::{Choice, Keys, Settings};

#[derive(Clone, Debug, PartialEq)]
pub struct DataSettings {
    pub path: String,
    pub micro_batch_size_per_gpu: usize,
    pub prefetch: usize,
    pub on_bad: OnBad,
    pub bad_share: f64,
}

/// What becomes of a sample that holds a number which is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBad {
    #[default]
    Stop,
    /// Its next sound neighbour takes its place, the same one at every world size.
    Skip,
}

impl Choice for OnBad {
    const ALL: &'static [(&'static str, Self)] = &[("stop", OnBad::Stop), ("skip", OnBad::Skip)];
}

impl Default for DataSettings {
    fn default() -> Self {
        DataSettings {
            path: "embedded:digits".into(),
            micro_batch_size_per_gpu: 64,
            prefetch: 2,
            on_bad: OnBad::default(),
            bad_share: 0.001,
        }
    }
}

impl Settings for DataSettings {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.text("path", &mut self.path, "Folder with dataset.json, or `embedded:digits` for the handwritten digits in the binary.");
        keys.integer(
            "micro_batch_size_per_gpu",
            &mut self.micro_batch_size_per_gpu,
            1..=1 << 20,
            "Samples in one forward and backward pass of one rank; what fits into memory.",
        );
        keys.integer(
            "prefetch",
            &mut self.prefetch,
            1..=64,
            "Batches read ahead, each by a thread; 2 hide a read behind a step.",
        );
        keys.choice("on_bad", &mut self.on_bad, "When a sample holds NaN or infinity; `skip`: its next sound neighbour takes its place.");
        keys.number(
            "bad_share",
            &mut self.bad_share,
            0.0..=1.0,
            "Share of an epoch's samples that may be skipped; more stops the run.",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{read, write};

    #[test]
    fn settings_read_back_and_keep_their_bounds() {
        let mut settings = DataSettings {
            path: "data/shapes".into(),
            micro_batch_size_per_gpu: 3,
            prefetch: 5,
            on_bad: OnBad::Skip,
            bad_share: 0.5,
        };
        let text = write(&mut settings);
        let mut back = DataSettings::default();
        read(&mut back, "test", &text, &[]).expect("own text is valid");
        assert_eq!(back, settings);
        let error = read(&mut back, "test", "micro_batch_size_per_gpu = 0\nprefetch = 0", &[])
            .expect_err("two zeros")
            .to_string();
        assert_eq!(error.matches("0 is out of range").count(), 2, "{error}");
    }
}
