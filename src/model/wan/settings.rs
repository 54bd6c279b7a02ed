//! The fields of a `WanTransformer3DModel`'s `config.json`, with the class's defaults.

use crate::ops::Patch;
use crate::settings::{Choice, Keys, Settings};

/// Normalization of queries and keys; the class has no other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    #[default]
    RmsNormAcrossHeads,
}

impl Choice for QkNorm {
    const ALL: &'static [(&'static str, Self)] =
        &[("rms_norm_across_heads", QkNorm::RmsNormAcrossHeads)];
}

#[derive(Clone, Debug, PartialEq)]
pub struct Wan {
    pub patch_size: Patch,
    pub num_attention_heads: i64,
    pub attention_head_dim: i64,
    pub in_channels: i64,
    pub out_channels: i64,
    pub text_dim: i64,
    pub freq_dim: i64,
    pub ffn_dim: i64,
    pub num_layers: i64,
    pub cross_attn_norm: bool,
    pub qk_norm: QkNorm,
    pub eps: f64,
    pub image_dim: Option<i64>,
    pub added_kv_proj_dim: Option<i64>,
    pub rope_max_seq_len: i64,
    pub pos_embed_seq_len: Option<i64>,
}

impl Default for Wan {
    fn default() -> Self {
        Wan {
            patch_size: [1, 2, 2],
            num_attention_heads: 40,
            attention_head_dim: 128,
            in_channels: 16,
            out_channels: 16,
            text_dim: 4096,
            freq_dim: 256,
            ffn_dim: 13_824,
            num_layers: 40,
            cross_attn_norm: true,
            qk_norm: QkNorm::default(),
            eps: 1e-6,
            image_dim: None,
            added_kv_proj_dim: None,
            rope_max_seq_len: 1024,
            pos_embed_seq_len: None,
        }
    }
}

impl Settings for Wan {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.integers(
            "patch_size",
            &mut self.patch_size,
            1..=64,
            "Frames, rows and columns of the latents that become one token.",
        );
        keys.integer(
            "num_attention_heads",
            &mut self.num_attention_heads,
            1..=1024,
            "Attention heads; times their width it is the model's.",
        );
        keys.integer(
            "attention_head_dim",
            &mut self.attention_head_dim,
            2..=65_536,
            "Width of a head; even.",
        );
        keys.integer(
            "in_channels",
            &mut self.in_channels,
            1..=65_536,
            "Channels of the latents and of the condition behind them, if any.",
        );
        keys.integer(
            "out_channels",
            &mut self.out_channels,
            0..=65_536,
            "Channels of the latents; 0 is in_channels.",
        );
        keys.integer("text_dim", &mut self.text_dim, 1..=65_536, "Last axis of `text_embeddings`.");
        keys.integer(
            "freq_dim",
            &mut self.freq_dim,
            2..=65_536,
            "Width of the timestep's sinusoidal embedding; even.",
        );
        keys.integer(
            "ffn_dim",
            &mut self.ffn_dim,
            1..=65_536,
            "Hidden width of the feed-forward part.",
        );
        keys.integer(
            "num_layers",
            &mut self.num_layers,
            0..=256,
            "Blocks, each a stage of its own.",
        );
        keys.flag(
            "cross_attn_norm",
            &mut self.cross_attn_norm,
            "Whether tokens are normalized before they attend to the conditions.",
        );
        keys.choice("qk_norm", &mut self.qk_norm, "Normalization of queries and keys.");
        keys.number(
            "eps",
            &mut self.eps,
            0.0..1.0,
            "Epsilon of the blocks' and the head's normalizations.",
        );
        keys.optional_integer(
            "image_dim",
            &mut self.image_dim,
            1..=65_536,
            "Last axis of `image_embeds`, where the model attends to images.",
        );
        let doc =
            "Inputs of the keys and values of images: the model's width; with image_dim only.";
        keys.optional_integer("added_kv_proj_dim", &mut self.added_kv_proj_dim, 1..=65_536, doc);
        keys.integer(
            "rope_max_seq_len",
            &mut self.rope_max_seq_len,
            1..=1 << 20,
            "Tokens that each axis of the latents has at most.",
        );
        let doc = "Tokens of a sample's images, first and last, where their places are learned; with image_dim only.";
        keys.optional_integer("pos_embed_seq_len", &mut self.pos_embed_seq_len, 1..=1 << 20, doc);
    }
}
