//! Qwen-Image: double blocks over image and text.
//!
//! Inputs: `hidden_states` `[B, Li, in_channels]`, `encoder_hidden_states` `[B, Lt,
//! joint_attention_dim]`, `timestep` `[B]` in `[0, 1]`, `grid` and, if padding is to be masked,
//! `text_mask` `[B, Lt]`.
//!
//! Source: diffusers 0.42.1, `QwenImageTransformer2DModel`, whose field and parameter names these
//! are.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::joint::{Head, JointStage, check_axes, grid, joint_mask};
use crate::model::{Architecture, SampleShapes, expect_equal, expect_image};
use crate::nn::attention::Heads;
use crate::nn::embed::ScalarEmbedding;
use crate::nn::joint_block::BlockNames;
use crate::nn::norm::RmsNorm;
use crate::nn::rope::{self, Axis};
use crate::nn::{Activations, Builder, Linear, ParamSet, PerShape, Rows, Stage, Views};
use crate::ops::Rounding;
use crate::settings::settings;

/// Epsilon of every normalization.
const EPSILON: f64 = 1e-6;
/// Width of the timestep's sinusoidal embedding.
const FREQUENCIES: i64 = 256;
/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

settings! {
    /// `[model.qwen_image]`: the fields of the class's `config.json`, with the class's defaults.
    pub struct QwenImage {
        /// Side of the patch that a token is predicted as: the adapter's 2.
        pub patch_size: i64 = 2, in 2..=2;
        /// Features of a latent token; four times the latents' channels.
        pub in_channels: i64 = 64, in 4..=65_536;
        /// Channels of the predicted latents; 0 is in_channels.
        pub out_channels: i64 = 16, in 0..=65_536;
        /// Blocks, each a stage of its own.
        pub num_layers: i64 = 60, in 0..=256;
        /// Width of a head; the sum of axes_dims_rope.
        pub attention_head_dim: i64 = 128, in 2..=65_536;
        /// Attention heads; times their width it is the model's.
        pub num_attention_heads: i64 = 24, in 1..=1024;
        /// Last axis of `text_embeddings`.
        pub joint_attention_dim: i64 = 3584, in 1..=65_536;
        /// Only false: diffusers has no embedder for the guidance scale.
        pub guidance_embeds: bool = false;
        /// Features of a head turned by frame, row and column; even.
        pub axes_dims_rope: [i64; 3] = [16, 56, 56], in 0..=65_536;
        /// Whether images to edit are modulated as at timestep 0; without such images it changes
        /// nothing.
        pub zero_cond_t: bool = false;
        /// Only false: whether a further condition is added to the timestep, as for layered images.
        pub use_additional_t_cond: bool = false;
        /// Only false: whether places count the layers of an image.
        pub use_layer3d_rope: bool = false;
    }
}

impl QwenImage {
    /// Returns the number of channels of the predicted latents.
    fn channels(&self) -> i64 {
        if self.out_channels == 0 { self.in_channels } else { self.out_channels }
    }

    fn check(&self) -> Result<()> {
        let unsupported = [
            ("guidance_embeds", self.guidance_embeds),
            ("use_additional_t_cond", self.use_additional_t_cond),
            ("use_layer3d_rope", self.use_layer3d_rope),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, set)| *set) {
            return Err(Error::config(
                format!("model.qwen_image.{field}"),
                "true is not supported",
            ));
        }
        check_axes("model.qwen_image.axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)
    }
}

impl Architecture for QwenImage {
    fn class_name(&self) -> Option<&'static str> {
        Some("QwenImageTransformer2DModel")
    }

    fn retired_fields(&self) -> &'static [&'static str] {
        &["pooled_projection_dim"]
    }

    fn stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        self.check()?;
        let heads = Heads {
            num_heads: self.num_attention_heads,
            width: self.attention_head_dim,
            with_bias: true,
            epsilon: EPSILON,
            rounding: Rounding::EachStep,
            takes_mask: true,
        };
        let width = self.width();
        let block = |index| {
            Box::new(JointStage::new(index, &BLOCK_NAMES, width, 4 * width, heads))
                as Box<dyn Stage>
        };
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embed::new(self))];
        stages.extend((0..self.num_layers).map(block));
        stages.push(Box::new(Head::new(
            width,
            self.patch_size.pow(2) * self.channels(),
            true,
            EPSILON,
        )));
        Ok(stages)
    }

    fn adapter(&self) -> &'static str {
        "qwen_image"
    }

    fn inputs(&self) -> Vec<&'static str> {
        vec!["hidden_states", "encoder_hidden_states", "timestep", "grid"]
    }

    fn width(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }

    fn image_tokens(&self, latents: &[i64]) -> i64 {
        latents[1..].iter().product::<i64>() / 4
    }

    fn check_data(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        let [channels, ..] = expect_image("model.qwen_image", shapes.latents, self.patch_size)?;
        expect_equal(
            "model.qwen_image.in_channels",
            self.in_channels,
            Some(4 * channels),
            "latents in 2 x 2 patches have",
        )?;
        expect_equal(
            "model.qwen_image.out_channels",
            self.channels(),
            Some(channels),
            "latents have",
        )?;
        let text = shapes.last("text_embeddings");
        expect_equal(
            "model.qwen_image.joint_attention_dim",
            self.joint_attention_dim,
            text,
            "text_embeddings have",
        )
    }
}

const BLOCK_NAMES: BlockNames = BlockNames {
    image_modulation: "img_mod.1",
    text_modulation: "txt_mod.1",
    image_feed: "img_mlp",
    text_feed: "txt_mlp",
};

/// Converts latents and text to tokens, and the timestep to a vector.
struct Embed {
    params: ParamSet,
    image: Linear,
    text_norm: RmsNorm,
    text: Linear,
    timestep: ScalarEmbedding,
    axes: [Axis; 3],
    /// Rotary tables over text and image, by the grid and the number of text tokens.
    ropes: PerShape<([i64; 3], i64)>,
}

impl Embed {
    fn new(model: &QwenImage) -> Self {
        let mut params = ParamSet::new("embed");
        let mut builder = Builder::new(&mut params, "", Rows::Image);
        let (width, text_width) = (model.width(), model.joint_attention_dim);
        let timestep = ScalarEmbedding::new(
            &mut builder.at("time_text_embed.timestep_embedder"),
            FREQUENCIES,
            width,
            true,
        )
        .scaled(1000.0);
        let text_norm = RmsNorm::new(
            &mut builder.at("txt_norm").over(Rows::Text),
            text_width,
            EPSILON,
            Rounding::EachStep,
        );
        let image = Linear::pytorch(&mut builder.at("img_in"), model.in_channels, width, true);
        let text =
            Linear::pytorch(&mut builder.at("txt_in").over(Rows::Text), text_width, width, true);
        let axes =
            model.axes_dims_rope.map(|width| Axis { width, theta: THETA, kind: Kind::Float });
        Embed { params, image, text_norm, text, timestep, axes, ropes: PerShape::new() }
    }

    /// Returns the table over text, then the image.
    fn rope(&self, sizes: [i64; 3], text_tokens: i64, device: Device) -> Tensor {
        self.ropes.get((sizes, text_tokens), || {
            rope::table(&angles(&self.axes, sizes, text_tokens, device))
        })
    }
}

/// Returns the angles of the text's positions, then of the image's: `[Lt + F · H · W, E/2]`.
///
/// Rows and columns are counted from the middle, negative before it, so that an image and its
/// larger version agree about the middle. The text continues along the diagonal, equal on all axes,
/// beyond the last row and column.
/// row or column is.
fn angles(
    axes: &[Axis; 3],
    [frames, height, width]: [i64; 3],
    text_tokens: i64,
    device: Device,
) -> Tensor {
    let places = |first, end| Tensor::arange_start(first, end, (Kind::Int64, device));
    let centred = |length: i64| places(length / 2 - length, length / 2);
    let [along_frames, along_rows, along_columns] = axes;
    let image = rope::grid_angles(
        &along_frames.angles_to(frames, device),
        &along_rows.angles(&centred(height)),
        &along_columns.angles(&centred(width)),
    );
    let first = (height / 2).max(width / 2);
    let text = axes.each_ref().map(|axis| axis.angles(&places(first, first + text_tokens)));
    Tensor::cat(&[Tensor::cat(&text, 1), image], 0)
}

impl Stage for Embed {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let (latents, text) = (input.get("hidden_states"), input.get("encoder_hidden_states"));
        let (text_tokens, image_tokens) = (text.size()[1], latents.size()[1]);
        let rope = self.rope(grid(input), text_tokens, latents.device());
        let output = Activations::new()
            .with("image", self.image.forward(params, latents))
            .with("text", self.text.forward(params, &self.text_norm.forward(params, text)))
            .with(
                "conditioning",
                self.timestep.forward(params, input.get("timestep"), latents.kind()),
            )
            .with_constant("text_rope", rope.narrow(0, 0, text_tokens))
            .with_constant("image_rope", rope.narrow(0, text_tokens, image_tokens));
        match input.find("text_mask") {
            Some(text_mask) => output.with_constant("mask", joint_mask(text_mask, image_tokens)),
            None => output,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the positions of each token, by axes of one pair each, whose angle is the position.
    fn places(sizes: [i64; 3], text_tokens: i64) -> Vec<Vec<f32>> {
        let axes = [Axis { width: 2, theta: THETA, kind: Kind::Float }; 3];
        let angles = angles(&axes, sizes, text_tokens, Device::Cpu);
        Vec::<Vec<f32>>::try_from(angles).unwrap()
    }

    #[test]
    fn rows_and_columns_are_counted_from_the_middle_and_an_odd_one_lies_before_it() {
        let places = places([1, 3, 4], 0);
        assert_eq!(places.len(), 12);
        assert_eq!(places[0], [0.0, -2.0, -2.0]);
        assert_eq!(places[6], [0.0, -1.0, 0.0]);
        assert_eq!(places[11], [0.0, 0.0, 1.0]);
    }

    #[test]
    fn text_goes_on_behind_the_largest_place_of_the_image_on_every_axis() {
        assert_eq!(places([1, 3, 9], 3)[..3], [[4.0; 3], [5.0; 3], [6.0; 3]]);
        assert_eq!(places([1, 1, 1], 2)[..2], [[0.0; 3], [1.0; 3]]);
    }

    #[test]
    fn what_published_models_do_not_use_is_refused_by_name() {
        let refused = |model: QwenImage| model.stages().map(drop).unwrap_err().to_string();
        let said = [
            refused(QwenImage { guidance_embeds: true, ..QwenImage::default() }),
            refused(QwenImage { use_additional_t_cond: true, ..QwenImage::default() }),
            refused(QwenImage { use_layer3d_rope: true, ..QwenImage::default() }),
        ];
        for (said, field) in
            said.iter().zip(["guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"])
        {
            assert!(said.contains(&format!("model.qwen_image.{field}")), "{said}");
        }
    }
}
