//! Ranks encode a dataset together: the bytes of one rank alone, also after a kill and with another
//! number of ranks; damaged pictures are named once and left out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fm_dist::data::Dataset;
use fm_dist::media::Picture;
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::runs::{finish, mpirun, program, running};

/// Pictures of random pixels with captions, every seventh one equal to the one before it.
fn write_pictures(folder: &Path, count: i64) {
    fs::create_dir(folder).unwrap();
    for number in 0..count {
        let picture = folder.join(format!("{number:04}.png"));
        if number % 7 == 6 {
            fs::copy(folder.join(format!("{:04}.png", number - 1)), &picture).unwrap();
        } else {
            let sides = [3, 16 + number % 3, 20];
            let draw = || Tensor::randint(256, sides, (Kind::Uint8, Device::Cpu));
            let pixels = Key::new(1, Purpose::Test).scope(number as u64).seeded(draw);
            Picture::from_tensor(&pixels).write_png(&picture).unwrap();
        }
        let caption = format!("picture {}, square", number % 11);
        fs::write(picture.with_extension("txt"), caption).unwrap();
    }
}

fn command<'a>(pictures: &'a Path, out: &'a Path, further: &[&'a str]) -> Vec<&'a str> {
    let [pictures, out] = [pictures, out].map(|path| path.to_str().unwrap());
    let fixed = ["data", "encode", "--family", "dit", pictures, "--out", out, "--size", "16x16"];
    [&fixed[..], further].concat()
}

/// Bytes of every file of a folder by name.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    files
        .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
        .collect()
}

/// Batches that wait beside `out` for the dataset to be written.
fn batches(out: &Path) -> Vec<PathBuf> {
    let store =
        out.with_file_name(format!("{}.encoded", out.file_name().unwrap().to_str().unwrap()));
    let entries = fs::read_dir(store).into_iter().flatten().map(|entry| entry.unwrap().path());
    let is_batch = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "safetensors");
    entries.filter(is_batch).collect()
}

/// Kills all processes of a command, which outlive their launcher by moments.
fn kill(out: &Path, child: &mut std::process::Child, began: Instant) {
    while let numbers = running(out.to_str().unwrap())
        && !numbers.is_empty()
    {
        Command::new("kill").arg("-KILL").args(numbers).output().unwrap();
        let _ = child.try_wait();
        assert!(began.elapsed() < Duration::from_secs(80), "ranks cannot be killed");
    }
    child.wait().unwrap();
}

#[test]
fn ranks_encode_the_dataset_of_one_and_go_on_after_a_kill() {
    let root = TempDir::new().unwrap();
    let pictures = root.path().join("pictures");
    write_pictures(&pictures, 600);
    let [alone, two, three, killed] =
        ["alone", "two", "three", "killed"].map(|name| root.path().join(name));
    // A picture a batch, and a few samples a file.
    let options = ["--batch-tokens", "1", "--shard-size", "64kB", "--jobs", "1"];
    let (code, output, errors) = finish(program(&command(&pictures, &alone, &options)));
    assert_eq!(code, 0, "{errors}");
    assert!(output.starts_with("buckets: 600 of 16x16\n"), "{output}");
    assert!(output.contains("alone: 600 samples in "), "{output}");
    let expected = contents(&alone);
    let captions = String::from_utf8_lossy(&expected["captions.jsonl"]).into_owned();
    // 20 x 17 pixels become 18 x 16, of which the middle is taken.
    let line = r#""source":"0001.png","original_resolution":[20,17],"crop_offset":[1,0]}"#;
    assert!(captions.contains(line), "{captions}");
    for (ranks, out) in [(2, &two), (3, &three)] {
        let (code, output, errors) = finish(mpirun(ranks, &command(&pictures, out, &options)));
        assert_eq!(code, 0, "{errors}");
        assert_eq!(output.matches("600 samples").count(), 1, "said once: {output}");
        assert!(contents(out) == expected, "{ranks} ranks");
    }

    let command = command(&pictures, &killed, &options);
    let start = || mpirun(3, &command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (mut child, began) = (start(), Instant::now());
    // The captions are 12 batches.
    while batches(&killed).len() < 40 {
        assert!(began.elapsed() < Duration::from_secs(60), "ranks do not encode");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill(&killed, &mut child, began);
    assert!(!killed.join("dataset.json").exists(), "it was too fast to be killed");
    let done: BTreeMap<PathBuf, _> = batches(&killed)
        .into_iter()
        .map(|path| (path.clone(), fs::metadata(&path).unwrap().modified().unwrap()))
        .collect();
    let (mut child, began) = (start(), Instant::now());
    // Some further ones, to see that those before were left alone.
    while batches(&killed).len() < done.len() + 20 {
        assert!(began.elapsed() < Duration::from_secs(60), "ranks do not go on");
        std::thread::sleep(Duration::from_millis(1));
    }
    for (path, time) in &done {
        let found = fs::metadata(path).unwrap().modified().unwrap();
        assert_eq!(found, *time, "{} was encoded twice", path.display());
    }
    kill(&killed, &mut child, began);
    let (code, _, errors) = finish(mpirun(2, &command));
    assert_eq!(code, 0, "{errors}");
    assert!(contents(&killed) == expected);
    assert!(batches(&killed).is_empty());
}

#[test]
fn damaged_pictures_are_named_once_and_left_out_up_to_a_share() {
    let root = TempDir::new().unwrap();
    let (pictures, out) = (root.path().join("pictures"), root.path().join("out"));
    write_pictures(&pictures, 20);
    // No header, and an end that is missing.
    fs::write(pictures.join("0003.png"), "no picture").unwrap();
    let bytes = fs::read(pictures.join("0005.png")).unwrap();
    fs::write(pictures.join("0005.png"), &bytes[..bytes.len() / 2]).unwrap();
    let refused = finish(mpirun(3, &command(&pictures, &out, &["--bad-share", "0.09"])));
    assert_eq!(refused.0, 40, "{}", refused.2);
    assert_eq!(refused.2.matches("2 of 20 files cannot be used").count(), 1, "{}", refused.2);
    let (code, output, errors) =
        finish(mpirun(3, &command(&pictures, &out, &["--bad-share", "0.1"])));
    assert_eq!(code, 0, "{errors}");
    for name in ["0003.png", "0005.png"] {
        assert_eq!(output.matches(name).count(), 1, "{output}");
    }
    let dataset = Dataset::open(&out).unwrap();
    dataset.verify_hashes().and_then(|()| dataset.verify_numbers()).unwrap();
    assert_eq!(dataset.num_samples(), 18);
    let (code, _, errors) = finish(mpirun(2, &command(&pictures, &out, &[])));
    assert_eq!((code, errors.matches("is a dataset already").count()), (40, 1), "{errors}");
}

#[test]
fn masks_and_several_captions_become_samples() {
    let root = TempDir::new().unwrap();
    let [pictures, masks, controls, out] =
        ["pictures", "masks", "controls", "out"].map(|name| root.path().join(name));
    write_pictures(&pictures, 4);
    fs::remove_file(pictures.join("0001.txt")).unwrap();
    fs::write(pictures.join("0001.json"), r#"["one caption", "another, with tags"]"#).unwrap();
    for folder in [&masks, &controls] {
        fs::create_dir(folder).unwrap();
    }
    let mask = Tensor::zeros([3, 16, 20], (Kind::Uint8, Device::Cpu));
    let _ = mask.narrow(2, 0, 10).fill_(255);
    Picture::from_tensor(&mask).write_png(&masks.join("0001.png")).unwrap();
    for number in 0..4 {
        let name = format!("{number:04}.png");
        fs::copy(pictures.join(&name), controls.join(&name)).unwrap();
    }
    let [masks, controls] = [&masks, &controls].map(|path| path.to_str().unwrap());
    let options = ["--masks", masks, "--control", controls, "--prefix", "photo of "];
    let (code, output, errors) = finish(program(&command(&pictures, &out, &options)));
    assert_eq!(code, 0, "{errors}");
    assert!(output.contains("3 of 4 have no mask"), "{output}");
    let dataset = Dataset::open(&out).unwrap();
    let mut captions = Vec::new();
    dataset
        .captions()
        .unwrap()
        .for_each(|line| {
            captions.push(line.caption);
            Ok(())
        })
        .unwrap();
    let expected = [
        "picture 0, square",
        "one caption",
        "another, with tags",
        "picture 2, square",
        "picture 3, square",
    ];
    assert_eq!(captions, expected.map(|caption| format!("photo of {caption}")));
    let [first, second, third] = [0, 1, 2].map(|id| dataset.sample(id).unwrap());
    assert!(second["image_latents"].equal(&third["image_latents"]));
    assert!(!second["text_embeddings"].equal(&third["text_embeddings"]));
    assert!(
        first["condition_latents"].equal(&first["image_latents"]),
        "the control is the picture"
    );
    assert!(first["loss_mask"].equal(&first["loss_mask"].ones_like()));
    let columns = second["loss_mask"].mean_dim([0i64].as_slice(), false, Kind::Float);
    let columns = Vec::<f32>::try_from(columns).unwrap();
    assert!(columns[0] == 1.0 && columns[3] == 0.0, "{columns:?}");
}
