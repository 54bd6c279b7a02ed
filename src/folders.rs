//! The user's folders that programs share.

use std::path::PathBuf;

/// Returns the folder for what programs keep between runs and can lose: `XDG_CACHE_HOME`, or
/// `.cache` in the home folder. `None` where neither is an absolute path.
pub fn cache() -> Option<PathBuf> {
    cache_among(variable)
}

/// Returns the folder into which Hugging Face's tools download models by name: `HF_HUB_CACHE`,
/// `hub` in `HF_HOME`, or `huggingface/hub` in [`cache`].
pub fn downloads() -> Option<PathBuf> {
    downloads_among(variable)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn absolute(path: Option<String>) -> Option<PathBuf> {
    path.map(PathBuf::from).filter(|path| path.is_absolute())
}

fn cache_among(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let home = || Some(absolute(variable("HOME"))?.join(".cache"));
    absolute(variable("XDG_CACHE_HOME")).or_else(home)
}

fn downloads_among(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let home = || Some(absolute(variable("HF_HOME"))?.join("hub"));
    let cache = || Some(cache_among(&variable)?.join("huggingface/hub"));
    absolute(variable("HF_HUB_CACHE")).or_else(home).or_else(cache)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn among(set: &[(&str, &str)]) -> [Option<String>; 2] {
        let variable = |name: &str| {
            let found = set.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string())
        };
        let text = |path: Option<PathBuf>| path.map(|path| path.display().to_string());
        [text(cache_among(variable)), text(downloads_among(variable))]
    }

    #[test]
    fn the_nearest_variable_names_the_folder() {
        for (set, cache, downloads) in [
            (&[("HOME", "/home/a")][..], "/home/a/.cache", "/home/a/.cache/huggingface/hub"),
            (&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/c")], "/c", "/c/huggingface/hub"),
            (
                &[("HOME", "/home/a"), ("XDG_CACHE_HOME", "c")],
                "/home/a/.cache",
                "/home/a/.cache/huggingface/hub",
            ),
            (&[("HOME", "/home/a"), ("HF_HOME", "/models")], "/home/a/.cache", "/models/hub"),
            (&[("HOME", "/a"), ("HF_HOME", "/m"), ("HF_HUB_CACHE", "/hub")], "/a/.cache", "/hub"),
        ] {
            assert_eq!(among(set), [cache, downloads].map(|path| Some(path.to_string())));
        }
        assert_eq!(among(&[("HOME", "")]), [None, None]);
    }
}
