//! Bars of a value by bins, at the start of a run and at its end, e.g. the loss at each noise
//! level.

use std::path::Path;

use plotters::backend::DrawingBackend;

use crate::error::Result;
use crate::files::durable::replace_file;
use crate::report::axis::{Axis, showable};
use crate::report::canvas::{self, Canvas, Colour, Picture, pale, series_colour};
use crate::report::charts::Frame;

/// Share of the run at its start and at its end that is averaged.
const TENTH: f64 = 0.1;

/// Bars over equal bins of `range`: a wide pale one for the start of the run and a narrow strong
/// one for its end.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub range: (f64, f64),
    /// Mean over the first tenth of the run, one for each bin; not finite if the bin has no value.
    pub first: Vec<f64>,
    /// Mean over the last tenth.
    pub last: Vec<f64>,
}

impl Bars {
    /// Compares the last tenth of the steps with the first. `columns`: for each bin (step, value)
    /// over the run.
    pub fn over_run(
        title: &str,
        x_label: &str,
        y_label: &str,
        range: (f64, f64),
        columns: &[Vec<(f64, f64)>],
    ) -> Self {
        let steps = || columns.iter().flatten().map(|point| point.0);
        let (begin, end) =
            (steps().fold(f64::INFINITY, f64::min), steps().fold(f64::NEG_INFINITY, f64::max));
        let tenth = (end - begin) * TENTH;
        let means = |from: f64, to: f64| {
            columns.iter().map(|column| mean_between(column, from, to)).collect()
        };
        let texts = [title, x_label, y_label].map(str::to_owned);
        let [title, x_label, y_label] = texts;
        Bars {
            title,
            x_label,
            y_label,
            range,
            first: means(begin, begin + tenth),
            last: means(end - tenth, end),
        }
    }

    /// As [`Chart::svg`](crate::report::Chart::svg).
    pub fn svg(&self, width: u32, height: u32) -> String {
        canvas::svg(self, width, height)
    }

    /// As [`Chart::write_png`](crate::report::Chart::write_png).
    ///
    /// # Errors
    /// [`Error::Storage`](crate::error::Error::Storage) if the file cannot be written.
    pub fn write_png(&self, path: &Path, width: u32, height: u32) -> Result<()> {
        let bytes = canvas::png(self, width, height);
        replace_file(path, |out| out.write_all(&bytes))
    }
}

/// Returns the mean of the values with a step in the range; NaN if there is none.
fn mean_between(column: &[(f64, f64)], from: f64, to: f64) -> f64 {
    let inside =
        || column.iter().filter(|(step, value)| (from..=to).contains(step) && value.is_finite());
    inside().map(|point| point.1).sum::<f64>() / inside().count() as f64
}

impl Picture for Bars {
    fn paint<B: DrawingBackend>(&self, canvas: &mut Canvas<'_, B>) {
        let values =
            || self.first.iter().chain(&self.last).copied().filter(|&value| showable(value, false));
        let (low, high) = self.range;
        let x = Axis::exact([low, high].into_iter(), if canvas.width < 560.0 { 5 } else { 10 });
        // The axis includes zero, since otherwise the bars' lengths would mislead.
        let frame = Frame::new(canvas, x, |wanted| Axis::rounded(values().chain([0.0]), wanted));
        let strong = series_colour(0);
        let legend = [("first tenth of the run", pale(strong)), ("last tenth", strong)];
        frame.paint(canvas, [&self.title, &self.x_label, &self.y_label], &legend);
        if values().next().is_none() {
            frame.paint_nothing(canvas);
        }
        for (heights, share, colour) in
            [(&self.first, 0.8, pale(strong)), (&self.last, 0.44, strong)]
        {
            paint_bars(canvas, &frame, self.range, heights, share, colour);
        }
    }
}

/// Draws one bar for each bin; it fills `share` of the bin's width.
fn paint_bars<B: DrawingBackend>(
    canvas: &mut Canvas<'_, B>,
    frame: &Frame,
    range: (f64, f64),
    heights: &[f64],
    share: f64,
    colour: Colour,
) {
    let (low, high) = range;
    let bin = (high - low) / heights.len() as f64;
    for (i, &height) in heights.iter().enumerate().filter(|(_, height)| showable(**height, false)) {
        let middle = low + (i as f64 + 0.5) * bin;
        let corner =
            |side: f64, value: f64| frame.place((middle + side * share * bin / 2.0, value));
        canvas.rectangle(corner(-1.0, height), corner(1.0, 0.0), colour);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bin_is_compared_between_the_ends_of_the_run() {
        let falling: Vec<(f64, f64)> =
            (0..=100).map(|step| (f64::from(step), 100.0 - f64::from(step))).collect();
        let early_only = vec![(5.0, 2.0), (6.0, f64::NAN)];
        let bars =
            Bars::over_run("Loss", "sigma", "", (0.0, 1.0), &[falling, early_only, Vec::new()]);
        assert_eq!((bars.first[0], bars.last[0], bars.first[1]), (95.0, 5.0, 2.0));
        assert!(bars.last[1].is_nan() && bars.first[2].is_nan());
    }

    #[test]
    fn a_bin_without_values_has_no_bar() {
        let bars = Bars {
            range: (0.0, 1.0),
            first: vec![1.0, f64::NAN],
            last: vec![0.5, 0.4],
            ..Bars::default()
        };
        let bare = Bars { range: (0.0, 1.0), ..Bars::default() };
        let rectangles = |bars: &Bars| bars.svg(480, 300).matches("<rect").count();
        assert_eq!(rectangles(&bars) - rectangles(&bare), 3);
        assert!(bare.svg(480, 300).contains("no values yet"));
    }
}
