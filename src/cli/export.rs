//! `fm-dist export`.

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::Args;

use super::values::{parse_dtype, parse_word};
use crate::commands::{self, ExportRequest};
use crate::error::Result;
use crate::lora::Dialect;
use crate::model::Dtype;
use crate::run::checkpoint::SavedWeights;

#[derive(Args, Debug)]
pub struct ExportArgs {
    /// Run folder, or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Folder to create, in the format of `from_pretrained`; with --format the file of a LoRA
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Maximum size of a file of tensors
    #[arg(long, value_name = "SIZE", default_value = "10GB")]
    max_shard_size: ByteSize,
    /// Kind of the tensors, float32 or bfloat16; the run's own if unset
    #[arg(long, value_name = "KIND", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
    /// Merge a LoRA into the model that it was trained on
    #[arg(long, conflicts_with = "format")]
    merge: bool,
    /// Write the run's LoRA instead: diffusers, comfyui, kohya or, as a folder, peft
    #[arg(long, value_name = "FORMAT", value_parser = parse_word::<Dialect>)]
    format: Option<Dialect>,
    /// Write the average of the weights (`[ema]`) instead of the weights
    #[arg(long)]
    ema: bool,
}

impl ExportArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let request = ExportRequest {
            run: self.run,
            out: self.out,
            max_shard_bytes: self.max_shard_size.as_u64(),
            dtype: self.dtype,
            merge: self.merge,
            format: self.format,
            weights: SavedWeights::averaged_if(self.ema),
        };
        commands::export(&request).map(|()| 0)
    }
}
