//! One file of samples, read by number.

use std::collections::BTreeMap;
use std::ops::Range;

use super::scales::{SCALE, Scale, widen};
use super::unequal::{LENGTHS, Starts};
use crate::error::Result;
use crate::files::finite::{check_finite, is_sound};
use crate::files::safetensors::{SafeTensors, TensorInfo, is_eight_bits, row_bytes};
use crate::pulse;

/// An open file of a dataset.
#[derive(Debug)]
pub(super) struct SampleFile {
    pub tensors: SafeTensors,
    /// Number of its first sample; the others follow.
    pub first_id: u64,
    pub samples: u64,
    /// Index of its group in the dataset.
    pub group: usize,
    /// Hash of its bytes' hash.
    pub hash: u64,
    /// First rows of the samples in each text of unequal lengths.
    pub starts: BTreeMap<String, Starts>,
    /// Scales of the floats of 8 bits that have one.
    pub scales: BTreeMap<String, Scale>,
}

impl SampleFile {
    /// Returns the rows of a sample's tensor.
    pub fn rows_of(&self, key: &str, id: u64) -> Range<u64> {
        let sample = id - self.first_id;
        self.starts.get(key).map_or(sample..sample + 1, |starts| starts.rows(sample))
    }

    /// True if all numbers of a sample are finite.
    pub fn is_finite(&self, id: u64) -> Result<bool> {
        for info in self.of_samples() {
            if self.check_sample(info, id)?.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Refuses the file if it has a number that is not finite.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) naming the tensor, the sample and the index of
    /// the first one; errors of reading.
    pub fn check_numbers(&self) -> Result<()> {
        for info in self.of_samples() {
            for id in self.first_id..self.first_id + self.samples {
                self.check_sample(info, id)??;
            }
        }
        Ok(())
    }

    /// Returns the tensors that batches hold; lengths and scales are no numbers of a sample.
    fn of_samples(&self) -> impl Iterator<Item = &TensorInfo> {
        let is_length = |name: &str| {
            name.strip_suffix(LENGTHS).is_some_and(|key| self.starts.contains_key(key))
        };
        let is_scale =
            |name: &str| name.strip_suffix(SCALE).is_some_and(|key| self.scales.contains_key(key));
        let tensors = self.tensors.tensors().iter();
        tensors.filter(move |info| !is_length(&info.name) && !is_scale(&info.name))
    }

    /// True if a tensor's floats have 8 bits, and so a scale.
    pub fn is_scaled(&self, key: &str) -> bool {
        self.tensors.info(key).is_ok_and(|info| is_eight_bits(info.kind))
    }

    /// Returns the number by which a sample's floats of 8 bits are multiplied.
    pub fn scale_of(&self, key: &str, id: u64) -> f32 {
        self.scales.get(key).map_or(1.0, |scale| scale.of(id - self.first_id))
    }

    /// Checks the numbers of one tensor of one sample. The outer error is one of reading, the inner
    /// one the finding.
    fn check_sample(&self, info: &TensorInfo, id: u64) -> Result<Result<()>> {
        let rows: Vec<u64> = self.rows_of(&info.name, id).collect();
        let mut data = self.tensors.buffer(row_bytes(info) * rows.len() as u64)?;
        self.tensors.read_rows_into(info, &rows, &mut data, |_| ())?;
        Ok(check_finite(&self.tensors, info, &vec![id; rows.len()], &rows, &data))
    }

    /// Fills `data` with one key of these samples, which all belong to this file, as batches hold
    /// it: floats of 8 bits become float32.
    pub fn read_numbers(&self, key: &str, ids: &[u64], data: &mut [u8]) -> Result<()> {
        let info = self.tensors.info(key)?;
        if !is_eight_bits(info.kind) {
            return self.read_rows(key, ids, data);
        }
        let numbers: &mut [f32] = bytemuck::cast_slice_mut(data);
        let mut stored = self.tensors.buffer(numbers.len() as u64)?;
        self.read_rows(key, ids, &mut stored)?;
        let mut start = 0;
        for id in ids {
            let end = start + self.rows_of(key, *id).count() * row_bytes(info) as usize;
            let scale = self.scale_of(key, *id);
            widen(info.kind, &stored[start..end], scale, &mut numbers[start..end]);
            start = end;
        }
        Ok(())
    }

    /// Fills `data` with one key of these samples, which all belong to this file, as it is stored.
    pub fn read_rows(&self, key: &str, ids: &[u64], data: &mut [u8]) -> Result<()> {
        pulse::read_from(self.tensors.path());
        let info = self.tensors.info(key)?;
        let rows: Vec<u64> = ids.iter().flat_map(|id| self.rows_of(key, *id)).collect();
        let mut sound = true;
        self.tensors
            .read_rows_into(info, &rows, data, |piece| sound &= is_sound(info.kind, piece))?;
        if sound {
            return Ok(());
        }
        let of_rows = |id: &u64| vec![*id; self.rows_of(key, *id).count()];
        let ids: Vec<u64> = ids.iter().flat_map(of_rows).collect();
        check_finite(&self.tensors, info, &ids, &rows, data)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tch::Tensor;

    use crate::data::made_up::{images, written};
    use crate::data::manifest::Manifest;
    use crate::data::{Dataset, Links, OnBad};

    #[test]
    fn files_beyond_those_kept_open_are_read_alike_until_they_are_replaced() {
        let part = |name, first| (name, "2x2", vec![("image_latents", images(first, 2, 2))]);
        let folder = written(
            &[part("a.safetensors", 0), part("b.safetensors", 2), part("c.safetensors", 4)],
            None,
        );
        let keeping = |kept| {
            let manifest = Manifest::read(folder.path(), Links::Inside).expect("a sound manifest");
            Dataset::keeping(folder.path(), manifest, Links::Inside, kept).expect("a sound dataset")
        };
        for kept in 0..4 {
            let batch = keeping(kept).batch(&[5, 0, 2, 3]).expect("sound samples");
            let expected = Tensor::from_slice(&[5f32, 0.0, 2.0, 3.0]);
            assert!(
                batch.tensors["image_latents"].amax([1, 2, 3], false).equal(&expected),
                "{kept} kept"
            );
            keeping(kept).verify_hashes().expect("untouched files");
        }
        let dataset = keeping(1);
        for name in ["a.safetensors", "c.safetensors"] {
            let (path, other) = (folder.path().join(name), folder.path().join("other"));
            fs::copy(&path, &other)
                .and_then(|_| fs::rename(&other, &path))
                .expect("another file in its place");
        }
        dataset.batch(&[0, 1]).expect("the file that is still open");
        let error = dataset.batch(&[0, 4]).expect_err("another file");
        assert_eq!(error.exit_code(), 40);
        assert!(
            error.to_string().contains("c.safetensors: was replaced while the run used it"),
            "{error}"
        );
    }

    #[test]
    fn a_look_at_all_numbers_finds_the_one_that_is_not_finite() {
        let tensor = images(0, 4, 2);
        let _ = tensor.get(2).get(0).get(1).narrow(0, 0, 1).fill_(f64::NAN);
        let folder = written(&[("a.safetensors", "2x2", vec![("image_latents", tensor)])], None);
        let dataset = || Dataset::open(folder.path()).expect("sound headers");
        let error = dataset().verify_numbers().expect_err("one is not a number").to_string();
        assert!(
            error.contains("`image_latents` of sample 2 (row 2)")
                && error.contains("not finite")
                && error.contains("[0, 1, 0]"),
            "{error}"
        );
        assert!(
            dataset().on_bad(OnBad::Skip).verify_numbers().is_ok(),
            "its neighbour will stand in for it"
        );
    }
}
