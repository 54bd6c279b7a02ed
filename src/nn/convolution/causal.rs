//! Convolutions of videos that see no later frame, of a whole video or of one chunk after another.
//!
//! Source: Wan's autoencoder, arXiv:2503.20314, section 4.1.

use std::collections::BTreeMap;

use tch::Tensor;

use super::Kernel;
use crate::nn::{Builder, Param, Views};

/// The last frames that each convolution of one network saw of the chunks of a video before.
#[derive(Debug, Default)]
pub struct History {
    /// By the convolution's weight.
    frames: BTreeMap<Param, Tensor>,
    is_under_way: bool,
}

impl History {
    /// Ends the first or a later chunk of the video.
    pub fn end_chunk(&mut self) {
        self.is_under_way = true;
    }

    /// True until the first chunk has ended.
    pub fn is_in_first_chunk(&self) -> bool {
        !self.is_under_way
    }

    /// Returns `x` `[B, C, F, H, W]` behind the `count` frames that came before it. Zeros stand in
    /// place of frames that were never seen.
    fn extended(&mut self, weight: Param, x: &Tensor, count: i64) -> Tensor {
        let before = self.frames.remove(&weight).unwrap_or_else(|| {
            let mut size = x.size();
            size[2] = count;
            Tensor::zeros(size, (x.kind(), x.device()))
        });
        let extended = Tensor::cat(&[&before, x], 2);
        self.frames.insert(weight, last_frames(&extended, count));
        extended
    }

    /// Keeps the last frame of `x`, and returns the one before `x` if there is one.
    fn replaced(&mut self, weight: Param, x: &Tensor) -> Option<Tensor> {
        self.frames.insert(weight, last_frames(x, 1))
    }
}

/// Copies them, so that the other frames can be freed.
fn last_frames(x: &Tensor, count: i64) -> Tensor {
    x.slice(2, -count, None, 1).copy()
}

/// A convolution over frames, rows and columns whose output at a frame depends on that frame and
/// the frames before it.
#[derive(Clone, Copy, Debug)]
pub struct CausalConvolution {
    kernel: Kernel,
    sides: [i64; 3],
}

impl CausalConvolution {
    /// `weight` `[outputs, inputs, …sides]` and `bias`. `sides` are odd.
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64, sides: [i64; 3]) -> Self {
        CausalConvolution { kernel: Kernel::new(builder, inputs, outputs, &sides), sides }
    }

    /// Zeros stand around each frame and before the video's first one.
    ///
    /// # Shapes
    /// `x`: `[B, inputs, F, H, W]`, one chunk of the video. Returns `[B, outputs, F, H, W]`.
    pub fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        let [frames, height, width] = self.sides;
        let padding = [0, height / 2, width / 2];
        let convolve = |x: &Tensor| self.kernel.apply(params, x, &[1, 1, 1], &padding);
        match frames {
            1 => convolve(x),
            _ => convolve(&history.extended(self.kernel.weight, x, frames - 1)),
        }
    }
}

/// A causal convolution of a whole video, around which its outermost pixels are repeated, and its
/// first frame before it.
#[derive(Clone, Copy, Debug)]
pub struct EdgeConvolution {
    kernel: Kernel,
}

impl EdgeConvolution {
    /// `weight` `[outputs, inputs, 3, 3, 3]` and `bias`.
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64) -> Self {
        EdgeConvolution { kernel: Kernel::new(builder, inputs, outputs, &[3, 3, 3]) }
    }

    /// # Shapes
    /// `x`: `[B, inputs, F, H, W]`. Returns `[B, outputs, F, H, W]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let surrounded = x.replication_pad3d([1i64, 1, 1, 1, 2, 0]);
        self.kernel.apply(params, &surrounded, &[1, 1, 1], &[0, 0, 0])
    }
}

/// Halves the number of frames by a convolution over three of them. The first chunk of a video is
/// one frame and stays as it is.
#[derive(Clone, Copy, Debug)]
pub struct FrameHalving {
    kernel: Kernel,
}

impl FrameHalving {
    /// `weight` `[channels, channels, 3, 1, 1]` and `bias`.
    pub fn new(builder: &mut Builder<'_>, channels: i64) -> Self {
        FrameHalving { kernel: Kernel::new(builder, channels, channels, &[3, 1, 1]) }
    }

    /// # Shapes
    /// `x`: `[B, C, F, H, W]`, one chunk, with an even `F` from the second chunk on. Returns `[B,
    /// C, F/2, H, W]`; the first chunk unchanged.
    pub fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        match history.replaced(self.kernel.weight, x) {
            None => x.shallow_clone(),
            Some(before) => {
                let extended = Tensor::cat(&[&before, x], 2);
                self.kernel.apply(params, &extended, &[2, 1, 1], &[0, 0, 0])
            }
        }
    }
}

/// Doubles the number of frames by a causal convolution to twice the channels. The first chunk of a
/// video stays as it is, and no later one sees it.
#[derive(Clone, Copy, Debug)]
pub struct FrameDoubling {
    convolution: CausalConvolution,
}

impl FrameDoubling {
    /// `weight` `[2 · channels, channels, 3, 1, 1]` and `bias`.
    pub fn new(builder: &mut Builder<'_>, channels: i64) -> Self {
        let convolution = CausalConvolution::new(builder, channels, 2 * channels, [3, 1, 1]);
        FrameDoubling { convolution }
    }

    /// # Shapes
    /// `x`: `[B, C, F, H, W]`, one chunk. Returns `[B, C, 2F, H, W]`; the first chunk unchanged.
    pub fn forward(&self, params: &Views, x: &Tensor, history: &mut History) -> Tensor {
        if history.is_in_first_chunk() {
            return x.shallow_clone();
        }
        let halves = self.convolution.forward(params, x, history).chunk(2, 1);
        Tensor::stack(&halves, 3).flatten(2, 3)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::nn::{ParamSet, Rows};
    use crate::rng::{Key, Purpose};

    /// Parameters of the parts that `build` makes.
    fn drawn<T>(build: impl FnOnce(&mut Builder<'_>) -> T) -> (T, Views) {
        let mut set = ParamSet::new("part");
        let part = build(&mut Builder::new(&mut set, "part", Rows::Image));
        let flat = Tensor::zeros([set.numel()], (Kind::Double, Device::Cpu));
        set.initialize(&flat, Key::new(3, Purpose::Initialization));
        (part, set.split(&flat))
    }

    fn video() -> Tensor {
        let size = [2, 3, 9, 4, 5];
        Key::new(4, Purpose::Test).seeded(|| Tensor::randn(size, (Kind::Double, Device::Cpu)))
    }

    fn assert_equal(found: &Tensor, expected: &Tensor) {
        assert_eq!(found.size(), expected.size());
        // Sums of 81 f64 products.
        assert!((found - expected).abs().max().double_value(&[]) < 1e-13);
    }

    /// The outputs of all chunks, one after another.
    fn by_chunks(lengths: &[i64], mut map: impl FnMut(&Tensor, &mut History) -> Tensor) -> Tensor {
        let (mut history, mut start, mut outputs) = (History::default(), 0, Vec::new());
        for length in lengths {
            outputs.push(map(&video().narrow(2, start, *length), &mut history));
            history.end_chunk();
            start += length;
        }
        Tensor::cat(&outputs, 2)
    }

    #[test]
    fn chunks_are_convolved_to_the_frames_of_the_whole_video() {
        let (part, params) = drawn(|builder| CausalConvolution::new(builder, 3, 4, [3, 3, 3]));
        let padded = video().constant_pad_nd([1i64, 1, 1, 1, 2, 0]);
        let whole = part.kernel.apply(&params, &padded, &[1, 1, 1], &[0, 0, 0]);
        for lengths in [&[9][..], &[1, 4, 4], &[1; 9], &[2, 1, 6]] {
            let chunks = by_chunks(lengths, |x, history| part.forward(&params, x, history));
            assert_equal(&chunks, &whole);
        }
    }

    #[test]
    fn later_frames_change_no_earlier_output() {
        let (part, params) = drawn(|builder| EdgeConvolution::new(builder, 3, 4));
        let whole = part.forward(&params, &video());
        assert_equal(&part.forward(&params, &video().narrow(2, 0, 5)), &whole.narrow(2, 0, 5));
    }

    #[test]
    fn halving_and_doubling_leave_the_first_chunk_alone() {
        let (halving, params) = drawn(|builder| FrameHalving::new(builder, 3));
        let halved = by_chunks(&[1, 4, 4], |x, history| halving.forward(&params, x, history));
        assert_eq!(halved.size(), [2, 3, 5, 4, 5]);
        assert!(halved.narrow(2, 0, 1).equal(&video().narrow(2, 0, 1)));
        let strided = halving.kernel.apply(&params, &video(), &[2, 1, 1], &[0, 0, 0]);
        assert_equal(&halved.narrow(2, 1, 4), &strided);

        let (doubling, params) = drawn(|builder| FrameDoubling::new(builder, 3));
        let doubled = by_chunks(&[1, 1, 3], |x, history| doubling.forward(&params, x, history));
        assert_eq!(doubled.size(), [2, 3, 1 + 2 * 4, 4, 5]);
        assert!(doubled.narrow(2, 0, 1).equal(&video().narrow(2, 0, 1)));
        // Later frames are as if the first frame had never been there.
        let rest = video().narrow(2, 1, 4).constant_pad_nd([0i64, 0, 0, 0, 2, 0]);
        let convolution = doubling.convolution;
        let both = convolution.kernel.apply(&params, &rest, &[1, 1, 1], &[0, 0, 0]);
        assert_equal(&doubled.narrow(2, 1, 8).slice(2, 0i64, None, 2), &both.narrow(1, 0, 3));
        assert_equal(&doubled.narrow(2, 1, 8).slice(2, 1i64, None, 2), &both.narrow(1, 3, 3));
    }
}
