//! An autoencoder's folder as published: `config.json` and the weights in safetensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind};

use super::halves::{Decoder, Encoder, Half};
use super::{AutoencoderClass, Factors, Network};
use crate::error::{Error, Result};
use crate::files::contents::no_json;
use crate::files::safetensors::{Shards, WEIGHTS_STEM, refuse_pickled_weights};
use crate::settings::{self, Family};

const CONFIG_FILE_NAME: &str = "config.json";
/// Longest `config.json`, twenty times any published one.
const MAX_CONFIG_BYTES: u64 = 64 << 10;
/// Part of the names of counters that PyTorch keeps beside statistics.
const COUNTERS: &[&str] = &["num_batches_tracked"];
/// Kinds of published weights.
const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// An autoencoder whose settings and headers have been read, and none of its weights.
#[derive(Debug)]
pub struct Autoencoder {
    folder: PathBuf,
    class: AutoencoderClass,
    shards: Shards,
}

impl Autoencoder {
    /// Opens the folder `vae` of a pipeline.
    ///
    /// # Errors
    /// Errors of [`AutoencoderClass::read`]; [`Error::Data`] with a list of every missing, unexpected and
    /// misshapen tensor.
    pub fn open(folder: &Path) -> Result<Self> {
        let class = AutoencoderClass::read(folder)?;
        let shards = Shards::open_stem(folder, WEIGHTS_STEM)?;
        let tensors = class.tensors();
        let expected =
            tensors.iter().map(|(name, shape)| (name.clone(), shape.as_slice())).collect();
        shards.check(&expected, &KINDS, COUNTERS).map_err(|what| Error::data(folder, what))?;
        Ok(Autoencoder { folder: folder.into(), class, shards })
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
    /// Errors of reading; [`Error::Data`] naming the first number that is not finite.
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
        let read = |name: &str| self.shards.read_finite(name);
        let tensors = network.params().infos().iter();
        let tensors = tensors.map(|info| Ok(read(&info.name)?.to_device(device).to_kind(kind)));
        let params = network.params().views(tensors.collect::<Result<_>>()?);
        Ok(Half {
            folder: self.folder.clone(),
            network,
            params,
            device,
            kind,
            scaling: self.class.scaling(&read)?,
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
    /// [`Error::Data`] if the file is missing, no JSON, of an unknown class, or contradicts itself;
    /// [`Error::Config`] naming every field that is unknown or has an unsupported value;
    /// [`Error::CheckpointMismatch`] if the weights are a pickle.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE_NAME);
        let text =
            text_of(&path).map_err(|error| Error::data(folder, no_config(folder, &error)))?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            let what = format!("is longer than the {MAX_CONFIG_BYTES} bytes allowed");
            return Err(Error::data(&path, what));
        }
        refuse_pickled_weights(folder)?;
        let parsed: Result<Map<String, Value>, _> = serde_json::from_slice(&text);
        let fields = parsed.map_err(|error| Error::data(&path, no_json(&text, &error)))?;
        AutoencoderClass::of_fields(fields, &path)
    }

    /// `path`: the file of the fields, for messages.
    fn of_fields(mut fields: Map<String, Value>, path: &Path) -> Result<Self> {
        let name = fields.get("_class_name").and_then(Value::as_str).unwrap_or_default();
        let mut class =
            AutoencoderClass::named(name).ok_or_else(|| Error::data(path, unknown_class(name)))?;
        let idle = class.idle_fields();
        // Fields that begin with an underscore are notes of the library that wrote the file.
        fields.retain(|name, _| !name.starts_with('_') && !idle.contains(&name.as_str()));
        settings::read_json(class.settings(), &path.display().to_string(), &fields)?;
        class.check().map_err(|what| Error::data(path, what))?;
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

/// The first bytes of a file, one more than allowed if it is longer.
fn text_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text)?;
    Ok(text)
}

/// The reason why a folder has no readable `config.json`, with the folder that was probably meant.
fn no_config(folder: &Path, error: &io::Error) -> String {
    let inside = folder.join("vae");
    if inside.join(CONFIG_FILE_NAME).is_file() {
        return format!("is no autoencoder's folder; did you mean {}?", inside.display());
    }
    format!("{CONFIG_FILE_NAME} of the autoencoder cannot be read: {error}")
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
        let error =
            AutoencoderClass::of_fields(fields, Path::new("vae/config.json")).expect_err("it lies");
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
            AutoencoderClass::of_fields(fields, Path::new("config.json")).expect("Wan 2.1's");
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
