//! Gradient norms, summed in an order that does not depend on the number of ranks.

use tch::{Device, Kind, Tensor};

use crate::parallel::Replica;
use crate::parallel::layout::Layout;

/// Elements whose squares are summed in one f32. On a CPU libtorch sums a whole tensor in a few f32
/// accumulators: the norm of 4 million elements was off by 1e-4, and by more the fewer ranks shared
/// them.
const CHUNK: i64 = 1 << 16;

/// Returns the root of the sum of squares over all gradients, an f32 scalar on their device; zero
/// without gradients.
///
/// # Shapes
/// Each gradient: `[P]`.
pub fn global_norm<'t>(gradients: impl Iterator<Item = &'t Tensor>) -> Tensor {
    let norms: Vec<Tensor> = gradients.map(norm).collect();
    if norms.is_empty() {
        return Tensor::zeros([], (Kind::Float, Device::Cpu));
    }
    Tensor::stack(&norms, 0).norm()
}

fn norm(gradient: &Tensor) -> Tensor {
    let (elements, whole) = (gradient.size()[0], gradient.size()[0] / CHUNK * CHUNK);
    // In f32 whatever the gradient's kind.
    let of_all = |part: &Tensor| part.norm_scalaropt_dtype(2, Kind::Float);
    if whole == 0 {
        return of_all(gradient);
    }
    let chunks = gradient.narrow(0, 0, whole).view([-1, CHUNK]).norm_scalaropt_dim_dtype(
        2,
        [1i64].as_slice(),
        false,
        Kind::Float,
    );
    let rest = of_all(&gradient.narrow(0, whole, elements - whole)).view([1]);
    Tensor::cat(&[chunks, rest], 0).norm()
}

impl Replica<'_> {
    /// Returns the norms of the grains that this rank measures, each over all stages: `grains` f32
    /// scalars. A grain is a fixed part of the flat buffers, see `layout.rs`.
    ///
    /// # Shapes
    /// `gradients`: this rank's shard `[P]` of each stage and trained piece.
    pub fn norms_of_grains(&self, gradients: &[Vec<Tensor>], grains: usize) -> Vec<Tensor> {
        let layouts =
            self.buckets.iter().flat_map(|bucket| bucket.trained()).map(|piece| piece.layout());
        let cut = |(layout, gradient): (Layout, &Tensor)| -> Vec<Tensor> {
            layout
                .grains()
                .map(|grain| gradient.narrow(0, grain.start, grain.end - grain.start))
                .collect()
        };
        let pieces: Vec<Vec<Tensor>> = layouts.zip(gradients.iter().flatten()).map(cut).collect();
        (0..grains).map(|grain| global_norm(pieces.iter().map(|piece| &piece[grain]))).collect()
    }

    /// Returns the norm of the whole gradient from the norms of all ranks' grains, given by rank.
    pub fn grad_norm(&self, norms_by_rank: &[&[f32]]) -> f64 {
        let norms = self.sharing.in_order(norms_by_rank).flat_map(|norms| norms.iter());
        norms.map(|norm| f64::from(*norm).powi(2)).sum::<f64>().sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    #[test]
    fn the_norm_is_over_all_gradients() {
        let gradients = [Tensor::from_slice(&[3.0f32, 0.0]), Tensor::from_slice(&[4.0f32])];
        assert!((global_norm(gradients.iter()).double_value(&[]) - 5.0).abs() < 1e-6);
    }

    #[test]
    fn the_norm_of_millions_of_elements_is_right_to_f32_rounding() {
        let gradient = Key::new(5, Purpose::Test)
            .seeded(|| Tensor::randn([(1 << 22) + 1234], (Kind::Float, Device::Cpu)))
            * 1e-3;
        let expected = gradient.to_kind(Kind::Double).norm().double_value(&[]);
        let found = global_norm([&gradient].into_iter()).double_value(&[]);
        assert!((found / expected - 1.0).abs() < 2e-6, "{found} and {expected}");
    }
}
