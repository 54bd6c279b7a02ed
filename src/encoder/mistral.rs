//! Mistral3's text part, for FLUX.2 dev.

use super::causal::{Activation, Decoder, Rope, Shape};
use super::layers::heads_of;
use super::{Depth, Design, MOST_LAYERS, MOST_TOKENS, MOST_WIDTH, Network, Sizes};
use crate::published::Names;
use crate::settings::{above, choice, settings};

choice! {
    /// The text part of a Mistral3.
    pub enum TextModel {
        /// That of Mistral Small 3.
        "mistral" => Mistral,
    }
}

settings! {
    /// The fields of a Mistral3's text part, with the defaults of Mistral.
    pub struct Mistral {
        /// The text part.
        pub model_type: TextModel = TextModel::Mistral;
        /// Number of different tokens.
        pub vocab_size: i64 = 32_000, in 1..=MOST_TOKENS;
        /// Features of a state.
        pub hidden_size: i64 = 4096, in 1..=MOST_WIDTH;
        /// Features within the MLP.
        pub intermediate_size: i64 = 14_336, in 1..=MOST_WIDTH;
        /// Number of layers.
        pub num_hidden_layers: i64 = 32, in 1..=MOST_LAYERS;
        /// Heads of queries.
        pub num_attention_heads: i64 = 32, in 1..=MOST_WIDTH;
        /// Heads of keys and values.
        pub num_key_value_heads: i64 = 8, in 1..=MOST_WIDTH;
        /// Features of a head; unset: those of a state divided among the heads.
        pub head_dim: Option<i64> = None;
        /// The nonlinearity of the MLP.
        pub hidden_act: Activation = Activation::Silu;
        /// Added to mean squares.
        pub rms_norm_eps: f64 = 1e-6, in above(0.0);
        /// Base of the angles of places.
        pub rope_theta: f64 = 1e4, in above(0.0);
        /// The angles of places.
        pub rope_type: Rope = Rope::Default;
        /// Tokens that each token sees, itself included; unset: all before.
        pub sliding_window: Option<i64> = None;
    }
}

impl Mistral {
    fn shape(&self) -> Shape {
        let head_width = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads);
        Shape {
            vocabulary: self.vocab_size,
            width: self.hidden_size,
            hidden: self.intermediate_size,
            layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads,
            head_width,
            epsilon: self.rms_norm_eps,
            theta: self.rope_theta,
            window: self.sliding_window,
            has_input_biases: false,
            has_output_bias: false,
            norms_heads: false,
        }
    }
}

impl Design for Mistral {
    fn check(&self) -> Result<(), String> {
        match self.head_dim {
            None => {
                heads_of("hidden_size", self.hidden_size, self.num_attention_heads).map(drop)?
            }
            Some(width) => check_positive("head_dim", width, MOST_WIDTH)?,
        }
        if let Some(window) = self.sliding_window {
            check_positive("sliding_window", window, i64::MAX)?;
        }
        self.shape().check()
    }

    fn sizes(&self) -> Sizes {
        self.shape().sizes()
    }

    fn names(&self) -> Names {
        Names {
            prefixes: &["language_model.model.", "model.language_model.", "language_model.", ""],
            first: "embed_tokens.weight",
            others: &[],
            unused: &["vision_tower.", "multi_modal_projector.", "lm_head."],
        }
    }

    fn network(&self, depth: Depth) -> Box<dyn Network> {
        Box::new(Decoder::new(self.shape(), depth))
    }
}

fn check_positive(field: &str, value: i64, most: i64) -> Result<(), String> {
    match (1..=most).contains(&value) {
        true => Ok(()),
        false => Err(format!("{field}: {value} is out of range")),
    }
}
