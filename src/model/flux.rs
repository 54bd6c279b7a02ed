//! FLUX.1: double blocks over image and text, then single blocks over both as one sequence.
//!
//! Inputs: `hidden_states` `[B, Li, in_channels]`, `encoder_hidden_states` `[B, Lt,
//! joint_attention_dim]`, `pooled_projections` `[B, pooled_projection_dim]`, `timestep` `[B]` in
//! `[0, 1]`, `guidance` `[B]` if the model embeds it, `grid` and, if samples see different tokens
//! of the text, `text_mask` `[B, Lt]` boolean.
//!
//! Source: diffusers 0.42.1, `FluxTransformer2DModel`, whose field and parameter names these are.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::joint::{Head, JointStage, check_axes, grid, joined, joint_mask, table_tokens};
use crate::model::{Architecture, SampleShapes, expect_equal, expect_image};
use crate::nn::attention::{Heads, Projections, attend};
use crate::nn::embed::ScalarEmbedding;
use crate::nn::joint_block::BlockNames;
use crate::nn::modulation::{Modulation, gated, modulated_norm};
use crate::nn::rope::{self, Axis};
use crate::nn::{
    Activations, Builder, Linear, Mlp, Nonlinearity, ParamSet, PerShape, Rows, Stage, Views,
};
use crate::ops::Rounding;
use crate::settings::settings;

/// Epsilon of every normalization.
const EPSILON: f64 = 1e-6;
/// Width of the sinusoidal embeddings.
const FREQUENCIES: i64 = 256;
/// Width of the zeros with which the adapter replaces missing pooled text: CLIP-L's.
const POOLED_WIDTH: i64 = 768;
/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

settings! {
    /// `[model.flux]`: the fields of the class's `config.json`, with the class's defaults.
    pub struct Flux {
        /// Published models have 1: the adapter has cut the patches already.
        pub patch_size: i64 = 1, in 1..=1;
        /// Features of a latent token; four times the latents' channels.
        pub in_channels: i64 = 64, in 4..=65_536;
        /// Features of a predicted token; 0 is in_channels.
        pub out_channels: i64 = 0, in 0..=65_536;
        /// Double blocks, each a stage of its own.
        pub num_layers: i64 = 19, in 0..=256;
        /// Single blocks, each a stage of its own.
        pub num_single_layers: i64 = 38, in 0..=256;
        /// Width of a head; the sum of axes_dims_rope.
        pub attention_head_dim: i64 = 128, in 2..=65_536;
        /// Attention heads; times their width it is the model's.
        pub num_attention_heads: i64 = 24, in 1..=1024;
        /// Last axis of `text_embeddings`.
        pub joint_attention_dim: i64 = 4096, in 1..=65_536;
        /// Last axis of `pooled_prompt_embeds`.
        pub pooled_projection_dim: i64 = 768, in 1..=65_536;
        /// Whether the guidance scale is embedded (dev) or not (schnell).
        pub guidance_embeds: bool = false;
        /// Features of a head turned by index, row and column; even.
        pub axes_dims_rope: [i64; 3] = [16, 56, 56], in 0..=65_536;
    }
}

impl Flux {
    /// Returns the number of features of a predicted token.
    fn features(&self) -> i64 {
        if self.out_channels == 0 { self.in_channels } else { self.out_channels }
    }

    fn heads(&self) -> Heads {
        Heads {
            num_heads: self.num_attention_heads,
            width: self.attention_head_dim,
            with_bias: true,
            epsilon: EPSILON,
            rounding: Rounding::Once,
            takes_mask: true,
        }
    }
}

impl Architecture for Flux {
    fn class_name(&self) -> Option<&'static str> {
        Some("FluxTransformer2DModel")
    }

    fn stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        check_axes("model.flux.axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        let (width, hidden) = (self.width(), 4 * self.width());
        let double = |index| {
            Box::new(JointStage::new(index, &BLOCK_NAMES, width, hidden, self.heads()))
                as Box<dyn Stage>
        };
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embed::new(self))];
        stages.extend((0..self.num_layers).map(double));
        stages.extend(
            (0..self.num_single_layers)
                .map(|index| Box::new(SingleBlock::new(self, index)) as Box<dyn Stage>),
        );
        stages.push(Box::new(Head::new(width, self.features(), true, EPSILON)));
        Ok(stages)
    }

    fn adapter(&self) -> &'static str {
        "flux"
    }

    fn inputs(&self) -> Vec<&'static str> {
        vec!["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "grid"]
    }

    fn embeds_guidance(&self) -> bool {
        self.guidance_embeds
    }

    fn width(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }

    fn image_tokens(&self, latents: &[i64]) -> i64 {
        latents[1..].iter().product::<i64>() / 4
    }

    fn text_tokens(&self) -> Option<i64> {
        Some(512)
    }

    fn attention_modules(&self) -> &'static [&'static str] {
        &[
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ]
    }

    fn check_data(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        let [channels, ..] = expect_image("model.flux", shapes.latents, 2)?;
        expect_equal(
            "model.flux.in_channels",
            self.in_channels,
            Some(4 * channels),
            "latents in 2 x 2 patches have",
        )?;
        expect_equal(
            "model.flux.out_channels",
            self.features(),
            Some(4 * channels),
            "latents in 2 x 2 patches have",
        )?;
        let text = shapes.last("text_embeddings");
        expect_equal(
            "model.flux.joint_attention_dim",
            self.joint_attention_dim,
            text,
            "text_embeddings have",
        )?;
        let pooled =
            ["pooled_prompt_embeds", "clip_pooled"].iter().find_map(|key| shapes.last(key));
        let setting = "model.flux.pooled_projection_dim";
        if pooled.is_none() && !shapes.of.is_empty() && self.pooled_projection_dim != POOLED_WIDTH {
            let width = self.pooled_projection_dim;
            let what = format!(
                "is {width}, but the data have no `pooled_prompt_embeds`, and the zeros for it are {POOLED_WIDTH} wide"
            );
            return Err(Error::config(setting, what));
        }
        expect_equal(setting, self.pooled_projection_dim, pooled, "pooled text has")
    }
}

const BLOCK_NAMES: BlockNames = BlockNames {
    image_modulation: "norm1.linear",
    text_modulation: "norm1_context.linear",
    image_feed: "ff",
    text_feed: "ff_context",
};

/// Converts latents and text to tokens; timestep, guidance and pooled text to one vector.
struct Embed {
    params: ParamSet,
    image: Linear,
    text: Linear,
    timestep: ScalarEmbedding,
    guidance: Option<ScalarEmbedding>,
    pooled: Mlp,
    axes: [Axis; 3],
    /// Rotary tables over text and image, by the grid and the number of the table's text tokens.
    ropes: PerShape<([i64; 3], i64)>,
}

impl Embed {
    fn new(model: &Flux) -> Self {
        let mut params = ParamSet::new("embed");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let width = model.width();
        let mut scalar = |name: &str| {
            ScalarEmbedding::new(
                &mut builder.at("time_text_embed").at(name),
                FREQUENCIES,
                width,
                true,
            )
        };
        let timestep = scalar("timestep_embedder");
        let guidance = model.guidance_embeds.then(|| scalar("guidance_embedder"));
        let widths = [model.pooled_projection_dim, width, width];
        let pooled = Mlp::of_two_linears(
            &mut builder.at("time_text_embed.text_embedder").over(Rows::One),
            widths,
            Nonlinearity::Silu,
            true,
        );
        let text = Linear::pytorch(
            &mut builder.at("context_embedder").over(Rows::Text),
            model.joint_attention_dim,
            width,
            true,
        );
        let image = Linear::pytorch(&mut builder.at("x_embedder"), model.in_channels, width, true);
        let axes =
            model.axes_dims_rope.map(|width| Axis { width, theta: THETA, kind: Kind::Double });
        Embed { params, image, text, timestep, guidance, pooled, axes, ropes: PerShape::new() }
    }

    fn conditioning(&self, params: &Views, input: &Activations, kind: Kind) -> Tensor {
        let mut conditioning =
            self.timestep.forward(params, &(input.get("timestep") * 1000.0), kind);
        if let Some(embedding) = &self.guidance {
            conditioning +=
                embedding.forward(params, &(input.get("guidance").to_kind(kind) * 1000.0), kind);
        }
        conditioning + self.pooled.forward(params, input.get("pooled_projections"))
    }

    /// Returns the table over text, whose positions are all 0, then the image.
    fn rope(&self, sizes: [i64; 3], text_tokens: i64, device: Device) -> Tensor {
        let most = table_tokens(text_tokens);
        let table = self.ropes.get((sizes, most), || {
            let [frames, rows, columns] =
                [0, 1, 2].map(|axis| self.axes[axis].angles_to(sizes[axis], device));
            let image = rope::grid_angles(&frames, &rows, &columns);
            rope::table(&Tensor::cat(
                &[Tensor::zeros([most, image.size()[1]], (Kind::Double, device)), image],
                0,
            ))
        });
        table.slice(0, most - text_tokens, None, 1)
    }
}

impl Stage for Embed {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let (latents, text) = (input.get("hidden_states"), input.get("encoder_hidden_states"));
        let (text_tokens, image_tokens) = (text.size()[1], latents.size()[1]);
        let rope = self.rope(grid(input), text_tokens, latents.device());
        let mask = input.find("text_mask").map(|mask| joint_mask(mask, image_tokens));
        Activations::new()
            .with("image", self.image.forward(params, latents))
            .with("text", self.text.forward(params, text))
            .with("conditioning", self.conditioning(params, input, latents.kind()))
            .with_constant("text_rope", rope.narrow(0, 0, text_tokens))
            .with_constant("image_rope", rope.narrow(0, text_tokens, image_tokens))
            .with_constant("rope", rope)
            .with_optional("mask", mask)
    }
}

/// Attention and feed-forward in parallel over text and image as one sequence, `joint` `[B, Lt +
/// Li, D]`.
struct SingleBlock {
    params: ParamSet,
    modulation: Modulation,
    attention: Projections,
    feed: Linear,
    output: Linear,
}

impl SingleBlock {
    fn new(model: &Flux, index: i64) -> Self {
        let name = format!("single_transformer_blocks.{index}");
        let mut params = ParamSet::new(&name);
        let mut builder = Builder::new(&mut params, &name, Rows::Joint);
        builder.attends(model.heads().attention(Rows::Joint, Rows::Joint));
        let (width, hidden) = (model.width(), 4 * model.width());
        let modulation = Modulation::new(Linear::pytorch(
            &mut builder.at("norm.linear").over(Rows::One),
            width,
            3 * width,
            true,
        ));
        let feed = Linear::pytorch(&mut builder.at("proj_mlp"), width, hidden, true);
        let output = Linear::pytorch(&mut builder.at("proj_out"), width + hidden, width, true);
        let attention = Projections::new(&mut builder.at("attn"), width, model.heads());
        SingleBlock { params, modulation, attention, feed, output }
    }
}

impl Stage for SingleBlock {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let conditioning = input.get("conditioning");
        let joint = joined(input);
        let [shift, scale, gate] = self.modulation.forward(params, conditioning);
        let (joint, ready) = modulated_norm(&joint, &shift, &scale, EPSILON);
        let (ready, [query, key, value]) =
            self.attention.forward(params, &ready, input.find("rope"));
        let attended = attend(&query, &key, &value, input.find("mask"));
        let fed = self.feed.forward(params, &ready);
        let both = Nonlinearity::GeluTanh.apply_beside(&attended, &fed);
        let joint = gated(&joint, &gate, &self.output.forward(params, &both));
        Activations::new().with("joint", joint).with("conditioning", conditioning.shallow_clone())
    }
}
