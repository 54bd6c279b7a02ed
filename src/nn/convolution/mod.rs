//! Convolutions of pictures and videos, and parts that change a picture's or a video's size.

mod blocks;
mod causal;
mod plane;
mod pointwise;

pub use blocks::{blocks_to_channels, channels_to_blocks};
pub use causal::{CausalConvolution, EdgeConvolution, FrameDoubling, FrameHalving, History};
pub use plane::{Convolution, doubled, each_frame};
pub use pointwise::Pointwise;

use tch::{Kind, Tensor};

use super::{Builder, Init, Param, Views};

/// The weight and the bias of a convolution.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    weight: Param,
    bias: Param,
}

impl Kernel {
    /// `weight` `[outputs, inputs, …sides]` and `bias` `[outputs]`, initialized as in
    /// `torch.nn.Conv2d` and `Conv3d`.
    fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64, sides: &[i64]) -> Self {
        let init = Init::FanIn { fan_in: inputs * sides.iter().product::<i64>() };
        let weight = builder.param("weight", &[&[outputs, inputs], sides].concat(), init);
        Kernel { weight, bias: builder.param("bias", &[outputs], init) }
    }

    /// Convolves `x` `[B, inputs, H, W]`, or `[B, inputs, F, H, W]` by a kernel of three sides.
    fn apply(&self, params: &Views, x: &Tensor, stride: &[i64], padding: &[i64]) -> Tensor {
        let kind = x.kind();
        let [x, weight, bias] = self.widened(params, x);
        let dilation = &[1i64; 3][..stride.len()];
        let convolved = match stride.len() {
            2 => x.conv2d(&weight, Some(&bias), stride, padding, dilation, 1),
            _ => x.conv3d(&weight, Some(&bias), stride, padding, dilation, 1),
        };
        convolved.to_kind(kind)
    }

    /// Returns `x`, weight and bias in the kind of the computation: on a CPU f32 in place of
    /// bfloat16, so that a sum is rounded once, as on a GPU. oneDNN, by which libtorch 2.13
    /// convolves on CPUs, rounds in between, and on processors with AMX it reads memory that nobody
    /// wrote.
    fn widened(&self, params: &Views, x: &Tensor) -> [Tensor; 3] {
        let is_wide = x.kind() != Kind::BFloat16 || x.device().is_cuda();
        let kind = if is_wide { x.kind() } else { Kind::Float };
        [x, &params[self.weight], &params[self.bias]].map(|tensor| tensor.to_kind(kind))
    }
}
