//! `fm-dist data`.

mod encode;

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Subcommand};

use encode::EncodeArgs;

use super::files::say;
use super::values::parse_word;
use crate::collective::{self, Collective, Launch};
use crate::data::Links;
use crate::datasets::About;
use crate::datasets::caches::{CacheFormat, ImportRequest, Imported, import};
use crate::datasets::index::{IndexRequest, index};
use crate::datasets::pack::{PackRequest, pack};
use crate::datasets::show::{ShowRequest, show};
use crate::datasets::write::Written;
use crate::encoding::Family;
use crate::error::Result;
use crate::files::outputs::{Named, check_files};
use crate::phase::Phase;
use crate::pulse;

/// Longest time in which all ranks must have started.
const CONNECT: Duration = Duration::from_secs(300);

#[derive(Args, Debug)]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Encode pictures or videos with captions as a dataset, on one process or, under mpirun,
    /// several
    Encode(Box<EncodeArgs>),
    /// Write a dataset from the cache of another trainer, on one process or, under mpirun, several
    Import(ImportArgs),
    /// Describe a folder of safetensors files, stacked or of one sample each, as a dataset
    Index(IndexArgs),
    /// Write a dataset anew in files of a wanted size
    Pack(PackArgs),
    /// Show what a dataset holds, and what looks wrong with it
    Show(ShowArgs),
}

/// Treatment of links.
#[derive(Args, Debug)]
struct LinkArgs {
    /// Follow links that lead out of the folder, as in Hugging Face's cache
    #[arg(long)]
    follow_links: bool,
}

/// Description of a new dataset.
#[derive(Args, Debug)]
struct AboutArgs {
    /// Name of the dataset; that of the folder if unset
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Origin of the data
    #[arg(long, value_name = "TEXT")]
    source: Option<String>,
    /// Their licence
    #[arg(long, value_name = "TEXT")]
    licence: Option<String>,
}

/// Output folder and size of its files.
#[derive(Args, Debug)]
struct Output {
    /// Folder to create; one whose writing was interrupted is continued
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Largest size of a file
    #[arg(long, value_name = "SIZE", default_value = "512MB")]
    shard_size: ByteSize,
    /// Number of threads of each process; each holds one file's samples in memory
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
}

#[derive(Args, Debug)]
struct ImportArgs {
    /// The trainer: nemo (NVIDIA NeMo AutoModel), musubi (musubi-tuner), diffusion-pipe,
    /// simpletuner (SimpleTuner) or ai-toolkit
    #[arg(long, value_name = "TRAINER", value_parser = parse_word::<CacheFormat>)]
    from: CacheFormat,
    /// Folders of its cache; of SimpleTuner those of latents, of texts and of pictures
    #[arg(value_name = "SRC", required = true)]
    sources: Vec<PathBuf>,
    /// Folder of texts, `<name of the picture>.txt`, that replace the cache's captions
    #[arg(long, value_name = "DIR")]
    captions: Option<PathBuf>,
    /// Family that the samples must be of, by its table of the configuration: flux, flux2,
    /// qwen_image, wan or hunyuan_video15; the cache's own if unset
    #[arg(long, value_name = "FAMILY", value_parser = parse_word::<Family>)]
    family: Option<Family>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    about: AboutArgs,
}

#[derive(Args, Debug)]
struct IndexArgs {
    /// Folder of safetensors files, in which dataset.json is written
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    links: LinkArgs,
    #[command(flatten)]
    about: AboutArgs,
}

#[derive(Args, Debug)]
struct PackArgs {
    /// Folder of the dataset
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    links: LinkArgs,
    #[command(flatten)]
    output: Output,
    /// Shuffle the samples with this seed
    #[arg(long, value_name = "SEED")]
    shuffle: Option<u64>,
}

#[derive(Args, Debug)]
struct ShowArgs {
    /// Folder of the dataset, or `embedded:digits`
    #[arg(value_name = "DIR")]
    path: String,
    #[command(flatten)]
    links: LinkArgs,
    /// Samples of one step, to count the steps of an epoch
    #[arg(long, value_name = "N")]
    global_batch: Option<usize>,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
    /// Also draw the latents of some samples, undecoded
    #[arg(long, value_name = "OUT.png")]
    samples: Option<PathBuf>,
}

impl AboutArgs {
    fn given(self) -> About {
        About { name: self.name, source: self.source, licence: self.licence }
    }
}

impl LinkArgs {
    fn choice(&self) -> Links {
        Links::followed(self.follow_links)
    }
}

impl DataArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        match self.command {
            DataCommand::Encode(arguments) => arguments.run(),
            DataCommand::Import(arguments) => arguments.run(),
            DataCommand::Index(arguments) => arguments.run(),
            DataCommand::Pack(arguments) => arguments.run(),
            DataCommand::Show(arguments) => arguments.run(),
        }
    }
}

impl ImportArgs {
    fn run(self) -> Result<i32> {
        let ImportArgs { from, sources, captions, family, output, about } = self;
        let out = output.out.display().to_string();
        let request = ImportRequest {
            from,
            sources,
            captions,
            family,
            out: output.out,
            shard_bytes: output.shard_size.as_u64(),
            jobs: output.jobs.into(),
            about: about.given(),
        };
        let made = |world: &dyn Collective| {
            let Imported { written, notes } = import(&request, world)?;
            let notes = notes.iter().map(|note| format!("note: {note}\n")).collect::<String>();
            Ok(notes + &told(written, &out))
        };
        among_ranks(made)
    }
}

/// Does the work of a command on all ranks that were launched, and says its result once.
fn among_ranks(work: impl FnOnce(&dyn Collective) -> Result<String>) -> Result<i32> {
    pulse::enter(Phase::Connect);
    let world = collective::connect(Launch::Auto, CONNECT)?;
    pulse::enter(Phase::Report);
    let text = work(world.as_ref())?;
    let code = if pulse::is_root(world.rank()) { say(&text)? } else { 0 };
    collective::finish(world)?;
    Ok(code)
}

impl IndexArgs {
    fn run(self) -> Result<i32> {
        let IndexArgs { folder, links, about } = self;
        let shown = folder.display().to_string();
        let (links, about) = (links.choice(), about.given());
        say(&told(index(&IndexRequest { folder, links, about })?, &shown))
    }
}

impl PackArgs {
    fn run(self) -> Result<i32> {
        let PackArgs { folder, links, output, shuffle } = self;
        let out = output.out.display().to_string();
        let request = PackRequest {
            folder,
            links: links.choice(),
            out: output.out,
            shard_bytes: output.shard_size.as_u64(),
            shuffle,
            jobs: output.jobs.into(),
        };
        among_ranks(|world| pack(&request, world).map(|written| told(written, &out)))
    }
}

impl ShowArgs {
    fn run(self) -> Result<i32> {
        let ShowArgs { path, links, global_batch, json, samples } = self;
        let outputs: Vec<Named<'_>> =
            samples.iter().map(|path| Named { argument: "--samples", path }).collect();
        check_files(&outputs, &[])?;
        let summary = show(&ShowRequest { path, links: links.choice(), global_batch, samples })?;
        if json {
            let text = serde_json::to_string_pretty(&summary).expect("texts and numbers are JSON");
            return say(&format!("{text}\n"));
        }
        say(&summary.to_string())
    }
}

fn told(written: Written, folder: &str) -> String {
    let Written { samples, files, groups } = written;
    format!("{folder}: {samples} samples in {files} files, resolution groups: {groups}\n")
}
