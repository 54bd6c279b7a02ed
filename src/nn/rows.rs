//! The rows that a sample sends through matrices and attention.

/// The rows that one sample sends through a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One row: timesteps, guidance, pooled conditions, modulation.
    One,
    /// One row for each token of the latents.
    Image,
    /// One row for each token of the conditions; those of conditioning images count as text.
    Text,
    /// One row for each token of both.
    Joint,
}

/// Number of tokens of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    pub image: i64,
    pub text: i64,
}

impl Tokens {
    /// Returns the number of rows that one sample sends through a matrix.
    pub fn rows(self, rows: Rows) -> i64 {
        match rows {
            Rows::One => 1,
            Rows::Image => self.image,
            Rows::Text => self.text,
            Rows::Joint => self.image + self.text,
        }
    }
}

/// One attention of a stage, as estimates of work and memory and the choice of a backend need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionInfo {
    pub queries: Rows,
    pub keys: Rows,
    pub num_heads: i64,
    pub head_width: i64,
    /// True if keys are masked where the adapter reads masks of tokens.
    pub takes_mask: bool,
}

impl AttentionInfo {
    /// Width of all heads together.
    pub fn width(&self) -> i64 {
        self.num_heads * self.head_width
    }
}
