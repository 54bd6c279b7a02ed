//! SiglipVisionModel: pictures as conditions of HunyuanVideo 1.5.

use tch::Tensor;

use super::layers::{Embedding, Layer, LayerShape, MlpActivation};
use super::{MOST_LAYERS, MOST_WIDTH};
use crate::nn::norm::LayerNorm;
use crate::nn::patches::PatchEmbedding;
use crate::nn::{Builder, ParamSet, Rows, Views};
use crate::published::Names;
use crate::settings::{above, settings};

settings! {
    /// The fields of a SiglipVisionModel's `config.json`, with the class's defaults.
    pub struct Siglip {
        /// Features of a state.
        pub hidden_size: i64 = 768, in 1..=MOST_WIDTH;
        /// Features within the MLP.
        pub intermediate_size: i64 = 3072, in 1..=MOST_WIDTH;
        /// Number of layers.
        pub num_hidden_layers: i64 = 12, in 1..=MOST_LAYERS;
        /// Heads of an attention.
        pub num_attention_heads: i64 = 12, in 1..=MOST_WIDTH;
        /// Channels of pixels.
        pub num_channels: i64 = 3, in 3..=3;
        /// Side of a picture in pixels.
        pub image_size: i64 = 224, in 1..=16_384;
        /// Side of a patch in pixels.
        pub patch_size: i64 = 16, in 1..=16_384;
        /// The nonlinearity of the MLP.
        pub hidden_act: MlpActivation = MlpActivation::GeluTanh;
        /// Added to variances.
        pub layer_norm_eps: f64 = 1e-6, in above(0.0);
    }
}

/// The pooling head is not read, and neither are counters of places.
pub(super) const NAMES: Names = Names {
    prefixes: &["vision_model.", ""],
    first: "embeddings.patch_embedding.weight",
    others: &[],
    unused: &["head.", "embeddings.position_ids"],
};

impl Siglip {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.patch_size > self.image_size {
            let (patch, picture) = (self.patch_size, self.image_size);
            return Err(format!("patch_size: {patch} is more than image_size, {picture}"));
        }
        self.layer_shape().check()
    }

    /// Patches along a side; pixels beyond the last whole one are not seen.
    pub(super) fn patches(&self) -> i64 {
        self.image_size / self.patch_size
    }

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

/// The network to the last normalization.
#[derive(Debug)]
pub(super) struct VisionTower {
    params: ParamSet,
    patches: PatchEmbedding,
    places: Embedding,
    layers: Vec<Layer>,
    norm: LayerNorm,
    /// Side of what patches cover.
    covered: i64,
}

impl VisionTower {
    pub fn new(siglip: &Siglip) -> Self {
        let mut params = ParamSet::new("image encoder");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let (width, side, count) = (siglip.hidden_size, siglip.patch_size, siglip.patches());
        let mut patches = builder.at("embeddings.patch_embedding");
        let patches = PatchEmbedding::square(&mut patches, siglip.num_channels, width, side);
        let mut places = builder.at("embeddings.position_embedding");
        let places = Embedding::new(&mut places, count * count, width);
        let count_of_layers = siglip.num_hidden_layers as usize;
        let layers = Layer::several(&mut builder, siglip.layer_shape(), count_of_layers);
        let norm = LayerNorm::new(&mut builder.at("post_layernorm"), width, siglip.layer_norm_eps);
        VisionTower { params, patches, places, layers, norm, covered: count * side }
    }

    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// # Shapes
    /// `pixels`: `[B, 3, S, S]`. Returns `[B, L, D]`.
    pub fn forward(&self, params: &Views, pixels: &Tensor) -> Tensor {
        let covered = pixels.narrow(2, 0, self.covered).narrow(3, 0, self.covered);
        let patches = self.patches.forward(params, &covered.unsqueeze(2));
        let states = &patches + self.places.first(params, patches.size()[1]);
        let layers = self.layers.iter();
        let last = layers.fold(states, |states, layer| layer.forward(params, &states, None));
        self.norm.forward(params, &last)
    }
}
