//! The shape of the house: rooms use lower floors only, and some words stand in one file only.

use std::fs;
use std::path::{Path, PathBuf};

/// The order of this list is the order of the house. Rooms on one floor do not use each other.
const FLOORS: &[&[&str]] = &[
    &["error", "libtorch", "phase", "rng", "tensor"],
    &["cuda", "pulse", "settings"],
    &["fault", "registry"],
    &["failure"],
    &["files"],
    &["ops"],
    &["collective", "data", "nn", "telemetry"],
    &["report"],
    &["flow", "model", "optim", "parallel", "watchdog"],
    &["adapter"],
    &["config"],
    &["run"],
    &["assembly"],
    &["sample"],
    &["plan"],
    &["commands", "train"],
    &["cli"],
];

/// What may be written only in the places beside it (prefixes of paths under src/).
const ONLY_IN: &[(&str, &[&str])] = &[
    ("run_backward(", &["ops/verify.rs", "parallel/backward.rs"]),
    ("env::var", &["collective/mod.rs"]),
    ("rank() == 0", &["collective/agreement.rs"]),
    (
        "unsafe ",
        &[
            "collective/mpi/",
            "collective/nccl/",
            "collective/exchange/span.rs",
            "cuda/",
            "libtorch.rs",
            "ops/autograd/",
            "tensor.rs",
        ],
    ),
    ("manual_seed(", &["rng.rs"]),
    ("world_size == 1", &[]),
    ("HashMap", &[]),
];

struct Source {
    path: PathBuf,
    room: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let read = |file: PathBuf| {
        let path = file.strip_prefix(&root).unwrap().to_path_buf();
        let room =
            path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_string();
        Source { path, room, text: fs::read_to_string(file).unwrap() }
    };
    // The build script lies in src/ and is no part of the crate.
    let of_crate = rust_files(&root).into_iter().filter(|file| *file != root.join("build.rs"));
    let found: Vec<Source> = of_crate.map(read).collect();
    assert!(found.len() > 50, "the walk over src/ found {} files", found.len());
    found
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let inside = |path: PathBuf| match path.is_dir() {
        true => rust_files(&path),
        false => vec![path],
    };
    entries
        .into_iter()
        .flat_map(inside)
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

fn floor_of(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// Rooms that a line names behind `crate::`.
fn rooms_named(line: &str) -> Vec<String> {
    let name =
        |piece: &str| piece.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    line.split("crate::").skip(1).map(name).collect()
}

#[test]
fn rooms_use_lower_floors_only() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !["lib", "main"].contains(&source.room.as_str()))
    {
        let here = floor_of(&source.room)
            .unwrap_or_else(|| panic!("`{}` has no floor: add it to FLOORS", source.room));
        for (number, line) in source.text.lines().enumerate() {
            for other in rooms_named(line) {
                let Some(there) = floor_of(&other) else { continue };
                if there > here || (there == here && other != source.room) {
                    wrong.push(format!(
                        "{}:{}: {} (floor {here}) uses {other}",
                        source.path.display(),
                        number + 1,
                        source.room
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn e10_some_words_stand_in_one_place_only() {
    let mut wrong = Vec::new();
    for source in sources() {
        let path = source.path.to_str().unwrap();
        // What tests at the foot of a file do is their own business.
        let program = source.text.split("mod tests {").next().unwrap();
        let lines =
            program.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
        for (number, line) in lines {
            for (word, places) in ONLY_IN.iter().filter(|(word, _)| line.contains(word)) {
                if !places.iter().any(|place| path.starts_with(place)) {
                    wrong.push(format!("{path}:{}: `{word}` belongs in {places:?}", number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_stay_short_enough_to_read() {
    let too_long = |source: &Source| {
        let lines = source.text.lines().count();
        (lines > 450).then(|| format!("{}: {lines} lines", source.path.display()))
    };
    let long: Vec<String> = sources().iter().filter_map(too_long).collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}
