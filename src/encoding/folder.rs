//! The folder of a published pipeline.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A pipeline's folder in which every part that its family needs is a folder.
#[derive(Debug)]
pub struct Folder {
    /// Empty if the family needs no folder.
    path: PathBuf,
}

impl Folder {
    /// # Errors
    /// [`Error::Config`] if a folder is needed and there is none; [`Error::Data`] naming every part
    /// that is missing.
    pub(super) fn new(path: Option<&Path>, family: &str, parts: &[&str]) -> Result<Self> {
        let Some(path) = path.filter(|_| !parts.is_empty()) else {
            return match parts {
                [] => Ok(Folder { path: PathBuf::new() }),
                _ => {
                    let parts = parts.join("/, ");
                    let what = format!(
                        "is not given; {family} needs the folder of a published pipeline, with {parts}/"
                    );
                    Err(Error::config("--pipeline", what))
                }
            };
        };
        let folder = Folder { path: path.into() };
        let missing: Vec<&str> = parts.iter().copied().filter(|part| !folder.has(part)).collect();
        if missing.is_empty() {
            return Ok(folder);
        }
        let what = format!(
            "lacks {}/, which a pipeline of {family} has; it needs {}/",
            missing.join("/, "),
            parts.join("/, ")
        );
        Err(Error::data(path, what))
    }

    pub fn has(&self, part: &str) -> bool {
        self.path.join(part).is_dir()
    }

    pub fn part(&self, part: &str) -> PathBuf {
        self.path.join(part)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_missing_part_is_told_at_once() {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir(root.path().join("vae")).expect("a new one");
        let parts = ["vae", "text_encoder", "tokenizer"];
        let open = |path: Option<&Path>, parts: &[&str]| {
            Folder::new(path, "flux", parts).map_err(|error| error.to_string())
        };
        let error = open(Some(root.path()), &parts).expect_err("two are missing");
        let what = "lacks text_encoder/, tokenizer/, which a pipeline of flux has; it needs vae/, text_encoder/, tokenizer/";
        assert!(error.ends_with(what), "{error}");
        assert!(open(None, &parts).expect_err("no folder").contains("--pipeline: is not given"));
        assert!(open(Some(root.path()), &["vae"]).expect("complete").has("vae"));
        assert!(open(None, &[]).is_ok(), "dit needs none");
    }
}
