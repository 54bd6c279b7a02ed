//! FLUX.2: double blocks over image and text, then single blocks over both as one sequence; all
//! double blocks share their modulations, and so do all single blocks.
//!
//! Inputs: `hidden_states` `[B, Li, in_channels]`, `encoder_hidden_states` `[B, Lt,
//! joint_attention_dim]`, `timestep` `[B]` in `[0, 1]`, `grid`, and `guidance` `[B]`, which is
//! optional even for a model that embeds it.
//!
//! Besides the activations of [`joint`](crate::model::joint), the blocks' modulations cross stage
//! boundaries: `image_modulation` and `text_modulation` `[B, 6·D]` up to the last double block,
//! `single_modulation` `[B, 3·D]` up to the last single block. They are computed once, in the stage
//! that holds their parameters, so that the blocks hold only attention and feed-forward parameters.
//!
//! Source: diffusers 0.42.1, `Flux2Transformer2DModel`, whose field and parameter names these are.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::model::joint::{Head, check_axes, grid, joined, streams};
use crate::model::{Architecture, SampleShapes, expect_equal, expect_even, expect_image};
use crate::nn::attention::{Heads, JointAttention, attend};
use crate::nn::embed::ScalarEmbedding;
use crate::nn::joint_block::JointBlock;
use crate::nn::modulation::{gated, modulated_norm, parts};
use crate::nn::norm::RmsNorm;
use crate::nn::rope::{self, Axis};
use crate::nn::{
    Activations, Builder, Linear, Mlp, Nonlinearity, ParamSet, PerShape, Rows, Stage, Views,
};
use crate::ops::Rounding;
use crate::settings::settings;

/// Activations that every block reads and passes on unchanged.
const PASSED_BY_DOUBLE_BLOCKS: [&str; 4] =
    ["conditioning", "image_modulation", "text_modulation", "single_modulation"];
const PASSED_BY_SINGLE_BLOCKS: [&str; 2] = ["conditioning", "single_modulation"];

settings! {
    /// `[model.flux2]`: the fields of the class's `config.json`, with the class's defaults.
    pub struct Flux2 {
        /// Published models have 1: the latents come in patches already.
        pub patch_size: i64 = 1, in 1..=1;
        /// Features of a latent token; the channels of patchified latents.
        pub in_channels: i64 = 128, in 1..=65_536;
        /// Features of a predicted token; 0 is in_channels.
        pub out_channels: i64 = 0, in 0..=65_536;
        /// Double blocks, each a stage of its own.
        pub num_layers: i64 = 8, in 0..=256;
        /// Single blocks, each a stage of its own.
        pub num_single_layers: i64 = 48, in 0..=256;
        /// Width of a head; the sum of axes_dims_rope.
        pub attention_head_dim: i64 = 128, in 2..=65_536;
        /// Attention heads; times their width it is the model's.
        pub num_attention_heads: i64 = 48, in 1..=1024;
        /// Last axis of `text_embeddings`.
        pub joint_attention_dim: i64 = 15_360, in 1..=65_536;
        /// Width of the sinusoidal embeddings of timestep and guidance; even.
        pub timestep_guidance_channels: i64 = 256, in 2..=65_536;
        /// Hidden width of the feed-forward parts as a multiple of the model's.
        pub mlp_ratio: f64 = 3.0, in 0.5..=64.0;
        /// Features of a head turned by index, row, column and place in the text; even.
        pub axes_dims_rope: [i64; 4] = [32; 4], in 0..=65_536;
        /// Base of the rotary frequencies.
        pub rope_theta: i64 = 2000, in 1..;
        /// Epsilon of every normalization.
        pub eps: f64 = 1e-6, in 0.0..=1.0;
        /// Whether the guidance scale is embedded (dev) or not (klein).
        pub guidance_embeds: bool = true;
    }
}

impl Flux2 {
    fn heads(&self) -> Heads {
        Heads {
            num_heads: self.num_attention_heads,
            width: self.attention_head_dim,
            with_bias: false,
            epsilon: self.eps,
            rounding: Rounding::Once,
            takes_mask: false,
        }
    }

    fn hidden(&self) -> i64 {
        (self.width() as f64 * self.mlp_ratio) as i64
    }

    fn features(&self) -> i64 {
        if self.out_channels == 0 { self.in_channels } else { self.out_channels }
    }
}

impl Architecture for Flux2 {
    fn class_name(&self) -> Option<&'static str> {
        Some("Flux2Transformer2DModel")
    }

    fn stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        check_axes("model.flux2.axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        expect_even("model.flux2.timestep_guidance_channels", self.timestep_guidance_channels)?;
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embed::new(self))];
        stages.extend(
            (0..self.num_layers)
                .map(|index| Box::new(DoubleBlock::new(self, index)) as Box<dyn Stage>),
        );
        stages.extend(
            (0..self.num_single_layers)
                .map(|index| Box::new(SingleBlock::new(self, index)) as Box<dyn Stage>),
        );
        stages.push(Box::new(Head::new(self.width(), self.features(), false, self.eps)));
        Ok(stages)
    }

    fn adapter(&self) -> &'static str {
        "flux2"
    }

    /// Guidance is not required: the reference can train a model that embeds it without it as well.
    fn inputs(&self) -> Vec<&'static str> {
        vec!["hidden_states", "encoder_hidden_states", "timestep", "grid"]
    }

    fn embeds_guidance(&self) -> bool {
        self.guidance_embeds
    }

    fn width(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }

    fn image_tokens(&self, latents: &[i64]) -> i64 {
        latents[1..].iter().product()
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
            "attn.to_qkv_mlp_proj",
            "attn.to_out",
        ]
    }

    fn check_data(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        let [channels, ..] = expect_image("model.flux2", shapes.latents, 1)?;
        expect_equal(
            "model.flux2.in_channels",
            self.in_channels,
            Some(channels),
            "patchified latents have",
        )?;
        expect_equal(
            "model.flux2.out_channels",
            self.features(),
            Some(channels),
            "patchified latents have",
        )?;
        let text = shapes.last("text_embeddings");
        expect_equal(
            "model.flux2.joint_attention_dim",
            self.joint_attention_dim,
            text,
            "text_embeddings have",
        )
    }
}

/// Converts latents and text to tokens; timestep and guidance to one vector, and that to the
/// blocks' modulations.
struct Embed {
    params: ParamSet,
    image: Linear,
    text: Linear,
    timestep: ScalarEmbedding,
    guidance: Option<ScalarEmbedding>,
    image_modulation: Linear,
    text_modulation: Linear,
    single_modulation: Linear,
    axes: [Axis; 4],
    /// Rotary tables over text and image, by the grid and the number of text tokens.
    ropes: PerShape<([i64; 3], i64)>,
}

impl Embed {
    fn new(model: &Flux2) -> Self {
        let mut params = ParamSet::new("embed");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let (width, frequencies) = (model.width(), model.timestep_guidance_channels);
        let mut scalar = |name: &str| {
            ScalarEmbedding::new(
                &mut builder.at("time_guidance_embed").at(name),
                frequencies,
                width,
                false,
            )
        };
        let timestep = scalar("timestep_embedder");
        let guidance = model.guidance_embeds.then(|| scalar("guidance_embedder"));
        let mut linear = |name: &str, rows, inputs, outputs| {
            Linear::pytorch(&mut builder.at(name).over(rows), inputs, outputs, false)
        };
        let image_modulation =
            linear("double_stream_modulation_img.linear", Rows::One, width, 6 * width);
        let text_modulation =
            linear("double_stream_modulation_txt.linear", Rows::One, width, 6 * width);
        let single_modulation =
            linear("single_stream_modulation.linear", Rows::One, width, 3 * width);
        let image = linear("x_embedder", Rows::Image, model.in_channels, width);
        let text = linear("context_embedder", Rows::Text, model.joint_attention_dim, width);
        let axes = model.axes_dims_rope.map(|width| Axis {
            width,
            theta: model.rope_theta as f64,
            kind: Kind::Double,
        });
        let ropes = PerShape::new();
        Embed {
            params,
            image,
            text,
            timestep,
            guidance,
            image_modulation,
            text_modulation,
            single_modulation,
            axes,
            ropes,
        }
    }

    fn conditioning(&self, params: &Views, input: &Activations, kind: Kind) -> Tensor {
        let timestep = self.timestep.forward(params, &(input.get("timestep") * 1000.0), kind);
        match (&self.guidance, input.find("guidance")) {
            (Some(embedding), Some(guidance)) => {
                timestep + embedding.forward(params, &(guidance.to_kind(kind) * 1000.0), kind)
            }
            _ => timestep,
        }
    }

    /// Returns the table over text, whose positions vary only along the text axis, then the image,
    /// whose positions vary along all other axes.
    fn rope(&self, sizes: [i64; 3], text_tokens: i64, device: Device) -> Tensor {
        self.ropes.get((sizes, text_tokens), || {
            let [frames, rows, columns] =
                [0, 1, 2].map(|axis| self.axes[axis].angles_to(sizes[axis], device));
            let (image, text) = (
                rope::grid_angles(&frames, &rows, &columns),
                self.axes[3].angles_to(text_tokens, device),
            );
            let (image_pairs, text_pairs) = (image.size()[1], text.size()[1]);
            let text = text.constant_pad_nd([image_pairs, 0]);
            rope::table(&Tensor::cat(&[text, image.constant_pad_nd([0, text_pairs])], 0))
        })
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
        let conditioning = self.conditioning(params, input, latents.kind());
        let active = conditioning.silu();
        Activations::new()
            .with("image", self.image.forward(params, latents))
            .with("text", self.text.forward(params, text))
            .with("conditioning", conditioning)
            .with("image_modulation", self.image_modulation.forward(params, &active))
            .with("text_modulation", self.text_modulation.forward(params, &active))
            .with("single_modulation", self.single_modulation.forward(params, &active))
            .with_constant("text_rope", rope.narrow(0, 0, text_tokens))
            .with_constant("image_rope", rope.narrow(0, text_tokens, image_tokens))
            .with_constant("rope", rope)
    }
}

/// Adds activations that a block passes on unchanged.
fn passing(output: Activations, input: &Activations, names: &[&'static str]) -> Activations {
    names.iter().fold(output, |output, name| output.with(name, input.get(name).shallow_clone()))
}

/// Attention over both streams, and a feed-forward part for each.
struct DoubleBlock {
    params: ParamSet,
    block: JointBlock,
}

impl DoubleBlock {
    fn new(model: &Flux2, index: i64) -> Self {
        let name = format!("transformer_blocks.{index}");
        let mut params = ParamSet::new(&name);
        let mut builder = Builder::new(&mut params, &name, Rows::Image);
        let (width, hidden, epsilon) = (model.width(), model.hidden(), model.eps);
        let attention = JointAttention::new(&mut builder.at("attn"), width, model.heads());
        let mut feed =
            |name: &str, rows| Mlp::gated(&mut builder.at(name).over(rows), [width, hidden, width]);
        let block = JointBlock {
            attention,
            image_feed: feed("ff", Rows::Image),
            text_feed: feed("ff_context", Rows::Text),
            epsilon,
        };
        DoubleBlock { params, block }
    }
}

impl Stage for DoubleBlock {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let modulations =
            [&parts(input.get("image_modulation")), &parts(input.get("text_modulation"))];
        let (image, text) = self.block.forward(params, streams(input), modulations, None);
        passing(
            Activations::new().with("image", image).with("text", text),
            input,
            &PASSED_BY_DOUBLE_BLOCKS,
        )
    }
}

/// Attention and feed-forward in parallel over text and image as one sequence, `joint` `[B, Lt +
/// Li, D]`: one product computes query, key, value and hidden features, one computes the output.
struct SingleBlock {
    params: ParamSet,
    input: Linear,
    output: Linear,
    norm_query: RmsNorm,
    norm_key: RmsNorm,
    num_heads: i64,
    /// Widths of query, key and value together, and of the hidden features with their gate.
    widths: [i64; 2],
    epsilon: f64,
}

impl SingleBlock {
    fn new(model: &Flux2, index: i64) -> Self {
        let name = format!("single_transformer_blocks.{index}");
        let mut params = ParamSet::new(&name);
        let mut builder = Builder::new(&mut params, &format!("{name}.attn"), Rows::Joint);
        builder.attends(model.heads().attention(Rows::Joint, Rows::Joint));
        let (width, hidden, epsilon) = (model.width(), model.hidden(), model.eps);
        let widths = [3 * width, 2 * hidden];
        let input =
            Linear::pytorch(&mut builder.at("to_qkv_mlp_proj"), width, widths.iter().sum(), false);
        let output = Linear::pytorch(&mut builder.at("to_out"), width + hidden, width, false);
        let mut norm = |name: &str| {
            RmsNorm::new(&mut builder.at(name), model.attention_head_dim, epsilon, Rounding::Once)
        };
        let (norm_query, norm_key) = (norm("norm_q"), norm("norm_k"));
        SingleBlock {
            params,
            input,
            output,
            norm_query,
            norm_key,
            num_heads: model.num_attention_heads,
            widths,
            epsilon,
        }
    }

    /// `qkv`: `[B, L, 3·D]`; `table`: from [`rope`]. Returns `[B, L, D]`.
    fn attended(&self, params: &Views, qkv: &Tensor, table: &Tensor) -> Tensor {
        // [B, L, 3·D] -> 3 of [B, L, N, E]
        let heads = qkv.unflatten(-1, [3, self.num_heads, -1]).unbind(2);
        let query = self.norm_query.rotated(params, &heads[0], table);
        let key = self.norm_key.rotated(params, &heads[1], table);
        attend(&query, &key, &heads[2], None)
    }
}

impl Stage for SingleBlock {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let joint = joined(input);
        let [shift, scale, gate] = parts(input.get("single_modulation"));
        let (joint, ready) = modulated_norm(&joint, &shift, &scale, self.epsilon);
        let made = self.input.forward(params, &ready).split_with_sizes(self.widths, -1);
        let attended = self.attended(params, &made[0], input.get("rope"));
        let both = Nonlinearity::SiluGate.apply_beside(&attended, &made[1]);
        let joint = gated(&joint, &gate, &self.output.forward(params, &both));
        passing(Activations::new().with("joint", joint), input, &PASSED_BY_SINGLE_BLOCKS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_turns_by_its_place_and_the_image_by_row_and_column() {
        // One pair for each axis, whose angle in radians is the position.
        let model = Flux2 {
            attention_head_dim: 8,
            num_attention_heads: 1,
            axes_dims_rope: [2; 4],
            ..Flux2::default()
        };
        let places =
            Embed::new(&model).rope([1, 2, 3], 2, Device::Cpu).squeeze_dim(1).angle().round();
        let places = Vec::<Vec<f32>>::try_from(places).unwrap();
        assert_eq!(places[..2], [[0.0; 4], [0.0, 0.0, 0.0, 1.0]]);
        assert_eq!(places[2..5], [[0.0; 4], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]]);
        assert_eq!(places[5..], [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 2.0, 0.0]]);
    }

    #[test]
    fn what_cannot_be_built_is_refused_by_name() {
        let refused = |model: Flux2| model.stages().map(drop).unwrap_err().to_string();
        let axes = refused(Flux2 { axes_dims_rope: [32, 32, 32, 30], ..Flux2::default() });
        assert!(axes.contains("model.flux2.axes_dims_rope"), "{axes}");
        let channels = refused(Flux2 { timestep_guidance_channels: 255, ..Flux2::default() });
        assert!(channels.contains("model.flux2.timestep_guidance_channels"), "{channels}");
    }
}
