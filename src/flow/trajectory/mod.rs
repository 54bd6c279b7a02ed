//! Generation: the trajectory from noise to data.
//!
//! | file | holds |
//! |---|---|
//! | `noise_levels.rs` | the levels at which a model is asked, and the timestep it is told at each |
//! | `guidance.rs` | the velocity at a level, of a conditional and an unconditional one |
//! | `solver.rs` | the step from a level to the next |
//! | `unipc.rs` | that of UniPC |

mod guidance;
mod noise_levels;
mod solver;
mod unipc;

pub use guidance::{Guidance, Guide};
pub use noise_levels::{NoiseLevel, NoiseLevels, Shift};
pub use solver::Solver;
