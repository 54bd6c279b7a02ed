//! FLUX.1. Source: black-forest-labs/flux, `model.py` and `modules/layers.py`; sd-scripts has the
//! same names.

use super::{Linear, Names, Part, Published, QKV, part, plain, slice};

/// Queries, keys, values and the hidden layer of the feed-forward part.
const LINEAR1: &[i64] = &[1, 1, 1, 4];

pub const NAMES: Names = Names {
    title: "FLUX.1",
    architecture: "flux-1",
    version: "flux1",
    network: "networks.lora_flux",
    published: &[Published { width: 3072, double: 19, single: 38 }],
    linears: LINEARS,
};

#[rustfmt::skip]
const LINEARS: &[Linear] = &[
    plain("x_embedder", "img_in"),
    plain("context_embedder", "txt_in"),
    plain("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    plain("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    plain("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    plain("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    plain("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    plain("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    slice("transformer_blocks.*.attn.to_q", "double_blocks.*.img_attn.qkv", QKV, 0),
    slice("transformer_blocks.*.attn.to_k", "double_blocks.*.img_attn.qkv", QKV, 1),
    slice("transformer_blocks.*.attn.to_v", "double_blocks.*.img_attn.qkv", QKV, 2),
    plain("transformer_blocks.*.attn.to_out.0", "double_blocks.*.img_attn.proj"),
    plain("transformer_blocks.*.norm1.linear", "double_blocks.*.img_mod.lin"),
    plain("transformer_blocks.*.ff.net.0.proj", "double_blocks.*.img_mlp.0"),
    plain("transformer_blocks.*.ff.net.2", "double_blocks.*.img_mlp.2"),
    slice("transformer_blocks.*.attn.add_q_proj", "double_blocks.*.txt_attn.qkv", QKV, 0),
    slice("transformer_blocks.*.attn.add_k_proj", "double_blocks.*.txt_attn.qkv", QKV, 1),
    slice("transformer_blocks.*.attn.add_v_proj", "double_blocks.*.txt_attn.qkv", QKV, 2),
    plain("transformer_blocks.*.attn.to_add_out", "double_blocks.*.txt_attn.proj"),
    plain("transformer_blocks.*.norm1_context.linear", "double_blocks.*.txt_mod.lin"),
    plain("transformer_blocks.*.ff_context.net.0.proj", "double_blocks.*.txt_mlp.0"),
    plain("transformer_blocks.*.ff_context.net.2", "double_blocks.*.txt_mlp.2"),
    slice("single_transformer_blocks.*.attn.to_q", "single_blocks.*.linear1", LINEAR1, 0),
    slice("single_transformer_blocks.*.attn.to_k", "single_blocks.*.linear1", LINEAR1, 1),
    slice("single_transformer_blocks.*.attn.to_v", "single_blocks.*.linear1", LINEAR1, 2),
    slice("single_transformer_blocks.*.proj_mlp", "single_blocks.*.linear1", LINEAR1, 3),
    plain("single_transformer_blocks.*.proj_out", "single_blocks.*.linear2"),
    plain("single_transformer_blocks.*.norm.linear", "single_blocks.*.modulation.lin"),
    part("norm_out.linear", "final_layer.adaLN_modulation.1", Part::Swapped),
    plain("proj_out", "final_layer.linear"),
];
