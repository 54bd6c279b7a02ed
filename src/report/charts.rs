//! Curves over the steps of a run: the values as a pale thin line, their running mean as a strong
//! one.

use std::path::Path;

use plotters::backend::DrawingBackend;

use crate::error::Result;
use crate::files::durable::replace_file;
use crate::report::axis::{Axis, number_text, showable};
use crate::report::canvas::{
    self, AXIS, Anchor, Canvas, Colour, GREY, INK, Picture, RULE, pale, series_colour, text_width,
};

const TITLE_SIZE: f64 = 16.0;
pub(super) const TEXT_SIZE: f64 = 12.0;
/// Share of the points that the running mean spans.
const SMOOTHED_SHARE: f64 = 0.02;

#[derive(Clone, Debug, Default)]
pub struct Chart {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub series: Vec<Series>,
    /// True for a logarithmic axis; values that are not above zero are left out.
    pub log_y: bool,
}

/// Points in ascending order of x. Values that are not finite are left out.
#[derive(Clone, Debug, Default)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

impl Chart {
    /// Returns the chart as SVG text, `width` by `height` pixels unless the page scales it.
    pub fn svg(&self, width: u32, height: u32) -> String {
        canvas::svg(self, width, height)
    }

    /// Writes the chart as a PNG file of `width` by `height` pixels, laid out for a screen of
    /// double density.
    ///
    /// # Errors
    /// [`Error::Storage`](crate::error::Error::Storage) if the file cannot be written.
    pub fn write_png(&self, path: &Path, width: u32, height: u32) -> Result<()> {
        let bytes = canvas::png(self, width, height);
        replace_file(path, |out| out.write_all(&bytes))
    }

    fn shown(&self) -> Vec<Vec<(f64, f64)>> {
        let shows = |&(x, y): &(f64, f64)| showable(x, false) && showable(y, self.log_y);
        self.series
            .iter()
            .map(|series| series.points.iter().copied().filter(shows).collect())
            .collect()
    }
}

impl Picture for Chart {
    fn paint<B: DrawingBackend>(&self, canvas: &mut Canvas<'_, B>) {
        let shown = self.shown();
        let curves: Vec<Curve> =
            shown.iter().map(|points| Curve::thinned(points, canvas.width)).collect();
        let all = || curves.iter().flat_map(|curve| curve.raw.iter());
        let values = || all().map(|point| point.1);
        let frame = Frame::new(canvas, Axis::exact(all().map(|point| point.0), 7), |wanted| {
            match self.log_y {
                true => Axis::logarithmic(values(), wanted),
                false => Axis::rounded(values(), wanted),
            }
        });
        let names: Vec<(&str, Colour)> = self
            .series
            .iter()
            .enumerate()
            .map(|(i, s)| (s.name.as_str(), series_colour(i)))
            .collect();
        frame.paint(
            canvas,
            [&self.title, &self.x_label, &self.y_label],
            if names.len() > 1 { &names } else { &[] },
        );
        if all().next().is_none() {
            frame.paint_nothing(canvas);
        }
        for (i, curve) in curves.iter().enumerate() {
            curve.paint(canvas, &frame, series_colour(i));
        }
    }
}

/// The drawn form of a series: its points thinned to the width of the chart, and their running mean
/// if they are noisy.
struct Curve {
    raw: Vec<(f64, f64)>,
    smooth: Option<Vec<(f64, f64)>>,
}

impl Curve {
    fn thinned(points: &[(f64, f64)], width: f64) -> Self {
        let window = ((points.len() as f64 * SMOOTHED_SHARE) as usize).max(5);
        // Averaging twice avoids kinks where a single outlier enters and leaves the window.
        let smooth = is_noisy(points)
            .then(|| thinned(&running_mean(&running_mean(points, window), window), width));
        Curve { raw: thinned(points, width), smooth }
    }

    fn paint<B: DrawingBackend>(&self, canvas: &mut Canvas<'_, B>, frame: &Frame, colour: Colour) {
        let placed = |points: &[(f64, f64)]| {
            points.iter().map(|&point| frame.place(point)).collect::<Vec<_>>()
        };
        match (&self.smooth, self.raw.as_slice()) {
            (_, []) => {}
            (_, [point]) => canvas.dot(frame.place(*point), 3.5, colour),
            (None, raw) => canvas.line(placed(raw), colour, 2.0),
            (Some(smooth), raw) => {
                canvas.line(placed(raw), pale(colour), 1.0);
                canvas.line(placed(smooth), colour, 2.0);
            }
        }
    }
}

/// True if a series fluctuates far more than its trend changes; a learning rate or a validation
/// loss does not.
fn is_noisy(points: &[(f64, f64)]) -> bool {
    let values = || points.iter().map(|point| point.1);
    let range = values().fold(f64::MIN, f64::max) - values().fold(f64::MAX, f64::min);
    let way: f64 = points.windows(2).map(|pair| (pair[1].1 - pair[0].1).abs()).sum();
    points.len() >= 30 && way > 4.0 * range
}

/// Returns the mean over `window` points around each point, over fewer at the ends.
fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let mut sums = vec![0.0];
    points.iter().for_each(|point| sums.push(sums[sums.len() - 1] + point.1));
    let mean = |i: usize| {
        let (from, to) = (i.saturating_sub(window / 2), (i + window / 2 + 1).min(points.len()));
        (sums[to] - sums[from]) / (to - from) as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// Keeps the extreme values of each pixel column, in their order: it looks the same, and a million
/// steps remain a small picture.
fn thinned(points: &[(f64, f64)], width: f64) -> Vec<(f64, f64)> {
    let columns = width as usize;
    if points.len() <= 2 * columns {
        return points.to_vec();
    }
    let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let extremes = |part: &[(f64, f64)]| {
        let pair = part.iter().min_by(by_value).zip(part.iter().max_by(by_value));
        pair.map(|(&low, &high)| if low.0 <= high.0 { [low, high] } else { [high, low] })
    };
    let mut kept: Vec<(f64, f64)> =
        points.chunks(points.len().div_ceil(columns)).filter_map(extremes).flatten().collect();
    kept.extend(points.last());
    kept
}

/// The parts around the curves: title, axes, legend.
pub(super) struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: Axis,
    y: Axis,
}

impl Frame {
    pub fn new<B: DrawingBackend>(
        canvas: &Canvas<'_, B>,
        x: Axis,
        y: impl FnOnce(usize) -> Axis,
    ) -> Self {
        let (top, bottom) = (64.0, canvas.height - 48.0);
        let y = y(((bottom - top) / 36.0) as usize);
        let widest = y
            .ticks
            .iter()
            .map(|&tick| text_width(&number_text(tick), TEXT_SIZE, false))
            .fold(0.0, f64::max);
        Frame { left: 16.0 + widest + 8.0, right: canvas.width - 22.0, top, bottom, x, y }
    }

    /// Returns the position of a point on the canvas.
    pub fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (
            self.left + self.x.share(x) * (self.right - self.left),
            self.bottom - self.y.share(y) * (self.bottom - self.top),
        )
    }

    /// `labels` are title, x and y; `legend` names the series if there are several.
    pub fn paint<B: DrawingBackend>(
        &self,
        canvas: &mut Canvas<'_, B>,
        labels: [&str; 3],
        legend: &[(&str, Colour)],
    ) {
        let [title, x_label, y_label] = labels;
        canvas.text(title, (16.0, 26.0), Anchor::Left, INK, TITLE_SIZE, true);
        canvas.text(y_label, (16.0, 46.0), Anchor::Left, GREY, TEXT_SIZE, false);
        self.paint_legend(canvas, legend);
        for &tick in &self.y.ticks {
            let (_, y) = self.place((0.0, tick));
            canvas.line([(self.left, y), (self.right, y)], RULE, 1.0);
            canvas.text(
                &number_text(tick),
                (self.left - 8.0, y + 4.2),
                Anchor::Right,
                GREY,
                TEXT_SIZE,
                false,
            );
        }
        canvas.line([(self.left, self.bottom), (self.right, self.bottom)], AXIS, 1.0);
        for &tick in &self.x.ticks {
            let x = self.left + self.x.share(tick) * (self.right - self.left);
            canvas.line([(x, self.bottom), (x, self.bottom + 4.0)], AXIS, 1.0);
            canvas.text(
                &number_text(tick),
                (x, self.bottom + 18.0),
                Anchor::Middle,
                GREY,
                TEXT_SIZE,
                false,
            );
        }
        let middle = (self.left + self.right) / 2.0;
        canvas.text(x_label, (middle, self.bottom + 38.0), Anchor::Middle, GREY, TEXT_SIZE, false);
    }

    /// Draws from the right end of the line under the title.
    fn paint_legend<B: DrawingBackend>(
        &self,
        canvas: &mut Canvas<'_, B>,
        legend: &[(&str, Colour)],
    ) {
        let mut right = self.right;
        for (name, colour) in legend.iter().rev() {
            canvas.text(name, (right, 46.0), Anchor::Right, INK, TEXT_SIZE, false);
            right -= text_width(name, TEXT_SIZE, false) + 6.0;
            canvas.rectangle((right - 14.0, 40.5), (right, 43.5), *colour);
            right -= 14.0 + 18.0;
        }
    }

    pub fn paint_nothing<B: DrawingBackend>(&self, canvas: &mut Canvas<'_, B>) {
        let middle = ((self.left + self.right) / 2.0, (self.top + self.bottom) / 2.0 - 8.0);
        canvas.text("no values yet", middle, Anchor::Middle, GREY, TEXT_SIZE, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    /// A loss that falls from 2.5 to 0.4 under the noise of single batches.
    fn noisy_loss(steps: u64) -> Vec<(f64, f64)> {
        let key = Key::new(5, Purpose::Test);
        let noise = |step| key.below(step, 10_000) as f64 / 10_000.0 - 0.5;
        (1..=steps)
            .map(|step| {
                (
                    step as f64,
                    (0.4 + 2.1 * (-6.0 * step as f64 / steps as f64).exp())
                        * (1.0 + 0.5 * noise(step)),
                )
            })
            .collect()
    }

    fn chart(points: Vec<(f64, f64)>, log_y: bool) -> Chart {
        let series = vec![Series { name: "train".into(), points }];
        Chart {
            title: "Loss".into(),
            x_label: "step".into(),
            y_label: "mean".into(),
            series,
            log_y,
        }
    }

    #[test]
    fn noise_is_smoothed_and_a_schedule_is_not() {
        let strokes = |points| {
            let svg = chart(points, false).svg(640, 320);
            [series_colour(0), pale(series_colour(0))]
                .map(|c| svg.contains(&format!("stroke=\"#{:02X}{:02X}{:02X}\"", c.0, c.1, c.2)))
        };
        let schedule =
            (0..500).map(|step| (f64::from(step), f64::from(step.min(1000 - 2 * step)))).collect();
        assert_eq!(strokes(noisy_loss(500)), [true, true]);
        assert_eq!(strokes(schedule), [true, false]);
    }

    #[test]
    fn the_running_mean_does_not_lag_behind_a_trend() {
        let line: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), f64::from(3 * i))).collect();
        let mean = running_mean(&line, 9);
        assert!((4..46).all(|i| (line[i].1 - mean[i].1).abs() < 1e-9), "{mean:?}");
        assert_eq!((mean[0].1, mean[49].1), (6.0, 141.0), "at the ends the mean of half a window");
    }

    #[test]
    fn a_million_steps_keep_their_peaks_in_a_small_picture() {
        let mut points: Vec<(f64, f64)> = (0..1_000_000).map(|i| (f64::from(i), 1.0)).collect();
        points[777_777].1 = 9.0;
        let thin = thinned(&points, 640.0);
        assert!(
            thin.len() <= 1281 && thin.contains(&(777_777.0, 9.0)) && thin.last() == points.last()
        );
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn values_that_cannot_be_drawn_are_left_out() {
        let gaps =
            vec![(1.0, f64::NAN), (2.0, f64::INFINITY), (3.0, -1.0), (4.0, 1e200), (f64::NAN, 1.0)];
        assert!(chart(gaps.clone(), true).svg(320, 200).contains("no values yet"));
        assert_eq!(
            chart(gaps, false).svg(320, 200).matches("<circle").count(),
            1,
            "-1 can be drawn without a logarithm"
        );
        assert!(chart(Vec::new(), false).svg(320, 200).contains("no values yet"));
        assert!(Chart::default().svg(320, 200).ends_with("</svg>\n"));
    }

    #[test]
    fn a_legend_stands_only_over_several_series() {
        let mut both = chart(noisy_loss(50), false);
        assert!(!both.svg(640, 320).contains("train"));
        both.series.push(Series { name: "valid <ation>".into(), points: vec![(25.0, 1.0)] });
        let svg = both.svg(640, 320);
        assert!(svg.contains("train") && svg.contains("valid &lt;ation&gt;"));
    }

    #[test]
    fn a_png_has_the_demanded_size_and_shows_the_curve() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.png");
        chart(noisy_loss(100), true).write_png(&path, 640, 320).unwrap();
        let image = image::open(&path).unwrap().to_rgb8();
        assert_eq!(image.dimensions(), (640, 320));
        let strong = series_colour(0);
        assert!(
            image.pixels().filter(|pixel| pixel.0 == [strong.0, strong.1, strong.2]).count() > 300
        );
    }
}
