//! Parses the values of arguments.

use std::time::Instant;

use crate::datasets::pictures::Ratios;
use crate::media::Size;
use crate::model::Dtype;
use crate::run::lora::AddedLora;
use crate::settings::Choice;

/// Sizes of axes; a type of its own, because clap takes a bare `Vec` for a repeated argument.
#[derive(Clone, Debug)]
pub struct Shape(pub Vec<i64>);

pub fn parse_shape(text: &str) -> Result<Shape, String> {
    let sizes: Option<Vec<i64>> =
        text.split(',').map(|size| size.trim().parse().ok().filter(|&size| size > 0)).collect();
    let fits = sizes.filter(|sizes| matches!(sizes.len(), 3 | 4));
    fits.map(Shape).ok_or_else(|| "expected C,H,W or C,F,H,W, each at least 1".into())
}

pub fn parse_scale(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|scale| (0.0..=100.0).contains(scale))
        .ok_or_else(|| "expected a number from 0 to 100".into())
}

/// Width and height, as in `1024x768`.
pub fn parse_size(text: &str) -> Result<Size, String> {
    let side = |text: &str| text.trim().parse::<u32>().ok().filter(|side| *side > 0);
    let sides = text.split_once(['x', 'X']);
    let size = sides.and_then(|(width, height)| Some(Size::new(side(width)?, side(height)?)));
    size.ok_or_else(|| "expected width and height in pixels, as in 1024x768".into())
}

/// Ratios between two in equal factors, as in `0.5:2:7`.
pub fn parse_ratios(text: &str) -> Result<Ratios, String> {
    let parts: Vec<&str> = text.split(':').map(str::trim).collect();
    let ratios = || match parts.as_slice() {
        [least, most, count] => Some(Ratios::Geometric {
            least: least.parse().ok()?,
            most: most.parse().ok()?,
            count: count.parse().ok()?,
        }),
        _ => None,
    };
    ratios().ok_or_else(|| "expected two ratios and a number of them, as in 0.5:2:7".into())
}

pub fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a share from 0 to 1".into())
}

/// A file, and the strength behind its last colon, if that is a number: a name may have colons.
pub fn parse_lora(text: &str) -> Result<AddedLora, String> {
    let number = |(file, scale): (&str, &str)| Some((file.to_string(), scale.parse().ok()?));
    let (file, scale) = text.rsplit_once(':').and_then(number).unwrap_or((text.into(), 1.0));
    match (-100.0..=100.0).contains(&scale) {
        true => Ok(AddedLora { file: file.into(), scale }),
        false => Err("expected a strength from -100 to 100 behind the colon".into()),
    }
}

/// Numbers of ranks, ascending.
#[derive(Clone, Debug)]
pub struct WorldSizes(pub Vec<usize>);

pub fn parse_world(text: &str) -> Result<WorldSizes, String> {
    let ranks = |text: &str| text.parse::<usize>().ok().filter(|&ranks| ranks > 0);
    let Some((from, to)) = text.split_once("..") else {
        return ranks(text)
            .map(|ranks| WorldSizes(vec![ranks]))
            .ok_or_else(|| "expected a number of ranks, at least 1".into());
    };
    let ends = ranks(from)
        .zip(ranks(to))
        .filter(|(from, to)| from.is_power_of_two() && to.is_power_of_two() && from <= to);
    let (from, to) =
        ends.ok_or("expected two powers of two, the smaller one first, as in 8..4096")?;
    Ok(WorldSizes((from.ilog2()..=to.ilog2()).map(|power| 1 << power).collect()))
}

/// Returns the moment after this duration from now.
pub fn parse_moment(text: &str) -> Result<Instant, String> {
    let time = humantime::parse_duration(text)
        .map_err(|error| format!("{error}; expected a time like 55m or 1h 30m"))?;
    Instant::now().checked_add(time).ok_or_else(|| {
        "expected a time that a clock can count to; without it a run ends by itself".into()
    })
}

pub fn parse_dtype(text: &str) -> Result<Dtype, String> {
    let known = Dtype::ALL.iter().find(|(word, _)| *word == text);
    known.map(|(_, dtype)| *dtype).ok_or_else(|| "expected float32 or bfloat16".into())
}

/// Returns the value of a word.
pub fn parse_word<T: Choice>(text: &str) -> Result<T, String> {
    let known = T::ALL.iter().find(|(word, _)| *word == text);
    let words: Vec<&str> = T::ALL.iter().map(|(word, _)| *word).collect();
    known.map(|(_, value)| *value).ok_or_else(|| format!("expected one of {}", words.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strength_stands_behind_the_last_colon_of_a_file() {
        for (text, file, scale) in [
            ("a.safetensors", "a.safetensors", 1.0),
            ("a.safetensors:0.5", "a.safetensors", 0.5),
            ("C:/a.safetensors", "C:/a.safetensors", 1.0),
            ("a:b:-2", "a:b", -2.0),
        ] {
            assert_eq!(parse_lora(text), Ok(AddedLora { file: file.into(), scale }));
        }
        assert!(parse_lora("a:101").is_err() && parse_lora("a:nan").is_err());
    }
}
