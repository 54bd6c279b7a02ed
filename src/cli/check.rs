//! `fm-dist check`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::config::ConfigArgs;
use super::files::{read_text, say};
use super::values::{Shape, WorldSizes, parse_shape, parse_world};
use crate::error::{Error, Result};
use crate::plan::{self, CheckRequest, Cluster, ScalingRequest};

#[derive(Args, Debug)]
pub struct CheckArgs {
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

impl CheckArgs {
    /// Does what was typed; returns the exit code.
    pub fn run(self) -> Result<i32> {
        let config = self.config.read()?;
        if self.verify_data {
            plan::verify_data(&config)?;
        }
        say(&plan::check(&config, &self.into_request()?)?)
    }

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
