//! Parts that the encoder and the decoder share. All take one chunk of a video.

use tch::Tensor;

use crate::nn::attention::attend_by_one_head;
use crate::nn::convolution::{
    CausalConvolution, Convolution, FrameDoubling, FrameHalving, History, Pointwise, doubled,
    each_frame,
};
use crate::nn::norm::ChannelNorm;
use crate::nn::{Builder, Views};

/// Axes behind the channels of a video, and of a picture.
pub const OF_VIDEO: usize = 3;
const OF_PICTURE: usize = 2;

/// A causal convolution of three frames, rows and columns.
pub fn cube(builder: &mut Builder<'_>, inputs: i64, outputs: i64) -> CausalConvolution {
    CausalConvolution::new(builder, inputs, outputs, [3, 3, 3])
}

/// A convolution of every place by itself.
pub fn point(builder: &mut Builder<'_>, inputs: i64, outputs: i64) -> CausalConvolution {
    CausalConvolution::new(builder, inputs, outputs, [1, 1, 1])
}

/// Two convolutions, added to the input.
#[derive(Debug)]
pub struct Residual {
    norms: [ChannelNorm; 2],
    convolutions: [CausalConvolution; 2],
    /// The convolution that the input passes where the channels change.
    shortcut: Option<CausalConvolution>,
}

impl Residual {
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64) -> Self {
        let norm1 = ChannelNorm::new(&mut builder.at("norm1"), inputs, OF_VIDEO);
        let conv1 = cube(&mut builder.at("conv1"), inputs, outputs);
        let norm2 = ChannelNorm::new(&mut builder.at("norm2"), outputs, OF_VIDEO);
        let conv2 = cube(&mut builder.at("conv2"), outputs, outputs);
        let shortcut =
            (inputs != outputs).then(|| point(&mut builder.at("conv_shortcut"), inputs, outputs));
        Residual { norms: [norm1, norm2], convolutions: [conv1, conv2], shortcut }
    }

    /// Blocks of these names, of which the first changes the channels.
    pub fn several(
        builder: &mut Builder<'_>,
        names: impl Iterator<Item = String>,
        inputs: i64,
        outputs: i64,
    ) -> Vec<Self> {
        let block = |(index, name): (usize, String)| {
            let inputs = if index == 0 { inputs } else { outputs };
            Residual::new(&mut builder.at(&name), inputs, outputs)
        };
        names.enumerate().map(block).collect()
    }

    /// # Shapes
    /// `x`: `[B, inputs, F, H, W]`. Returns `[B, outputs, F, H, W]`.
    pub fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let mut convolved = x.shallow_clone();
        for (norm, convolution) in self.norms.iter().zip(&self.convolutions) {
            let ready = norm.forward(params, &convolved).silu();
            convolved = convolution.forward(params, &ready, history);
        }
        match &self.shortcut {
            Some(shortcut) => convolved + shortcut.forward(params, x, history),
            None => convolved + x,
        }
    }
}

/// Attention within each frame of every place to all places, by one head, added to the input.
#[derive(Debug)]
struct Attention {
    norm: ChannelNorm,
    /// Query, key and value.
    input: Pointwise,
    output: Pointwise,
}

impl Attention {
    fn new(builder: &mut Builder<'_>, channels: i64) -> Self {
        let norm = ChannelNorm::new(&mut builder.at("norm"), channels, OF_PICTURE);
        let input = Pointwise::new(&mut builder.at("to_qkv"), channels, 3 * channels, OF_PICTURE);
        let output = Pointwise::new(&mut builder.at("proj"), channels, channels, OF_PICTURE);
        Attention { norm, input, output }
    }

    /// # Shapes
    /// `x`: `[B, C, F, H, W]`. Returns the same.
    fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let within_frames = |frames: &Tensor| {
            let tokens = self.norm.forward(params, frames).flatten(2, 3).transpose(1, 2);
            let parts = self.input.forward(params, &tokens).chunk(3, -1);
            let attended = attend_by_one_head(&parts[0], &parts[1], &parts[2]);
            self.output.forward(params, &attended).transpose(1, 2).reshape(frames.size())
        };
        each_frame(x, within_frames) + x
    }
}

/// Two residual blocks with attention between them.
#[derive(Debug)]
pub struct Middle {
    residuals: [Residual; 2],
    attention: Attention,
}

impl Middle {
    pub fn new(builder: &mut Builder<'_>, channels: i64) -> Self {
        let attention = Attention::new(&mut builder.at("attentions.0"), channels);
        let residuals = ["resnets.0", "resnets.1"]
            .map(|name| Residual::new(&mut builder.at(name), channels, channels));
        Middle { residuals, attention }
    }

    /// # Shapes
    /// `x`: `[B, C, F, H, W]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let [first, second] = &self.residuals;
        let x = self.attention.forward(params, &first.forward(params, x, history));
        second.forward(params, &x, history)
    }
}

/// Halves the sides, perhaps the frames, too.
#[derive(Debug)]
pub struct Halving {
    space: Convolution,
    time: Option<FrameHalving>,
}

impl Halving {
    pub fn new(builder: &mut Builder<'_>, channels: i64, halves_time: bool) -> Self {
        let space = Convolution::new(&mut builder.at("resample.1"), channels, channels, 3);
        let time = halves_time.then(|| FrameHalving::new(&mut builder.at("time_conv"), channels));
        Halving { space, time }
    }

    /// # Shapes
    /// `x`: `[B, C, F, H, W]`. Returns `[B, C, F or F/2, H/2, W/2]`.
    pub fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let smaller = each_frame(x, |frames| self.space.halve(params, frames));
        match &self.time {
            Some(time) => time.forward(params, &smaller, history),
            None => smaller,
        }
    }
}

/// Doubles the sides, perhaps the frames, too.
#[derive(Debug)]
pub struct Doubling {
    time: Option<FrameDoubling>,
    space: Convolution,
}

impl Doubling {
    pub fn new(builder: &mut Builder<'_>, [inputs, outputs]: [i64; 2], doubles_time: bool) -> Self {
        let time = doubles_time.then(|| FrameDoubling::new(&mut builder.at("time_conv"), inputs));
        let space = Convolution::new(&mut builder.at("resample.1"), inputs, outputs, 3);
        Doubling { time, space }
    }

    /// # Shapes
    /// `x`: `[B, inputs, F, H, W]`. Returns `[B, outputs, F or 2F, 2H, 2W]`.
    pub fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let larger = |frames: &Tensor| self.space.forward(params, &doubled(frames));
        match &self.time {
            Some(time) => each_frame(&time.forward(params, x, history), larger),
            None => each_frame(x, larger),
        }
    }
}
