//! Wan 2.1 and 2.2. Source: Wan-Video/Wan2.1, `wan/modules/model.py`; musubi-tuner has the same
//! names.

use super::{Linear, Names, plain};

pub const NAMES: Names = Names {
    title: "Wan",
    architecture: "wan2",
    version: "wan",
    network: "networks.lora_wan",
    // No other family has its names.
    published: &[],
    linears: LINEARS,
};

#[rustfmt::skip]
const LINEARS: &[Linear] = &[
    plain("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    plain("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    plain("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    plain("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    plain("condition_embedder.time_proj", "time_projection.1"),
    plain("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    plain("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    plain("blocks.*.attn1.to_q", "blocks.*.self_attn.q"),
    plain("blocks.*.attn1.to_k", "blocks.*.self_attn.k"),
    plain("blocks.*.attn1.to_v", "blocks.*.self_attn.v"),
    plain("blocks.*.attn1.to_out.0", "blocks.*.self_attn.o"),
    plain("blocks.*.attn2.to_q", "blocks.*.cross_attn.q"),
    plain("blocks.*.attn2.to_k", "blocks.*.cross_attn.k"),
    plain("blocks.*.attn2.to_v", "blocks.*.cross_attn.v"),
    plain("blocks.*.attn2.to_out.0", "blocks.*.cross_attn.o"),
    plain("blocks.*.attn2.add_k_proj", "blocks.*.cross_attn.k_img"),
    plain("blocks.*.attn2.add_v_proj", "blocks.*.cross_attn.v_img"),
    plain("blocks.*.ffn.net.0.proj", "blocks.*.ffn.0"),
    plain("blocks.*.ffn.net.2", "blocks.*.ffn.2"),
    plain("proj_out", "head.head"),
];
