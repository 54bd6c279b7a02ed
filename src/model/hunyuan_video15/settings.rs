//! The fields of a `HunyuanVideo15Transformer3DModel`'s `config.json`, with the class's defaults.

use crate::settings::{above_up_to, choice, settings};

choice! {
    /// The task that a published checkpoint was made for; the architecture is one.
    pub enum Task {
        /// Text to video.
        "t2v" => TextToVideo,
        /// Image to video.
        "i2v" => ImageToVideo,
    }
}

choice! {
    /// Normalization of queries and keys.
    pub enum QkNorm {
        /// Root-mean-square, head by head.
        "rms_norm" => RmsNorm,
    }
}

settings! {
    /// `[model.hunyuan_video15]`.
    pub struct HunyuanVideo15 {
        /// The latents' channels; with condition latents twice as many and one.
        pub in_channels: i64 = 65, in 1..=65_536;
        /// The latents' channels; 0 is in_channels.
        pub out_channels: i64 = 32, in 0..=65_536;
        /// Attention heads; times their width it is the model's.
        pub num_attention_heads: i64 = 16, in 1..=1024;
        /// Width of a head; the sum of rope_axes_dim.
        pub attention_head_dim: i64 = 128, in 2..=65_536;
        /// Blocks, each a stage of its own.
        pub num_layers: i64 = 54, in 0..=256;
        /// Blocks of the token refiner, together one stage.
        pub num_refiner_layers: i64 = 2, in 0..=256;
        /// Hidden width of the feed-forward parts in model widths.
        pub mlp_ratio: f64 = 4.0, in above_up_to(0.0, 64.0);
        /// Side of a patch; divides height and width.
        pub patch_size: i64 = 1, in 1..=64;
        /// Frames of a patch; divides the latents' frames.
        pub patch_size_t: i64 = 1, in 1..=64;
        /// Normalization of queries and keys.
        pub qk_norm: QkNorm = QkNorm::RmsNorm;
        /// Last axis of `text_embeddings`.
        pub text_embed_dim: i64 = 3584, in 1..=65_536;
        /// Last axis of `text_embeddings_2`.
        pub text_embed_2_dim: i64 = 1472, in 1..=65_536;
        /// Last axis of `image_embeds`.
        pub image_embed_dim: i64 = 1152, in 1..=65_536;
        /// Base of the rotary frequencies.
        pub rope_theta: f64 = 256.0, in 1.0..;
        /// Features of a head turned by frame, row and column; even.
        pub rope_axes_dim: [i64; 3] = [16, 56, 56], in 0..=65_536;
        /// Pixels that a checkpoint was made for; kept, no number depends on it.
        pub target_size: i64 = 640, in 1..;
        /// Task that a checkpoint was made for; kept, no number depends on it.
        pub task_type: Task = Task::ImageToVideo;
        /// Whether the parameters for a second timestep exist; kept, and as in the reference no
        /// training tells one.
        pub use_meanflow: bool = false;
    }
}
