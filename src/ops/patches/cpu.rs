//! Patches cut and joined in one pass over a CPU's memory.

use std::ops::Range;

use half::bf16;
use tch::{Kind, Tensor};

use super::Places;
use crate::tensor::{Element, elements, elements_mut};

/// Tokens of latents.
pub fn cut(latents: &Tensor, places: Places) -> Tensor {
    match latents.kind() {
        Kind::BFloat16 => places.cut::<bf16>(latents),
        _ => places.cut::<f32>(latents),
    }
}

/// Latents of tokens.
pub fn join(tokens: &Tensor, places: Places) -> Tensor {
    match tokens.kind() {
        Kind::BFloat16 => places.join::<bf16>(tokens),
        _ => places.join::<f32>(tokens),
    }
}

impl Places {
    fn cut<T: Element>(&self, latents: &Tensor) -> Tensor {
        let mut cut = Tensor::empty(self.shape_of_tokens(), (T::KIND, latents.device()));
        let (from, into): (&[T], &mut [T]) = (elements(latents), elements_mut(&mut cut));
        self.rows(|in_latents, in_tokens, feature| {
            self.spread(&from[in_latents], &mut into[in_tokens], feature)
        });
        cut
    }

    fn join<T: Element>(&self, tokens: &Tensor) -> Tensor {
        let mut joined = Tensor::empty(self.shape_of_latents(), (T::KIND, tokens.device()));
        let (from, into): (&[T], &mut [T]) = (elements(tokens), elements_mut(&mut joined));
        self.rows(|in_latents, in_tokens, feature| {
            self.collect(&from[in_tokens], &mut into[in_latents], feature)
        });
        joined
    }

    /// Visits each row of latents with its range, the range of its tokens, and its first feature in
    /// them. A row of tokens, which fits into a cache, comes as a whole.
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

    /// Moves a row of latents to its tokens, a run of neighbouring columns to each. Two that stay
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
