//! A folder whose pictures are the frames of one video.

use std::fs;
use std::path::{Path, PathBuf};

use super::choice::chosen;
use crate::error::{Error, Result};
use crate::media::fit::{Fit, Size};
use crate::media::picture::Picture;
use crate::media::read::{Limits, is_picture};

/// Returns the pictures of a folder in the order of their names, with numbers in their own order;
/// folders inside of it and hidden files are left out.
///
/// # Errors
/// [`Error::Data`] if there are none; [`Error::Storage`].
pub(super) fn frames_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = listed.map_err(Error::storage(folder, "list"))?;
    let is_hidden =
        |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
    let mut frames: Vec<PathBuf> = entries
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| is_picture(path) && !is_hidden(path))
        .collect();
    frames
        .sort_by_cached_key(|path| pieces(&path.file_name().unwrap_or_default().to_string_lossy()));
    if frames.is_empty() {
        return Err(Error::data(folder, "holds no picture that could be a frame"));
    }
    Ok(frames)
}

/// Cuts a name into texts and numbers, each with the letters that it is written with.
fn pieces(name: &str) -> Vec<(u128, String)> {
    let mut pieces: Vec<(bool, String)> = Vec::new();
    for letter in name.chars() {
        let is_digit = letter.is_ascii_digit();
        match pieces.last_mut() {
            Some((kind, piece)) if *kind == is_digit => piece.push(letter),
            _ => pieces.push((is_digit, letter.into())),
        }
    }
    let number = |(is_digit, piece): (bool, String)| match is_digit {
        true => (piece.parse().unwrap_or(u128::MAX), piece),
        false => (0, piece),
    };
    pieces.into_iter().map(number).collect()
}

/// Reads `count` of the frames, chosen evenly.
pub(super) fn read(
    frames: &[PathBuf],
    size: Size,
    count: usize,
    fit: Fit,
    limits: &Limits,
) -> Result<Vec<Picture>> {
    let read = |index: usize| {
        let path = &frames[index];
        let frame = Picture::read(path, limits)?;
        if frame.size() != size {
            let what = format!("has {} pixels, and the first frame has {size}", frame.size());
            return Err(Error::data(path, what));
        }
        Ok(frame.fitted(fit))
    };
    chosen(frames.len(), count).into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_in_the_order_of_their_numbers() {
        let mut names = ["f10.png", "f2.png", "f1.png", "g1.png", "f02.png", "f.png"];
        names.sort_by_cached_key(|name| pieces(name));
        assert_eq!(names, ["f1.png", "f02.png", "f2.png", "f10.png", "f.png", "g1.png"]);
    }
}
