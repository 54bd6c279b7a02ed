//! `[data]`: the dataset, the size of micro-batches, and bad samples.

use super::dataset::Dataset;
use super::manifest::Links;
use crate::error::Result;
use crate::settings::{choice, settings};

settings! {
    /// `[data]`: the dataset, and how many samples at a time.
    pub struct DataSettings {
        /// Folder with dataset.json, or `embedded:digits` for the handwritten digits in the binary.
        pub path: String = "embedded:digits".into();
        /// Whether links in the dataset's folder may lead out of it, as in Hugging Face's cache.
        pub follow_links: bool = false;
        /// Samples in one forward and backward pass of one rank; what fits into memory.
        pub micro_batch_size_per_gpu: usize = 64, in 1..=1 << 20;
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

impl DataSettings {
    /// Opens the dataset as it is, without the settings of bad samples and padding.
    ///
    /// # Errors
    /// As [`Dataset::named`].
    pub fn dataset(&self) -> Result<Dataset> {
        Dataset::named(&self.path, Links::followed(self.follow_links))
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
        let others = "path = 'data/shapes'\nmicro_batch_size_per_gpu = 3\nprefetch = 5\n\
                      text_tokens = 226\nfollow_links = true\n\
                      on_bad = 'skip'\nbad_share = 0.5\n";
        read(&mut settings, "test", others, &[]).expect("in range");
        assert_eq!((settings.on_bad, settings.bad_share), (OnBad::Skip, 0.5));
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
