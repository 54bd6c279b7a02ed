//! A small diffusion transformer for latents of any even size, conditioned on a sequence of
//! embeddings.
//!
//! The prompt's embeddings are averaged over their tokens, so that a class is a prompt of one token
//! and an all-zero prompt (the dropped condition of classifier-free guidance) means no condition.
//!
//! Source: Peebles & Xie 2023, arXiv:2212.09748 (adaLN-Zero); parameter names follow
//! facebookresearch/DiT.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::{Architecture, SampleShapes, expect_equal, expect_image};
use crate::nn::attention::SelfAttention;
use crate::nn::embed::{ScalarEmbedding, grid_positions};
use crate::nn::modulation::{Modulation, gated, modulated_norm};
use crate::nn::patches::{cut_images, join_images};
use crate::nn::{
    Activations, Builder, Init, Linear, Mlp, Nonlinearity, ParamSet, PerShape, Rows, Stage, Views,
};
use crate::settings::settings;

/// Epsilon of DiT's layer normalizations.
const EPSILON: f64 = 1e-6;

settings! {
    /// `[model.dit]`.
    pub struct Dit {
        /// Channels of the latents; must equal the data's.
        pub in_channels: i64 = 1, in 1..=4096;
        /// Last axis of `text_embeddings`; must equal the data's.
        pub condition_width: i64 = 10, in 1..=65_536;
        /// Side of the square patch that becomes one token; divides height and width.
        pub patch_size: i64 = 2, in 1..=64;
        /// Model width D; a multiple of 4 and of num_heads.
        pub width: i64 = 128, in 4..=65_536;
        /// Number of transformer blocks, each a stage of its own.
        pub depth: i64 = 4, in 1..=1024;
        /// Attention heads.
        pub num_heads: i64 = 4, in 1..=1024;
        /// Hidden width of the feed-forward part as a multiple of `width`.
        pub mlp_ratio: i64 = 4, in 1..=64;
    }
}

impl Architecture for Dit {
    fn class_name(&self) -> Option<&'static str> {
        None
    }

    fn stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        if self.width % self.num_heads != 0 || self.width % 4 != 0 {
            let what = format!(
                "{} must be a multiple of 4 and of num_heads = {}",
                self.width, self.num_heads
            );
            return Err(Error::config("model.dit.width", what));
        }
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embed::new(self))];
        stages.extend(
            (0..self.depth).map(|index| Box::new(Block::new(self, index)) as Box<dyn Stage>),
        );
        stages.push(Box::new(Head::new(self)));
        Ok(stages)
    }

    fn adapter(&self) -> &'static str {
        "simple"
    }

    fn inputs(&self) -> Vec<&'static str> {
        vec!["hidden_states", "timestep", "encoder_hidden_states"]
    }

    fn width(&self) -> i64 {
        self.width
    }

    fn image_tokens(&self, latents: &[i64]) -> i64 {
        latents[1..].iter().product::<i64>() / (self.patch_size * self.patch_size)
    }

    fn attention_modules(&self) -> &'static [&'static str] {
        &["attn.qkv", "attn.proj"]
    }

    fn check_data(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        let [channels, ..] = expect_image("model.dit.patch_size", shapes.latents, self.patch_size)?;
        expect_equal("model.dit.in_channels", self.in_channels, Some(channels), "latents have")?;
        expect_equal(
            "model.dit.condition_width",
            self.condition_width,
            shapes.last("text_embeddings"),
            "text_embeddings have",
        )
    }
}

/// Converts latents to tokens, and timestep and condition to one vector.
struct Embed {
    params: ParamSet,
    patch_size: i64,
    width: i64,
    patches: Linear,
    timestep: ScalarEmbedding,
    condition: Linear,
    /// Position tables `[L, D]` by rows and columns.
    positions: PerShape<(i64, i64)>,
}

impl Embed {
    fn new(model: &Dit) -> Self {
        let mut params = ParamSet::new("embed");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let features = model.in_channels * model.patch_size * model.patch_size;
        let xavier = Init::Xavier { fan_in: features, fan_out: model.width };
        let patches =
            Linear::new(&mut builder.at("x_embedder.proj"), features, model.width, xavier);
        let timestep = ScalarEmbedding::dit(&mut builder.at("t_embedder"), model.width);
        // A one-hot prompt makes this a table of class embeddings, which DiT initializes with
        // normal(0.02).
        let condition = Linear::without_bias(
            &mut builder.at("y_embedder").over(Rows::One),
            model.condition_width,
            model.width,
            Init::Normal { std: 0.02 },
        );
        Embed {
            params,
            patch_size: model.patch_size,
            width: model.width,
            patches,
            timestep,
            condition,
            positions: PerShape::new(),
        }
    }

    fn positions(&self, latents: &Tensor) -> Tensor {
        let size = latents.size();
        let (rows, columns) = (size[2] / self.patch_size, size[3] / self.patch_size);
        let build =
            || grid_positions(rows, columns, self.width, latents.device()).to_kind(latents.kind());
        self.positions.get((rows, columns), build)
    }
}

impl Stage for Embed {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let latents = input.get("hidden_states");
        let hidden = self.patches.forward(params, &cut_images(latents, self.patch_size))
            + self.positions(latents);
        let prompt =
            input.get("encoder_hidden_states").mean_dim([1i64].as_slice(), false, None::<Kind>);
        let timestep = self.timestep.forward(params, input.get("timestep"), latents.kind());
        Activations::new()
            .with("hidden", hidden)
            .with("conditioning", timestep + self.condition.forward(params, &prompt))
    }
}

/// Attention and feed-forward, each with modulation before and a gate after it.
struct Block {
    params: ParamSet,
    attention: SelfAttention,
    mlp: Mlp,
    modulation: Modulation,
}

impl Block {
    fn new(model: &Dit, index: i64) -> Self {
        let name = format!("blocks.{index}");
        let mut params = ParamSet::new(&name);
        let mut builder = Builder::new(&mut params, &name, Rows::Image);
        let hidden = model.mlp_ratio * model.width;
        let xavier = Init::Xavier { fan_in: model.width, fan_out: hidden };
        let attention = SelfAttention::new(&mut builder.at("attn"), model.width, model.num_heads);
        let input = Linear::new(&mut builder.at("mlp.fc1"), model.width, hidden, xavier);
        let output = Linear::new(&mut builder.at("mlp.fc2"), hidden, model.width, xavier);
        let mlp = Mlp { input, output, nonlinearity: Nonlinearity::GeluTanh };
        let modulation = Linear::new(
            &mut builder.at("adaLN_modulation.1").over(Rows::One),
            model.width,
            6 * model.width,
            Init::Zeros,
        );
        Block { params, attention, mlp, modulation: Modulation::new(modulation) }
    }
}

impl Stage for Block {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let (hidden, conditioning) = (input.get("hidden"), input.get("conditioning"));
        let [shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp] =
            self.modulation.forward(params, conditioning);
        let (hidden, ready) = modulated_norm(hidden, &shift_attention, &scale_attention, EPSILON);
        let hidden = gated(&hidden, &gate_attention, &self.attention.forward(params, &ready));
        let (hidden, ready) = modulated_norm(&hidden, &shift_mlp, &scale_mlp, EPSILON);
        let hidden = gated(&hidden, &gate_mlp, &self.mlp.forward(params, &ready));
        Activations::new().with("hidden", hidden).with("conditioning", conditioning.shallow_clone())
    }
}

/// Converts tokens back to latents.
struct Head {
    params: ParamSet,
    patch_size: i64,
    linear: Linear,
    modulation: Modulation,
}

impl Head {
    fn new(model: &Dit) -> Self {
        let mut params = ParamSet::new("final_layer");
        let mut builder = Builder::new(&mut params, "final_layer", Rows::Image);
        let features = model.in_channels * model.patch_size * model.patch_size;
        let linear = Linear::new(&mut builder.at("linear"), model.width, features, Init::Zeros);
        let modulation = Linear::new(
            &mut builder.at("adaLN_modulation.1").over(Rows::One),
            model.width,
            2 * model.width,
            Init::Zeros,
        );
        Head {
            params,
            patch_size: model.patch_size,
            linear,
            modulation: Modulation::new(modulation),
        }
    }
}

impl Stage for Head {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let [shift, scale] = self.modulation.forward(params, input.get("conditioning"));
        let (_, ready) = modulated_norm(input.get("hidden"), &shift, &scale, EPSILON);
        let tokens = self.linear.forward(params, &ready);
        let size = input.get("hidden_states").size();
        Activations::new()
            .with("prediction", join_images(&tokens, self.patch_size, size[2], size[3]))
    }
}
