//! The fields of a `HunyuanVideo15Transformer3DModel`'s `config.json`, with the class's defaults.

use crate::settings::{Choice, Keys, Settings, above_up_to};

/// What a published checkpoint was made for; the architecture is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Task {
    TextToVideo,
    #[default]
    ImageToVideo,
}

impl Choice for Task {
    const ALL: &'static [(&'static str, Self)] =
        &[("t2v", Task::TextToVideo), ("i2v", Task::ImageToVideo)];
}

/// Normalization of queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// Root-mean-square, head by head.
    #[default]
    RmsNorm,
}

impl Choice for QkNorm {
    const ALL: &'static [(&'static str, Self)] = &[("rms_norm", QkNorm::RmsNorm)];
}

#[derive(Clone, Debug, PartialEq)]
pub struct HunyuanVideo15 {
    pub in_channels: i64,
    pub out_channels: i64,
    pub num_attention_heads: i64,
    pub attention_head_dim: i64,
    pub num_layers: i64,
    pub num_refiner_layers: i64,
    pub mlp_ratio: f64,
    pub patch_size: i64,
    pub patch_size_t: i64,
    pub qk_norm: QkNorm,
    pub text_embed_dim: i64,
    pub text_embed_2_dim: i64,
    pub image_embed_dim: i64,
    pub rope_theta: f64,
    pub rope_axes_dim: [i64; 3],
    pub target_size: i64,
    pub task_type: Task,
    pub use_meanflow: bool,
}

impl Default for HunyuanVideo15 {
    fn default() -> Self {
        HunyuanVideo15 {
            in_channels: 65,
            out_channels: 32,
            num_attention_heads: 16,
            attention_head_dim: 128,
            num_layers: 54,
            num_refiner_layers: 2,
            mlp_ratio: 4.0,
            patch_size: 1,
            patch_size_t: 1,
            qk_norm: QkNorm::default(),
            text_embed_dim: 3584,
            text_embed_2_dim: 1472,
            image_embed_dim: 1152,
            rope_theta: 256.0,
            rope_axes_dim: [16, 56, 56],
            target_size: 640,
            task_type: Task::default(),
            use_meanflow: false,
        }
    }
}

impl Settings for HunyuanVideo15 {
    fn visit(&mut self, keys: &mut Keys<'_>) {
        keys.integer(
            "in_channels",
            &mut self.in_channels,
            1..=65_536,
            "The latents' channels; with condition latents twice as many and one.",
        );
        keys.integer(
            "out_channels",
            &mut self.out_channels,
            0..=65_536,
            "The latents' channels; 0 is in_channels.",
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
            "Width of a head; the sum of rope_axes_dim.",
        );
        keys.integer(
            "num_layers",
            &mut self.num_layers,
            0..=256,
            "Blocks, each a stage of its own.",
        );
        keys.integer(
            "num_refiner_layers",
            &mut self.num_refiner_layers,
            0..=256,
            "Blocks of the token refiner, together one stage.",
        );
        keys.number(
            "mlp_ratio",
            &mut self.mlp_ratio,
            above_up_to(0.0, 64.0),
            "Hidden width of the feed-forward parts in model widths.",
        );
        keys.integer(
            "patch_size",
            &mut self.patch_size,
            1..=64,
            "Side of a patch; divides height and width.",
        );
        keys.integer(
            "patch_size_t",
            &mut self.patch_size_t,
            1..=64,
            "Frames of a patch; divides the latents' frames.",
        );
        keys.choice("qk_norm", &mut self.qk_norm, "Normalization of queries and keys.");
        keys.integer(
            "text_embed_dim",
            &mut self.text_embed_dim,
            1..=65_536,
            "Last axis of `text_embeddings`.",
        );
        keys.integer(
            "text_embed_2_dim",
            &mut self.text_embed_2_dim,
            1..=65_536,
            "Last axis of `text_embeddings_2`.",
        );
        keys.integer(
            "image_embed_dim",
            &mut self.image_embed_dim,
            1..=65_536,
            "Last axis of `image_embeds`.",
        );
        keys.number("rope_theta", &mut self.rope_theta, 1.0.., "Base of the rotary frequencies.");
        keys.integers(
            "rope_axes_dim",
            &mut self.rope_axes_dim,
            0..=65_536,
            "Features of a head turned by frame, row and column; even.",
        );
        keys.integer(
            "target_size",
            &mut self.target_size,
            1..,
            "Pixels that a checkpoint was made for; kept, no number depends on it.",
        );
        keys.choice(
            "task_type",
            &mut self.task_type,
            "Task that a checkpoint was made for; kept, no number depends on it.",
        );
        let doc = "Whether the parameters for a second timestep exist; kept, and as in the reference no training tells one.";
        keys.flag("use_meanflow", &mut self.use_meanflow, doc);
    }
}
