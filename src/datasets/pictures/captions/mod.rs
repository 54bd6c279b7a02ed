//! Captions: where they are found, and what is made of them.
//!
//! The first of these counts for a picture `sub/a.jpg`:
//!
//! 1. `--captions FILE`: a list of all captions (`lists.rs`), of which none is looked for elsewhere
//! 2. `sub/a.txt`: the whole text is one caption
//! 3. `sub/a.json`: a text, a list of texts, or an object with one of the fields [`FIELDS`]
//! 4. a list in a folder of the pictures: `metadata`, `captions` or `meta` with the ending
//!    `.jsonl`, `.json` or `.csv`, or `*_internvl.json`, in this order
//! 5. the name, `a`, with blanks for underscores
//!
//! A picture with several captions becomes several samples, as in diffusion-pipe: every caption is
//! trained on, and none is drawn.

mod beside;
mod lists;
mod rows;

use std::path::PathBuf;

pub(super) use beside::caption_beside;
pub(super) use lists::{Lists, is_list, rank_of_list};

use crate::rng::{Key, Purpose};

/// Fields and columns of captions, the first one that is there counts.
pub const FIELDS: [&str; 5] = ["caption", "captions", "text", "prompt", "internvl"];
/// Fields and columns of the names of pictures and videos.
pub const NAMES: [&str; 9] = [
    "file_name",
    "filename",
    "file",
    "path",
    "image",
    "image_path",
    "video",
    "video_path",
    "media",
];

/// Longest caption in bytes.
const MAX_CAPTION_BYTES: usize = 1 << 16;
/// Most captions of one picture.
const MAX_CAPTIONS: usize = 64;
/// Stands for the trigger word in captions.
const TRIGGER: &str = "[trigger]";
/// Separates tags.
const SEPARATOR: char = ',';

/// Options of captions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CaptionOptions {
    /// The list that has all captions; the folder's own lists and files are then not read.
    pub list: Option<PathBuf>,
    /// The field or column of captions, in place of [`FIELDS`].
    pub field: Option<String>,
    /// Text before every caption.
    pub prefix: String,
    /// A word that takes the place of each `[trigger]`; a caption without one, and without the word
    /// itself, begins with it.
    pub trigger: Option<String>,
    /// Tags, which commas separate, come in another order: one that depends on the caption and on
    /// the file's name alone.
    pub shuffle_tags: bool,
    /// First tags that keep their places.
    pub keep_tokens: usize,
}

impl CaptionOptions {
    /// Returns the text that is encoded for a caption of the file `name`.
    pub(super) fn treated(&self, caption: &str, name: &str) -> String {
        let mut text = caption.trim().to_string();
        if self.shuffle_tags {
            text = shuffled(&text, self.keep_tokens, name);
        }
        if let Some(trigger) = &self.trigger {
            text = triggered(&text, trigger);
        }
        self.prefix.clone() + &text
    }
}

fn triggered(text: &str, trigger: &str) -> String {
    if text.contains(TRIGGER) {
        return text.replace(TRIGGER, trigger);
    }
    match text {
        text if text.contains(trigger) => text.to_string(),
        "" => trigger.to_string(),
        text => format!("{trigger}, {text}"),
    }
}

/// Brings all tags but the first `kept` into an order that the caption and the name decide.
fn shuffled(caption: &str, kept: usize, name: &str) -> String {
    let tags: Vec<&str> =
        caption.split(SEPARATOR).map(str::trim).filter(|tag| !tag.is_empty()).collect();
    let (first, rest) = tags.split_at(kept.min(tags.len()));
    let key = Key::new(0, Purpose::Tags).named(&format!("{name}\n{caption}"));
    let order = key.permutation(rest.len() as u64);
    let moved = order.into_iter().map(|index| rest[index as usize]);
    first.iter().copied().chain(moved).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> CaptionOptions {
        CaptionOptions { trigger: Some("ohwx".into()), ..CaptionOptions::default() }
    }

    #[test]
    fn the_trigger_word_stands_once_or_where_it_is_asked_for() {
        let treated = |caption| options().treated(caption, "a.png");
        assert_eq!(treated("a cat"), "ohwx, a cat");
        assert_eq!(treated("photo of [trigger], by [trigger]"), "photo of ohwx, by ohwx");
        assert_eq!(treated("an ohwx cat"), "an ohwx cat");
        assert_eq!(treated(" "), "ohwx");
        let prefixed = CaptionOptions { prefix: "photo of ".into(), ..options() };
        assert_eq!(prefixed.treated(" a cat\n", "a.png"), "photo of ohwx, a cat");
    }

    #[test]
    fn tags_are_shuffled_by_content_and_the_first_ones_stay() {
        let options =
            CaptionOptions { shuffle_tags: true, keep_tokens: 2, ..CaptionOptions::default() };
        let tags = "1girl, solo, a, b, c, d, e, f, g, h";
        let treated = options.treated(tags, "a.png");
        assert_eq!(treated, options.treated(tags, "a.png"));
        assert_ne!(treated, options.treated(tags, "b.png"));
        assert!(treated.starts_with("1girl, solo, ") && treated != tags, "{treated}");
        let sorted = |text: &str| {
            let mut tags: Vec<String> = text.split(", ").map(String::from).collect();
            tags.sort();
            tags
        };
        assert_eq!(sorted(&treated), sorted(tags));
        assert_eq!(options.treated("one,two", "x"), "one, two");
        assert_eq!(options.treated("", "x"), "");
    }
}
