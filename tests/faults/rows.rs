//! No row of the matrix and no exit code goes untested.

use std::fs;
use std::path::{Path, PathBuf};

/// Rows by letter: how many each has.
const ROWS: [(char, usize); 6] = [('a', 12), ('b', 13), ('c', 17), ('d', 18), ('e', 12), ('f', 5)];

/// What a process may end with besides 0, see launch/README.md; 137 for all that end by a signal. A
/// rank never ends with a code that says that another failed: it takes over that one's.
const CODES: [i32; 18] = [2, 10, 21, 22, 23, 30, 40, 41, 42, 43, 44, 50, 51, 52, 53, 70, 130, 137];

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, found),
            false => found.push(path),
        }
    }
}

/// Names of tests in src/, tests/ and of the long ones in launch/soak.sh.
fn names() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    ["src", "tests"].iter().for_each(|folder| files(&root.join(folder), &mut found));
    found.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    found.push(root.join("launch/soak.sh"));
    let mut names = Vec::new();
    for path in found {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(str::trim_start);
        let of_line = |line: &str| Some(line.strip_prefix("fn ")?.split('(').next()?.to_string());
        names.extend(lines.clone().filter_map(of_line));
        // In a shell script: `case_d2_… () {`.
        names.extend(lines.filter_map(|line| {
            Some(line.strip_prefix("case_")?.split('(').next()?.trim().to_string())
        }));
    }
    names
}

#[test]
fn every_row_stands_in_the_name_of_a_test() {
    let names = names();
    let stands = |row: &str| {
        names
            .iter()
            .any(|name| name.split('_').take_while(|word| is_row(word)).any(|word| word == row))
    };
    let missing: Vec<String> = ROWS
        .iter()
        .flat_map(|(letter, count)| (1..=*count).map(move |number| format!("{letter}{number}")))
        .filter(|row| !stands(row))
        .collect();
    assert!(missing.is_empty(), "no test is named after {missing:?}");
}

fn is_row(word: &str) -> bool {
    let mut letters = word.chars();
    letters.next().is_some_and(|letter| letter.is_ascii_lowercase())
        && !letters.as_str().is_empty()
        && letters.all(|c| c.is_ascii_digit())
}

/// Tests in tests/ with their texts, from the name to the next test.
fn bodies() -> Vec<(String, String)> {
    let mut found = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), &mut found);
    let texts = found
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| fs::read_to_string(path).unwrap());
    let tests =
        |text: String| text.split("#[test]\n").skip(1).map(String::from).collect::<Vec<_>>();
    texts
        .flat_map(tests)
        .filter_map(|test| {
            Some((test.strip_prefix("fn ")?.split('(').next()?.into(), test.clone()))
        })
        .collect()
}

#[test]
fn every_exit_code_stands_in_the_name_of_a_test_that_expects_it() {
    let bodies = bodies();
    let expected = |code: i32| {
        let forms = ["code: ", "(code, ", "exit_code(), ", "assert_eq!(code, "]
            .map(|form| format!("{form}{code}"));
        let named = |name: &str| format!("{name}_").contains(&format!("_code_{code}_"));
        bodies
            .iter()
            .any(|(name, body)| named(name) && forms.iter().any(|form| body.contains(form)))
    };
    let missing: Vec<i32> = CODES.into_iter().filter(|code| !expected(*code)).collect();
    assert!(missing.is_empty(), "no test is named after {missing:?} and expects it");
}
