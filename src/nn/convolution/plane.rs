//! Convolutions of pictures.

use tch::Tensor;

use super::Kernel;
use crate::nn::{Builder, Views};

/// A convolution over rows and columns.
#[derive(Clone, Copy, Debug)]
pub struct Convolution {
    kernel: Kernel,
    side: i64,
}

impl Convolution {
    /// `weight` `[outputs, inputs, side, side]` and `bias`. `side` is odd.
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64, side: i64) -> Self {
        Convolution { kernel: Kernel::new(builder, inputs, outputs, &[side, side]), side }
    }

    /// Convolves a picture with zeros around it, so that it keeps its sides.
    ///
    /// # Shapes
    /// `x`: `[B, inputs, H, W]`. Returns `[B, outputs, H, W]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        self.kernel.apply(params, x, &[1, 1], &[self.side / 2; 2])
    }

    /// Convolves every second row and column by a kernel of side 3. Zeros stand to the right of the
    /// picture and below it.
    ///
    /// # Shapes
    /// `x`: `[B, inputs, H, W]` with even sides. Returns `[B, outputs, H/2, W/2]`.
    pub fn halve(&self, params: &Views, x: &Tensor) -> Tensor {
        self.kernel.apply(params, &x.constant_pad_nd([0i64, 1, 0, 1]), &[2, 2], &[0, 0])
    }
}

/// A picture of twice the sides, in which each pixel stands four times.
///
/// # Shapes
/// `x`: `[B, C, H, W]`. Returns `[B, C, 2H, 2W]`.
pub fn doubled(x: &Tensor) -> Tensor {
    let (_, _, height, width) = x.size4().expect("[B, C, H, W]");
    x.upsample_nearest2d([2 * height, 2 * width], None, None)
}

/// Applies `map` to the frames of a video as to pictures.
///
/// # Shapes
/// `x`: `[B, C, F, H, W]`. `map` takes `[B · F, C, H, W]` and returns `[B · F, D, P, Q]`. Returns
/// `[B, D, F, P, Q]`.
pub fn each_frame(x: &Tensor, map: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
    let (batch, _, frames, _, _) = x.size5().expect("[B, C, F, H, W]");
    map(&x.transpose(1, 2).flatten(0, 1)).unflatten(0, [batch, frames]).transpose(1, 2)
}
