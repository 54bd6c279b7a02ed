//! A dataset: a folder with `dataset.json` and the safetensors files that it lists, or the same
//! compiled into the binary.
//!
//! A file holds samples of one shape, stacked along axis 0 of every tensor, under the keys that
//! batches use. Files of one resolution group have equal keys, kinds and shapes, so that a batch
//! can mix their samples; only texts may differ in length. A batch holds them as they are stored,
//! but for texts, which it pads, floats of 8 bits and masks of pixels. Samples are numbered through
//! all files in order, and through all folders where several are mixed. Files stay open as long as
//! there are descriptors, so that replacing a file during a run has no effect; the others are
//! opened for each read, which refuses a file that was replaced.

mod batch;
mod folder;
mod held_out;
mod pixel_masks;
mod sample_file;
mod scales;
mod several;
mod shapes;
mod unequal;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::Tensor;

use super::captions::Captions;
use super::conditions::Conditions;
use super::empty_prompt::EmptyPrompt;
use super::group::{Group, check_latents, check_same, layout_of};
use super::manifest::{self, FileEntry, Links, Manifest};
use super::settings::OnBad;
use crate::error::{Error, Result};
use crate::files::descriptors::kept_open;
use crate::files::safetensors::{Content, SafeTensors, is_eight_bits, refuse_pickled_data};
use crate::files::sha256;
use crate::pulse;
use crate::rng::hash_of_name;
pub use folder::Folder;
pub use pixel_masks::LOSS_MASK;
use sample_file::SampleFile;
pub use scales::SCALE;
pub(super) use scales::read_widened;
use scales::take_scales;
pub use unequal::{LENGTHS, TEXTS, TextPadding};
use unequal::{own_lengths, take_lengths, unmasked_texts};

/// Samples in files, read by number.
#[derive(Debug)]
pub struct Dataset {
    /// The folder's path, or those of all.
    path: PathBuf,
    folders: Vec<Folder>,
    /// One entry for each file of the manifests.
    files: Vec<SampleFile>,
    groups: Vec<Group>,
    num_samples: u64,
    /// Share of the samples that is held out of training.
    share: Option<f64>,
    on_bad: OnBad,
    padding: TextPadding,
    frames: bool,
}

impl Dataset {
    /// Opens a folder: reads `dataset.json` and the header of every file, and checks that they
    /// agree.
    ///
    /// # Errors
    /// [`Error::Data`] if something is missing, malformed, outside of the folder or at odds with
    /// the rest.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Dataset::open_with(folder, Links::Inside)
    }

    /// As [`open`](Self::open), but with a choice of the links to follow.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(folder: impl AsRef<Path>, links: Links) -> Result<Self> {
        let folder = folder.as_ref();
        refuse_pickled_data(folder)?;
        let manifest = Manifest::read(folder, links)?;
        let kept = kept_open(manifest.num_files());
        Dataset::keeping(folder, manifest, links, kept)
    }

    /// Opens a folder as if `json` were its `dataset.json`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn described_by(folder: impl AsRef<Path>, json: &str, links: Links) -> Result<Self> {
        let folder = folder.as_ref();
        let manifest = Manifest::parse(&folder.join(manifest::FILE_NAME), json.as_bytes())?;
        let kept = kept_open(manifest.num_files());
        Dataset::keeping(folder, manifest, links, kept)
    }

    /// As [`open`](Self::open), but keeps only the first `kept` files open and opens the others for
    /// each read.
    pub(super) fn keeping(
        folder: &Path,
        manifest: Manifest,
        links: Links,
        kept: usize,
    ) -> Result<Self> {
        let opened = Cell::new(0);
        let captions = manifest.captions.as_ref().map(|entry| {
            Captions::open(manifest::resolve(folder, &entry.path, links)?, entry.clone())
        });
        let captions = captions.transpose()?;
        let mut dataset = Dataset::assemble(folder.into(), manifest, |relative| {
            let path = manifest::resolve(folder, relative, links)?;
            pulse::still_at_work();
            let file = SafeTensors::open_as(path, Content::Samples)?;
            if opened.replace(opened.get() + 1) < kept { Ok(file) } else { file.on_demand() }
        })?;
        dataset.folders[0].captions = captions;
        Ok(dataset)
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
        let mut dataset = Dataset::empty(path.clone());
        dataset.folders.push(Folder::new(path, manifest));
        for index in 0..dataset.manifest().files.len() {
            let entry = dataset.manifest().files[index].clone();
            let file = open(&entry.path)?;
            dataset.add(&entry, file)?;
        }
        if let Some(entry) = &dataset.manifest().conditions {
            let file = open(&entry.path)?;
            let is_scale = |key: &str| key.strip_suffix(SCALE).is_some_and(|key| file.holds(key));
            layout_of(&file, entry.names.len() as u64, "names", is_scale)?;
            dataset.folders[0].conditions = Some(file);
        }
        if let Some(entry) = &dataset.manifest().empty_prompt {
            let mut empty_prompt = EmptyPrompt::read(open(&entry.path)?)?;
            if dataset.pads_texts() {
                TEXTS.iter().for_each(|(text, mask)| empty_prompt.add_mask(text, mask));
            }
            dataset.folders[0].empty_prompt = Some(empty_prompt);
        }
        dataset.folders[0].sample_ids = 0..dataset.num_samples;
        Ok(dataset)
    }

    /// A dataset without samples, to which folders are added.
    fn empty(path: PathBuf) -> Self {
        let (folders, files, groups) = (Vec::new(), Vec::new(), Vec::new());
        let (on_bad, padding) = (OnBad::Stop, TextPadding::default());
        let (num_samples, share, frames) = (0, None, false);
        Dataset { path, folders, files, groups, num_samples, share, on_bad, padding, frames }
    }

    fn add(&mut self, entry: &FileEntry, tensors: SafeTensors) -> Result<()> {
        let own = if entry.unequal { unmasked_texts(&tensors) } else { Vec::new() };
        let tensors = if entry.single { tensors.with_one_row(&own) } else { tensors };
        let allowed = self.manifest().allows_unequal_texts();
        let has_other_rows = |key: &str| {
            let is_unequal = tensors.holds(&format!("{key}{LENGTHS}")) || key.ends_with(SCALE);
            own.contains(&key) || (allowed && is_unequal)
        };
        let mut layout = layout_of(&tensors, entry.samples, "samples", has_other_rows)?;
        let mut starts = own_lengths(&tensors, &own, &mut layout)?;
        let mut scales = BTreeMap::new();
        if allowed {
            scales = take_scales(&tensors, entry.samples, &mut layout)?;
            starts.extend(take_lengths(&tensors, entry.samples, &mut layout)?);
        } else if let Some((key, _)) = layout.iter().find(|(_, t)| is_eight_bits(t.kind)) {
            let what = format!(
                "`{key}` has floats of 8 bits, which version 2 of the format brings; set \
                 version = 2 in {}",
                manifest::FILE_NAME
            );
            return Err(Error::data(tensors.path(), what));
        }
        let data_type = self.manifest().data_type;
        check_latents(&layout, data_type).map_err(|what| Error::data(tensors.path(), what))?;
        let known = self.groups.iter().position(|group| group.name == entry.group);
        let group = known.unwrap_or(self.groups.len());
        match self.files.iter().find(|file| file.group == group) {
            Some(first) => {
                check_same(&tensors, &layout, &first.tensors, &self.groups[group])?;
                self.groups[group].lengthen(&layout);
            }
            None => self.groups.push(Group {
                name: entry.group.clone(),
                data_type,
                layout,
                ..Group::default()
            }),
        }
        let (first_id, samples) = (self.num_samples, entry.samples);
        self.num_samples = first_id
            .checked_add(samples)
            .ok_or_else(|| Error::data(&self.path, "lists more samples than 64 bits count"))?;
        self.groups[group].sample_ids.extend(first_id..self.num_samples);
        let hash = hash_of_name(&entry.sha256);
        self.files.push(SampleFile { tensors, first_id, samples, group, hash, starts, scales });
        Ok(())
    }

    /// Returns the folder, or `embedded`; in messages, all folders.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the folders, at least one.
    pub fn folders(&self) -> &[Folder] {
        &self.folders
    }

    /// Returns the path of the first folder that has samples of a group.
    pub fn path_of(&self, group: &Group) -> &Path {
        let has_first = |folder: &&Folder| {
            group.sample_ids.first().is_some_and(|first| folder.sample_ids.contains(first))
        };
        self.folders.iter().find(has_first).map_or(&self.path, |folder| &folder.path)
    }

    /// Returns name, source and licence of the data, and the list of files: those of the first
    /// folder.
    pub fn manifest(&self) -> &Manifest {
        &self.folders[0].manifest
    }

    /// Returns the name of the data, or all names.
    pub fn name(&self) -> String {
        let names: Vec<&str> =
            self.folders.iter().map(|folder| folder.manifest.name.as_str()).collect();
        names.join(" + ")
    }

    pub fn num_samples(&self) -> u64 {
        self.num_samples
    }

    /// Returns the resolution groups in the order in which their first files are listed.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Sets whether images become videos of one frame, `[C, 1, H, W]`, for a model of videos.
    pub fn with_frames(mut self, frames: bool) -> Self {
        self.frames = frames;
        self
    }

    /// Returns the empty prompt's tensors, one row of each, under the names that batches give them;
    /// none if the dataset has no empty prompt.
    pub fn empty_prompt_tensors(&self) -> Vec<(String, Tensor)> {
        self.empty_prompt().map(EmptyPrompt::tensors).unwrap_or_default()
    }

    /// Returns the shapes of the empty prompt's tensors by key, with a mask for each text that has
    /// none; empty if the dataset has no empty prompt.
    pub fn empty_prompt_shapes(&self) -> BTreeMap<String, Vec<i64>> {
        self.empty_prompt().map(EmptyPrompt::shapes).unwrap_or_default()
    }

    /// Returns the captions and sources of the samples, if the first folder has them.
    pub fn captions(&self) -> Option<&Captions> {
        self.folders[0].captions.as_ref()
    }

    /// Returns hex digits that change with the files' names, groups, sample counts, hashes or
    /// repeats, as `dataset.json` gives them, with the repeats and weights of the folders, and with
    /// the share of the samples that is held out of training.
    pub fn fingerprint(&self) -> String {
        let mut fingerprints: Vec<String> = self.folders.iter().map(Folder::fingerprint).collect();
        let of_folders = match fingerprints.len() {
            1 => fingerprints.remove(0),
            _ => sha256::hex(Sha256::new_with_prefix(fingerprints.join("\n"))),
        };
        self.with_share(of_folders)
    }

    /// Reads every file whole and compares it with its hash in `dataset.json`.
    ///
    /// # Errors
    /// [`Error::Data`] for the first file that differs.
    pub fn verify_hashes(&self) -> Result<()> {
        let mut files = self.files.as_slice();
        for folder in &self.folders {
            let (own, others) = files.split_at(folder.manifest.files.len());
            folder.verify_hashes(own)?;
            files = others;
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

    /// Sets the length to which texts are padded.
    ///
    /// # Errors
    /// [`Error::Data`] naming a group that has a longer text.
    pub fn text_padding(mut self, padding: TextPadding) -> Result<Self> {
        for group in &self.groups {
            let fits = padding.check(&group.name, &group.layout);
            fits.map_err(|what| Error::data(self.path_of(group), what))?;
        }
        self.padding = padding;
        Ok(self)
    }

    /// Returns the named conditions of the first folder that has any.
    ///
    /// # Errors
    /// [`Error::Data`] naming the tensor that has a number which is not finite; errors of
    /// [`SafeTensors::read`].
    pub fn conditions(&self) -> Result<Option<Conditions>> {
        let Some(folder) = self.folder_of_conditions() else { return Ok(None) };
        let pair = folder.conditions.as_ref().zip(folder.manifest.conditions.as_ref());
        pair.map(|(file, entry)| Conditions::read(file, entry)).transpose()
    }

    /// Returns the group whose shape generated samples have: the first of the folder that the
    /// conditions are of, or the first of all.
    pub fn sampled_group(&self) -> &Group {
        let first = self.folder_of_conditions().map_or(0, |folder| folder.sample_ids.start);
        &self.groups[self.file_of(first).group]
    }

    fn folder_of_conditions(&self) -> Option<&Folder> {
        self.folders.iter().find(|folder| folder.conditions.is_some())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::data::DataType;
    use crate::data::made_up::two_groups;
    use crate::files::safetensors::write;
    use crate::files::sha256::HashingWriter;

    #[test]
    fn samples_are_numbered_through_all_files_and_grouped_by_resolution() {
        let folder = two_groups();
        let dataset = Dataset::open(folder.path()).expect("a sound dataset");
        assert_eq!(dataset.num_samples(), 9);
        assert!(dataset.groups().iter().all(|group| group.data_type == DataType::Image));
        let ids: Vec<(&str, &[u64])> = dataset
            .groups()
            .iter()
            .map(|group| (group.name.as_str(), group.sample_ids.as_slice()))
            .collect();
        assert_eq!(ids, [("2x2", &[0, 1, 2, 3, 7, 8][..]), ("3x3", &[4, 5, 6])]);
        assert_eq!(dataset.latent_shape(&dataset.groups()[1]), [1, 3, 3]);
        dataset.verify_hashes().expect("untouched files");
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
