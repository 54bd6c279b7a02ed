//! Pictures are Pillow's to the pixel, buckets are NeMo AutoModel's, and the frames of videos those
//! that NumPy chooses; new ones each run.

use std::path::{Path, PathBuf};
use std::process::Command;

use fm_dist::datasets::pictures::{BucketOptions, Buckets, Ratios};
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::media::video::{Ffmpeg, Video, chosen};
use fm_dist::media::{CropOffset, Fit, Limits, Picture, Size, picture_size, stacked};
use serde_json::Value;
use tch::{Kind, Tensor};
use tempfile::TempDir;

use super::packages::{entries, fresh_seed, oracle};

struct Cases {
    folder: TempDir,
    entries: Value,
    expected: SafeTensors,
}

impl Cases {
    fn drawn(what: &str) -> Self {
        let folder = TempDir::new().unwrap();
        oracle("pictures.py", &[folder.path().to_str().unwrap(), &fresh_seed(what)]);
        let expected = SafeTensors::open(folder.path().join("expected.safetensors")).unwrap();
        Cases { entries: entries(&folder.path().join("cases.json")), expected, folder }
    }

    fn rows(&self, name: &str) -> &[Value] {
        self.entries[name].as_array().unwrap()
    }

    fn path(&self, row: &Value) -> PathBuf {
        self.folder.path().join(row["name"].as_str().unwrap())
    }

    /// Colours as `[…, H, W]`, where Pillow has them last.
    fn expected(&self, row: &Value, what: &str) -> Tensor {
        let name = format!("{}.{what}", row["name"].as_str().unwrap());
        let tensor = self.expected.read(&name).unwrap();
        match tensor.dim() {
            3 => tensor.permute([2, 0, 1]),
            4 => tensor.permute([3, 0, 1, 2]),
            _ => tensor,
        }
    }
}

fn number(value: &Value) -> u32 {
    value.as_u64().unwrap() as u32
}

fn size(value: &Value) -> Size {
    Size::new(number(&value[0]), number(&value[1]))
}

fn largest_difference(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!((found.size(), found.kind()), (expected.size(), Kind::Uint8));
    (found.to_kind(Kind::Int) - expected.to_kind(Kind::Int)).abs().max().double_value(&[])
}

fn references_buckets(row: &Value) -> Buckets {
    let (pixels, multiple) = (row["pixels"].as_u64().unwrap(), number(&row["multiple"]));
    let ratios = Ratios::Reference;
    Buckets::new(BucketOptions::Budget { pixels, multiple, ratios, no_upscale: false }).unwrap()
}

#[test]
fn pictures_are_pillows_and_go_to_the_references_buckets() {
    let cases = Cases::drawn("pictures");
    let limits = Limits::default();
    for row in cases.rows("pictures") {
        let (path, name) = (cases.path(row), row["name"].as_str().unwrap());
        let picture = Picture::read(&path, &limits).unwrap();
        assert_eq!(picture.size(), size(&row["size"]), "{name}");
        assert_eq!(picture_size(&path, &limits).unwrap(), picture.size(), "{name}");
        let bucket = references_buckets(row).size_for(picture.size()).unwrap();
        assert_eq!(bucket, size(&row["bucket"]), "{name}");
        let fit = Fit::new(picture.size(), bucket).unwrap();
        let offset = size(&row["offset"]);
        assert_eq!(fit.crop, CropOffset { left: offset.width, top: offset.height }, "{name}");

        let mask = Picture::read_mask(&path, fit, &limits).unwrap();
        let colours = picture.to_tensor();
        for (what, found) in
            [("colours", colours), ("fitted", picture.fitted(fit).to_tensor()), ("mask", mask)]
        {
            let difference = largest_difference(&found, &cases.expected(row, what));
            assert_eq!(difference, 0.0, "{name}: {what} are {difference} of 255 off");
        }
    }
    assert!(cases.rows("pictures").len() > 80);

    for row in cases.rows("buckets") {
        let buckets = references_buckets(row);
        let listed: Vec<Size> = row["listed"].as_array().unwrap().iter().map(size).collect();
        assert_eq!(buckets.sizes(), listed, "{row}");
        let sizes = row["sizes"].as_array().unwrap().iter().map(size);
        for (original, expected) in sizes.zip(row["chosen"].as_array().unwrap()) {
            assert_eq!(buckets.size_for(original), Some(size(expected)), "{original} of {row}");
        }
    }
}

#[test]
fn frames_of_videos_are_those_that_numpy_chooses() {
    let cases = Cases::drawn("videos");
    for row in cases.rows("frames") {
        let [available, count] = [&row[0], &row[1]].map(|value| value.as_u64().unwrap() as usize);
        let expected: Vec<usize> = serde_json::from_value(row[2].clone()).unwrap();
        assert_eq!(chosen(available, count), expected, "{available} frames");
    }
    let program = Path::new(cases.entries["ffmpeg"].as_str().unwrap());
    let (ffmpeg, limits) = (Ffmpeg::find(Some(program)).unwrap(), Limits::default());
    for row in cases.rows("videos") {
        let (path, name) = (cases.path(row), row["name"].as_str().unwrap());
        let video = Video::open(&path, 100, Some(&ffmpeg), &limits).unwrap();
        let frames = row["frames"].as_u64().unwrap() as usize;
        assert_eq!((video.size, video.frames), (size(&row["size"]), frames), "{name}");
        let fit = Fit::new(video.size, size(&row["bucket"])).unwrap();
        let taken = row["taken"].as_u64().unwrap() as usize;
        let read = video.read(taken, fit, Some(&ffmpeg), &limits).unwrap();
        let difference = largest_difference(&stacked(&read), &cases.expected(row, "fitted"));
        assert_eq!(difference, 0.0, "{name}: frames are {difference} of 255 off");
    }
    check_mp4(&ffmpeg, cases.folder.path());
    check_cut(program, cases.folder.path());
    check_broken(&ffmpeg, cases.folder.path());
}

/// A video that is written is read back: its length, its even size and its colours.
fn check_mp4(ffmpeg: &Ffmpeg, folder: &Path) {
    let path = folder.join("written.mp4");
    let level =
        |frame: i64| Tensor::full([3, 31, 47], 20 + 20 * frame, (Kind::Uint8, tch::Device::Cpu));
    let frames = Tensor::stack(&(0..9).map(level).collect::<Vec<_>>(), 0);
    ffmpeg.write_mp4(&path, &frames, 12.5).unwrap();
    let limits = Limits::default();
    let video = Video::open(&path, 100, Some(ffmpeg), &limits).unwrap();
    assert_eq!((video.size, video.frames), (Size::new(48, 32), 9));
    let fit = Fit { resized: video.size, crop: CropOffset::default(), size: Size::new(47, 31) };
    let read = stacked(&video.read(9, fit, Some(ffmpeg), &limits).unwrap());
    let difference = largest_difference(&read, &frames.permute([1, 0, 2, 3]));
    assert!(difference <= 4.0, "colours are {difference} of 255 off");
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!names.into_iter().any(|name| name.to_string_lossy().ends_with(".part")));
}

/// A file that was cut without encoding holds frames that are never shown.
fn check_cut(program: &Path, folder: &Path) {
    let (whole, path) = (folder.join("written.mp4"), folder.join("shortened.mp4"));
    let mut cut = Command::new(program);
    cut.args(["-loglevel", "error", "-ss", "0.3", "-i"]).arg(whole);
    assert!(cut.args(["-c", "copy"]).arg(&path).status().unwrap().success());
    let (ffmpeg, limits) = (Ffmpeg::find(Some(program)).unwrap(), Limits::default());
    let open = |most| Video::open(&path, most, Some(&ffmpeg), &limits).unwrap();
    let (shown, held) = (open(9), open(2));
    assert!(shown.frames < held.frames && held.frames == 9, "{shown:?} {held:?}");
    let fit = Fit::new(shown.size, Size::new(16, 16)).unwrap();
    let read = |video: &Video, count| video.read(count, fit, Some(&ffmpeg), &limits);
    assert_eq!(read(&shown, shown.frames).unwrap().len(), shown.frames);
    assert_eq!(read(&held, 2).unwrap(), read(&shown, 2).unwrap());
    let what = read(&held, 9).unwrap_err().to_string();
    assert!(what.contains("shortened.mp4: holds 9 frames, of which "), "{what}");
}

/// Files that are no videos are told in one line, and limits hold.
fn check_broken(ffmpeg: &Ffmpeg, folder: &Path) {
    let told = |name: &str, bytes: &[u8], limits: &Limits| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        Video::open(&path, 100, Some(ffmpeg), limits).unwrap_err().to_string()
    };
    let limits = Limits::default();
    let whole = std::fs::read(folder.join("written.mp4")).unwrap();
    for (name, bytes) in [("cut.mp4", &whole[..40]), ("no.mp4", b"not a video"), ("e.mp4", b"")] {
        let what = told(name, bytes, &limits);
        assert!(what.contains(&format!("{name}: is no video that ffmpeg reads")), "{what}");
    }
    // A list of other files would have them opened.
    let list = format!("ffconcat version 1.0\nfile '{}'\n", folder.join("written.mp4").display());
    assert!(told("list.mp4", list.as_bytes(), &limits).contains("is no video that ffmpeg reads"));
    let few = Limits { pixels: 48 * 32 - 1, ..limits };
    let what = told("large.mp4", &whole, &few);
    assert!(what.contains("large.mp4: "), "{what}");
    let without = Video::open(&folder.join("written.mp4"), 100, None, &limits).unwrap_err();
    assert_eq!(without.exit_code(), 52);
}
