//! HunyuanVideo 1.5: noisy video with its known frames, two texts with their masks, an image
//! embedding.

use tch::{Device, Kind, Tensor};

use super::inputs::{
    TimestepDtype, batched, stored, text_embeddings, text_key, text_mask_key, token_mask,
};
use super::seen_tokens::SeenTokens;
use super::{AdapterSettings, Need};
use crate::error::{Error, Result};
use crate::flow::{BatchKey, FlowMatchingContext, ModelAdapter, Role};
use crate::model::{HunyuanVideo15, Model};
use crate::nn::Activations;
use crate::settings::{Family, settings};
use crate::tensor::broadcast_to_rank;

const NAME: &str = "hunyuan";

/// Key of the image embeddings.
const IMAGE: &str = "image_embeds";

settings! {
    /// `[flow_matching.adapter]` of `adapter_type = "hunyuan"`; defaults are the reference's.
    ///
    /// Source: NeMo AutoModel 0.5.0, `HunyuanAdapter`.
    pub struct Hunyuan {
        /// Tokens and features of `image_embeds` where the batch has none: features as the model's;
        /// no sample sees such tokens, whatever their number is.
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
        let [_, features] = self.default_image_embed_shape;
        let no_image = format!("no image, of {features} features");
        vec![
            text_key(),
            text_mask_key(),
            BatchKey::required(Role::Condition, &["text_embeddings_2"], &[&["L2", "D2"]]),
            BatchKey::required(Role::TokenMask, &["text_mask_2"], &[&["L2"]]),
            BatchKey::optional(Role::Fixed, &[IMAGE], &[&["Li", "Di"]], no_image),
        ]
    }

    fn image_tokens(&self) -> Option<&'static str> {
        Some(IMAGE)
    }

    fn takes_first_frame(&self) -> bool {
        self.use_condition_latents
    }

    fn provides(&self) -> &'static [&'static str] {
        const ALL: &[&str] = &[
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_hidden_states_2",
            "image_embeds",
            "condition_latents",
        ];
        if self.use_condition_latents { ALL } else { &ALL[..ALL.len() - 1] }
    }

    /// `hidden_states` as the noisy latents `[B, C, F, H, W]`, `condition_latents` `[B, C + 1, F,
    /// H, W]`, `timestep` `[B]` on the scale of the training timesteps, both texts `[B, L, D]` and
    /// `image_embeds` `[B, L3, D]` with the tokens that a sample sees, of each a mask `[B, L]` if
    /// samples see different ones, and of the texts `text_places` and `text_places_2` `[L]` if the
    /// seen ones are not the first; `counted_frames` `[B, 1, F, 1, 1]` if a frame is left out.
    fn prepare_inputs(&self, context: &FlowMatchingContext<'_>) -> Result<Activations> {
        if context.noisy_latents.dim() != 5 {
            let what = format!(
                "the hunyuan adapter needs latents [B, C, F, H, W], found {:?}",
                context.noisy_latents.size()
            );
            return Err(Error::data("batch", what));
        }
        // Blocks over text and video need a token of each; glyphs and image are other parts of the
        // text.
        let text = self.seen(context, text_embeddings(context, NAME)?, "text_mask", true)?;
        let glyphs = batched(context, "text_embeddings_2", NAME, 3)?;
        let glyphs = self.seen(context, glyphs, "text_mask_2", false)?;
        let image = self.image_embeds(context)?;
        let is_known = context.image_to_video.to_device(context.device);
        let known =
            self.use_condition_latents.then(|| condition_latents(context.latents, &is_known));
        let counted =
            self.exclude_condition_frame.then(|| counted_frames(context.latents, &is_known));
        Ok(Activations::new()
            .with_constant("hidden_states", context.noisy_latents.shallow_clone())
            .with_constant("timestep", self.timestep_dtype.training_timesteps(context))
            .with_constant("encoder_hidden_states", text.tokens)
            .with_optional("encoder_attention_mask", text.mask)
            .with_optional("text_places", text.places)
            .with_constant("encoder_hidden_states_2", glyphs.tokens)
            .with_optional("encoder_attention_mask_2", glyphs.mask)
            .with_optional("text_places_2", glyphs.places)
            .with_constant("image_embeds", image.tokens)
            .with_optional("image_mask", image.mask)
            .with_optional("condition_latents", known)
            .with_optional("counted_frames", counted))
    }

    fn prediction(&self, output: &Activations) -> Tensor {
        output.get("prediction").shallow_clone()
    }

    fn loss_mask(&self, output: &Activations) -> Option<Tensor> {
        output.find("counted_frames").map(Tensor::shallow_clone)
    }
}

impl Hunyuan {
    /// Returns the tokens of a text `[B, L, D]` that a sample sees.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch has no such mask or it does not fit; the reference requires it,
    /// too.
    fn seen(
        &self,
        context: &FlowMatchingContext<'_>,
        text: Tensor,
        mask_key: &str,
        at_least_one: bool,
    ) -> Result<SeenTokens> {
        let mask = token_mask(context, mask_key, &text, NAME)?;
        let tokens = text.size()[1];
        let length = self.longest(&mask, context.dtype).min(tokens);
        let (text, mask) = (text.narrow(1, 0, length), mask.narrow(1, 0, length));
        Ok(SeenTokens::by_mask(&text, &mask, at_least_one))
    }

    /// Returns the number of tokens up to the last valid one of any sample, at least 1; for
    /// right-padded texts, the valid tokens of the longest.
    fn longest(&self, mask: &Tensor, dtype: Kind) -> i64 {
        let tokens = mask.size().last().copied().unwrap_or_default();
        if mask.numel() == 0 {
            return tokens;
        }
        let places = Tensor::arange_start(1, tokens + 1, (Kind::Int64, Device::Cpu));
        let last = (mask.to_kind(Kind::Int64) * places).max();
        // The reference counts in the compute kind.
        let counted = if self.exact_text_lengths { last } else { last.to_kind(dtype) };
        (counted.double_value(&[]) as i64).max(1)
    }

    /// Returns the batch's image embeddings, which only its image-to-video samples see, unless
    /// theirs are zeros: these stand for no image, as in diffusers. If no sample sees an image, the
    /// embeddings do not even move to the device.
    fn image_embeds(&self, context: &FlowMatchingContext<'_>) -> Result<SeenTokens> {
        let (device, dtype) = (context.device, context.dtype);
        if context.batch.get(IMAGE).is_none() {
            let [_, features] = self.default_image_embed_shape;
            let size = [context.noisy_latents.size()[0], 0, features];
            return Ok(SeenTokens::all(Tensor::zeros(size, (dtype, device))));
        }
        let embeds = stored(context, IMAGE, NAME, 3)?;
        let has_image = embeds.ne(0).flatten(1, 2).any_dim(1, false);
        let is_seen = has_image.logical_and(context.image_to_video).unsqueeze(1);
        let mask = is_seen.expand([-1, embeds.size()[1]], false);
        let SeenTokens { tokens, mask, places } = SeenTokens::by_mask(embeds, &mask, false);
        Ok(SeenTokens {
            tokens: tokens.to_device(device).to_kind(dtype),
            mask: mask.map(|mask| mask.to_device(device)),
            places,
        })
    }
}

/// Returns the known part of the clean latents with a mask of it: the first frame of image-to-video
/// samples.
///
/// # Shapes
/// `latents`: `[B, C, F, H, W]`; `image_to_video`: `[B]` boolean. Returns `[B, C + 1, F, H, W]`:
/// the known latents, then a channel of 1 where they are known; zeros elsewhere.
fn condition_latents(latents: &Tensor, image_to_video: &Tensor) -> Tensor {
    let first = latents.narrow(2, 0, 1);
    let known = Tensor::cat(&[&first, &first.narrow(1, 0, 1).ones_like()], 1);
    let known = known.where_self(&broadcast_to_rank(image_to_video, 5), &known.zeros_like());
    let later = latents.size()[2] - 1;
    known.constant_pad_nd([0i64, 0, 0, 0, 0, later])
}

/// Returns `[B, 1, F, 1, 1]` boolean: every frame but the known ones.
fn counted_frames(latents: &Tensor, image_to_video: &Tensor) -> Tensor {
    let frames = latents.size()[2];
    let first =
        Tensor::arange(frames, (Kind::Int64, latents.device())).eq(0).view([1, 1, frames, 1, 1]);
    first.logical_and(&broadcast_to_rank(image_to_video, 5)).logical_not()
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
        for name in none.names().into_iter().filter(|name| *name != "image_embeds") {
            for (sample, image_to_video) in tasks.iter().enumerate() {
                let uniform = if *image_to_video { &all } else { &none };
                let row = |inputs: &Activations| inputs.get(name).get(sample as i64);
                assert!(row(&mixed).equal(&row(uniform)), "{name} of sample {sample}");
            }
        }
        assert!(mixed.get("image_embeds").equal(all.get("image_embeds")));
        let tasks = Tensor::from_slice(&tasks).unsqueeze(1).expand([SIZE, 3], false);
        assert!(mixed.get("image_mask").equal(&tasks), "only some samples see their images");
        assert_eq!(none.get("image_embeds").size(), [SIZE, 0, 7], "no sample sees an image");
        assert!(all.find("image_mask").is_none() && none.find("image_mask").is_none());
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
    fn texts_of_one_length_have_no_mask_and_others_end_with_the_longest() {
        let equal = inputs(&adapter(), &batch(), &[false; 8]).unwrap();
        assert_eq!(equal.get("encoder_hidden_states").size(), [SIZE, 5, 5]);
        assert_eq!(equal.get("encoder_hidden_states_2").size(), [SIZE, 2, 3]);
        for mask in ["encoder_attention_mask", "encoder_attention_mask_2", "image_mask"] {
            assert!(equal.find(mask).is_none(), "{mask}");
        }
        let batch = batch();
        let _ = batch.tensors["text_mask"].get(3).narrow(0, 2, 3).fill_(0);
        let _ = batch.tensors["text_mask_2"].shallow_clone().fill_(0);
        let unequal = inputs(&adapter(), &batch, &[false; 8]).unwrap();
        assert_eq!(unequal.get("encoder_hidden_states").size(), [SIZE, 5, 5]);
        let mask = unequal.get("encoder_attention_mask");
        assert_eq!((mask.size(), mask.kind()), (vec![SIZE, 5], Kind::Bool));
        assert_eq!(mask.sum(Kind::Int64).int64_value(&[]), 5 * SIZE - 3);
        assert_eq!(unequal.get("encoder_hidden_states_2").size(), [SIZE, 0, 3], "no glyphs at all");
        assert!(unequal.find("encoder_attention_mask_2").is_none());
    }

    #[test]
    fn an_image_of_zeros_is_none() {
        let batch = batch();
        let _ = batch.tensors["image_embeds"].get(2).fill_(0.0);
        let inputs = inputs(&adapter(), &batch, &[true; 8]).unwrap();
        let sees = Vec::<bool>::try_from(inputs.get("image_mask").select(1, 0)).unwrap();
        assert_eq!(sees, (0..SIZE).map(|sample| sample != 2).collect::<Vec<_>>());
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
