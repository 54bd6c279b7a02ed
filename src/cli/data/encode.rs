//! `fm-dist data encode`.

use std::path::PathBuf;

use clap::Args;
use tch::Kind;

use super::{AboutArgs, Output, among_ranks, told};
use crate::assembly::device::plain_device;
use crate::cli::values::{parse_dtype, parse_ratios, parse_share, parse_size, parse_word};
use crate::datasets::encode::{EncodeRequest, EncodedDataset, encode};
use crate::datasets::pictures::{
    BucketOptions, CaptionOptions, FrameOptions, PictureOptions, Ratios,
};
use crate::encoding::Family;
use crate::error::{Result, one_line};
use crate::libtorch;
use crate::media::{Limits, Size};
use crate::model::Dtype;
use crate::parallel::DeviceChoice;

/// Most lines of notes in a report.
const NOTES: usize = 20;
/// Tokens of a batch. On a CPU the activations of more pictures than one of 256 x 256 pixels fit no
/// cache and no memory that is kept: FLUX.1's autoencoder takes a third longer for each.
const GPU_TOKENS: u64 = 8192;
const CPU_TOKENS: u64 = 256;

#[derive(Args, Debug)]
pub struct EncodeArgs {
    /// Model family: flux, flux2, qwen_image, wan, hunyuan_video15, or the demo's dit, which needs
    /// no pipeline
    #[arg(long, value_name = "FAMILY", value_parser = parse_word::<Family>)]
    family: Family,
    /// Folder of the family's published pipeline, with vae/, text_encoder/, tokenizer/, …
    #[arg(long, value_name = "DIR")]
    pipeline: Option<PathBuf>,
    /// Folder of pictures (PNG, JPEG, WebP); for families of videos also of videos, and of folders
    /// of frames
    #[arg(value_name = "PICTURES")]
    pictures: PathBuf,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    about: AboutArgs,
    #[command(flatten)]
    captions: CaptionArgs,
    #[command(flatten)]
    pixels: PixelArgs,
    /// Device of each process: cpu, or cuda for the GPU of its number within its node
    #[arg(long, value_name = "DEVICE", value_parser = parse_word::<DeviceChoice>, default_value = "cpu")]
    device: DeviceChoice,
    /// Kind in which encoders compute: float32 or bfloat16; bfloat16 on GPUs if unset
    #[arg(long, value_name = "DTYPE", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
    /// Threads of each process for its encoders; another number may change last digits
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Most tokens that are encoded at once: rows of text, or squares of 16 x 16 pixels; if unset
    /// 8192 on a GPU, and 256 on a CPU, where larger batches are slower
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    batch_tokens: Option<u64>,
}

/// Captions and what is made of them.
#[derive(Args, Debug)]
struct CaptionArgs {
    /// List of all captions, .jsonl, .json or .csv; if unset: the .txt or .json beside each
    /// picture, lists in the folder, and at last the file's name
    #[arg(long, value_name = "FILE")]
    captions: Option<PathBuf>,
    /// Field or column of captions in lists
    #[arg(long, value_name = "NAME")]
    caption_field: Option<String>,
    /// Text before every caption
    #[arg(long, value_name = "TEXT", default_value = "")]
    prefix: String,
    /// Word in the place of each `[trigger]`, and before captions that have neither
    #[arg(long, value_name = "WORD")]
    trigger: Option<String>,
    /// Bring the tags of a caption, which commas separate, into an order that the file decides
    #[arg(long)]
    shuffle_tags: bool,
    /// First tags that keep their places
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_tags: usize,
}

/// Pixels and what is made of them.
#[derive(Args, Debug)]
struct PixelArgs {
    /// One size for all; if unset, sizes of a budget of pixels by the pictures' ratios
    #[arg(long, value_name = "WxH", value_parser = parse_size, conflicts_with = "max_pixels")]
    size: Option<Size>,
    /// Budget of a picture's or a frame's pixels; if unset 1024², for videos 832 · 480, for dit 64²
    #[arg(long, value_name = "N")]
    max_pixels: Option<u64>,
    /// Multiple of the sides within a budget; if unset 64, for videos 16, for dit 8
    #[arg(long, value_name = "N")]
    multiple: Option<u32>,
    /// Ratios of width to height from LEAST to MOST in N equal factors, as in diffusion-pipe; if
    /// unset the 14 of NeMo
    #[arg(long, value_name = "LEAST:MOST:N", value_parser = parse_ratios)]
    ratios: Option<Ratios>,
    /// Never make a picture larger
    #[arg(long)]
    no_upscale: bool,
    /// Most frames of a video; a longer one gives this many at equal distances
    #[arg(long, value_name = "N", default_value_t = 81, value_parser = clap::value_parser!(u32).range(1..))]
    frames: u32,
    /// Folder of masks by the pictures' names, which become `loss_mask`: white counts, black does
    /// not
    #[arg(long, value_name = "DIR")]
    masks: Option<PathBuf>,
    /// Folder of control pictures or videos by the pictures' names, whose latents become
    /// `condition_latents`; repeatable
    #[arg(long, value_name = "DIR")]
    control: Vec<PathBuf>,
    /// The program ffmpeg, which reads videos; that in PATH if unset
    #[arg(long, value_name = "PROGRAM")]
    ffmpeg: Option<PathBuf>,
    /// Largest share of damaged files, which are named and left out
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, value_parser = parse_share)]
    bad_share: f64,
}

impl EncodeArgs {
    pub fn run(self) -> Result<i32> {
        let out = self.output.out.display().to_string();
        tch::set_num_threads(self.threads.into());
        libtorch::keep_freed_memory();
        among_ranks(|world| {
            let device = plain_device(self.device, world)?;
            let made = encode(&self.request(device)?, world)?;
            Ok(report(&made, &out))
        })
    }

    fn request(self, device: tch::Device) -> Result<EncodeRequest> {
        let EncodeArgs { family, pipeline, pictures, output, about, captions, pixels, .. } = self;
        let is_on_host = device == tch::Device::Cpu;
        let usual_tokens = if is_on_host { CPU_TOKENS } else { GPU_TOKENS };
        let kind = match self.dtype {
            Some(dtype) => dtype.kind(),
            None if is_on_host => Kind::Float,
            None => Kind::BFloat16,
        };
        let jobs = output.jobs.into();
        Ok(EncodeRequest {
            family,
            pipeline,
            device,
            kind,
            pictures: pixels.options(pictures, captions.options(), family, jobs)?,
            out: output.out,
            batch_tokens: self.batch_tokens.unwrap_or(usual_tokens),
            shard_bytes: output.shard_size.as_u64(),
            jobs,
            about: about.given(),
        })
    }
}

impl CaptionArgs {
    fn options(self) -> CaptionOptions {
        CaptionOptions {
            list: self.captions,
            field: self.caption_field,
            prefix: self.prefix,
            trigger: self.trigger,
            shuffle_tags: self.shuffle_tags,
            keep_tokens: self.keep_tags,
        }
    }
}

impl PixelArgs {
    fn options(
        self,
        folder: PathBuf,
        captions: CaptionOptions,
        family: Family,
        jobs: usize,
    ) -> Result<PictureOptions> {
        let usual = family.buckets;
        let buckets = match self.size {
            Some(size) => BucketOptions::One(size),
            None => BucketOptions::Budget {
                pixels: self.max_pixels.unwrap_or(usual.pixels),
                multiple: self.multiple.unwrap_or(usual.multiple),
                ratios: self.ratios.unwrap_or(Ratios::Reference),
                no_upscale: self.no_upscale,
            },
        };
        let most = self.frames as usize;
        Ok(PictureOptions {
            folder,
            frames: family.is_of_videos().then_some(FrameOptions { most, step: 1 }),
            captions,
            masks: self.masks,
            controls: self.control,
            buckets,
            ffmpeg: self.ffmpeg,
            limits: Limits::default(),
            most_bad: self.bad_share,
            jobs,
        })
    }
}

/// Returns what the user is told at the end.
fn report(made: &EncodedDataset, out: &str) -> String {
    let shown = made.notes.iter().take(NOTES).map(|note| one_line(note) + "\n");
    let mut text: String = shown.collect();
    if made.notes.len() > NOTES {
        text += &format!("and {} more files that were skipped\n", made.notes.len() - NOTES);
    }
    text + &told(made.written, out)
}
