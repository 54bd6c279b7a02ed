//! Samples of caches: where their tensors lie, and what becomes of each on its way into a dataset.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::file::{CacheFile, Location};
use crate::data::group::{Layout, SampleTensor};
use crate::data::{Caption, DataType, latents_key};
use crate::datasets::{Sample, Samples};
use crate::encoding::Family;
use crate::error::{Error, Result};

/// Channels of Wan's condition that mark the frames that are known: one for each frame that a
/// latent frame stands for.
const KNOWN_CHANNELS: i64 = 4;

/// One sample of a cache.
#[derive(Debug)]
pub(super) struct Cached {
    pub sample: Sample,
    pub parts: Vec<Part>,
    /// The family that the cache names.
    pub family: Option<Family>,
    /// A line for the user on what is done with samples like this one.
    pub note: Option<&'static str>,
}

/// One tensor of a sample.
#[derive(Debug)]
pub(super) struct Part {
    key: &'static str,
    source: Source,
    kind: Kind,
    /// Its shape without the axes of length 1 that the cache adds.
    shape: Vec<i64>,
    how: How,
}

#[derive(Debug)]
enum Source {
    /// A tensor of a file by its name.
    Stored(Location, String),
    Ones,
}

/// Options of taking over a tensor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct How {
    /// True for a text without padding.
    pub unequal: bool,
    /// Number of its first rows that are taken over, the tokens before its padding; all if unset.
    pub tokens: Option<i64>,
    pub change: Change,
}

impl How {
    /// A text of this many tokens, stored without padding.
    pub fn text(tokens: i64) -> Self {
        How { unequal: true, tokens: Some(tokens), ..How::default() }
    }

    pub fn changed(change: Change) -> Self {
        How { change, ..How::default() }
    }
}

/// A change of numbers or shape.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Change {
    #[default]
    None,
    /// A factor that normalizes latents which are not.
    Scale(f64),
    /// Puts the channels that mark known frames in front of the latents of those frames.
    MarkKnown(KnownFrames),
    /// Shrinks a mask of pixels to the latents' height and width.
    Shrink([i64; 2]),
}

/// Frames of a video that are given as pictures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum KnownFrames {
    First,
    FirstAndLast,
}

impl Change {
    /// Returns the shape of a tensor of `shape` after the change.
    fn shape(self, shape: &[i64]) -> Vec<i64> {
        match self {
            Change::None | Change::Scale(_) => shape.to_vec(),
            Change::MarkKnown(_) => [&[shape[0] + KNOWN_CHANNELS], &shape[1..]].concat(),
            Change::Shrink(size) => size.to_vec(),
        }
    }

    fn applied(self, tensor: Tensor) -> Tensor {
        match self {
            Change::None => tensor,
            // Computed in float32 and rounded once.
            Change::Scale(scale) => (tensor.to_kind(Kind::Float) * scale).to_kind(tensor.kind()),
            Change::MarkKnown(known) => marked(&tensor, known),
            Change::Shrink(size) => shrunk(&tensor, size),
        }
    }
}

/// Returns `[4 + C, F, H, W]` of `[C, F, H, W]`: the first channels are 1 in frames that are known.
fn marked(tensor: &Tensor, known: KnownFrames) -> Tensor {
    let shape = [&[KNOWN_CHANNELS], &tensor.size()[1..]].concat();
    let marks = Tensor::zeros(&shape, (tensor.kind(), tensor.device()));
    let _ = marks.narrow(1, 0, 1).fill_(1.0);
    if known == KnownFrames::FirstAndLast {
        let _ = marks.narrow(1, shape[1] - 1, 1).fill_(1.0);
    }
    Tensor::cat(&[&marks, tensor], 0)
}

/// Returns `[H, W]`, each number that of the pixel in the middle of those that it stands for.
///
/// Source: PyTorch 2.13, `interpolate` with `nearest-exact`.
fn shrunk(tensor: &Tensor, size: [i64; 2]) -> Tensor {
    let middle = |axis: usize| {
        let (from, to) = (tensor.size()[axis], size[axis]);
        let scale = from as f32 / to as f32;
        let at = |index: i64| (((index as f32 + 0.5) * scale).floor() as i64).min(from - 1);
        Tensor::from_slice(&(0..to).map(at).collect::<Vec<i64>>())
    };
    tensor.index_select(0, &middle(0)).index_select(1, &middle(1))
}

/// Endings of the pictures and videos that other trainers read.
pub(super) const MEDIA: [&str; 22] = [
    "png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "avif", "jxl", "heic", "gif", "mp4", "mov",
    "webm", "mkv", "avi", "m4v", "mpg", "mpeg", "wmv", "flv", "ts",
];

impl Cached {
    pub fn data_type(&self) -> DataType {
        let is_image = self.sample.layout.contains_key(latents_key(DataType::Image));
        if is_image { DataType::Image } else { DataType::Video }
    }

    /// Returns the file of the sample's latents, for messages.
    pub fn path(&self) -> &Path {
        let stored = self.parts.iter().find_map(|part| match &part.source {
            Source::Stored(location, _) => Some(location.path.as_path()),
            Source::Ones => None,
        });
        stored.unwrap_or(Path::new(""))
    }

    /// Replaces the caption by the text beside the source's name in `folder`. Some caches name it
    /// without its ending, and other names may hold a dot.
    pub fn take_caption(&mut self, folder: &Path) -> Result<()> {
        let source = Path::new(&self.sample.caption.source);
        let ending = source.extension().and_then(|ending| ending.to_str()).unwrap_or("");
        let name = match MEDIA.contains(&ending.to_ascii_lowercase().as_str()) {
            true => source.file_stem(),
            false => source.file_name(),
        };
        let stem = name.unwrap_or_default();
        let mut path = PathBuf::from(folder).join(stem).into_os_string();
        path.push(".txt");
        self.sample.caption.caption = super::read_caption(Path::new(&path))?.trim().into();
        Ok(())
    }

    /// Adds a loss mask that lets everything through.
    pub fn add_full_loss_mask(&mut self, kind: Kind) {
        let latents = &self.sample.layout[latents_key(self.data_type())].shape;
        let shape = latents[latents.len() - 2..].to_vec();
        let described = SampleTensor { kind, shape: shape.clone(), unequal: false };
        let key = crate::flow::LOSS_MASK;
        self.sample.layout.insert(key.into(), described);
        self.parts.push(Part { key, source: Source::Ones, kind, shape, how: How::default() });
    }
}

/// The samples of caches.
pub(super) struct Cache {
    list: Vec<Sample>,
    parts: Vec<Vec<Part>>,
}

impl Cache {
    pub fn new(cached: Vec<Cached>) -> Self {
        let (list, parts) = cached.into_iter().map(|cached| (cached.sample, cached.parts)).unzip();
        Cache { list, parts }
    }

    /// Reads one tensor of a sample.
    pub fn read_key(&self, index: usize, key: &str) -> Result<Option<Tensor>> {
        let part = self.parts[index].iter().find(|part| part.key == key);
        part.map(|part| part.read(&mut None)).transpose()
    }
}

impl Samples for Cache {
    fn list(&self) -> &[Sample] {
        &self.list
    }

    fn read(&self, index: usize) -> Result<BTreeMap<String, Tensor>> {
        let mut opened = None;
        let read = |part: &Part| Ok((part.key.to_string(), part.read(&mut opened)?));
        self.parts[index].iter().map(read).collect()
    }
}

impl Part {
    /// Reads the tensor. `opened`: the file that was read last.
    fn read(&self, opened: &mut Option<CacheFile>) -> Result<Tensor> {
        let Source::Stored(location, name) = &self.source else {
            return Ok(Tensor::ones(&self.shape, (self.kind, Device::Cpu)));
        };
        let file = match opened.take().filter(|file| file.location() == location) {
            Some(file) => file,
            None => CacheFile::at(location)?,
        };
        let tensor = file.read(name)?;
        *opened = Some(file);
        if (tensor.numel() as i64, tensor.kind()) != (self.shape.iter().product(), self.kind) {
            return Err(Error::data(&location.path, "was changed while it was read"));
        }
        let tensor = tensor.view(self.shape.as_slice());
        let tensor = match self.how.tokens {
            Some(tokens) => tensor.narrow(0, 0, tokens),
            None => tensor,
        };
        Ok(self.how.change.applied(tensor).contiguous())
    }

    /// Names the bytes: if it is the same, so are they.
    fn origin(&self) -> Result<String> {
        let Source::Stored(location, name) = &self.source else { return Ok("ones; ".into()) };
        let path = &location.path;
        let found = fs::metadata(path).map_err(Error::storage(path, "inspect"))?;
        let (bytes, time) = (found.len(), (found.mtime(), found.mtime_nsec()));
        let (region, change) = (location.region, self.how.change);
        Ok(format!("{} {region:?} {bytes} {time:?} {name} {change:?}; ", path.display()))
    }
}

/// Collects one sample's parts.
pub(super) struct Collector {
    pub layout: Layout,
    parts: Vec<Part>,
}

impl Collector {
    pub fn new() -> Self {
        Collector { layout: Layout::new(), parts: Vec::new() }
    }

    /// Adds a tensor of a file under the key of batches.
    ///
    /// # Errors
    /// [`Error::Data`] if the tensor does not have the key's axes.
    pub fn add(&mut self, key: &'static str, file: &CacheFile, name: &str, how: How) -> Result<()> {
        let (kind, shape) = file.describe(name)?;
        let axes = axes_of(key);
        let mut fitted = shape.clone();
        while fitted.len() > axes
            && let Some(place) = fitted.iter().position(|axis| *axis == 1)
        {
            fitted.remove(place);
        }
        if fitted.len() != axes || fitted.iter().skip(1).any(|axis| *axis < 1) {
            let what = format!("`{name}` has shape {shape:?}; expected {axes} axes for `{key}`");
            return Err(Error::data(file.path(), what));
        }
        let mut taken = how.change.shape(&fitted);
        if let Some(tokens) = how.tokens {
            if !(0..=taken[0]).contains(&tokens) {
                let what = format!("`{name}` has shape {shape:?}, and its mask {tokens} tokens");
                return Err(Error::data(file.path(), what));
            }
            taken[0] = tokens;
        }
        let tensor = SampleTensor { kind, shape: taken, unequal: how.unequal };
        self.layout.insert(key.into(), tensor);
        let source = Source::Stored(file.location().clone(), name.into());
        self.parts.push(Part { key, source, kind, shape: fitted, how });
        Ok(())
    }

    /// # Errors
    /// Errors of looking at the files.
    pub fn finish(self, caption: Caption, family: Option<Family>) -> Result<Cached> {
        let origin = self.parts.iter().map(Part::origin).collect::<Result<String>>()?;
        let sample = Sample { layout: self.layout, caption, origin };
        Ok(Cached { sample, parts: self.parts, family, note: None })
    }
}

/// Returns the number of axes of one sample's tensor.
fn axes_of(key: &str) -> usize {
    match key {
        "video_latents" | "condition_latents" => 4,
        "image_latents" => 3,
        "text_mask" | "text_mask_2" | "pooled_prompt_embeds" => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_of_pixels_keeps_the_pixel_in_the_middle_of_each_patch() {
        let mask = Tensor::arange(6 * 8, (Kind::Float, Device::Cpu)).view([6, 8]);
        let shrunk = shrunk(&mask, [2, 2]);
        assert!(shrunk.equal(&Tensor::from_slice(&[10.0f32, 14.0, 34.0, 38.0]).view([2, 2])));
    }

    #[test]
    fn a_caption_has_the_name_of_its_picture_without_the_ending_of_a_picture() {
        let folder = tempfile::tempdir().expect("a folder");
        for (source, file) in [("/x/cat.bmp", "cat"), ("cat.v2", "cat.v2"), ("a.B.PNG", "a.B")] {
            let text = folder.path().join(format!("{file}.txt"));
            fs::write(text, format!("of {file}\n")).expect("a file");
            let mut collector = Collector::new();
            collector.layout.insert(
                "image_latents".into(),
                SampleTensor { kind: Kind::Half, shape: vec![1, 2, 2], unequal: false },
            );
            let caption = Caption::new(String::new(), source.to_string());
            let mut cached = collector.finish(caption, None).expect("a sample");
            cached.take_caption(folder.path()).expect("it is there");
            assert_eq!(cached.sample.caption.caption, format!("of {file}"), "{source}");
        }
    }

    #[test]
    fn known_frames_are_marked_in_front_of_their_latents() {
        let latents = Tensor::full([2, 3, 1, 1], 5, (Kind::Half, Device::Cpu));
        let marks = |known| {
            let marked = Change::MarkKnown(known).applied(latents.shallow_clone());
            assert_eq!(marked.size(), [6, 3, 1, 1]);
            assert!(marked.narrow(0, 4, 2).equal(&latents));
            Vec::<f64>::try_from(marked.get(3).flatten(0, -1).to_kind(Kind::Double))
                .expect("one axis")
        };
        assert_eq!(marks(KnownFrames::First), [1.0, 0.0, 0.0]);
        assert_eq!(marks(KnownFrames::FirstAndLast), [1.0, 0.0, 1.0]);
    }
}
