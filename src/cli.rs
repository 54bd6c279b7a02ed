//! Typed text to a command, and what each command calls.

mod values;

use std::path::{Path, PathBuf};
use std::time::Instant;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};

use crate::collective::{self, Launch};
use crate::commands::{self, ExportRequest, ListingFormat, StepRequest, doctor};
use crate::config::{self, RunConfig};
use crate::data::Dataset;
use crate::error::{Error, Result, STOPPED};
use crate::fault;
use crate::files::contents::{Format, HEAD_BYTES, recognized};
use crate::model::Dtype;
use crate::phase::Phase;
use crate::plan::{self, CheckRequest, Cluster, ScalingRequest};
use crate::pulse;
use crate::run::{Resume, StopFlag};
use crate::sample::{self, SampleRequest};
use crate::train::{self, Ending, TrainOptions};
use crate::watchdog::Watchdog;
use values::{Shape, WorldSizes, parse_dtype, parse_moment, parse_scale, parse_shape, parse_world};

/// Trains diffusion transformers by flow matching, one process a GPU.
///
/// `mpirun -n 8 fm-dist`, or plain `fm-dist` for one process. Without a file the embedded default
/// configuration runs, which learns to draw handwritten digits in about two minutes.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, help_expected = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train; the command when none is given
    Train(TrainArgs),
    /// Generate samples of a trained run
    Sample(SampleArgs),
    /// Write a run's parameters as a diffusers transformer folder
    Export(ExportArgs),
    /// Run one flow-matching step and write every number of it
    Step(StepArgs),
    /// Say what a configuration would do, without doing it
    Check(CheckArgs),
    /// List the runs of an output_dir, their newest checkpoints, and which of them are finished
    Runs(RunsArgs),
    /// Say what this machine has and what is missing
    Doctor,
    /// Print the resolved configuration, one comment line a key
    Config(ConfigArgs),
}

#[derive(Args, Debug)]
struct ConfigArgs {
    /// Configuration file (TOML); the embedded digits without one
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides one key; may be given again
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    overrides: Vec<String>,
}

#[derive(Args, Debug)]
struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Begin anew (never), go on from the newest checkpoint that verifies (latest), do so if there
    /// is any and else begin anew (auto), or go on from this run or checkpoint folder
    #[arg(long, value_name = "never|latest|auto|DIR", default_value = "never")]
    resume: Resume,
    /// What connects the processes: MPI under a launcher (auto), MPI (mpi), or TCP where no MPI can
    /// be started (tcp). No key of the configuration, because the world must exist before rank 0's
    /// configuration can travel
    #[arg(long, value_name = "auto|mpi|tcp", default_value = "auto")]
    launch: Launch,
    /// Go on from a checkpoint though the data are others than those it was trained on
    #[arg(long)]
    allow_data_change: bool,
    /// One process, detailed logs each step, every stage searched for non-finite values
    #[arg(long)]
    debug: bool,
    /// Save and stop after this time, e.g. 55m, with exit code 10; `--resume latest` goes on
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    stop_after: Option<Instant>,
}

#[derive(Args, Debug)]
struct RunsArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Write one JSON object
    #[arg(long)]
    json: bool,
    /// Write assignments that a shell can `eval`: output_dir, latest_run, newest_step, finished
    #[arg(long, conflicts_with = "json")]
    shell: bool,
}

#[derive(Args, Debug)]
struct SampleArgs {
    /// Run folder, or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// File to write: .png for a labelled grid, .safetensors for the numbers; may be given again
    #[arg(long, value_name = "FILE", required = true)]
    out: Vec<PathBuf>,
    /// Conditions to generate from instead of the dataset's: tensors [N, …] under the adapter's
    /// keys, perhaps `negative.` ones and the `noise` to start from; `data_type` and `task_type` in
    /// the metadata
    #[arg(long, value_name = "FILE.safetensors")]
    conditions: Option<PathBuf>,
    /// Shape of one sample's latents where no `noise` has it; that of the dataset's first
    /// resolution group without it
    #[arg(long, value_name = "C,[F,]H,W", value_parser = parse_shape)]
    shape: Option<Shape>,
    /// Euler steps from noise to data
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    steps: Option<i64>,
    /// Classifier-free guidance (1 is none), or what a model that embeds its guidance is fed; 0 is
    /// the family's own
    #[arg(long, value_parser = parse_scale)]
    guidance: Option<f64>,
    /// Classifier-free guidance away from negative conditions, on top of an embedded one
    #[arg(long, value_parser = parse_scale)]
    true_cfg_scale: Option<f64>,
    /// Constant shift of the noise levels; 0 is the family's own way
    #[arg(long, value_parser = parse_scale)]
    shift: Option<f64>,
    /// Samples for each condition; one of a file's unless this is given
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    per_condition: Option<i64>,
    /// Seed of the noise
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Args, Debug)]
struct ExportArgs {
    /// Run folder, or one of its checkpoints
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Folder to make; `from_pretrained` reads it
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Largest file of tensors
    #[arg(long, value_name = "SIZE", default_value = "10GB")]
    max_shard_size: ByteSize,
    /// Kind of the tensors, float32 or bfloat16; the run's own without it
    #[arg(long, value_name = "KIND", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
}

#[derive(Args, Debug)]
struct StepArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Batch under the reference's keys, `data_type` in the metadata
    #[arg(long, value_name = "B.safetensors")]
    batch: PathBuf,
    /// Where the numbers go
    #[arg(long, value_name = "OUT.safetensors")]
    dump: PathBuf,
    /// Parameters of this run or checkpoint folder instead of those that a run begins with
    #[arg(long, value_name = "DIR")]
    weights: Option<PathBuf>,
    /// What `torch.manual_seed` gets on the other side; the configured seed without it
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    torch_seed: Option<i64>,
    /// Also gradients of the average weighted loss, as `grad.<parameter>`
    #[arg(long)]
    grads: bool,
}

#[derive(Args, Debug)]
struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Number of ranks to plan for; with --cluster also the powers of two from one to another, as
    /// in 8..4096
    #[arg(long, value_name = "N|FROM..TO", default_value = "1", value_parser = parse_world)]
    world: WorldSizes,
    /// Also predict a step and its communication on this cluster, with as many micro-batches a rank
    /// at each number of ranks
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// Constants of clusters instead of those that are built in
    #[arg(long, value_name = "FILE.toml", requires = "cluster")]
    clusters: Option<PathBuf>,
    /// Latents to plan for without opening the data
    #[arg(long, value_name = "C,[F,]H,W", value_parser = parse_shape, conflicts_with = "verify_data")]
    latents: Option<Shape>,
    /// Tokens of a prompt, with --latents
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(i64).range(0..))]
    text_tokens: i64,
    /// Also read all data, compare them with the hashes in dataset.json and look for numbers that
    /// are not finite
    #[arg(long)]
    verify_data: bool,
}

impl ConfigArgs {
    fn read(&self) -> Result<RunConfig> {
        match &self.config {
            None => RunConfig::read(config::DEFAULT_NAME, config::DEFAULT, &self.overrides),
            Some(path) => RunConfig::read(
                &path.display().to_string(),
                &read_text(path, "--config")?,
                &self.overrides,
            ),
        }
    }
}

impl Cli {
    /// Does what was typed. Returns the exit code of a command that has something to say by it.
    pub fn run(self) -> Result<i32> {
        match self.command.unwrap_or(Command::Train(self.train)) {
            Command::Train(args) => run_training(&args),
            Command::Sample(args) => sample::sample(&args.into_request()).map(|()| 0),
            Command::Export(ExportArgs { run, out, max_shard_size, dtype }) => {
                commands::export(&ExportRequest {
                    run,
                    out,
                    max_shard_bytes: max_shard_size.as_u64(),
                    dtype,
                })
                .map(|()| 0)
            }
            Command::Step(args) => {
                let StepArgs { config, batch, dump, weights, torch_seed, grads } = args;
                commands::dump_step(
                    &config.read()?,
                    &StepRequest { batch, dump, weights, torch_seed, grads },
                )
                .map(|()| 0)
            }
            Command::Check(args) => {
                let config = args.config.read()?;
                if args.verify_data {
                    let dataset = Dataset::named(&config.data.path)?.on_bad(config.data.on_bad);
                    dataset.verify_hashes().and_then(|()| dataset.verify_numbers())?;
                }
                say(&plan::check(&config, &args.into_request()?)?)
            }
            Command::Runs(RunsArgs { config, json, shell }) => {
                let format = match (json, shell) {
                    (true, _) => ListingFormat::Json,
                    (_, true) => ListingFormat::Shell,
                    _ => ListingFormat::Text,
                };
                say(&commands::list_runs(&config.read()?, format)?)
            }
            Command::Config(args) => say(&args.read()?.to_toml()),
            Command::Doctor => {
                let (text, complete) = doctor::report();
                say(&text)?;
                Ok(if complete { 0 } else { Error::environment("incomplete").exit_code() })
            }
        }
    }
}

impl SampleArgs {
    fn into_request(self) -> SampleRequest {
        SampleRequest {
            run: self.run,
            out: self.out,
            conditions: self.conditions,
            shape: self.shape.map(|shape| shape.0),
            num_steps: self.steps,
            guidance_scale: self.guidance,
            true_cfg_scale: self.true_cfg_scale,
            shift: self.shift,
            per_condition: self.per_condition,
            seed: self.seed,
        }
    }
}

impl CheckArgs {
    fn into_request(self) -> Result<CheckRequest> {
        let CheckArgs {
            world: WorldSizes(world_sizes),
            cluster,
            clusters,
            latents,
            text_tokens,
            ..
        } = self;
        let world_size = world_sizes[0];
        let scaling = match cluster {
            Some(name) => Some(ScalingRequest {
                cluster: cluster_named(&name, clusters.as_deref())?,
                world_sizes,
            }),
            None if world_sizes.len() > 1 => {
                let what = format!(
                    "a range is for a prediction: name a --cluster, one of {}",
                    Cluster::known()
                );
                return Err(Error::config("--world", what));
            }
            None => None,
        };
        Ok(CheckRequest { world_size, latents: latents.map(|shape| shape.0), text_tokens, scaling })
    }
}

fn cluster_named(name: &str, file: Option<&Path>) -> Result<Cluster> {
    let Some(path) = file else { return Cluster::named(name, None) };
    Cluster::named(name, Some((&path.display().to_string(), &read_text(path, "--clusters")?)))
}

/// A TOML file that the `flag` names.
fn read_text(path: &Path, flag: &str) -> Result<String> {
    let refused = |what: String| Error::config(flag, format!("{} {what}", path.display()));
    if path.is_dir() {
        return Err(refused("is a folder; expected a TOML file".into()));
    }
    let bytes = std::fs::read(path).map_err(|error| refused(format!("cannot be read: {error}")))?;
    match recognized(&bytes[..bytes.len().min(HEAD_BYTES)], Format::Toml) {
        Some(what) => Err(refused(what)),
        None => String::from_utf8(bytes)
            .map_err(|error| refused(format!("is no text: {}", error.utf8_error()))),
    }
}

fn run_training(args: &TrainArgs) -> Result<i32> {
    let stop = StopFlag::on_signals()?;
    // Read by every rank: what guards the start must hold before the ranks can talk to one another.
    let config = args.config.read();
    let known = config.as_ref().ok();
    known.and_then(|config| config.debug.inject_fault.clone()).into_iter().for_each(fault::arm);
    let limits = known.map(|config| config.watchdog.clone()).unwrap_or_default();
    let patience = limits.meeting_patience();
    let watchdog = Watchdog::start(limits)?;
    pulse::enter(Phase::Connect);
    let world = collective::connect(args.launch, patience)?;
    let warning = train::begin(&watchdog, world.as_ref())?;
    let options = TrainOptions {
        resume: args.resume.clone(),
        debug: args.debug,
        allow_data_change: args.allow_data_change,
        stop,
        stop_at: args.stop_after,
        warning,
    };
    let config = match train::share_config(config, &options, world.as_ref()) {
        Ok(config) => config,
        // Every rank knows of it, so that all can leave in good order.
        Err(error) => return collective::finish_with(error, world),
    };
    watchdog.configure(config.watchdog.clone());
    let (_, ending) = train::train(&config, &options, world.as_ref())?;
    collective::finish(world)?;
    Ok(if ending == Ending::Stopped { STOPPED } else { 0 })
}

/// Writes to standard output; a reader that has gone away is no error.
fn say(text: &str) -> Result<i32> {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::storage("standard output", "write to")(error))
        }
        _ => Ok(0),
    }
}
