//! Attention whose queries and keys are normalized over the model's whole width, before they are
//! split into heads.
//!
//! Source: diffusers 0.42.1, `WanAttention`, whose parameter names these are; RMSNorm on queries
//! and keys is Wan's, arXiv:2503.20314.

use tch::Tensor;

use super::{Heads, attend};
use crate::nn::norm::RmsNorm;
use crate::nn::{Builder, Linear, Rows, Views};

/// The source of keys and values.
#[derive(Clone, Copy, Debug)]
struct Source {
    key: Linear,
    value: Linear,
    norm_key: RmsNorm,
}

impl Source {
    fn new(builder: &mut Builder<'_>, [key, value, norm_key]: [&str; 3], heads: Heads) -> Self {
        let width = heads.num_heads * heads.width;
        let mut linear =
            |name: &str| Linear::pytorch(&mut builder.at(name), width, width, heads.with_bias);
        let (key, value) = (linear(key), linear(value));
        Source {
            key,
            value,
            norm_key: RmsNorm::new(&mut builder.at(norm_key), width, heads.epsilon, heads.rounding),
        }
    }

    /// Keys and values `[B, K, N, E]`; keys rotated if there is a `table`.
    fn forward(
        &self,
        params: &Views,
        x: &Tensor,
        num_heads: i64,
        table: Option<&Tensor>,
    ) -> [Tensor; 2] {
        let (x, key) = self.key.passing_on(params, x);
        let key = heads(params, &self.norm_key, &key, num_heads, table);
        [key, split(&self.value.forward(params, &x), num_heads)]
    }
}

/// Attention of tokens over themselves, over text, or over text and images; text and images each
/// have a softmax of their own.
#[derive(Clone, Copy, Debug)]
pub struct WideAttention {
    query: Linear,
    norm_query: RmsNorm,
    source: Source,
    /// The source of the image tokens' keys and values, in a model that has products for them.
    added: Option<Source>,
    output: Linear,
    num_heads: i64,
}

impl WideAttention {
    /// Queries are the builder's rows. `keys`: the rows attended to. `added`: true for products of
    /// its own for an image's tokens.
    pub fn new(builder: &mut Builder<'_>, heads: Heads, keys: Rows, added: bool) -> Self {
        let width = heads.num_heads * heads.width;
        let query = Linear::pytorch(&mut builder.at("to_q"), width, width, heads.with_bias);
        let norm_query =
            RmsNorm::new(&mut builder.at("norm_q"), width, heads.epsilon, heads.rounding);
        builder.attends(heads.attention(builder.rows(), keys));
        let mut keys_builder = builder.at("").over(keys);
        let source = Source::new(&mut keys_builder, ["to_k", "to_v", "norm_k"], heads);
        let added = added.then(|| {
            Source::new(&mut keys_builder, ["add_k_proj", "add_v_proj", "norm_added_k"], heads)
        });
        let output = Linear::pytorch(&mut builder.at("to_out.0"), width, width, heads.with_bias);
        WideAttention { query, norm_query, source, added, output, num_heads: heads.num_heads }
    }

    /// # Shapes
    /// `x`: `[B, L, D]`; `table`: `[L, 1, E/2]` of [`rope`](crate::nn::rope). Returns the shape of
    /// `x`.
    pub fn over_itself(&self, params: &Views, x: &Tensor, table: &Tensor) -> Tensor {
        let (x, query) = self.query(params, x, Some(table));
        let [key, value] = self.source.forward(params, &x, self.num_heads, Some(table));
        self.output.forward(params, &attend(&query, &key, &value, None))
    }

    /// # Shapes
    /// `x`: `[B, L, D]`; `text`: `[B, Lt, D]`; `image`: `[B, Li, D]`, for a model with products for
    /// it. Returns the shape of `x`.
    pub fn over_conditions(
        &self,
        params: &Views,
        x: &Tensor,
        text: &Tensor,
        image: Option<&Tensor>,
    ) -> Tensor {
        let (_, query) = self.query(params, x, None);
        let over = |source: &Source, tokens: &Tensor| {
            let [key, value] = source.forward(params, tokens, self.num_heads, None);
            attend(&query, &key, &value, None)
        };
        let attended = match (&self.added, image) {
            (Some(added), Some(image)) => over(&self.source, text) + over(added, image),
            _ => over(&self.source, text),
        };
        self.output.forward(params, &attended)
    }

    /// `x` for its other uses, and the queries.
    fn query(&self, params: &Views, x: &Tensor, table: Option<&Tensor>) -> (Tensor, Tensor) {
        let (x, query) = self.query.passing_on(params, x);
        (x, heads(params, &self.norm_query, &query, self.num_heads, table))
    }
}

/// Normalizes `x` `[B, L, D]`, splits it into heads and rotates them by a `table` if there is one:
/// `[B, L, N, E]`.
fn heads(
    params: &Views,
    norm: &RmsNorm,
    x: &Tensor,
    num_heads: i64,
    table: Option<&Tensor>,
) -> Tensor {
    match table {
        Some(table) => norm.rotated(params, &split(x, num_heads), table),
        None => split(&norm.forward(params, x), num_heads),
    }
}

/// `[B, L, D]` as `[B, L, N, E]`.
fn split(x: &Tensor, num_heads: i64) -> Tensor {
    let (batch, tokens, _) = x.size3().expect("[B, L, D]");
    x.view([batch, tokens, num_heads, -1])
}
