//! `fm-dist convert`.

use std::path::PathBuf;

use clap::Args;

use super::files::say;
use super::values::parse_word;
use crate::commands::{self, ConvertRequest};
use crate::error::Result;
use crate::lora::{Dialect, Family};

#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// File of the LoRA, in any of the formats; for peft also the folder
    #[arg(long, value_name = "FILE")]
    lora: PathBuf,
    /// Format to write: diffusers, comfyui, kohya or peft
    #[arg(long, value_name = "FORMAT", value_parser = parse_word::<Dialect>)]
    format: Dialect,
    /// File to create; for peft a folder
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Model family, where the names leave it open: flux, flux2, qwen_image, wan or hunyuan_video15
    #[arg(long, value_name = "FAMILY", value_parser = parse_word::<Family>)]
    family: Option<Family>,
    /// Leave out LoRAs of text encoders, with which a file is refused otherwise
    #[arg(long)]
    drop_text_encoders: bool,
    /// Diffusers transformer folder with whose modules the LoRA is compared; its config.json
    /// suffices
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
}

impl ConvertArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let ConvertArgs { lora, format, out, family, drop_text_encoders, base } = self;
        let request = ConvertRequest { lora, format, out, family, drop_text_encoders, base };
        let line = commands::convert(&request)?;
        say(&format!("{line}\n"))
    }
}
