//! One bfloat16 step of each family with heads as wide as its published models have them is the
//! float32 step of a CPU, within what bfloat16 rounds: here on a CPU, in `tests/cuda/families.rs`
//! on a GPU, whose kernels of attention exist for such heads only.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use fm_dist::commands::{StepRequest, dump_step};
use fm_dist::config::RunConfig;
use fm_dist::cuda::open_libtorch;
use fm_dist::files::safetensors::{self, SafeTensors};
use fm_dist::rng::{Key, Purpose};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

/// Samples of a step: one of each length where a mask lets texts of unequal lengths through.
const SAMPLES: i64 = 3;

/// Tokens that attend to one another, where no mask hides any: kernels work on blocks of up to 128.
const TOKENS: [i64; 2] = [128, 192];

/// bfloat16 keeps 8 bits: a rounding changes a number by 2^-9 of it at most. The path to a
/// prediction or a gradient has some ten of them, each of another sign, that add up to √10 · 2^-9 =
/// 6e-3 of a norm; a CPU's are 5e-3 to 6e-3 and 3e-3 to 5e-3 in the cases below. The bounds are
/// three times that, because kernels round at other places. A loss averages the errors of 12,000
/// numbers and more: 3e-4 at most.
const PREDICTION: f64 = 2e-2;
const GRADIENT: f64 = 1.5e-2;
const LOSS: f64 = 1e-3;
/// The gradient of one parameter: of itself, or of [`SMALL`] of all gradients together if that is
/// more, because small ones are what is left where large ones cancel. A CPU's are 8e-3 at most.
const PARAMETER: f64 = 3e-2;
const SMALL: f64 = 1.0 / 16.0;

/// Tokens of a text that the other tokens see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// All of them, without a mask where the family can do without.
    All,
    /// A beginning that is equally long in all samples.
    Equal,
    /// A beginning of another length in each sample.
    Unequal,
}

/// One step of a tiny model.
#[derive(Clone, Copy, Debug)]
struct Case {
    head_width: i64,
    /// Tokens of the longest sequence that attends, without masks.
    tokens: i64,
    seen: Seen,
}

/// Where and how a step is computed.
struct Place<'p> {
    device: &'p str,
    dtype: &'p str,
    overrides: &'p [&'p str],
}

/// What the others are compared with.
const EXACT: Place<'static> = Place { device: "cpu", dtype: "float32", overrides: &[] };

/// A family with heads of any width.
pub struct Wide {
    pub name: &'static str,
    adapter: &'static str,
    /// Widths of a head: that of the published models first.
    head_widths: &'static [i64],
    /// True if the family has masks of text.
    masks: bool,
    /// Its tables.
    tables: fn(&Case) -> String,
    /// Shapes of one sample's tensors.
    keys: fn(&Case) -> Vec<Named>,
}

/// Name and shape of a tensor.
type Named = (&'static str, Vec<i64>);

pub const FLUX: Wide = Wide {
    name: "flux",
    adapter: "flux",
    head_widths: &[128, 64],
    masks: true,
    tables: |case| {
        let [width, index, side] = [case.head_width, case.head_width / 8, case.head_width / 16 * 7];
        format!(
            "[model.flux]\nin_channels = 16\nnum_layers = 1\nnum_single_layers = 1\nattention_head_dim = {width}\n\
             num_attention_heads = 2\njoint_attention_dim = 24\npooled_projection_dim = 20\nguidance_embeds = true\n\
             axes_dims_rope = [{index}, {side}, {side}]\n[flow_matching.adapter]\nguidance_scale = 1.0\nuse_text_mask = {}\n",
            case.seen != Seen::All
        )
    },
    keys: |case| {
        vec![
            ("image_latents", vec![4, 16, 16]),
            ("text_embeddings", vec![case.tokens - 64, 24]),
            ("text_mask", vec![case.tokens - 64]),
            ("pooled_prompt_embeds", vec![20]),
        ]
    },
};

pub const FLUX2: Wide = Wide {
    name: "flux2",
    adapter: "flux2",
    head_widths: &[128],
    masks: false,
    tables: |case| {
        let axis = case.head_width / 4;
        format!(
            "[model.flux2]\nin_channels = 16\nnum_layers = 1\nnum_single_layers = 1\nattention_head_dim = {}\n\
             num_attention_heads = 2\njoint_attention_dim = 24\ntimestep_guidance_channels = 32\n\
             axes_dims_rope = [{axis}, {axis}, {axis}, {axis}]\n[flow_matching.adapter]\nguidance_scale = 1.0\n",
            case.head_width
        )
    },
    keys: |case| {
        vec![("image_latents", vec![16, 8, 8]), ("text_embeddings", vec![case.tokens - 64, 24])]
    },
};

pub const QWEN_IMAGE: Wide = Wide {
    name: "qwen_image",
    adapter: "qwen_image",
    head_widths: &[128],
    masks: true,
    tables: |case| {
        let [width, index, side] = [case.head_width, case.head_width / 8, case.head_width / 16 * 7];
        format!(
            "[model.qwen_image]\nin_channels = 16\nout_channels = 4\nnum_layers = 2\nattention_head_dim = {width}\n\
             num_attention_heads = 2\njoint_attention_dim = 24\naxes_dims_rope = [{index}, {side}, {side}]\n\
             [flow_matching.adapter]\nuse_text_mask = {}\n",
            case.seen != Seen::All
        )
    },
    keys: |case| {
        vec![
            ("image_latents", vec![4, 16, 16]),
            ("text_embeddings", vec![case.tokens - 64, 24]),
            ("text_mask", vec![case.tokens - 64]),
        ]
    },
};

pub const WAN: Wide = Wide {
    name: "wan",
    adapter: "simple",
    head_widths: &[128],
    masks: false,
    tables: |case| {
        format!(
            "[model.wan]\nin_channels = 4\nout_channels = 4\nnum_layers = 2\nattention_head_dim = {}\n\
             num_attention_heads = 2\ntext_dim = 24\nfreq_dim = 32\nffn_dim = 512\n",
            case.head_width
        )
    },
    keys: |case| {
        vec![
            ("video_latents", vec![4, case.tokens / 64, 16, 16]),
            ("text_embeddings", vec![case.tokens, 24]),
        ]
    },
};

pub const HUNYUAN_VIDEO15: Wide = Wide {
    name: "hunyuan_video15",
    adapter: "hunyuan",
    head_widths: &[128],
    masks: true,
    tables: |case| {
        let [width, index, side] = [case.head_width, case.head_width / 8, case.head_width / 16 * 7];
        format!(
            "[model.hunyuan_video15]\nin_channels = 9\nout_channels = 4\nnum_layers = 1\nnum_refiner_layers = 1\n\
             attention_head_dim = {width}\nnum_attention_heads = 2\ntext_embed_dim = 24\ntext_embed_2_dim = 20\n\
             image_embed_dim = 16\nrope_axes_dim = [{index}, {side}, {side}]\n\
             [flow_matching.adapter]\ndefault_image_embed_shape = [8, 16]\n"
        )
    },
    // 64 tokens of conditions, and 64 of each latent frame.
    keys: |case| {
        vec![
            ("video_latents", vec![4, case.tokens / 64 - 1, 8, 8]),
            ("text_embeddings", vec![40, 24]),
            ("text_mask", vec![40]),
            ("text_embeddings_2", vec![16, 20]),
            ("text_mask_2", vec![16]),
            ("image_embeds", vec![8, 16]),
        ]
    },
};

impl Wide {
    fn cases(&self) -> Vec<Case> {
        let seen: &[Seen] =
            if self.masks { &[Seen::All, Seen::Equal, Seen::Unequal] } else { &[Seen::All] };
        let case = |head_width, tokens, seen| Case { head_width, tokens, seen };
        let of_width =
            |&width| TOKENS.map(|tokens| seen.iter().map(move |&seen| case(width, tokens, seen)));
        self.head_widths.iter().flat_map(of_width).flatten().collect()
    }

    /// The batch of a case at `path`, of normal numbers.
    fn write_batch(&self, case: &Case, path: &Path) {
        let of_key = |(number, (key, shape)): (usize, (&'static str, Vec<i64>))| {
            let size = [&[SAMPLES], shape.as_slice()].concat();
            let random = || Tensor::randn(&size, (Kind::Float, Device::Cpu));
            match key.starts_with("text_mask") {
                true => (key, mask(shape[0], case.seen)),
                false => (key, Key::new(5, Purpose::Test).scope(number as u64).seeded(random)),
            }
        };
        let tensors: Vec<_> = (self.keys)(case).into_iter().enumerate().map(of_key).collect();
        let named: Vec<(&str, &Tensor)> =
            tensors.iter().map(|(key, tensor)| (*key, tensor)).collect();
        let data_type = if tensors[0].0 == "video_latents" { "video" } else { "image" };
        let metadata = BTreeMap::from([("data_type".to_string(), data_type.to_string())]);
        safetensors::write(&mut File::create(path).unwrap(), &named, &metadata).unwrap();
    }

    /// Everything that one step computes, gradients among it.
    fn step(&self, case: &Case, folder: &Path, place: &Place<'_>) -> SafeTensors {
        let (tables, &Place { device, dtype, overrides }) = ((self.tables)(case), place);
        let own = [
            format!("flow_matching.adapter_type={:?}", self.adapter),
            format!("model.dtype={dtype:?}"),
            format!("parallel.device={device:?}"),
            // Else sinusoids of a thousand radians would show nothing but a timestep of 8 bits.
            "flow_matching.adapter.timestep_dtype=\"float32\"".into(),
        ];
        let all: Vec<String> =
            own.into_iter().chain(overrides.iter().map(ToString::to_string)).collect();
        let config = RunConfig::read(self.name, &tables, &all).unwrap();
        let request = StepRequest {
            batch: folder.join("batch.safetensors"),
            dump: folder.join(format!("{device}-{dtype}.safetensors")),
            weights: None,
            torch_seed: Some(17),
            grads: true,
            operators: false,
        };
        dump_step(&config, &request)
            .unwrap_or_else(|error| panic!("{} {case:?}: {error}", self.name));
        SafeTensors::open(&request.dump).unwrap()
    }

    /// How far a bfloat16 step with the second settings is from one with the first, at the width of
    /// the published models' heads: of the prediction and of all gradients.
    pub fn differences(&self, settings: [&[&str]; 2]) -> [f64; 2] {
        let folder = TempDir::new().unwrap();
        let (head_width, seen) = (self.head_widths[0], Seen::All);
        let case = Case { head_width, tokens: TOKENS[0], seen };
        self.write_batch(&case, &folder.path().join("batch.safetensors"));
        let [expected, found] = settings.map(|overrides| {
            let place = Place { device: "cpu", dtype: "bfloat16", overrides };
            self.step(&case, folder.path(), &place)
        });
        let Errors { prediction, gradient, .. } = Errors::between(&found, &expected);
        [prediction, gradient]
    }

    /// Compares a bfloat16 step on `device` with the float32 step of a CPU, case by case, and
    /// prints a row each. `overrides`: of the configuration of the former.
    pub fn check_on(&self, device: &str, overrides: &[&str]) {
        // Before the first number is drawn.
        if device != "cpu" {
            open_libtorch().unwrap();
        }
        let folder = TempDir::new().unwrap();
        let mut wrong = Vec::new();
        for case in self.cases() {
            self.write_batch(&case, &folder.path().join("batch.safetensors"));
            let expected = self.step(&case, folder.path(), &EXACT);
            let place = Place { device, dtype: "bfloat16", overrides };
            let found = self.step(&case, folder.path(), &place);
            let Case { head_width, tokens, seen } = case;
            let off = Errors::between(&found, &expected);
            let row = format!("| {} {head_width} x {tokens}, {seen:?} | {off}", self.name);
            println!("{row}");
            if !off.are_rounding() {
                wrong.push(row);
            }
        }
        assert!(
            wrong.is_empty(),
            "bounds are {LOSS} of the loss, {PREDICTION} of the prediction, {GRADIENT} of all gradients, \
             {PARAMETER} of one:\n{}",
            wrong.join("\n")
        );
    }
}

/// A mask `[B, length]`.
fn mask(length: i64, seen: Seen) -> Tensor {
    let lengths = match seen {
        Seen::All => [length; SAMPLES as usize],
        Seen::Equal => [length - 7; SAMPLES as usize],
        Seen::Unequal => [length, length - 7, 3],
    };
    let places = Tensor::arange(length, (Kind::Int64, Device::Cpu));
    places.unsqueeze(0).lt_tensor(&Tensor::from_slice(&lengths).unsqueeze(1)).to_kind(Kind::Int64)
}

/// How far a step is from another, relative to the other's norms.
struct Errors {
    loss: f64,
    prediction: f64,
    gradient: f64,
    /// Of the parameter whose gradient is furthest off, with its name.
    parameter: (f64, String),
}

impl Errors {
    fn between(found: &SafeTensors, expected: &SafeTensors) -> Self {
        let read = |file: &SafeTensors, name: &str| file.read(name).unwrap().to_kind(Kind::Double);
        let off = |name: &str| norm(&(read(found, name) - read(expected, name)));
        let size = |name: &str| norm(&read(expected, name));
        let gradients: Vec<&str> = expected
            .tensors()
            .iter()
            .map(|info| info.name.as_str())
            .filter(|name| name.starts_with("grad."))
            .collect();
        let together = |of: &dyn Fn(&str) -> f64| {
            gradients.iter().map(|name| of(name).powi(2)).sum::<f64>().sqrt()
        };
        let whole = together(&size);
        let parameter = gradients
            .iter()
            .map(|name| (off(name) / size(name).max(SMALL * whole), (*name).to_string()))
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .expect("a model has parameters");
        Errors {
            loss: off("average_weighted_loss") / size("average_weighted_loss"),
            prediction: off("model_pred") / size("model_pred"),
            gradient: together(&off) / whole,
            parameter,
        }
    }

    /// False also where one of them is no number.
    fn are_rounding(&self) -> bool {
        self.loss <= LOSS
            && self.prediction <= PREDICTION
            && self.gradient <= GRADIENT
            && self.parameter.0 <= PARAMETER
    }
}

impl std::fmt::Display for Errors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Errors { loss, prediction, gradient, parameter: (parameter, name) } = self;
        write!(
            f,
            "loss {loss:.1e} | prediction {prediction:.1e} | gradients {gradient:.1e} | worst {parameter:.1e} {name}"
        )
    }
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.norm().double_value(&[])
}

#[test]
fn a_bfloat16_step_of_every_family_at_its_real_head_width_is_the_float32_step() {
    for family in [FLUX, FLUX2, QWEN_IMAGE, WAN, HUNYUAN_VIDEO15] {
        family.check_on("cpu", &[]);
    }
}

/// The bounds are narrow enough: a kernel that ignores a mask is found.
#[test]
fn a_mask_changes_a_step_by_more_than_rounding() {
    let folder = TempDir::new().unwrap();
    for family in [FLUX, QWEN_IMAGE, HUNYUAN_VIDEO15] {
        let [all, unequal] = [Seen::All, Seen::Unequal].map(|seen| {
            let case = Case { head_width: 128, tokens: TOKENS[0], seen };
            family.write_batch(&case, &folder.path().join("batch.safetensors"));
            family.step(&case, folder.path(), &EXACT)
        });
        let off = Errors::between(&unequal, &all);
        assert!(!off.are_rounding(), "{}: {off}", family.name);
    }
}

#[test]
fn a_step_that_is_off_by_more_than_rounding_is_found() {
    let exact =
        || Errors { loss: 0.0, prediction: 0.0, gradient: 0.0, parameter: (0.0, String::new()) };
    assert!(exact().are_rounding());
    assert!(!Errors { loss: f64::NAN, ..exact() }.are_rounding());
    assert!(!Errors { prediction: 2.0 * PREDICTION, ..exact() }.are_rounding());
    assert!(!Errors { gradient: f64::INFINITY, ..exact() }.are_rounding());
    assert!(!Errors { parameter: (f64::NAN, String::new()), ..exact() }.are_rounding());
}
