//! Transformer block over two streams, image and text, that meet in one attention.
//!
//! Source: Esser et al. 2024, arXiv:2403.03206, section 4 (MM-DiT), as FLUX, Qwen-Image and
//! HunyuanVideo 1.5 build it.

use tch::Tensor;

use super::attention::{Heads, JointAttention, Stream};
use super::modulation::{Modulation, gated, modulated_norm};
use super::{Builder, Linear, Mlp, Nonlinearity, Rows, Views};

/// Shift, scale and gate of the attention, then those of the feed-forward part; `[B, 1, D]` each.
pub type BlockModulation = [Tensor; 6];

/// Attention and feed-forward parts of both streams; the caller supplies their modulation.
#[derive(Clone, Copy, Debug)]
pub struct JointBlock {
    pub attention: JointAttention,
    pub image_feed: Mlp,
    pub text_feed: Mlp,
    /// Epsilon of the layer normalizations.
    pub epsilon: f64,
}

impl JointBlock {
    /// # Shapes
    /// As [`JointAttention::forward`]. Returns image and text.
    pub fn forward(
        &self,
        params: &Views,
        [image, text]: [Stream<'_>; 2],
        [of_image, of_text]: [&BlockModulation; 2],
        mask: Option<&Tensor>,
    ) -> (Tensor, Tensor) {
        let ready = |tokens: &Tensor, modulation: &BlockModulation| {
            modulated_norm(tokens, &modulation[0], &modulation[1], self.epsilon)
        };
        let (image_tokens, image_ready) = ready(image.tokens, of_image);
        let (text_tokens, text_ready) = ready(text.tokens, of_text);
        let (image_attended, text_attended) = self.attention.forward(
            params,
            Stream { tokens: &image_ready, table: image.table },
            Stream { tokens: &text_ready, table: text.table },
            mask,
        );
        let finish =
            |tokens: &Tensor, attended: &Tensor, modulation: &BlockModulation, feed: &Mlp| {
                let [_, _, gate, shift, scale, feed_gate] = modulation;
                let tokens = gated(tokens, gate, attended);
                let (tokens, ready) = modulated_norm(&tokens, shift, scale, self.epsilon);
                gated(&tokens, feed_gate, &feed.forward(params, &ready))
            };
        let image = finish(&image_tokens, &image_attended, of_image, &self.image_feed);
        (image, finish(&text_tokens, &text_attended, of_text, &self.text_feed))
    }
}

/// Names of the parts in which the families differ.
#[derive(Clone, Copy, Debug)]
pub struct BlockNames {
    pub image_modulation: &'static str,
    pub text_modulation: &'static str,
    pub image_feed: &'static str,
    pub text_feed: &'static str,
}

/// A [`JointBlock`] with modulations of its own.
#[derive(Clone, Copy, Debug)]
pub struct ModulatedJointBlock {
    block: JointBlock,
    image_modulation: Modulation,
    text_modulation: Modulation,
}

impl ModulatedJointBlock {
    /// `hidden`: width of the feed-forward parts.
    pub fn new(
        builder: &mut Builder<'_>,
        names: &BlockNames,
        width: i64,
        hidden: i64,
        heads: Heads,
    ) -> Self {
        let mut modulation = |name: &str| {
            Modulation::new(Linear::pytorch(
                &mut builder.at(name).over(Rows::One),
                width,
                6 * width,
                true,
            ))
        };
        let (image_modulation, text_modulation) =
            (modulation(names.image_modulation), modulation(names.text_modulation));
        let attention = JointAttention::new(&mut builder.at("attn"), width, heads);
        let mut feed = |name: &str, rows| {
            let widths = [width, hidden, width];
            Mlp::feed_forward(&mut builder.at(name).over(rows), widths, Nonlinearity::GeluTanh)
        };
        let (image_feed, text_feed) =
            (feed(names.image_feed, Rows::Image), feed(names.text_feed, Rows::Text));
        let block = JointBlock { attention, image_feed, text_feed, epsilon: heads.epsilon };
        ModulatedJointBlock { block, image_modulation, text_modulation }
    }

    /// # Shapes
    /// As [`JointAttention::forward`]; `conditioning`: `[B, D]`. Returns image and text.
    pub fn forward(
        &self,
        params: &Views,
        streams: [Stream<'_>; 2],
        conditioning: &Tensor,
        mask: Option<&Tensor>,
    ) -> (Tensor, Tensor) {
        let of_image = self.image_modulation.forward(params, conditioning);
        let of_text = self.text_modulation.forward(params, conditioning);
        self.block.forward(params, streams, [&of_image, &of_text], mask)
    }
}
