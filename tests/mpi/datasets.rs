//! Ranks make a dataset together: the bytes of one rank alone, also after a kill and with another
//! number of ranks.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fm_dist::files::safetensors;
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::runs::{finish, mpirun, program, running};

/// A cache of ai-toolkit, which consists of safetensors files.
fn cache(folder: &Path, samples: usize) {
    let write = |sample: usize, path: &Path, key: &str, shape: &[i64]| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let draw = || Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let tensor = Key::new(1, Purpose::Test).step(sample as u64).named(key).seeded(draw);
        let mut file = fs::File::create(path).unwrap();
        safetensors::write(&mut file, &[(key, &tensor)], &BTreeMap::new()).unwrap();
    };
    let hash = "h".repeat(22);
    for sample in 0..samples {
        let name = format!("{sample:05}_{hash}.safetensors");
        write(sample, &folder.join("_latent_cache").join(&name), "latent", &[4, 4, 6]);
        write(sample, &folder.join("_t_e_cache").join(&name), "text_embed", &[5, 12]);
    }
}

/// Bytes of every file of a folder by name.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    files
        .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
        .collect()
}

#[test]
fn ranks_write_the_dataset_of_one_and_go_on_after_a_kill() {
    let root = TempDir::new().unwrap();
    let source = root.path().join("cache");
    cache(&source, 600);
    let outs = ["alone", "ranks", "killed"].map(|name| root.path().join(name));
    let [alone, ranks, killed] = outs.each_ref().map(|out| {
        let from = ["data", "import", "--from", "ai-toolkit", source.to_str().unwrap()];
        let more = ["--shard-size", "1B", "--jobs", "1", "--out", out.to_str().unwrap()];
        [&from[..], &more].concat()
    });
    let (code, output, errors) = finish(program(&alone));
    assert_eq!(code, 0, "{errors}");
    assert!(
        output.ends_with("alone: 600 samples in 600 files, resolution groups: 1\n"),
        "{output}"
    );
    let expected = contents(&outs[0]);
    assert_eq!(expected.len(), 602);
    let (code, output, errors) = finish(mpirun(4, &ranks));
    assert_eq!(code, 0, "{errors}");
    assert_eq!(output.matches("600 samples").count(), 1, "said once: {output}");
    assert!(contents(&outs[1]) == expected);

    let logs = || {
        let names = ["unfinished.jsonl", "unfinished-1.jsonl", "unfinished-3.jsonl"];
        let lines =
            |name| fs::read_to_string(outs[2].join(name)).unwrap_or_default().lines().count();
        names.map(lines)
    };
    let mut child = mpirun(4, &killed).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while logs().iter().any(|lines| *lines < 3) {
        assert!(began.elapsed() < Duration::from_secs(60), "ranks do not write: {:?}", logs());
        std::thread::sleep(Duration::from_millis(1));
    }
    // The ranks themselves, which outlive their launcher by moments.
    while let numbers = running(outs[2].to_str().unwrap())
        && !numbers.is_empty()
    {
        Command::new("kill").arg("-KILL").args(numbers).output().unwrap();
        let _ = child.try_wait();
        assert!(began.elapsed() < Duration::from_secs(80), "ranks cannot be killed");
    }
    child.wait().unwrap();
    assert!(!outs[2].join("dataset.json").exists(), "it was too fast to be killed");
    let (code, _, errors) = finish(mpirun(2, &killed));
    assert_eq!(code, 0, "{errors}");
    assert!(contents(&outs[2]) == expected, "logs and halves are gone, and all files are there");
}

#[test]
fn a_cache_that_is_refused_is_refused_once() {
    let root = TempDir::new().unwrap();
    let source = root.path().join("cache");
    cache(&source, 8);
    let out = root.path().join("out");
    let (source, out) = (source.to_str().unwrap(), out.to_str().unwrap());
    let import = ["data", "import", "--from", "ai-toolkit", source, "--out", out];
    for (further, what) in [
        (["--family", "wan"], "cannot be trained on as wan: the family trains on video data"),
        (["--captions", "/nowhere"], "/nowhere/00000.txt: does not exist"),
    ] {
        let (code, _, errors) = finish(mpirun(3, &[&import[..], &further].concat()));
        assert_eq!((code, errors.matches(what).count()), (40, 1), "{errors}");
    }
    // One rank alone meets this one.
    fs::write(
        root.path().join("cache/_latent_cache").join(format!("x_{}.safetensors", "h".repeat(22))),
        "x",
    )
    .unwrap();
    let (code, _, errors) = finish(mpirun(3, &import));
    assert_eq!(code, 40, "{errors}");
    assert!(!Path::new(out).exists());
}
