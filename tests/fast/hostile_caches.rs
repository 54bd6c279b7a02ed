//! Caches of other trainers that lie are refused before anything is written, in one line.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use fm_dist::collective::Solo;
use fm_dist::datasets::About;
use fm_dist::datasets::caches::{CacheFormat, ImportRequest, import};
use fm_dist::encoding::Family;
use fm_dist::error::Error;
use fm_dist::files::pickle::PickledFile;
use rusqlite::Connection;
use serde_json::json;
use tempfile::TempDir;

use super::archive::{Described, pickle, saved, text};
use super::hostile::refusal;

/// Opcodes of a tensor of one number, with this many axes.
fn one(axes: usize) -> Vec<u8> {
    let ones = vec![1; axes];
    let (shape, strides) = (&ones[..], &ones[..]);
    let described =
        Described { class: "FloatStorage", key: "0", elements: 1, offset: 0, shape, strides };
    described.opcodes()
}

/// A dictionary of `torch.save`, from the opcodes of its keys and values in turns.
fn dictionary(entries: &[Vec<u8>]) -> Vec<u8> {
    saved(&pickle(&[b"}(", &entries.concat()[..], b"u"].concat()), &[("0", &[0; 4])])
}

/// A cached sample under NeMo's keys, of one latent and one token, with further entries.
fn sample_with(further: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut entries = vec![text("latent"), one(3), text("prompt_embeds"), one(3)];
    entries.extend([text("prompt"), text("a cat")]);
    entries.extend(further.iter().flat_map(|(key, value)| [text(key), value.clone()]));
    dictionary(&entries)
}

fn sample() -> Vec<u8> {
    sample_with(&[])
}

fn request(from: CacheFormat, folder: &Path, out: &Path) -> ImportRequest {
    ImportRequest {
        from,
        sources: vec![folder.into()],
        out: out.into(),
        captions: None,
        family: None,
        shard_bytes: 1 << 20,
        jobs: 1,
        about: About::default(),
    }
}

fn imported(folder: &Path, out: &Path) -> Result<usize, Error> {
    import(&request(CacheFormat::Nemo, folder, out), &Solo).map(|imported| imported.written.samples)
}

/// A cache that lists this file.
fn cache(listed: &str) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("cache");
    fs::create_dir_all(folder.join("8x8")).unwrap();
    fs::write(folder.join("8x8/a.pt"), sample()).unwrap();
    fs::write(root.path().join("outside.pt"), sample()).unwrap();
    fs::write(folder.join("metadata.json"), json!({"shards": ["rows.json"]}).to_string()).unwrap();
    fs::write(folder.join("rows.json"), json!([{"cache_file": listed}]).to_string()).unwrap();
    root
}

#[test]
fn a_cache_lists_files_below_its_folder_only() {
    let root = cache("/gone/8x8/a.pt");
    let (folder, out) = (root.path().join("cache"), root.path().join("out"));
    assert_eq!(imported(&folder, &out).unwrap(), 1, "a cache that was moved");
    for listed in ["../outside.pt", "/etc/passwd", "", ".."] {
        let root = cache(listed);
        let (folder, out) = (root.path().join("cache"), root.path().join("out"));
        let text = refusal(|| imported(&folder, &out));
        assert!(text.ends_with("which is not below it") && !out.exists(), "{text}");
    }
}

#[test]
fn caches_that_are_not_what_they_seem_are_refused_before_anything_is_written() {
    let root = cache("a.pt");
    let (folder, out) = (root.path().join("cache"), root.path().join("out"));
    let refused = |what: &str| {
        let text = refusal(|| imported(&folder, &out));
        assert!(text.contains(what) && !out.exists(), "{what}: {text}");
    };
    fs::write(folder.join("8x8/a.pt"), saved(&pickle(b"cposix\nsystem\n)R"), &[])).unwrap();
    refused("names `posix.system`");
    fs::write(folder.join("8x8/a.pt"), saved(&pickle(b"}"), &[])).unwrap();
    refused("a.pt: holds no latents with their text");
    fs::write(folder.join("rows.json"), "[{}]").unwrap();
    refused("rows.json: missing field `cache_file`");
    fs::write(folder.join("metadata.json"), "<html>").unwrap();
    refused("metadata.json: is a web page (HTML)");
}

#[test]
fn a_family_that_the_cache_is_not_of_is_refused() {
    let root = cache("a.pt");
    let (folder, out) = (root.path().join("cache"), root.path().join("out"));
    let taken = |family: Option<Family>| {
        let request = ImportRequest { family, ..request(CacheFormat::Nemo, &folder, &out) };
        import(&request, &Solo)
    };
    let refused = |family: Option<Family>, what: &str| {
        let text = refusal(|| taken(family));
        assert!(text.contains(what) && !out.exists(), "{what}: {text}");
    };
    let is = |model: &str| {
        let bytes = sample_with(&[("model_type", text(model))]);
        fs::write(folder.join("8x8/a.pt"), bytes).unwrap();
    };
    // This sample does not say its family.
    refused(Some(Family::Wan), "as wan: the family trains on video data, the cache holds image");
    is("flux2");
    refused(Some(Family::Flux), "is of family flux2, and --family says flux");
    is("hunyuanvideo");
    refused(None, "cannot be trained on as hunyuan_video15: the family trains on video data");
    is("ltx2");
    refused(None, "is of model `ltx2` by its model_type; expected one of flux, flux2, qwen_image");
    taken(Some(Family::Flux2)).unwrap();
}

#[test]
fn samples_for_editing_pictures_are_refused_by_what_they_are() {
    let root = cache("samples/a.pt");
    let (folder, out) = (root.path().join("cache"), root.path().join("out"));
    fs::write(folder.join("8x8/a.pt"), dictionary(&[text("target_latent"), one(3)])).unwrap();
    let line = refusal(|| imported(&folder, &out));
    assert!(line.contains("no family here trains on ordered context latents"), "{line}");
}

/// A cache of diffusion-pipe with one picture of FLUX.2, and its two databases.
fn pipe() -> (TempDir, PathBuf, [PathBuf; 2]) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("pictures/cache/flux2");
    let spec = [b"](N".to_vec(), text("/pictures/a.png"), b"e".to_vec()].concat();
    let caption = [b"](".to_vec(), text("a cat"), b"e".to_vec()].concat();
    let image_spec = || vec![text("image_spec"), spec.clone()];
    let latents = [image_spec(), vec![text("caption"), caption, text("latents"), one(3)]].concat();
    let texts = [image_spec(), vec![text("text_embeds_0"), one(2)]].concat();
    let databases =
        [("cache_1.000x8x8x1/latents", latents), ("ar_frames_1.000_1/text_embeddings_1", texts)]
            .map(|(place, record)| {
                let place = folder.join(place);
                fs::create_dir_all(&place).unwrap();
                let record = dictionary(&record);
                fs::write(place.join("shard_0.bin"), &record).unwrap();
                let path = place.join("metadata.db");
                let tables = format!(
                    "CREATE TABLE fingerprint(value); INSERT INTO fingerprint VALUES('x');
             CREATE TABLE items(shard, shard_index); INSERT INTO items VALUES(0, 0);
             CREATE TABLE shard_0(offset, size); INSERT INTO shard_0 VALUES(0, {})",
                    record.len()
                );
                Connection::open(&path).unwrap().execute_batch(&tables).unwrap();
                path
            });
    (root, folder, databases)
}

fn piped(folder: &Path, out: &Path) -> Result<usize, Error> {
    let request = request(CacheFormat::DiffusionPipe, folder, out);
    import(&request, &Solo).map(|imported| imported.written.samples)
}

#[test]
fn databases_that_lie_are_refused() {
    let (root, folder, _) = pipe();
    assert_eq!(piped(&folder, &root.path().join("out")).unwrap(), 1, "what the lies are made from");
    for (statements, what) in [
        ("UPDATE shard_0 SET size = size + 1", "overlaps another or does not fit"),
        ("UPDATE shard_0 SET offset = 9223372036854775807", "overlaps another or does not fit"),
        ("UPDATE shard_0 SET offset = 1, size = size - 1", "has a zip directory of 3 entries"),
        ("UPDATE shard_0 SET offset = -1", "holds a negative number in table `shard_0`"),
        ("UPDATE shard_0 SET offset = 'x'", "damaged: Invalid column type Text"),
        ("UPDATE shard_0 SET offset = 0.5", "damaged: Invalid column type Real"),
        ("INSERT INTO shard_0 SELECT * FROM shard_0", "overlaps another or does not fit"),
        ("INSERT INTO items VALUES(0, 0)", "refers to record 0 of shard_0"),
        ("UPDATE items SET shard_index = 1", "refers to record 1 of shard_0"),
        ("UPDATE items SET shard = 1", "holds no table `shard_1`"),
        ("DROP TABLE items", "holds no table `items`"),
        (
            "CREATE TABLE shard_7(offset, size); UPDATE items SET shard = 7",
            "shard_7.bin: does not exist",
        ),
        ("CREATE INDEX a ON items(shard)", "holds the index `a`; expected plain tables"),
        (
            "DROP TABLE items; CREATE VIEW items AS WITH RECURSIVE r(x) AS (SELECT 0 UNION ALL \
             SELECT x + 1 FROM r) SELECT 0 AS shard, x AS shard_index FROM r",
            "holds the view `items`; expected plain tables",
        ),
        (
            "CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM items; END",
            "holds the trigger `t`; expected plain tables",
        ),
    ] {
        let (root, folder, [latents, _]) = pipe();
        let out = root.path().join("out");
        Connection::open(&latents).unwrap().execute_batch(statements).unwrap();
        let text = refusal(|| piped(&folder, &out));
        assert!(text.contains(what) && !out.exists(), "{statements}: {text}");
    }
    let (root, folder, [latents, _]) = pipe();
    fs::write(latents.with_file_name("metadata.db-wal"), "x").unwrap();
    let text = refusal(|| piped(&folder, &root.path().join("out")));
    assert!(text.contains("it is being written, or its writing was interrupted"), "{text}");
}

#[test]
fn databases_that_are_cut_or_damaged_are_refused() {
    let (root, folder, [latents, _]) = pipe();
    let whole = fs::read(&latents).unwrap();
    let out = root.path().join("out");
    for length in [0, 1, 15, 16, 50, 99, 100, 101, 1000, whole.len() / 2, whole.len() - 4096] {
        fs::write(&latents, &whole[..length]).unwrap();
        let text = refusal(|| piped(&folder, &out));
        assert!(text.contains("metadata.db: ") && !out.exists(), "{length}: {text}");
    }
    // Whatever changes, it is one line or a dataset, and soon.
    let mut state = 1u64;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let mut refused = 0;
    for round in 0..300 {
        let mut bytes = whole.clone();
        // Numbers of pages, cells and rows stand at the beginnings of pages.
        for _ in 0..=round % 4 {
            let page = 4096 * draw(bytes.len() / 4096);
            let place = page + draw(if round % 2 == 0 { 120 } else { 4096 });
            bytes[place] = draw(256) as u8;
        }
        fs::write(&latents, &bytes).unwrap();
        if piped(&folder, &out).is_ok() {
            fs::remove_dir_all(&out).unwrap();
        } else {
            refused += 1;
            refusal(|| piped(&folder, &out));
            assert!(!out.exists());
        }
    }
    assert!(refused > 20, "{refused}");
}

#[test]
fn a_small_compressed_file_does_not_fill_the_memory() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.pt");
    let compressed = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let sound = compressed(&sample());
    fs::write(&path, &sound).unwrap();
    assert!(PickledFile::open(&path).unwrap().root().get("latent").is_some());
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        let text = refusal(|| PickledFile::open(&path));
        assert!(text.contains(what), "{what}: {text}");
    };
    let bomb = compressed(&vec![0; 80 << 20]);
    assert!(bomb.len() < 1 << 20);
    refused(&bomb, "inflates to 83886080 bytes; at most 67108864 are read");
    let says = |length: u32| [&bomb[..bomb.len() - 4], &length.to_le_bytes()[..]].concat();
    refused(&says(1000), "is not the 1000 bytes that it says");
    refused(&says(64 << 20), "is not the 67108864 bytes that it says");
    refused(&sound[..sound.len() - 1], "compressed by gzip");
    refused(&sound[..20], "compressed by gzip");
    refused(&sound[..2], "cut or damaged");
    let nested = compressed(&sound);
    refused(&nested, "is a gzip archive");
}
