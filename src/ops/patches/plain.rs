//! Patches cut and joined by permuted views.

use tch::Tensor;

use super::{Cut, FeatureOrder, Join, grid};

pub fn cut(Cut { patch }: Cut, latents: &Tensor) -> Tensor {
    let (batch, channels) = (latents.size()[0], latents.size()[1]);
    let ([frames, rows, columns], [pt, ph, pw]) = (grid(latents, patch), patch);
    let blocks = latents.reshape([batch, channels, frames, pt, rows, ph, columns, pw]);
    blocks.permute([0, 2, 4, 6, 1, 3, 5, 7]).reshape([
        batch,
        frames * rows * columns,
        channels * pt * ph * pw,
    ])
}

pub fn join(Join { patch, grid, order }: Join, tokens: &Tensor) -> Tensor {
    let (batch, _, features) = tokens.size3().expect("[B, L, C · pt · ph · pw]");
    let ([frames, rows, columns], [pt, ph, pw]) = (grid, patch);
    let channels = features / (pt * ph * pw);
    let blocks = match order {
        FeatureOrder::ChannelFirst => {
            let cut = tokens.reshape([batch, frames, rows, columns, channels, pt, ph, pw]);
            cut.permute([0, 4, 1, 5, 2, 6, 3, 7])
        }
        FeatureOrder::ChannelLast => {
            let cut = tokens.reshape([batch, frames, rows, columns, pt, ph, pw, channels]);
            cut.permute([0, 7, 1, 4, 2, 5, 3, 6])
        }
    };
    blocks.reshape([batch, channels, frames * pt, rows * ph, columns * pw])
}
