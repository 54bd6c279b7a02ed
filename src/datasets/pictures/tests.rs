//! Folders of pictures, and what is found in them.

use std::fs;
use std::path::{Path, PathBuf};

use image::{Luma, Rgb, RgbImage};
use tempfile::TempDir;

use super::*;
use crate::media::{CropOffset, Size};

fn folder() -> TempDir {
    TempDir::new().expect("a folder")
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().expect("it has one")).expect("a folder");
    fs::write(path, text).expect("it can be written");
}

/// Writes a picture of one colour.
fn draw(folder: &Path, name: &str, size: (u32, u32), level: u8) -> PathBuf {
    write(folder, name, "");
    let path = folder.join(name);
    let picture = RgbImage::from_pixel(size.0, size.1, Rgb([level, 100, 200]));
    picture.save(&path).expect("it can be written");
    path
}

fn options(folder: &Path) -> PictureOptions {
    PictureOptions {
        folder: folder.into(),
        frames: None,
        captions: CaptionOptions::default(),
        masks: None,
        controls: Vec::new(),
        buckets: BucketOptions::One(Size::new(16, 16)),
        ffmpeg: None,
        limits: Limits::default(),
        most_bad: 0.0,
        jobs: 2,
    }
}

fn found(options: &PictureOptions) -> Found {
    find(options).expect("the folder is sound")
}

/// The sound items of a folder, and the hash of each one's content.
fn examined(options: &PictureOptions) -> Result<(Found, Vec<String>)> {
    let found = found(options);
    let outcomes = (0..found.items.len()).map(|index| found.examine(index));
    let outcomes = outcomes.collect::<Result<_>>()?;
    found.sound(outcomes)
}

fn refused(options: &PictureOptions) -> String {
    find(options).expect_err("it is refused").to_string()
}

/// Names and captions of all items.
fn captions(options: &PictureOptions) -> Vec<(String, Vec<String>)> {
    found(options).items.into_iter().map(|item| (item.name, item.captions)).collect()
}

fn of(name: &str, captions: &[&str]) -> (String, Vec<String>) {
    (name.into(), captions.iter().map(|caption| caption.to_string()).collect())
}

#[test]
fn the_nearest_caption_counts_and_the_name_comes_last() {
    let folder = folder();
    let root = folder.path();
    for name in ["a.png", "b.jpg", "sub/c.webp", "sub/d_e.png", "sub/f.png"] {
        draw(root, name, (20, 20), 0);
    }
    write(root, "a.txt", "\u{feff} a cat\n");
    write(root, "a.json", r#"{"caption": "not this"}"#);
    write(root, "b.json", r#"{"width": 3, "caption": ["one", "two"]}"#);
    write(root, "sub/metadata.jsonl", "{\"file_name\": \"c.webp\", \"text\": \"a dog\"}\n");
    write(root, "meta.json", r#"{"items": [{"file_name": "sub/f.png", "caption": "a fish"}]}"#);
    write(root, ".hidden.png", "");
    let expected = [
        of("a.png", &["a cat"]),
        of("b.jpg", &["one", "two"]),
        of("sub/c.webp", &["a dog"]),
        of("sub/d_e.png", &["d e"]),
        of("sub/f.png", &["a fish"]),
    ];
    assert_eq!(captions(&options(root)), expected);
    let found = found(&options(root));
    assert_eq!(found.named_only(), 1);
    assert_eq!(found.buckets(), [("16x16".to_string(), 6)]);
    assert_eq!(
        found.notes(),
        ["buckets: 6 of 16x16", "1 of 5 have no caption: their names are taken"]
    );
}

#[test]
fn lists_have_many_shapes() {
    let folder = folder();
    let root = folder.path();
    draw(root, "a.png", (20, 20), 0);
    draw(root, "b.png", (20, 20), 0);
    let shapes = [
        ("l.json", r#"[{"file_name": "a.png", "caption": "x"}, {"file": "b", "caption": "y"}]"#),
        ("l.json", r#"{"data": [{"path": "./a.png", "prompt": "x"}], "b.png": ["y"]}"#),
        ("l.json", r#"{"a.png": "x", "b.png": {"text": "no", "caption": "y", "tags": null}}"#),
        (
            "l.jsonl",
            "{\"image\": \"a.png\", \"caption\": \"x\"}\n\n{\"image\":\"b.png\",\"text\":\"y\"}",
        ),
        ("l.csv", "\u{feff}width,file_name,caption\n3,a.png,x\n4,sub/../b.png,y\n"),
        (
            "p_internvl.json",
            "{\"file_name\":\"a.png\",\"internvl\":\"x\"}\n{\"file_name\":\"b.png\",\"internvl\":\"y\"}",
        ),
    ];
    for (name, text) in shapes {
        write(root, name, text);
        let mut options = options(root);
        options.captions.list = Some(root.join(name));
        let expected = [of("a.png", &["x"]), of("b.png", &["y"])];
        assert_eq!(captions(&options), expected, "{text}");
        fs::remove_file(root.join(name)).expect("it was written");
    }
    write(root, "l.csv", "file_name,caption,long\na.png,x,long x\na.png,x2,long x2\nb.png,y,\n");
    let mut options = options(root);
    options.captions.list = Some(root.join("l.csv"));
    assert_eq!(captions(&options), [of("a.png", &["x", "x2"]), of("b.png", &["y"])]);
    options.captions.field = Some("long".into());
    assert_eq!(captions(&options), [of("a.png", &["long x", "long x2"]), of("b.png", &[""])]);
    options.captions.field = Some("tags".into());
    assert!(refused(&options).contains("l.csv: has no columns of names and captions"));
    write(root, "l.csv", "[1]");
    assert!(refused(&options).contains("l.csv: has no columns"));
    options.captions.list = Some(root.join("l.json"));
    for text in ["[1]", "[\"x\"]", "{\"a.png\": {\"caption\": 3}}", "{", "[{]"] {
        write(root, "l.json", text);
        options.captions.field = None;
        assert!(refused(&options).contains("is no list of captions in JSON: "), "{text}");
    }
}

#[test]
fn names_in_a_list_are_paths_from_its_folder_also_behind_a_link() {
    let (folder, elsewhere) = (folder(), folder());
    let root = folder.path();
    draw(root, "sub/a.png", (20, 20), 0);
    let with = |list: PathBuf| {
        let captions = CaptionOptions { list: Some(list), ..CaptionOptions::default() };
        PictureOptions { captions, ..options(root) }
    };
    let expected = [of("sub/a.png", &["x"])];
    write(root, "sub/own.csv", "file_name,caption\na.png,x\n");
    assert_eq!(captions(&with(root.join("sub/own.csv"))), expected);
    write(elsewhere.path(), "l.csv", "file_name,caption\nsub/a.png,x\n");
    assert_eq!(captions(&with(elsewhere.path().join("l.csv"))), expected);
    std::os::unix::fs::symlink(root, elsewhere.path().join("link")).expect("a link");
    let linked = elsewhere.path().join("link/sub/a.png");
    write(elsewhere.path(), "l.csv", &format!("file_name,caption\n{},x\n", linked.display()));
    assert_eq!(captions(&with(elsewhere.path().join("l.csv"))), expected);
    write(elsewhere.path(), "l.csv", "file_name,caption\na.png,x\n");
    let message = refused(&with(elsewhere.path().join("l.csv")));
    assert!(message.contains("l.csv: names none of the pictures in "), "{message}");
}

#[test]
fn the_first_list_that_has_a_picture_counts_and_others_are_not_added() {
    let folder = folder();
    let root = folder.path();
    draw(root, "a.png", (20, 20), 0);
    draw(root, "b.png", (20, 20), 0);
    write(root, "meta.csv", "file_name,caption\na.png,no\nb.png,third\n");
    write(root, "captions.json", r#"{"a.png": "no"}"#);
    write(root, "metadata.csv", "file_name,caption\na.png,no\n");
    write(root, "metadata.jsonl", "{\"file_name\": \"a.png\", \"text\": \"first\"}\n");
    let expected = [of("a.png", &["first"]), of("b.png", &["third"])];
    assert_eq!(captions(&options(root)), expected);
}

#[test]
fn a_picture_that_is_another_now_is_refused() {
    let folder = folder();
    let root = folder.path();
    let path = draw(root, "a.png", (20, 20), 1);
    let found = found(&options(root));
    assert!(found.read(0).is_ok());
    draw(root, "a.png", (20, 30), 1);
    let later = fs::File::options().append(true).open(path).expect("a file");
    let hour = std::time::Duration::from_secs(3600);
    later.set_modified(std::time::SystemTime::now() + hour).expect("it has a time");
    let error = found.read(0).expect_err("refused").to_string();
    assert!(error.ends_with("a.png: was changed while the folder was read"), "{error}");
}

#[test]
fn damaged_files_are_named_and_skipped_up_to_a_share() {
    let folder = folder();
    let root = folder.path();
    (0..3).for_each(|number| drop(draw(root, &format!("{number}.png"), (20, 20), number)));
    write(root, "bad.png", "\u{89}PNG");
    let mut options = options(root);
    let what = refused(&options);
    assert!(
        what.contains("1 of 4 files cannot be used") && what.contains("bad.png: is no"),
        "{what}"
    );
    options.most_bad = 0.25;
    let some = found(&options);
    assert_eq!((some.items.len(), some.skipped.len()), (3, 1));
    assert!(some.notes()[1].starts_with("skipped: ") && some.notes()[1].contains("bad.png"));

    // Its header is sound.
    let whole = fs::read(root.join("1.png")).expect("it was written");
    fs::write(root.join("1.png"), &whole[..whole.len() - 30]).expect("it can be written");
    let what = examined(&options).expect_err("two of four are too many").to_string();
    assert!(what.contains("2 of 4 files cannot be used") && what.contains("1.png: "), "{what}");
    options.most_bad = 0.5;
    let (sound, hashes) = examined(&options).expect("half may be damaged");
    assert_eq!((sound.items.len(), sound.skipped.len(), hashes.len()), (2, 2, 2));
    assert_eq!(sound.items[1].name, "2.png");
    options.most_bad = 1.5;
    assert!(refused(&options).contains("is a share"));
}

#[test]
fn a_link_to_nothing_is_a_damaged_file() {
    let folder = folder();
    let root = folder.path();
    draw(root, "a.png", (20, 20), 1);
    std::os::unix::fs::symlink("/no/such/picture", root.join("b.png")).expect("a link");
    let options = PictureOptions { most_bad: 0.5, ..options(root) };
    let found = found(&options);
    assert_eq!((found.items.len(), found.skipped.len()), (1, 1));
    assert!(found.skipped[0].path.ends_with("b.png"), "{:?}", found.skipped);
    let notes = found.notes().join("\n");
    assert!(notes.contains("1 of 1 have no caption"), "{notes}");
}

#[test]
fn masks_and_controls_get_the_crop_of_their_picture() {
    let (folder, controls) = (folder(), folder());
    let root = folder.path();
    draw(root, "a.png", (64, 32), 10);
    draw(root, "sub/b.jpg", (32, 32), 20);
    // The crop keeps the middle, where all pixels count.
    let middle = |x: u32, _| Luma([if (12..52).contains(&x) { 255 } else { 0 }]);
    fs::create_dir_all(root.join("masks/sub")).expect("a folder");
    let mask = image::GrayImage::from_fn(64, 32, middle);
    mask.save(root.join("masks/a.webp")).expect("it can be written");
    draw(controls.path(), "a.jpg", (8, 8), 30);
    draw(controls.path(), "sub/b.png", (99, 33), 40);
    let options = PictureOptions {
        masks: Some(root.join("masks")),
        controls: vec![controls.path().into()],
        ..options(root)
    };
    let found = found(&options);
    assert_eq!(found.items.len(), 2, "masks are no samples");
    assert_eq!(found.unmasked(), 1);
    let first = &found.items[0];
    assert_eq!(first.medium.original, Size::new(64, 32));
    assert_eq!(first.medium.fit.resized, Size::new(32, 16));
    assert_eq!(first.medium.fit.crop, CropOffset { left: 8, top: 0 });
    let read = found.read(0).expect("it is sound");
    let mask = read.mask.expect("there is a folder of masks");
    assert_eq!((mask.size(), mask.min().int64_value(&[])), (vec![16, 16], 255));
    assert_eq!(read.controls.len(), 1);
    assert_eq!((read.pixels.size(), read.controls[0].size()), (vec![3, 16, 16], vec![3, 16, 16]));
    assert_eq!(read.pixels.int64_value(&[0, 3, 3]), 10);
    let whole = found.read(1).expect("it is sound").mask.expect("it counts whole");
    assert_eq!(whole.min().int64_value(&[]), 255);

    fs::remove_file(controls.path().join("a.jpg")).expect("it was written");
    assert!(refused(&options).contains("a.png: has no file of its name in folder 1 of controls"));
    draw(controls.path(), "sub/b.jpg", (9, 9), 0);
    assert!(refused(&options).contains("have one name, which picture's are they?"));
}

#[test]
fn folders_of_frames_are_videos_and_pictures_are_one_frame() {
    let folder = folder();
    let root = folder.path();
    (0..11u8).for_each(|frame| drop(draw(root, &format!("clip/f{frame}.png"), (20, 20), frame)));
    draw(root, "still.png", (20, 20), 99);
    write(root, "clip.txt", "a clip");
    write(root, "film.mp4", "");
    let mut options = options(root);
    let pictures = found(&options);
    assert_eq!(pictures.items.len(), 12, "without videos, each frame is a picture");
    options.frames = Some(FrameOptions { most: 9, step: 4 });
    options.ffmpeg = Some("/no/ffmpeg".into());
    assert!(refused(&options).starts_with("cannot start /no/ffmpeg"));
    fs::remove_file(root.join("film.mp4")).expect("it was written");
    let videos = found(&options);
    let clip = &videos.items[0];
    assert_eq!((clip.name.as_str(), clip.frames), ("clip", Some(9)));
    assert_eq!(clip.captions, ["a clip"]);
    assert_eq!(videos.buckets(), [("1x16x16".to_string(), 1), ("9x16x16".to_string(), 1)]);
    let pixels = videos.read(0).expect("it is sound").pixels;
    assert_eq!(pixels.size(), [3, 9, 16, 16]);
    let levels: Vec<i64> = (0..9).map(|frame| pixels.int64_value(&[0, frame, 0, 0])).collect();
    assert_eq!(levels, [0, 1, 2, 3, 5, 6, 7, 8, 10], "by numbers, evenly");
    assert_eq!(videos.read(1).expect("it is sound").pixels.size(), [3, 1, 16, 16]);
    draw(root, "clip/f5.png", (21, 20), 0);
    let what = videos.read(0).expect_err("one frame is wider").to_string();
    assert!(what.ends_with("f5.png: has 21x20 pixels, and the first frame has 20x20"), "{what}");
}

#[test]
fn equal_content_has_equal_hashes() {
    let folder = folder();
    let root = folder.path();
    draw(root, "a.png", (20, 20), 1);
    draw(root, "copy.png", (20, 20), 1);
    draw(root, "other.png", (20, 20), 2);
    let hashes = |options: &PictureOptions| examined(options).expect("all sound").1;
    let plain = hashes(&options(root));
    assert_eq!(plain[0], plain[1]);
    assert_ne!(plain[0], plain[2]);
    let resized = PictureOptions { buckets: BucketOptions::One(Size::new(8, 16)), ..options(root) };
    assert_ne!(hashes(&resized)[0], plain[0]);
    draw(root, "masks/a.png", (20, 20), 0);
    let masked = PictureOptions { masks: Some(root.join("masks")), ..options(root) };
    let masked = hashes(&masked);
    assert!(masked[0] != plain[0] && masked[0] != masked[1] && masked[1] != plain[1]);
}

#[test]
fn what_is_no_folder_of_pictures_is_told() {
    let folder = folder();
    assert!(refused(&options(folder.path())).contains("holds no PNG, JPEG or WebP file"));
    write(folder.path(), "a.mp4", "");
    assert!(refused(&options(folder.path())).contains("videos are not wanted"));
    assert!(refused(&options(Path::new("/no/folder"))).starts_with("cannot find /no/folder"));
    draw(folder.path(), "a.png", (4, 4), 0);
    let none = PictureOptions {
        frames: Some(FrameOptions { most: 0, step: 1 }),
        ..options(folder.path())
    };
    assert!(refused(&none).contains("at least one frame"));
    write(folder.path(), "b.txt", "");
    draw(folder.path(), "b.png", (4, 4), 0);
    fs::write(folder.path().join("b.txt"), [0xff]).expect("it can be written");
    assert!(refused(&options(folder.path())).contains("b.txt: is no text in UTF-8"));
}
