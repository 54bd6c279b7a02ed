//! Parts that the encoder and the decoder share.

use tch::Tensor;

use crate::nn::attention::attend_by_one_head;
use crate::nn::convolution::{EdgeConvolution, Pointwise};
use crate::nn::norm::ChannelNorm;
use crate::nn::{Builder, Views};

/// Axes behind the channels of a video.
pub const AXES: usize = 3;

/// Two convolutions, added to the input.
#[derive(Debug)]
pub struct Residual {
    norms: [ChannelNorm; 2],
    convolutions: [EdgeConvolution; 2],
    /// The map of each place that the input passes where the channels change.
    shortcut: Option<Pointwise>,
}

impl Residual {
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64) -> Self {
        let norm1 = ChannelNorm::new(&mut builder.at("norm1"), inputs, AXES);
        let conv1 = EdgeConvolution::new(&mut builder.at("conv1.conv"), inputs, outputs);
        let norm2 = ChannelNorm::new(&mut builder.at("norm2"), outputs, AXES);
        let conv2 = EdgeConvolution::new(&mut builder.at("conv2.conv"), outputs, outputs);
        let shortcut = (inputs != outputs)
            .then(|| Pointwise::new(&mut builder.at("conv_shortcut"), inputs, outputs, AXES));
        Residual { norms: [norm1, norm2], convolutions: [conv1, conv2], shortcut }
    }

    /// `count` blocks `resnets.0`, …, of which the first changes the channels.
    pub fn several(builder: &mut Builder<'_>, count: i64, inputs: i64, outputs: i64) -> Vec<Self> {
        let block = |index| {
            let inputs = if index == 0 { inputs } else { outputs };
            Residual::new(&mut builder.at(&format!("resnets.{index}")), inputs, outputs)
        };
        (0..count).map(block).collect()
    }

    /// # Shapes
    /// `x`: `[B, inputs, F, H, W]`. Returns `[B, outputs, F, H, W]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let mut convolved = x.shallow_clone();
        for (norm, convolution) in self.norms.iter().zip(&self.convolutions) {
            convolved = convolution.forward(params, &norm.forward(params, &convolved).silu());
        }
        match &self.shortcut {
            Some(shortcut) => convolved + at_each_place(x, |x| shortcut.forward(params, x)),
            None => convolved + x,
        }
    }
}

/// Applies `map` to channels, as the last axis.
fn at_each_place(x: &Tensor, map: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
    map(&x.movedim_int(1, -1)).movedim_int(-1, 1)
}

/// Attention by one head of every place to all places of its own frame and of those before, added
/// to the input.
#[derive(Debug)]
struct Attention {
    norm: ChannelNorm,
    query: Pointwise,
    key: Pointwise,
    value: Pointwise,
    output: Pointwise,
}

impl Attention {
    fn new(builder: &mut Builder<'_>, channels: i64) -> Self {
        let norm = ChannelNorm::new(&mut builder.at("norm"), channels, AXES);
        let [query, key, value, output] = ["to_q", "to_k", "to_v", "proj_out"]
            .map(|name| Pointwise::new(&mut builder.at(name), channels, channels, AXES));
        Attention { norm, query, key, value, output }
    }

    /// Each frame by itself attends to what it sees, so that no mask over all pairs is made.
    ///
    /// # Shapes
    /// `x`: `[B, C, F, H, W]`. Returns the same.
    fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let (_, _, frames, height, width) = x.size5().expect("[B, C, F, H, W]");
        let (tokens, each) = (self.norm.forward(params, x).flatten(2, 4), height * width);
        let tokens = tokens.transpose(1, 2);
        let [query, key, value] =
            [&self.query, &self.key, &self.value].map(|part| part.forward(params, &tokens));
        let attended = |frame: i64| {
            let seen = (frame + 1) * each;
            let [key, value] = [&key, &value].map(|tokens| tokens.narrow(1, 0, seen));
            attend_by_one_head(&query.narrow(1, frame * each, each), &key, &value)
        };
        let attended: Vec<Tensor> = (0..frames).map(attended).collect();
        let output = self.output.forward(params, &Tensor::cat(&attended, 1));
        output.transpose(1, 2).reshape(x.size()) + x
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
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let [first, second] = &self.residuals;
        second.forward(params, &self.attention.forward(params, &first.forward(params, x)))
    }
}
