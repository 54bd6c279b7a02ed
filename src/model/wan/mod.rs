//! Wan 2.1 and 2.2: blocks of attention over the video, attention over text and image, and a
//! feed-forward part.
//!
//! Inputs: `hidden_states` `[B, C, F, H, W]`, `timestep` `[B]` on the scale of the training
//! timesteps, `encoder_hidden_states` `[B, Lt, text_dim]`. If `in_channels` exceeds the latents'
//! `C`, also `condition_latents` `[B, in_channels − C, F, H, W]`, which follow the noisy channels;
//! if the model has `image_dim`, also `encoder_hidden_states_image` `[B, Li, image_dim]`, all
//! images of a sample one after another.
//!
//! Source: Wan Team 2025, arXiv:2503.20314; diffusers 0.42.1, `WanTransformer3DModel`, whose field
//! and parameter names these are.

mod settings;
mod stages;

use tch::Kind;

pub use self::settings::Wan;
use self::stages::{Block, Embed, Head};
use super::{Architecture, SampleShapes, expect_equal, expect_even};
use crate::error::{Error, Result};
use crate::nn::Stage;
use crate::nn::attention::Heads;
use crate::nn::rope::Axis;
use crate::ops::Rounding;

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;
/// Number of text tokens if the model also attends to images: diffusers separates the two by this
/// number.
const TEXT_TOKENS: i64 = 512;

impl Wan {
    /// Returns the number of channels of the prediction, and so of the latents.
    fn latent_channels(&self) -> i64 {
        if self.out_channels == 0 { self.in_channels } else { self.out_channels }
    }

    /// True if further channels follow the noisy ones.
    fn is_conditioned(&self) -> bool {
        self.in_channels > self.latent_channels()
    }

    fn heads(&self) -> Heads {
        Heads {
            num_heads: self.num_attention_heads,
            width: self.attention_head_dim,
            with_bias: true,
            epsilon: self.eps,
            rounding: Rounding::Once,
            takes_mask: false,
        }
    }

    /// Returns the features of a head that frame, row and column rotate: a third each, with the
    /// remainder for the frame.
    fn axes(&self) -> [Axis; 3] {
        let side = 2 * (self.attention_head_dim / 6);
        [self.attention_head_dim - 2 * side, side, side].map(|width| Axis {
            width,
            theta: THETA,
            kind: Kind::Double,
        })
    }

    fn check(&self) -> Result<()> {
        let refused =
            |field: &str, what: String| Err(Error::config(format!("model.wan.{field}"), what));
        expect_even("model.wan.attention_head_dim", self.attention_head_dim)?;
        expect_even("model.wan.freq_dim", self.freq_dim)?;
        if self.in_channels < self.latent_channels() {
            return refused(
                "in_channels",
                format!("{} are fewer than out_channels = {}", self.in_channels, self.out_channels),
            );
        }
        match (self.image_dim, self.added_kv_proj_dim, self.pos_embed_seq_len) {
            (Some(_), None, _) => {
                refused("image_dim", "is supported with added_kv_proj_dim only".into())
            }
            (None, Some(_), _) => {
                refused("added_kv_proj_dim", "is supported with image_dim only".into())
            }
            (None, _, Some(_)) => {
                refused("pos_embed_seq_len", "is supported with image_dim only".into())
            }
            (_, Some(inputs), _) if inputs != self.width() => refused(
                "added_kv_proj_dim",
                format!("{inputs} must be the model's width, {}", self.width()),
            ),
            _ => Ok(()),
        }
    }

    fn check_grid(&self, latents: &[i64]) -> Result<()> {
        let &[_, frames, height, width] = latents else {
            return Err(Error::config(
                "model.wan",
                format!("takes latents [C, F, H, W], the data have {latents:?}"),
            ));
        };
        for (size, patch) in [frames, height, width].into_iter().zip(self.patch_size) {
            if size % patch != 0 {
                let what = format!(
                    "{:?} does not divide the data's latents of {frames} x {height} x {width}",
                    self.patch_size
                );
                return Err(Error::config("model.wan.patch_size", what));
            }
            if size / patch > self.rope_max_seq_len {
                let what = format!(
                    "is {}, an axis of the data's latents has {} tokens",
                    self.rope_max_seq_len,
                    size / patch
                );
                return Err(Error::config("model.wan.rope_max_seq_len", what));
            }
        }
        Ok(())
    }

    fn check_channels(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        let channels = shapes.latents[0];
        expect_equal(
            "model.wan.out_channels",
            self.latent_channels(),
            Some(channels),
            "latents have",
        )?;
        let behind = shapes.of.get("condition_latents").map_or(0, |shape| shape[0]);
        if self.in_channels == channels || self.in_channels == channels + behind {
            return Ok(());
        }
        let what = format!(
            "is {}, the data's latents have {channels}, their `condition_latents` {behind}",
            self.in_channels
        );
        Err(Error::config("model.wan.in_channels", what))
    }

    fn check_images(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        let Some(image_dim) = self.image_dim else { return Ok(()) };
        let missing = || {
            Error::config(
                "model.wan.image_dim",
                "the model attends to images, the data have no `image_embeds`",
            )
        };
        let (&width, tokens) = shapes
            .of
            .get("image_embeds")
            .and_then(|shape| shape.split_last())
            .ok_or_else(missing)?;
        expect_equal("model.wan.image_dim", image_dim, Some(width), "image_embeds have")?;
        let tokens: i64 = tokens.iter().product();
        if let Some(length) = self.pos_embed_seq_len.filter(|&length| length != tokens) {
            return Err(Error::config(
                "model.wan.pos_embed_seq_len",
                format!("is {length}, the data's image_embeds have {tokens} tokens"),
            ));
        }
        match shapes.of.get("text_embeddings").map(Vec::as_slice) {
            Some([tokens, _]) if *tokens != TEXT_TOKENS => {
                let what = format!(
                    "beside images the model takes {TEXT_TOKENS} tokens of text, the data's text_embeddings have {tokens}"
                );
                Err(Error::config("model.wan.image_dim", what))
            }
            _ => Ok(()),
        }
    }
}

impl Architecture for Wan {
    fn class_name(&self) -> Option<&'static str> {
        Some("WanTransformer3DModel")
    }

    fn ignored_parameters(&self) -> &'static [&'static str] {
        &["norm_added_q"]
    }

    fn stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        self.check()?;
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embed::new(self))];
        stages.extend(
            (0..self.num_layers).map(|index| Box::new(Block::new(self, index)) as Box<dyn Stage>),
        );
        stages.push(Box::new(Head::new(self)));
        Ok(stages)
    }

    fn adapter(&self) -> &'static str {
        "simple"
    }

    fn inputs(&self) -> Vec<&'static str> {
        let mut inputs = vec!["hidden_states", "timestep", "encoder_hidden_states"];
        inputs.extend(self.is_conditioned().then_some("condition_latents"));
        inputs.extend(self.image_dim.map(|_| "encoder_hidden_states_image"));
        inputs
    }

    fn width(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }

    fn takes_frames(&self) -> bool {
        true
    }

    fn image_tokens(&self, latents: &[i64]) -> i64 {
        latents[1..].iter().zip(self.patch_size).map(|(length, patch)| length / patch).product()
    }

    fn text_tokens(&self) -> Option<i64> {
        Some(TEXT_TOKENS)
    }

    fn required_text_tokens(&self) -> Option<i64> {
        self.image_dim.map(|_| TEXT_TOKENS)
    }

    fn attention_modules(&self) -> &'static [&'static str] {
        &[
            "attn1.to_q",
            "attn1.to_k",
            "attn1.to_v",
            "attn1.to_out.0",
            "attn2.to_q",
            "attn2.to_k",
            "attn2.to_v",
            "attn2.to_out.0",
            "attn2.add_k_proj",
            "attn2.add_v_proj",
        ]
    }

    fn check_data(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        self.check_grid(shapes.latents)?;
        if shapes.of.is_empty() {
            // A plan for a shape alone has no conditions to check.
            return expect_equal(
                "model.wan.out_channels",
                self.latent_channels(),
                Some(shapes.latents[0]),
                "latents have",
            );
        }
        self.check_channels(shapes)?;
        expect_equal(
            "model.wan.text_dim",
            self.text_dim,
            shapes.last("text_embeddings"),
            "text_embeddings have",
        )?;
        self.check_images(shapes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The model with 1.3B parameters.
    fn small() -> Wan {
        Wan { num_attention_heads: 12, ffn_dim: 8960, num_layers: 30, ..Wan::default() }
    }

    fn image_to_video() -> Wan {
        Wan {
            in_channels: 36,
            image_dim: Some(1280),
            added_kv_proj_dim: Some(5120),
            ..Wan::default()
        }
    }

    #[test]
    fn published_configurations_have_diffusers_number_of_parameters() {
        let ti2v_5b = Wan {
            num_attention_heads: 24,
            in_channels: 48,
            out_channels: 48,
            ffn_dim: 14_336,
            num_layers: 30,
            ..Wan::default()
        };
        // Counted in diffusers 0.42.1 on the meta device.
        let counted = [
            (Wan::default(), 14_288_491_584),
            (small(), 1_418_996_800),
            (image_to_video(), 16_394_878_784),
            (Wan { pos_embed_seq_len: Some(514), ..image_to_video() }, 16_395_536_704),
            (Wan { in_channels: 36, ..Wan::default() }, 14_288_901_184),
            (ti2v_5b, 4_999_787_712),
        ];
        for (model, count) in counted {
            let stages = model.stages().expect("published");
            assert_eq!(
                stages.iter().map(|stage| stage.params().numel()).sum::<i64>(),
                count,
                "{model:?}"
            );
        }
    }

    #[test]
    fn what_diffusers_keeps_in_f32_is_precise() {
        let stages = Wan { num_layers: 1, ..image_to_video() }.stages().expect("valid");
        let infos = stages.iter().flat_map(|stage| stage.params().infos());
        let precise: Vec<&str> =
            infos.filter(|info| info.precise).map(|info| info.name.as_str()).collect();
        let expected = [
            "condition_embedder.time_embedder.linear_1.weight",
            "condition_embedder.time_embedder.linear_1.bias",
            "condition_embedder.time_embedder.linear_2.weight",
            "condition_embedder.time_embedder.linear_2.bias",
            "condition_embedder.image_embedder.norm1.weight",
            "condition_embedder.image_embedder.norm1.bias",
            "condition_embedder.image_embedder.norm2.weight",
            "condition_embedder.image_embedder.norm2.bias",
            "blocks.0.scale_shift_table",
            "blocks.0.norm2.weight",
            "blocks.0.norm2.bias",
            "scale_shift_table",
        ];
        assert_eq!(precise, expected);
    }

    #[test]
    fn fields_that_exclude_each_other_are_refused_by_name() {
        let refused = [
            (Wan { attention_head_dim: 127, ..small() }, "attention_head_dim"),
            (Wan { freq_dim: 255, ..small() }, "freq_dim"),
            (Wan { image_dim: Some(1280), ..small() }, "image_dim"),
            (Wan { added_kv_proj_dim: Some(1536), ..small() }, "added_kv_proj_dim"),
            (Wan { added_kv_proj_dim: Some(1536), ..image_to_video() }, "added_kv_proj_dim"),
            (Wan { pos_embed_seq_len: Some(514), ..small() }, "pos_embed_seq_len"),
        ];
        for (model, field) in refused {
            let message = model.stages().err().expect("refused").to_string();
            assert!(message.contains(&format!("model.wan.{field}:")), "{message}");
        }
    }

    #[test]
    fn data_that_the_model_cannot_take_are_refused() {
        let check = |model: &Wan, latents: &[i64], of: &[(&'static str, &'static [i64])]| {
            let checked = model.check_data(&SampleShapes {
                latents,
                of: of.iter().map(|(key, shape)| (key.to_string(), shape.to_vec())).collect(),
            });
            checked.map_err(|error| error.to_string())
        };
        let (condition, image): (&[i64], &[i64]) = (&[20, 5, 8, 6], &[257, 1280]);
        let whole = [
            ("condition_latents", condition),
            ("image_embeds", image),
            ("text_embeddings", &[512, 4096]),
        ];
        assert_eq!(check(&small(), &[16, 5, 8, 6], &[("text_embeddings", &[226, 4096])]), Ok(()));
        assert_eq!(check(&image_to_video(), &[16, 5, 8, 6], &whole), Ok(()));
        let two_images = Wan { pos_embed_seq_len: Some(514), ..image_to_video() };
        let images: (&str, &[i64]) = ("image_embeds", &[2, 257, 1280]);
        assert_eq!(check(&two_images, &[16, 5, 8, 6], &[whole[0], images, whole[2]]), Ok(()));
        let refused = [
            (check(&small(), &[16, 8, 6], &[]), "model.wan: "),
            (check(&small(), &[16, 5, 7, 6], &[]), "patch_size"),
            (check(&small(), &[16, 1025, 8, 6], &[]), "rope_max_seq_len"),
            (check(&small(), &[4, 5, 8, 6], &[]), "out_channels"),
            (check(&small(), &[16, 5, 8, 6], &[("text_embeddings", &[226, 512])]), "text_dim"),
            (check(&image_to_video(), &[16, 5, 8, 6], &whole[1..]), "in_channels"),
            (check(&image_to_video(), &[16, 5, 8, 6], &[whole[0], whole[2]]), "image_dim"),
            (
                check(
                    &image_to_video(),
                    &[16, 5, 8, 6],
                    &[whole[0], whole[1], ("text_embeddings", &[226, 4096])],
                ),
                "512 tokens of text",
            ),
            (check(&two_images, &[16, 5, 8, 6], &whole), "pos_embed_seq_len"),
        ];
        for (checked, expected) in refused {
            assert!(
                checked.as_ref().is_err_and(|message| message.contains(expected)),
                "{expected}: {checked:?}"
            );
        }
    }
}
