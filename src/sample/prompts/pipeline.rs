//! A pipeline with the samples that are asked of it.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::texts::{Texts, blank};
use super::{Prompt, SampleSize};
use crate::assembly::attention::{TEXT, tokens_of_sample};
use crate::collective::Collective;
use crate::config::RunConfig;
use crate::data::Dataset;
use crate::encoding::{Family, Pipeline};
use crate::error::{Error, Result};
use crate::flow::Guidance;
use crate::nn::Tokens;
use crate::rng::{Key, Purpose, Stream};
use crate::sample::conditions::Origin;
use crate::sample::generate::Plan;
use crate::sample::pretrained::SECOND;
use crate::sample::scheduler::Scheduler;
use crate::settings::{Choice, Family as _};

/// Names of what is asked, in messages: arguments of the command, or keys of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Words {
    pub pipeline: &'static str,
    pub size: &'static str,
}

/// One sample that is asked for.
#[derive(Clone, Debug)]
struct Asked {
    prompt: String,
    /// `None` if nothing is guided away from.
    negative: Option<String>,
    seed: u64,
    /// Latents `[C, (F,) H, W]`.
    shape: Vec<i64>,
}

/// A pipeline with the samples that are asked of it, in order.
pub struct PromptedPipeline {
    pipeline: Pipeline,
    /// That of the pipeline's folder.
    scheduler: Option<Scheduler>,
    asked: Vec<Asked>,
}

impl PromptedPipeline {
    /// Reads the pipeline's headers. `count`: the number of samples of each prompt; `usual`: the
    /// latents' shape where neither prompt nor configuration has a size.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Data`] if the pipeline is missing, incomplete or of another
    /// family, or has no latents of a size; errors of `usual`.
    pub fn open(
        config: &RunConfig,
        prompts: &[Prompt],
        count: i64,
        words: Words,
        usual: impl Fn() -> Result<Vec<i64>>,
    ) -> Result<Self> {
        let (pipeline, scheduler) = (opened(config, words)?, Scheduler::of(config)?);
        let own = SampleSize::of(&config.sampling.size);
        let always = guides_always(config).then(String::new);
        let mut asked = Vec::with_capacity(prompts.len() * count as usize);
        for prompt in prompts {
            let shape = match prompt.size.or(own) {
                Some(size) => shape_of(&pipeline, config, size, words)?,
                None => usual_shape(&pipeline, &usual, words)?,
            };
            let given = prompt.negative.as_ref().or(config.sampling.negative_prompt.as_ref());
            for number in 0..count as u64 {
                let following = config.seed.wrapping_add(asked.len() as u64);
                asked.push(Asked {
                    prompt: prompt.prompt.clone(),
                    negative: given.or(always.as_ref()).cloned(),
                    seed: prompt.seed.map_or(following, |seed| seed.wrapping_add(number)),
                    shape: shape.clone(),
                });
            }
        }
        Ok(PromptedPipeline { pipeline, scheduler, asked })
    }

    /// Opens and checks what a run makes samples of while it trains; `None` if it has no prompts.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`check`](Self::check).
    pub fn of_run(config: &RunConfig, dataset: &Dataset) -> Result<Option<Self>> {
        let prompts: Vec<Prompt> =
            config.sampling.prompts.iter().map(|prompt| Prompt::new(prompt)).collect();
        if prompts.is_empty() {
            return Ok(None);
        }
        let words = Words { pipeline: "sampling.pipeline", size: "sampling.size" };
        let usual = || Ok(dataset.latent_shape(dataset.sampled_group()));
        let prompted = PromptedPipeline::open(config, &prompts, 1, words, usual)?;
        prompted.check(config)?;
        Ok(Some(prompted))
    }

    /// Refuses prompts that the model cannot take, by the shapes of what they would be encoded as.
    ///
    /// # Errors
    /// [`Error::Data`] or [`Error::Config`] naming the prompt and what was expected.
    pub fn check(&self, config: &RunConfig) -> Result<()> {
        let padding = config.text_padding();
        let blank = |text: &str| blank(&self.pipeline, padding, text);
        self.asked.iter().try_for_each(|asked| {
            let negative = asked.negative.as_deref().map(blank).transpose()?;
            let noise = Tensor::zeros(batch_of_one(&asked.shape), (Kind::Float, Device::Cpu));
            let (tensors, negative) = (blank(&asked.prompt)?, negative.unwrap_or_default());
            let origin = Origin::from_prompt(&asked.prompt, tensors, negative, noise);
            self.plan(config, &origin, Device::Cpu)?.rehearse()
        })
    }

    /// Prepares the generation of a sample.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn plan<'a>(
        &self,
        config: &'a RunConfig,
        origin: &'a Origin,
        device: Device,
    ) -> Result<Plan<'a>> {
        Plan::new(config, origin, self.scheduler.as_ref(), device)
    }

    /// Returns the pipeline with its networks computing in `kind` on `device`.
    #[must_use]
    pub fn on(self, device: Device, kind: Kind) -> Self {
        PromptedPipeline { pipeline: self.pipeline.on(device, kind), ..self }
    }

    /// Encodes all texts on rank 0, after which no network is in memory; returns the start of each
    /// sample.
    ///
    /// # Errors
    /// Errors of loading the text encoders; [`Error::Stopped`] if a signal arrived meanwhile.
    ///
    /// # Ordering
    /// Every rank calls it.
    pub fn origins(&self, config: &RunConfig, collective: &dyn Collective) -> Result<Vec<Origin>> {
        let texts = self
            .asked
            .iter()
            .flat_map(|asked| [Some(asked.prompt.as_str()), asked.negative.as_deref()]);
        let (padding, texts) = (config.text_padding(), texts.flatten());
        let texts = Texts::encoded(&self.pipeline, padding, texts, collective);
        self.pipeline.unload();
        let texts = texts?;
        let origin = |asked: &Asked| {
            let negative = asked.negative.as_deref().map(|text| texts.of(text));
            let stream = Stream::PerSample(vec![Key::new(asked.seed, Purpose::Sampling)]);
            let noise = stream.open().normal(0.0, 1.0, &batch_of_one(&asked.shape));
            let negative = negative.unwrap_or_default();
            Origin::from_prompt(&asked.prompt, texts.of(&asked.prompt), negative, noise)
        };
        Ok(self.asked.iter().map(origin).collect())
    }

    /// Decodes the latents of one sample `[1, C, (F,) H, W]` to frames `[F, 3, H, W]` of bytes, of
    /// which a picture has one. The decoder stays in memory until [`unload`](Self::unload).
    ///
    /// # Errors
    /// Errors of loading the decoder.
    pub fn frames(&self, latents: &Tensor) -> Result<Tensor> {
        let pixels = self.pipeline.decode(latents)?.squeeze_dim(0);
        let frames = match pixels.dim() {
            3 => pixels.unsqueeze(0),
            _ => pixels.transpose(0, 1),
        };
        let levels = ((frames + 1.0) * 127.5).round().nan_to_num(0.0, None, None);
        Ok(levels.clamp(0.0, 255.0).to_kind(Kind::Uint8).contiguous())
    }

    /// Frees the networks.
    pub fn unload(&self) {
        self.pipeline.unload();
    }

    /// Returns the tokens of the samples.
    pub fn tokens(&self, config: &RunConfig) -> Vec<Tokens> {
        let tokens = |asked: &Asked| {
            let layout = self.pipeline.prompt_shapes(&asked.prompt);
            let text = layout.get(TEXT).and_then(|text| text.shape.first().copied());
            tokens_of_sample(config, &asked.shape, text)
        };
        self.asked.iter().map(tokens).collect()
    }

    /// Returns the shapes of the samples' latents.
    pub fn shapes(&self) -> impl Iterator<Item = &[i64]> {
        self.asked.iter().map(|asked| asked.shape.as_slice())
    }

    pub fn family(&self) -> Family {
        self.pipeline.family()
    }

    /// Returns the number of samples that are asked for.
    pub fn len(&self) -> usize {
        self.asked.len()
    }

    pub fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }
}

/// True if the configured guidance needs something to lead away from for every prompt, which is
/// the empty prompt where nothing else is given, as in the families' pipelines.
fn guides_always(config: &RunConfig) -> bool {
    let guidance =
        config.flow_matching.adapter.build().guidance(config.model.family.embeds_guidance());
    guidance != Guidance::Embedded && !matches!(config.sampling.guidance_scale, 0.0 | 1.0)
}

fn opened(config: &RunConfig, words: Words) -> Result<Pipeline> {
    let name = config.model.family.name();
    let known = Family::ALL.iter().find(|(word, _)| *word == name);
    let Some((_, family)) = known else {
        let what = format!("there is no encoding for the family {name}");
        return Err(Error::config(words.pipeline, what));
    };
    let folder = config.sampling.pipeline.as_deref().map(Path::new);
    if folder.is_none() && !family.parts.is_empty() {
        let parts = family.parts.join("/, ");
        let what = format!(
            "must be set: prompts of {name} are encoded by a published pipeline, a folder with {parts}/"
        );
        return Err(Error::config(words.pipeline, what));
    }
    if let Some(folder) = folder.filter(|folder| folder.join(SECOND).is_dir()) {
        tracing::warn!(
            "{} changes to a second model, {SECOND}/, at lower noise levels; samples here are of one model at all levels",
            folder.display()
        );
    }
    Pipeline::open(*family, folder)
}

fn shape_of(
    pipeline: &Pipeline,
    config: &RunConfig,
    size: SampleSize,
    words: Words,
) -> Result<Vec<i64>> {
    let mut pixels = size.pixels();
    // A picture is a video of one frame for a model of videos.
    if config.model.family.takes_frames() && pixels.len() == 3 {
        pixels.insert(1, 1);
    }
    pipeline.latents_shape(&pixels).map_err(|what| Error::config(words.size, what))
}

/// Returns the shape of the data's latents, if they can be this pipeline's.
fn usual_shape(
    pipeline: &Pipeline,
    usual: impl Fn() -> Result<Vec<i64>>,
    words: Words,
) -> Result<Vec<i64>> {
    let (shape, expected) = (usual()?, pipeline.factors().channels);
    if shape[0] == expected {
        return Ok(shape);
    }
    let what = format!(
        "the run's latents have {} channels, and the pipeline's {expected}: they are not its own",
        shape[0]
    );
    Err(Error::config(words.pipeline, what))
}

fn batch_of_one(shape: &[i64]) -> Vec<i64> {
    [&[1], shape].concat()
}
