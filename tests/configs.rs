//! Every file in configs/ is valid, and what the program prints is the documented listing.

use std::fs;
use std::path::{Path, PathBuf};

use fm_dist::config::{DEFAULT, DEFAULT_NAME, RunConfig};

use crate::runs::{finish, program};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

#[test]
fn every_shipped_configuration_is_valid_and_opens_with_its_launch_line() {
    let entries = fs::read_dir(root().join("configs")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|extension| extension == "toml")).collect();
    assert!(!files.is_empty());
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        RunConfig::read(&file.display().to_string(), &text, &[]).unwrap();
        let head: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        for word in ["Reaches:", "Takes:", "Launch: mpirun"] {
            assert!(head.iter().any(|line| line.contains(word)), "{} opens without {word:?}", file.display());
        }
    }
}

#[test]
fn the_printed_configuration_is_the_documented_one() {
    let golden = root().join("tests/golden/config.toml");
    let (code, printed, errors) = finish(program(&["config"]));
    assert_eq!(code, 0, "{errors}");
    let documented = fs::read_to_string(&golden).unwrap_or_default();
    assert!(printed == documented, "the listing changed; if it should, write it anew: fm-dist config > {}", golden.display());
}

#[test]
fn the_printed_configuration_reads_back_as_itself() {
    let config = RunConfig::read(DEFAULT_NAME, DEFAULT, &[]).unwrap();
    assert_eq!(RunConfig::read("printed", &config.to_toml(), &[]).unwrap(), config);
}
