//! fm-dist: flow-matching training of diffusion transformers on many GPUs.
//!
//! A model is a list of stages; a small set of named tensors crosses each stage boundary. The
//! machinery runs the stages forward, cuts the graph at every boundary, then runs backward stage by
//! stage. Each finished stage passes its gradient to a reducer, whose collective is under way while
//! the previous stage computes. The science never sees a rank, the machinery never sees a timestep;
//! they meet in [`train`].
//!
//! # Floors
//! A room (a module of this list) uses its own files and rooms on lower floors, nothing else;
//! `tests/fast/floors.rs` enforces it.
//!
//! | floor | rooms |
//! |---|---|
//! | 9 | [`cli`]: the command line |
//! | 8 | [`train`]: the training loop · [`commands`]: the commands that do not train |
//! | 7 | [`plan`]: memory and time that a run would need |
//! | 6 | [`sample`]: generation, from noise to data |
//! | 5 | [`assembly`]: builds model, optimizer and pipeline from the configuration |
//! | 4 | [`run`]: the run folder and its checkpoints |
//! | 3 | [`config`]: the configuration, one field for each room · [`datasets`]: makes and describes datasets |
//! | 2, science | [`adapter`] above [`flow`], [`tuning`] above [`model`] · [`encoding`] above [`autoencoder`], [`encoder`] · [`optim`] |
//! | 2, machinery | [`parallel`] · [`watchdog`] |
//! | 1 | [`published`] · [`report`] · [`attention`] above [`collective`] · [`data`] · [`lora`] · [`media`] · [`nn`] above [`ops`] · [`telemetry`] · [`tokenizer`] |
//! | 0, each above those after it | [`files`] · [`failure`] · [`fault`], `registry` · [`cuda`], [`pulse`], [`settings`] · [`error`], [`folders`], [`libtorch`], `median`, [`phase`], [`rng`], [`tensor`] |
//!
//! # Letters in shapes
//! `B` batch · `C` latent channels · `F` frames · `H`, `W` latent height and width · `L` tokens ·
//! `D` model width · `N` heads · `E` head width · `P` flat elements.
//!
//! # Words
//! *The reference* is NVIDIA NeMo AutoModel 0.5.0, `components/flow_matching`. Given the same
//! draws, fm-dist reproduces its numbers.
//!
//! # Time
//! sigma = 0 is data, sigma = 1 is noise; x = (1 − sigma)·latents + sigma·noise; the model predicts
//! noise − latents.

pub mod adapter;
pub mod assembly;
pub mod attention;
pub mod autoencoder;
pub mod cli;
pub mod collective;
pub mod commands;
pub mod config;
pub mod cuda;
pub mod data;
pub mod datasets;
pub mod encoder;
pub mod encoding;
pub mod error;
pub mod failure;
pub mod fault;
pub mod files;
pub mod flow;
pub mod folders;
pub mod libtorch;
pub mod lora;
pub mod media;
mod median;
pub mod model;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod parallel;
pub mod phase;
pub mod plan;
pub mod published;
pub mod pulse;
mod registry;
pub mod report;
pub mod rng;
pub mod run;
pub mod sample;
pub mod settings;
pub mod telemetry;
pub mod tensor;
pub mod tokenizer;
pub mod train;
pub mod tuning;
pub mod watchdog;
