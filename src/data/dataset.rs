//! A dataset: a folder with `dataset.json` and the safetensors files that it lists, or the same
//! compiled into the binary.
//!
//! A file holds samples of one shape, stacked along axis 0 of every tensor, under the keys that
//! batches use. Files of one resolution group have equal keys, kinds and shapes, so that a batch
//! can mix their samples. Samples are numbered through all files in order. Files stay open as long
//! as there are descriptors, so that replacing a file during a run has no effect; the others are
//! opened for each read, which refuses a file that was replaced.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::Tensor;

use super::conditions::Conditions;
use super::empty_prompt::EmptyPrompt;
use super::group::{Group, check_latents, check_same, latents_key, layout_of};
use super::manifest::{self, FileEntry, Manifest};
use super::sample_file::SampleFile;
use super::settings::OnBad;
use super::{Batch, DataType};
use crate::error::{Error, Result};
use crate::files::descriptors::kept_open;
use crate::files::safetensors::{SafeTensors, refuse_pickle, row_bytes, with_rows};
use crate::files::sha256;
use crate::pulse;
use crate::tensor::bytes_mut;

/// Samples in files, read by number.
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    manifest: Manifest,
    /// One entry for each file of the manifest.
    files: Vec<SampleFile>,
    groups: Vec<Group>,
    conditions: Option<SafeTensors>,
    empty_prompt: Option<EmptyPrompt>,
    num_samples: u64,
    on_bad: OnBad,
}

impl Dataset {
    /// Opens a folder: reads `dataset.json` and the header of every file, and checks that they
    /// agree.
    ///
    /// # Errors
    /// [`Error::Data`] if something is missing, malformed, outside of the folder or at odds with
    /// the rest.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        refuse_pickle(folder)?;
        let manifest = Manifest::read(folder)?;
        let kept = kept_open(manifest.num_files());
        Dataset::keeping(folder, manifest, kept)
    }

    /// As [`open`](Self::open), but keeps only the first `kept` files open and opens the others for
    /// each read.
    pub(super) fn keeping(folder: &Path, manifest: Manifest, kept: usize) -> Result<Self> {
        let opened = Cell::new(0);
        Dataset::assemble(folder.into(), manifest, |relative| {
            let path = manifest::resolve(folder, relative)?;
            pulse::still_at_work();
            if opened.replace(opened.get() + 1) < kept {
                SafeTensors::open(path)
            } else {
                SafeTensors::open_on_demand(path)
            }
        })
    }

    /// As [`open`](Self::open), over bytes that are part of the binary: `dataset.json` and its
    /// files by their paths.
    pub fn embedded(
        json: &'static str,
        files: &'static [(&'static str, &'static [u8])],
    ) -> Result<Self> {
        let path = Path::new("embedded");
        let manifest = Manifest::parse(&path.join(manifest::FILE_NAME), json.as_bytes())?;
        Dataset::assemble(path.into(), manifest, |relative| {
            let found = files.iter().find(|(name, _)| *name == relative);
            let (name, bytes) = found
                .ok_or_else(|| Error::data(path.join(relative), "is not part of the binary"))?;
            SafeTensors::from_static(&format!("embedded/{name}"), bytes)
        })
    }

    fn assemble(
        path: PathBuf,
        manifest: Manifest,
        open: impl Fn(&str) -> Result<SafeTensors>,
    ) -> Result<Self> {
        let (files, groups) = (Vec::new(), Vec::new());
        let on_bad = OnBad::Stop;
        let mut dataset = Dataset {
            path,
            manifest,
            files,
            groups,
            conditions: None,
            empty_prompt: None,
            num_samples: 0,
            on_bad,
        };
        for index in 0..dataset.manifest.files.len() {
            let entry = dataset.manifest.files[index].clone();
            let tensors = open(&entry.path)?;
            dataset.add(&entry, tensors)?;
        }
        if let Some(entry) = &dataset.manifest.conditions {
            let file = open(&entry.path)?;
            layout_of(&file, entry.names.len() as u64, "names")?;
            dataset.conditions = Some(file);
        }
        if let Some(entry) = &dataset.manifest.empty_prompt {
            dataset.empty_prompt = Some(EmptyPrompt::read(open(&entry.path)?)?);
        }
        Ok(dataset)
    }

    fn add(&mut self, entry: &FileEntry, tensors: SafeTensors) -> Result<()> {
        let layout = layout_of(&tensors, entry.samples, "samples")?;
        check_latents(&layout, self.manifest.data_type)
            .map_err(|what| Error::data(tensors.path(), what))?;
        let known = self.groups.iter().position(|group| group.name == entry.group);
        let group = known.unwrap_or(self.groups.len());
        match self.files.iter().find(|file| file.group == group) {
            Some(first) => check_same(&tensors, &layout, &first.tensors, &self.groups[group])?,
            None => self.groups.push(Group {
                name: entry.group.clone(),
                sample_ids: Vec::new(),
                layout,
            }),
        }
        let first_id = self.num_samples;
        self.num_samples += entry.samples;
        self.groups[group].sample_ids.extend(first_id..self.num_samples);
        self.files.push(SampleFile { tensors, first_id, group });
        Ok(())
    }

    /// Returns the folder, or `embedded`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns name, source and licence of the data, and the list of files.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn num_samples(&self) -> u64 {
        self.num_samples
    }

    pub fn data_type(&self) -> DataType {
        self.manifest.data_type
    }

    /// Returns the resolution groups in the order in which their first files are listed.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Returns the shape of one sample's latents, `[C, (F,) H, W]`; `None` if there is no such
    /// group.
    pub fn latent_shape(&self, group: &str) -> Option<&[i64]> {
        let group = self.groups.iter().find(|known| known.name == group)?;
        group.layout.get(latents_key(self.data_type())).map(|(_, shape)| shape.as_slice())
    }

    /// Returns the shapes of the empty prompt's tensors by key; empty if the dataset has no empty
    /// prompt.
    pub fn empty_prompt_shapes(&self) -> BTreeMap<String, Vec<i64>> {
        let infos = self.empty_prompt.iter().flat_map(|empty| empty.file.tensors());
        infos.map(|info| (info.name.clone(), info.shape.clone())).collect()
    }

    /// Returns hex digits that change with the files' names, groups, sample counts or hashes, as
    /// `dataset.json` gives them.
    pub fn fingerprint(&self) -> String {
        self.manifest.fingerprint()
    }

    /// Reads every file whole and compares it with its hash in `dataset.json`.
    ///
    /// # Errors
    /// [`Error::Data`] for the first file that differs.
    pub fn verify_hashes(&self) -> Result<()> {
        let files = self
            .files
            .iter()
            .map(|file| &file.tensors)
            .zip(self.manifest.files.iter().map(|entry| &entry.sha256));
        let conditions =
            self.conditions.iter().zip(self.manifest.conditions.iter().map(|entry| &entry.sha256));
        let empty_prompt = self.empty_prompt.iter().map(|empty| &empty.file);
        let empty_prompt =
            empty_prompt.zip(self.manifest.empty_prompt.iter().map(|entry| &entry.sha256));
        for (file, expected) in files.chain(conditions).chain(empty_prompt) {
            let mut hash = Sha256::new();
            file.for_each_piece(|piece| hash.update(piece))?;
            let found = sha256::hex(hash);
            if found != *expected {
                return Err(Error::data(
                    file.path(),
                    format!("has sha256 {found}, {} says {expected}", manifest::FILE_NAME),
                ));
            }
        }
        Ok(())
    }

    /// Reads every sample and refuses the first that is not finite, unless such samples are
    /// skipped.
    pub fn verify_numbers(&self) -> Result<()> {
        let refused = self.on_bad == OnBad::Stop;
        self.files.iter().filter(|_| refused).try_for_each(SampleFile::check_numbers)
    }

    /// Sets the treatment of samples that are not finite.
    pub fn on_bad(mut self, on_bad: OnBad) -> Self {
        self.on_bad = on_bad;
        self
    }

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
        let keys = self.groups[group].layout.keys();
        let mut tensors = keys
            .map(|key| Ok((key.clone(), self.stacked(key, ids)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        tensors.extend(self.empty_prompt.iter().flat_map(EmptyPrompt::tensors));
        Ok(Batch { tensors, data_type: self.data_type(), sample_ids: ids.to_vec(), bad_samples })
    }

    /// Returns the sample itself if all its numbers are finite, otherwise the next of its group
    /// that is; the result is the same on every rank.
    fn sound_from(&self, id: u64) -> Result<u64> {
        let ids = &self.groups[self.file_of(id).group].sample_ids;
        let place = ids.binary_search(&id).expect("a sample is in its group");
        let (before, after) = ids.split_at(place);
        for candidate in after.iter().chain(before) {
            if self.file_of(*candidate).is_finite(*candidate)? {
                return Ok(*candidate);
            }
        }
        Err(Error::data(&self.path, format!("no sample of the group of sample {id} is finite")))
    }

    /// Returns one key of these samples, which are of one group, as one tensor `[samples, …]`, and
    /// reads no other.
    ///
    /// # Errors
    /// [`Error::Data`] if their group has no such key; otherwise those of [`batch`](Self::batch).
    pub fn stacked(&self, key: &str, ids: &[u64]) -> Result<Tensor> {
        let first = &self.file_of(ids[0]).tensors;
        let info = first.info(key)?;
        let row_bytes = row_bytes(info) as usize;
        let mut stacked = first.empty_tensor(&with_rows(info, ids.len()), info.kind)?;
        let mut rest = bytes_mut(&mut stacked);
        for run in ids.chunk_by(|a, b| self.file_of(*a).first_id == self.file_of(*b).first_id) {
            let (now, later) = rest.split_at_mut(run.len() * row_bytes);
            self.file_of(run[0]).read_rows(key, run, now)?;
            rest = later;
        }
        Ok(stacked)
    }

    fn file_of(&self, id: u64) -> &SampleFile {
        assert!(id < self.num_samples, "sample {id} of {}", self.num_samples);
        &self.files[self.files.partition_point(|file| file.first_id <= id) - 1]
    }

    /// Returns the named conditions, if the dataset has any.
    ///
    /// # Errors
    /// [`Error::Data`] naming the tensor that has a number which is not finite; errors of
    /// [`SafeTensors::read`].
    pub fn conditions(&self) -> Result<Option<Conditions>> {
        let pair = self.conditions.as_ref().zip(self.manifest.conditions.as_ref());
        pair.map(|(file, entry)| Conditions::read(file, entry)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tch::{Device, Kind};

    use super::*;
    use crate::data::made_up::{images, written};
    use crate::files::safetensors::write;
    use crate::files::sha256::HashingWriter;

    fn labels(first: i64, samples: i64) -> Tensor {
        Tensor::arange_start(first, first + samples, (Kind::Int64, Device::Cpu))
    }

    fn two_groups() -> tempfile::TempDir {
        let part = |first, samples, side| {
            vec![
                ("image_latents", images(first, samples, side)),
                ("labels", labels(first, samples)),
            ]
        };
        let parts = [
            ("a.safetensors", "2x2", part(0, 4, 2)),
            ("b.safetensors", "3x3", part(4, 3, 3)),
            ("c.safetensors", "2x2", part(7, 2, 2)),
        ];
        written(
            &parts,
            Some((&["zero", "one"], Tensor::ones([2, 5, 8], (Kind::Half, Device::Cpu)))),
        )
    }

    #[test]
    fn samples_are_numbered_through_all_files_and_grouped_by_resolution() {
        let folder = two_groups();
        let dataset = Dataset::open(folder.path()).expect("a sound dataset");
        assert_eq!((dataset.num_samples(), dataset.data_type()), (9, DataType::Image));
        let ids: Vec<(&str, &[u64])> = dataset
            .groups()
            .iter()
            .map(|group| (group.name.as_str(), group.sample_ids.as_slice()))
            .collect();
        assert_eq!(ids, [("2x2", &[0, 1, 2, 3, 7, 8][..]), ("3x3", &[4, 5, 6])]);
        assert_eq!(dataset.latent_shape("3x3"), Some(&[1, 3, 3][..]));
        assert_eq!(dataset.latent_shape("4x4"), None);
        dataset.verify_hashes().expect("untouched files");
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

    #[test]
    fn every_batch_carries_the_empty_prompt() {
        let folder = two_groups();
        let empty = Tensor::ones([5, 8], (Kind::Half, Device::Cpu));
        let mut file = HashingWriter::new(
            File::create(folder.path().join("empty.safetensors")).expect("a new file"),
        );
        write(&mut file, &[("text_embeddings", &empty)], &BTreeMap::new()).expect("a sound file");
        let path = folder.path().join(manifest::FILE_NAME);
        let mut manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).expect("written")).expect("JSON");
        let before = Dataset::open(folder.path()).expect("a sound dataset").fingerprint();
        manifest["empty_prompt"] =
            serde_json::json!({"path": "empty.safetensors", "sha256": file.finish().1});
        std::fs::write(&path, manifest.to_string()).expect("written again");
        let dataset = Dataset::open(folder.path()).expect("a sound dataset");
        assert!(
            dataset.batch(&[5, 6]).expect("sound samples").tensors["empty.text_embeddings"]
                .equal(&empty)
        );
        assert_ne!(dataset.fingerprint(), before);
        dataset.verify_hashes().expect("untouched files");
        std::fs::write(
            folder.path().join("empty.safetensors"),
            std::fs::read(folder.path().join("a.safetensors")).expect("written"),
        )
        .expect("written again");
        assert!(Dataset::open(folder.path()).expect("sound headers").verify_hashes().is_err());
    }

    #[test]
    fn an_embedded_dataset_equals_its_folder() {
        let folder = two_groups();
        // Leaked once, since embedded bytes live as long as the binary.
        let embed = |name: &str| -> &'static [u8] {
            std::fs::read(folder.path().join(name)).expect("a written file").leak()
        };
        let names = ["a.safetensors", "b.safetensors", "c.safetensors", "conditions.safetensors"];
        let files: &'static [(&str, &[u8])] = names.map(|name| (name, embed(name))).to_vec().leak();
        let json = std::str::from_utf8(embed(manifest::FILE_NAME)).expect("text");
        let embedded = Dataset::embedded(json, files).expect("a sound dataset");
        let opened = Dataset::open(folder.path()).expect("a sound dataset");
        assert_eq!(embedded.fingerprint(), opened.fingerprint());
        let (one, other) = (
            embedded.batch(&[8, 2]).expect("sound samples"),
            opened.batch(&[8, 2]).expect("sound samples"),
        );
        assert!(one.tensors["image_latents"].equal(&other.tensors["image_latents"]));
        embedded.verify_hashes().expect("the same bytes");
        let missing =
            Dataset::embedded(json, &files[..2]).expect_err("a file is missing").to_string();
        assert_eq!(missing, "embedded/c.safetensors: is not part of the binary");
    }
}
