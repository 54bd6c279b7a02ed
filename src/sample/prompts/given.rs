//! Prompts as they are given.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Largest file of prompts that is read, and most prompts in it.
const MOST_BYTES: u64 = 16 << 20;
const MOST_PROMPTS: usize = 100_000;
/// Longest side of a picture in pixels, and most frames of a video.
const MOST_PIXELS: i64 = 1 << 16;

/// A prompt, with what is said of its samples alone.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    pub prompt: String,
    /// The prompt from which guidance leads away.
    pub negative: Option<String>,
    /// The seed of its first sample; the next ones follow.
    pub seed: Option<u64>,
    pub size: Option<SampleSize>,
}

/// SampleSize in pixels, `WIDTHxHEIGHT`, or for videos `WIDTHxHEIGHTxFRAMES`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(try_from = "String")]
pub struct SampleSize {
    pub width: i64,
    pub height: i64,
    pub frames: Option<i64>,
}

impl Prompt {
    pub fn new(prompt: &str) -> Self {
        Prompt { prompt: prompt.into(), ..Prompt::default() }
    }
}

impl SampleSize {
    /// Takes a width, a height and, for videos, a number of frames; `None` if these are other
    /// numbers of numbers, or one is out of range.
    pub fn of(numbers: &[i64]) -> Option<Self> {
        let (width, height, frames) = match *numbers {
            [width, height] => (width, height, None),
            [width, height, frames] => (width, height, Some(frames)),
            _ => return None,
        };
        let is_sound = numbers.iter().all(|number| (1..=MOST_PIXELS).contains(number));
        is_sound.then_some(SampleSize { width, height, frames })
    }

    /// Returns the shape of the pixels, `[3, (F,) H, W]`.
    pub fn pixels(self) -> Vec<i64> {
        [Some(3), self.frames, Some(self.height), Some(self.width)].into_iter().flatten().collect()
    }
}

impl FromStr for SampleSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers: Option<Vec<i64>> =
            text.split(['x', 'X', '×']).map(|number| number.trim().parse().ok()).collect();
        numbers.and_then(|numbers| SampleSize::of(&numbers)).ok_or_else(|| {
            format!("expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, each from 1 to {MOST_PIXELS}")
        })
    }
}

impl TryFrom<String> for SampleSize {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// Reads a file of prompts: one a line; in a file that ends in `.jsonl`, a line is an object with
/// `prompt` and, where they are other than those of the command, `negative`, `seed` and `size`.
/// Blank lines are skipped.
///
/// # Errors
/// [`Error::Data`] naming the file, the line and what was expected.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let refused = |what: String| Error::data(path, what);
    let text = text_of(path)?;
    let is_json = path.extension().is_some_and(|ending| ending == "jsonl");
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompt = |(number, line): (usize, &str)| {
        match is_json {
        false => Ok(Prompt::new(line.trim())),
        true => serde_json::from_str(line).map_err(|error| {
            refused(format!(
                "line {}: {error}; expected an object with `prompt`, and perhaps `negative`, `seed` \
                 and `size`",
                number + 1
            ))
        }),
    }
    };
    let prompts = lines.take(MOST_PROMPTS + 1).map(prompt).collect::<Result<Vec<_>>>()?;
    match prompts.len() {
        0 => Err(refused("holds no prompt; expected one a line".into())),
        count if count > MOST_PROMPTS => {
            Err(refused(format!("holds more than {MOST_PROMPTS} prompts")))
        }
        _ => Ok(prompts),
    }
}

fn text_of(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes))
        .map_err(Error::storage(path, "read"))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(Error::data(path, format!("is larger than {} MiB", MOST_BYTES >> 20)));
    }
    let text = String::from_utf8(bytes);
    let text = text.map_err(|_| Error::data(path, "is not UTF-8; expected lines of text"))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(name: &str, text: &[u8]) -> std::result::Result<Vec<Prompt>, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(name);
        fs::write(&path, text).expect("a new file");
        read_prompts(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_has_a_prompt_a_line() {
        let found = read("a.txt", "\u{feff}a cat\r\n\n  {\"prompt\": 1}\n".as_bytes());
        assert_eq!(found, Ok(vec![Prompt::new("a cat"), Prompt::new("{\"prompt\": 1}")]));
        let lines = b"{\"prompt\": \"\"}\n{\"prompt\": \"b\", \"negative\": \"c\", \"seed\": 7, \"size\": \"64x32x5\"}";
        let second = Prompt {
            prompt: "b".into(),
            negative: Some("c".into()),
            seed: Some(7),
            size: Some(SampleSize { width: 64, height: 32, frames: Some(5) }),
        };
        assert_eq!(read("a.jsonl", lines), Ok(vec![Prompt::new(""), second]));
    }

    #[test]
    fn a_file_that_holds_something_else_is_told_by_its_line() {
        for (name, text, what) in [
            ("a.txt", &b"\n \n"[..], "holds no prompt"),
            ("a.txt", b"\xff\xfe", "is not UTF-8"),
            ("a.jsonl", b"{\"prompt\": \"a\"}\na cat", "line 2: expected value"),
            ("a.jsonl", b"{\"text\": \"a\"}", "line 1: unknown field `text`"),
            ("a.jsonl", b"{\"prompt\": \"a\", \"seed\": -1}", "line 1: invalid value"),
            (
                "a.jsonl",
                b"{\"prompt\": \"a\", \"size\": \"64\"}",
                "line 1: expected WIDTHxHEIGHT or",
            ),
        ] {
            let error = read(name, text).expect_err(name);
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn a_size_is_a_width_a_height_and_perhaps_frames() {
        let pixels = |text: &str| text.parse::<SampleSize>().map(SampleSize::pixels);
        assert_eq!(pixels("64x32"), Ok(vec![3, 32, 64]));
        assert_eq!(pixels("64X32x5"), Ok(vec![3, 5, 32, 64]));
        for text in
            ["64", "0x64", "64x-1", "1x2x3x4", "64xa", "65537x1", "", "99999999999999999999x1"]
        {
            assert!(pixels(text).is_err(), "{text}");
        }
    }
}
