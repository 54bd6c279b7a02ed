//! Wan's stages.
//!
//! | activation | shape | |
//! |---|---|---|
//! | `hidden` | `[B, L, D]` | tokens of the latents |
//! | `conditions` | `[B, Li + Lt, D]` | tokens of the images, then of the text |
//! | `modulation` | `[B, 6, D]` | the timestep's vector, added to every block's table |
//! | `conditioning` | `[B, 1, D]` | the timestep's vector, added to the head's table |
//! | `rope` | `[L, 1, E/2]` complex f32 | constant; table of [`rope`] |
//!
//! In bfloat16 the timestep's vector, normalization, modulation and gates are computed in f32, as
//! diffusers computes them.

use tch::{Device, Kind, Tensor};

use super::Wan;
use crate::model::Architecture;
use crate::nn::attention::WideAttention;
use crate::nn::embed::ScalarEmbedding;
use crate::nn::modulation::{gated_f32, modulated_norm_f32};
use crate::nn::norm::LayerNorm;
use crate::nn::patches::{self, PatchEmbedding};
use crate::nn::rope::{self, Axis};
use crate::nn::{
    Activations, Builder, Init, Linear, Mlp, Nonlinearity, Param, ParamSet, PerShape, Rows, Stage,
    Views,
};
use crate::ops::{FeatureOrder, Patch, grid};

/// Epsilon of the image embedding's normalizations, PyTorch's default.
const IMAGE_EPSILON: f64 = 1e-5;

/// Converts image features to tokens that the blocks attend to.
struct ImageEmbedding {
    places: Option<Param>,
    norm: LayerNorm,
    feed: Mlp,
    output_norm: LayerNorm,
}

impl ImageEmbedding {
    fn new(builder: &mut Builder<'_>, inputs: i64, width: i64, places: Option<i64>) -> Self {
        let places =
            places.map(|tokens| builder.param("pos_embed", &[1, tokens, inputs], Init::Zeros));
        let norm = LayerNorm::new(&mut builder.precise_at("norm1"), inputs, IMAGE_EPSILON);
        let feed =
            Mlp::feed_forward(&mut builder.at("ff"), [inputs, inputs, width], Nonlinearity::Gelu);
        ImageEmbedding {
            places,
            norm,
            feed,
            output_norm: LayerNorm::new(&mut builder.precise_at("norm2"), width, IMAGE_EPSILON),
        }
    }

    /// Maps `[B, Li, image_dim]` to `[B, Li, D]`.
    fn forward(&self, params: &Views, image: &Tensor) -> Tensor {
        let image =
            self.places.map_or_else(|| image.shallow_clone(), |places| image + &params[places]);
        let (_, ready) = self.norm.forward_f32(params, &image);
        self.output_norm.forward_f32(params, &self.feed.forward(params, &ready)).1
    }
}

/// Converts latents and conditions to tokens, and the timestep to the modulation of blocks and
/// head.
pub(super) struct Embed {
    params: ParamSet,
    patch: Patch,
    is_conditioned: bool,
    patches: PatchEmbedding,
    timestep: ScalarEmbedding,
    modulation: Linear,
    text: Mlp,
    image: Option<ImageEmbedding>,
    axes: [Axis; 3],
    /// Rotary tables by frames, rows and columns.
    ropes: PerShape<[i64; 3]>,
}

impl Embed {
    pub fn new(model: &Wan) -> Self {
        let mut params = ParamSet::new("embed");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let (width, patch) = (model.width(), model.patch_size);
        let patches = PatchEmbedding::new(
            &mut builder.at("patch_embedding"),
            model.in_channels,
            width,
            patch,
        );
        let mut builder = builder.at("condition_embedder");
        let timestep = ScalarEmbedding::new(
            &mut builder.precise_at("time_embedder"),
            model.freq_dim,
            width,
            true,
        );
        let mut time = builder.at("time_proj").over(Rows::One);
        let modulation = Linear::pytorch(&mut time, width, 6 * width, true);
        let widths = [model.text_dim, width, width];
        let text = Mlp::of_two_linears(
            &mut builder.at("text_embedder").over(Rows::Text),
            widths,
            Nonlinearity::GeluTanh,
            true,
        );
        let places = model.pos_embed_seq_len;
        let image = model.image_dim.map(|inputs| {
            let mut builder = builder.at("image_embedder").over(Rows::Text);
            ImageEmbedding::new(&mut builder, inputs, width, places)
        });
        let (is_conditioned, axes) = (model.is_conditioned(), model.axes());
        Embed {
            params,
            patch,
            is_conditioned,
            patches,
            timestep,
            modulation,
            text,
            image,
            axes,
            ropes: PerShape::new(),
        }
    }

    fn latents(&self, input: &Activations) -> Tensor {
        let noisy = input.get("hidden_states");
        if self.is_conditioned {
            Tensor::cat(&[noisy, input.get("condition_latents")], 1)
        } else {
            noisy.shallow_clone()
        }
    }

    fn conditions(&self, params: &Views, input: &Activations) -> Tensor {
        let text = self.text.forward(params, input.get("encoder_hidden_states"));
        match &self.image {
            Some(image) => Tensor::cat(
                &[image.forward(params, input.get("encoder_hidden_states_image")), text],
                1,
            ),
            None => text,
        }
    }

    fn rope(&self, sizes: [i64; 3], device: Device) -> Tensor {
        self.ropes.get(sizes, || {
            let [frames, rows, columns] =
                [0, 1, 2].map(|axis| self.axes[axis].angles_to(sizes[axis], device));
            rope::table(&rope::grid_angles(&frames, &rows, &columns))
        })
    }
}

impl Stage for Embed {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let latents = self.latents(input);
        let rope = self.rope(grid(&latents, self.patch), latents.device());
        let conditioning = self
            .timestep
            .forward(params, input.get("timestep"), Kind::Float)
            .to_kind(latents.kind());
        let modulation = self.modulation.forward(params, &conditioning.silu());
        Activations::new()
            .with("hidden", self.patches.forward(params, &latents))
            .with("conditions", self.conditions(params, input))
            .with("modulation", modulation.unflatten(1, [6i64, -1]))
            .with("conditioning", conditioning.unsqueeze(1))
            .with_constant("rope", rope)
    }
}

/// Attention over the video, attention over the conditions, and the feed-forward part.
pub(super) struct Block {
    params: ParamSet,
    table: Param,
    self_attention: WideAttention,
    cross_norm: Option<LayerNorm>,
    cross_attention: WideAttention,
    feed: Mlp,
    epsilon: f64,
}

impl Block {
    pub fn new(model: &Wan, index: i64) -> Self {
        let name = format!("blocks.{index}");
        let mut params = ParamSet::new(&name);
        let mut builder = Builder::new(&mut params, &name, Rows::Image);
        let width = model.width();
        let table = modulation_table(&mut builder, 6, width);
        let self_attention =
            WideAttention::new(&mut builder.at("attn1"), model.heads(), Rows::Image, false);
        let cross_norm = model
            .cross_attn_norm
            .then(|| LayerNorm::new(&mut builder.precise_at("norm2"), width, model.eps));
        let cross_attention = WideAttention::new(
            &mut builder.at("attn2"),
            model.heads(),
            Rows::Text,
            model.image_dim.is_some(),
        );
        let feed = Mlp::feed_forward(
            &mut builder.at("ffn"),
            [width, model.ffn_dim, width],
            Nonlinearity::GeluTanh,
        );
        Block {
            params,
            table,
            self_attention,
            cross_norm,
            cross_attention,
            feed,
            epsilon: model.eps,
        }
    }
}

impl Stage for Block {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let hidden = input.get("hidden");
        let modulation = input.get("modulation");
        let [shift, scale, gate, feed_shift, feed_scale, feed_gate] =
            modulate(&params[self.table], modulation);
        let (hidden, ready) = modulated_norm_f32(hidden, &shift, &scale, self.epsilon);
        let attended = self.self_attention.over_itself(params, &ready, input.get("rope"));
        let hidden = gated_f32(&hidden, &gate, &attended);
        let (hidden, ready) = match &self.cross_norm {
            Some(norm) => norm.forward_f32(params, &hidden),
            None => (hidden.shallow_clone(), hidden),
        };
        let (text, image) = text_and_image(input);
        let hidden =
            &hidden + self.cross_attention.over_conditions(params, &ready, &text, image.as_ref());
        let (hidden, ready) = modulated_norm_f32(&hidden, &feed_shift, &feed_scale, self.epsilon);
        let fed = self.feed.forward(params, &ready);
        let output = Activations::new().with("hidden", gated_f32(&hidden, &feed_gate, &fed));
        ["conditions", "modulation", "conditioning"]
            .into_iter()
            .fold(output, |output, name| output.with(name, input.get(name).shallow_clone()))
    }
}

/// Returns the tokens of the text, and of the images if there are any.
///
/// They stay views of one tensor, as in diffusers: libtorch rounds the product of such a view
/// before it adds the bias, which matters in bfloat16.
fn text_and_image(input: &Activations) -> (Tensor, Option<Tensor>) {
    let conditions = input.get("conditions");
    let (all, text) = (conditions.size()[1], input.get("encoder_hidden_states").size()[1]);
    (
        conditions.narrow(1, all - text, text),
        (all > text).then(|| conditions.narrow(1, 0, all - text)),
    )
}

/// Adds the parameter `scale_shift_table` `[1, parts, width]`, to which the timestep's vector is
/// added.
fn modulation_table(builder: &mut Builder<'_>, parts: i64, width: i64) -> Param {
    builder.at("").over(Rows::One).precise_param(
        "scale_shift_table",
        &[1, parts, width],
        Init::Normal { std: (width as f64).sqrt().recip() },
    )
}

/// Returns the sum of a table and the timestep's vector `[B, PARTS or 1, D]` as `PARTS` tensors
/// `[B, 1, D]` f32.
fn modulate<const PARTS: usize>(table: &Tensor, timestep: &Tensor) -> [Tensor; PARTS] {
    (table + timestep.to_kind(Kind::Float))
        .chunk(PARTS as i64, 1)
        .try_into()
        .expect("as many chunks as parts")
}

/// Converts tokens to the predicted latents.
pub(super) struct Head {
    params: ParamSet,
    patch: Patch,
    table: Param,
    output: Linear,
    epsilon: f64,
}

impl Head {
    pub fn new(model: &Wan) -> Self {
        let mut params = ParamSet::new("head");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let patch = model.patch_size;
        let table = modulation_table(&mut builder, 2, model.width());
        let features = model.latent_channels() * patch.iter().product::<i64>();
        let output = Linear::pytorch(&mut builder.at("proj_out"), model.width(), features, true);
        Head { params, patch, table, output, epsilon: model.eps }
    }
}

impl Stage for Head {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let [shift, scale] = modulate(&params[self.table], input.get("conditioning"));
        let (_, ready) = modulated_norm_f32(input.get("hidden"), &shift, &scale, self.epsilon);
        let tokens = self.output.forward(params, &ready);
        let grid = grid(input.get("hidden_states"), self.patch);
        Activations::new()
            .with("prediction", patches::join(&tokens, self.patch, grid, FeatureOrder::ChannelLast))
    }
}
