//! The shape of the house: rooms use lower floors only, some words stand in one file only, and
//! random numbers are drawn where they are seeded. src/README.md draws the rooms from their
//! imports.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The order of this list is the order of the house. Rooms on one floor do not use each other.
const FLOORS: &[&[&str]] = &[
    &["error", "folders", "libtorch", "median", "phase", "rng", "tensor"],
    &["cuda", "pulse", "settings"],
    &["fault", "registry"],
    &["failure"],
    &["files"],
    &["ops"],
    &["collective", "data", "lora", "media", "nn", "telemetry", "tokenizer"],
    &["attention", "published", "report"],
    &["autoencoder", "encoder", "flow", "model", "optim", "parallel", "watchdog"],
    &["adapter", "encoding", "tuning"],
    &["config", "datasets"],
    &["run"],
    &["assembly"],
    &["sample"],
    &["plan"],
    &["commands", "train"],
    &["cli"],
];

/// The first floor above the ground. Every room may use the ground, so that the picture leaves it
/// out.
const FIRST_ABOVE_GROUND: &str = "collective";

/// What may be written only in the places beside it (prefixes of paths under src/).
const ONLY_IN: &[(&str, &[&str])] = &[
    ("run_backward(", &[]),
    ("libtorch::gradients", &["ops/verify.rs", "parallel/backward.rs"]),
    ("env::var", &["collective/mod.rs", "folders.rs"]),
    ("rank == 0", &["pulse.rs"]),
    ("rank() == 0", &[]),
    (
        "unsafe ",
        &[
            "collective/mpi/",
            "collective/nccl/",
            "collective/exchange/span.rs",
            "cuda/",
            "libtorch/",
            "ops/autograd/",
            "tensor.rs",
        ],
    ),
    ("manual_seed(", &["rng.rs"]),
    ("scaled_dot_product_attention(", &["nn/attention/mod.rs"]),
    ("world_size == 1", &[]),
    ("HashMap", &[]),
];

/// What draws by libtorch's generators, which are the whole process's, or seeds them.
const DRAWS: &[&str] = &[
    "Tensor::rand",
    "Tensor::normal",
    "rand_like(",
    "randn_like(",
    "randint_like(",
    "normal_(",
    "uniform_(",
    "random_(",
    "exponential_(",
    "bernoulli",
    "multinomial(",
    "sample_dirichlet(",
    "manual_seed(",
];

/// What seeds them, and locks them until the draws are done.
const SEEDS: &[&str] = &["seeded(", "TorchSeed("];

/// Draws of these files are seeded by their callers, or are words only.
const SEEDED_ELSEWHERE: &[&str] = &["src/rng.rs", "src/nn/params/init.rs", "tests/fast/floors.rs"];

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
                let Some(there) = floor_of(&other) else {
                    continue;
                };
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

/// Lines of the function around a line, by rustfmt's indents: from the nearest `fn` above it that
/// begins further left to the brace below that one.
fn function_around<'t>(lines: &'t [&'t str], number: usize) -> &'t [&'t str] {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let is_head = |line: &&str| line.contains("fn ") && indent(line) < indent(lines[number]);
    let Some(first) = lines[..number].iter().rposition(is_head) else {
        return &[];
    };
    let is_end = |line: &&str| line.trim() == "}" && indent(line) == indent(lines[first]);
    let end = lines[number..].iter().position(is_end);
    &lines[first..end.map_or(lines.len(), |end| number + end)]
}

/// A draw without a seed cannot be had again, and between another test's seed and its draws it
/// changes their numbers. This does not see a draw whose function seeds only others, nor one by an
/// operator that is not in [`DRAWS`].
#[test]
fn random_numbers_are_drawn_in_functions_that_seed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let has = |line: &str, words: &[&str]| words.iter().any(|word| line.contains(word));
    let mut wrong = Vec::new();
    for file in ["src", "tests"].iter().flat_map(|folder| rust_files(&root.join(folder))) {
        let path = file.strip_prefix(root).unwrap().to_str().unwrap();
        if SEEDED_ELSEWHERE.contains(&path) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let is_draw = !line.trim_start().starts_with("//") && has(line, DRAWS);
            let is_seeded = || function_around(&lines, number).iter().any(|line| has(line, SEEDS));
            if is_draw && !is_seeded() {
                wrong.push(format!("{path}:{}: `{}` without a seed", number + 1, line.trim()));
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

/// rustfmt leaves comments alone. Rows of tables stand on one line each.
#[test]
fn comments_end_at_column_100() {
    let beyond = |source: &Source| {
        let is_long = |line: &&str| {
            let comment = line.trim_start();
            let is_row = comment.trim_start_matches(['/', '!', ' ']).starts_with('|');
            comment.starts_with("//") && !is_row && line.chars().count() > 100
        };
        let long: Vec<String> = source.text.lines().filter(is_long).map(str::to_owned).collect();
        (!long.is_empty()).then(|| format!("{}: {long:#?}", source.path.display()))
    };
    let beyond: Vec<String> = sources().iter().filter_map(beyond).collect();
    assert!(beyond.is_empty(), "{}", beyond.join("\n"));
}

/// Rooms from the roof down.
fn rooms_from_the_roof() -> Vec<&'static str> {
    FLOORS.iter().rev().flat_map(|rooms| rooms.iter().copied()).collect()
}

fn is_ground(room: &str) -> bool {
    floor_of(room) < floor_of(FIRST_ABOVE_GROUND)
}

/// Rooms that the program text of `room` imports, without comments and tests.
fn imports_of(room: &str, sources: &[Source]) -> BTreeSet<&'static str> {
    let programs = sources
        .iter()
        .filter(|source| source.room == room && !source.path.ends_with("tests.rs"))
        .map(|source| source.text.split("mod tests {").next().unwrap());
    let named: BTreeSet<String> = programs
        .flat_map(str::lines)
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(rooms_named)
        .collect();
    rooms_from_the_roof()
        .into_iter()
        .filter(|other| *other != room && named.contains(*other))
        .collect()
}

/// Rooms that `room` uses, also through others.
fn reached_from(room: &str, sources: &[Source]) -> BTreeSet<&'static str> {
    let mut reached = imports_of(room, sources);
    loop {
        let further: BTreeSet<_> =
            reached.iter().flat_map(|other| imports_of(other, sources)).collect();
        if further.is_subset(&reached) {
            return reached;
        }
        reached.extend(further);
    }
}

/// Rooms above the ground that `room` imports, without those that another of them uses anyway.
fn arrows_of(room: &str, sources: &[Source]) -> Vec<&'static str> {
    let direct: Vec<&str> =
        imports_of(room, sources).into_iter().filter(|other| !is_ground(other)).collect();
    let implied: BTreeSet<&str> =
        direct.iter().flat_map(|other| reached_from(other, sources)).collect();
    rooms_from_the_roof()
        .into_iter()
        .filter(|other| direct.contains(other) && !implied.contains(other))
        .collect()
}

/// The first sentence of a room's `//!` lines.
fn purpose_of(room: &str, sources: &[Source]) -> String {
    let head = |source: &&Source| {
        source.path == Path::new(room).join("mod.rs")
            || source.path == Path::new(room).with_extension("rs")
    };
    let source = sources.iter().find(head).unwrap_or_else(|| panic!("no file opens `{room}`"));
    let paragraph: Vec<&str> = source
        .text
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let text = paragraph.join(" ");
    text.split_once(". ").map_or(text.trim_end_matches('.'), |(first, _)| first).to_string()
}

/// The arrows for GitHub to draw, and a table that a terminal shows as well.
fn picture() -> String {
    let sources = sources();
    let rooms = rooms_from_the_roof();
    let arrows = |room: &&str| {
        let used = arrows_of(room, &sources).join(" & ");
        (!used.is_empty()).then(|| format!("    {room} --> {used}\n"))
    };
    let drawn: String = rooms.iter().filter_map(arrows).collect();
    let row = |room: &str| {
        let imported = imports_of(room, &sources);
        let used: Vec<&str> = rooms_from_the_roof()
            .into_iter()
            .filter(|other| imported.contains(other) && is_ground(other) == is_ground(room))
            .collect();
        format!("| `{room}` | {} | {} |\n", purpose_of(room, &sources), used.join(" "))
    };
    let rows = |ground: bool| -> String {
        rooms.iter().filter(|room| is_ground(room) == ground).map(|room| row(room)).collect()
    };
    let head = "|---|---|---|\n";
    format!(
        "```mermaid\nflowchart TD\n{drawn}```\n\n\
         | room | purpose | uses, besides the ground |\n{head}{}\n\
         | ground | purpose | uses |\n{head}{}",
        rows(false),
        rows(true)
    )
}

/// Where src/README.md holds the picture.
const MARKERS: [&str; 2] =
    ["<!-- house: drawn by tests/fast/floors.rs -->\n", "<!-- end of house -->\n"];

#[test]
fn the_picture_of_the_house_is_that_of_its_imports() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/README.md");
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(MARKERS[0]).expect("the picture's first marker");
    let (_, after) = rest.split_once(MARKERS[1]).expect("the picture's last marker");
    let current = format!("{before}{}{}{}{after}", MARKERS[0], picture(), MARKERS[1]);
    if std::env::var_os("FM_DIST_DRAW").is_some() {
        fs::write(&path, &current).unwrap();
    } else {
        assert!(
            page == current,
            "rooms or their imports changed; draw the picture in {} anew: \
             FM_DIST_DRAW=1 cargo test --test tests the_picture_of_the_house",
            path.display()
        );
    }
}
