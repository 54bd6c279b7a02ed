//! Attention.

mod choice;
mod wide;

use tch::Tensor;

use super::norm::RmsNorm;
use super::{AttentionInfo, Builder, Init, Linear, Rows, Views};
use crate::libtorch::{AttentionBackend, permit_attention};
use crate::ops::{Rounding, at_least_float, with_dense_gradient};
pub use choice::{AttentionChoice, choose, open_on};
pub use wide::WideAttention;

/// Scaled dot-product attention of every head. On a GPU the backend that [`choose`] named computes
/// it; on a CPU libtorch chooses.
///
/// # Shapes
/// `query`: `[B, L, N, E]`; `key`, `value`: `[B, K, N, E]`; `mask`: boolean, broadcastable to `[B,
/// N, L, K]`, true where a key is seen. Returns `[B, L, N · E]`.
pub fn attend(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let attention = Attention { query, key, value, mask };
    match query.device().is_cuda() {
        true => attention.by(choice::chosen(mask.is_some())),
        false => attention.by_libtorchs_choice(),
    }
}

/// As [`attend`], for networks that are not trained: on a GPU the plain backend computes it, since
/// [`choose`] has tried the others with the heads and masks of the trained model alone.
pub fn attend_plainly(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    mask: Option<&Tensor>,
) -> Tensor {
    permit_plain(query);
    Attention { query, key, value, mask }.permitted(None)
}

/// As [`attend_plainly`], of scores that are not scaled and to which `bias` is added.
///
/// # Shapes
/// As [`attend`]; `bias`: of the kind of the query, broadcastable to `[B, N, L, K]`.
pub fn attend_unscaled(query: &Tensor, key: &Tensor, value: &Tensor, bias: &Tensor) -> Tensor {
    permit_plain(query);
    Attention { query, key, value, mask: Some(bias) }.permitted(Some(1.0))
}

fn permit_plain(query: &Tensor) {
    if query.device().is_cuda() {
        permit_attention(&[AttentionBackend::Plain]);
    }
}

/// Attention by a single head of any width, without a mask. On a GPU the memory-efficient backend
/// computes it, untried: the others take no head as wide as those of autoencoders, and the plain
/// one would hold the scores of all pairs of places. On a CPU libtorch chooses, and bfloat16 is
/// computed in f32 and rounded once.
///
/// # Shapes
/// `query`: `[B, L, D]`; `key`, `value`: `[B, K, D]`. Returns `[B, L, D]`.
pub fn attend_by_one_head(query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
    let [query, key, value] = [query, key, value].map(|tensor| tensor.unsqueeze(2));
    if query.device().is_cuda() {
        let attention = Attention { query: &query, key: &key, value: &value, mask: None };
        return attention.by(AttentionBackend::Efficient);
    }
    let kind = query.kind();
    let [query, key, value] =
        [query, key, value].map(|tensor| tensor.to_kind(at_least_float(tensor.kind())));
    let attention = Attention { query: &query, key: &key, value: &value, mask: None };
    attention.by_libtorchs_choice().to_kind(kind)
}

/// The inputs of one attention, with the shapes of [`attend`].
#[derive(Clone, Copy, Debug)]
pub struct Attention<'t> {
    pub query: &'t Tensor,
    pub key: &'t Tensor,
    pub value: &'t Tensor,
    pub mask: Option<&'t Tensor>,
}

impl Attention<'_> {
    /// Computes by `backend`, on any device. Inputs that it does not take are computed by
    /// [`AttentionBackend::Plain`].
    ///
    /// The gradient of the output reaches the backend contiguous. libtorch 2.11 to 2.13 keep the
    /// compiled backward pass of cuDNN by the layouts of query, key and value alone, and use it for
    /// gradients of another layout, too: a strided one, of blocks that join attention with their
    /// MLP, before a contiguous one made it read beyond the end.
    pub fn by(self, backend: AttentionBackend) -> Tensor {
        permit_attention(&[backend, AttentionBackend::Plain]);
        with_dense_gradient(&self.by_libtorchs_choice())
    }

    /// Returns the backend that computes where [`by`](Self::by) is asked for `backend`.
    pub fn taken_by(self, backend: AttentionBackend) -> Option<AttentionBackend> {
        permit_attention(&[backend, AttentionBackend::Plain]);
        let [query, key, value] = self.by_heads();
        let number = Tensor::internal_fused_sdp_choice(
            &query, &key, &value, self.mask, 0.0, false, None, false,
        );
        AttentionBackend::numbered(number)
    }

    fn by_libtorchs_choice(self) -> Tensor {
        self.permitted(None)
    }

    /// Computes by the backend that libtorch takes of those permitted. `scale`: the factor of the
    /// scores; `None` for `E^-1/2`.
    fn permitted(self, scale: Option<f64>) -> Tensor {
        let [query, key, value] = self.by_heads();
        let mask = self.mask;
        Tensor::scaled_dot_product_attention(&query, &key, &value, mask, 0.0, false, scale, false)
            .transpose(1, 2)
            .flatten(2, 3)
    }

    /// Returns query, key and value as `[B, N, L, E]`.
    fn by_heads(self) -> [Tensor; 3] {
        [self.query, self.key, self.value].map(|tensor| tensor.transpose(1, 2))
    }
}

/// Names of one stream's parts, as in diffusers' FLUX and later models.
struct Names {
    query: &'static str,
    key: &'static str,
    value: &'static str,
    norm_query: &'static str,
    norm_key: &'static str,
}

const OWN: Names =
    Names { query: "to_q", key: "to_k", value: "to_v", norm_query: "norm_q", norm_key: "norm_k" };
const ADDED: Names = Names {
    query: "add_q_proj",
    key: "add_k_proj",
    value: "add_v_proj",
    norm_query: "norm_added_q",
    norm_key: "norm_added_k",
};

/// An attention's heads: their sizes, their normalization and their mask.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub num_heads: i64,
    pub width: i64,
    /// True if the products have a bias.
    pub with_bias: bool,
    /// Epsilon of the normalization of queries and keys.
    pub epsilon: f64,
    pub rounding: Rounding,
    /// As in [`AttentionInfo`].
    pub takes_mask: bool,
}

impl Heads {
    /// Describes an attention by these heads.
    pub fn attention(self, queries: Rows, keys: Rows) -> AttentionInfo {
        let Heads { num_heads, width, takes_mask, .. } = self;
        AttentionInfo { queries, keys, num_heads, head_width: width, takes_mask }
    }
}

/// Query, key and value of one stream; query and key normalized head by head.
#[derive(Clone, Copy, Debug)]
pub struct Projections {
    query: Linear,
    key: Linear,
    value: Linear,
    norm_query: RmsNorm,
    norm_key: RmsNorm,
    num_heads: i64,
}

impl Projections {
    /// `to_q`, `to_k`, `to_v`, `norm_q`, `norm_k` from a stream of `inputs` features.
    pub fn new(builder: &mut Builder<'_>, inputs: i64, heads: Heads) -> Self {
        Self::named(builder, &OWN, inputs, heads)
    }

    fn named(builder: &mut Builder<'_>, names: &Names, inputs: i64, heads: Heads) -> Self {
        let mut linear = |name: &str| {
            Linear::pytorch(
                &mut builder.at(name),
                inputs,
                heads.num_heads * heads.width,
                heads.with_bias,
            )
        };
        let (query, key, value) = (linear(names.query), linear(names.key), linear(names.value));
        let mut norm = |name: &str| {
            RmsNorm::new(&mut builder.at(name), heads.width, heads.epsilon, heads.rounding)
        };
        let (norm_query, norm_key) = (norm(names.norm_query), norm(names.norm_key));
        Projections { query, key, value, norm_query, norm_key, num_heads: heads.num_heads }
    }

    /// # Shapes
    /// `x`: `[B, L, D]`; `table`: `[L, 1, E/2]` of [`rope`](super::rope), if the stream has
    /// positions. Returns `x` for its other uses, and query, key and value `[B, L, N, E]`.
    pub fn forward(
        &self,
        params: &Views,
        x: &Tensor,
        table: Option<&Tensor>,
    ) -> (Tensor, [Tensor; 3]) {
        let (batch, tokens, _) = x.size3().expect("[B, L, D]");
        let heads = |linear: &Linear, x: &Tensor| {
            let (x, product) = linear.passing_on(params, x);
            (x, product.view([batch, tokens, self.num_heads, -1]))
        };
        let normalized = |norm: &RmsNorm, x: &Tensor| match table {
            Some(table) => norm.rotated(params, x, table),
            None => norm.forward(params, x),
        };
        let (x, query) = heads(&self.query, x);
        let (x, key) = heads(&self.key, &x);
        let (x, value) = heads(&self.value, &x);
        let [query, key] = [(&self.norm_query, query), (&self.norm_key, key)]
            .map(|(norm, x)| normalized(norm, &x));
        (x, [query, key, value])
    }
}

/// Attention over text and image together, each with products of its own.
///
/// Source: Esser et al. 2024, arXiv:2403.03206, section 4 (MM-DiT).
#[derive(Clone, Copy, Debug)]
pub struct JointAttention {
    image: Projections,
    text: Projections,
    image_output: Linear,
    text_output: Linear,
}

impl JointAttention {
    pub fn new(builder: &mut Builder<'_>, width: i64, heads: Heads) -> Self {
        let mut image_builder = builder.at("").over(Rows::Image);
        let image = Projections::named(&mut image_builder, &OWN, width, heads);
        let mut text_builder = builder.at("").over(Rows::Text);
        let text = Projections::named(&mut text_builder, &ADDED, width, heads);
        builder.attends(heads.attention(Rows::Joint, Rows::Joint));
        let mut output = |name: &str, rows| {
            Linear::pytorch(
                &mut builder.at(name).over(rows),
                heads.num_heads * heads.width,
                width,
                heads.with_bias,
            )
        };
        JointAttention {
            image,
            text,
            image_output: output("to_out.0", Rows::Image),
            text_output: output("to_add_out", Rows::Text),
        }
    }

    /// # Shapes
    /// `image`: `[B, Li, D]`, `text`: `[B, Lt, D]`, each with its table of [`rope`](super::rope) if
    /// it has positions; `mask`: as in [`attend`], over text keys, then image keys. Returns image
    /// and text.
    pub fn forward(
        &self,
        params: &Views,
        image: Stream<'_>,
        text: Stream<'_>,
        mask: Option<&Tensor>,
    ) -> (Tensor, Tensor) {
        let (_, of_text) = self.text.forward(params, text.tokens, text.table);
        let (_, of_image) = self.image.forward(params, image.tokens, image.table);
        let [query, key, value] =
            std::array::from_fn(|part| Tensor::cat(&[&of_text[part], &of_image[part]], 1));
        let attended = attend(&query, &key, &value, mask);
        let tokens = [text, image].map(|stream| stream.tokens.size()[1]);
        // In one piece each, as diffusers has them: with a bias, bfloat16 came out otherwise by a
        // percent for parts of a larger tensor.
        let parts = attended.split_with_sizes(tokens, 1);
        let text = self.text_output.forward(params, &parts[0].contiguous());
        (self.image_output.forward(params, &parts[1].contiguous()), text)
    }
}

/// Tokens, and the rotations of their positions.
#[derive(Clone, Copy, Debug)]
pub struct Stream<'t> {
    pub tokens: &'t Tensor,
    pub table: Option<&'t Tensor>,
}

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
        builder.attends(AttentionInfo {
            queries: Rows::Image,
            keys: Rows::Image,
            num_heads,
            head_width: width / num_heads,
            takes_mask: false,
        });
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
        let (heads, width) = (self.num_heads, width / self.num_heads);
        // [B, L, 3·D] -> 3 of [B, L, N, E], whose gradients are joined at once
        let qkv = self.qkv.forward(params, x).view([batch, tokens, 3, heads, width]).unbind(2);
        self.proj.forward(params, &attend(&qkv[0], &qkv[1], &qkv[2], None))
    }
}
