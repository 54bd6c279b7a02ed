//! The two networks of an autoencoder with their weights.

use std::fmt;
use std::path::PathBuf;

use tch::{Device, Kind, Tensor, no_grad};

use super::{Factors, Network, Posterior, Scaling, Tile, Tiles};
use crate::error::{Error, Result};
use crate::nn::Views;

/// One network with its weights, and what latents need beside it.
pub(super) struct Half {
    pub folder: PathBuf,
    pub network: Box<dyn Network>,
    pub params: Views,
    pub device: Device,
    pub kind: Kind,
    pub scaling: Scaling,
    pub factors: Factors,
    pub default_tile: Tile,
    /// `None` to compute every input as a whole.
    pub tiles: Option<Tiles>,
}

impl Half {
    /// The network's output for pictures `[B, C, H, W]` or videos `[B, C, F, H, W]`.
    fn run(&self, input: &Tensor) -> Tensor {
        let input = input.to_device(self.device).to_kind(self.kind);
        let is_picture = self.factors.time.is_some() && input.dim() == 4;
        let input = if is_picture { input.unsqueeze(2) } else { input };
        let prepared = self.network.prepare(&input);
        let forward = |tile: &Tensor| self.network.forward(&self.params, tile);
        let output = match self.tiles {
            Some(tiles) => tiles.map(&prepared, forward),
            None => forward(&prepared),
        };
        let output = self.network.finish(output);
        if is_picture { output.squeeze_dim(2) } else { output }
    }

    fn tiled(mut self, tile: Option<Tile>) -> Result<Self> {
        let tile = tile.unwrap_or(self.default_tile);
        tile.check(self.factors.space).map_err(|what| Error::data(&self.folder, what))?;
        self.tiles = Some(self.network.tiles(tile));
        Ok(self)
    }
}

impl fmt::Debug for Half {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Half { folder, device, kind, .. } = self;
        write!(f, "a network of {} in {kind:?} on {device:?}", folder.display())
    }
}

/// Makes latents of pixels.
#[derive(Debug)]
pub struct Encoder {
    half: Half,
}

impl Encoder {
    pub(super) fn new(half: Half) -> Self {
        Encoder { half }
    }

    /// Returns an encoder that cuts pictures longer than a tile; `None`: the class's own.
    ///
    /// # Errors
    /// [`Error::Data`] if the tile does not consist of whole latents.
    pub fn tiled(self, tile: Option<Tile>) -> Result<Self> {
        Ok(Encoder { half: self.half.tiled(tile)? })
    }

    /// Returns the posterior of the autoencoder's latents.
    ///
    /// # Shapes
    /// `pixels`: `[B, 3, H, W]`, or `[B, 3, F, H, W]` where the class takes videos, on any device
    /// and of any floating kind.
    /// # Panics
    /// If there are no latents for these shapes (a bug in the caller, who asks
    /// [`Factors::latents`]).
    pub fn encode(&self, pixels: &Tensor) -> Posterior {
        if let Err(what) = self.half.factors.latents(&pixels.size()[1..]) {
            panic!("the encoder {what}");
        }
        no_grad(|| Posterior::new(&self.half.run(pixels)))
    }

    /// Returns the latents of a model, f32, from those of the autoencoder.
    ///
    /// # Shapes
    /// `latents`: as a [`Posterior`] has them. Returns the shape of [`Factors::latents`].
    pub fn to_model(&self, latents: &Tensor) -> Tensor {
        no_grad(|| self.half.scaling.to_model(latents))
    }
}

/// Makes pixels of latents.
#[derive(Debug)]
pub struct Decoder {
    half: Half,
}

impl Decoder {
    pub(super) fn new(half: Half) -> Self {
        Decoder { half }
    }

    /// Returns a decoder that cuts latents of pictures longer than a tile; `None`: the class's own.
    ///
    /// # Errors
    /// As [`Encoder::tiled`].
    pub fn tiled(self, tile: Option<Tile>) -> Result<Self> {
        Ok(Decoder { half: self.half.tiled(tile)? })
    }

    /// Returns the latents of the autoencoder, f32, from those of a model.
    ///
    /// # Shapes
    /// `latents`: `[B, …]` with the shape of [`Factors::latents`]. Returns what
    /// [`decode`](Self::decode) takes.
    pub fn to_autoencoder(&self, latents: &Tensor) -> Tensor {
        no_grad(|| self.half.scaling.to_autoencoder(latents))
    }

    /// Returns pixels, from -1 to 1 but for the picture classes and HunyuanVideo 1.5, which may go
    /// beyond; in the kind of the computation.
    ///
    /// # Shapes
    /// `latents`: the autoencoder's, `[B, C, H, W]`, or `[B, C, F, H, W]` where the class takes
    /// videos. Returns `[B, 3, H, W]` or `[B, 3, F, H, W]`.
    pub fn decode(&self, latents: &Tensor) -> Tensor {
        no_grad(|| self.half.run(latents))
    }
}
