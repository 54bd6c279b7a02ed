//! HunyuanVideo 1.5: noisy video with its known frames, two texts with their masks, an image
//! embedding.

use tch::{Device, Kind, Tensor};

use super::inputs::{TimestepDtype, batched, text_embeddings, text_key, text_mask_key, token_mask};
use super::{AdapterSettings, Need};
use crate::error::{Error, Result};
use crate::flow::{BatchKey, FlowMatchingContext, ModelAdapter, Role};
use crate::model::{HunyuanVideo15, Model};
use crate::nn::Activations;
use crate::settings::{Family, settings};
use crate::tensor::broadcast_to_rank;

const NAME: &str = "hunyuan";

settings! {
    /// `[flow_matching.adapter]` of `adapter_type = "hunyuan"`; defaults are the reference's.
    ///
    /// Source: NeMo AutoModel 0.5.0, `HunyuanAdapter`.
    pub struct Hunyuan {
        /// Tokens and features of the zeros that stand for `image_embeds` where the batch has none;
        /// features as the model's.
        pub default_image_embed_shape: [i64; 2] = [729, 1152], in 1..;
        /// Whether the model is given the known first frame of image-to-video samples, and which
        /// frame is known.
        pub use_condition_latents: bool = true;
        /// Whether valid text tokens are counted exactly; false sums masks in the model's kind, and
        /// bfloat16 counts 257 as 256.
        pub exact_text_lengths: bool = false;
        /// Whether the mean loss leaves out the first latent frame of image-to-video samples, which
        /// the model is given.
        pub exclude_condition_frame: bool = false;
        /// Kind in which the model is told the timestep: the model's, or exactly.
        pub timestep_dtype: TimestepDtype = TimestepDtype::Compute;
    }
}

impl AdapterSettings for Hunyuan {
    fn build(&self) -> Box<dyn ModelAdapter> {
        Box::new(self.clone())
    }

    fn needs(&self, model: &Model) -> Vec<Need> {
        let mut needs = Vec::new();
        if !self.use_condition_latents && model.inputs().contains(&"condition_latents") {
            let takes = "takes `condition_latents` (in_channels are more than the latents')";
            let why = format!("is false, the model `{}` {takes}", model.name());
            needs.push(Need { key: "use_condition_latents", value: "true".into(), why });
        }
        let [tokens, width] = self.default_image_embed_shape;
        if let Model::HunyuanVideo15(HunyuanVideo15 { image_embed_dim, .. }) = model
            && *image_embed_dim != width
        {
            let why =
                format!("has {width} features, the model's image_embed_dim is {image_embed_dim}");
            needs.push(Need {
                key: "default_image_embed_shape",
                value: format!("[{tokens}, {image_embed_dim}]"),
                why,
            });
        }
        needs
    }
}

impl ModelAdapter for Hunyuan {
    fn name(&self) -> &'static str {
        NAME
    }

    fn keys(&self) -> Vec<BatchKey> {
        let [tokens, features] = self.default_image_embed_shape;
        let zeros = format!("zeros [{tokens}, {features}], which stand for no image");
        vec![
            text_key(),
            text_mask_key(),
            BatchKey::required(Role::Condition, &["text_embeddings_2"], &[&["L2", "D2"]]),
            BatchKey::required(Role::TokenMask, &["text_mask_2"], &[&["L2"]]),
            BatchKey::optional(Role::Fixed, &["image_embeds"], &[&["Li", "Di"]], zeros),
        ]
    }

    fn provides(&self) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
            "image_embeds",
            "condition_latents",
        ];
        if self.use_condition_latents { ALL } else { &ALL[..ALL.len() - 1] }
    }

    /// `hidden_states` as the noisy latents `[B, C, F, H, W]`, `condition_latents` `[B, C + 1, F,
    /// H, W]`, `timestep` `[B]` on the scale of the training timesteps, both texts `[B, L, D]` and
    /// their masks `[B, L]` up to the longest valid one, `image_embeds` `[B, L3, D]`, zeros for a
    /// sample without an image; `counted_frames` `[B, 1, F, 1, 1]` if a frame is left out.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        if context.noisy_latents.dim() != 5 {
            let what = format!(
                "the hunyuan adapter needs latents [B, C, F, H, W], found {:?}",
                context.noisy_latents.size()
            );
            return Err(Error::data("batch", what));
        }
        let (text, text_mask) =
            self.trimmed(context, text_embeddings(context, NAME)?, "text_mask")?;
        let glyphs = batched(context, "text_embeddings_2", NAME, 3)?;
        let (glyphs, glyph_mask) = self.trimmed(context, glyphs, "text_mask_2")?;
        let mut inputs = Activations::new()
            .with_constant("hidden_states", context.noisy_latents.shallow_clone())
            .with_constant("timestep", self.timestep_dtype.training_timesteps(context))
            .with_constant("encoder_hidden_states", text)
            .with_constant("encoder_attention_mask", text_mask)
            .with_constant("encoder_hidden_states_2", glyphs)
            .with_constant("encoder_attention_mask_2", glyph_mask)
            .with_constant("image_embeds", self.image_embeds(context)?);
        if self.use_condition_latents {
            inputs = inputs.with_constant("condition_latents", condition_latents(context));
        }
        if self.exclude_condition_frame {
            inputs = inputs.with_constant("counted_frames", counted_frames(context));
        }
        Ok(inputs)
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        output.get("prediction").shallow_clone()
    }

    fn loss_mask(&self, output: &Activations) -> Option<Tensor> {
        output.find("counted_frames").map(Tensor::shallow_clone)
    }
}

impl Hunyuan {
    /// Returns a text `[B, L, D]` and its mask without the padding that all samples have at their
    /// end; padding before a text stays and is masked.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch has no such mask or it does not fit; all models of the family
    /// require it, and so does the reference.
    fn trimmed(
        &self,
        context: &FlowMatchingContext<'_>,
        text: Tensor,
        mask_key: &str,
    ) -> Result<(Tensor, Tensor)> {
        let mask = token_mask(context, mask_key, &text, NAME)?;
        let tokens = text.size()[1];
        // Read from the loader's batch on the host, which avoids a device synchronization.
        let stored = context.batch.get(mask_key).expect("just found");
        let length = self.longest(stored, context.dtype).clamp(1, tokens.max(1)).min(tokens);
        Ok((text.narrow(1, 0, length), mask.narrow(1, 0, length)))
    }

    /// Returns the number of tokens up to the last valid one of any sample; for right-padded texts,
    /// the valid tokens of the longest.
    fn longest(&self, mask: &Tensor, dtype: Kind) -> i64 {
        let tokens = mask.size().last().copied().unwrap_or_default();
        if mask.numel() == 0 {
            return tokens;
        }
        let places = Tensor::arange_start(1, tokens + 1, (Kind::Int64, Device::Cpu));
        let last = (mask.ne(0).to_kind(Kind::Int64) * places).max();
        // The reference counts in the compute kind.
        let counted = if self.exact_text_lengths { last } else { last.to_kind(dtype) };
        counted.double_value(&[]) as i64
    }

    /// Returns the batch's image embeddings for its image-to-video samples, and zeros for the
    /// others, which models take for no image.
    fn image_embeds(&self, context: &FlowMatchingContext<'_>) -> Result<Tensor> {
        if context.batch.get("image_embeds").is_none() {
            let [tokens, features] = self.default_image_embed_shape;
            let size = [context.noisy_latents.size()[0], tokens, features];
            return Ok(Tensor::zeros(size, (context.dtype, context.device)));
        }
        let found = batched(context, "image_embeds", NAME, 3)?;
        Ok(found.where_self(&broadcast_to_rank(context.image_to_video, 3), &found.zeros_like()))
    }
}

/// Returns the known part of the clean latents with a mask of it: the first frame of image-to-video
/// samples.
///
/// # Shapes
/// Returns `[B, C + 1, F, H, W]` in the compute kind: the known latents, then a channel of 1 where
/// they are known; zeros elsewhere.
fn condition_latents(context: &FlowMatchingContext<'_>) -> Tensor {
    let first = context.latents.narrow(2, 0, 1);
    let known = Tensor::cat(&[&first, &first.narrow(1, 0, 1).ones_like()], 1);
    let known =
        known.where_self(&broadcast_to_rank(context.image_to_video, 5), &known.zeros_like());
    let later = context.latents.size()[2] - 1;
    known.constant_pad_nd([0i64, 0, 0, 0, 0, later])
}

/// Returns `[B, 1, F, 1, 1]` boolean: every frame but the known ones.
fn counted_frames(context: &FlowMatchingContext<'_>) -> Tensor {
    let frames = context.latents.size()[2];
    let first =
        Tensor::arange(frames, (Kind::Int64, context.device)).eq(0).view([1, 1, frames, 1, 1]);
    first.logical_and(&broadcast_to_rank(context.image_to_video, 5)).logical_not()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::adapter::inputs::tests::prepared;
    use crate::data::{Batch, DataType};
    use crate::flow::{FlowMatchingPipeline, FlowMatchingSettings, StepOptions, TaskScope};
    use crate::rng::{Key, Purpose, Stream};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    const SIZE: i64 = 8;

    fn adapter() -> Hunyuan {
        Hunyuan { default_image_embed_shape: [3, 7], ..Hunyuan::default() }
    }

    fn stream() -> Stream {
        Stream::Batch(Key::new(21, Purpose::Test))
    }

    /// Two channels, three frames; texts of at most five and two valid tokens.
    fn batch() -> Batch {
        let normal = |name: &str, size: &[i64]| {
            Key::new(4, Purpose::Test).named(name).seeded(|| Tensor::randn(size, FLOAT))
        };
        let mask = |tokens: i64, valid: i64| {
            Tensor::arange(tokens, FLOAT).lt(valid as f64).expand([SIZE, tokens], false).copy()
        };
        let tensors = [
            ("video_latents", normal("latents", &[SIZE, 2, 3, 4, 4])),
            ("text_embeddings", normal("text", &[SIZE, 6, 5])),
            ("text_mask", mask(6, 5)),
            ("text_embeddings_2", normal("glyphs", &[SIZE, 4, 3])),
            ("text_mask_2", mask(4, 2)),
            ("image_embeds", normal("image", &[SIZE, 3, 7])),
        ];
        let tensors = tensors
            .into_iter()
            .map(|(key, tensor)| (key.to_string(), tensor))
            .collect::<BTreeMap<_, _>>();
        Batch { tensors, data_type: DataType::Video, sample_ids: Vec::new(), bad_samples: 0 }
    }

    fn inputs(adapter: &Hunyuan, batch: &Batch, image_to_video: &[bool]) -> Result<Activations> {
        let latents = batch.get("video_latents").unwrap();
        prepared(adapter, batch, latents, &[0.5; SIZE as usize], image_to_video)
    }

    #[test]
    fn a_sample_of_a_mixed_batch_is_what_it_is_in_a_batch_of_its_task() {
        let tasks = [true, false, false, true, true, false, true, false];
        let inputs_of =
            |tasks: &[bool; SIZE as usize]| inputs(&adapter(), &batch(), tasks).unwrap();
        let (mixed, all, none) = (inputs_of(&tasks), inputs_of(&[true; 8]), inputs_of(&[false; 8]));
        for name in mixed.names() {
            for (sample, image_to_video) in tasks.iter().enumerate() {
                let uniform = if *image_to_video { &all } else { &none };
                let row = |inputs: &Activations| inputs.get(name).get(sample as i64);
                assert!(row(&mixed).equal(&row(uniform)), "{name} of sample {sample}");
            }
        }
        assert!(
            !none.get("image_embeds").any().double_value(&[]).eq(&1.0),
            "without an image there are zeros"
        );
        let known = all.get("condition_latents");
        assert_eq!(known.size(), [SIZE, 3, 3, 4, 4]);
        assert!(
            known
                .narrow(1, 0, 2)
                .narrow(2, 0, 1)
                .equal(&batch().get("video_latents").unwrap().narrow(2, 0, 1))
        );
        assert_eq!(known.narrow(1, 2, 1).sum(Kind::Float).double_value(&[]), (SIZE * 16) as f64);
        assert_eq!(known.narrow(2, 1, 2).abs().sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(none.get("condition_latents").abs().sum(Kind::Float).double_value(&[]), 0.0);
    }

    #[test]
    fn texts_end_with_the_longest_valid_one() {
        let inputs = inputs(&adapter(), &batch(), &[false; 8]).unwrap();
        assert_eq!(inputs.get("encoder_hidden_states").size(), [SIZE, 5, 5]);
        assert_eq!(inputs.get("encoder_attention_mask").size(), [SIZE, 5]);
        assert_eq!(inputs.get("encoder_hidden_states_2").size(), [SIZE, 2, 3]);
        assert_eq!(inputs.get("encoder_attention_mask_2").size(), [SIZE, 2]);
    }

    #[test]
    fn bfloat16_undercounts_a_long_text_unless_counted_exactly() {
        let mask = Tensor::arange(300, FLOAT).lt(257.0).unsqueeze(0);
        let exact = Hunyuan { exact_text_lengths: true, ..adapter() };
        assert_eq!(adapter().longest(&mask, Kind::BFloat16), 256);
        assert_eq!(exact.longest(&mask, Kind::BFloat16), 257);
        assert_eq!(adapter().longest(&mask, Kind::Float), 257);
    }

    #[test]
    fn the_known_frame_is_left_out_of_the_mean_where_asked() {
        let tasks = std::cell::RefCell::new(Tensor::new());
        let settings = FlowMatchingSettings {
            task_scope: TaskScope::Sample,
            i2v_prob: 0.5,
            ..FlowMatchingSettings::default()
        };
        let loss = |exclude_condition_frame: bool| {
            let adapter = Box::new(Hunyuan { exclude_condition_frame, ..adapter() });
            let pipeline =
                FlowMatchingPipeline::new(settings.clone(), adapter, Device::Cpu, Kind::Float);
            let model = |inputs: Activations| {
                *tasks.borrow_mut() =
                    inputs.get("condition_latents").amax([1i64, 2, 3, 4].as_slice(), false).gt(0.0);
                Ok(Activations::new()
                    .with("prediction", inputs.get("hidden_states").zeros_like())
                    .carrying_constants_of(&inputs))
            };
            let options = StepOptions { global_step: 0, collect_metrics: false, check_loss: true };
            pipeline.step(model, &batch(), &stream(), options).unwrap().loss
        };
        let (whole, without) = (loss(false), loss(true));
        let image_to_video = Vec::<bool>::try_from(&*tasks.borrow()).unwrap();
        assert!(
            image_to_video.contains(&true) && image_to_video.contains(&false),
            "{image_to_video:?}"
        );
        let frames = |sample: usize| if image_to_video[sample] { 1..3 } else { 0..3 };
        let kept = (0..SIZE as usize)
            .flat_map(|sample| frames(sample).map(move |frame| (sample as i64, frame)));
        let kept: Vec<Tensor> =
            kept.map(|(sample, frame)| whole.weighted_loss.get(sample).select(1, frame)).collect();
        let expected = Tensor::stack(&kept, 0).mean(Kind::Float).double_value(&[]);
        // Sums of at most 768 f32 numbers in another order.
        assert!(
            (without.average_weighted_loss.double_value(&[]) - expected).abs() < 1e-5 * expected
        );
        assert!((whole.average_weighted_loss.double_value(&[]) - expected).abs() > 1e-3 * expected);
    }

    #[test]
    fn a_batch_that_does_not_fit_is_refused_by_name() {
        let refused = |key: &str, instead: Option<Tensor>| {
            let mut batch = batch();
            match instead {
                Some(tensor) => batch.tensors.insert(key.into(), tensor),
                None => batch.tensors.remove(key),
            };
            inputs(&adapter(), &batch, &[true; 8]).unwrap_err().to_string()
        };
        for key in ["text_embeddings", "text_mask", "text_embeddings_2", "text_mask_2"] {
            let error = refused(key, None);
            assert!(error.contains(&format!("the hunyuan adapter needs `{key}`")), "{error}");
        }
        let images = refused("video_latents", Some(Tensor::zeros([SIZE, 2, 4, 4], FLOAT)));
        assert!(images.contains("needs latents [B, C, F, H, W], found [8, 2, 4, 4]"), "{images}");
        let short = refused("text_mask_2", Some(Tensor::ones([SIZE, 3], FLOAT)));
        assert!(
            short.contains("`text_mask_2` [8, 3] must cover the 4 tokens of its text"),
            "{short}"
        );
    }
}
