//! CLIPTextModel: FLUX.1's pooled condition.

use tch::Tensor;

use super::layers::{Embedding, Layer, LayerShape, MlpActivation};
use super::sight::Sight;
use super::{Depth, Design, EndToken, MOST_LAYERS, MOST_TOKENS, MOST_WIDTH, Network, Sizes};
use crate::nn::norm::LayerNorm;
use crate::nn::{Builder, ParamSet, Rows, Views};
use crate::published::Names;
use crate::settings::{above, settings};

/// The end token that configurations before transformers' correction name: the pooled vector is
/// then that of the greatest id.
const FORMER_END: i64 = 2;

settings! {
    /// The fields of a CLIPTextModel's `config.json`, with the class's defaults.
    pub struct Clip {
        /// Number of different tokens.
        pub vocab_size: i64 = 49_408, in 1..=MOST_TOKENS;
        /// Features of a state.
        pub hidden_size: i64 = 512, in 1..=MOST_WIDTH;
        /// Features within the MLP.
        pub intermediate_size: i64 = 2048, in 1..=MOST_WIDTH;
        /// Number of layers.
        pub num_hidden_layers: i64 = 12, in 1..=MOST_LAYERS;
        /// Heads of an attention.
        pub num_attention_heads: i64 = 8, in 1..=MOST_WIDTH;
        /// Places with an embedding: the most tokens of a text.
        pub max_position_embeddings: i64 = 77, in 1..=MOST_TOKENS;
        /// The nonlinearity of the MLP.
        pub hidden_act: MlpActivation = MlpActivation::QuickGelu;
        /// Added to variances.
        pub layer_norm_eps: f64 = 1e-5, in above(0.0);
        /// The token that ends a text.
        pub eos_token_id: i64 = 49_407, in 0..=MOST_TOKENS;
    }
}

impl Clip {
    fn layer_shape(&self) -> LayerShape {
        LayerShape {
            width: self.hidden_size,
            hidden: self.intermediate_size,
            num_heads: self.num_attention_heads,
            activation: self.hidden_act,
            epsilon: self.layer_norm_eps,
        }
    }
}

impl Design for Clip {
    fn check(&self) -> Result<(), String> {
        self.layer_shape().check()
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            layers: self.num_hidden_layers as usize,
            width: self.hidden_size,
            vocabulary: self.vocab_size,
            longest: Some(self.max_position_embeddings),
        }
    }

    fn names(&self) -> Names {
        Names {
            prefixes: &["text_model.", ""],
            first: "embeddings.token_embedding.weight",
            others: &[],
            unused: &["embeddings.position_ids", "text_projection.weight"],
        }
    }

    fn network(&self, depth: Depth) -> Box<dyn Network> {
        Box::new(Encoder::new(self, depth))
    }

    fn norms_last(&self) -> bool {
        false
    }

    fn end_token(&self) -> Option<EndToken> {
        Some(match self.eos_token_id {
            FORMER_END => EndToken::Greatest,
            id => EndToken::Id(id),
        })
    }
}

#[derive(Debug)]
struct Encoder {
    params: ParamSet,
    tokens: Embedding,
    places: Embedding,
    layers: Vec<Layer>,
    norm: Option<LayerNorm>,
}

impl Encoder {
    fn new(clip: &Clip, depth: Depth) -> Self {
        let mut params = ParamSet::new("text encoder");
        let mut builder = Builder::new(&mut params, "", Rows::Text);
        let width = clip.hidden_size;
        let mut embedding = |name, count| Embedding::new(&mut builder.at(name), count, width);
        let tokens = embedding("embeddings.token_embedding", clip.vocab_size);
        let places = embedding("embeddings.position_embedding", clip.max_position_embeddings);
        let layers = Layer::several(&mut builder, clip.layer_shape(), depth.layers);
        let norm = depth.is_normed.then(|| {
            LayerNorm::new(&mut builder.at("final_layer_norm"), width, clip.layer_norm_eps)
        });
        Encoder { params, tokens, places, layers, norm }
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
        let length = ids.size()[1];
        let sight = Sight::causal(length, mask, None, ids.device());
        let mut states = self.tokens.forward(params, ids) + self.places.first(params, length);
        each(0, &states);
        for (index, layer) in self.layers.iter().enumerate() {
            states = layer.forward(params, &states, Some(&sight));
            each(index + 1, &states);
        }
        self.norm.map_or(states.shallow_clone(), |norm| norm.forward(params, &states))
    }
}
