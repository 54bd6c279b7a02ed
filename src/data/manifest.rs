//! `dataset.json`: the description of a dataset and the list of its files.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::DataType;
use super::settings::MOST_REPEATS;
use super::unmade::way_to_a_dataset;
use crate::error::{Error, Result};
use crate::files::contents::no_json;
use crate::files::safetensors::{open_error, refuse_pickled_data};
use crate::files::sha256;

/// Name of the file in a dataset's folder.
pub const FILE_NAME: &str = "dataset.json";
const FORMAT: &str = "fm-dist dataset";
/// Versions that are read. The second has captions, repeats, and texts of unequal length in one
/// group.
const VERSIONS: [u64; 2] = [1, 2];
/// Maximum size of the file, enough for a hundred thousand listed files.
const MAX_BYTES: u64 = 16 << 20;

/// The links that are followed in a dataset's folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Links {
    /// Those to files inside of the folder.
    #[default]
    Inside,
    /// All, as Hugging Face's cache needs it, which keeps the files of a snapshot elsewhere.
    Followed,
}

impl Links {
    /// Returns the choice of a setting or an argument.
    pub fn followed(followed: bool) -> Self {
        if followed { Links::Followed } else { Links::Inside }
    }
}

/// The contents of `dataset.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u64,
    pub name: String,
    /// Origin of the data, for readers.
    pub source: String,
    pub licence: String,
    pub data_type: DataType,
    pub files: Vec<FileEntry>,
    pub captions: Option<CaptionsEntry>,
    pub conditions: Option<ConditionsEntry>,
    pub empty_prompt: Option<EmptyPromptEntry>,
}

/// One file of samples.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Path relative to the dataset's folder.
    pub path: String,
    pub samples: u64,
    /// Name of the resolution group.
    pub group: String,
    pub sha256: String,
    /// True if the file holds one sample without an axis of samples.
    #[serde(default)]
    pub single: bool,
    /// True if the texts of a single sample have a length of their own, and no mask.
    #[serde(default)]
    pub unequal: bool,
    /// Times that an epoch takes each of its samples.
    #[serde(default = "once")]
    pub repeats: u64,
}

fn once() -> u64 {
    1
}

/// The file of captions, one JSON object a line for each sample.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionsEntry {
    pub path: String,
    pub sha256: String,
}

/// The file of named conditions, e.g. one text embedding for each class, from which images are
/// generated.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConditionsEntry {
    pub path: String,
    /// One name for each row of the file's tensors.
    pub names: Vec<String>,
    pub sha256: String,
}

/// The file of the empty prompt's conditions, which can replace dropped conditions.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmptyPromptEntry {
    /// Path of a file with one sample's tensors, without a batch axis.
    pub path: String,
    pub sha256: String,
}

impl FileEntry {
    fn check_repeats(&self, version: u64) -> Result<(), String> {
        let FileEntry { path, repeats, .. } = self;
        if !(1..=MOST_REPEATS).contains(repeats) {
            return Err(format!("`{path}` has repeats = {repeats}; expected 1 to {MOST_REPEATS}"));
        }
        if *repeats > 1 && version < 2 {
            let what = "which version 2 of the format brings; set version = 2";
            return Err(format!("`{path}` has repeats, {what}"));
        }
        Ok(())
    }
}

impl Manifest {
    /// Reads `dataset.json` of a folder.
    ///
    /// # Errors
    /// [`Error::Data`] if it is missing, malformed or inconsistent.
    pub(super) fn read(folder: &Path, links: Links) -> Result<Manifest> {
        if !fs::metadata(folder).map_err(|e| open_error(folder, e))?.is_dir() {
            return Err(Error::data(
                folder,
                format!("is not a folder; expected one that holds {FILE_NAME}"),
            ));
        }
        let path = folder.join(FILE_NAME);
        if let Err(error) = path.symlink_metadata()
            && error.kind() == ErrorKind::NotFound
        {
            let way = way_to_a_dataset(folder).map(|way| format!("; {way}")).unwrap_or_default();
            return Err(Error::data(path, format!("does not exist{way}")));
        }
        let path = resolve(folder, FILE_NAME, links)?;
        if !fs::metadata(&path).map_err(|e| open_error(&path, e))?.is_file() {
            return Err(Error::data(path, "is not a regular file"));
        }
        let mut text = Vec::new();
        let file = File::open(&path).map_err(|e| open_error(&path, e))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(Error::storage(&path, "read"))?;
        Manifest::parse(&path, &text)
    }

    pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Manifest> {
        if text.len() as u64 > MAX_BYTES {
            return Err(Error::data(path, format!("is longer than the {MAX_BYTES} bytes allowed")));
        }
        let manifest: Manifest =
            serde_json::from_slice(text).map_err(|e| Error::data(path, no_json(text, &e)))?;
        manifest.check().map_err(|what| Error::data(path, what))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT || !VERSIONS.contains(&self.version) {
            let found = format!("`{}` version {}", self.format, self.version);
            let [first, last] = VERSIONS;
            return Err(format!(
                "is {found}; this program reads `{FORMAT}` versions {first} and {last}"
            ));
        }
        if self.captions.is_some() && self.version < 2 {
            return Err(
                "has captions, which version 2 of the format brings; set version = 2".into()
            );
        }
        if self.files.is_empty() {
            return Err("lists no files".into());
        }
        let mut paths = BTreeSet::new();
        for file in &self.files {
            if file.samples == 0 {
                return Err(format!("`{}` has samples = 0; leave empty files out", file.path));
            }
            if file.unequal && !file.single {
                return Err(format!("`{}` is unequal; only a single sample can be", file.path));
            }
            if file.single && (file.samples != 1 || self.version < 2) {
                let FileEntry { path, samples, .. } = file;
                return Err(format!(
                    "`{path}` is single and has samples = {samples} in version {}; \
                     expected one sample, and version 2",
                    self.version
                ));
            }
            file.check_repeats(self.version)?;
            if !paths
                .insert(parts_inside(&file.path).unwrap_or_else(|| vec![OsStr::new(&file.path)]))
            {
                return Err(format!("`{}` is listed twice", file.path));
            }
        }
        for (path, sha256) in self.hashes() {
            if sha256.len() != 64 || !sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            {
                return Err(format!("sha256 of `{path}` is not 64 lower-case hex digits"));
            }
        }
        Ok(())
    }

    /// True if the samples of a group may have texts of unequal length.
    pub(super) fn allows_unequal_texts(&self) -> bool {
        self.version >= 2
    }

    /// Returns the number of files besides `dataset.json`.
    pub(super) fn num_files(&self) -> usize {
        self.hashes().count()
    }

    /// Returns the paths of all files besides `dataset.json`.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.hashes().map(|(path, _)| path)
    }

    /// Returns path and hash of every file.
    fn hashes(&self) -> impl Iterator<Item = (&str, &str)> {
        let files = self.files.iter().map(|file| (file.path.as_str(), file.sha256.as_str()));
        let conditions = self
            .conditions
            .iter()
            .map(|conditions| (conditions.path.as_str(), conditions.sha256.as_str()));
        let empty_prompt =
            self.empty_prompt.iter().map(|empty| (empty.path.as_str(), empty.sha256.as_str()));
        let captions =
            self.captions.iter().map(|captions| (captions.path.as_str(), captions.sha256.as_str()));
        files.chain(captions).chain(conditions).chain(empty_prompt)
    }

    /// Returns a hash of everything that determines the data of a sample id; equal fingerprints
    /// mean equal data. Captions are no part of it: nothing is trained on them.
    pub(super) fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.data_type.word());
        for FileEntry { path, samples, group, sha256, single, unequal, repeats } in &self.files {
            // Quoted, so that different lists of files give different texts.
            hash.update(format!("\n{path:?} {samples} {group:?} {sha256}"));
            // Version 1 has neither, and its fingerprints stand in checkpoints.
            let flags = [(*single, " single"), (*unequal, " unequal")];
            flags.iter().filter(|(is_set, _)| *is_set).for_each(|(_, word)| hash.update(word));
            if *repeats > 1 {
                hash.update(format!(" {repeats} times"));
            }
        }
        if let Some(ConditionsEntry { path, names, sha256 }) = &self.conditions {
            hash.update(format!("\n{path:?} {names:?} {sha256}"));
        }
        if let Some(EmptyPromptEntry { path, sha256 }) = &self.empty_prompt {
            hash.update(format!("\n{path:?} {sha256}"));
        }
        sha256::hex(hash)
    }
}

/// Splits a relative path into names, without `.` and empty ones: `./a//b` gives `a`, `b`. `None`
/// if the path could leave its folder.
fn parts_inside(relative: &str) -> Option<Vec<&OsStr>> {
    let parts = Path::new(relative).components().filter(|part| *part != Component::CurDir);
    parts.map(|part| if let Component::Normal(name) = part { Some(name) } else { None }).collect()
}

/// Returns the path of a dataset's file, which must be inside its folder: the real one, or that of
/// a link out of the folder which is followed.
///
/// # Errors
/// [`Error::Data`] if the path leaves the folder, names no file or a pickle.
pub(super) fn resolve(folder: &Path, relative: &str, links: Links) -> Result<PathBuf> {
    let path = folder.join(relative);
    match parts_inside(relative) {
        None => {
            return Err(Error::data(folder, format!("path `{relative}` leaves the data folder")));
        }
        Some(parts) if parts.is_empty() => {
            return Err(Error::data(folder, format!("path `{relative}` names no file")));
        }
        Some(_) => {}
    }
    refuse_pickled_data(&path)?;
    let real = path.canonicalize().map_err(|e| open_error(&path, e))?;
    let is_inside = real.starts_with(folder.canonicalize().map_err(|e| open_error(folder, e))?);
    match links {
        _ if is_inside => Ok(real),
        Links::Followed => Ok(path),
        Links::Inside => Err(Error::data(
            path,
            format!(
                "path leaves the data folder: it is a link to {}; data.follow_links = true, or \
                 --follow-links of fm-dist data, follows such links",
                real.display()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{"path":"a.safetensors","samples":2,"group":"8x8","sha256":"HASH"}"#;

    fn manifest(files: &str) -> Result<Manifest> {
        let head = r#""format":"fm-dist dataset","version":1,"name":"n","source":"s","licence":"l","data_type":"image""#;
        let text = format!("{{{head},\"files\":[{files}]}}").replace("HASH", &"0a".repeat(32));
        Manifest::parse(Path::new(FILE_NAME), text.as_bytes())
    }

    #[test]
    fn a_manifest_that_contradicts_itself_is_refused() {
        let reason = |files: &str| manifest(files).expect_err("refused").to_string();
        assert_eq!(reason(""), "dataset.json: lists no files");
        assert_eq!(
            reason(&format!("{FILE},{FILE}")),
            "dataset.json: `a.safetensors` is listed twice"
        );
        assert_eq!(
            reason(&FILE.replace(":2", ":0")),
            "dataset.json: `a.safetensors` has samples = 0; leave empty files out"
        );
        assert_eq!(
            reason(&FILE.replace("HASH", "0A")),
            "dataset.json: sha256 of `a.safetensors` is not 64 lower-case hex digits"
        );
        for other in ["./a.safetensors", ".//a.safetensors", "././a.safetensors"] {
            let twice = format!("{FILE},{}", FILE.replace("a.safetensors", other));
            assert_eq!(reason(&twice), format!("dataset.json: `{other}` is listed twice"));
        }
        assert!(
            reason(&FILE.replace("group", "grop"))
                .starts_with("dataset.json: unknown field `grop`, expected one of `path`")
        );
    }

    #[test]
    fn another_format_or_version_is_named() {
        let text = r#"{"format":"fm-dist dataset","version":3,"name":"","source":"","licence":"","data_type":"video","files":[]}"#;
        let error = Manifest::parse(Path::new(FILE_NAME), text.as_bytes())
            .expect_err("version 3")
            .to_string();
        assert_eq!(
            error,
            "dataset.json: is `fm-dist dataset` version 3; this program reads `fm-dist dataset` versions 1 and 2"
        );
    }

    #[test]
    fn the_fingerprint_follows_how_a_file_is_read() {
        let single = FILE.replace(":2", ":1").replace('}', r#","single":true}"#);
        let unequal = single.replace('}', r#","unequal":true}"#);
        let fingerprint = |files: &str, version: &str| {
            let head = r#""format":"fm-dist dataset","name":"n","source":"s","licence":"l","data_type":"image""#;
            let text = format!("{{{head},\"version\":{version},\"files\":[{files}]}}")
                .replace("HASH", &"0a".repeat(32));
            let manifest = Manifest::parse(Path::new(FILE_NAME), text.as_bytes());
            manifest.expect("sound").fingerprint()
        };
        let of_version_1 = fingerprint(FILE, "1");
        assert_eq!(
            of_version_1, "38f11965f29e289566abe3146fa69057c44e8abb172abd4947dcf93e81de686c",
            "runs on such data would not resume"
        );
        assert_eq!(of_version_1, fingerprint(FILE, "2"));
        let plain = FILE.replace(":2", ":1");
        let all = [plain, single, unequal].map(|file| fingerprint(&file, "2"));
        assert_eq!(BTreeSet::from_iter(&all).len(), all.len(), "{all:?}");
    }

    #[test]
    fn the_fingerprint_follows_what_a_sample_id_stands_for() {
        let fingerprint = |files: &str| manifest(files).expect("sound").fingerprint();
        let known = fingerprint(FILE);
        assert_eq!(known, fingerprint(FILE));
        for change in [
            FILE.replace("a.safe", "b.safe"),
            FILE.replace(":2", ":3"),
            FILE.replace("8x8", "8x9"),
            FILE.replace("HASH", &"0b".repeat(32)),
        ] {
            assert_ne!(known, fingerprint(&change), "{change}");
        }
    }
}
