//! Latents by a published autoencoder.

use std::fmt;

use tch::{Device, Kind, Tensor};

use super::{Folder, ToLatents, ToPixels};
use crate::autoencoder::{Autoencoder, Decoder, Encoder, Estimate, Factors};
use crate::error::{Error, Result};
use crate::rng::Stream;
use crate::settings::Family;

/// Folder of a pipeline's autoencoder.
pub(super) const VAE: &str = "vae";

/// Size of what a network computes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of it, as the pictures' pipelines do.
    Whole,
    /// Tiles of the class's own side where one of the sides is longer, which bounds the memory that
    /// a video needs.
    Tiles,
}

/// The autoencoder of a pipeline.
pub(super) struct Latents {
    autoencoder: Autoencoder,
    extent: Extent,
}

impl Latents {
    /// # Errors
    /// [`Error::Data`] if the autoencoder is of another class; errors of [`Autoencoder::open`].
    pub fn open(folder: &Folder, class: &str, extent: Extent) -> Result<Self> {
        let path = folder.part(VAE);
        let autoencoder = Autoencoder::open(&path)?;
        let found = autoencoder.class().name();
        if found != class {
            let what =
                format!("is of the class {found}, and pipelines of this family have {class}");
            return Err(Error::data(path, what));
        }
        Ok(Latents { autoencoder, extent })
    }

    pub fn factors(&self) -> Factors {
        self.autoencoder.factors()
    }

    pub fn encoder(&self, device: Device, kind: Kind) -> Result<LoadedEncoder> {
        let encoder = self.autoencoder.encoder(device, kind)?;
        let encoder = match self.extent {
            Extent::Whole => encoder,
            Extent::Tiles => encoder.tiled(None)?,
        };
        Ok(LoadedEncoder { encoder, estimate: self.autoencoder.class().estimate() })
    }

    pub fn to_latents(&self, device: Device, kind: Kind) -> Result<Box<dyn ToLatents>> {
        Ok(Box::new(self.encoder(device, kind)?))
    }

    pub fn to_pixels(&self, device: Device, kind: Kind) -> Result<Box<dyn ToPixels>> {
        let decoder = self.autoencoder.decoder(device, kind)?;
        let decoder = match self.extent {
            Extent::Whole => decoder,
            Extent::Tiles => decoder.tiled(None)?,
        };
        Ok(Box::new(decoder))
    }
}

impl fmt::Debug for Latents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.autoencoder.class().name(), self.extent)
    }
}

/// The encoder with its weights.
pub(super) struct LoadedEncoder {
    encoder: Encoder,
    /// The latents that datasets of the reference hold.
    estimate: Estimate,
}

impl ToLatents for LoadedEncoder {
    fn latents(&self, pixels: &Tensor, stream: &Stream) -> Tensor {
        let posterior = self.encoder.encode(pixels);
        self.encoder.to_model(&posterior.latents(self.estimate, stream))
    }
}

impl ToPixels for Decoder {
    fn pixels(&self, latents: &Tensor) -> Tensor {
        self.decode(&self.to_autoencoder(latents))
    }
}
