//! Resizing by convolution in Pillow's arithmetic, and so to its bits.
//!
//! Weights are whole numbers with 22 bits after the point, and sums are rounded to 8 bits after one
//! axis and again after the other. Columns go first where they lose more than twice as many pixels
//! as rows do. Crates that resize have other weights, which a picture shows as one or two steps of
//! 255.
//!
//! Source: Pillow 13.0.0, whose pictures the tests hold this to.

use std::f64::consts::PI;

use super::fit::Size;

/// Bits after the point of a weight and of a sum.
const BITS: u32 = 22;
const ONE: f64 = (1 << BITS) as f64;
const HALF: i32 = 1 << (BITS - 1);

/// Weights of the pixels around a place. Their window grows where a picture shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// Pillow's LANCZOS, which the reference resizes pictures with.
    Lanczos,
    /// Pillow's BILINEAR: it does not ring, so that no mask gets ripples beside its edges.
    Bilinear,
}

impl Filter {
    /// Returns the distance in pixels from which on a weight is zero.
    fn reach(self) -> f64 {
        match self {
            Filter::Lanczos => 3.0,
            Filter::Bilinear => 1.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        if distance.abs() >= self.reach() {
            return 0.0;
        }
        match self {
            Filter::Lanczos => sinc(distance) * sinc(distance / self.reach()),
            Filter::Bilinear => 1.0 - distance.abs(),
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}

/// Resizes rows of pixels of 1 or 3 bytes.
pub(super) fn resize(pixels: Vec<u8>, original: Size, size: Size, filter: Filter) -> Vec<u8> {
    match pixels.len() as u64 / original.pixels() {
        1 => resize_channels::<1>(pixels, original, size, filter),
        _ => resize_channels::<3>(pixels, original, size, filter),
    }
}

fn resize_channels<const CHANNELS: usize>(
    pixels: Vec<u8>,
    original: Size,
    size: Size,
    filter: Filter,
) -> Vec<u8> {
    let rows = |pixels: Vec<u8>| match size.width == original.width {
        true => pixels,
        false => resized_rows::<CHANNELS>(&pixels, original.width, size.width, filter),
    };
    let columns = |pixels: Vec<u8>| match size.height == original.height {
        true => pixels,
        false => resized_columns(&pixels, original.height, size.height, filter),
    };
    if columns_go_first(original, size) { rows(columns(pixels)) } else { columns(rows(pixels)) }
}

fn columns_go_first(original: Size, size: Size) -> bool {
    let lost = |before: u32, after: u32| i64::from(before) - i64::from(after);
    let (rows, columns) = (lost(original.width, size.width), lost(original.height, size.height));
    columns > 0 && columns > 2 * rows
}

/// Gives every row another length.
fn resized_rows<const CHANNELS: usize>(
    pixels: &[u8],
    width: u32,
    resized: u32,
    filter: Filter,
) -> Vec<u8> {
    let windows = windows(width, resized, filter);
    let rows = pixels.chunks_exact(width as usize * CHANNELS);
    rows.flat_map(|row| {
        let pixels = row.as_chunks::<CHANNELS>().0;
        windows.iter().flat_map(|window| window.blend(pixels))
    })
    .collect()
}

/// Gives every column another length.
fn resized_columns(pixels: &[u8], height: u32, resized: u32, filter: Filter) -> Vec<u8> {
    let row = pixels.len() / height as usize;
    let mut sums = vec![0; row];
    let mut blended = Vec::with_capacity(row * resized as usize);
    for window in windows(height, resized, filter) {
        sums.fill(HALF);
        let rows = pixels.chunks_exact(row).skip(window.first);
        for (weight, row) in window.weights.iter().zip(rows) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += weight * i32::from(*value);
            }
        }
        blended.extend(sums.iter().map(|sum| rounded(*sum)));
    }
    blended
}

/// The pixels of a line that one pixel of the resized line is made of.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

impl Window {
    fn blend<const CHANNELS: usize>(&self, line: &[[u8; CHANNELS]]) -> [u8; CHANNELS] {
        let mut sums = [HALF; CHANNELS];
        for (weight, pixel) in self.weights.iter().zip(&line[self.first..]) {
            for (sum, value) in sums.iter_mut().zip(pixel) {
                *sum += weight * i32::from(*value);
            }
        }
        sums.map(rounded)
    }
}

/// Returns the window of each pixel of a line that gets another length.
fn windows(length: u32, resized: u32, filter: Filter) -> Vec<Window> {
    let scale = f64::from(length) / f64::from(resized);
    let shrinking = scale.max(1.0);
    let reach = filter.reach() * shrinking;
    let window = |place: u32| {
        let centre = (f64::from(place) + 0.5) * scale;
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let end = ((centre + reach + 0.5) as usize).min(length as usize);
        let weight = |pixel| filter.weight((pixel as f64 - centre + 0.5) / shrinking);
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        let whole = |weight: f64| (weight / sum * ONE).round() as i32;
        Window { first, weights: weights.into_iter().map(whole).collect() }
    };
    (0..resized).map(window).collect()
}

fn rounded(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_of_a_window_are_one_together() {
        for filter in [Filter::Lanczos, Filter::Bilinear] {
            for (length, resized) in [(7, 7), (9, 4), (4, 9), (1, 5), (300, 1)] {
                let windows = windows(length, resized, filter);
                assert_eq!(windows.len(), resized as usize);
                for window in windows {
                    let sum: i32 = window.weights.iter().sum();
                    let rounding = window.weights.len() as i32;
                    assert!((sum - (1 << BITS)).abs() <= rounding, "{sum}");
                    assert!(window.first + window.weights.len() <= length as usize);
                }
            }
        }
    }

    #[test]
    fn halves_of_two_pixels_are_blended_and_edges_keep_their_value() {
        let size = |width| Size::new(width, 1);
        let doubled = resize(vec![0, 200], size(2), size(4), Filter::Bilinear);
        assert_eq!(doubled, [0, 50, 150, 200]);
        let colours = resize(vec![0, 9, 90, 200, 9, 10], size(2), size(1), Filter::Bilinear);
        assert_eq!(colours, [100, 9, 50]);
        let columns = resize(vec![0, 200], Size::new(1, 2), Size::new(1, 4), Filter::Bilinear);
        assert_eq!(columns, doubled);
    }

    #[test]
    fn lanczos_rings_no_further_than_bytes_go() {
        let step = [[0; 8], [255; 8]].concat();
        let resized = resize(step, Size::new(16, 1), Size::new(40, 1), Filter::Lanczos);
        assert_eq!((resized[0], resized[39]), (0, 255));
        let greys = resized.iter().filter(|value| !matches!(value, 0 | 255)).count();
        assert!((2..20).contains(&greys), "{resized:?}");
    }
}
