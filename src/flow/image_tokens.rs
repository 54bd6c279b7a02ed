//! The number of tokens that a model makes of a sample's latents, on which its shift may depend.

use std::fmt;
use std::sync::Arc;

type Count = dyn Fn(&[i64]) -> i64 + Send + Sync;

/// Counts a sample's image tokens.
#[derive(Clone)]
pub struct ImageTokens(Arc<Count>);

impl ImageTokens {
    /// `count` maps the shape of a sample's latents, `[C, (F,) H, W]`, to its number of tokens.
    pub fn new(count: impl Fn(&[i64]) -> i64 + Send + Sync + 'static) -> Self {
        ImageTokens(Arc::new(count))
    }

    /// Returns the number of tokens of latents `[C, (F,) H, W]`.
    pub fn count(&self, latents: &[i64]) -> i64 {
        self.0(latents)
    }
}

/// One token for each position of the latents: a model without patches.
impl Default for ImageTokens {
    fn default() -> Self {
        ImageTokens::new(|latents| latents[1..].iter().product())
    }
}

impl fmt::Debug for ImageTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ImageTokens")
    }
}
