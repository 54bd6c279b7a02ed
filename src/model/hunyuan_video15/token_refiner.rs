//! The stage that refines a language model's text before HunyuanVideo's blocks: a small transformer
//! over text alone.
//!
//! Source: diffusers 0.42.1, `HunyuanVideo15TokenRefiner`, whose parameter names these are.

use tch::{Kind, Tensor};

use crate::nn::attention::attend;
use crate::nn::embed::ScalarEmbedding;
use crate::nn::modulation::{Modulation, gated};
use crate::nn::norm::LayerNorm;
use crate::nn::{
    Activations, AttentionInfo, Builder, Linear, Mlp, Nonlinearity, ParamSet, Rows, Stage, Views,
};
use crate::ops::at_least_float;

/// Epsilon of the layer normalizations.
const EPSILON: f64 = 1e-6;
/// Width of the timestep's sinusoidal embedding.
const FREQUENCIES: i64 = 256;
/// Hidden width of the feed-forward parts as a multiple of the model's width; independent of the
/// ratio in the model's own blocks.
const MLP_RATIO: i64 = 4;

/// Maps `encoder_hidden_states` `[B, L, inputs]`, `timestep` `[B]` and, if samples see different
/// tokens, `encoder_attention_mask` `[B, L]` to `text` `[B, L, D]`.
pub(super) struct TokenRefiner {
    params: ParamSet,
    timestep: ScalarEmbedding,
    pooled: Mlp,
    input: Linear,
    blocks: Vec<Block>,
}

impl TokenRefiner {
    /// `inputs`: features of the text; `width`: that of the model; `num_heads` heads.
    pub fn new(inputs: i64, width: i64, num_heads: i64, num_blocks: i64) -> Self {
        let mut params = ParamSet::new("context_embedder");
        let mut builder = Builder::new(&mut params, "context_embedder", Rows::Text);
        let timestep = ScalarEmbedding::new(
            &mut builder.at("time_text_embed.timestep_embedder"),
            FREQUENCIES,
            width,
            true,
        );
        let pooled = Mlp::of_two_linears(
            &mut builder.at("time_text_embed.text_embedder").over(Rows::One),
            [inputs, width, width],
            Nonlinearity::Silu,
            true,
        );
        let input = Linear::pytorch(&mut builder.at("proj_in"), inputs, width, true);
        let mut blocks = builder.at("token_refiner.refiner_blocks");
        let blocks = (0..num_blocks)
            .map(|index| Block::new(&mut blocks.at(&index.to_string()), width, num_heads))
            .collect();
        TokenRefiner { params, timestep, pooled, input, blocks }
    }
}

impl Stage for TokenRefiner {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let (text, mask) =
            (input.get("encoder_hidden_states"), input.find("encoder_attention_mask"));
        let timestep = self.timestep.forward(params, input.get("timestep"), text.kind());
        let conditioning = timestep + self.pooled.forward(params, &average(text, mask));
        // Only keys are masked: the padding's own rows reach neither a valid token nor the loss.
        let seen = mask.map(|mask| mask.unsqueeze(1).unsqueeze(1));
        let refine = |text: Tensor, block: &Block| {
            block.forward(params, &text, &conditioning, seen.as_ref())
        };
        Activations::new()
            .with("text", self.blocks.iter().fold(self.input.forward(params, text), refine))
    }
}

/// Returns the mean of the tokens that `mask` marks, or of all, computed in f32; zeros if no token
/// is valid.
///
/// # Shapes
/// `text`: `[B, L, D]`; `mask`: `[B, L]` boolean. Returns `[B, D]` in the kind of `text`.
fn average(text: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let sum = |x: &Tensor| x.sum_dim_intlist([1i64].as_slice(), false, None::<Kind>);
    let Some(mask) = mask else {
        let wide = text.to_kind(at_least_float(text.kind()));
        return wide.mean_dim([1i64].as_slice(), false, None::<Kind>).to_kind(text.kind());
    };
    let weights = mask.to_kind(Kind::Float).unsqueeze(-1);
    // An empty text has no mean; clamping to the smallest divisor changes no other quotient.
    (sum(&(text * &weights)) / sum(&weights).clamp_min(f64::from(f32::MIN_POSITIVE)))
        .to_kind(text.kind())
}

/// Attention and feed-forward, each with a normalization before and a gate after it.
struct Block {
    norm_attention: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    norm_feed: LayerNorm,
    feed: Mlp,
    gates: Modulation,
    num_heads: i64,
}

impl Block {
    fn new(builder: &mut Builder<'_>, width: i64, num_heads: i64) -> Self {
        builder.attends(AttentionInfo {
            queries: Rows::Text,
            keys: Rows::Text,
            num_heads,
            head_width: width / num_heads,
            takes_mask: true,
        });
        let mut linear = |name: &str, rows, outputs| {
            Linear::pytorch(&mut builder.at(name).over(rows), width, outputs, true)
        };
        let [query, key, value, output] = ["to_q", "to_k", "to_v", "to_out.0"]
            .map(|name| linear(&format!("attn.{name}"), Rows::Text, width));
        let gates = Modulation::new(linear("norm_out.linear", Rows::One, 2 * width));
        let [norm_attention, norm_feed] =
            ["norm1", "norm2"].map(|name| LayerNorm::new(&mut builder.at(name), width, EPSILON));
        let feed = Mlp::feed_forward(
            &mut builder.at("ff"),
            [width, MLP_RATIO * width, width],
            Nonlinearity::Silu,
        );
        Block { norm_attention, query, key, value, output, norm_feed, feed, gates, num_heads }
    }

    /// # Shapes
    /// `text`: `[B, L, D]`; `conditioning`: `[B, D]`; `seen`: `[B, 1, 1, L]` boolean, if samples
    /// see different tokens. Returns the shape of `text`.
    fn forward(
        &self,
        params: &Views,
        text: &Tensor,
        conditioning: &Tensor,
        seen: Option<&Tensor>,
    ) -> Tensor {
        let [gate_attention, gate_feed] = self.gates.forward(params, conditioning);
        let text = gated(
            text,
            &gate_attention,
            &self.attention(params, &self.norm_attention.forward(params, text), seen),
        );
        gated(&text, &gate_feed, &self.feed.forward(params, &self.norm_feed.forward(params, &text)))
    }

    fn attention(&self, params: &Views, text: &Tensor, seen: Option<&Tensor>) -> Tensor {
        let (batch, tokens, _) = text.size3().expect("[B, L, D]");
        let heads = |linear: &Linear| {
            linear.forward(params, text).view([batch, tokens, self.num_heads, -1])
        };
        self.output.forward(
            params,
            &attend(&heads(&self.query), &heads(&self.key), &heads(&self.value), seen),
        )
    }
}
