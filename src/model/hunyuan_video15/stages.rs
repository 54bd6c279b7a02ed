//! HunyuanVideo's stages before and after its joint blocks and its token refiner.

use tch::{Kind, Tensor};

use super::{EPSILON, HunyuanVideo15};
use crate::model::Architecture;
use crate::model::joint::{self, joint_mask};
use crate::nn::embed::ScalarEmbedding;
use crate::nn::norm::LayerNorm;
use crate::nn::patches::{self, PatchEmbedding};
use crate::nn::rope::{self, Axis};
use crate::nn::{
    Activations, Builder, DROPOUT_KEYS, Init, Linear, Mlp, Nonlinearity, Param, ParamSet, PerShape,
    Rows, Stage, Views,
};
use crate::ops::{FeatureOrder, Patch, grid};

/// Epsilon of the layer normalizations around the projections of glyphs and image: PyTorch's
/// default.
const PROJECTION_EPSILON: f64 = 1e-5;
/// Width of the timestep's sinusoidal embedding.
const FREQUENCIES: i64 = 256;
/// Hidden width of the glyphs' projection.
const GLYPH_WIDTH: i64 = 2048;
/// More tokens than any condition has.
const MOST_TOKENS: i64 = 1 << 18;

/// Converts latents, glyphs and image to tokens, and the timestep to a vector; joins all conditions
/// with the refined text to one sequence.
pub(super) struct Embed {
    params: ParamSet,
    patch: Patch,
    is_conditioned: bool,
    video: PatchEmbedding,
    timestep: ScalarEmbedding,
    glyphs: GlyphProjection,
    image: ImageProjection,
    /// Type embeddings of text, glyphs and image, one row each, `[3, D]`.
    types: Param,
    axes: [Axis; 3],
    /// Rotary tables of the video, by its grid.
    ropes: PerShape<[i64; 3]>,
}

impl Embed {
    pub fn new(model: &HunyuanVideo15) -> Self {
        let mut params = ParamSet::new("embed");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let width = model.width();
        let video = PatchEmbedding::new(
            &mut builder.at("x_embedder.proj"),
            model.in_channels,
            width,
            model.patch(),
        );
        let mut features = builder.at("image_embedder").over(Rows::Text);
        let image = ImageProjection::new(&mut features, model.image_embed_dim, width);
        let glyphs = GlyphProjection::new(
            &mut builder.at("context_embedder_2").over(Rows::Text),
            model.text_embed_2_dim,
            width,
        );
        let mut scalar = |name: &str| {
            ScalarEmbedding::new(&mut builder.at("time_embed").at(name), FREQUENCIES, width, true)
        };
        let timestep = scalar("timestep_embedder");
        if model.use_meanflow {
            // Never read: the reference passes no second timestep, and then diffusers leaves its
            // embedding out.
            scalar("timestep_embedder_r");
        }
        let mut types = builder.at("cond_type_embed").over(Rows::One);
        let types = types.param("weight", &[3, width], Init::Normal { std: 1.0 });
        let axes = model.rope_axes_dim.map(|width| Axis {
            width,
            theta: model.rope_theta,
            kind: Kind::Float,
        });
        Embed {
            params,
            patch: model.patch(),
            is_conditioned: model.is_conditioned(),
            video,
            timestep,
            glyphs,
            image,
            types,
            axes,
            ropes: PerShape::new(),
        }
    }

    fn rope(&self, latents: &Tensor) -> Tensor {
        let sizes = grid(latents, self.patch);
        self.ropes.get(sizes, || {
            let [frames, rows, columns] =
                [0, 1, 2].map(|axis| self.axes[axis].angles_to(sizes[axis], latents.device()));
            rope::table(&rope::grid_angles(&frames, &rows, &columns))
        })
    }

    /// Returns image, glyphs and text as one sequence `[B, L3 + L2 + L, D]`.
    ///
    /// diffusers moves each sample's padding after its valid tokens and sets it to zeros.
    /// Conditions have no positions, and valid tokens never attend to padding, so that neither
    /// changes outputs or gradients.
    fn conditions(&self, params: &Views, input: &Activations) -> Tensor {
        let types = &params[self.types];
        let text = input.get("text") + types.get(0);
        let glyphs = input.get("encoder_hidden_states_2");
        let at_places = params.at_places(input.find("text_places_2"));
        let glyphs = self.glyphs.forward(&at_places, glyphs) + types.get(1);
        let image = self.image.forward(&params.at_places(None), input.get("image_embeds"));
        Tensor::cat(&[image + types.get(2), glyphs, text], 1)
    }
}

/// Returns a number of each token of all conditions, `[L3 + L2 + L]` int64, which does not depend
/// on what other samples of the micro-batch have.
fn conditions_places(input: &Activations) -> Tensor {
    // Images are seen whole or not at all.
    let parts = [
        (None, "image_embeds"),
        (input.find("text_places_2"), "encoder_hidden_states_2"),
        (input.find("text_places"), "encoder_hidden_states"),
    ];
    let numbers = parts.iter().zip(0..).map(|((places, tokens), part)| {
        let (tokens, first) = (input.get(tokens), part * MOST_TOKENS);
        let count = || Tensor::arange(tokens.size()[1], (Kind::Int64, tokens.device()));
        places.map_or_else(count, |places| places.to_device(tokens.device())) + first
    });
    Tensor::cat(&numbers.collect::<Vec<_>>(), 0)
}

/// Returns the mask of the valid tokens of all conditions, `[B, L3 + L2 + L]` boolean; `None` if
/// every sample sees them all.
fn conditions_mask(input: &Activations) -> Option<Tensor> {
    let parts = [
        ("image_mask", "image_embeds"),
        ("encoder_attention_mask_2", "encoder_hidden_states_2"),
        ("encoder_attention_mask", "encoder_hidden_states"),
    ];
    let mask = |(mask, tokens)| match input.find(mask) {
        Some(mask) => mask.shallow_clone(),
        None => {
            let tokens = input.get(tokens);
            Tensor::ones(&tokens.size()[..2], (Kind::Bool, tokens.device()))
        }
    };
    let is_masked = parts.iter().any(|(mask, _)| input.find(mask).is_some());
    is_masked.then(|| Tensor::cat(&parts.map(mask), 1))
}

impl Stage for Embed {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let latents = input.get("hidden_states");
        let whole = if self.is_conditioned {
            Tensor::cat(&[latents, input.get("condition_latents")], 1)
        } else {
            latents.shallow_clone()
        };
        let video = self.video.forward(params, &whole);
        // diffusers masks the padding's own rows as well; no valid token reads them, so that
        // masking padding as keys is exact.
        let mask = conditions_mask(input).map(|mask| joint_mask(&mask, video.size()[1]));
        Activations::new()
            .with("image", video)
            .with("text", self.conditions(params, input))
            .with(
                "conditioning",
                self.timestep.forward(params, input.get("timestep"), latents.kind()),
            )
            .with_constant("image_rope", self.rope(latents))
            .with_optional("mask", mask)
            .with_optional(
                "text_places",
                input.find(DROPOUT_KEYS).map(|_| conditions_places(input)),
            )
    }
}

/// Projection of the glyphs to be drawn: a normalization and three affine maps.
struct GlyphProjection {
    norm: LayerNorm,
    linears: [Linear; 3],
}

impl GlyphProjection {
    fn new(builder: &mut Builder<'_>, inputs: i64, width: i64) -> Self {
        let norm = LayerNorm::new(&mut builder.at("norm"), inputs, PROJECTION_EPSILON);
        let mut linear = |name: &str, inputs, outputs| {
            Linear::pytorch(&mut builder.at(name), inputs, outputs, true)
        };
        let [first, second] =
            [linear("linear_1", inputs, GLYPH_WIDTH), linear("linear_2", GLYPH_WIDTH, GLYPH_WIDTH)];
        GlyphProjection { norm, linears: [first, second, linear("linear_3", GLYPH_WIDTH, width)] }
    }

    fn forward(&self, params: &Views, glyphs: &Tensor) -> Tensor {
        let [first, second, third] = &self.linears;
        let hidden = first.forward(params, &self.norm.forward(params, glyphs));
        let hidden = second.forward(params, &Nonlinearity::Gelu.apply(&hidden));
        third.forward(params, &Nonlinearity::Gelu.apply(&hidden))
    }
}

/// Projection of image features: two affine maps between normalizations.
struct ImageProjection {
    norm_input: LayerNorm,
    mlp: Mlp,
    norm_output: LayerNorm,
}

impl ImageProjection {
    fn new(builder: &mut Builder<'_>, inputs: i64, width: i64) -> Self {
        let norm_input = LayerNorm::new(&mut builder.at("norm_in"), inputs, PROJECTION_EPSILON);
        let mlp = Mlp::of_two_linears(builder, [inputs, inputs, width], Nonlinearity::Gelu, true);
        ImageProjection {
            norm_input,
            mlp,
            norm_output: LayerNorm::new(&mut builder.at("norm_out"), width, PROJECTION_EPSILON),
        }
    }

    fn forward(&self, params: &Views, image: &Tensor) -> Tensor {
        self.norm_output
            .forward(params, &self.mlp.forward(params, &self.norm_input.forward(params, image)))
    }
}

/// Converts video tokens back to latents.
pub(super) struct Head {
    tokens: joint::Head,
    patch: Patch,
}

impl Head {
    pub fn new(model: &HunyuanVideo15) -> Self {
        let features = model.latent_channels() * model.patch().iter().product::<i64>();
        Head {
            tokens: joint::Head::new(model.width(), features, true, EPSILON),
            patch: model.patch(),
        }
    }
}

impl Stage for Head {
    fn params(&self) -> &ParamSet {
        self.tokens.params()
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let tokens = self.tokens.forward(params, input);
        let grid = grid(input.get("hidden_states"), self.patch);
        let latents =
            patches::join(tokens.get("prediction"), self.patch, grid, FeatureOrder::ChannelFirst);
        Activations::new().with("prediction", latents)
    }
}
