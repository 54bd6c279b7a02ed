//! Parts that the encoder and the decoder of pictures share.

use tch::Tensor;

use super::Levels;
use crate::nn::attention::attend_by_one_head;
use crate::nn::convolution::Convolution;
use crate::nn::norm::GroupNorm;
use crate::nn::{Builder, Linear, Views};

/// Epsilon of every normalization.
const EPSILON: f64 = 1e-6;

/// The normalization of `channels` in the network's groups.
pub fn norm(builder: &mut Builder<'_>, channels: i64, levels: &Levels) -> GroupNorm {
    GroupNorm::new(builder, channels, levels.groups, EPSILON)
}

/// Two convolutions, added to the input.
#[derive(Debug)]
pub struct Residual {
    norms: [GroupNorm; 2],
    convolutions: [Convolution; 2],
    /// The convolution that the input passes where the channels change.
    shortcut: Option<Convolution>,
}

impl Residual {
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64, levels: &Levels) -> Self {
        let norm1 = norm(&mut builder.at("norm1"), inputs, levels);
        let conv1 = Convolution::new(&mut builder.at("conv1"), inputs, outputs, 3);
        let norm2 = norm(&mut builder.at("norm2"), outputs, levels);
        let conv2 = Convolution::new(&mut builder.at("conv2"), outputs, outputs, 3);
        let shortcut = (inputs != outputs)
            .then(|| Convolution::new(&mut builder.at("conv_shortcut"), inputs, outputs, 1));
        Residual { norms: [norm1, norm2], convolutions: [conv1, conv2], shortcut }
    }

    /// `count` blocks `resnets.0`, …, of which the first changes the channels.
    pub fn several(
        builder: &mut Builder<'_>,
        count: i64,
        inputs: i64,
        outputs: i64,
        levels: &Levels,
    ) -> Vec<Self> {
        let block = |index| {
            let inputs = if index == 0 { inputs } else { outputs };
            Residual::new(&mut builder.at(&format!("resnets.{index}")), inputs, outputs, levels)
        };
        (0..count).map(block).collect()
    }

    /// # Shapes
    /// `x`: `[B, inputs, H, W]`. Returns `[B, outputs, H, W]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let mut convolved = x.shallow_clone();
        for (norm, convolution) in self.norms.iter().zip(&self.convolutions) {
            convolved = convolution.forward(params, &norm.forward(params, &convolved).silu());
        }
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(params, x) + convolved,
            None => x + convolved,
        }
    }
}

/// Attention of every place to all places of a picture, by one head, added to the input.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

impl Attention {
    fn new(builder: &mut Builder<'_>, channels: i64, levels: &Levels) -> Self {
        let norm = norm(&mut builder.at("group_norm"), channels, levels);
        let [query, key, value, output] = ["to_q", "to_k", "to_v", "to_out.0"]
            .map(|name| Linear::pytorch(&mut builder.at(name), channels, channels, true));
        Attention { norm, query, key, value, output }
    }

    /// # Shapes
    /// `x`: `[B, C, H, W]`. Returns the same.
    fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let tokens = self.norm.forward(params, x).flatten(2, 3).transpose(1, 2);
        let [query, key, value] =
            [&self.query, &self.key, &self.value].map(|linear| linear.forward(params, &tokens));
        let attended = attend_by_one_head(&query, &key, &value);
        self.output.forward(params, &attended).transpose(1, 2).reshape(x.size()) + x
    }
}

/// Two residual blocks, perhaps with attention between them.
#[derive(Debug)]
pub struct Middle {
    residuals: [Residual; 2],
    attention: Option<Attention>,
}

impl Middle {
    pub fn new(builder: &mut Builder<'_>, channels: i64, levels: &Levels) -> Self {
        let attention = levels
            .has_attention
            .then(|| Attention::new(&mut builder.at("attentions.0"), channels, levels));
        let residuals = ["resnets.0", "resnets.1"]
            .map(|name| Residual::new(&mut builder.at(name), channels, channels, levels));
        Middle { residuals, attention }
    }

    /// # Shapes
    /// `x`: `[B, C, H, W]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let [first, second] = &self.residuals;
        let mut x = first.forward(params, x);
        if let Some(attention) = &self.attention {
            x = attention.forward(params, &x);
        }
        second.forward(params, &x)
    }
}
