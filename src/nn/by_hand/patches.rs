//! Latents cut into patches and back: every number moves once.
//!
//! libtorch copies a permuted view in runs as short as a patch is wide, and spends more on finding
//! each run than on its numbers.

use std::ops::Range;

use half::bf16;
use tch::{Kind, Tensor};

use super::fits;
use crate::autograd::by_hand;
use crate::nn::patches::{FeatureOrder, Patch, grid};
use crate::tensor::{Element, elements, elements_mut};

/// Tokens `[B, L, C · pt · ph · pw]` of latents `[B, C, F, H, W]`, channel first; none where
/// libtorch's operators are to cut them.
pub fn cut(latents: &Tensor, patch: Patch) -> Option<Tensor> {
    let of_kind = match latents.kind() {
        Kind::BFloat16 => cut_of::<bf16>,
        _ => cut_of::<f32>,
    };
    let places = || {
        Places::new(
            latents.size()[0],
            latents.size()[1],
            grid(latents, patch),
            patch,
            FeatureOrder::ChannelFirst,
        )
    };
    fits(latents).then(|| of_kind(latents, places()))
}

/// Latents `[B, C, F, H, W]` of tokens on a `grid`; none where libtorch's operators are to join
/// them.
pub fn join(tokens: &Tensor, patch: Patch, grid: [i64; 3], order: FeatureOrder) -> Option<Tensor> {
    let of_kind = match tokens.kind() {
        Kind::BFloat16 => join_of::<bf16>,
        _ => join_of::<f32>,
    };
    let channels = || tokens.size()[2] / patch.iter().product::<i64>();
    fits(tokens)
        .then(|| of_kind(tokens, Places::new(tokens.size()[0], channels(), grid, patch, order)))
}

fn cut_of<T: Element>(latents: &Tensor, places: Places) -> Tensor {
    by_hand(
        &[latents],
        || (places.cut::<T>(latents), ()),
        move |(), grad_output| vec![places.join::<T>(grad_output)],
    )
}

fn join_of<T: Element>(tokens: &Tensor, places: Places) -> Tensor {
    by_hand(
        &[tokens],
        || (places.join::<T>(tokens), ()),
        move |(), grad_output| vec![places.cut::<T>(grad_output)],
    )
}

/// Where each number stands in latents and in tokens.
#[derive(Clone, Copy)]
struct Places {
    batch: usize,
    channels: usize,
    /// Tokens along frames, rows and columns.
    grid: [usize; 3],
    patch: [usize; 3],
    /// From a feature to that of the next channel, frame, row and column.
    strides: [usize; 4],
}

impl Places {
    fn new(batch: i64, channels: i64, grid: [i64; 3], patch: Patch, order: FeatureOrder) -> Self {
        let (batch, channels) = (batch as usize, channels as usize);
        let (grid, patch) = (grid.map(|tokens| tokens as usize), patch.map(|side| side as usize));
        let [pt, ph, pw] = patch;
        let strides = match order {
            FeatureOrder::ChannelFirst => [pt * ph * pw, ph * pw, pw, 1],
            FeatureOrder::ChannelLast => [1, ph * pw * channels, pw * channels, channels],
        };
        Places { batch, channels, grid, patch, strides }
    }

    fn features(&self) -> usize {
        self.channels * self.patch.iter().product::<usize>()
    }

    fn cut<T: Element>(&self, latents: &Tensor) -> Tensor {
        let latents = latents.detach().contiguous();
        let tokens = [self.batch, self.grid.iter().product(), self.features()];
        let mut cut = Tensor::empty(tokens.map(|size| size as i64), (T::KIND, latents.device()));
        let (from, into): (&[T], &mut [T]) = (elements(&latents), elements_mut(&mut cut));
        self.rows(|in_latents, in_tokens, feature| {
            self.spread(&from[in_latents], &mut into[in_tokens], feature)
        });
        cut
    }

    fn join<T: Element>(&self, tokens: &Tensor) -> Tensor {
        let tokens = tokens.detach().contiguous();
        let ([frames, rows, columns], [pt, ph, pw]) = (self.grid, self.patch);
        let latents = [self.batch, self.channels, frames * pt, rows * ph, columns * pw];
        let mut joined = Tensor::empty(latents.map(|size| size as i64), (T::KIND, tokens.device()));
        let (from, into): (&[T], &mut [T]) = (elements(&tokens), elements_mut(&mut joined));
        self.rows(|in_latents, in_tokens, feature| {
            self.collect(&from[in_tokens], &mut into[in_latents], feature)
        });
        joined
    }

    /// Visits rows of latents: where they lie, in which tokens, and the first feature there. A row
    /// of tokens, which fits into a cache, comes as a whole.
    #[inline(always)]
    fn rows(&self, mut visit: impl FnMut(Range<usize>, Range<usize>, usize)) {
        let ([frames, rows, columns], [pt, ph, pw]) = (self.grid, self.patch);
        let [to_channel, to_frame, to_row, _] = self.strides;
        let (height, width, row_features) = (rows * ph, columns * pw, columns * self.features());
        for (row_of_tokens, channel) in pairs(self.batch * frames * rows, self.channels) {
            let (sample, frame, row) = (
                row_of_tokens / rows / frames,
                row_of_tokens / rows % frames,
                row_of_tokens % rows,
            );
            for (dt, dh) in pairs(pt, ph) {
                let plane = (sample * self.channels + channel) * frames * pt + frame * pt + dt;
                let (in_latents, in_tokens) =
                    ((plane * height + row * ph + dh) * width, row_of_tokens * row_features);
                let feature = channel * to_channel + dt * to_frame + dh * to_row;
                visit(in_latents..in_latents + width, in_tokens..in_tokens + row_features, feature);
            }
        }
    }

    /// A row of latents to its tokens, a run of neighbouring columns to each. Two that stay
    /// neighbours, as in nearly all models, move as one.
    #[inline(always)]
    fn spread<T: Copy>(&self, row: &[T], tokens: &mut [T], feature: usize) {
        let ([.., pw], [.., stride]) = (self.patch, self.strides);
        let tokens = tokens.chunks_exact_mut(self.features()).map(|token| &mut token[feature..]);
        match (pw, stride) {
            (2, 1) => tokens
                .zip(row.as_chunks::<2>().0)
                .for_each(|(token, run)| token[..2].copy_from_slice(run)),
            _ => tokens.zip(row.chunks_exact(pw)).for_each(|(token, run)| {
                token
                    .iter_mut()
                    .step_by(stride)
                    .zip(run)
                    .for_each(|(feature, number)| *feature = *number);
            }),
        }
    }

    /// The reverse of [`spread`](Self::spread).
    #[inline(always)]
    fn collect<T: Copy>(&self, tokens: &[T], row: &mut [T], feature: usize) {
        let ([.., pw], [.., stride]) = (self.patch, self.strides);
        let tokens = tokens.chunks_exact(self.features()).map(|token| &token[feature..]);
        match (pw, stride) {
            (2, 1) => tokens
                .zip(row.as_chunks_mut::<2>().0)
                .for_each(|(token, run)| run.copy_from_slice(&token[..2])),
            _ => tokens.zip(row.chunks_exact_mut(pw)).for_each(|(token, run)| {
                run.iter_mut()
                    .zip(token.iter().step_by(stride))
                    .for_each(|(number, feature)| *number = *feature);
            }),
        }
    }
}

fn pairs(outer: usize, inner: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..outer).flat_map(move |first| (0..inner).map(move |second| (first, second)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;
    use crate::nn::patches;

    const GRID: [i64; 3] = [2, 3, 4];

    fn check(patch: Patch, kind: Kind, tolerance: f64) {
        let [frames, rows, columns] = std::array::from_fn(|axis| GRID[axis] * patch[axis]);
        let latents = draw(&[2, 5, frames, rows, columns], kind, 0);
        agree(
            &[latents],
            tolerance,
            |inputs| cut(&inputs[0], patch).unwrap(),
            |inputs| patches::cut(&inputs[0], patch),
        );
        let tokens = draw(&[2, GRID.iter().product(), 5 * patch.iter().product::<i64>()], kind, 1);
        for order in [FeatureOrder::ChannelFirst, FeatureOrder::ChannelLast] {
            let by_hand = |inputs: &[Tensor]| join(&inputs[0], patch, GRID, order).unwrap();
            agree(&[tokens.shallow_clone()], tolerance, by_hand, |inputs| {
                patches::join(&inputs[0], patch, GRID, order)
            });
        }
    }

    #[test]
    fn each_number_moves_as_libtorch_moves_it_and_its_gradient_back() {
        for patch in [[2, 3, 2], [1, 2, 3], [1, 1, 1]] {
            check(patch, Kind::Float, 0.0);
            // Gradients are drawn in the kind itself.
            check(patch, Kind::BFloat16, 4e-3);
        }
    }
}
