//! Pages say what is: their links lead somewhere, and what they list is what the code has.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser};
use fm_dist::cli::Cli;
use fm_dist::error::{BUG, Error, Place, STOPPED, Shortage, USAGE};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files below `folder`, without what is built, fetched or trained there.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    const LEFT_OUT: [&str; 5] = [".git", ".deps", ".gpu", "target", "runs"];
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            let name = entry.file_name();
            if !LEFT_OUT.iter().any(|left_out| name == *left_out) {
                files(&entry.path(), found);
            }
        } else {
            found.push(entry.path());
        }
    }
}

fn all_files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    files(root(), &mut found);
    found
}

/// Every Markdown page of the repository with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let pages: Vec<(PathBuf, String)> = all_files()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .map(|path| (path.clone(), read(path)))
        .collect();
    assert!(pages.len() >= 9, "the walk found {} pages", pages.len());
    pages
}

/// Lines that are not inside of a code block.
fn prose(page: &str) -> impl Iterator<Item = &str> {
    let mut in_code = false;
    page.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !in_code && !is_fence
    })
}

/// Lines of the code blocks of one language, without continuations.
fn code(page: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}");
    let mut is_wanted = false;
    let lines = page.lines().filter(|line| match line.trim_start().starts_with("```") {
        true => {
            is_wanted = !is_wanted && line.trim() == fence;
            false
        }
        false => is_wanted,
    });
    let text: Vec<&str> = lines.collect();
    text.join("\n").replace("\\\n", " ").lines().map(String::from).collect()
}

/// Targets of `[text](target)` and `<img src="target">`.
fn links(page: &str) -> Vec<&str> {
    let between = |line: &'_ str, open: &str, close: char| -> Vec<(usize, usize)> {
        let starts = line.match_indices(open).map(|(at, _)| at + open.len());
        starts.filter_map(|at| Some((at, at + line[at..].find(close)?))).collect()
    };
    let of_line = |line| {
        let found = [between(line, "](", ')'), between(line, "src=\"", '"')].concat();
        found.into_iter().map(move |(from, to)| &line[from..to]).collect::<Vec<&str>>()
    };
    prose(page).flat_map(of_line).collect()
}

/// The name that GitHub gives a heading: lower case, `-` for blanks, without punctuation.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || ['-', '_', ' '].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(page: &str) -> BTreeSet<String> {
    let headings = prose(page).filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#'))).collect()
}

/// The text between a heading and the next one of any level.
fn section<'p>(page: &'p str, heading: &str) -> &'p str {
    let start = page.find(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let text = &page[start + heading.len() + 5..];
    &text[..text.find("\n## ").unwrap_or(text.len())]
}

/// Cells of the tables of a text, without heads.
fn rows(text: &str) -> Vec<Vec<String>> {
    let cells =
        |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().into()).collect();
    let is_body = |window: &&[&str]| {
        window[1].starts_with('|') && window[0].starts_with('|') && !window[1].starts_with("|--")
    };
    let lines: Vec<&str> = text.lines().collect();
    lines.windows(2).filter(is_body).map(|window| cells(window[1])).collect()
}

/// What stands between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(String::from).collect()
}

#[test]
fn every_link_of_every_page_leads_to_a_file_and_a_heading() {
    let (mut wrong, mut links_seen) = (Vec::new(), 0);
    for (path, text) in pages() {
        for link in links(&text).into_iter().filter(|link| !link.contains("://")) {
            links_seen += 1;
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = path.parent().unwrap().join(file);
            let target = if file.is_empty() { path.clone() } else { target };
            let leads = target.exists()
                && (heading.is_empty() || anchors(&read(&target)).contains(heading));
            if !leads {
                wrong.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(links_seen > 50, "{links_seen} links were found");
    assert!(wrong.is_empty(), "these lead nowhere:\n{}", wrong.join("\n"));
}

#[test]
fn a_link_into_nothing_and_a_heading_that_is_not_there_are_found() {
    let page =
        "# A house\n[a](b.md#c-d) ![e](f.png) `[no](link)`\n```\n[g](h)\n```\n## C, d: `E`!\n";
    assert_eq!(links(page)[..2], ["b.md#c-d", "f.png"]);
    assert_eq!(anchors(page), BTreeSet::from(["a-house".into(), "c-d-e".into()]));
}

/// The command lines of the program in a page's shell blocks, from the program's name on.
fn command_lines(page: &str) -> Vec<Vec<String>> {
    let words = |line: String| -> Vec<String> {
        let line = line.split(" #").next().unwrap();
        line.split_whitespace().map(|word| word.trim_matches('\'').to_string()).collect()
    };
    let from_program = |words: Vec<String>| {
        let start = words.iter().position(|word| word.trim_start_matches('(') == "fm-dist")?;
        let of_program = words[start..].iter().take_while(|word| *word != "&");
        Some(of_program.cloned().collect())
    };
    code(page, "sh").into_iter().map(words).filter_map(from_program).collect()
}

#[test]
fn every_command_line_on_a_page_is_one_that_the_program_takes() {
    let mut seen = 0;
    for (path, text) in pages() {
        for words in command_lines(&text) {
            seen += 1;
            if let Err(error) = Cli::try_parse_from(&words) {
                panic!("{}: {words:?}\n{error}", path.display());
            }
        }
    }
    assert!(seen > 15, "{seen} command lines were found");
}

#[test]
fn every_command_has_its_row_in_the_readme() {
    let page = read("README.md");
    let told: BTreeSet<String> =
        rows(section(&page, "Quick start")).iter().flat_map(|row| quoted(&row[0])).collect();
    let commands: BTreeSet<String> = Cli::command()
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .map(|command| command.get_name().into())
        .collect();
    assert_eq!(told, commands);
}

/// One error of each kind; the match below does not compile until a new kind is added here.
fn one_of_each_error() -> Vec<Error> {
    let what = String::new;
    let errors = vec![
        Error::config("", ""),
        Error::data("", ""),
        Error::storage("", "")(std::io::ErrorKind::StorageFull.into()),
        Error::checkpoint_mismatch("", ""),
        Error::NoCheckpoint { path: "".into(), what: what() },
        Error::NoProgress { path: "".into(), what: what() },
        Error::Collective { backend: "", operation: "", what: what() },
        Error::Desync { what: what() },
        Error::NotFinite { step: 0, what: what() },
        Error::Stopped { what: what() },
        Error::Device { what: what() },
        Error::OutOfMemory { what: what(), shortage: Shortage::of(Place::Host) },
        Error::environment(""),
    ];
    for error in &errors {
        match error {
            Error::Config { .. }
            | Error::Data { .. }
            | Error::Storage { .. }
            | Error::CheckpointMismatch { .. }
            | Error::NoCheckpoint { .. }
            | Error::NoProgress { .. }
            | Error::Collective { .. }
            | Error::Desync { .. }
            | Error::NotFinite { .. }
            | Error::Stopped { .. }
            | Error::Device { .. }
            | Error::OutOfMemory { .. }
            | Error::Environment { .. } => (),
            // It has the code and the name of its cause.
            Error::Peer { .. } => unreachable!("it stands for another rank's error"),
        }
    }
    errors
}

#[test]
fn the_operators_table_has_every_exit_code_with_its_name() {
    let page = read("launch/README.md");
    let told: BTreeSet<(String, String)> = rows(section(&page, "Exit codes"))
        .into_iter()
        .map(|row| (row[0].clone(), row[1].clone()))
        .collect();
    let row = |code: i32, name: &str| (code.to_string(), name.to_string());
    let errors = one_of_each_error();
    let mut expected: BTreeSet<(String, String)> =
        errors.iter().map(|error| row(error.exit_code(), error.name())).collect();
    assert!(expected.contains(&row(STOPPED, "STOPPED")), "{expected:?}");
    // The watchdog's verdict, and ends that are no `Error`.
    expected.extend([row(21, "HANG"), row(BUG, "BUG"), row(USAGE, ""), row(0, ""), row(130, "")]);
    expected.insert(("128 + n".into(), String::new()));
    assert_eq!(told, expected);
}

#[test]
fn the_table_of_metrics_has_every_key_of_a_step() {
    let page = read("configs/README.md");
    let told: BTreeSet<String> =
        rows(section(&page, "Metrics")).iter().flat_map(|row| quoted(&row[0])).collect();
    let source = read("src/train/metrics.rs");
    let (_, rest) = source.split_once("pub struct StepMetrics {").expect("the struct of a line");
    let fields = rest.split_once("\n}").unwrap().0.lines().map(str::trim);
    let keys: BTreeSet<String> = fields
        .filter(|line| !line.starts_with("//"))
        .filter_map(|line| Some(line.split_once(':')?.0.trim_start_matches("pub ").into()))
        .collect();
    assert_eq!(told, keys);
}

#[test]
fn the_table_of_the_configuration_has_every_table_of_the_listing() {
    let page = read("configs/README.md");
    let told: BTreeSet<String> = rows(section(&page, "Configuration"))
        .iter()
        .flat_map(|row| quoted(&row[0]))
        .map(|table| table.trim_matches(['[', ']', '…', '.']).to_string())
        .collect();
    let tables: BTreeSet<String> = read("tests/golden/config.toml")
        .lines()
        .filter_map(|line| line.strip_prefix('[')?.split(['.', ']']).next().map(String::from))
        .collect();
    assert_eq!(told, tables);
}

#[test]
fn every_proof_names_a_file_that_is_there() {
    let page = read("tests/README.md");
    let there: BTreeSet<String> = all_files()
        .iter()
        .filter(|path| ["tests", "launch"].iter().any(|top| path.starts_with(root().join(top))))
        .flat_map(|path| [path.file_name().unwrap(), path.file_stem().unwrap()])
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    let proofs = rows(section(&page, "What proves what"));
    assert!(proofs.len() > 20, "{proofs:?}");
    for row in proofs {
        let files = quoted(row.last().unwrap());
        let files: Vec<&String> = files.iter().filter(|file| !file.contains('/')).collect();
        let missing: Vec<&&String> = files.iter().filter(|file| !there.contains(**file)).collect();
        assert!(!files.is_empty() && missing.is_empty(), "{}: no file {missing:?}", row[0]);
    }
}

#[test]
fn the_ways_through_the_house_name_functions_of_the_files_that_they_link() {
    let page = read("src/README.md");
    let mut named = 0;
    for way in ["The way of a batch", "The way of a gradient"] {
        // A number begins each line of the way; what follows it is indented.
        let steps = section(&page, way).replace("\n   ", " ");
        for step in steps.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit())) {
            let function = quoted(step).swap_remove(0);
            let Some(file) = links(step).into_iter().next() else { continue };
            let is_there = read(Path::new("src").join(file)).contains(&format!("fn {function}"));
            assert!(is_there, "{way}: {file} has no function `{function}`");
            named += 1;
        }
    }
    assert!(named > 12, "{named} functions were found");
}
