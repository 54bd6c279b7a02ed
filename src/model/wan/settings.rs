//! The fields of a `WanTransformer3DModel`'s `config.json`, with the class's defaults.

use crate::ops::Patch;
use crate::settings::{choice, settings};

choice! {
    /// Normalization of queries and keys; the class has no other.
    pub enum QkNorm {
        /// Root-mean-square, over all heads at once.
        "rms_norm_across_heads" => RmsNormAcrossHeads,
    }
}

settings! {
    /// `[model.wan]`.
    pub struct Wan {
        /// Frames, rows and columns of the latents that become one token.
        pub patch_size: Patch = [1, 2, 2], in 1..=64;
        /// Attention heads; times their width it is the model's.
        pub num_attention_heads: i64 = 40, in 1..=1024;
        /// Width of a head; even.
        pub attention_head_dim: i64 = 128, in 2..=65_536;
        /// Channels of the latents and of the condition behind them, if any.
        pub in_channels: i64 = 16, in 1..=65_536;
        /// Channels of the latents; 0 is in_channels.
        pub out_channels: i64 = 16, in 0..=65_536;
        /// Last axis of `text_embeddings`.
        pub text_dim: i64 = 4096, in 1..=65_536;
        /// Width of the timestep's sinusoidal embedding; even.
        pub freq_dim: i64 = 256, in 2..=65_536;
        /// Hidden width of the feed-forward part.
        pub ffn_dim: i64 = 13_824, in 1..=65_536;
        /// Blocks, each a stage of its own.
        pub num_layers: i64 = 40, in 0..=256;
        /// Whether tokens are normalized before they attend to the conditions.
        pub cross_attn_norm: bool = true;
        /// Normalization of queries and keys.
        pub qk_norm: QkNorm = QkNorm::RmsNormAcrossHeads;
        /// Epsilon of the blocks' and the head's normalizations.
        pub eps: f64 = 1e-6, in 0.0..1.0;
        /// Last axis of `image_embeds`, where the model attends to images.
        pub image_dim: Option<i64> = None, in 1..=65_536;
        /// Inputs of the keys and values of images: the model's width; with image_dim only.
        pub added_kv_proj_dim: Option<i64> = None, in 1..=65_536;
        /// Tokens that each axis of the latents has at most.
        pub rope_max_seq_len: i64 = 1024, in 1..=1 << 20;
        /// Tokens of a sample's images, first and last, where their places are learned; with
        /// image_dim only.
        pub pos_embed_seq_len: Option<i64> = None, in 1..=1 << 20;
    }
}
