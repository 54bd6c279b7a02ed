//! An image encoder's folder, and the encoder with its weights.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use tch::{Device, Kind, Tensor, no_grad};

use super::Siglip;
use super::class::IMAGE;
use super::siglip::{NAMES, VisionTower};
use crate::error::Result;
use crate::nn::Views;
use crate::published::Weights;

/// Mean and standard deviation of each colour, in bytes: the published `image_mean` and
/// `image_std`, 0.5 of a pixel from 0 to 1.
const MIDDLE: f64 = 127.5;

/// An image encoder whose settings and headers have been read, and none of its weights.
#[derive(Debug)]
pub struct ImageEncoder {
    class: Siglip,
    weights: Weights,
}

impl ImageEncoder {
    /// Opens the folder `image_encoder` of a pipeline.
    ///
    /// # Errors
    /// Errors of [`Siglip::read`]; [`Error::Data`](crate::error::Error::Data) with a list of every
    /// missing, unexpected and misshapen tensor.
    pub fn open(folder: &Path) -> Result<Self> {
        let class = Siglip::read(folder)?;
        let weights = Weights::open(folder, IMAGE, NAMES)?;
        weights.check(&class.tensors())?;
        Ok(ImageEncoder { class, weights })
    }

    /// Returns the class's settings.
    pub fn class(&self) -> &Siglip {
        &self.class
    }

    /// Shape `[L, D]` of a picture's states.
    pub fn states(&self) -> [i64; 2] {
        [self.class.patches().pow(2), self.class.hidden_size]
    }

    /// Loads the weights, to compute in `kind` on `device`.
    ///
    /// # Errors
    /// Errors of reading; [`Error::Data`](crate::error::Error::Data) naming the first number that
    /// is not finite.
    pub fn load(&self, device: Device, kind: Kind) -> Result<LoadedImageEncoder> {
        let tower = VisionTower::new(&self.class);
        let params = self.weights.load(tower.params(), device, kind)?;
        Ok(LoadedImageEncoder { tower, params, device, kind, side: self.class.image_size })
    }
}

impl Siglip {
    /// Names and shapes of all weights that are read, as the class has them.
    pub fn tensors(&self) -> BTreeMap<String, Vec<i64>> {
        let tower = VisionTower::new(self);
        let infos = tower.params().infos().iter();
        infos.map(|info| (info.name.clone(), info.shape.clone())).collect()
    }
}

/// An image encoder with its weights.
pub struct LoadedImageEncoder {
    tower: VisionTower,
    params: Views,
    device: Device,
    kind: Kind,
    side: i64,
}

impl LoadedImageEncoder {
    /// Side of the pictures that [`encode`](Self::encode) takes.
    pub fn side(&self) -> i64 {
        self.side
    }

    /// Returns the last states after the final normalization, in the kind of the computation.
    ///
    /// # Shapes
    /// `pixels`: `[B, 3, S, S]` of any floating kind, as [`pixels_of`] makes them; `S` is
    /// [`side`](Self::side). Returns `[B, L, D]`.
    /// # Panics
    /// If pictures have other sides (a bug in the caller).
    pub fn encode(&self, pixels: &Tensor) -> Tensor {
        let (_, channels, height, width) = pixels.size4().expect("[B, 3, S, S]");
        assert_eq!([channels, height, width], [3, self.side, self.side], "pixels of a picture");
        let pixels = pixels.to_device(self.device).to_kind(self.kind);
        no_grad(|| self.tower.forward(&self.params, &pixels))
    }
}

impl fmt::Debug for LoadedImageEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an image encoder in {:?} on {:?}", self.kind, self.device)
    }
}

/// The input of an image encoder for a picture: resized to a square by cubic interpolation that
/// averages where it makes smaller, then from -1 to 1. These are the published numbers of SigLIP
/// so400m 384: `resample` 3, which is Pillow's BICUBIC, `rescale_factor` 1/255, `image_mean` and
/// `image_std` 0.5. The sides' ratio is not kept.
///
/// # Shapes
/// `picture`: `[3, H, W]` of bytes, on the CPU. Returns `[3, side, side]`, f32.
pub fn pixels_of(picture: &Tensor, side: i64) -> Tensor {
    let resized =
        picture.unsqueeze(0).internal_upsample_bicubic2d_aa([side, side], false, None, None);
    (resized.squeeze_dim(0).to_kind(Kind::Float) - MIDDLE) / MIDDLE
}
