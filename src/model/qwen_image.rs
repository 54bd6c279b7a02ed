//! Qwen-Image: double blocks over image and text.
//!
//! Inputs: `hidden_states` `[B, Li, in_channels]`, `encoder_hidden_states` `[B, Lt,
//! joint_attention_dim]`, `timestep` `[B]` in `[0, 1]`, `grid`; if samples see different tokens of
//! the text, `text_mask` `[B, Lt]` boolean; and if its tokens are not the text's first ones, their
//! numbers `text_places` `[Lt]` int64 on the host.
//!
//! Source: diffusers 0.42.1, `QwenImageTransformer2DModel`, whose field and parameter names these
//! are.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::joint::{Head, JointStage, check_axes, grid, joint_mask, table_tokens};
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
    /// Rotary tables of images, by their grid.
    image_ropes: PerShape<[i64; 3]>,
    /// Rotary tables of text, by the number of their positions.
    text_ropes: PerShape<i64>,
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
        let (image_ropes, text_ropes) = (PerShape::new(), PerShape::new());
        Embed { params, image, text_norm, text, timestep, axes, image_ropes, text_ropes }
    }

    fn image_rope(&self, sizes: [i64; 3], device: Device) -> Tensor {
        self.image_ropes.get(sizes, || rope::table(&image_angles(&self.axes, sizes, device)))
    }

    /// Returns the table of text tokens with these numbers, ascending, before an image of `sizes`.
    fn text_rope(&self, sizes: [i64; 3], places: &[i64], device: Device) -> Tensor {
        let first = first_of_text(sizes);
        let end = table_tokens(first + places.last().map_or(0, |last| last + 1));
        let table =
            self.text_ropes.get(end, || rope::table(&diagonal_angles(&self.axes, end, device)));
        let run = |run: &[i64]| table.narrow(0, first + run[0], run.len() as i64);
        let runs = places.chunk_by(|a, b| a + 1 == *b);
        Tensor::cat(&runs.map(run).collect::<Vec<_>>(), 0)
    }
}

/// Returns the angles of the image's positions, `[F · H · W, E/2]`.
///
/// Rows and columns are counted from the middle, negative before it, so that an image and its
/// larger version agree about the middle.
fn image_angles(axes: &[Axis; 3], [frames, height, width]: [i64; 3], device: Device) -> Tensor {
    let centred =
        |length: i64| Tensor::arange_start(length / 2 - length, length / 2, (Kind::Int64, device));
    let [along_frames, along_rows, along_columns] = axes;
    rope::grid_angles(
        &along_frames.angles_to(frames, device),
        &along_rows.angles(&centred(height)),
        &along_columns.angles(&centred(width)),
    )
}

/// Returns the position of the text's first token. The text continues along the diagonal, equal on
/// all axes, beyond the image's last row and column, whatever its own length is.
fn first_of_text([_, height, width]: [i64; 3]) -> i64 {
    (height / 2).max(width / 2)
}

/// Returns the angles of the diagonal's positions from 0 on, `[length, E/2]`.
fn diagonal_angles(axes: &[Axis; 3], length: i64, device: Device) -> Tensor {
    Tensor::cat(&axes.each_ref().map(|axis| axis.angles_to(length, device)), 1)
}

/// Returns the numbers of the text's tokens.
fn text_places(input: &Activations, text_tokens: i64) -> Vec<i64> {
    input.find("text_places").map_or_else(
        || (0..text_tokens).collect(),
        |places| Vec::try_from(places).expect("text_places: integers"),
    )
}

impl Stage for Embed {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let (latents, text) = (input.get("hidden_states"), input.get("encoder_hidden_states"));
        let (sizes, device) = (grid(input), latents.device());
        let places = text_places(input, text.size()[1]);
        let image_tokens = latents.size()[1];
        let mask = input.find("text_mask").map(|mask| joint_mask(mask, image_tokens));
        Activations::new()
            .with("image", self.image.forward(params, latents))
            .with("text", self.text.forward(params, &self.text_norm.forward(params, text)))
            .with(
                "conditioning",
                self.timestep.forward(params, input.get("timestep"), latents.kind()),
            )
            .with_constant("text_rope", self.text_rope(sizes, &places, device))
            .with_constant("image_rope", self.image_rope(sizes, device))
            .with_optional("mask", mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Axes of one pair each, whose angle is the position.
    const AXES: [Axis; 3] = [Axis { width: 2, theta: THETA, kind: Kind::Float }; 3];

    fn rows(angles: &Tensor) -> Vec<Vec<f32>> {
        Vec::<Vec<f32>>::try_from(angles).unwrap()
    }

    #[test]
    fn rows_and_columns_are_counted_from_the_middle_and_an_odd_one_lies_before_it() {
        let places = rows(&image_angles(&AXES, [1, 3, 4], Device::Cpu));
        assert_eq!(places.len(), 12);
        assert_eq!(places[0], [0.0, -2.0, -2.0]);
        assert_eq!(places[6], [0.0, -1.0, 0.0]);
        assert_eq!(places[11], [0.0, 0.0, 1.0]);
    }

    #[test]
    fn text_goes_on_behind_the_largest_place_of_the_image_on_every_axis() {
        let first = |sizes| {
            let diagonal = rows(&diagonal_angles(&AXES, 20, Device::Cpu));
            diagonal[first_of_text(sizes) as usize].clone()
        };
        assert_eq!((first([1, 3, 9]), first([1, 8, 3])), (vec![4.0; 3], vec![4.0; 3]));
        assert_eq!(first([1, 1, 1]), [0.0; 3]);
    }

    #[test]
    fn a_text_that_was_cut_keeps_its_positions_and_shares_tables() {
        let embed = Embed::new(&QwenImage::default());
        let rope = |places: &[i64]| embed.text_rope([1, 4, 6], places, Device::Cpu);
        let whole = rope(&(0..40).collect::<Vec<_>>());
        for places in [&[0, 1, 2][..], &[7, 8, 9], &[1, 2, 5, 39]] {
            let kept = whole.index_select(0, &Tensor::from_slice(places));
            assert!(rope(places).equal(&kept), "{places:?}");
        }
        let alone = rope::table(&diagonal_angles(&embed.axes, 3 + 40, Device::Cpu));
        assert!(whole.equal(&alone.narrow(0, 3, 40)));
        assert!((1..=509).all(|tokens| table_tokens(3 + tokens) == 512), "one for many lengths");
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
