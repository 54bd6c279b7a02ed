//! Qwen2.5-VL's text part, for Qwen-Image and HunyuanVideo 1.5, and Qwen3, for FLUX.2 klein.

use super::causal::{Activation, Decoder, Rope, Shape};
use super::layers::heads_of;
use super::{Depth, Design, MOST_LAYERS, MOST_TOKENS, MOST_WIDTH, Network, Sizes};
use crate::published::Names;
use crate::settings::{above, settings};

settings! {
    /// The fields of a Qwen2.5-VL's text part, with the class's defaults.
    pub struct Qwen25Vl {
        /// Number of different tokens.
        pub vocab_size: i64 = 152_064, in 1..=MOST_TOKENS;
        /// Features of a state.
        pub hidden_size: i64 = 8192, in 1..=MOST_WIDTH;
        /// Features within the MLP.
        pub intermediate_size: i64 = 29_568, in 1..=MOST_WIDTH;
        /// Number of layers.
        pub num_hidden_layers: i64 = 80, in 1..=MOST_LAYERS;
        /// Heads of queries.
        pub num_attention_heads: i64 = 64, in 1..=MOST_WIDTH;
        /// Heads of keys and values.
        pub num_key_value_heads: i64 = 8, in 1..=MOST_WIDTH;
        /// The nonlinearity of the MLP.
        pub hidden_act: Activation = Activation::Silu;
        /// Added to mean squares.
        pub rms_norm_eps: f64 = 1e-5, in above(0.0);
        /// Base of the angles of places.
        pub rope_theta: f64 = 1e6, in above(0.0);
        /// The angles of places.
        pub rope_type: Rope = Rope::Default;
        /// True if tokens see a window of those before; not supported.
        pub use_sliding_window: bool = false;
    }
}

impl Qwen25Vl {
    fn shape(&self) -> Shape {
        Shape {
            vocabulary: self.vocab_size,
            width: self.hidden_size,
            hidden: self.intermediate_size,
            layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads,
            head_width: self.hidden_size / self.num_attention_heads,
            epsilon: self.rms_norm_eps,
            theta: self.rope_theta,
            window: None,
            has_input_biases: true,
            has_output_bias: false,
            norms_heads: false,
        }
    }
}

impl Design for Qwen25Vl {
    fn check(&self) -> Result<(), String> {
        check_window(self.use_sliding_window)?;
        heads_of("hidden_size", self.hidden_size, self.num_attention_heads)?;
        self.shape().check()
    }

    fn sizes(&self) -> Sizes {
        self.shape().sizes()
    }

    fn names(&self) -> Names {
        Names {
            prefixes: &["model.language_model.", "language_model.", "model.", ""],
            first: "embed_tokens.weight",
            others: &[],
            unused: &["visual.", "lm_head."],
        }
    }

    fn network(&self, depth: Depth) -> Box<dyn Network> {
        Box::new(Decoder::new(self.shape(), depth))
    }
}

settings! {
    /// The fields of a Qwen3ForCausalLM's `config.json`, with the class's defaults.
    pub struct Qwen3 {
        /// Number of different tokens.
        pub vocab_size: i64 = 151_936, in 1..=MOST_TOKENS;
        /// Features of a state.
        pub hidden_size: i64 = 4096, in 1..=MOST_WIDTH;
        /// Features within the MLP.
        pub intermediate_size: i64 = 22_016, in 1..=MOST_WIDTH;
        /// Number of layers.
        pub num_hidden_layers: i64 = 32, in 1..=MOST_LAYERS;
        /// Heads of queries.
        pub num_attention_heads: i64 = 32, in 1..=MOST_WIDTH;
        /// Heads of keys and values.
        pub num_key_value_heads: i64 = 32, in 1..=MOST_WIDTH;
        /// Features of a head.
        pub head_dim: i64 = 128, in 1..=MOST_WIDTH;
        /// The nonlinearity of the MLP.
        pub hidden_act: Activation = Activation::Silu;
        /// Added to mean squares.
        pub rms_norm_eps: f64 = 1e-6, in above(0.0);
        /// Base of the angles of places.
        pub rope_theta: f64 = 1e4, in above(0.0);
        /// The angles of places.
        pub rope_type: Rope = Rope::Default;
        /// True if the maps of attention have biases.
        pub attention_bias: bool = false;
        /// True if tokens see a window of those before; not supported.
        pub use_sliding_window: bool = false;
    }
}

impl Qwen3 {
    fn shape(&self) -> Shape {
        Shape {
            vocabulary: self.vocab_size,
            width: self.hidden_size,
            hidden: self.intermediate_size,
            layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads,
            head_width: self.head_dim,
            epsilon: self.rms_norm_eps,
            theta: self.rope_theta,
            window: None,
            has_input_biases: self.attention_bias,
            has_output_bias: self.attention_bias,
            norms_heads: true,
        }
    }
}

impl Design for Qwen3 {
    fn check(&self) -> Result<(), String> {
        check_window(self.use_sliding_window)?;
        self.shape().check()
    }

    fn sizes(&self) -> Sizes {
        self.shape().sizes()
    }

    fn names(&self) -> Names {
        Names {
            prefixes: &["model.", ""],
            first: "embed_tokens.weight",
            others: &[],
            unused: &["lm_head."],
        }
    }

    fn network(&self, depth: Depth) -> Box<dyn Network> {
        Box::new(Decoder::new(self.shape(), depth))
    }
}

fn check_window(is_used: bool) -> Result<(), String> {
    if is_used { Err("use_sliding_window: only false is supported".into()) } else { Ok(()) }
}
