//! The cache of SimpleTuner: latents `<picture>.pt`, whose name may be a SHA-256 of the picture's
//! name without ending; texts `<MD5 of the caption>-<model>.pt`; and beside the pictures
//! `aspect_ratio_bucket_indices*.json`, which lists their paths. Files are one tensor or a
//! dictionary, perhaps compressed by gzip. Captions stand in no file of the cache: as SimpleTuner
//! does, they are taken from `<picture>.txt`, its lines, the picture's name or the instance prompt,
//! and the one whose text is cached is the right one.
//!
//! Source: SimpleTuner bc8e6ab, `helpers/caching/vae.py`, `helpers/caching/text_embeds.py` and
//! `helpers/prompts.py`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use md5::{Digest, Md5};
use serde::Deserialize;
use serde_json::Value;
use sha2::Sha256;

use super::file::{BARE, CacheFile};
use super::nemo::read_json;
use super::sample::{Cached, Collector, How, MEDIA};
use super::{ImportRequest, read_caption};
use crate::data::{Caption, latents_key};
use crate::datasets::index::find_if;
use crate::datasets::parallel::in_parallel;
use crate::encoding::Family;
use crate::error::{Error, Result};
use crate::files::sha256;
use crate::settings::Choice;

/// Families by the endings of texts' names.
const FAMILIES: [(&str, Family); 5] = [
    ("flux", Family::Flux),
    ("flux2", Family::Flux2),
    ("qwen_image", Family::QwenImage),
    ("wan", Family::Wan),
    ("hunyuanvideo", Family::HunyuanVideo15),
];
const LIST: &str = "aspect_ratio_bucket_indices";
/// Hexadecimal digits of an MD5, and of a SHA-256.
const MD5_DIGITS: usize = 32;
const SHA256_DIGITS: usize = 64;
/// Tokens of FLUX.2's texts, whose masks are kept; shorter ones were cut to what their masks let
/// through.
const FLUX2_TOKENS: i64 = 512;

/// Finds the samples of the folders of latents, texts and pictures together: one for each caption.
///
/// # Errors
/// [`Error::Data`] if a file is malformed, or no caption of a picture has a text.
pub fn find(request: &ImportRequest) -> Result<Vec<Cached>> {
    let files = Files::find(request)?;
    let samples = in_parallel(&files.latents, request.jobs, |path| files.samples(path))?;
    Ok(samples.into_iter().flatten().collect())
}

/// `aspect_ratio_bucket_indices*.json`.
#[derive(Deserialize)]
struct List {
    #[serde(default)]
    config: Config,
    aspect_ratio_bucket_indices: BTreeMap<String, Vec<String>>,
}

#[derive(Default, Deserialize)]
struct Config {
    /// A text or several.
    #[serde(default)]
    instance_prompt: Value,
}

/// A picture or video whose latents are cached.
struct Picture {
    /// Its name without ending.
    name: String,
    /// Unset if it is not among the folders that are read.
    path: Option<PathBuf>,
}

/// The files of all folders.
struct Files<'r> {
    request: &'r ImportRequest,
    family: Family,
    latents: Vec<PathBuf>,
    /// Texts of the family by the MD5 of their captions.
    texts: BTreeMap<String, PathBuf>,
    /// Pictures by their names without ending, and by the SHA-256 of those.
    pictures: BTreeMap<String, BTreeSet<PathBuf>>,
    /// Files of captions by their names without ending.
    captions: BTreeMap<String, BTreeSet<PathBuf>>,
    prompts: BTreeSet<String>,
}

impl<'r> Files<'r> {
    fn find(request: &'r ImportRequest) -> Result<Self> {
        let (mut latents, mut named) = (Vec::new(), Vec::new());
        let (mut pictures, mut captions) = (BTreeMap::new(), BTreeMap::new());
        let mut prompts = BTreeSet::new();
        for source in &request.sources {
            let mut all = Vec::new();
            find_if(source, &|_| true, &mut all)?;
            for path in all {
                let name = stem(&path);
                match path.extension().and_then(OsStr::to_str).unwrap_or_default() {
                    "pt" => match split_text(&name) {
                        Some((md5, model)) => {
                            named.push((md5.to_string(), model.to_string(), path))
                        }
                        None => latents.push(path),
                    },
                    "txt" => add(&mut captions, name, path),
                    "json" if name.starts_with(LIST) => {
                        let List { config, aspect_ratio_bucket_indices } = read_json(&path)?;
                        prompts.extend(texts_in(&config.instance_prompt));
                        for picture in aspect_ratio_bucket_indices.into_values().flatten() {
                            add_picture(&mut pictures, PathBuf::from(picture));
                        }
                    }
                    ending if MEDIA.contains(&ending.to_ascii_lowercase().as_str()) => {
                        add_picture(&mut pictures, path);
                    }
                    _ => (),
                }
            }
        }
        let first = &request.sources[0];
        if latents.is_empty() {
            return Err(Error::data(first, "holds no latents `<picture>.pt`, as SimpleTuner does"));
        }
        let (family, texts) = texts_of_one_family(named, request.family, first)?;
        Ok(Files { request, family, latents, texts, pictures, captions, prompts })
    }

    /// Returns one sample for each caption of the picture whose latents these are.
    fn samples(&self, path: &Path) -> Result<Vec<Cached>> {
        let latents = CacheFile::open(path)?;
        let picture = self.picture(path)?;
        let captions = self.captions(&picture)?;
        if captions.is_empty() {
            let what = format!(
                "has no text in the cache: neither the caption file of {} nor its name is a caption \
                 whose text is cached; add the folder of its captions by --captions",
                picture.name
            );
            return Err(Error::data(path, what));
        }
        let file = picture.path.as_deref().and_then(Path::file_name).map(OsStr::to_string_lossy);
        let name = file.unwrap_or(picture.name.as_str().into());
        let sample = |caption: &String| {
            let text = CacheFile::open(&self.texts[&md5(caption)])?;
            let mut collector = Collector::new();
            let tensor = if latents.is_bare() { BARE } else { "latents" };
            let key = latents_key(self.family.data_type);
            collector.add(key, &latents, tensor, How::default())?;
            add_text(&mut collector, &text, self.family)?;
            let caption = Caption::new(caption, &*name);
            collector.finish(caption, Some(self.family))
        };
        captions.iter().map(sample).collect()
    }

    /// Returns the picture whose latents a file holds: the one of its name, in a folder of the same
    /// name if there are several.
    fn picture(&self, path: &Path) -> Result<Picture> {
        let name = stem(path);
        let found = self.pictures.get(&name);
        let mut found: Vec<&PathBuf> = found.into_iter().flatten().collect();
        let folder = |path: &Path| path.parent().and_then(Path::file_name).map(OsStr::to_owned);
        // A list of a folder that was moved has the same pictures under their former paths.
        if found.iter().any(|picture| picture.exists()) {
            found.retain(|picture| picture.exists());
        }
        if found.len() > 1 {
            found.retain(|picture| folder(picture) == folder(path));
        }
        let is_hash = name.len() == SHA256_DIGITS && is_hex(&name);
        match found[..] {
            [picture] => Ok(Picture { name: stem(picture), path: Some(picture.clone()) }),
            [] if !is_hash => Ok(Picture { name, path: None }),
            [] => {
                let what = format!(
                    "is named by the hash of a picture that is not found; add the folder of \
                     pictures, with {LIST}*.json, to the folders that are read"
                );
                Err(Error::data(path, what))
            }
            _ => {
                let what = format!("may be of each of {} pictures of one name", found.len());
                Err(Error::data(path, what))
            }
        }
    }

    /// Returns the captions of a picture whose texts are cached.
    fn captions(&self, picture: &Picture) -> Result<Vec<String>> {
        let written = self.written_caption(picture)?;
        let name = picture.name.replace('_', " ");
        let mut choices: Vec<Vec<String>> = Vec::new();
        for text in written.iter().chain([&name]) {
            let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
            for texts in [vec![text.as_str()], vec![text.trim()], lines] {
                let prefixed = self.prompts.iter().map(|prompt| {
                    texts.iter().map(|text| format!("{prompt} {text}")).collect::<Vec<_>>()
                });
                let prefixed: Vec<_> = prefixed.collect();
                choices.push(texts.iter().map(ToString::to_string).collect());
                choices.extend(prefixed);
            }
        }
        choices.push(self.prompts.iter().cloned().collect());
        for choice in choices {
            let cached: Vec<String> =
                choice.into_iter().filter(|text| self.texts.contains_key(&md5(text))).collect();
            if !cached.is_empty() {
                return Ok(cached);
            }
        }
        Ok(Vec::new())
    }

    /// Returns the text of the file of captions: that of the folder that the user names, the one
    /// beside the picture, or the one of its name below the folders that are read.
    fn written_caption(&self, picture: &Picture) -> Result<Option<String>> {
        let Picture { name, path } = picture;
        let given = self.request.captions.iter().map(|folder| folder.join(format!("{name}.txt")));
        let beside = path.iter().map(|path| path.with_extension("txt"));
        let elsewhere = self.captions.get(name).filter(|found| found.len() == 1);
        let mut files = given.chain(beside).chain(elsewhere.into_iter().flatten().cloned());
        files.find(|path| path.is_file()).map(|path| read_caption(&path)).transpose()
    }
}

/// Adds the tensors of a text.
fn add_text(collector: &mut Collector, file: &CacheFile, family: Family) -> Result<()> {
    const TEXT: &str = "text_embeddings";
    const MASK: &str = "text_mask";
    const EMBEDS: &str = "prompt_embeds";
    let whole = How::default();
    let (_, shape) = file.describe(EMBEDS)?;
    let tokens = shape.iter().rev().nth(1).copied().unwrap_or_default();
    match family {
        Family::Flux => {
            collector.add("pooled_prompt_embeds", file, "pooled_prompt_embeds", whole)?;
            if file.holds("attention_masks") {
                collector.add(MASK, file, "attention_masks", whole)?;
            }
            collector.add(TEXT, file, EMBEDS, whole)
        }
        Family::Flux2 if tokens == FLUX2_TOKENS || !file.holds("attention_mask") => {
            collector.add(TEXT, file, EMBEDS, whole)
        }
        Family::Flux2 => {
            let how = How::text(file.valid_tokens("attention_mask")?);
            collector.add(TEXT, file, EMBEDS, how)
        }
        Family::QwenImage => {
            let how = match file.holds("attention_masks") {
                true => How::text(file.valid_tokens("attention_masks")?),
                false => How { unequal: true, ..whole },
            };
            collector.add(TEXT, file, EMBEDS, how)
        }
        Family::Wan => collector.add(TEXT, file, EMBEDS, whole),
        Family::HunyuanVideo15 => {
            for (key, text, mask) in [
                (TEXT, EMBEDS, "prompt_attention_mask"),
                ("text_embeddings_2", "prompt_embeds_2", "prompt_attention_mask_2"),
            ] {
                collector.add(key, file, text, How::text(file.valid_tokens(mask)?))?;
            }
            Ok(())
        }
        Family::Dit => unreachable!("no trainer has caches of it"),
    }
}

/// Returns the texts of the only family that has some, or of the one that the user names.
fn texts_of_one_family(
    named: Vec<(String, String, PathBuf)>,
    wanted: Option<Family>,
    path: &Path,
) -> Result<(Family, BTreeMap<String, PathBuf>)> {
    let family =
        |model: &str| FAMILIES.iter().find(|(word, _)| *word == model).map(|(_, family)| *family);
    let models: BTreeSet<&str> = named.iter().map(|(_, model, _)| model.as_str()).collect();
    let found: BTreeSet<Family> = models.iter().filter_map(|model| family(model)).collect();
    let only = found.first().copied().filter(|_| found.len() == 1);
    let Some(chosen) = wanted.filter(|wanted| found.contains(wanted)).or(only) else {
        let words: Vec<&str> = FAMILIES.iter().map(|(word, _)| *word).collect();
        let models: Vec<&str> = models.into_iter().collect();
        let what = match (found.len(), wanted) {
            (2.., None) => {
                let found: Vec<&str> = found.iter().map(|family| family.word()).collect();
                format!("has texts of families {}; choose one by --family", found.join(", "))
            }
            _ => format!(
                "has texts `<MD5>-<model>.pt` of {}; expected one of {}",
                if models.is_empty() { "no model".into() } else { models.join(", ") },
                words.join(", ")
            ),
        };
        return Err(Error::data(path, what));
    };
    let texts = named.into_iter().filter(|(_, model, _)| family(model) == Some(chosen));
    Ok((chosen, texts.map(|(md5, _, path)| (md5, path)).collect()))
}

fn add(map: &mut BTreeMap<String, BTreeSet<PathBuf>>, name: String, path: PathBuf) {
    map.entry(name).or_default().insert(path);
}

fn add_picture(pictures: &mut BTreeMap<String, BTreeSet<PathBuf>>, path: PathBuf) {
    // One that is listed and found below a folder is the same.
    let (name, path) = (stem(&path), path.canonicalize().unwrap_or(path));
    add(pictures, sha256::hex(Sha256::new_with_prefix(&name)), path.clone());
    add(pictures, name, path);
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Splits `<MD5>-<model>`.
fn split_text(name: &str) -> Option<(&str, &str)> {
    let (md5, model) = name.split_once('-')?;
    (md5.len() == MD5_DIGITS && is_hex(md5)).then_some((md5, model))
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn md5(text: &str) -> String {
    sha256::digits(&Md5::digest(text))
}

fn texts_in(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) if !text.trim().is_empty() => vec![text.trim().into()],
        Value::Array(values) => values.iter().flat_map(texts_in).collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_hashed_as_simpletuner_hashes_them() {
        assert_eq!(md5(""), "d41d8cd98f00b204e9800998ecf8427e");
        assert_eq!(md5("a cat"), "c1d0e44b09d5ac52f90f463fe410fc88");
        let text = format!("{}-qwen_image", md5("x"));
        assert_eq!(split_text(&text), Some((md5("x").as_str(), "qwen_image")));
        assert_eq!(split_text("a-cat"), None);
        let mut pictures = BTreeMap::new();
        add_picture(&mut pictures, "/p/a.b.png".into());
        let hash = sha256::hex(Sha256::new_with_prefix("a.b"));
        assert_eq!(pictures.keys().collect::<Vec<_>>().len(), 2);
        assert!(pictures.contains_key("a.b") && pictures.contains_key(&hash));
    }
}
