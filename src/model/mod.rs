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
}

registry! {
    /// `[model.<name>]`: one file, one line a family.
    pub enum Model: Architecture {
        "dit" => Dit(Dit),
    }
}
