//! Overlapping tiles of a large picture or video, and how they are blended.

use tch::{Kind, Tensor};

use crate::ops::at_least_float;

/// A square tile, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub side: i64,
    /// From the beginning of a tile to that of the next one.
    pub stride: i64,
}

impl Tile {
    /// A tile that overlaps the next one by a quarter.
    pub fn with_quarter(side: i64) -> Self {
        Tile { side, stride: side * 3 / 4 }
    }

    /// # Errors
    /// A text, if the tile does not consist of whole latents, each of `space` pixels' side.
    pub(super) fn check(self, space: i64) -> Result<(), String> {
        let Tile { side, stride } = self;
        if stride < 1 || stride > side {
            return Err(format!("tiles of {side} pixels cannot be {stride} apart"));
        }
        match [side, stride].into_iter().find(|length| length % space != 0) {
            Some(length) => Err(format!(
                "tiles of {side} pixels, {stride} apart: {length} is no multiple of {space}"
            )),
            None => Ok(()),
        }
    }
}

/// Tiles of a network's input and what becomes of them in its output. Lengths are rows or columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// An input with no longer side is not cut.
    pub longest_whole: i64,
    pub side: i64,
    pub stride: i64,
    pub output_side: i64,
    pub output_stride: i64,
}

impl Tiles {
    /// Tiles of pixels, of which a network makes latents of `space` pixels' side.
    pub(super) fn of_pixels(tile: Tile, space: i64) -> Self {
        let Tile { side, stride } = tile;
        Tiles {
            longest_whole: side,
            side,
            stride,
            output_side: side / space,
            output_stride: stride / space,
        }
    }

    /// Tiles of latents, each of `space` pixels' side, of which a network makes pixels.
    pub(super) fn of_latents(tile: Tile, space: i64) -> Self {
        let Tiles { side, stride, output_side, output_stride, .. } = Tiles::of_pixels(tile, space);
        Tiles {
            longest_whole: output_side,
            side: output_side,
            stride: output_stride,
            output_side: side,
            output_stride: stride,
        }
    }

    /// Returns the network's output for `input`, computed tile by tile where it is large. The rows
    /// and columns that two tiles share go over from the first one's values to the second one's in
    /// equal steps.
    ///
    /// # Shapes
    /// `input`: `[…, H, W]`. `network` takes and returns tiles of such shapes.
    pub(super) fn map(self, input: &Tensor, network: impl Fn(&Tensor) -> Tensor) -> Tensor {
        let [height, width] = [-2, -1].map(|axis| length(input, axis));
        if height.max(width) <= self.longest_whole {
            return network(input);
        }
        let overlap = self.output_side - self.output_stride;
        let (mut rows, mut above) = (Vec::new(), Vec::<Tensor>::new());
        for (top, tile_height) in self.cuts(height) {
            let mut row = Vec::<Tensor>::new();
            for (index, (left, tile_width)) in self.cuts(width).enumerate() {
                let tile = input.narrow(-2, top, tile_height).narrow(-1, left, tile_width);
                let output = network(&tile);
                if let Some(before) = above.get(index) {
                    blend(before, &output, overlap, -2);
                }
                if let Some(before) = row.last() {
                    blend(before, &output, overlap, -1);
                }
                row.push(output);
            }
            let kept: Vec<Tensor> = row.iter().map(|tile| self.kept(tile)).collect();
            rows.push(Tensor::cat(&kept, -1));
            above = row;
        }
        Tensor::cat(&rows, -2)
    }

    /// Beginnings and lengths of tiles along an axis.
    fn cuts(self, length: i64) -> impl Iterator<Item = (i64, i64)> {
        let starts = (0..length).step_by(self.stride as usize);
        starts.map(move |start| (start, self.side.min(length - start)))
    }

    /// The part of a tile's output that the next tiles do not replace.
    fn kept(self, tile: &Tensor) -> Tensor {
        let kept = |axis| self.output_stride.min(length(tile, axis));
        tile.narrow(-2, 0, kept(-2)).narrow(-1, 0, kept(-1))
    }
}

/// Blends the end of `before` into the beginning of `tile`, along `axis`.
fn blend(before: &Tensor, tile: &Tensor, overlap: i64, axis: i64) {
    let overlap = overlap.min(length(before, axis)).min(length(tile, axis));
    if overlap == 0 {
        return;
    }
    let kind = at_least_float(tile.kind());
    let end = before.narrow(axis, length(before, axis) - overlap, overlap).to_kind(kind);
    let mut beginning = tile.narrow(axis, 0, overlap);
    let steps = Tensor::arange(overlap, (Kind::Float, tile.device())) / overlap as f64;
    let steps = if axis == -2 { steps.unsqueeze(-1) } else { steps };
    let blended = end.lerp_tensor(&beginning.to_kind(kind), &steps.to_kind(kind));
    beginning.copy_(&blended);
}

fn length(tensor: &Tensor, axis: i64) -> i64 {
    let size = tensor.size();
    size[(size.len() as i64 + axis) as usize]
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn picture(height: i64, width: i64) -> Tensor {
        Tensor::arange(2 * height * width, (Kind::Float, Device::Cpu)).view([1, 2, height, width])
    }

    #[test]
    fn tiles_of_a_network_that_sees_no_neighbours_are_the_whole() {
        let tiles = Tiles::of_pixels(Tile { side: 16, stride: 12 }, 4);
        let pool =
            |x: &Tensor| x.avg_pool2d([4i64, 4], [4i64, 4], [0i64, 0], false, true, None::<i64>);
        for (height, width) in [(16, 16), (20, 12), (36, 52), (12, 24), (48, 60)] {
            let (whole, tiled) =
                (pool(&picture(height, width)), tiles.map(&picture(height, width), pool));
            assert_eq!(tiled.size(), whole.size());
            assert!(tiled.allclose(&whole, 1e-6, 1e-3, false), "{height} x {width}");
        }
    }

    #[test]
    fn shared_columns_go_over_from_one_tile_to_the_next() {
        let tiles = Tiles::of_latents(Tile { side: 8, stride: 4 }, 2);
        // Each tile's output is one number, its first column's: 0, 2 and 4.
        let network = |x: &Tensor| {
            let first = x.narrow(-1, 0, 1);
            first.expand([1, 2, 2, 2 * length(x, -1)], true).contiguous()
        };
        let columns = picture(1, 5) - 5.0 * Tensor::from_slice(&[0.0f32, 1.0]).view([1, 2, 1, 1]);
        let found = tiles.map(&columns, network).get(0).get(0).get(0);
        let found = Vec::<f32>::try_from(found).expect("numbers");
        assert_eq!(found, [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]);
    }

    #[test]
    fn a_tile_consists_of_whole_latents() {
        assert_eq!(Tile::with_quarter(1024).check(8), Ok(()));
        let said = |side, stride| Tile { side, stride }.check(16).unwrap_err();
        assert_eq!(said(100, 48), "tiles of 100 pixels, 48 apart: 100 is no multiple of 16");
        assert_eq!(said(64, 40), "tiles of 64 pixels, 40 apart: 40 is no multiple of 16");
        assert_eq!(said(64, 80), "tiles of 64 pixels cannot be 80 apart");
        assert_eq!(said(64, 0), "tiles of 64 pixels cannot be 0 apart");
    }
}
