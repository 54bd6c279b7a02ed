//! Caches of other trainers become datasets with the bits that their own readers give, and train.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::collective::Solo;
use fm_dist::data::{Caption, Dataset, TextPadding};
use fm_dist::datasets::About;
use fm_dist::datasets::caches::{CacheFormat, ImportRequest, Imported, import};
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::run::Resume;
use tch::Tensor;
use tempfile::TempDir;

use super::packages::oracle;
use crate::runs::{column, train_in_threads};
use crate::threads::training::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, SAMPLES, Tiny, WAN};

fn request(from: CacheFormat, sources: &[PathBuf], out: &Path) -> ImportRequest {
    ImportRequest {
        from,
        sources: sources.to_vec(),
        out: out.into(),
        captions: None,
        family: None,
        // Several files.
        shard_bytes: 8 << 10,
        jobs: 2,
        about: About::default(),
    }
}

fn imported(from: CacheFormat, sources: &[PathBuf], out: &Path) -> Dataset {
    let Imported { written, .. } = import(&request(from, sources, out), &Solo).unwrap();
    assert_eq!((written.samples, written.groups), (SAMPLES as usize, 1), "{}", out.display());
    Dataset::open(out).unwrap()
}

/// Asserts that the batch of all samples holds the expected tensors, and each sample its caption.
fn assert_batch(dataset: &Dataset, expected: &Path) {
    dataset.verify_hashes().and_then(|()| dataset.verify_numbers()).unwrap();
    let ids: Vec<u64> = (0..SAMPLES as u64).collect();
    let mut numbers = Vec::new();
    let each = |caption: Caption| {
        numbers.push(caption.caption.strip_prefix("caption ").unwrap().parse::<i64>().unwrap());
        Ok(())
    };
    dataset.captions().unwrap().for_each(each).unwrap();
    // A name that is a hash sorts anywhere.
    let order = Tensor::from_slice(&numbers);
    numbers.sort_unstable();
    assert_eq!(numbers, (0..SAMPLES).collect::<Vec<_>>());
    let (batch, expected) = (dataset.batch(&ids).unwrap(), SafeTensors::open(expected).unwrap());
    assert!(expected.tensors().len() > 1);
    for info in expected.tensors() {
        let found = &batch.tensors[&info.name];
        let tensor = expected.read(&info.name).unwrap().index_select(0, &order);
        assert_eq!((found.kind(), found.size()), (info.kind, info.shape.clone()), "{}", info.name);
        assert!(found.equal(&tensor), "{} of {}", info.name, dataset.path().display());
    }
}

fn assert_trains(family: &Tiny, data: &Path, root: &Path, overrides: &[&str]) {
    let sets = [&["max_steps=10"], overrides].concat();
    let config = family.config(data, &root.join("run"), &sets);
    let run = train_in_threads(&config, &Resume::Never, 2).unwrap();
    assert_eq!(column(&run, "loss").len(), 10, "{}", data.display());
    fs::remove_dir_all(root.join("run")).unwrap();
}

fn caches() -> (TempDir, PathBuf) {
    let root = TempDir::new().unwrap();
    let path = root.path().to_path_buf();
    oracle("caches.py", &[path.to_str().unwrap()]);
    (root, path)
}

#[test]
fn caches_of_nemo_give_the_batches_of_its_own_collate_and_train() {
    let (_folder, root) = caches();
    let families = [
        ("flux", FLUX, vec![]),
        ("flux2", FLUX2, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec![]),
        ("hunyuanvideo", HUNYUAN_VIDEO15, vec![]),
    ];
    for (name, family, overrides) in families {
        let (source, expected) =
            (root.join("nemo").join(name), root.join(format!("nemo/{name}.safetensors")));
        // The paths in its list lead nowhere then.
        let moved = root.join(format!("moved-{name}"));
        fs::rename(source, &moved).unwrap();
        let data = root.join(format!("data-{name}"));
        let dataset = imported(CacheFormat::Nemo, std::slice::from_ref(&moved), &data);
        assert_batch(&dataset, &expected);
        let keeps_its_crop = |caption: Caption| {
            let crop = (caption.original_resolution, caption.crop_offset);
            assert_eq!(crop, (Some([96, 64]), Some([0, 8])));
            Ok(())
        };
        dataset.captions().unwrap().for_each(keeps_its_crop).unwrap();
        assert_trains(&family, &data, &root, &overrides);
        // What is left is a flat folder of samples, as older versions of NeMo read.
        fs::remove_file(moved.join("metadata.json")).unwrap();
        let flat = root.join(format!("flat-{name}"));
        assert_batch(&imported(CacheFormat::Nemo, &[moved], &flat), &expected);
    }
}

#[test]
fn caches_of_musubi_tuner_keep_their_bits_and_train() {
    let (_folder, root) = caches();
    let families = [
        ("flux2", FLUX2, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec!["data.text_tokens=16"]),
        ("hunyuanvideo", HUNYUAN_VIDEO15, vec![]),
    ];
    for (name, family, overrides) in families {
        let (source, expected) =
            (root.join("musubi").join(name), root.join(format!("musubi/{name}.safetensors")));
        let data = root.join(format!("data-{name}"));
        let dataset = imported(CacheFormat::Musubi, &[source], &data);
        assert_batch(&dataset.text_padding(TextPadding::Longest).unwrap(), &expected);
        assert_trains(&family, &data, &root, &overrides);
    }
}

#[test]
fn caches_of_ai_toolkit_keep_their_bits_and_train() {
    let (_folder, root) = caches();
    let families = [
        ("flux", FLUX, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec![]),
    ];
    for (name, family, overrides) in families {
        let (source, expected) = (
            root.join("ai-toolkit").join(name),
            root.join(format!("ai-toolkit/{name}.safetensors")),
        );
        let data = root.join(format!("data-{name}"));
        assert_batch(&imported(CacheFormat::AiToolkit, &[source], &data), &expected);
        assert_trains(&family, &data, &root, &overrides);
    }
}

#[test]
fn caches_of_diffusion_pipe_keep_their_bits_and_train() {
    let (_folder, root) = caches();
    let pipes = root.join("diffusion-pipe");
    let image_to_video = vec![
        "data.text_tokens=512",
        "model.wan.in_channels=12",
        "model.wan.image_dim=8",
        "model.wan.added_kv_proj_dim=24",
        "flow_matching.adapter.image_conditioning=true",
    ];
    let families = [
        ("flux", FLUX, vec!["flow_matching.apply_loss_mask=true"]),
        ("flux2", FLUX2, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec!["data.text_tokens=16"]),
        ("wan_i2v", WAN, image_to_video),
        ("hunyuanvideo", HUNYUAN_VIDEO15, vec![]),
        ("hunyuanvideo_old", HUNYUAN_VIDEO15, vec![]),
    ];
    for (name, family, overrides) in families {
        let expected = pipes.join(format!("{name}.safetensors"));
        let data = root.join(format!("data-{name}"));
        let dataset = imported(CacheFormat::DiffusionPipe, &[pipes.join(name)], &data);
        assert_batch(&dataset.text_padding(TextPadding::Longest).unwrap(), &expected);
        assert_trains(&family, &data, &root, &overrides);
    }
    let old = [pipes.join("hunyuanvideo_old")];
    let again =
        import(&request(CacheFormat::DiffusionPipe, &old, &root.join("again")), &Solo).unwrap();
    assert!(again.notes[0].ends_with("they are scaled by 1.03682"), "{:?}", again.notes);
    let raw = [pipes.join("flux2_raw")];
    let refused =
        import(&request(CacheFormat::DiffusionPipe, &raw, &root.join("raw")), &Solo).unwrap_err();
    let what = "holds latents of FLUX.2 before normalization: their standard deviation is 1.7";
    assert!(refused.to_string().contains(what), "{refused}");
}

#[test]
fn caches_of_simpletuner_keep_their_bits_and_train() {
    let (_folder, root) = caches();
    let families = [
        ("flux", FLUX, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("flux2", FLUX2, vec![]),
        ("qwen_image", QWEN_IMAGE, vec!["flow_matching.adapter.use_text_mask=true"]),
        ("wan", WAN, vec![]),
        ("hunyuanvideo", HUNYUAN_VIDEO15, vec![]),
    ];
    for (name, family, overrides) in families {
        let folder = root.join("simpletuner").join(name);
        let expected = folder.with_extension("safetensors");
        let data = root.join(format!("data-{name}"));
        let sources = ["vae", "text", "pictures"].map(|part| folder.join(part));
        let dataset = imported(CacheFormat::SimpleTuner, &sources, &data);
        assert_batch(&dataset.text_padding(TextPadding::Longest).unwrap(), &expected);
        assert_trains(&family, &data, &root, &overrides);
        let hashed = name != "wan";
        let alone = request(CacheFormat::SimpleTuner, &sources[..2], &root.join("alone"));
        let refused = import(&alone, &Solo).unwrap_err().to_string();
        let what =
            if hashed { "add the folder of pictures" } else { "add the folder of its captions" };
        assert!(refused.contains(what), "{refused}");
        if !hashed {
            let alone = ImportRequest { captions: Some(sources[2].clone()), ..alone };
            assert_eq!(import(&alone, &Solo).unwrap().written.samples, SAMPLES as usize);
        }
    }
}
