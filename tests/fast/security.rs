//! SECURITY.md promises nothing that no test shows.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false => found.push(path),
        }
    }
}

/// Every function that follows a line `#[test]`.
fn tests() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    ["src", "tests"].iter().for_each(|folder| sources(&root.join(folder), &mut found));
    let mut names = Vec::new();
    for path in
        found.iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
    {
        let text = fs::read_to_string(path).unwrap();
        let after = text
            .split("#[test]")
            .skip(1)
            .filter_map(|rest| rest.split_once("fn ")?.1.split('(').next());
        names.extend(after.map(String::from));
    }
    names
}

#[test]
fn every_promise_names_tests_that_exist() {
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("SECURITY.md")).unwrap();
    let tests = tests();
    let rows = page
        .split("## Not trusted")
        .nth(1)
        .unwrap()
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1);
    let mut promises = 0;
    for row in rows {
        let [_, promise, shown, _] = row.split('|').collect::<Vec<_>>()[..] else {
            panic!("a promise and its tests: {row}")
        };
        let named: Vec<&str> = shown.split('`').skip(1).step_by(2).collect();
        let missing: Vec<&&str> =
            named.iter().filter(|name| !tests.iter().any(|test| test == **name)).collect();
        assert!(!named.is_empty() && missing.is_empty(), "no test {missing:?} shows that{promise}");
        promises += 1;
    }
    assert!(promises > 5, "the table is somewhere else");
}
