//! The random numbers of a micro-batch, apart from what is computed with them, so that a thread can
//! draw them beside the step before.

use tch::{Device, Kind, Tensor, no_grad};

use super::adapter::{DropoutScope, TaskType};
use super::image_tokens::ImageTokens;
use super::pipeline::latents_of;
use super::settings::{CfgDropout, DrawPlace, FlowMatchingSettings, TaskScope};
use super::timesteps::{SampledTimesteps, Strata, sample_timesteps};
use crate::data::{Batch, DataType};
use crate::error::Result;
use crate::libtorch;
use crate::rng::{Draws, Stream, Toss};

/// Decides how a pipeline draws. It holds no tensor, so that any thread can use it.
#[derive(Clone, Debug)]
pub struct DrawRules {
    settings: FlowMatchingSettings,
    /// Samples that share the adapter's draw of dropout; `None` if the adapter drops nothing.
    dropout: Option<DropoutScope>,
    image_tokens: ImageTokens,
    /// Device of the pipeline.
    device: Device,
}

/// The random numbers of a micro-batch.
#[derive(Debug)]
pub struct Drawn {
    pub task_type: TaskType,
    /// `[B]` boolean on the host, where adapters decide by it which tokens attention sees: true for
    /// image-to-video samples.
    pub image_to_video: Tensor,
    pub sampled: SampledTimesteps,
    /// `[B, …]` f32, in the shape of the latents.
    pub noise: Tensor,
    /// `[B]` boolean: true for samples whose conditions are dropped; `None` if none can be.
    pub drop: Option<Tensor>,
}

/// The random numbers of samples that are judged at fixed noise levels.
#[derive(Debug)]
pub struct DrawnNoise {
    task_type: TaskType,
    /// As that of [`Drawn`].
    image_to_video: Tensor,
    /// As that of [`Drawn`].
    noise: Tensor,
    num_train_timesteps: i64,
}

impl DrawRules {
    pub(super) fn new(
        settings: &FlowMatchingSettings,
        dropout: Option<DropoutScope>,
        image_tokens: &ImageTokens,
        device: Device,
    ) -> Self {
        let (settings, image_tokens) = (settings.clone(), image_tokens.clone());
        DrawRules { settings, dropout, image_tokens, device }
    }

    /// Returns the device whose generator draws noise, timesteps and the adapter's dropout.
    pub fn generator(&self) -> Device {
        match self.settings.draws {
            DrawPlace::Host => Device::Cpu,
            DrawPlace::Device => self.device,
        }
    }

    /// Returns the same rules with all draws by the CPU's generator, the same on every device.
    pub fn on_host(mut self) -> Self {
        self.settings.draws = DrawPlace::Host;
        self
    }

    /// Draws the noise and the task of samples that are judged at fixed noise levels. Neither
    /// depends on how training draws its noise levels.
    ///
    /// # Errors
    /// As [`draw`](Self::draw).
    pub fn draw_noise(&self, batch: &Batch, stream: &Stream) -> Result<DrawnNoise> {
        let latents = latents_of(batch)?.size();
        let draws = stream.open_on(self.generator());
        Ok(no_grad(|| {
            let noise = draws.normal(0.0, 1.0, &latents);
            let (task_type, image_to_video) = self.task_type(batch.data_type, &latents, &draws);
            let num_train_timesteps = self.settings.num_train_timesteps;
            DrawnNoise { task_type, image_to_video, noise, num_train_timesteps }
        }))
    }

    /// Makes all draws of a step in the order of the reference: task, timesteps, noise, then
    /// dropout. The CPU's generator makes those that the reference does not have, and the coin that
    /// the reference tosses there.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error::Data) if the batch has no latents or malformed ones.
    pub fn draw(&self, batch: &Batch, stream: &Stream, strata: Option<&Strata>) -> Result<Drawn> {
        let latents = latents_of(batch)?.size();
        let tokens = self.image_tokens.count(&latents[1..]);
        let draws = stream.open_on(self.generator());
        Ok(no_grad(|| {
            let (task_type, image_to_video) = self.task_type(batch.data_type, &latents, &draws);
            let sampled = sample_timesteps(&self.settings, &draws, latents[0], tokens, strata);
            let noise = draws.normal(0.0, 1.0, &latents);
            let drop = self.drop(latents[0], &draws);
            Drawn { task_type, image_to_video, sampled, noise, drop }
        }))
    }

    /// Draws ahead what [`draw`](Self::draw) draws, in memory from which the pipeline's device can
    /// copy; `None` where the generator of a GPU draws, whose numbers are ready without a wait.
    ///
    /// # Errors
    /// As [`draw`](Self::draw).
    pub fn draw_ahead(
        &self,
        batch: &Batch,
        stream: &Stream,
        strata: Option<&Strata>,
    ) -> Result<Option<Drawn>> {
        if self.generator() != Device::Cpu {
            return Ok(None);
        }
        let drawn = self.draw(batch, stream, strata)?;
        Ok(Some(if self.device == Device::Cpu { drawn } else { drawn.mapped(libtorch::pinned) }))
    }

    /// Returns the task of a batch, and marks its image-to-video samples, `[B]` boolean on the
    /// host. Videos are image-to-video with the configured probability, by one draw for the batch
    /// or one for each sample; images and videos of one frame never are, since their only frame
    /// would be given. Every video draws, so that later draws do not depend on its length.
    ///
    /// # Shapes
    /// `latents`: `[B, C, (F,) H, W]`.
    fn task_type(
        &self,
        data_type: DataType,
        latents: &[i64],
        draws: &Draws<'_>,
    ) -> (TaskType, Tensor) {
        let (samples, probability) = (latents[0], self.settings.i2v_prob);
        let toss = match (data_type, self.settings.task_scope) {
            (DataType::Image, _) => Toss::Same(false),
            (DataType::Video, TaskScope::Sample) => {
                Toss::Each(draws.host_uniform(&[samples]).lt(probability))
            }
            (DataType::Video, TaskScope::Batch) => draws.host_coin(probability),
        };
        let is_clip = matches!(latents, [_, _, frames, _, _] if *frames > 1);
        let toss = if is_clip { toss } else { Toss::Same(false) };
        let task_type = match &toss {
            Toss::Same(false) => TaskType::TextToVideo,
            Toss::Same(true) => TaskType::ImageToVideo,
            Toss::Each(_) => TaskType::Mixed,
        };
        (task_type, toss.per_sample(samples))
    }

    /// Marks the samples whose conditions are dropped, by the pipeline or by its adapter.
    fn drop(&self, samples: i64, draws: &Draws<'_>) -> Option<Tensor> {
        let probability = self.settings.cfg_dropout_prob;
        match (self.settings.cfg_dropout, self.dropout) {
            (CfgDropout::PerSample, _) => Some(draws.host_uniform(&[samples]).lt(probability)),
            (CfgDropout::Adapter, _) if probability <= 0.0 => None,
            (CfgDropout::Adapter, None) => None,
            (CfgDropout::Adapter, Some(DropoutScope::Sample)) => {
                Some(draws.uniform(&[samples]).lt(probability))
            }
            (CfgDropout::Adapter, Some(DropoutScope::Batch)) => {
                Some(draws.host_coin(probability).per_sample(samples))
            }
        }
    }
}

impl DrawnNoise {
    /// As [`Drawn::on`].
    pub fn on(self, device: Device) -> Self {
        DrawnNoise { noise: self.noise.to_device(device), ..self }
    }

    /// Returns the numbers of a step in which all samples have this noise level and keep their
    /// conditions.
    pub fn at(&self, sigma: f64) -> Drawn {
        let samples = self.noise.size()[0];
        let sigma = Tensor::full([samples], sigma, (Kind::Float, self.noise.device()));
        let timesteps = &sigma * self.num_train_timesteps as f64;
        Drawn {
            task_type: self.task_type,
            image_to_video: self.image_to_video.shallow_clone(),
            sampled: SampledTimesteps { sigma, timesteps, method: "fixed", shift: 1.0 },
            noise: self.noise.shallow_clone(),
            drop: None,
        }
    }
}

impl Drawn {
    /// Returns the numbers on `device`, without a wait for a copy from pinned memory. The marks of
    /// samples stay where they were drawn.
    pub fn on(self, device: Device) -> Self {
        self.mapped(|tensor| tensor.to_device_(device, tensor.kind(), true, false))
    }

    fn mapped(self, map: impl Fn(&Tensor) -> Tensor) -> Self {
        let (sigma, timesteps) = (map(&self.sampled.sigma), map(&self.sampled.timesteps));
        Drawn {
            sampled: SampledTimesteps { sigma, timesteps, ..self.sampled },
            noise: map(&self.noise),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::rng::{Key, Purpose};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Three videos, with all kinds of draws.
    fn batch() -> Batch {
        let latents = Tensor::zeros([3, 2, 4, 2, 2], FLOAT);
        Batch {
            tensors: BTreeMap::from([("video_latents".to_string(), latents)]),
            data_type: DataType::Video,
            sample_ids: vec![4, 7, 9],
            bad_samples: 0,
        }
    }

    fn rules(dropout: Option<DropoutScope>, draws: DrawPlace) -> DrawRules {
        let settings = FlowMatchingSettings { draws, ..FlowMatchingSettings::default() };
        DrawRules::new(&settings, dropout, &ImageTokens::default(), Device::Cpu)
    }

    fn streams() -> [Stream; 3] {
        let keys: Vec<Key> = (0..3).map(|id| Key::new(8, Purpose::Test).scope(id)).collect();
        [Stream::TorchSeed(5), Stream::Batch(keys[0]), Stream::PerSample(keys)]
    }

    fn assert_equal(one: &Drawn, other: &Drawn) {
        assert_eq!(
            (one.task_type, one.sampled.method, one.drop.is_some()),
            (other.task_type, other.sampled.method, other.drop.is_some())
        );
        let tensors = |drawn: &Drawn| {
            let drop = drawn.drop.as_ref().map(Tensor::shallow_clone);
            let SampledTimesteps { sigma, timesteps, .. } = &drawn.sampled;
            let all = [&drawn.image_to_video, sigma, timesteps, &drawn.noise];
            all.map(Tensor::shallow_clone).into_iter().chain(drop).collect::<Vec<_>>()
        };
        assert!(tensors(one).iter().zip(tensors(other)).all(|(one, other)| one.equal(&other)));
    }

    #[test]
    fn a_thread_draws_ahead_what_the_step_would_and_a_cpu_is_a_device_like_the_host() {
        for dropout in [None, Some(DropoutScope::Sample), Some(DropoutScope::Batch)] {
            for stream in streams() {
                let (host, device) =
                    (rules(dropout, DrawPlace::Host), rules(dropout, DrawPlace::Device));
                let expected = host.draw(&batch(), &stream, None).expect("sound latents");
                let now = device.draw(&batch(), &stream, None).expect("sound latents");
                assert_equal(&now, &expected);
                let ahead = std::thread::spawn(move || {
                    device.draw_ahead(&batch(), &stream, None).expect("sound latents")
                });
                let ahead = ahead.join().expect("no panic").expect("a CPU draws ahead");
                assert_equal(&ahead.on(Device::Cpu), &expected);
            }
        }
    }

    #[test]
    fn the_order_of_draws_is_the_references() {
        let rules = rules(Some(DropoutScope::Sample), DrawPlace::Host);
        let drawn = rules.draw(&batch(), &Stream::TorchSeed(5), None).expect("sound latents");
        let stream = Stream::TorchSeed(5);
        let draws = stream.open();
        let Toss::Same(is_uniform) = draws.coin(0.1, 3) else { panic!("one coin a batch") };
        let u =
            if is_uniform { draws.uniform(&[3]) } else { draws.normal(0.0, 1.0, &[3]).sigmoid() };
        assert!(drawn.sampled.sigma.equal(&crate::flow::time_shift::shifted(&u, 3.0)));
        assert!(drawn.noise.equal(&draws.normal(0.0, 1.0, &[3, 2, 4, 2, 2])));
        assert!(drawn.drop.expect("it may drop").equal(&draws.uniform(&[3]).lt(0.1)));
    }

    #[test]
    fn noise_at_fixed_levels_is_a_samples_own_whatever_the_law_and_drops_nothing() {
        let of = |settings: FlowMatchingSettings, place: usize| {
            let rules = DrawRules::new(
                &settings,
                Some(DropoutScope::Sample),
                &ImageTokens::default(),
                Device::Cpu,
            );
            rules.draw_noise(&batch(), &streams()[place]).expect("sound latents")
        };
        let usual = of(FlowMatchingSettings::default(), 2);
        let uniform =
            FlowMatchingSettings { use_sigma_noise: false, ..FlowMatchingSettings::default() };
        let (low, high) = (usual.at(0.25), of(uniform, 2).at(0.75));
        assert!(low.noise.equal(&high.noise) && low.image_to_video.equal(&high.image_to_video));
        assert!(low.drop.is_none());
        let numbers = |tensor: &Tensor| Vec::<f32>::try_from(tensor).expect("f32");
        assert_eq!(numbers(&high.sampled.sigma), [0.75; 3]);
        assert_eq!(numbers(&high.sampled.timesteps), [750.0; 3]);
    }

    #[test]
    fn the_generator_of_a_gpu_is_asked_only_where_it_is_wanted() {
        let on = |draws| DrawRules { device: Device::Cuda(1), ..rules(None, draws) };
        assert_eq!(on(DrawPlace::Host).generator(), Device::Cpu);
        assert_eq!(on(DrawPlace::Device).generator(), Device::Cuda(1));
        let ahead = on(DrawPlace::Device).draw_ahead(&batch(), &Stream::TorchSeed(5), None);
        assert!(ahead.expect("sound latents").is_none(), "its numbers are drawn by the step");
    }
}
