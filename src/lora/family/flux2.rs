//! FLUX.2. Source: black-forest-labs/flux2, `model.py`; musubi-tuner has the same names.

use super::{Linear, Names, Part, Published, QKV, part, plain, slice};

pub const NAMES: Names = Names {
    title: "FLUX.2",
    architecture: "Flux.2",
    version: "flux_2",
    network: "networks.lora_flux_2",
    published: &[
        Published { width: 6144, double: 8, single: 48 },
        Published { width: 4096, double: 8, single: 24 },
        Published { width: 3072, double: 5, single: 20 },
    ],
    linears: LINEARS,
};

#[rustfmt::skip]
const LINEARS: &[Linear] = &[
    plain("x_embedder", "img_in"),
    plain("context_embedder", "txt_in"),
    plain("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    plain("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    plain("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    plain("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    plain("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
    plain("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
    plain("single_stream_modulation.linear", "single_stream_modulation.lin"),
    slice("transformer_blocks.*.attn.to_q", "double_blocks.*.img_attn.qkv", QKV, 0),
    slice("transformer_blocks.*.attn.to_k", "double_blocks.*.img_attn.qkv", QKV, 1),
    slice("transformer_blocks.*.attn.to_v", "double_blocks.*.img_attn.qkv", QKV, 2),
    plain("transformer_blocks.*.attn.to_out.0", "double_blocks.*.img_attn.proj"),
    plain("transformer_blocks.*.ff.linear_in", "double_blocks.*.img_mlp.0"),
    plain("transformer_blocks.*.ff.linear_out", "double_blocks.*.img_mlp.2"),
    slice("transformer_blocks.*.attn.add_q_proj", "double_blocks.*.txt_attn.qkv", QKV, 0),
    slice("transformer_blocks.*.attn.add_k_proj", "double_blocks.*.txt_attn.qkv", QKV, 1),
    slice("transformer_blocks.*.attn.add_v_proj", "double_blocks.*.txt_attn.qkv", QKV, 2),
    plain("transformer_blocks.*.attn.to_add_out", "double_blocks.*.txt_attn.proj"),
    plain("transformer_blocks.*.ff_context.linear_in", "double_blocks.*.txt_mlp.0"),
    plain("transformer_blocks.*.ff_context.linear_out", "double_blocks.*.txt_mlp.2"),
    plain("single_transformer_blocks.*.attn.to_qkv_mlp_proj", "single_blocks.*.linear1"),
    plain("single_transformer_blocks.*.attn.to_out", "single_blocks.*.linear2"),
    part("norm_out.linear", "final_layer.adaLN_modulation.1", Part::Swapped),
    plain("proj_out", "final_layer.linear"),
];
