//! The canvas for charts and grids: one drawing becomes SVG text or a PNG.
//!
//! Positions and sizes are pixels of the layout. Both outputs are drawn [`DETAIL`] times as fine,
//! since plotters uses whole pixels: the SVG scales down by its view box, and the bitmap is
//! averaged down, which smooths its edges.

use std::io::Cursor;
use std::sync::Once;

use image::imageops::thumbnail;
use image::{ExtendedColorType, ImageEncoder, RgbImage, codecs::png::PngEncoder};
use plotters::backend::DrawingBackend;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{
    FontDesc, FontFamily, FontStyle, RGBColor, ShapeStyle, TextStyle, register_font,
};

/// Drawing units in a layout pixel.
const DETAIL: u32 = 4;
/// PNG pixels in a layout pixel, so that text is sharp on high-density screens.
const PNG_DENSITY: u32 = 2;
/// DejaVu Sans in ems: 0.928 above the base line, 0.236 below.
const DEJAVU_HEIGHT: f64 = 1.164;

pub(super) type Colour = RGBColor;
pub(super) const WHITE: Colour = RGBColor(255, 255, 255);
pub(super) const INK: Colour = RGBColor(17, 24, 39);
pub(super) const GREY: Colour = RGBColor(107, 114, 128);
pub(super) const AXIS: Colour = RGBColor(156, 163, 175);
pub(super) const RULE: Colour = RGBColor(229, 231, 235);

/// Returns the colour of the `number`th series; the colours differ also for readers with red-green
/// blindness.
pub(super) fn series_colour(number: usize) -> Colour {
    const PALETTE: [Colour; 6] = [
        RGBColor(37, 99, 235),
        RGBColor(234, 118, 12),
        RGBColor(13, 148, 136),
        RGBColor(192, 38, 211),
        RGBColor(120, 113, 108),
        RGBColor(202, 138, 4),
    ];
    PALETTE[number % PALETTE.len()]
}

/// Returns the same colour mixed with white.
pub(super) fn pale(colour: Colour) -> Colour {
    let mix = |channel: u8| (f64::from(channel) * 0.32 + 255.0 * 0.68) as u8;
    RGBColor(mix(colour.0), mix(colour.1), mix(colour.2))
}

/// The point of a text that lies at its position.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Left,
    Middle,
    Right,
}

/// A drawing.
pub(super) trait Picture {
    fn paint<B: DrawingBackend>(&self, canvas: &mut Canvas<'_, B>);
}

pub(super) struct Canvas<'b, B> {
    backend: &'b mut B,
    pub width: f64,
    pub height: f64,
    /// Font size that plotters expects for an em of one pixel, and the distance of the base line
    /// below the anchor.
    font: (f64, f64),
}

/// Returns the picture as SVG text of this size.
pub(super) fn svg(picture: &impl Picture, width: u32, height: u32) -> String {
    let mut text = String::new();
    let mut backend =
        plotters::backend::SVGBackend::with_string(&mut text, (width * DETAIL, height * DETAIL));
    // The backend writes size / 1.24 as the size and dy = 0.76 em for the anchor at the top.
    paint(picture, &mut backend, width, height, (1.24, 0.76));
    drop(backend);
    let fine = format!("width=\"{}\" height=\"{}\"", width * DETAIL, height * DETAIL);
    text.replacen(&fine, &format!("width=\"{width}\" height=\"{height}\""), 1)
}

/// Returns the picture in pixels, two for each layout pixel in each direction.
pub(super) fn bitmap(picture: &impl Picture, width: u32, height: u32) -> RgbImage {
    let (fine_width, fine_height) = (width * DETAIL, height * DETAIL);
    let mut pixels = vec![255; (fine_width * fine_height * 3) as usize];
    let mut backend =
        plotters::backend::BitMapBackend::with_buffer(&mut pixels, (fine_width, fine_height));
    // The backend sets the font's height and puts the base line half of it below the anchor.
    paint(picture, &mut backend, width, height, (DEJAVU_HEIGHT, DEJAVU_HEIGHT / 2.0));
    drop(backend);
    let fine = RgbImage::from_raw(fine_width, fine_height, pixels).expect("three bytes a pixel");
    thumbnail(&fine, width * PNG_DENSITY, height * PNG_DENSITY)
}

/// Returns PNG bytes of about this many pixels: the layout is half as wide and high.
pub(super) fn png(picture: &impl Picture, width: u32, height: u32) -> Vec<u8> {
    encode_png(&bitmap(picture, width.div_ceil(PNG_DENSITY), height.div_ceil(PNG_DENSITY)))
}

pub(super) fn encode_png(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let written = PngEncoder::new(&mut bytes).write_image(
        image.as_raw(),
        image.width(),
        image.height(),
        ExtendedColorType::Rgb8,
    );
    written.expect("memory takes every image");
    bytes.into_inner()
}

fn paint<B: DrawingBackend>(
    picture: &impl Picture,
    backend: &mut B,
    width: u32,
    height: u32,
    font: (f64, f64),
) {
    register_fonts();
    let mut canvas = Canvas { backend, width: f64::from(width), height: f64::from(height), font };
    canvas.rectangle((0.0, 0.0), (canvas.width, canvas.height), WHITE);
    picture.paint(&mut canvas);
    canvas.backend.present().expect("memory takes every stroke");
}

/// Registers the embedded fonts, so that pictures look the same on a machine without fonts.
fn register_fonts() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        for (style, bytes) in
            [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
        {
            assert!(register_font("sans-serif", style, bytes).is_ok(), "DejaVu is a font");
        }
    });
}

fn fine(position: (f64, f64)) -> (i32, i32) {
    let whole = |value: f64| (value * f64::from(DETAIL)).round() as i32;
    (whole(position.0), whole(position.1))
}

fn style(colour: Colour, width: f64) -> ShapeStyle {
    ShapeStyle {
        color: colour.into(),
        filled: true,
        stroke_width: (width * f64::from(DETAIL)).round() as u32,
    }
}

impl<B: DrawingBackend> Canvas<'_, B> {
    pub fn line(
        &mut self,
        points: impl IntoIterator<Item = (f64, f64)>,
        colour: Colour,
        width: f64,
    ) {
        let points: Vec<(i32, i32)> = points.into_iter().map(fine).collect();
        self.backend.draw_path(points, &style(colour, width)).expect("memory takes every stroke");
    }

    pub fn rectangle(&mut self, from: (f64, f64), to: (f64, f64), colour: Colour) {
        self.backend
            .draw_rect(fine(from), fine(to), &style(colour, 0.0), true)
            .expect("memory takes every stroke");
    }

    pub fn dot(&mut self, centre: (f64, f64), radius: f64, colour: Colour) {
        let radius = (radius * f64::from(DETAIL)).round() as u32;
        self.backend
            .draw_circle(fine(centre), radius, &style(colour, 0.0), true)
            .expect("memory takes every stroke");
    }

    /// Draws text with its base line at `position`; `size` is the em in pixels.
    pub fn text(
        &mut self,
        text: &str,
        position: (f64, f64),
        anchor: Anchor,
        colour: Colour,
        size: f64,
        bold: bool,
    ) {
        let (scale, drop) = self.font;
        let horizontal = match anchor {
            Anchor::Left => HPos::Left,
            Anchor::Middle => HPos::Center,
            Anchor::Right => HPos::Right,
        };
        let font = font(size * scale, bold);
        let style = TextStyle::from(font).color(&colour).pos(Pos::new(horizontal, VPos::Top));
        self.backend
            .draw_text(text, &style, fine((position.0, position.1 - size * drop)))
            .expect("memory takes every stroke");
    }
}

/// Returns the width of a text in pixels in DejaVu Sans.
pub(super) fn text_width(text: &str, size: f64, bold: bool) -> f64 {
    register_fonts();
    let (width, _) =
        font(size * DEJAVU_HEIGHT, bold).box_size(text).expect("the font is registered");
    f64::from(width) / f64::from(DETAIL)
}

fn font(size: f64, bold: bool) -> FontDesc<'static> {
    let style = if bold { FontStyle::Bold } else { FontStyle::Normal };
    // `FontDesc::style` would keep the face that was loaded before.
    FontDesc::new(FontFamily::SansSerif, size * f64::from(DETAIL), style)
}
