//! HunyuanVideo 1.5. The published file and musubi-tuner have queries, keys and values apart in the
//! blocks; ComfyUI's file has them as one matrix, and names of its own.
//!
//! Source: diffusers, `scripts/convert_hunyuan_video1_5_to_diffusers.py`; musubi-tuner,
//! `hunyuan_video_1_5/hunyuan_video_1_5_modules.py` and
//! `networks/convert_hunyuan_video_1_5_lora_to_comfy.py`; ComfyUI, `comfy/lora.py`.

use super::{Linear, Names, Part, Published, QKV, part, plain, slice};

pub const NAMES: Names = Names {
    title: "HunyuanVideo 1.5",
    architecture: "hunyuan-video-1.5",
    version: "hunyuan_video_1_5",
    network: "networks.lora_hv_1_5",
    published: &[Published { width: 2048, double: 54, single: 0 }],
    linears: LINEARS,
};

/// Beginning of the names in the token refiner.
macro_rules! refiner {
    ($name:literal) => {
        concat!("context_embedder.token_refiner.refiner_blocks.*.", $name)
    };
}

macro_rules! native_refiner {
    ($name:literal) => {
        concat!("txt_in.individual_token_refiner.blocks.*.", $name)
    };
}

#[rustfmt::skip]
const LINEARS: &[Linear] = &[
    plain("time_embed.timestep_embedder.linear_1", "time_in.in_layer").renamed("time_in.mlp.0"),
    plain("time_embed.timestep_embedder.linear_2", "time_in.out_layer").renamed("time_in.mlp.2"),
    plain("time_embed.timestep_embedder_r.linear_1", "time_r_in.in_layer").renamed("time_r_in.mlp.0"),
    plain("time_embed.timestep_embedder_r.linear_2", "time_r_in.out_layer").renamed("time_r_in.mlp.2"),
    plain("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.in_layer").renamed("txt_in.t_embedder.mlp.0"),
    plain("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.out_layer").renamed("txt_in.t_embedder.mlp.2"),
    plain("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.in_layer").renamed("txt_in.c_embedder.linear_1"),
    plain("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.out_layer").renamed("txt_in.c_embedder.linear_2"),
    plain("context_embedder.proj_in", "txt_in.input_embedder"),
    slice(refiner!("attn.to_q"), native_refiner!("self_attn.qkv"), QKV, 0),
    slice(refiner!("attn.to_k"), native_refiner!("self_attn.qkv"), QKV, 1),
    slice(refiner!("attn.to_v"), native_refiner!("self_attn.qkv"), QKV, 2),
    plain(refiner!("attn.to_out.0"), native_refiner!("self_attn.proj")),
    plain(refiner!("ff.net.0.proj"), native_refiner!("mlp.0")).renamed(native_refiner!("mlp.fc1")),
    plain(refiner!("ff.net.2"), native_refiner!("mlp.2")).renamed(native_refiner!("mlp.fc2")),
    plain(refiner!("norm_out.linear"), native_refiner!("adaLN_modulation.1")),
    plain("context_embedder_2.linear_1", "byt5_in.fc1"),
    plain("context_embedder_2.linear_2", "byt5_in.fc2"),
    plain("context_embedder_2.linear_3", "byt5_in.fc3"),
    plain("image_embedder.linear_1", "vision_in.proj.1"),
    plain("image_embedder.linear_2", "vision_in.proj.3"),
    slice("transformer_blocks.*.attn.to_q", "double_blocks.*.img_attn.qkv", QKV, 0).apart("double_blocks.*.img_attn_q"),
    slice("transformer_blocks.*.attn.to_k", "double_blocks.*.img_attn.qkv", QKV, 1).apart("double_blocks.*.img_attn_k"),
    slice("transformer_blocks.*.attn.to_v", "double_blocks.*.img_attn.qkv", QKV, 2).apart("double_blocks.*.img_attn_v"),
    plain("transformer_blocks.*.attn.to_out.0", "double_blocks.*.img_attn.proj"),
    plain("transformer_blocks.*.norm1.linear", "double_blocks.*.img_mod.lin").renamed("double_blocks.*.img_mod.linear"),
    plain("transformer_blocks.*.ff.net.0.proj", "double_blocks.*.img_mlp.0").renamed("double_blocks.*.img_mlp.fc1"),
    plain("transformer_blocks.*.ff.net.2", "double_blocks.*.img_mlp.2").renamed("double_blocks.*.img_mlp.fc2"),
    slice("transformer_blocks.*.attn.add_q_proj", "double_blocks.*.txt_attn.qkv", QKV, 0).apart("double_blocks.*.txt_attn_q"),
    slice("transformer_blocks.*.attn.add_k_proj", "double_blocks.*.txt_attn.qkv", QKV, 1).apart("double_blocks.*.txt_attn_k"),
    slice("transformer_blocks.*.attn.add_v_proj", "double_blocks.*.txt_attn.qkv", QKV, 2).apart("double_blocks.*.txt_attn_v"),
    plain("transformer_blocks.*.attn.to_add_out", "double_blocks.*.txt_attn.proj"),
    plain("transformer_blocks.*.norm1_context.linear", "double_blocks.*.txt_mod.lin").renamed("double_blocks.*.txt_mod.linear"),
    plain("transformer_blocks.*.ff_context.net.0.proj", "double_blocks.*.txt_mlp.0").renamed("double_blocks.*.txt_mlp.fc1"),
    plain("transformer_blocks.*.ff_context.net.2", "double_blocks.*.txt_mlp.2").renamed("double_blocks.*.txt_mlp.fc2"),
    part("norm_out.linear", "final_layer.adaLN_modulation.1", Part::Swapped),
    plain("proj_out", "final_layer.linear"),
];
