//! Models: from settings to a list of stages. Nothing here holds a tensor or knows a rank.

mod dit;

pub use dit::Dit;

use crate::error::Result;
use crate::nn::Stage;
use crate::registry::registry;

/// What every model family offers.
pub trait Architecture {
    /// The model as stages, in forward order.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error::Config) if the settings contradict each other.
    fn stages(&self) -> Result<Vec<Box<dyn Stage>>>;

    /// Refuses data that the model cannot take, before a shape mistake deep inside of it would.
    ///
    /// # Shapes
    /// Of one sample: `latents` `[C, (F,) H, W]`; `text` `[L, D]`, if the data have any.
    /// # Errors
    /// [`Error::Config`](crate::error::Error::Config) naming the setting and what the data have.
    fn check_data(&self, latents: &[i64], text: Option<&[i64]>) -> Result<()>;
}

registry! {
    /// `[model.<name>]`: one file, one line a family.
    pub enum Model: Architecture {
        "dit" => Dit(Dit),
    }
}
