//! The encoders of T5 1.1, for FLUX.1, of ByT5, which has the same class, for HunyuanVideo 1.5, and
//! of UMT5, for Wan.
//!
//! Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, whose attention adds a learned bias
//! for each distance and does not scale its scores; Shazeer 2020, arXiv:2002.05202, for the MLP.

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::layers::{Embedding, GatedMlp};
use super::{Depth, Design, MOST_LAYERS, MOST_TOKENS, MOST_WIDTH, Network, Sizes};
use crate::nn::attention::attend_unscaled;
use crate::nn::norm::RmsNorm;
use crate::nn::{Builder, Linear, Nonlinearity, ParamSet, Rows, Views};
use crate::ops::Rounding;
use crate::published::Names;
use crate::settings::{above, choice, settings};

choice! {
    /// The MLP of a T5.
    pub enum FeedForward {
        /// T5 1.1's: one map through GELU gates another.
        "gated-gelu" => GatedGelu,
        /// The first T5's, which is not supported.
        "relu" => Relu,
    }
}

settings! {
    /// The fields of a T5EncoderModel's `config.json`, with the class's defaults.
    pub struct T5 {
        /// Number of different tokens.
        pub vocab_size: i64 = 32_128, in 1..=MOST_TOKENS;
        /// Features of a state.
        pub d_model: i64 = 512, in 1..=MOST_WIDTH;
        /// Features of a head.
        pub d_kv: i64 = 64, in 1..=MOST_WIDTH;
        /// Features within the MLP.
        pub d_ff: i64 = 2048, in 1..=MOST_WIDTH;
        /// Number of layers.
        pub num_layers: i64 = 6, in 1..=MOST_LAYERS;
        /// Heads of an attention.
        pub num_heads: i64 = 8, in 1..=MOST_WIDTH;
        /// Distances with a bias of their own.
        pub relative_attention_num_buckets: i64 = 32, in 4..=MOST_WIDTH;
        /// The distance from which on the bias is the same.
        pub relative_attention_max_distance: i64 = 128, in 2..=MOST_TOKENS;
        /// Added to mean squares.
        pub layer_norm_epsilon: f64 = 1e-6, in above(0.0);
        /// The MLP.
        pub feed_forward_proj: FeedForward = FeedForward::Relu;
    }
}

settings! {
    /// The fields of a UMT5EncoderModel's `config.json`, with the class's defaults.
    pub struct Umt5 {
        /// Number of different tokens.
        pub vocab_size: i64 = 250_112, in 1..=MOST_TOKENS;
        /// Features of a state.
        pub d_model: i64 = 512, in 1..=MOST_WIDTH;
        /// Features of a head.
        pub d_kv: i64 = 64, in 1..=MOST_WIDTH;
        /// Features within the MLP.
        pub d_ff: i64 = 1024, in 1..=MOST_WIDTH;
        /// Number of layers.
        pub num_layers: i64 = 8, in 1..=MOST_LAYERS;
        /// Heads of an attention.
        pub num_heads: i64 = 6, in 1..=MOST_WIDTH;
        /// Distances with a bias of their own.
        pub relative_attention_num_buckets: i64 = 32, in 4..=MOST_WIDTH;
        /// The distance from which on the bias is the same.
        pub relative_attention_max_distance: i64 = 128, in 2..=MOST_TOKENS;
        /// Added to mean squares.
        pub layer_norm_epsilon: f64 = 1e-6, in above(0.0);
        /// The MLP.
        pub feed_forward_proj: FeedForward = FeedForward::GatedGelu;
    }
}

/// Both classes' sizes.
#[derive(Clone, Copy, Debug)]
struct Shape {
    vocabulary: i64,
    width: i64,
    head_width: i64,
    hidden: i64,
    layers: i64,
    num_heads: i64,
    distances: Distances,
    epsilon: f64,
    feed_forward: FeedForward,
    /// True if each layer has biases of its own, false if all have those of the first.
    has_own_biases: bool,
}

macro_rules! design {
    ($class:ident, $has_own_biases:literal) => {
        impl $class {
            fn shape(&self) -> Shape {
                Shape {
                    vocabulary: self.vocab_size,
                    width: self.d_model,
                    head_width: self.d_kv,
                    hidden: self.d_ff,
                    layers: self.num_layers,
                    num_heads: self.num_heads,
                    distances: Distances {
                        buckets: self.relative_attention_num_buckets,
                        longest: self.relative_attention_max_distance,
                    },
                    epsilon: self.layer_norm_epsilon,
                    feed_forward: self.feed_forward_proj,
                    has_own_biases: $has_own_biases,
                }
            }
        }

        impl Design for $class {
            fn check(&self) -> Result<(), String> {
                self.shape().check()
            }

            fn sizes(&self) -> Sizes {
                self.shape().sizes()
            }

            fn names(&self) -> Names {
                NAMES
            }

            fn network(&self, depth: Depth) -> Box<dyn Network> {
                Box::new(Encoder::new(self.shape(), depth))
            }
        }
    };
}

design!(T5, false);
design!(Umt5, true);

/// Files hold the embedding under one of two names or under both; whole T5s hold a decoder, too.
const NAMES: Names = Names {
    prefixes: &[""],
    first: "encoder.final_layer_norm.weight",
    others: &[("shared.weight", "encoder.embed_tokens.weight")],
    unused: &["encoder.embed_tokens.", "decoder.", "lm_head."],
};

impl Shape {
    fn check(&self) -> Result<(), String> {
        if self.feed_forward != FeedForward::GatedGelu {
            return Err("feed_forward_proj: only \"gated-gelu\" is supported, T5 1.1's".into());
        }
        self.distances.check()
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            layers: self.layers as usize,
            width: self.width,
            vocabulary: self.vocabulary,
            longest: None,
        }
    }
}

/// Distances between tokens, in buckets of which each has a bias.
#[derive(Clone, Copy, Debug)]
struct Distances {
    buckets: i64,
    longest: i64,
}

impl Distances {
    /// Distances on either side whose bucket is theirs alone.
    fn exact(self) -> i64 {
        self.buckets / 4
    }

    fn check(self) -> Result<(), String> {
        let (longest, exact) = (self.longest, self.exact());
        match longest > exact {
            true => Ok(()),
            false => Err(format!(
                "relative_attention_max_distance: {longest} must be above a quarter of \
                 relative_attention_num_buckets, {exact}"
            )),
        }
    }

    /// The bucket of each key for each query, `[L, L]`: half of them for keys behind the query;
    /// near distances have one each, farther ones share them by their logarithm.
    fn of_places(self, length: i64, device: Device) -> Tensor {
        let places = Tensor::arange(length, (Kind::Int64, device));
        let ahead = places.unsqueeze(0) - places.unsqueeze(1);
        let (side, exact) = (self.buckets / 2, self.exact());
        let distance = ahead.abs();
        let rise = (distance.to_kind(Kind::Float) / exact as f64).log()
            / (self.longest as f64 / exact as f64).ln()
            * (side - exact) as f64;
        let far = (rise.to_kind(Kind::Int64) + exact).clamp_max(side - 1);
        let bucket = distance.where_self(&distance.lt(exact), &far);
        bucket + ahead.gt(0).to_kind(Kind::Int64) * side
    }
}

#[derive(Clone, Copy, Debug)]
struct Layer {
    attention_norm: RmsNorm,
    /// Query, key, value.
    inputs: [Linear; 3],
    output: Linear,
    /// The bias of each bucket and head.
    biases: Option<Embedding>,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
    num_heads: i64,
}

impl Layer {
    fn new(builder: &mut Builder<'_>, shape: &Shape, has_biases: bool) -> Self {
        let (width, num_heads) = (shape.width, shape.num_heads);
        let inner = num_heads * shape.head_width;
        let norm = |builder: &mut Builder<'_>| {
            RmsNorm::new(builder, width, shape.epsilon, Rounding::EachStep)
        };
        let mut attention = builder.at("layer.0.SelfAttention");
        let inputs = ["q", "k", "v"]
            .map(|name| Linear::pytorch(&mut attention.at(name), width, inner, false));
        let output = Linear::pytorch(&mut attention.at("o"), inner, width, false);
        let (name, buckets) = ("relative_attention_bias", shape.distances.buckets);
        let biases =
            has_biases.then(|| Embedding::new(&mut attention.at(name), buckets, num_heads));
        let attention_norm = norm(&mut builder.at("layer.0.layer_norm"));
        let mlp = GatedMlp::new(
            &mut builder.at("layer.1.DenseReluDense"),
            ["wi_0", "wi_1", "wo"],
            [width, shape.hidden],
            Nonlinearity::GeluTanhInSteps,
        );
        let mlp_norm = norm(&mut builder.at("layer.1.layer_norm"));
        Layer { attention_norm, inputs, output, biases, mlp_norm, mlp, num_heads }
    }

    /// # Shapes
    /// `x`: `[B, L, D]`; `bias`: `[1 or B, N, L, L]`, added to the scores. Returns the shape of
    /// `x`.
    fn forward(&self, params: &Views, x: &Tensor, bias: &Tensor) -> Tensor {
        let normed = self.attention_norm.forward(params, x);
        let [query, key, value] = self
            .inputs
            .map(|linear| linear.forward(params, &normed).unflatten(-1, [self.num_heads, -1]));
        let attended = attend_unscaled(&query, &key, &value, bias);
        let x = x + self.output.forward(params, &attended);
        let mlp = self.mlp.forward(params, &self.mlp_norm.forward(params, &x));
        x + mlp
    }
}

#[derive(Debug)]
struct Encoder {
    shape: Shape,
    params: ParamSet,
    tokens: Embedding,
    layers: Vec<Layer>,
    norm: Option<RmsNorm>,
}

impl Encoder {
    fn new(shape: Shape, depth: Depth) -> Self {
        let mut params = ParamSet::new("text encoder");
        let mut builder = Builder::new(&mut params, "", Rows::Text);
        let tokens = Embedding::new(&mut builder.at("shared"), shape.vocabulary, shape.width);
        let layer = |index| {
            let has_biases = index == 0 || shape.has_own_biases;
            Layer::new(&mut builder.at(&format!("encoder.block.{index}")), &shape, has_biases)
        };
        let layers = (0..depth.layers).map(layer).collect();
        let norm = depth.is_normed.then(|| {
            let mut builder = builder.at("encoder.final_layer_norm");
            RmsNorm::new(&mut builder, shape.width, shape.epsilon, Rounding::EachStep)
        });
        Encoder { shape, params, tokens, layers, norm }
    }
}

impl Network for Encoder {
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
        let buckets = self.shape.distances.of_places(ids.size()[1], ids.device());
        let mut states = self.tokens.forward(params, ids);
        let mut bias = None;
        each(0, &states);
        for (index, layer) in self.layers.iter().enumerate() {
            let own = layer.biases.map(|biases| biases.forward(params, &buckets));
            bias = own.map(|own| bias_of(&own, mask)).or(bias);
            let bias = bias.as_ref().expect("the first layer has biases");
            states = layer.forward(params, &states, bias);
            each(index + 1, &states);
        }
        self.norm.map_or(states.shallow_clone(), |norm| norm.forward(params, &states))
    }
}

/// The biases of scores, with the least number of their kind in the place of padding. A text of
/// nothing but padding thereby attends to all of it alike, as in transformers.
///
/// # Shapes
/// `biases`: `[L, L, N]`; `mask`: boolean `[B, L]`. Returns `[1 or B, N, L, L]`.
fn bias_of(biases: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let biases = biases.permute([2, 0, 1]).unsqueeze(0);
    let Some(mask) = mask else { return biases.contiguous() };
    let least = match biases.kind() {
        Kind::BFloat16 => bf16::MIN.to_f64(),
        _ => f64::from(f32::MIN),
    };
    biases.where_scalarother(&mask.unsqueeze(1).unsqueeze(1), least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_distances_have_a_bucket_each_and_farther_ones_share_them() {
        let distances = Distances { buckets: 32, longest: 128 };
        let buckets = distances.of_places(200, Device::Cpu);
        let found = |query: i64, key: i64| buckets.int64_value(&[query, key]);
        assert_eq!([0, 1, 7].map(|key| found(0, key)), [0, 17, 23]);
        assert_eq!([0, 1, 7].map(|query| found(query, 0)), [0, 1, 7]);
        // 8 + 8 · ln(d / 8) / ln 16, cut off.
        assert_eq!(
            [8, 11, 12, 16, 63, 64, 127, 199].map(|query| found(query, 0)),
            [8, 8, 9, 10, 13, 14, 15, 15]
        );
        assert_eq!(found(3, 199), 31);
    }

    #[test]
    fn a_text_of_padding_attends_to_all_of_it_alike() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let biases = Tensor::arange(9, (kind, Device::Cpu)).view([3, 3, 1]);
            let mask = Tensor::zeros([1, 3], (Kind::Bool, Device::Cpu));
            let softmax = bias_of(&biases, Some(&mask)).softmax(-1, Kind::Float);
            let third = Tensor::full([1, 1, 3, 3], 1.0 / 3.0, (Kind::Float, Device::Cpu));
            assert!(softmax.allclose(&third, 1e-6, 1e-6, false), "{kind:?}");
        }
    }
}
