//! The network of decoders, as encoders: each token sees itself and those before.

use tch::{Device, Kind, Tensor};

use super::layers::{Embedding, GatedMlp};
use super::sight::Sight;
use super::{Depth, Network, Sizes};
use crate::nn::norm::RmsNorm;
use crate::nn::rope::{self, Axis};
use crate::nn::{Builder, Linear, Nonlinearity, ParamSet, Rows, Views};
use crate::ops::Rounding;
use crate::settings::choice;

choice! {
    /// The nonlinearity of a decoder's MLP.
    pub enum Activation {
        /// SiLU.
        "silu" => Silu,
    }
}

choice! {
    /// The angles by which places rotate queries and keys.
    pub enum Rope {
        /// Powers of `rope_theta`.
        "default" => Default,
        /// The same for texts: sections of the angles count rows and columns of pictures.
        "mrope" => Multimodal,
    }
}

/// Sizes of a decoder.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub vocabulary: i64,
    pub width: i64,
    /// Features within the MLP.
    pub hidden: i64,
    pub layers: i64,
    pub num_heads: i64,
    /// Heads of keys and values, each of which several heads of queries share.
    pub num_kv_heads: i64,
    pub head_width: i64,
    pub epsilon: f64,
    pub theta: f64,
    /// Tokens that each token sees, itself included; `None` for all before.
    pub window: Option<i64>,
    /// True if queries, keys and values have biases.
    pub has_input_biases: bool,
    pub has_output_bias: bool,
    /// True if each head's queries and keys are normalized.
    pub norms_heads: bool,
}

impl Shape {
    /// # Errors
    /// A text that begins with the name of a field.
    pub fn check(&self) -> Result<(), String> {
        let (heads, shared) = (self.num_heads, self.num_kv_heads);
        if heads % shared != 0 {
            return Err(format!(
                "num_attention_heads: {heads} is no multiple of num_key_value_heads, {shared}"
            ));
        }
        match self.head_width % 2 {
            0 => Ok(()),
            _ => Err(format!(
                "head_dim: {} is odd, and features are rotated in pairs",
                self.head_width
            )),
        }
    }

    pub fn sizes(&self) -> Sizes {
        Sizes {
            layers: self.layers as usize,
            width: self.width,
            vocabulary: self.vocabulary,
            longest: None,
        }
    }

    /// The rotations of the places `0..length`, `[L, 1, E/2]`, rounded to `kind` as transformers
    /// rounds them.
    fn rotations(&self, length: i64, kind: Kind, device: Device) -> Tensor {
        let axis = Axis { width: self.head_width, theta: self.theta, kind: Kind::Float };
        rope::table_rounded(&axis.angles_to(length, device), kind)
    }
}

/// Attention whose keys and values are shared by groups of heads.
#[derive(Clone, Copy, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Those of queries and keys.
    norms: Option<[RmsNorm; 2]>,
    head_width: i64,
    /// Heads of queries for each head of keys.
    group: i64,
}

impl Attention {
    fn new(builder: &mut Builder<'_>, shape: &Shape) -> Self {
        let [queries, keys] =
            [shape.num_heads, shape.num_kv_heads].map(|heads| heads * shape.head_width);
        let mut linear = |name, inputs, outputs, with_bias| {
            Linear::pytorch(&mut builder.at(name), inputs, outputs, with_bias)
        };
        let query = linear("q_proj", shape.width, queries, shape.has_input_biases);
        let key = linear("k_proj", shape.width, keys, shape.has_input_biases);
        let value = linear("v_proj", shape.width, keys, shape.has_input_biases);
        let output = linear("o_proj", queries, shape.width, shape.has_output_bias);
        let norms = shape.norms_heads.then(|| {
            ["q_norm", "k_norm"].map(|name| norm(&mut builder.at(name), shape.head_width, shape))
        });
        let group = shape.num_heads / shape.num_kv_heads;
        Attention { query, key, value, output, norms, head_width: shape.head_width, group }
    }

    fn forward(&self, params: &Views, x: &Tensor, table: &Tensor, sight: &Sight) -> Tensor {
        let heads =
            |linear: &Linear| linear.forward(params, x).unflatten(-1, [-1, self.head_width]);
        let [mut query, mut key] = [&self.query, &self.key].map(heads);
        if let Some([query_norm, key_norm]) = &self.norms {
            (query, key) = (query_norm.forward(params, &query), key_norm.forward(params, &key));
        }
        let [query, key] = [query, key].map(|x| rope::rotate_halves(&x, table));
        let [key, value] = [key, heads(&self.value)].map(|x| self.for_each_query(x));
        self.output.forward(params, &sight.attend(&query, &key, &value))
    }

    /// Keys or values `[B, L, N/group, E]` as `[B, L, N, E]`.
    fn for_each_query(&self, heads: Tensor) -> Tensor {
        if self.group == 1 { heads } else { heads.repeat_interleave_self_int(self.group, 2, None) }
    }
}

fn norm(builder: &mut Builder<'_>, width: i64, shape: &Shape) -> RmsNorm {
    RmsNorm::new(builder, width, shape.epsilon, Rounding::EachStep)
}

/// A layer: attention and an MLP, each after a normalization.
#[derive(Clone, Copy, Debug)]
struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl Layer {
    fn new(builder: &mut Builder<'_>, shape: &Shape) -> Self {
        let names = ["gate_proj", "up_proj", "down_proj"];
        let widths = [shape.width, shape.hidden];
        Layer {
            attention_norm: norm(&mut builder.at("input_layernorm"), shape.width, shape),
            attention: Attention::new(&mut builder.at("self_attn"), shape),
            mlp_norm: norm(&mut builder.at("post_attention_layernorm"), shape.width, shape),
            mlp: GatedMlp::new(&mut builder.at("mlp"), names, widths, Nonlinearity::Silu),
        }
    }

    fn forward(&self, params: &Views, x: &Tensor, table: &Tensor, sight: &Sight) -> Tensor {
        let normed = self.attention_norm.forward(params, x);
        let x = x + self.attention.forward(params, &normed, table, sight);
        let mlp = self.mlp.forward(params, &self.mlp_norm.forward(params, &x));
        x + mlp
    }
}

/// A decoder down to a depth, without its head.
#[derive(Debug)]
pub struct Decoder {
    shape: Shape,
    params: ParamSet,
    tokens: Embedding,
    layers: Vec<Layer>,
    norm: Option<RmsNorm>,
}

impl Decoder {
    pub fn new(shape: Shape, depth: Depth) -> Self {
        let mut params = ParamSet::new("text encoder");
        let mut builder = Builder::new(&mut params, "", Rows::Text);
        let tokens = Embedding::new(&mut builder.at("embed_tokens"), shape.vocabulary, shape.width);
        let layer = |index| Layer::new(&mut builder.at(&format!("layers.{index}")), &shape);
        let layers = (0..depth.layers).map(layer).collect();
        let norm = depth.is_normed.then(|| norm(&mut builder.at("norm"), shape.width, &shape));
        Decoder { shape, params, tokens, layers, norm }
    }
}

impl Network for Decoder {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(
        &self,
        params: &Views,
        ids: &Tensor,
        mask: Option<&Tensor>,
        each: &mut dyn FnMut(usize, &Tensor),
    ) -> Tensor {
        let (length, device) = (ids.size()[1], ids.device());
        let sight = Sight::causal(length, mask, self.shape.window, device);
        let mut states = self.tokens.forward(params, ids);
        let table = self.shape.rotations(length, states.kind(), device);
        each(0, &states);
        for (index, layer) in self.layers.iter().enumerate() {
            states = layer.forward(params, &states, &table, &sight);
            each(index + 1, &states);
        }
        self.norm.map_or(states.shallow_clone(), |norm| norm.forward(params, &states))
    }
}
