//! Embeddings of numbers and positions.

use tch::{Device, Kind, Tensor};

use super::{Builder, Init, Linear, Mlp, Nonlinearity, Rows, Views};

/// Cosines and sines of `positions` at geometrically falling frequencies.
///
/// # Shapes
/// `positions`: `[P]`. Returns `[P, width]` f32: cosines in the first half, sines in the second.
///
/// Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, halves instead of interleaved.
pub fn sinusoidal(positions: &Tensor, width: i64, max_period: f64) -> Tensor {
    sinusoidal_scaled(positions, width, max_period, 1.0)
}

/// As [`sinusoidal`], of `scale · positions`. The scale is applied last: at angles of a thousand
/// another order of rounding shows.
fn sinusoidal_scaled(positions: &Tensor, width: i64, max_period: f64, scale: f64) -> Tensor {
    let half = width / 2;
    let exponents =
        Tensor::arange(half, (Kind::Float, positions.device())) * -max_period.ln() / half as f64;
    let angles = positions.to_kind(Kind::Float).unsqueeze(1) * exponents.exp().unsqueeze(0) * scale;
    Tensor::cat(&[angles.cos(), angles.sin()], 1)
}

/// A fixed vector for each position of a grid: one half of the width for the row, the other for the
/// column.
///
/// Returns `[rows · columns, width]` f32, row by row.
pub fn grid_positions(rows: i64, columns: i64, width: i64, device: Device) -> Tensor {
    let axis =
        |length| sinusoidal(&Tensor::arange(length, (Kind::Float, device)), width / 2, 10_000.0);
    let row_part = axis(rows).unsqueeze(1).expand([rows, columns, -1], false);
    let column_part = axis(columns).unsqueeze(0).expand([rows, columns, -1], false);
    Tensor::cat(&[row_part, column_part], -1).reshape([rows * columns, -1])
}

/// A number, the timestep or the guidance scale, as a vector: its sinusoidal embedding through two
/// affine maps.
#[derive(Clone, Copy, Debug)]
pub struct ScalarEmbedding {
    frequencies: i64,
    scale: f64,
    mlp: Mlp,
}

/// Longest period of the embedded scalars, as in DiT and all models here.
const MAX_PERIOD: f64 = 10_000.0;

impl ScalarEmbedding {
    /// `mlp.0` and `mlp.2`, initialized as in DiT.
    pub fn dit(builder: &mut Builder<'_>, width: i64) -> Self {
        let (init, frequencies) = (Init::Normal { std: 0.02 }, 256);
        let input = Linear::new(&mut builder.at("mlp.0").over(Rows::One), frequencies, width, init);
        let output = Linear::new(&mut builder.at("mlp.2").over(Rows::One), width, width, init);
        ScalarEmbedding {
            frequencies,
            scale: 1.0,
            mlp: Mlp { input, output, nonlinearity: Nonlinearity::Silu },
        }
    }

    /// `linear_1` and `linear_2`, as diffusers' models have them.
    pub fn new(builder: &mut Builder<'_>, frequencies: i64, width: i64, with_bias: bool) -> Self {
        let mlp = Mlp::of_two_linears(
            &mut builder.at("").over(Rows::One),
            [frequencies, width, width],
            Nonlinearity::Silu,
            with_bias,
        );
        ScalarEmbedding { frequencies, scale: 1.0, mlp }
    }

    /// The same, of `scale` times the number.
    pub fn scaled(self, scale: f64) -> Self {
        ScalarEmbedding { scale, ..self }
    }

    /// # Shapes
    /// `scalars`: `[B]`. Returns `[B, D]` of `kind`.
    pub fn forward(&self, params: &Views, scalars: &Tensor, kind: Kind) -> Tensor {
        let frequencies = sinusoidal_scaled(scalars, self.frequencies, MAX_PERIOD, self.scale);
        self.mlp.forward(params, &frequencies.to_kind(kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_of_a_grid_has_a_vector_of_its_own() {
        let places = grid_positions(4, 5, 16, Device::Cpu);
        assert_eq!(places.size(), [20, 16]);
        let distances = Tensor::cdist(&places, &places, 2.0, None)
            + Tensor::eye(20, (Kind::Float, Device::Cpu));
        assert!(distances.min().double_value(&[]) > 0.1);
    }
}
