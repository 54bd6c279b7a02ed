//! Rotary position embedding: pairs of features are rotated by angles that grow with the token's
//! position.
//!
//! A table holds one complex number of length 1 for each token and pair, so that a rotation is one
//! complex product.
//!
//! Source: Su et al. 2021, arXiv:2104.09864, section 3.2.

use tch::{Device, Kind, Tensor};

use crate::ops::{Rotation, apply};

/// One axis of the positions: the width of the features that it rotates, and the kind in which its
/// angles are computed before they are rounded to f32.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// Even.
    pub width: i64,
    pub theta: f64,
    pub kind: Kind,
}

impl Axis {
    /// Angles of `positions` `[P]` (whole numbers): `[P, width / 2]` of the axis' kind.
    pub fn angles(&self, positions: &Tensor) -> Tensor {
        let even = Tensor::arange_start_step(0, self.width, 2, (self.kind, positions.device()));
        // A scalar to the power of a tensor is computed in the tensor's kind.
        let frequencies = Tensor::pow_scalar(self.theta, &(even / self.width as f64)).reciprocal();
        positions.to_kind(self.kind).outer(&frequencies)
    }

    /// Angles of the positions `0..length`.
    pub fn angles_to(&self, length: i64, device: Device) -> Tensor {
        self.angles(&Tensor::arange(length, (Kind::Int64, device)))
    }
}

/// Angles of each position of a grid, the last axis fastest: `[F · H · W, width / 2]`, the axes'
/// widths side by side.
///
/// # Shapes
/// `frames`: `[F, width_f / 2]`, `rows`: `[H, width_h / 2]`, `columns`: `[W, width_w / 2]`.
pub fn grid_angles(frames: &Tensor, rows: &Tensor, columns: &Tensor) -> Tensor {
    let (f, h, w) = (frames.size()[0], rows.size()[0], columns.size()[0]);
    let parts = [
        frames.view([f, 1, 1, -1]).expand([f, h, w, -1], false),
        rows.view([1, h, 1, -1]).expand([f, h, w, -1], false),
        columns.view([1, 1, w, -1]).expand([f, h, w, -1], false),
    ];
    Tensor::cat(&parts, -1).reshape([f * h * w, -1])
}

/// The rotations by `angles` `[L, E/2]`, as a table `[L, 1, E/2]` of complex f32.
pub fn table(angles: &Tensor) -> Tensor {
    Tensor::complex(&angles.cos().to_kind(Kind::Float), &angles.sin().to_kind(Kind::Float))
        .unsqueeze(1)
}

/// As [`table`], of numbers that were rounded to `kind`.
pub fn table_rounded(angles: &Tensor, kind: Kind) -> Tensor {
    let [cosines, sines] =
        [angles.cos(), angles.sin()].map(|x| x.to_kind(kind).to_kind(Kind::Float));
    Tensor::complex(&cosines, &sines).unsqueeze(1)
}

/// Rotates each head's features, neighbours as pairs.
///
/// # Shapes
/// `x`: `[B, L, N, E]`; `table`: `[L, 1, E/2]`. Returns the shape and kind of `x`; computed in f32.
pub fn rotate(x: &Tensor, table: &Tensor) -> Tensor {
    apply(Rotation, [x, table])
}

/// Rotates each head's features, feature `i` and feature `i + E/2` as a pair. The two stand side by
/// side afterwards, in queries as in keys, so that their products are those of features left in
/// place.
///
/// # Shapes
/// As [`rotate`].
pub fn rotate_halves(x: &Tensor, table: &Tensor) -> Tensor {
    rotate(&x.unflatten(-1, [2i64, -1]).transpose(-1, -2).flatten(-2, -1), table)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AXIS: Axis = Axis { width: 8, theta: 10_000.0, kind: Kind::Double };

    #[test]
    fn a_product_of_rotated_vectors_depends_on_their_distance_alone() {
        let float = (Kind::Float, Device::Cpu);
        let table = table(&AXIS.angles_to(12, Device::Cpu));
        let (query, key) = (Tensor::arange(8, float) - 3.0, Tensor::arange(8, float) * 0.5 - 1.0);
        let everywhere = |x: &Tensor| rotate(&x.expand([1, 12, 1, 8], false), &table).view([12, 8]);
        let products = everywhere(&query).mm(&everywhere(&key).tr());
        for distance in 0..6 {
            let (near, far) = (
                products.double_value(&[5, 5 - distance.min(5)]),
                products.double_value(&[11, 11 - distance.min(5)]),
            );
            // Sums of eight f32 products of numbers up to 5.
            assert!((near - far).abs() < 1e-4, "{distance}: {near} {far}");
        }
    }

    #[test]
    fn the_first_pair_turns_by_one_radian_a_place() {
        let table = table(&AXIS.angles_to(3, Device::Cpu));
        let x = Tensor::from_slice(&[1f32, 0., 0., 0., 0., 0., 0., 0.]).expand([1, 3, 1, 8], false);
        let turned = rotate(&x, &table);
        assert!((turned.double_value(&[0, 2, 0, 0]) - 2f64.cos()).abs() < 1e-6);
        assert!((turned.double_value(&[0, 2, 0, 1]) - 2f64.sin()).abs() < 1e-6);
    }

    #[test]
    fn halves_are_rotated_as_neighbours_are() {
        let table = table(&AXIS.angles_to(5, Device::Cpu));
        let halves = Tensor::arange(40, (Kind::Float, Device::Cpu)).view([1, 5, 1, 8]);
        let pair = |place: i64| halves.slice(-1, place, None, 4);
        let neighbours = Tensor::cat(&[pair(0), pair(1), pair(2), pair(3)], -1);
        assert!(rotate_halves(&halves, &table).equal(&rotate(&neighbours, &table)));
    }

    #[test]
    fn a_grid_counts_columns_fastest() {
        let axis = Axis { width: 2, ..AXIS };
        let angles = |length| axis.angles_to(length, Device::Cpu);
        let grid = grid_angles(&angles(2), &angles(3), &angles(4));
        assert_eq!(grid.size(), [24, 3]);
        // Frame 1, row 2, column 3 is the last place.
        assert_eq!(Vec::<f64>::try_from(grid.get(23)).expect("f64"), [1.0, 2.0, 3.0]);
    }
}
