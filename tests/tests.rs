//! One file a promise; a new promise is a new file and a line here.

#![allow(clippy::unwrap_used)]

/// Messages and exit codes, as a user meets them.
mod cli;
/// What several of these measure by: processor time. Nothing is promised there.
#[path = "fuzz/clock.rs"]
mod clock;
/// Every backend of the collectives keeps one contract, and a rank that fails ends its world.
mod collectives;
/// Every file in configs/ is valid, and what the program prints is the documented listing.
mod configs;
/// What only a GPU can show; `launch/test-gpu.sh` runs it.
mod cuda;
/// Nothing is computed in vain: what would end a command is said at its start.
mod early;
/// Pictures that `configs/encode_flux1.py` encodes are a dataset that trains.
mod encoded;
/// The number of ranks, the cut into micro-batches and recomputation do not change a run.
mod equivalence;
/// A run becomes a diffusers folder and a diffusers folder a run.
mod exported;
/// Each model family computes what diffusers' class of it computes.
mod families;
/// Every way in which a run can break ends as it must.
mod faults;
/// Rooms use lower floors only, and some words stand in one file only.
mod floors;
/// Known loss curves, as text.
mod golden;
/// Stage-wise backward equals plain autograd, bit for bit.
mod gradients;
/// Each lie in the header of a safetensors file is refused, quickly.
mod hostile;
/// Our own GPU kernels compile, have the bits of a CPU, and are refused where they compute anything
/// else.
mod kernels;
/// A loss under masks is that of one big batch, whatever the split; a sample is trained on its own
/// conditions and task.
mod masks;
/// Ranks take the memory that `fm-dist check` says.
mod memory;
/// NCCL keeps the contract of the collectives and gives up in time; the real library answers.
mod nccl;
/// Single passes and libtorch's operators train alike, and a run's log tells which it took.
mod operations;
/// What parity tests share: the real packages as oracle, and how close is close. Nothing is
/// promised there.
mod oracle;
/// Pages say what is: their links lead somewhere, and what they list is what the code has.
mod pages;
/// Every model with every adapter trains or is refused with a hint that works, and so do the edges
/// of a model's settings.
mod pairs;
/// The real NeMo AutoModel and PyTorch compute the same numbers.
mod parity;
/// A resumed run is the unbroken run.
mod resume;
/// What several of these share: small training runs. Nothing is promised there.
mod runs;
/// Samples are those of diffusers' pipelines, and their conditions are read strictly.
mod sampling;
/// Flow matching does what it says, also where it goes beyond the reference.
mod science;
/// What SECURITY.md promises is tested.
mod security;
/// Who holds what changes no number.
mod sharding;
/// What was committed is never lost, whatever the disk does.
mod storage;
/// Ranks meet over TCP without a launcher's help, and strangers, absent and dying ranks are
/// noticed.
mod tcp;
/// Every family trains, on ranks that stay equal, and resumes exactly.
mod training;
