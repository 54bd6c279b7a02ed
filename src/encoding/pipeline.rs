//! A family's pipeline with the networks that are loaded.

use std::cell::{Ref, RefCell};
use std::path::Path;

use tch::{Device, Kind, Tensor, no_grad};

use super::{Conditions, Encoding, Family, Folder, ToConditions, ToLatents, ToPixels};
use crate::autoencoder::Factors;
use crate::data::group::Layout;
use crate::error::Result;
use crate::rng::{Key, Purpose, Stream};
use crate::settings::Choice;

/// A pipeline whose networks are loaded when they are first needed.
///
/// Results are on the CPU. Each row of a batch is its own: no number depends on the other rows, but
/// libtorch may sum in another order for another number of rows, so that last digits differ.
pub struct Pipeline {
    family: Family,
    encoding: Box<dyn Encoding>,
    device: Device,
    kind: Kind,
    to_conditions: RefCell<Option<Box<dyn ToConditions>>>,
    to_latents: RefCell<Option<Box<dyn ToLatents>>>,
    to_pixels: RefCell<Option<Box<dyn ToPixels>>>,
}

impl Pipeline {
    /// Reads the headers of a pipeline's folder, which [`Family::Dit`] does not need. It computes
    /// in float32 on the CPU until [`on`](Self::on) says otherwise.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error::Config) if there is no folder;
    /// [`Error::Data`](crate::error::Error::Data) naming every part that is missing; errors of
    /// reading a part's headers.
    pub fn open(family: Family, folder: Option<&Path>) -> Result<Self> {
        let folder = Folder::new(folder, family.word(), family.parts)?;
        Ok(Pipeline {
            family,
            encoding: (family.open)(&folder)?,
            device: Device::Cpu,
            kind: Kind::Float,
            to_conditions: RefCell::default(),
            to_latents: RefCell::default(),
            to_pixels: RefCell::default(),
        })
    }

    /// Returns the pipeline computing in `kind` on `device`, with no network loaded.
    #[must_use]
    pub fn on(self, device: Device, kind: Kind) -> Self {
        self.unload();
        Pipeline { device, kind, ..self }
    }

    pub fn family(&self) -> Family {
        self.family
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn factors(&self) -> Factors {
        self.encoding.factors()
    }

    /// Returns the shape of a model's latents `[C, (F,) H, W]` for pixels `[3, (F,) H, W]`.
    ///
    /// # Errors
    /// A text that tells why there are none for these pixels.
    pub fn latents_shape(&self, pixels: &[i64]) -> Result<Vec<i64>, String> {
        self.factors().latents(pixels)
    }

    /// Returns kinds and shapes of what a prompt becomes, from its tokens alone.
    pub fn prompt_shapes(&self, prompt: &str) -> Layout {
        self.encoding.prompt_layout(prompt, self.kind)
    }

    /// Returns the conditions of each prompt.
    ///
    /// # Errors
    /// Errors of loading the networks, on the first call.
    pub fn encode_prompts(&self, prompts: &[&str]) -> Result<Vec<Conditions>> {
        let load = || self.encoding.to_conditions(self.device, self.kind);
        let network = loaded(&self.to_conditions, load)?;
        no_grad(|| network.conditions(prompts))
    }

    /// Returns kinds and shapes of the conditions that pixels become, beside latents; most families
    /// have none.
    pub fn pixel_shapes(&self) -> Layout {
        self.encoding.pixel_layout(self.kind)
    }

    /// Returns those conditions of each row of pixels.
    ///
    /// # Errors
    /// As [`encode_prompts`](Self::encode_prompts).
    pub fn pixel_conditions(&self, pixels: &Tensor) -> Result<Vec<Conditions>> {
        let load = || self.encoding.to_latents(self.device, self.kind);
        let network = loaded(&self.to_latents, load)?;
        Ok(no_grad(|| network.conditions(pixels)))
    }

    /// Returns the latents of a model, f32. `keys`: for each row a number that names its pixels;
    /// where the family's latents are drawn, they follow from it.
    ///
    /// # Errors
    /// As [`encode_prompts`](Self::encode_prompts).
    /// # Panics
    /// If there are no latents for these pixels (a bug in the caller, who asks
    /// [`latents_shape`](Self::latents_shape)).
    pub fn encode_pixels(&self, pixels: &Tensor, keys: &[u64]) -> Result<Tensor> {
        let load = || self.encoding.to_latents(self.device, self.kind);
        let network = loaded(&self.to_latents, load)?;
        let key = |key: &u64| Key::new(0, Purpose::Encoding).scope(*key);
        let stream = Stream::PerSample(keys.iter().map(key).collect());
        let latents = no_grad(|| network.latents(pixels, &stream));
        Ok(latents.to_device(Device::Cpu).to_kind(Kind::Float))
    }

    /// Returns pixels `[B, 3, (F,) H, W]` from -1 to 1, f32, from the latents of a model.
    ///
    /// # Errors
    /// As [`encode_prompts`](Self::encode_prompts).
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let load = || self.encoding.to_pixels(self.device, self.kind);
        let network = loaded(&self.to_pixels, load)?;
        let pixels = no_grad(|| network.pixels(latents));
        Ok(pixels.to_device(Device::Cpu).to_kind(Kind::Float).clamp(-1.0, 1.0))
    }

    /// Frees the networks; one that is needed again is loaded again.
    pub fn unload(&self) {
        self.to_conditions.take();
        self.to_latents.take();
        self.to_pixels.take();
    }
}

/// Returns the network of a slot, which is loaded first if the slot is empty.
fn loaded<T: ?Sized>(
    slot: &RefCell<Option<Box<T>>>,
    load: impl FnOnce() -> Result<Box<T>>,
) -> Result<Ref<'_, T>> {
    if slot.borrow().is_none() {
        slot.replace(Some(load()?));
    }
    Ok(Ref::map(slot.borrow(), |network| network.as_deref().expect("it has just been loaded")))
}
