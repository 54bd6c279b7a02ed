//! Shortcuts around a whole size, without parameters: places as channels that are averaged on the
//! way to latents, channels that are repeated and made places on the way back.

use tch::{Kind, Tensor};

use crate::nn::convolution::{History, blocks_to_channels, channels_to_blocks};
use crate::ops::{FeatureOrder, Patch};

/// The way to smaller sizes.
#[derive(Debug)]
pub struct Averaged {
    outputs: i64,
    block: Patch,
}

impl Averaged {
    pub fn new(outputs: i64, block: Patch) -> Self {
        Averaged { outputs, block }
    }

    /// # Errors
    /// A text, if groups of equal size do not give the outputs.
    pub fn check(inputs: i64, outputs: i64, block: Patch) -> Result<(), String> {
        let places = block.iter().product::<i64>();
        if inputs * places % outputs == 0 {
            return Ok(());
        }
        Err(format!(
            "dim_mult: {inputs} channels in blocks of {places} cannot be averaged to {outputs}"
        ))
    }

    /// # Shapes
    /// `x`: `[B, C, F, H, W]`. Zeros stand before a chunk whose frames do not fill a block. Returns
    /// `[B, outputs, ⌈F/t⌉, H/h, W/w]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let [time, _, _] = self.block;
        let missing = (-x.size()[2]).rem_euclid(time);
        let filled = x.constant_pad_nd([0i64, 0, 0, 0, missing, 0]);
        let channels = blocks_to_channels(&filled, self.block, FeatureOrder::ChannelFirst);
        let group = channels.size()[1] / self.outputs;
        channels.unflatten(1, [self.outputs, group]).mean_dim(
            [2i64].as_slice(),
            false,
            None::<Kind>,
        )
    }
}

/// The way to larger sizes.
#[derive(Debug)]
pub struct Repeated {
    times: i64,
    block: Patch,
}

impl Repeated {
    pub fn new(inputs: i64, outputs: i64, block: Patch) -> Self {
        Repeated { times: outputs * block.iter().product::<i64>() / inputs, block }
    }

    /// # Errors
    /// A text, if equal numbers of copies do not give the outputs.
    pub fn check(inputs: i64, outputs: i64, block: Patch) -> Result<(), String> {
        let places = block.iter().product::<i64>();
        if outputs * places % inputs == 0 {
            return Ok(());
        }
        Err(format!(
            "dim_mult: {inputs} channels cannot be repeated to {outputs} in blocks of {places}"
        ))
    }

    /// # Shapes
    /// `x`: `[B, C, F, H, W]`. Returns `[B, outputs, t · F, h · H, w · W]`; of the first chunk
    /// without the frames that come before the last one of a block.
    pub fn forward(&self, x: &Tensor, history: &History) -> Tensor {
        let [time, _, _] = self.block;
        let repeated = x.repeat_interleave_self_int(self.times, 1i64, None::<i64>);
        let places = channels_to_blocks(&repeated, self.block, FeatureOrder::ChannelFirst);
        let first = if history.is_in_first_chunk() { time - 1 } else { 0 };
        places.slice(2, first, None, 1)
    }
}
