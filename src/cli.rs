//! Parses the command line and calls the commands.

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

/// Trains diffusion transformers by flow matching, one process for each GPU.
///
/// `mpirun -n 8 fm-dist`, or plain `fm-dist` for one process. Without a file it runs the embedded
/// default configuration, which learns to draw handwritten digits in about two minutes.
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
    /// Show the plan of a configuration without running it
    Check(CheckArgs),
    /// List the runs of an output_dir, their newest checkpoints, and which of them are finished
    Runs(RunsArgs),
    /// Show which requirements this machine meets and which it lacks
    Doctor,
    /// Print the resolved configuration, with one comment line for each key
    Config(ConfigArgs),
}

#[derive(Args, Debug)]
struct ConfigArgs {
    /// Configuration file (TOML); the embedded digits if unset
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key; repeatable
    #[arg(long = "set", value_name = "KEY.PATH=VALUE")]
    overrides: Vec<String>,
}

#[derive(Args, Debug)]
struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Start a new run (never), resume from the newest checkpoint that verifies (latest), resume if
    /// there is one and start a new run otherwise (auto), or resume from this run or checkpoint
    /// folder
    #[arg(long, value_name = "never|latest|auto|DIR", default_value = "never")]
    resume: Resume,
    /// Connection of the processes: MPI under a launcher (auto), MPI (mpi), or TCP where MPI cannot
    /// start (tcp). Not a key of the configuration, because the world must exist before rank 0 can
    /// send its configuration
    #[arg(long, value_name = "auto|mpi|tcp", default_value = "auto")]
    launch: Launch,
    /// Resume from a checkpoint even if the data differ from those it was trained on
    #[arg(long)]
    allow_data_change: bool,
    /// One process, detailed logs at each step, and a search of every stage for non-finite values
    #[arg(long)]
    debug: bool,
    /// Save and stop after this time, e.g. 55m, with exit code 10; `--resume latest` continues
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
    /// File to write: .png for a labelled grid, .safetensors for the numbers; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    out: Vec<PathBuf>,
    /// Conditions to generate from instead of the dataset's: tensors [N, …] under the adapter's
    /// keys, optionally `negative.` ones and the initial `noise`; `data_type` and `task_type` in
    /// the metadata
    #[arg(long, value_name = "FILE.safetensors")]
    conditions: Option<PathBuf>,
    /// Shape of one sample's latents without a given `noise`; that of the dataset's first
    /// resolution group if unset
    #[arg(long, value_name = "C,[F,]H,W", value_parser = parse_shape)]
    shape: Option<Shape>,
    /// Euler steps from noise to data
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    steps: Option<i64>,
    /// Scale of classifier-free guidance (1 disables it), or the guidance input of a model that
    /// embeds it; 0 selects the family's own
    #[arg(long, value_parser = parse_scale)]
    guidance: Option<f64>,
    /// Scale of classifier-free guidance from negative conditions, in addition to an embedded
    /// guidance
    #[arg(long, value_parser = parse_scale)]
    true_cfg_scale: Option<f64>,
    /// Constant shift of the noise levels; 0 selects the family's own rule
    #[arg(long, value_parser = parse_scale)]
    shift: Option<f64>,
    /// Number of samples for each condition; one for each condition of a file if unset
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
    /// Folder to create, in the format of `from_pretrained`
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Maximum size of a file of tensors
    #[arg(long, value_name = "SIZE", default_value = "10GB")]
    max_shard_size: ByteSize,
    /// Kind of the tensors, float32 or bfloat16; the run's own if unset
    #[arg(long, value_name = "KIND", value_parser = parse_dtype)]
    dtype: Option<Dtype>,
}

#[derive(Args, Debug)]
struct StepArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Batch under the reference's keys, with `data_type` in the metadata
    #[arg(long, value_name = "B.safetensors")]
    batch: PathBuf,
    /// File to write
    #[arg(long, value_name = "OUT.safetensors")]
    dump: PathBuf,
    /// Run or checkpoint folder with the parameters; the initial parameters of a run if unset
    #[arg(long, value_name = "DIR")]
    weights: Option<PathBuf>,
    /// Seed given to `torch.manual_seed` in the other implementation; the configured seed if unset
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    torch_seed: Option<i64>,
    /// Also write the gradients of the average weighted loss, as `grad.<parameter>`
    #[arg(long)]
    grads: bool,
}

#[derive(Args, Debug)]
struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Number of ranks to plan for; with --cluster also a range of powers of two, as in 8..4096
    #[arg(long, value_name = "N|FROM..TO", default_value = "1", value_parser = parse_world)]
    world: WorldSizes,
    /// Also predict the time of a step and its communication on this cluster, with the same number
    /// of micro-batches for each rank at every number of ranks
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// Constants of clusters to use instead of the built-in ones
    #[arg(long, value_name = "FILE.toml", requires = "cluster")]
    clusters: Option<PathBuf>,
    /// Shape of latents to plan for without opening the data
    #[arg(long, value_name = "C,[F,]H,W", value_parser = parse_shape, conflicts_with = "verify_data")]
    latents: Option<Shape>,
    /// Number of tokens of a prompt, with --latents
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(i64).range(0..))]
    text_tokens: i64,
    /// Also read all data, compare them with the hashes in dataset.json, and search them for
    /// numbers that are not finite
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
    /// Runs the parsed command. Returns its exit code.
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

/// Reads a TOML file that `flag` names.
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
    // Read by every rank: settings that protect the start-up must apply before ranks can
    // communicate.
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
        // Every rank has the error, so that all can finish in good order.
        Err(error) => return collective::finish_with(error, world),
    };
    watchdog.follow(config.watchdog.clone());
    let (_, ending) = train::train(&config, &options, world.as_ref())?;
    collective::finish(world)?;
    Ok(if ending == Ending::Stopped { STOPPED } else { 0 })
}

/// Writes to standard output; a reader that has closed the pipe is no error.
fn say(text: &str) -> Result<i32> {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::storage("standard output", "write to")(error))
        }
        _ => Ok(0),
    }
}
