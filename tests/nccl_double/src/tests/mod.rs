//! The double's own contract: a sound program passes at every number of ranks, and every rule shows
//! that it fires.

mod broken;
mod failing;
mod kernels;
mod programs;
mod rank;
mod sound;
mod switched;
