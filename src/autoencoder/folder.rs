//! An autoencoder's folder as published: `config.json` and the weights in safetensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind};

use super::halves::{Decoder, Encoder, Half};
use super::{AutoencoderClass, Factors, Network};
use crate::error::Result;
use crate::files::safetensors::WEIGHTS_STEM;
use crate::published::{Config, Names, Part, Weights};
use crate::settings::Family;

const PART: Part = Part { noun: "autoencoder", folder: "vae", stem: WEIGHTS_STEM };
/// Part of the names of counters that PyTorch keeps beside statistics.
const COUNTERS: &[&str] = &["num_batches_tracked"];

/// An autoencoder whose settings and headers have been read, and none of its weights.
#[derive(Debug)]
pub struct Autoencoder {
    folder: PathBuf,
    class: AutoencoderClass,
    weights: Weights,
}

impl Autoencoder {
    /// Opens the folder `vae` of a pipeline.
    ///
    /// # Errors
    /// Errors of [`AutoencoderClass::read`] and [`Weights::check`].
    pub fn open(folder: &Path) -> Result<Self> {
        let class = AutoencoderClass::read(folder)?;
        let weights = Weights::open(folder, PART, Names::plain(COUNTERS))?;
        weights.check(&class.tensors())?;
        Ok(Autoencoder { folder: folder.into(), class, weights })
    }

    /// Returns the class with its settings.
    pub fn class(&self) -> &AutoencoderClass {
        &self.class
    }

    pub fn factors(&self) -> Factors {
        self.class.factors()
    }

    /// Loads the encoder, which computes in `kind` on `device`.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn encoder(&self, device: Device, kind: Kind) -> Result<Encoder> {
        let half = self.half(self.class.encoder(), device, kind)?;
        Ok(Encoder::new(half))
    }

    /// Loads the decoder, which computes in `kind` on `device`.
    ///
    /// # Errors
    /// As [`encoder`](Self::encoder).
    pub fn decoder(&self, device: Device, kind: Kind) -> Result<Decoder> {
        let half = self.half(self.class.decoder(), device, kind)?;
        Ok(Decoder::new(half))
    }

    fn half(&self, network: Box<dyn Network>, device: Device, kind: Kind) -> Result<Half> {
        let params = self.weights.load(network.params(), device, kind)?;
        Ok(Half {
            folder: self.folder.clone(),
            network,
            params,
            device,
            kind,
            scaling: self.class.scaling(&|name| self.weights.read(name))?,
            factors: self.class.factors(),
            default_tile: self.class.tile(),
            tiles: None,
        })
    }
}

impl AutoencoderClass {
    /// Reads a folder's `config.json`. A field that it lacks has the class's default, as in
    /// diffusers.
    ///
    /// # Errors
    /// Errors of [`Config::read`] and [`Config::read_into`];
    /// [`Error::Data`](crate::error::Error::Data) if the class is unknown, or fields contradict
    /// each other.
    pub fn read(folder: &Path) -> Result<Self> {
        AutoencoderClass::of(Config::read(folder, PART)?)
    }

    fn of(config: Config) -> Result<Self> {
        let name = config.text("_class_name").unwrap_or_default();
        let mut class =
            AutoencoderClass::named(name).ok_or_else(|| config.refused(unknown_class(name)))?;
        let idle = class.idle_fields();
        // Fields that begin with an underscore are notes of the library that wrote the file.
        let is_setting = |name: &str| !name.starts_with('_') && !idle.contains(&name);
        let fields: Map<String, Value> = config.fields().clone();
        let fields = fields.into_iter().filter(|(name, _)| is_setting(name)).collect();
        let config = config.with_fields(fields);
        config.read_into(class.settings())?;
        class.check().map_err(|what| config.refused(what))?;
        Ok(class)
    }

    /// Names and shapes of all weights.
    pub fn tensors(&self) -> BTreeMap<String, Vec<i64>> {
        let networks = [self.encoder(), self.decoder()];
        let infos = networks.iter().flat_map(|network| network.params().infos());
        let weights = infos.map(|info| (info.name.clone(), info.shape.clone()));
        let statistics = self.statistics().into_iter();
        weights.chain(statistics.map(|(name, shape)| (name.into(), shape))).collect()
    }
}

fn unknown_class(name: &str) -> String {
    if name.is_empty() {
        return "has no _class_name, so it describes no autoencoder of diffusers".into();
    }
    format!("_class_name is {name:?}; supported are {}", AutoencoderClass::NAMES.join(", "))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    /// The message about a `config.json` that lies.
    fn said(fields: Value) -> String {
        let Value::Object(fields) = fields else { panic!("an object") };
        let error = AutoencoderClass::of(Config::new(Path::new("vae/config.json"), fields))
            .expect_err("it lies");
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn a_class_that_nobody_has_is_told_with_those_there_are() {
        assert_eq!(
            said(json!({"z_dim": 16})),
            "vae/config.json: has no _class_name, so it describes no autoencoder of diffusers"
        );
        let text = said(json!({"_class_name": "AutoencoderKLHunyuanVideo"}));
        assert!(
            text.starts_with(
                "vae/config.json: _class_name is \"AutoencoderKLHunyuanVideo\"; supported are \
                 AutoencoderKL, AutoencoderKLFlux2, "
            ),
            "{text}"
        );
    }

    #[test]
    fn fields_that_are_wrong_are_told_all_at_once() {
        let text = said(json!({
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownBlock2D"],
            "block_out_channel": [64],
            "latent_channels": "4",
            "act_fn": "relu",
        }));
        for part in [
            "vae/config.json: ",
            "down_block_types[0]: ",
            "block_out_channel: ",
            "latent_channels: expected an integer, found the text \"4\"",
            "act_fn: ",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn settings_that_contradict_each_other_are_told_by_a_field() {
        let pairs = [
            (
                json!({"_class_name": "AutoencoderKL", "block_out_channels": [32, 64]}),
                "vae/config.json: down_block_types has 1 entry, block_out_channels 2",
            ),
            (
                json!({"_class_name": "AutoencoderKL", "block_out_channels": [48]}),
                "vae/config.json: block_out_channels: 48 is no multiple of norm_num_groups, 32",
            ),
            (
                json!({"_class_name": "AutoencoderKLFlux2", "decoder_block_out_channels": [32]}),
                "vae/config.json: decoder_block_out_channels has 1 entry, block_out_channels 4",
            ),
            (
                json!({"_class_name": "AutoencoderKLWan", "z_dim": 48}),
                "vae/config.json: latents_mean has 16 entries, z_dim is 48",
            ),
            (
                json!({"_class_name": "AutoencoderKLWan", "attn_scales": [0.5]}),
                "vae/config.json: attn_scales must be empty: attention is supported in the middle \
                 alone",
            ),
            (
                json!({"_class_name": "AutoencoderKLQwenImage", "temperal_downsample": [true]}),
                "vae/config.json: temperal_downsample has 1 entry, dim_mult 4; it must have one less",
            ),
            (
                json!({"_class_name": "AutoencoderKLWan", "temperal_downsample": [true, true, true]}),
                "vae/config.json: temperal_downsample must be true twice, since videos are read in \
                 chunks of 4 frames",
            ),
            (
                json!({"_class_name": "AutoencoderKLWan", "patch_size": 2}),
                "vae/config.json: in_channels is 3, no multiple of the 4 places of a patch",
            ),
            (
                json!({"_class_name": "AutoencoderKLWan", "scale_factor_spatial": 16}),
                "vae/config.json: scale_factor_spatial is 16, the other settings make it 8",
            ),
            (
                json!({"_class_name": "AutoencoderKLWan", "is_residual": true, "dim_mult": [1, 3, 4, 4]}),
                "vae/config.json: dim_mult: 96 channels in blocks of 8 cannot be averaged to 288",
            ),
            (
                json!({"_class_name": "AutoencoderKLHunyuanVideo15", "spatial_compression_ratio": 12}),
                "vae/config.json: spatial_compression_ratio is 12, no power of 2",
            ),
            (
                json!({"_class_name": "AutoencoderKLHunyuanVideo15", "latent_channels": 24}),
                "vae/config.json: latent_channels: 1024 channels cannot be averaged to 48",
            ),
        ];
        for (fields, expected) in pairs {
            assert_eq!(said(fields), expected);
        }
    }

    #[test]
    fn a_field_that_is_not_there_has_its_default_and_a_null_counts_as_none() {
        let fields = json!({
            "_class_name": "AutoencoderKLWan",
            "_diffusers_version": "0.35.0",
            "clip_output": false,
            "decoder_base_dim": null,
            "dropout": 0.0,
        });
        let Value::Object(fields) = fields else { panic!("an object") };
        let class =
            AutoencoderClass::of(Config::new(Path::new("config.json"), fields)).expect("Wan 2.1's");
        assert_eq!(class, AutoencoderClass::Wan(Default::default()));
    }

    #[test]
    fn a_pipelines_folder_is_told_with_the_one_inside() {
        let root = tempfile::tempdir().expect("a folder");
        let vae = root.path().join("vae");
        fs::create_dir(&vae).expect("a folder");
        let said =
            |folder: &Path| AutoencoderClass::read(folder).expect_err("no config").to_string();
        assert!(said(&vae).contains("config.json of the autoencoder cannot be read: "));
        fs::write(vae.join("config.json"), "{").expect("a file");
        assert!(said(root.path()).ends_with(&format!("did you mean {}?", vae.display())));
        assert!(said(&vae).starts_with(&vae.join("config.json").display().to_string()));
        fs::write(vae.join("config.json"), " ".repeat(1 << 17)).expect("a file");
        assert!(said(&vae).ends_with("config.json: is longer than the 65536 bytes allowed"));
    }
}
