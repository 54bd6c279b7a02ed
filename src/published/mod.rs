//! Folders of classes as diffusers and transformers publish them: `config.json` as the settings of
//! a class, and its weights by name and kind. What is loaded here is computed with, never trained.
//!
//! | module | holds |
//! |---|---|
//! | `config` | `config.json`: read within limits, its fields as settings |
//! | `names` | the names under which files hold a class's tensors |
//! | `weights` | the weights in safetensors: checked as a whole, loaded one tensor at a time |

mod config;
mod names;
mod weights;

pub use config::{Config, Part};
pub use names::Names;
pub use weights::Weights;
