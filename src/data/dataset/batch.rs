//! Batches of samples, read by their ids.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::Dataset;
use super::pixel_masks::{LOSS_MASK, shrunk};
use super::sample_file::SampleFile;
use super::scales::{SCALE, kind_in_batches};
use super::unequal::{extended, mask_of};
use crate::data::group::{Group, Layout, SampleTensor};
use crate::data::{Batch, DataType, OnBad};
use crate::error::{Error, Result};
use crate::files::safetensors::{TensorInfo, row_bytes, with_rows};
use crate::tensor::bytes_mut;

/// Keys whose tensors have the latents' axes, or may have them.
const FRAMED: [&str; 3] = ["image_latents", "condition_latents", "loss_mask"];

impl Dataset {
    /// Returns the samples of these ids in this order. If bad samples are skipped, each is replaced
    /// by the next sound one of its group.
    ///
    /// # Errors
    /// [`Error::Data`] if a sample is not finite and skipping is not allowed, or if its file was
    /// cut since it was opened.
    /// # Panics
    /// If there are no ids, or they are unknown or of several groups (bugs in the caller).
    pub fn batch(&self, ids: &[u64]) -> Result<Batch> {
        match (self.read_batch(ids, 0), self.on_bad) {
            (Err(error), OnBad::Skip) => {
                let sound =
                    ids.iter().map(|id| self.sound_from(*id)).collect::<Result<Vec<_>>>()?;
                let bad_samples = sound.iter().zip(ids).filter(|(sound, id)| sound != id).count();
                // No sample is bad, so the error has another cause.
                if bad_samples == 0 { Err(error) } else { self.read_batch(&sound, bad_samples) }
            }
            (outcome, _) => outcome,
        }
        .map(|batch| Batch { sample_ids: ids.to_vec(), ..batch })
    }

    fn read_batch(&self, ids: &[u64], bad_samples: usize) -> Result<Batch> {
        let group = self.file_of(ids[0]).group;
        assert!(
            ids.iter().all(|id| self.file_of(*id).group == group),
            "a batch of several resolution groups: {ids:?}"
        );
        let mut tensors = BTreeMap::new();
        let group = &self.groups[group];
        for (key, layout) in &group.layout {
            if let Some(mask) = mask_of(key).filter(|_| layout.unequal) {
                tensors.insert(mask.to_string(), self.mask(key, ids)?);
            }
            let stacked = self.stacked(key, ids)?;
            let shape = self.framed(group, key, &layout.shape);
            let framed = shape.len() > layout.shape.len();
            tensors.insert(key.clone(), if framed { stacked.unsqueeze(2) } else { stacked });
        }
        tensors.extend(self.empty_prompt_tensors());
        let data_type = group.data_type;
        Ok(Batch { tensors, data_type, sample_ids: ids.to_vec(), bad_samples })
    }

    /// Returns the shape of one sample's tensor in a batch: what has the axes of an image's latents
    /// gets one of a single frame, if images become videos.
    pub(super) fn framed(&self, group: &Group, key: &str, shape: &[i64]) -> Vec<i64> {
        let of_image = self.frames && group.data_type == DataType::Image && FRAMED.contains(&key);
        match *shape {
            [channels, height, width] if of_image => vec![channels, 1, height, width],
            _ => shape.to_vec(),
        }
    }

    /// Returns the sample itself if all its numbers are finite, otherwise the next of its group
    /// that is; the result is the same on every rank.
    fn sound_from(&self, id: u64) -> Result<u64> {
        let group = &self.groups[self.file_of(id).group];
        // Nothing that is held out takes the place of a sample that is trained on.
        let is_held_out = group.held_out.binary_search(&id).is_ok();
        let ids = if is_held_out { &group.held_out } else { &group.sample_ids };
        let place = ids.binary_search(&id).expect("a sample is in its group");
        let (before, after) = ids.split_at(place);
        for candidate in after.iter().chain(before) {
            if self.file_of(*candidate).is_finite(*candidate)? {
                return Ok(*candidate);
            }
        }
        Err(Error::data(&self.path, format!("no sample of the group of sample {id} is finite")))
    }

    /// Returns one sample's tensors as they are stored: without an axis of samples, texts without
    /// padding, floats of 8 bits beside their scale.
    ///
    /// # Errors
    /// As [`batch`](Self::batch).
    /// # Panics
    /// If there is no such sample (a bug in the caller).
    pub fn sample(&self, id: u64) -> Result<BTreeMap<String, Tensor>> {
        let read = |(key, tensor): (String, SampleTensor)| {
            let file = self.file_of(id);
            if let Some(scaled) = key.strip_suffix(SCALE).filter(|key| file.is_scaled(key)) {
                let scale = Tensor::from(file.scale_of(scaled, id));
                return Ok((key, scale));
            }
            let mut sample = file.tensors.empty_tensor(&tensor.shape, tensor.kind)?;
            if sample.numel() > 0 {
                file.read_rows(&key, &[id], bytes_mut(&mut sample))?;
            }
            Ok((key, sample))
        };
        self.sample_layout(id).into_iter().map(read).collect()
    }

    /// Returns kinds and shapes of one sample's tensors, as [`sample`](Self::sample) returns them.
    pub fn sample_layout(&self, id: u64) -> Layout {
        let file = self.file_of(id);
        let mut layout = self.groups[file.group].layout.clone();
        for (key, tensor) in layout.iter_mut().filter(|(_, tensor)| tensor.unequal) {
            tensor.shape[0] = file.rows_of(key, id).count() as i64;
        }
        let scale = |key: String| {
            let tensor = SampleTensor { kind: Kind::Float, shape: Vec::new(), unequal: false };
            (format!("{key}{SCALE}"), tensor)
        };
        let scaled: Vec<String> =
            layout.keys().filter(|key| file.is_scaled(key)).cloned().collect();
        layout.extend(scaled.into_iter().map(scale));
        layout
    }

    /// True if all numbers of a sample are finite.
    ///
    /// # Errors
    /// Errors of reading.
    pub fn is_finite(&self, id: u64) -> Result<bool> {
        self.file_of(id).is_finite(id)
    }

    /// Returns one key of these samples, which are of one group, as one tensor `[samples, …]`, and
    /// reads no other. Texts of unequal length are padded; the key may be that of their mask.
    /// Floats of 8 bits become float32, and a mask of pixels one of the latents.
    ///
    /// # Errors
    /// [`Error::Data`] if their group has no such key; otherwise those of [`batch`](Self::batch).
    pub fn stacked(&self, key: &str, ids: &[u64]) -> Result<Tensor> {
        let first = self.file_of(ids[0]);
        if first.starts.contains_key(key) {
            return self.padded(key, ids);
        }
        if let Some(text) = first.starts.keys().find(|text| mask_of(text) == Some(key)) {
            return self.mask(text, ids);
        }
        let info = first.tensors.info(key)?;
        let (row_bytes, kind) = (row_bytes_in_batches(info), kind_in_batches(info.kind));
        let mut stacked = first.tensors.empty_tensor(&with_rows(info, ids.len()), kind)?;
        let mut rest = bytes_mut(&mut stacked);
        for run in ids.chunk_by(|a, b| self.file_of(*a).first_id == self.file_of(*b).first_id) {
            let (now, later) = rest.split_at_mut(run.len() * row_bytes);
            self.file_of(run[0]).read_numbers(key, run, now)?;
            rest = later;
        }
        match self.changed_shape(&self.groups[first.group], key) {
            Some(shape) if key == LOSS_MASK => Ok(shrunk(&stacked, &shape)),
            Some(shape) => Ok(extended(&stacked, shape[0])),
            None => Ok(stacked),
        }
    }

    /// Returns texts of unequal length `[B, L, D]`, padded with zeros on the right.
    fn padded(&self, key: &str, ids: &[u64]) -> Result<Tensor> {
        let (file, tokens) = (&self.file_of(ids[0]).tensors, self.batch_length(key, ids));
        let info = file.info(key)?;
        let token_bytes = row_bytes_in_batches(info);
        let shape = [&[ids.len() as i64, tokens], &info.shape[1..]].concat();
        let mut padded = file.empty_tensor(&shape, kind_in_batches(info.kind))?;
        let samples = bytes_mut(&mut padded).chunks_exact_mut(tokens as usize * token_bytes);
        for (id, sample) in ids.iter().zip(samples) {
            let length = self.length(key, *id) as usize;
            let (text, padding) = sample.split_at_mut(length * token_bytes);
            self.file_of(*id).read_numbers(key, &[*id], text)?;
            padding.fill(0);
        }
        Ok(padded)
    }

    /// Returns the mask of texts of unequal length `[B, L]`, int64: 1 for a token, 0 for padding.
    fn mask(&self, text: &str, ids: &[u64]) -> Result<Tensor> {
        let tokens = self.batch_length(text, ids);
        let file = &self.file_of(ids[0]).tensors;
        let mut mask = file.empty_tensor(&[ids.len() as i64, tokens], Kind::Int64)?;
        let rows = bytes_mut(&mut mask).chunks_exact_mut(tokens as usize * size_of::<i64>());
        for (id, row) in ids.iter().zip(rows) {
            for (token, number) in (0..).zip(row.as_chunks_mut().0) {
                *number = i64::from(token < self.length(text, *id)).to_le_bytes();
            }
        }
        Ok(mask)
    }

    /// Returns the number of tokens of one sample's text.
    fn length(&self, text: &str, id: u64) -> i64 {
        self.file_of(id).rows_of(text, id).count() as i64
    }

    /// Returns the number of tokens to which the texts of a batch are padded.
    fn batch_length(&self, text: &str, ids: &[u64]) -> i64 {
        let longest = ids.iter().map(|id| self.length(text, *id)).max();
        self.padded_length(text, longest.expect("a batch has samples"))
    }

    /// Returns the length of a padded batch: the empty prompt, which may replace a sample's text,
    /// must fit into it, too.
    pub(super) fn padded_length(&self, key: &str, longest: i64) -> i64 {
        let shapes = self.empty_prompt_shapes();
        let empty = shapes.get(key).and_then(|shape| shape.first()).copied().unwrap_or(0);
        self.padding.length(key, longest.max(empty))
    }

    pub(super) fn file_of(&self, id: u64) -> &SampleFile {
        assert!(id < self.num_samples, "sample {id} of {}", self.num_samples);
        &self.files[self.files.partition_point(|file| file.first_id <= id) - 1]
    }
}

/// Returns the bytes of one row along the first axis, as batches hold it.
fn row_bytes_in_batches(info: &TensorInfo) -> usize {
    let stored = row_bytes(info) as usize / info.kind.elt_size_in_bytes();
    stored * kind_in_batches(info.kind).elt_size_in_bytes()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::data::TextPadding;
    use crate::data::made_up::{images, two_groups, written_as};
    use crate::rng::{Key, Purpose};

    fn open(folder: &tempfile::TempDir) -> Dataset {
        Dataset::open(folder.path()).expect("a sound dataset")
    }

    #[test]
    fn a_batch_holds_the_samples_asked_for_in_that_order_across_files() {
        let folder = two_groups();
        let dataset = Dataset::open(folder.path()).expect("a sound dataset");
        for ids in [&[8u64, 0, 1, 7, 2][..], &[3, 7], &[5, 6, 4]] {
            let batch = dataset.batch(ids).expect("sound samples");
            let expected = Tensor::from_slice(&ids.iter().map(|&id| id as i64).collect::<Vec<_>>());
            assert!(batch.tensors["labels"].equal(&expected), "{ids:?}");
            assert!(
                batch.tensors["image_latents"]
                    .amax([1, 2, 3], false)
                    .to_kind(Kind::Int64)
                    .equal(&expected),
                "{ids:?}"
            );
            assert_eq!(batch.sample_ids, ids);
        }
    }

    #[test]
    #[should_panic(expected = "a batch of several resolution groups: [3, 4]")]
    fn a_batch_of_two_groups_is_a_bug() {
        let folder = two_groups();
        let _ = Dataset::open(folder.path()).expect("a sound dataset").batch(&[3, 4]);
    }

    /// Texts of 3, 1, 9 and 2 tokens in two files; a token holds its sample's number.
    fn unequal() -> tempfile::TempDir {
        let part = |name, first: i64, lengths: &[i64]| {
            let tokens: Vec<Tensor> = (first..)
                .zip(lengths)
                .map(|(id, length)| Tensor::full([*length, 2], id + 1, (Kind::Half, Device::Cpu)))
                .collect();
            let tensors = vec![
                ("image_latents", images(first, lengths.len() as i64, 2)),
                ("text_embeddings", Tensor::cat(&tokens, 0)),
                ("text_embeddings.lengths", Tensor::from_slice(lengths)),
            ];
            (name, "2x2", tensors)
        };
        written_as(2, &[part("a.safetensors", 0, &[3, 1]), part("b.safetensors", 2, &[9, 2])], None)
    }

    #[test]
    fn texts_of_unequal_length_are_padded_to_the_longest_of_the_batch() {
        let dataset = open(&unequal());
        for (ids, lengths, tokens) in
            [(&[0u64, 1][..], &[3i64, 1][..], 8), (&[3, 2, 0], &[2, 9, 3], 16), (&[1], &[1], 8)]
        {
            let batch = dataset.batch(ids).expect("sound samples");
            let (text, mask) = (&batch.tensors["text_embeddings"], &batch.tensors["text_mask"]);
            assert_eq!(text.size(), [ids.len() as i64, tokens, 2], "{ids:?}");
            assert_eq!(mask.sum_dim_intlist(1, false, None), Tensor::from_slice(lengths));
            let of_ids: Vec<i64> = ids.iter().map(|id| *id as i64 + 1).collect();
            let expected = mask * Tensor::from_slice(&of_ids).unsqueeze(1);
            for feature in 0..2 {
                let found = text.select(2, feature).to_kind(Kind::Int64);
                assert!(found.equal(&expected), "{ids:?}: zeros behind the text");
            }
        }
        dataset.verify_hashes().expect("untouched files");
        dataset.verify_numbers().expect("finite");
    }

    #[test]
    fn texts_can_be_padded_to_a_number_of_tokens_that_they_do_not_exceed() {
        let padded = |tokens| open(&unequal()).text_padding(TextPadding::Tokens(tokens));
        let dataset = padded(12).expect("longer than every text");
        let batch = dataset.batch(&[1]).expect("a sound sample");
        assert_eq!(batch.tensors["text_embeddings"].size(), [1, 12, 2]);
        assert_eq!(dataset.sample_shapes(&dataset.groups()[0])["text_mask"], [12]);
        let error = padded(8).expect_err("a text of 9 tokens").to_string();
        assert!(error.contains("group `2x2` has a text of 9 tokens"), "{error}");
    }

    #[test]
    fn texts_of_one_length_and_their_masks_get_more_padding_if_all_do() {
        let draw = || Tensor::randn([2, 3, 2], (Kind::Float, Device::Cpu));
        let texts = Key::new(1, Purpose::Test).seeded(draw);
        let mask = Tensor::from_slice(&[1i64, 1, 0, 1, 1, 1]).view([2, 3]);
        let tensors = vec![
            ("image_latents", images(0, 2, 2)),
            ("text_embeddings", texts.copy()),
            ("text_mask", mask.copy()),
        ];
        let folder = written_as(2, &[("a.safetensors", "2x2", tensors)], None);
        let padded = |padding| open(&folder).text_padding(padding);
        let dataset = padded(TextPadding::All(5)).expect("longer than the texts");
        let batch = dataset.batch(&[0, 1]).expect("sound samples");
        let (found, found_mask) = (&batch.tensors["text_embeddings"], &batch.tensors["text_mask"]);
        assert!(found.equal(&texts.constant_pad_nd([0, 0, 0, 2])));
        assert!(found_mask.equal(&mask.constant_pad_nd([0, 2])));
        let shapes = dataset.sample_shapes(&dataset.groups()[0]);
        assert_eq!((&shapes["text_embeddings"], &shapes["text_mask"]), (&vec![5, 2], &vec![5]));
        assert_eq!(dataset.extended_text(), Some(3));
        for padding in [TextPadding::Tokens(5), TextPadding::All(3), TextPadding::Longest] {
            let dataset = padded(padding).expect("long enough");
            let batch = dataset.batch(&[0, 1]).expect("sound samples");
            assert!(batch.tensors["text_embeddings"].equal(&texts), "{padding:?}");
            assert_eq!(dataset.extended_text(), None);
        }
        let error = padded(TextPadding::All(2)).expect_err("too short").to_string();
        assert!(error.contains("group `2x2` has a text of 3 tokens"), "{error}");
    }

    #[test]
    fn a_mask_of_pixels_is_one_of_latents_in_a_batch() {
        let draw = || Tensor::rand([2, 16, 16], (Kind::Float, Device::Cpu));
        let mask = Key::new(1, Purpose::Test).seeded(draw).gt(0.5);
        let tensors = vec![("image_latents", images(0, 2, 2)), ("loss_mask", mask.copy())];
        let folder = written_as(1, &[("a.safetensors", "2x2", tensors)], None);
        let dataset = open(&folder);
        assert_eq!(dataset.sample_shapes(&dataset.groups()[0])["loss_mask"], [2, 2]);
        let batch = dataset.batch(&[1, 0]).expect("sound samples");
        let expected = mask.flip([0]).to_kind(Kind::Float).adaptive_avg_pool2d([2, 2]);
        assert!(batch.tensors["loss_mask"].allclose(&expected, 1e-6, 1e-6, false));
        assert!(dataset.sample(0).expect("a sample")["loss_mask"].equal(&mask.get(0)), "as stored");
    }

    #[test]
    fn a_text_that_is_not_finite_is_named_with_its_sample() {
        let folder = unequal();
        let path = folder.path().join("b.safetensors");
        let mut bytes = std::fs::read(&path).expect("a file");
        let number = half::f16::from_f32(4.0).to_le_bytes();
        let place = bytes.windows(2).rposition(|two| two == number).expect("the last sample's");
        bytes[place..place + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
        std::fs::write(&path, bytes).expect("written again");
        let dataset = open(&folder);
        let error = dataset.batch(&[0, 3]).expect_err("not finite").to_string();
        assert!(error.contains("`text_embeddings` of sample 3 (row 10)"), "{error}");
        let dataset = open(&folder).on_bad(OnBad::Skip);
        assert_eq!(dataset.batch(&[3]).expect("a neighbour").bad_samples, 1);
    }
}
