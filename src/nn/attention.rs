//! Attention.

use tch::Tensor;

use super::{Builder, Init, Linear, Views};

/// Multi-head self-attention with one product for query, key and value.
#[derive(Clone, Copy, Debug)]
pub struct SelfAttention {
    qkv: Linear,
    proj: Linear,
    num_heads: i64,
}

impl SelfAttention {
    pub fn new(builder: &mut Builder<'_>, width: i64, num_heads: i64) -> Self {
        let init = |outputs| Init::Xavier { fan_in: width, fan_out: outputs };
        SelfAttention {
            qkv: Linear::new(&mut builder.at("qkv"), width, 3 * width, init(3 * width)),
            proj: Linear::new(&mut builder.at("proj"), width, width, init(width)),
            num_heads,
        }
    }

    /// # Shapes
    /// `x`: `[B, L, D]`. Returns the same.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        let (batch, tokens, width) = x.size3().expect("[B, L, D]");
        // [B, L, 3·D] -> 3 of [B, N, L, E]
        let qkv = self.qkv.forward(params, x).view([batch, tokens, 3, self.num_heads, width / self.num_heads]).permute([2, 0, 3, 1, 4]);
        let attended =
            Tensor::scaled_dot_product_attention(&qkv.get(0), &qkv.get(1), &qkv.get(2), None::<&Tensor>, 0.0, false, None, false);
        self.proj.forward(params, &attended.transpose(1, 2).reshape([batch, tokens, width]))
    }
}
