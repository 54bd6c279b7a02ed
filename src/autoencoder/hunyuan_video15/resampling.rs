//! Changes of size: places as channels, and channels as places.

use tch::{Kind, Tensor};

use super::Change;
use crate::nn::convolution::{EdgeConvolution, blocks_to_channels, channels_to_blocks};
use crate::nn::{Builder, Views};
use crate::ops::{FeatureOrder, Patch};

const ORDER: FeatureOrder = FeatureOrder::ChannelLast;
/// Places of one frame, and of two.
const OF_ONE: Patch = [1, 2, 2];
const OF_TWO: Patch = [2, 2, 2];

/// Places in a block of a video's frames behind the first one.
fn block(of_time: bool) -> Patch {
    if of_time { OF_TWO } else { OF_ONE }
}

/// Halves the sides, perhaps the frames behind the first one, too.
#[derive(Debug)]
pub struct Halving {
    convolution: EdgeConvolution,
    change: Change,
}

impl Halving {
    pub fn new(builder: &mut Builder<'_>, inputs: i64, change: Change) -> Self {
        let places = block(change.of_time).iter().product::<i64>();
        let convolution = EdgeConvolution::new(builder, inputs, change.outputs / places);
        Halving { convolution, change }
    }

    /// # Shapes
    /// `x`: `[B, inputs, F, H, W]`, `F` odd if the frames change. Returns `[B, outputs, F or (F +
    /// 1)/2, H/2, W/2]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let Change { outputs, of_time } = self.change;
        let convolved = self.convolution.forward(params, x);
        let smaller = |video: &Tensor, block| blocks_to_channels(video, block, ORDER);
        if !of_time {
            return smaller(&convolved, OF_ONE) + averaged(&smaller(x, OF_ONE), outputs);
        }
        let ([first, later], [x_first, x_later]) = (split(&convolved), split(x));
        // A block of one frame has half the channels, which stand twice.
        let first = smaller(&first, OF_ONE);
        let first =
            Tensor::cat(&[&first, &first], 1) + averaged(&smaller(&x_first, OF_ONE), outputs);
        let later = smaller(&later, OF_TWO) + averaged(&smaller(&x_later, OF_TWO), outputs);
        Tensor::cat(&[first, later], 2)
    }
}

/// Doubles the sides, perhaps the frames behind the first one, too.
#[derive(Debug)]
pub struct Doubling {
    convolution: EdgeConvolution,
    change: Change,
}

impl Doubling {
    pub fn new(builder: &mut Builder<'_>, inputs: i64, change: Change) -> Self {
        let places = block(change.of_time).iter().product::<i64>();
        let convolution = EdgeConvolution::new(builder, inputs, change.outputs * places);
        Doubling { convolution, change }
    }

    /// # Shapes
    /// `x`: `[B, inputs, F, H, W]`. Returns `[B, outputs, F or 2F - 1, 2H, 2W]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let Change { outputs, of_time } = self.change;
        let convolved = self.convolution.forward(params, x);
        let larger = |video: &Tensor, block| channels_to_blocks(video, block, ORDER);
        if !of_time {
            let shortcut = repeated(x, 4 * outputs);
            return larger(&convolved, OF_ONE) + larger(&shortcut, OF_ONE);
        }
        let ([first, later], [x_first, x_later]) = (split(&convolved), split(x));
        // A block of one frame uses half the channels.
        let first = larger(&first, OF_ONE).narrow(1, 0, outputs)
            + repeated(&larger(&x_first, OF_ONE), outputs);
        let later = larger(&later, OF_TWO) + repeated(&larger(&x_later, OF_TWO), outputs);
        Tensor::cat(&[first, later], 2)
    }
}

/// The first frame and those behind it, of which there may be none.
fn split(video: &Tensor) -> [Tensor; 2] {
    [video.narrow(2, 0, 1), video.slice(2, 1i64, None, 1)]
}

/// Averages neighbouring channels, so that `outputs` are left.
pub fn averaged(x: &Tensor, outputs: i64) -> Tensor {
    let group = x.size()[1] / outputs;
    x.unflatten(1, [outputs, group]).mean_dim([2i64].as_slice(), false, None::<Kind>)
}

/// Repeats each channel, so that there are `outputs`.
pub fn repeated(x: &Tensor, outputs: i64) -> Tensor {
    x.repeat_interleave_self_int(outputs / x.size()[1], 1i64, None::<i64>)
}
