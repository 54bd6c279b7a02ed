//! One file a promise; a new promise is a new file and a line here.

#![allow(clippy::unwrap_used)]

/// Every backend of the collectives keeps one contract, and a rank that fails ends its world.
mod collectives;
/// Rooms use lower floors only, and some words stand in one file only.
mod floors;
/// Stage-wise backward equals plain autograd, bit for bit.
mod gradients;
/// Each lie in the header of a safetensors file is refused, quickly.
mod hostile;
