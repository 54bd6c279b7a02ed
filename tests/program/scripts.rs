//! The scripts of launch/ that need a GPU are held true where there is none: they parse, their
//! parts are the documented ones within their time, and the pack for another PyTorch fits the code.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Exit code, and both outputs, of a script.
fn run(script: &str, arguments: &[&str]) -> (i32, String) {
    let output = Command::new("bash").arg(root().join(script)).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8(text).unwrap())
}

/// Files below a folder that end so.
fn files(folder: &Path, end: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, end, found),
            false => found.extend(path.to_str().unwrap().ends_with(end).then_some(path)),
        }
    }
}

#[test]
fn every_script_parses() {
    let mut scripts = Vec::new();
    for folder in ["launch", "tests/bench"] {
        files(&root().join(folder), ".sh", &mut scripts);
    }
    assert!(scripts.len() > 10, "{scripts:?}");
    for script in scripts {
        let output = Command::new("bash").arg("-n").arg(&script).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}: {told}", script.display());
    }
}

#[test]
fn the_code_moves_to_the_pytorch_that_the_pack_is_made_for() {
    let (code, told) = run("launch/pack-gpu.sh", &["--check"]);
    assert_eq!((code, told.as_str()), (0, "the code moves to PyTorch 2.11.0\n"));
    let (code, told) = run("launch/pack-gpu.sh", &["--check", "2.5.0"]);
    assert!(code == 52 && told.contains("PyTorch 2.5.0 is not known here"), "{code}: {told}");
}

/// Seconds of each part, as `launch/test-gpu.sh --list` tells them.
fn limits() -> Vec<(String, u64)> {
    let (code, told) = run("launch/test-gpu.sh", &["--list"]);
    assert_eq!(code, 0, "{told}");
    let part = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_string(), words.next()?.parse().ok()?))
    };
    told.lines().filter(|line| !line.starts_with(' ')).filter_map(part).collect()
}

#[test]
fn the_parts_of_the_gpu_test_are_those_of_its_page_and_within_their_minutes() {
    let limits = limits();
    let page = fs::read_to_string(root().join("tests/README.md")).unwrap();
    let (_, section) = page.split_once("\n## On a GPU\n").expect("the section of the parts");
    let rows = section.lines().take_while(|line| !line.starts_with("## ")).filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| `")?.split('|').map(str::trim).collect();
        Some((cells[0].trim_end_matches('`').to_string(), cells[1].parse().ok()?))
    });
    assert_eq!(rows.collect::<Vec<(String, u64)>>(), limits);
    let seconds = |parts: &[(String, u64)]| parts.iter().map(|(_, limit)| limit).sum::<u64>();
    assert!(seconds(&limits[..4]) <= 5 * 60 && seconds(&limits) <= 25 * 60, "{limits:?}");
}

#[test]
fn a_part_that_is_not_there_is_refused_by_the_names_of_those_that_are() {
    let (code, told) = run("launch/test-gpu.sh", &["memory"]);
    assert_eq!(code, 52, "{told}");
    assert!(told.contains("of attention tests families parity"), "{told}");
}

/// `launch/test-gpu.sh` runs the tests of one tier.
#[test]
fn every_test_that_needs_a_gpu_lies_in_the_tier_that_the_script_runs() {
    let mut sources = Vec::new();
    for folder in ["src", "tests"] {
        files(&root().join(folder), ".rs", &mut sources);
    }
    let mut found = BTreeMap::new();
    for path in sources {
        let text = fs::read_to_string(&path).unwrap();
        let count = text.matches("#[ignore = \"needs a CUDA device\"]").count();
        if count > 0 {
            found.insert(path.strip_prefix(root()).unwrap().to_str().unwrap().to_string(), count);
        }
    }
    // This file names the mark as well.
    found.remove("tests/program/scripts.rs");
    assert!(found.contains_key("tests/cuda.rs"), "{found:?}");
    let elsewhere: Vec<_> = found.keys().filter(|path| !path.starts_with("tests/cuda")).collect();
    assert!(elsewhere.is_empty(), "launch/test-gpu.sh does not run these: {elsewhere:?}");
}
