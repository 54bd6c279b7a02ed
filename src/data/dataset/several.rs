//! Several folders as one dataset.
//!
//! Ids run through the folders in order. Groups of equal layouts are one group, whatever their
//! names, so that a batch mixes samples of several folders.

use std::ops::Range;
use std::path::PathBuf;

use super::sample_file::SampleFile;
use super::{Dataset, TEXTS};
use crate::data::empty_prompt::EmptyPrompt;
use crate::data::order::Stock;
use crate::data::settings::DataSettings;
use crate::error::{Error, Result};

impl Dataset {
    /// Opens the dataset that the settings name, or all of them as one.
    ///
    /// # Errors
    /// As [`Dataset::open`]; [`Error::Data`] if two have different empty prompts.
    pub fn configured(settings: &DataSettings) -> Result<Self> {
        let mut datasets = Vec::new();
        for entry in &settings.datasets {
            let mut dataset = Dataset::named(&entry.path, settings.links())?;
            dataset.folders[0].repeats = entry.repeats;
            // A dataset alone is all of an epoch.
            dataset.folders[0].weight =
                if settings.datasets.len() > 1 { entry.weight } else { 0.0 };
            datasets.push(dataset);
        }
        match datasets.len() {
            0 => Dataset::named(&settings.path, settings.links()),
            1 => Ok(datasets.remove(0)),
            _ => Dataset::joined(datasets),
        }
    }

    /// Joins datasets in this order.
    fn joined(datasets: Vec<Dataset>) -> Result<Self> {
        let paths: Vec<String> =
            datasets.iter().map(|dataset| dataset.path.display().to_string()).collect();
        let mut whole = Dataset::empty(PathBuf::from(paths.join(" + ")));
        datasets.into_iter().try_for_each(|dataset| whole.join(dataset))?;
        whole.groups.iter_mut().for_each(|group| group.sample_ids.sort_unstable());
        whole.check_empty_prompts()?;
        if whole.pads_texts() {
            for empty in whole.folders.iter_mut().filter_map(|folder| folder.empty_prompt.as_mut())
            {
                TEXTS.iter().for_each(|(text, mask)| empty.add_mask(text, mask));
            }
        }
        Ok(whole)
    }

    fn join(&mut self, other: Dataset) -> Result<()> {
        let first = self.num_samples;
        self.num_samples = first
            .checked_add(other.num_samples)
            .ok_or_else(|| Error::data(&other.path, "has more samples than 64 bits count"))?;
        let mut places = Vec::new();
        for mut group in other.groups {
            group.sample_ids.iter_mut().for_each(|id| *id += first);
            match self.groups.iter().position(|known| known.fits(&group)) {
                Some(place) => {
                    self.groups[place].lengthen(&group.layout);
                    self.groups[place].sample_ids.extend(group.sample_ids);
                    places.push(place);
                }
                None => {
                    if self.groups.iter().any(|known| known.name == group.name) {
                        group.name = format!("{} of {}", group.name, other.path.display());
                    }
                    places.push(self.groups.len());
                    self.groups.push(group);
                }
            }
        }
        for mut file in other.files {
            file.first_id += first;
            file.group = places[file.group];
            self.files.push(file);
        }
        for mut folder in other.folders {
            folder.sample_ids = folder.sample_ids.start + first..folder.sample_ids.end + first;
            self.folders.push(folder);
        }
        Ok(())
    }

    /// Refuses folders whose empty prompts differ, since a batch has one.
    fn check_empty_prompts(&self) -> Result<()> {
        let pairs = || {
            self.folders
                .iter()
                .filter_map(|folder| folder.empty_prompt.as_ref().map(|empty| (folder, empty)))
        };
        let Some((first, expected)) = pairs().next() else { return Ok(()) };
        match pairs().find_map(|(folder, empty)| Some((folder, empty.difference(expected)?))) {
            Some((folder, key)) => {
                let what = format!(
                    "`{key}` of the empty prompt differs from that of {}; the datasets of a run need \
                     the same empty prompt, by one text encoder",
                    first.path.display()
                );
                Err(Error::data(&folder.path, what))
            }
            None => Ok(()),
        }
    }

    /// Returns the empty prompt, which all folders that have one share.
    pub(super) fn empty_prompt(&self) -> Option<&EmptyPrompt> {
        self.folders.iter().find_map(|folder| folder.empty_prompt.as_ref())
    }

    /// Returns how often an epoch takes the samples of each group, without those that are held out.
    pub(crate) fn stock(&self) -> Vec<Vec<Stock>> {
        let repeats = self.folders.iter().enumerate().flat_map(|(index, folder)| {
            let files = folder.manifest.files.iter();
            files.map(move |entry| (index, folder.repeats.saturating_mul(entry.repeats)))
        });
        let mut groups: Vec<Vec<Stock>> = vec![Vec::new(); self.groups.len()];
        for (file, (folder, repeats)) in self.files.iter().zip(repeats) {
            let stock = &mut groups[file.group];
            for ids in self.trained_of(file) {
                match stock.last_mut() {
                    Some(last)
                        if (last.ids.end, last.repeats, last.folder)
                            == (ids.start, repeats, folder) =>
                    {
                        last.ids.end = ids.end;
                    }
                    _ => stock.push(Stock { ids, repeats, folder }),
                }
            }
        }
        groups
    }

    /// Returns the runs of consecutive samples of a file that can be trained on.
    fn trained_of(&self, file: &SampleFile) -> Vec<Range<u64>> {
        let (first, end) = (file.first_id, file.first_id + file.samples);
        let held_out = &self.groups[file.group].held_out;
        let within = |id: u64| held_out.partition_point(|held_out| *held_out < id);
        let cuts = &held_out[within(first)..within(end)];
        let starts = std::iter::once(first).chain(cuts.iter().map(|id| id + 1));
        let ends = cuts.iter().copied().chain([end]);
        starts.zip(ends).map(|(start, end)| start..end).filter(|ids| !ids.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tch::Tensor;
    use tempfile::TempDir;

    use super::*;
    use crate::data::made_up::{Part, images, two_groups, written, written_as};
    use crate::data::manifest;
    use crate::data::settings::DatasetSettings;
    use crate::data::{DataType, Folder, OnSmallGroup, Order};

    fn configured(entries: &[(&TempDir, f64, u64)]) -> Result<Dataset> {
        let entry = |(folder, weight, repeats): &(&TempDir, f64, u64)| DatasetSettings {
            path: folder.path().display().to_string(),
            weight: *weight,
            repeats: *repeats,
        };
        let datasets = entries.iter().map(entry).collect();
        Dataset::configured(&DataSettings { datasets, ..DataSettings::default() })
    }

    fn part(name: &'static str, first: i64, samples: i64, side: i64) -> Part<'static> {
        let labels =
            Tensor::arange_start(first, first + samples, (tch::Kind::Int64, tch::Device::Cpu));
        let tensors = vec![("image_latents", images(first, samples, side)), ("labels", labels)];
        (name, "any", tensors)
    }

    /// Changes `dataset.json` of a folder.
    fn edit(folder: &TempDir, change: impl FnOnce(&mut serde_json::Value)) {
        let path = folder.path().join(manifest::FILE_NAME);
        let mut json = serde_json::from_slice(&fs::read(&path).expect("written")).expect("JSON");
        change(&mut json);
        fs::write(&path, json.to_string()).expect("written again");
    }

    #[test]
    fn ids_run_through_the_folders_and_equal_layouts_share_a_group() {
        let (a, b) = (
            two_groups(),
            written(&[part("x.safetensors", 9, 3, 3), part("y.safetensors", 12, 2, 3)], None),
        );
        let dataset = configured(&[(&a, 0.0, 1), (&b, 0.0, 1)]).expect("two sound datasets");
        let groups: Vec<(&str, &[u64])> = dataset
            .groups()
            .iter()
            .map(|group| (group.name.as_str(), group.sample_ids.as_slice()))
            .collect();
        assert_eq!(
            groups,
            [("2x2", &[0, 1, 2, 3, 7, 8][..]), ("3x3", &[4, 5, 6, 9, 10, 11, 12, 13])]
        );
        let batch = dataset.batch(&[13, 4, 9]).expect("of one group");
        assert!(batch.tensors["labels"].equal(&Tensor::from_slice(&[13i64, 4, 9])));
        dataset.verify_hashes().expect("untouched files");
        assert_eq!(
            dataset.conditions().expect("sound").expect("of the first").names,
            ["zero", "one"]
        );
        let ids: Vec<_> = dataset.folders().iter().map(Folder::sample_ids).collect();
        assert_eq!(ids, [0..9, 9..14]);
    }

    #[test]
    fn groups_that_differ_keep_apart_under_names_of_their_own() {
        let other = vec![("image_latents", images(9, 4, 2))];
        let (a, b) = (two_groups(), written(&[("x.safetensors", "2x2", other)], None));
        let dataset = configured(&[(&a, 0.0, 1), (&b, 0.0, 1)]).expect("two sound datasets");
        let names: Vec<_> = dataset.groups().iter().map(|group| group.name.clone()).collect();
        let third = format!("2x2 of {}", b.path().display());
        assert_eq!(names, ["2x2".to_string(), "3x3".into(), third]);
        assert!(dataset.groups().iter().all(|group| group.data_type == DataType::Image));
    }

    #[test]
    fn one_dataset_is_itself_and_its_fingerprint_changes_with_its_repeats_only() {
        let folder = two_groups();
        let alone = Dataset::open(folder.path()).expect("a sound dataset");
        let listed = |weight, repeats| {
            configured(&[(&folder, weight, repeats)]).expect("a sound dataset").fingerprint()
        };
        assert_eq!(listed(0.0, 1), alone.fingerprint());
        assert_eq!(listed(3.0, 1), alone.fingerprint());
        assert_ne!(listed(0.0, 2), alone.fingerprint());
        let other = two_groups();
        edit(&other, |json| json["version"] = 2.into());
        edit(&other, |json| json["files"][1]["repeats"] = 3.into());
        let of_file = Dataset::open(other.path()).expect("a sound dataset");
        assert_ne!(of_file.fingerprint(), alone.fingerprint());
        let both = |weight| {
            configured(&[(&folder, 1.0, 1), (&other, weight, 1)]).expect("sound").fingerprint()
        };
        assert_ne!(both(1.0), both(2.0));
    }

    #[test]
    fn repeats_of_a_file_and_of_its_dataset_multiply() {
        let (folder, other) = (two_groups(), two_groups());
        edit(&folder, |json| json["version"] = 2.into());
        edit(&folder, |json| json["files"][1]["repeats"] = 3.into());
        let dataset = configured(&[(&folder, 0.0, 2), (&other, 0.0, 1)]).expect("sound");
        let order = Order::of(&dataset, 2, 1, OnSmallGroup::Stop).expect("large enough groups");
        assert_eq!((order.samples_of(0), order.samples_of(1)), (2 * 6 + 6 * 3, 9));
    }

    #[test]
    fn repeats_are_refused_where_they_mean_nothing() {
        let refused = |repeats: i64, version: i64| {
            let folder = two_groups();
            edit(&folder, |json| json["version"] = version.into());
            edit(&folder, |json| json["files"][0]["repeats"] = repeats.into());
            Dataset::open(folder.path()).expect_err("refused").to_string()
        };
        assert!(refused(0, 2).contains("has repeats = 0; expected 1 to 1048576"));
        assert!(refused(2, 1).contains("set version = 2"));
    }

    /// A dataset with an empty prompt of this number.
    fn with_empty_prompt(number: f64) -> TempDir {
        let folder = written_as(2, &[part("a.safetensors", 0, 4, 2)], None);
        let empty = Tensor::full([5, 8], number, (tch::Kind::Half, tch::Device::Cpu));
        let path = folder.path().join("empty.safetensors");
        let mut file =
            crate::files::sha256::HashingWriter::new(fs::File::create(path).expect("a file"));
        crate::files::safetensors::write(
            &mut file,
            &[("text_embeddings", &empty)],
            &Default::default(),
        )
        .expect("a sound file");
        let sha256 = file.finish().1;
        edit(&folder, |json| {
            json["empty_prompt"] =
                serde_json::json!({"path": "empty.safetensors", "sha256": sha256});
        });
        folder
    }

    #[test]
    fn empty_prompts_of_several_datasets_are_one_or_refused_by_name() {
        let (one, same, other) =
            (with_empty_prompt(1.0), with_empty_prompt(1.0), with_empty_prompt(2.0));
        let without = written(&[part("a.safetensors", 0, 4, 2)], None);
        let dataset = configured(&[(&without, 0.0, 1), (&one, 0.0, 1), (&same, 0.0, 1)]);
        let dataset = dataset.expect("they agree");
        assert!(dataset.batch(&[0, 5]).expect("sound").get("empty.text_embeddings").is_some());
        let error = configured(&[(&one, 0.0, 1), (&other, 0.0, 1)]).expect_err("they differ");
        let text = error.to_string();
        assert!(
            text.contains("`text_embeddings` of the empty prompt differs from that of"),
            "{text}"
        );
        assert!(text.contains(&other.path().display().to_string()), "{text}");
    }
}
