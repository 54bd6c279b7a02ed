//! One file a promise; a new promise is a new file in the folder of its tier and a line here.
//!
//! A test's tier is the first word of its path, so that `cargo test --test tests fast::` runs one
//! tier. `cargo test --lib` is quicker than all of them: the unit tests in src/, 795 in 6 s.
//!
//! | tier | tests | needs beside `launch/setup.sh` | seconds |
//! |---|---|---|---|
//! | `fast::` starts no process | 193 | | 16 |
//! | `program::` starts the program | 81 | | 32 |
//! | `threads::` trains; ranks are threads | 116 | | 65 |
//! | `mpi::` ranks are processes | 68 | | 260 |
//! | `faults::` runs break on order | 88 | root, or user namespaces | 340 |
//! | `oracle::` beside PyTorch and diffusers | 74 | `launch/setup.sh --oracle` | 270 |
//! | `cuda::` ignored without `launch/test-gpu.sh` | 41 | a GPU | |
//!
//! Seconds are those of 2 cores after the build; `mpi`, `faults` and `oracle` had to share them
//! with other programs.

#![allow(clippy::unwrap_used)]

/// What starts no process.
mod fast {
    /// Archives as `torch.save` writes them.
    #[path = "../fuzz/archive.rs"]
    mod archive;
    /// Every tensor of the published autoencoders finds its place, and what does not fit is told.
    mod autoencoders;
    /// A world of one and worlds of threads keep the contract of the collectives, and a rank that
    /// fails ends its world.
    mod collectives;
    /// Every file in configs/ is valid, and published models have diffusers' number of parameters.
    mod configs;
    /// So does every tensor of the published encoders.
    mod encoders;
    /// Rooms use lower floors only, some words stand in one file only, and random numbers are drawn
    /// where they are seeded.
    mod floors;
    /// Stage-wise backward equals plain autograd, bit for bit.
    mod gradients;
    /// Each lie in the header of a safetensors file is refused, quickly.
    pub mod hostile;
    /// Caches of other trainers that lie are refused before anything is written.
    mod hostile_caches;
    /// So is each lie in data, in what is no file of data, and in a dataset.
    mod hostile_data;
    /// What `torch.save` wrote is parsed and never run.
    mod hostile_pickles;
    /// Files of LoRAs have the names of the programs that load them; what is no LoRA of a known
    /// model is refused.
    mod lora_files;
    /// Pages say what is: their links lead somewhere, and what they list is what the code has.
    mod pages;
    /// Every model with every adapter trains or is refused with a hint that works, and so do the
    /// edges of a model's settings.
    mod pairs;
    /// Flow matching does what it says, also where it goes beyond the reference.
    mod science;
    /// What SECURITY.md promises is tested.
    mod security;
    /// Tokens that no sample sees are cut, a mask is left only where samples see different ones,
    /// and neither changes a number.
    mod seen_tokens;
    /// Ranks meet over TCP without a launcher's help, and strangers, absent and dying ranks are
    /// noticed.
    pub mod tcp;
    /// Texts of unequal length are padded as configured, and `check` tells who attends to it.
    mod unequal_texts;
}

/// Whole training runs, whose ranks are threads of this process.
mod threads {
    /// Averages of the weights follow every update, alike on any ranks and after a resume.
    pub mod averages;
    /// The number of ranks, the cut into micro-batches and recomputation do not change a run.
    pub mod equivalence;
    /// Factors of learning rate and decay train alike on any ranks, and change what they name.
    mod factors;
    /// What is frozen is held in fewer bits, or in host memory, and everything else holds.
    mod frozen;
    /// Known loss curves, as text.
    mod golden;
    /// What is frozen stays, what is trained beside it trains alike on any ranks, and a run goes on
    /// with it exactly.
    mod lora;
    /// A loss under masks is that of one big batch, whatever the split; a sample is trained on its
    /// own conditions and task.
    mod masks;
    /// Several datasets in one run, small groups, and micro-batches by tokens.
    mod mixed;
    /// A bfloat16 step at real head widths is the float32 step within rounding.
    pub mod real_heads;
    /// A resumed run is the unbroken run.
    pub mod resume;
    /// Samples of prompts are the same pictures however a run is made.
    pub mod samples;
    /// Who holds what changes no number.
    pub mod sharding;
    /// Runs are counted in epochs, change their global batch, and branch.
    mod starts;
    /// Each rank cuts its own texts, and the bits do not depend on the number of ranks.
    mod text_lengths;
    /// Every family trains, on ranks that stay equal, and resumes exactly.
    pub mod training;
    /// A validation has one number, and the best checkpoint by it stays.
    pub mod validation;
}

/// The program as a user starts it, alone or under `mpirun`.
mod program {
    /// A backend of attention that crashes, hangs or computes wrongly is left out, and what was
    /// found is kept for the next start.
    pub mod attention;
    /// Messages and exit codes, as a user meets them.
    mod cli;
    /// Datasets are made, described and joined without a line of Python.
    mod data;
    /// Nothing is computed in vain: what would end a command is said at its start.
    mod early;
    /// What the program prints is the documented listing of all settings.
    mod listing;
    /// A LoRA is converted between the formats that people load.
    mod lora;
    /// Single passes and libtorch's operators train alike, and a run's log tells which it took.
    mod operations;
    /// Runs are planned without being started, and steps predicted on clusters.
    mod plans;
    /// A run that was killed goes on as the unbroken run.
    mod resume;
    /// Pictures by prompts, from a run and while it trains.
    mod samples;
    /// The scripts for GPUs are held true where there is none.
    mod scripts;
    /// A validation is planned, told and drawn; a kill amid it costs nothing.
    mod validation;
}

/// Worlds whose ranks are processes.
mod mpi {
    /// Ranks that find different backends of attention sound choose alike.
    pub mod attention;
    /// Averages of the weights survive a kill, and go on at another number of ranks.
    mod averages;
    /// Real MPI keeps the contract of the collectives, and a rank that fails ends its world.
    pub mod collectives;
    /// Frozen parameters in host memory come to a GPU beside computation.
    pub mod copies;
    /// Ranks make the dataset that one rank makes, also after a kill.
    mod datasets;
    /// Ranks encode the dataset that one rank encodes, also after a kill.
    mod encoding;
    /// Our own GPU kernels compile, have the bits of a CPU, and are refused where they compute
    /// anything else.
    pub mod kernels;
    /// Ranks take the memory that `fm-dist check` says.
    mod memory;
    /// NCCL keeps the contract of the collectives; the real library answers.
    pub mod nccl;
    /// Worlds of NCCL that fail give up in time.
    pub mod nccl_failures;
    /// The kernels of operations compute what libtorch's operators compute, with the bits of a CPU
    /// where sums have one order.
    pub mod operations;
    /// Programs under `mpirun` shard as threads do.
    mod sharding;
    /// Processes keep the contract over TCP and end together.
    pub mod tcp;
}

/// Every way in which a run can break ends as it must; what was committed is never lost.
mod faults;

/// The numbers of the real packages in Python.
mod oracle {
    /// Autoencoders compute what diffusers' classes of them compute, whole and in tiles.
    mod autoencoders;
    /// Averages of the weights are those of diffusers' EMAModel.
    mod averages;
    /// Caches of other trainers are imported with the bits that their own readers give.
    mod caches;
    /// Encoders compute what transformers' classes of them compute.
    mod encoders;
    /// Prompts and pixels are encoded as diffusers' pipelines do, and go the whole way to samples.
    mod encodings;
    /// TensorBoard reads the numbers, the configuration and the samples of a run.
    mod event_files;
    /// A run becomes a diffusers folder and a diffusers folder a run.
    mod exported;
    /// Each model family computes what diffusers' class of it computes.
    pub mod families;
    /// A LoRA computes, and has the gradients, that PEFT's on diffusers' models has.
    mod lora;
    /// LoRAs are read as PEFT and diffusers write them, and written as they load them.
    mod lora_files;
    /// AdamW and the clipping of gradients are PyTorch's.
    mod optimizer;
    /// The oracle's Python, and how close is close. Nothing is promised there.
    pub mod packages;
    /// Factors of learning rate and weight decay are PyTorch's parameter groups.
    mod param_groups;
    /// The real NeMo AutoModel and PyTorch compute the same numbers.
    mod parity;
    /// The command that the refusal of a pickle prints converts it.
    mod pickles;
    /// Pictures are Pillow's, buckets NeMo AutoModel's, and frames those that NumPy chooses.
    mod pictures;
    /// Prompts become pictures by whole pipelines as published.
    mod prompts;
    /// Learning rates, shifts, weights and losses are those of diffusers, transformers and PyTorch.
    mod rules;
    /// Samples are those of diffusers' pipelines, and their conditions are read strictly.
    mod sampling;
    /// Token ids are those of transformers, and the texts of prompts those of diffusers' pipelines.
    mod token_ids;
    /// The losses of a validation are NeMo AutoModel's.
    mod validation;
}

/// What only a GPU can show; `launch/test-gpu.sh` runs it.
mod cuda;

// What several of these share. Nothing is promised there.

/// Processor time, to measure by.
#[path = "fuzz/clock.rs"]
mod clock;
/// The contract of the collectives, which every backend is put through.
mod contract;
/// The double of NCCL and of the CUDA driver.
mod double;
/// Programs that tests start as processes of their own.
mod programs;
/// Small training runs.
mod runs;
/// Worlds of processes.
mod worlds;
