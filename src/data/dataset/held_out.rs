//! Samples that are held out of training: a share that is chosen by the hash of each sample.
//!
//! The hash follows from the hash of the sample's file and its place in it. So the choice is the
//! same at every number of ranks, in every mixture of datasets and for every copy of a file, and a
//! smaller share is a part of a larger one.

use sha2::{Digest, Sha256};

use super::Dataset;
use crate::error::{Error, Result};
use crate::files::sha256;
use crate::rng::{Key, Purpose};

impl Dataset {
    /// Holds a share of the samples out of training. A group whose samples would all be held out
    /// keeps them.
    ///
    /// # Errors
    /// [`Error::Config`] if no sample is held out.
    pub fn holding_out(mut self, share: Option<f64>) -> Result<Self> {
        let Some(share) = share else { return Ok(self) };
        for index in 0..self.groups.len() {
            let ids = &self.groups[index].sample_ids;
            let (held_out, trained): (Vec<u64>, Vec<u64>) =
                ids.iter().partition(|id| self.place(**id) < share);
            if !trained.is_empty() {
                let group = &mut self.groups[index];
                (group.held_out, group.sample_ids) = (held_out, trained);
            }
        }
        if self.groups.iter().all(|group| group.held_out.is_empty()) {
            let what = format!(
                "{share} of {} samples holds none of them out; set a larger share, or \
                 validation.path",
                self.num_samples
            );
            return Err(Error::config("validation.share", what));
        }
        self.share = Some(share);
        Ok(self)
    }

    /// Returns the number of samples that are held out of training.
    pub fn num_held_out(&self) -> u64 {
        self.groups.iter().map(|group| group.held_out.len() as u64).sum()
    }

    /// Returns a hash of a sample: of its file's hash and its place in the file.
    ///
    /// # Panics
    /// If there is no such sample (a bug in the caller).
    pub fn sample_hash(&self, id: u64) -> u64 {
        let file = self.file_of(id);
        Key::new(file.hash, Purpose::Validation).scope(id - file.first_id).hash()
    }

    /// Returns the place of a sample among all that there could be, in `[0, 1)`.
    fn place(&self, id: u64) -> f64 {
        (self.sample_hash(id) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns the fingerprint of data of which a share is held out.
    pub(super) fn with_share(&self, fingerprint: String) -> String {
        match self.share {
            None => fingerprint,
            Some(share) => {
                sha256::hex(Sha256::new_with_prefix(format!("{fingerprint} but {share:?}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tempfile::TempDir;

    use super::*;
    use crate::data::Order;
    use crate::data::made_up::{Part, images, written};
    use crate::data::settings::{DataSettings, DatasetSettings, OnSmallGroup};

    fn part(name: &'static str, first: i64, samples: i64) -> Part<'static> {
        (name, "any", vec![("image_latents", images(first, samples, 2))])
    }

    fn opened(folders: &[&TempDir]) -> Dataset {
        let entry = |folder: &&TempDir| DatasetSettings {
            path: folder.path().display().to_string(),
            repeats: 3,
            ..DatasetSettings::default()
        };
        let datasets = folders.iter().map(entry).collect();
        let settings = DataSettings { datasets, ..DataSettings::default() };
        Dataset::configured(&settings).expect("a sound dataset")
    }

    /// Numbers of the images that are held out.
    fn held_out(dataset: &Dataset) -> BTreeSet<i64> {
        let ids = dataset.groups().iter().flat_map(|group| &group.held_out);
        let number = |id: &u64| {
            let batch = dataset.batch(&[*id]).expect("sound");
            batch.tensors["image_latents"].double_value(&[0, 0, 0, 0]) as i64
        };
        ids.map(number).collect()
    }

    #[test]
    fn nothing_that_is_held_out_is_ever_ordered_and_everything_else_is() {
        let folder =
            written(&[part("a.safetensors", 0, 150), part("b.safetensors", 150, 90)], None);
        let dataset = opened(&[&folder]).holding_out(Some(0.2)).expect("240 samples");
        let [group] = dataset.groups() else { panic!("one group") };
        // Binomial(240, 0.2) has a standard deviation of 6.2; the range is four of them.
        assert!((23..=73).contains(&group.held_out.len()), "{}", group.held_out.len());
        assert_eq!(dataset.num_held_out() as usize + group.sample_ids.len(), 240);
        for batch in [1, 7, 16] {
            let order = Order::of(&dataset, batch, 4, OnSmallGroup::Stop).expect("large enough");
            let steps = 0..3 * order.batches_per_epoch();
            let seen: BTreeSet<u64> = steps.flat_map(|step| order.global_batch(step)).collect();
            let trained: BTreeSet<u64> = group.sample_ids.iter().copied().collect();
            assert_eq!(seen, trained, "three epochs of three copies in batches of {batch}");
        }
    }

    #[test]
    fn a_sample_is_held_out_in_every_mixture_and_by_every_larger_share() {
        let (a, b) = (
            written(&[part("a.safetensors", 0, 200)], None),
            written(&[part("x.safetensors", 200, 50)], None),
        );
        let of = |folders: &[&TempDir], share| {
            held_out(&opened(folders).holding_out(Some(share)).expect("some"))
        };
        let alone = of(&[&a], 0.1);
        let of_a = |both: BTreeSet<i64>| both.into_iter().filter(|n| *n < 200).collect();
        assert_eq!(alone, of_a(of(&[&a, &b], 0.1)));
        assert_eq!(alone, of_a(of(&[&b, &a], 0.1)));
        assert!(of(&[&a], 0.3).is_superset(&alone) && of(&[&a], 0.3).len() > alone.len());
        // The same file in another folder, under another name.
        let copy = written(&[part("copy.safetensors", 0, 200)], None);
        assert_eq!(of(&[&copy], 0.1), alone);
    }

    #[test]
    fn a_fingerprint_follows_the_share() {
        let folder = written(&[part("a.safetensors", 0, 100)], None);
        let of = |share| opened(&[&folder]).holding_out(share).expect("some").fingerprint();
        let all = [None, Some(0.1), Some(0.2)].map(of);
        assert_eq!(all[0], opened(&[&folder]).fingerprint());
        assert_eq!(BTreeSet::from(all).len(), 3);
    }

    #[test]
    fn a_group_keeps_samples_and_a_share_of_nothing_is_refused() {
        let single = |name| (name, name, vec![("image_latents", images(0, 1, 2))]);
        let folder = written(&[single("a.safetensors"), single("b.safetensors")], None);
        let error = opened(&[&folder]).holding_out(Some(0.5)).expect_err("groups of one");
        let expected = "validation.share: 0.5 of 2 samples holds none of them out";
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn a_bad_sample_is_replaced_by_one_of_its_own_kind() {
        let mut latents = images(0, 100, 2);
        let whole = opened(&[&written(&[part("a.safetensors", 0, 100)], None)]);
        let held = whole.holding_out(Some(0.3)).expect("some").groups()[0].held_out.clone();
        let bad = held[2];
        latents = latents.to_kind(tch::Kind::Float);
        let _ = latents.get(bad as i64).fill_(f64::NAN);
        let folder = written(&[("a.safetensors", "any", vec![("image_latents", latents)])], None);
        let dataset = opened(&[&folder]).on_bad(crate::data::OnBad::Skip);
        let dataset = dataset.holding_out(Some(0.3)).expect("some");
        let group = &dataset.groups()[0];
        // Another file, another choice: whichever side the sample is on, its neighbour is on it.
        let side = if group.held_out.contains(&bad) { &group.held_out } else { &group.sample_ids };
        let next = side[(side.iter().position(|id| *id == bad).expect("here") + 1) % side.len()];
        let found = dataset.batch(&[bad]).expect("a neighbour");
        assert_eq!(found.bad_samples, 1);
        assert_eq!(found.tensors["image_latents"].double_value(&[0, 0, 0, 0]), next as f64);
    }
}
