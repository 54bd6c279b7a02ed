//! Blocks of frames, rows and columns as channels, and back.

use tch::Tensor;

use crate::ops::{FeatureOrder, Patch};

/// Makes channels of the places within each block. `order`: that of the new channels.
///
/// # Shapes
/// `x`: `[B, C, F, H, W]`, its axes multiples of the block's. Returns `[B, C · t · h · w, F/t, H/h,
/// W/w]`.
pub fn blocks_to_channels(x: &Tensor, block: Patch, order: FeatureOrder) -> Tensor {
    let (batch, channels, frames, height, width) = x.size5().expect("[B, C, F, H, W]");
    let [t, h, w] = block;
    let [frames, height, width] = [frames / t, height / h, width / w];
    let axes: [i64; 8] = match order {
        FeatureOrder::ChannelFirst => [0, 1, 3, 5, 7, 2, 4, 6],
        FeatureOrder::ChannelLast => [0, 3, 5, 7, 1, 2, 4, 6],
    };
    x.reshape([batch, channels, frames, t, height, h, width, w]).permute(axes).reshape([
        batch,
        channels * t * h * w,
        frames,
        height,
        width,
    ])
}

/// Undoes [`blocks_to_channels`].
///
/// # Shapes
/// `x`: `[B, C · t · h · w, F, H, W]`. Returns `[B, C, t · F, h · H, w · W]`.
pub fn channels_to_blocks(x: &Tensor, block: Patch, order: FeatureOrder) -> Tensor {
    let (batch, channels, frames, height, width) = x.size5().expect("[B, C, F, H, W]");
    let [t, h, w] = block;
    let channels = channels / (t * h * w);
    let (shape, axes): ([i64; 8], [i64; 8]) = match order {
        FeatureOrder::ChannelFirst => {
            ([batch, channels, t, h, w, frames, height, width], [0, 1, 5, 2, 6, 3, 7, 4])
        }
        FeatureOrder::ChannelLast => {
            ([batch, t, h, w, channels, frames, height, width], [0, 4, 5, 1, 6, 2, 7, 3])
        }
    };
    x.reshape(shape).permute(axes).reshape([batch, channels, t * frames, h * height, w * width])
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn channels_come_from_places_within_a_block_and_go_back_to_them() {
        let shape = [2, 3, 4, 6, 2];
        let count = shape.iter().product::<i64>();
        let x = Tensor::arange(count, (Kind::Float, Device::Cpu)).view(shape);
        let block = [2, 3, 1];
        // Frame 1, row 2, column 0 of the block that begins at frame 2, row 3, column 1.
        let at = [1, 2, 3, 5, 1];
        for (order, channel) in [
            (FeatureOrder::ChannelFirst, 2 * 6 + 3 + 2),
            (FeatureOrder::ChannelLast, (3 + 2) * 3 + 2),
        ] {
            let channels = blocks_to_channels(&x, block, order);
            assert_eq!(channels.size(), [2, 18, 2, 2, 2]);
            assert_eq!(channels.double_value(&[1, channel, 1, 1, 1]), x.double_value(&at));
            assert!(channels_to_blocks(&channels, block, order).equal(&x));
        }
    }
}
