//! One file a promise; a new promise is a new file and a line here.

/// Every backend of the collectives keeps one contract, and a rank that fails ends its world.
mod collectives;
/// Rooms use lower floors only.
mod floors;
/// Stage-wise backward equals plain autograd, bit for bit.
mod gradients;
