//! Qwen-Image, whose published file has diffusers' names.

use super::{Linear, Names, Published, plain};

pub const NAMES: Names = Names {
    title: "Qwen-Image",
    architecture: "Qwen-Image",
    version: "qwen_image",
    network: "networks.lora_qwen_image",
    published: &[Published { width: 3072, double: 60, single: 0 }],
    linears: LINEARS,
};

const fn same(name: &'static str) -> Linear {
    plain(name, name)
}

const LINEARS: &[Linear] = &[
    same("img_in"),
    same("txt_in"),
    same("time_text_embed.timestep_embedder.linear_1"),
    same("time_text_embed.timestep_embedder.linear_2"),
    same("transformer_blocks.*.img_mod.1"),
    same("transformer_blocks.*.txt_mod.1"),
    same("transformer_blocks.*.attn.to_q"),
    same("transformer_blocks.*.attn.to_k"),
    same("transformer_blocks.*.attn.to_v"),
    same("transformer_blocks.*.attn.to_out.0"),
    same("transformer_blocks.*.attn.add_q_proj"),
    same("transformer_blocks.*.attn.add_k_proj"),
    same("transformer_blocks.*.attn.add_v_proj"),
    same("transformer_blocks.*.attn.to_add_out"),
    same("transformer_blocks.*.img_mlp.net.0.proj"),
    same("transformer_blocks.*.img_mlp.net.2"),
    same("transformer_blocks.*.txt_mlp.net.0.proj"),
    same("transformer_blocks.*.txt_mlp.net.2"),
    same("norm_out.linear"),
    same("proj_out"),
];
