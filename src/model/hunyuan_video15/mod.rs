//! HunyuanVideo 1.5: joint blocks over the video and three conditions, two texts and an image.
//!
//! Inputs: `hidden_states` `[B, C, F, H, W]`; if the model has more channels than it predicts,
//! `condition_latents` `[B, in_channels - C, F, H, W]`; `timestep` `[B]` in `[0, 1000]`; a language
//! model's text `encoder_hidden_states` `[B, L, text_embed_dim]`, of at least one token; a glyph
//! encoder's `encoder_hidden_states_2` `[B, L2, text_embed_2_dim]` and `image_embeds` `[B, L3,
//! image_embed_dim]`, which may have no tokens; and where samples see different tokens of the
//! three, their masks `encoder_attention_mask` `[B, L]`, `encoder_attention_mask_2` `[B, L2]` and
//! `image_mask` `[B, L3]`, boolean.
//!
//! Source: diffusers 0.42.1, `HunyuanVideo15Transformer3DModel`, whose field and parameter names
//! these are.

mod settings;
mod stages;
mod token_refiner;

pub use self::settings::HunyuanVideo15;
use self::stages::{Embed, Head};
use self::token_refiner::TokenRefiner;
use super::joint::{JointStage, check_axes};
use super::{Architecture, SampleShapes, expect_equal};
use crate::error::{Error, Result};
use crate::nn::Stage;
use crate::nn::attention::Heads;
use crate::nn::joint_block::BlockNames;
use crate::ops::{Patch, Rounding};

/// Epsilon of every normalization in and after the blocks.
const EPSILON: f64 = 1e-6;

impl HunyuanVideo15 {
    fn heads(&self) -> Heads {
        Heads {
            num_heads: self.num_attention_heads,
            width: self.attention_head_dim,
            with_bias: true,
            epsilon: EPSILON,
            rounding: Rounding::EachStep,
            takes_mask: true,
        }
    }

    /// Returns the number of channels of the prediction, and so of the latents.
    fn latent_channels(&self) -> i64 {
        if self.out_channels == 0 { self.in_channels } else { self.out_channels }
    }

    /// True if further channels follow the noisy ones.
    fn is_conditioned(&self) -> bool {
        self.in_channels != self.latent_channels()
    }

    fn patch(&self) -> Patch {
        [self.patch_size_t, self.patch_size, self.patch_size]
    }

    fn check_channels(&self) -> Result<()> {
        let latents = self.latent_channels();
        if self.is_conditioned() && self.in_channels != 2 * latents + 1 {
            let what = format!(
                "is {}; {latents} latent channels need {latents}, or with condition latents {}",
                self.in_channels,
                2 * latents + 1
            );
            return Err(Error::config("model.hunyuan_video15.in_channels", what));
        }
        Ok(())
    }

    /// Checks that patches cover the latents; returns their channels.
    fn check_grid(&self, latents: &[i64]) -> Result<i64> {
        let &[channels, frames, height, width] = latents else {
            return Err(Error::config(
                "model.hunyuan_video15",
                format!("takes latents [C, F, H, W], the data have {latents:?}"),
            ));
        };
        let sides = [("patch_size_t", frames), ("patch_size", height), ("patch_size", width)];
        match sides.into_iter().zip(self.patch()).find(|((_, side), patch)| side % patch != 0) {
            Some(((field, _), patch)) => {
                let what = format!(
                    "{patch} does not divide the data's latents of {frames} x {height} x {width}"
                );
                Err(Error::config(format!("model.hunyuan_video15.{field}"), what))
            }
            None => Ok(channels),
        }
    }
}

impl Architecture for HunyuanVideo15 {
    fn class_name(&self) -> Option<&'static str> {
        Some("HunyuanVideo15Transformer3DModel")
    }

    /// A mean flow's model is told in diffusers' pipeline, from images alone, where a step ends.
    fn check_image_to_video(&self) -> Result<()> {
        if !self.use_meanflow {
            return Ok(());
        }
        let what = "is true: from images such a model generates by the timesteps at both ends of a step, and here it is told one; generate from text, or export the model to diffusers";
        Err(Error::config("model.hunyuan_video15.use_meanflow", what))
    }

    fn stages(&self) -> Result<Vec<Box<dyn Stage>>> {
        check_axes(
            "model.hunyuan_video15.rope_axes_dim",
            &self.rope_axes_dim,
            self.attention_head_dim,
        )?;
        self.check_channels()?;
        let (width, hidden) = (self.width(), (self.width() as f64 * self.mlp_ratio) as i64);
        if hidden == 0 {
            return Err(Error::config(
                "model.hunyuan_video15.mlp_ratio",
                format!("{} of {width} leaves nothing", self.mlp_ratio),
            ));
        }
        let refiner = TokenRefiner::new(
            self.text_embed_dim,
            width,
            self.num_attention_heads,
            self.num_refiner_layers,
        );
        let block = |index| {
            Box::new(JointStage::new(index, &BLOCK_NAMES, width, hidden, self.heads()))
                as Box<dyn Stage>
        };
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(refiner), Box::new(Embed::new(self))];
        stages.extend((0..self.num_layers).map(block));
        stages.push(Box::new(Head::new(self)));
        Ok(stages)
    }

    fn adapter(&self) -> &'static str {
        "hunyuan"
    }

    fn inputs(&self) -> Vec<&'static str> {
        let mut inputs = vec!["hidden_states", "timestep", "encoder_hidden_states"];
        inputs.extend(["encoder_hidden_states_2", "image_embeds"]);
        inputs.extend(self.is_conditioned().then_some("condition_latents"));
        inputs
    }

    fn width(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }

    fn takes_frames(&self) -> bool {
        true
    }

    fn image_tokens(&self, latents: &[i64]) -> i64 {
        latents[1..].iter().zip(self.patch()).map(|(length, patch)| length / patch).product()
    }

    /// The token refiner has modules of the same names.
    fn attention_modules(&self) -> &'static [&'static str] {
        &[
            "transformer_blocks.*.attn.to_q",
            "transformer_blocks.*.attn.to_k",
            "transformer_blocks.*.attn.to_v",
            "transformer_blocks.*.attn.to_out.0",
            "transformer_blocks.*.attn.add_q_proj",
            "transformer_blocks.*.attn.add_k_proj",
            "transformer_blocks.*.attn.add_v_proj",
            "transformer_blocks.*.attn.to_add_out",
        ]
    }

    fn check_data(&self, shapes: &SampleShapes<'_>) -> Result<()> {
        let channels = self.check_grid(shapes.latents)?;
        let expect = |field: &str, value: i64, found: Option<i64>, of: &str| {
            expect_equal(&format!("model.hunyuan_video15.{field}"), value, found, of)
        };
        expect("out_channels", self.latent_channels(), Some(channels), "latents have")?;
        expect(
            "text_embed_dim",
            self.text_embed_dim,
            shapes.last("text_embeddings"),
            "text_embeddings have",
        )?;
        expect(
            "text_embed_2_dim",
            self.text_embed_2_dim,
            shapes.last("text_embeddings_2"),
            "text_embeddings_2 have",
        )?;
        expect(
            "image_embed_dim",
            self.image_embed_dim,
            shapes.last("image_embeds"),
            "image_embeds have",
        )
    }
}

const BLOCK_NAMES: BlockNames = BlockNames {
    image_modulation: "norm1.linear",
    text_modulation: "norm1_context.linear",
    image_feed: "ff",
    text_feed: "ff_context",
};

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::settings::Task;
    use super::*;
    use crate::nn::Activations;
    use crate::rng::{Key, Purpose};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn tiny() -> HunyuanVideo15 {
        HunyuanVideo15 {
            in_channels: 5,
            out_channels: 2,
            num_attention_heads: 2,
            attention_head_dim: 8,
            num_layers: 2,
            num_refiner_layers: 1,
            patch_size: 2,
            text_embed_dim: 6,
            text_embed_2_dim: 4,
            image_embed_dim: 3,
            rope_axes_dim: [2, 2, 4],
            ..HunyuanVideo15::default()
        }
    }

    /// Returns inputs of three samples, of which some see an image; the second sample's texts are
    /// padded.
    fn inputs(images: [bool; 3]) -> Activations {
        let normal = |name: &str, size: &[i64]| {
            Key::new(8, Purpose::Test).named(name).seeded(|| Tensor::randn(size, FLOAT))
        };
        let images = Tensor::from_slice(&images);
        let padded = Tensor::from_slice2(&[[true; 3], [true, false, false], [true; 3]]);
        Activations::new()
            .with_constant("hidden_states", normal("latents", &[3, 2, 2, 4, 6]))
            .with_constant(
                "condition_latents",
                normal("known", &[3, 3, 2, 4, 6]) * images.view([3, 1, 1, 1, 1]),
            )
            .with_constant("timestep", Tensor::from_slice(&[20f32, 500.0, 990.0]))
            .with_constant("encoder_hidden_states", normal("text", &[3, 3, 6]))
            .with_constant("encoder_attention_mask", padded.shallow_clone())
            .with_constant("encoder_hidden_states_2", normal("glyphs", &[3, 3, 4]))
            .with_constant("encoder_attention_mask_2", padded)
            .with_constant("image_embeds", normal("image", &[3, 2, 3]))
            .with_constant("image_mask", images.unsqueeze(1).expand([3, 2], false))
    }

    fn predict(inputs: Activations) -> Tensor {
        let key = Key::new(17, Purpose::Initialization);
        let forward = |input: Activations, stage: Box<dyn Stage>| {
            let flat = Tensor::zeros([stage.params().numel()], FLOAT);
            stage.params().initialize(&flat, key);
            stage.forward(&stage.params().split(&flat), &input).carrying_constants_of(&input)
        };
        tiny().stages().unwrap().into_iter().fold(inputs, forward).get("prediction").shallow_clone()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn published_configurations_have_diffusers_number_of_parameters() {
        let text_to_video = HunyuanVideo15 {
            target_size: 960,
            task_type: Task::TextToVideo,
            ..HunyuanVideo15::default()
        };
        let distilled = HunyuanVideo15 { use_meanflow: true, ..HunyuanVideo15::default() };
        assert!(distilled.check_image_to_video().is_err());
        assert!(HunyuanVideo15::default().check_image_to_video().is_ok());
        // Counted in diffusers 0.42.1 on the meta device: parameters and tensors.
        for (model, count, tensors) in
            [(text_to_video, 8_326_608_160, 1801), (distilled, 8_331_330_848, 1805)]
        {
            let stages = model.stages().unwrap();
            assert_eq!(
                stages.iter().map(|stage| stage.params().numel()).sum::<i64>(),
                count,
                "{model:?}"
            );
            assert_eq!(
                stages.iter().map(|stage| stage.params().infos().len()).sum::<usize>(),
                tensors,
                "{model:?}"
            );
        }
    }

    #[test]
    fn fields_that_contradict_each_other_are_refused_by_name() {
        let refused = [
            (HunyuanVideo15 { rope_axes_dim: [2, 2, 2], ..tiny() }, "rope_axes_dim"),
            (HunyuanVideo15 { rope_axes_dim: [1, 3, 4], ..tiny() }, "rope_axes_dim"),
            (HunyuanVideo15 { mlp_ratio: 0.01, ..tiny() }, "mlp_ratio"),
            (HunyuanVideo15 { in_channels: 4, ..tiny() }, "in_channels"),
        ];
        for (model, field) in refused {
            let message = model.stages().err().expect("refused").to_string();
            assert!(message.contains(&format!("model.hunyuan_video15.{field}:")), "{message}");
        }
    }

    #[test]
    fn data_that_the_model_cannot_take_are_refused() {
        let check = |model: &HunyuanVideo15, latents: &[i64], of: &[(&str, &[i64])]| {
            let of = of.iter().map(|(key, shape)| (key.to_string(), shape.to_vec())).collect();
            model.check_data(&SampleShapes { latents, of }).map_err(|error| error.to_string())
        };
        let keys: [(&str, &[i64]); 3] = [
            ("text_embeddings", &[9, 6]),
            ("text_embeddings_2", &[5, 4]),
            ("image_embeds", &[7, 3]),
        ];
        assert_eq!(check(&tiny(), &[2, 3, 4, 6], &keys), Ok(()));
        assert_eq!(
            check(&HunyuanVideo15 { in_channels: 2, ..tiny() }, &[2, 3, 4, 6], &keys),
            Ok(())
        );
        let refused = [
            (
                check(&tiny(), &[2, 4, 6], &[]),
                "takes latents [C, F, H, W], the data have [2, 4, 6]",
            ),
            (check(&tiny(), &[2, 3, 4, 5], &[]), "patch_size: 2 does not divide"),
            (
                check(&HunyuanVideo15 { patch_size_t: 2, ..tiny() }, &[2, 3, 4, 6], &[]),
                "patch_size_t: 2 does not divide",
            ),
            (check(&tiny(), &[3, 3, 4, 6], &[]), "out_channels"),
            (check(&tiny(), &[2, 3, 4, 6], &[("text_embeddings", &[9, 5])]), "text_embed_dim"),
            (check(&tiny(), &[2, 3, 4, 6], &[("text_embeddings_2", &[9, 5])]), "text_embed_2_dim"),
            (check(&tiny(), &[2, 3, 4, 6], &[("image_embeds", &[9, 5])]), "image_embed_dim"),
        ];
        for (checked, expected) in refused {
            assert!(
                checked.as_ref().is_err_and(|message| message.contains(expected)),
                "{expected}: {checked:?}"
            );
        }
    }

    #[test]
    fn a_sample_does_not_see_whether_others_have_an_image() {
        let (mixed, all, none) = (
            predict(inputs([true, false, true])),
            predict(inputs([true; 3])),
            predict(inputs([false; 3])),
        );
        assert_eq!(mixed.size(), [3, 2, 2, 4, 6]);
        for (sample, uniform, other) in [(0, &all, &none), (1, &none, &all), (2, &all, &none)] {
            // f32 rounding of products with other blocking.
            assert!(distance(&mixed.get(sample), &uniform.get(sample)) < 1e-5, "sample {sample}");
            assert!(distance(&mixed.get(sample), &other.get(sample)) > 1e-3, "sample {sample}");
        }
    }

    #[test]
    fn padding_is_never_seen_and_an_empty_text_gives_numbers() {
        let changed = |text: f64, is_seen: bool| {
            let padded = Tensor::from_slice2(&[[0f32, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
                .unsqueeze(-1);
            let before = inputs([true; 3]);
            let shifted = |name: &'static str| before.get(name) + &padded * text;
            let masked = |name| before.get(name).logical_and(&Tensor::from(is_seen));
            Activations::new()
                .with_constant("encoder_hidden_states", shifted("encoder_hidden_states"))
                .with_constant("encoder_hidden_states_2", shifted("encoder_hidden_states_2"))
                .with_constant("encoder_attention_mask", masked("encoder_attention_mask"))
                .with_constant("encoder_attention_mask_2", masked("encoder_attention_mask_2"))
                .carrying_constants_of(&before)
        };
        assert!(distance(&predict(changed(0.0, true)), &predict(changed(100.0, true))) < 1e-5);
        assert!(predict(changed(0.0, false)).isfinite().all().double_value(&[]) == 1.0);
    }
}
