//! Parts that several encoders have.

use tch::Tensor;

use super::sight::Sight;
use crate::nn::attention::attend_plainly;
use crate::nn::norm::LayerNorm;
use crate::nn::{Builder, Init, Linear, Mlp, Nonlinearity, Param, Views};
use crate::settings::choice;

choice! {
    /// The nonlinearity of CLIP's and SigLIP's MLPs.
    pub enum MlpActivation {
        /// `x · sigmoid(1.702 · x)`.
        "quick_gelu" => QuickGelu,
        /// GELU.
        "gelu" => Gelu,
        /// GELU's approximation by tanh.
        "gelu_pytorch_tanh" => GeluTanh,
    }
}

impl MlpActivation {
    fn nonlinearity(self) -> Nonlinearity {
        match self {
            MlpActivation::QuickGelu => Nonlinearity::QuickGelu,
            MlpActivation::Gelu => Nonlinearity::Gelu,
            MlpActivation::GeluTanh => Nonlinearity::GeluTanh,
        }
    }
}

/// A vector for each token or place.
#[derive(Clone, Copy, Debug)]
pub struct Embedding {
    weight: Param,
}

impl Embedding {
    /// `weight` `[count, width]`.
    pub fn new(builder: &mut Builder<'_>, count: i64, width: i64) -> Self {
        Embedding { weight: builder.param("weight", &[count, width], Init::Normal { std: 1.0 }) }
    }

    /// # Shapes
    /// `indices`: `[…]` of whole numbers. Returns `[…, width]`.
    pub fn forward(&self, params: &Views, indices: &Tensor) -> Tensor {
        Tensor::embedding(&params[self.weight], indices, -1, false, false)
    }

    /// The vectors of the first `count` places, `[count, width]`.
    pub fn first(&self, params: &Views, count: i64) -> Tensor {
        params[self.weight].narrow(0, 0, count)
    }
}

/// An MLP of which one map gates another: `output(nonlinearity(gate(x)) · input(x))`.
#[derive(Clone, Copy, Debug)]
pub struct GatedMlp {
    gate: Linear,
    input: Linear,
    output: Linear,
    nonlinearity: Nonlinearity,
}

impl GatedMlp {
    /// `names`: those of gate, input and output, none with a bias.
    pub fn new(
        builder: &mut Builder<'_>,
        names: [&str; 3],
        [width, hidden]: [i64; 2],
        nonlinearity: Nonlinearity,
    ) -> Self {
        let mut linear =
            |name, inputs, outputs| Linear::pytorch(&mut builder.at(name), inputs, outputs, false);
        let (gate, input) = (linear(names[0], width, hidden), linear(names[1], width, hidden));
        GatedMlp { gate, input, output: linear(names[2], hidden, width), nonlinearity }
    }

    /// # Shapes
    /// `x`: `[…, width]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let gate = self.nonlinearity.apply(&self.gate.forward(params, x));
        self.output.forward(params, &(gate * self.input.forward(params, x)))
    }
}

/// Sizes of CLIP's and SigLIP's layers.
#[derive(Clone, Copy, Debug)]
pub struct LayerShape {
    pub width: i64,
    pub hidden: i64,
    pub num_heads: i64,
    pub activation: MlpActivation,
    pub epsilon: f64,
}

impl LayerShape {
    /// # Errors
    /// A text that begins with the name of a field.
    pub fn check(&self) -> Result<(), String> {
        heads_of("hidden_size", self.width, self.num_heads).map(drop)
    }
}

/// A layer of CLIP and SigLIP: attention and an MLP, each after a normalization.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    norms: [LayerNorm; 2],
    /// Query, key, value.
    inputs: [Linear; 3],
    output: Linear,
    mlp: Mlp,
    num_heads: i64,
}

impl Layer {
    /// The layers `encoder.layers.0`, ….
    pub fn several(builder: &mut Builder<'_>, shape: LayerShape, count: usize) -> Vec<Self> {
        let layer = |index| Layer::new(&mut builder.at(&format!("encoder.layers.{index}")), shape);
        (0..count).map(layer).collect()
    }

    fn new(builder: &mut Builder<'_>, shape: LayerShape) -> Self {
        let LayerShape { width, hidden, num_heads, activation, epsilon } = shape;
        let norms = ["layer_norm1", "layer_norm2"]
            .map(|name| LayerNorm::new(&mut builder.at(name), width, epsilon));
        let mut attention = builder.at("self_attn");
        let mut linear = |name: &str| Linear::pytorch(&mut attention.at(name), width, width, true);
        let (inputs, output) =
            (["q_proj", "k_proj", "v_proj"].map(&mut linear), linear("out_proj"));
        let nonlinearity = activation.nonlinearity();
        let mlp = Mlp::of_transformers(&mut builder.at("mlp"), [width, hidden], nonlinearity);
        Layer { norms, inputs, output, mlp, num_heads }
    }

    /// # Shapes
    /// `x`: `[B, L, D]`. Returns the same. Without `sight` each token sees all.
    pub fn forward(&self, params: &Views, x: &Tensor, sight: Option<&Sight>) -> Tensor {
        let [attention_norm, mlp_norm] = &self.norms;
        let normed = attention_norm.forward(params, x);
        let [query, key, value] = self
            .inputs
            .map(|linear| linear.forward(params, &normed).unflatten(-1, [self.num_heads, -1]));
        let attended = match sight {
            Some(sight) => sight.attend(&query, &key, &value),
            None => attend_plainly(&query, &key, &value, None),
        };
        let x = x + self.output.forward(params, &attended);
        let mlp = self.mlp.forward(params, &mlp_norm.forward(params, &x));
        x + mlp
    }
}

/// Features of a head, of `width` features in all.
///
/// # Errors
/// A text that begins with `field`.
pub fn heads_of(field: &str, width: i64, num_heads: i64) -> Result<i64, String> {
    match width % num_heads {
        0 => Ok(width / num_heads),
        _ => Err(format!("{field}: {width} is no multiple of num_attention_heads, {num_heads}")),
    }
}
