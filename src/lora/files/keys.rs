//! Names of tensors in files of LoRAs: a prefix, the module, and the role in its pair.

/// The role of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    A,
    B,
    Alpha,
    Magnitude,
}

/// The prefix of a name, which tells its dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Prefix {
    /// `base_model.model.`.
    Peft,
    /// `transformer.`, or nothing.
    Diffusers,
    /// `diffusion_model.`.
    Comfyui,
    /// `lora_unet_` and alike.
    Kohya,
}

#[derive(Clone, Copy, Debug)]
pub struct Key<'n> {
    /// Prefix and module, by which the tensors of a pair belong together.
    pub stem: &'n str,
    pub prefix: Prefix,
    pub module: &'n str,
    pub role: Role,
}

const PREFIXES: [(&str, Prefix); 8] = [
    ("base_model.model.", Prefix::Peft),
    ("model.diffusion_model.", Prefix::Comfyui),
    ("diffusion_model.", Prefix::Comfyui),
    ("transformer.", Prefix::Diffusers),
    ("lora_unet_", Prefix::Kohya),
    // OneTrainer's and SimpleTuner's.
    ("lora_transformer_", Prefix::Kohya),
    ("lycoris_", Prefix::Kohya),
    ("", Prefix::Diffusers),
];

const SUFFIXES: [(&str, Role); 12] = [
    (".lora_A.weight", Role::A),
    (".lora_B.weight", Role::B),
    (".lora_A.default.weight", Role::A),
    (".lora_B.default.weight", Role::B),
    (".lora_down.weight", Role::A),
    (".lora_up.weight", Role::B),
    (".lora.down.weight", Role::A),
    (".lora.up.weight", Role::B),
    (".alpha", Role::Alpha),
    (".dora_scale", Role::Magnitude),
    (".lora_magnitude_vector", Role::Magnitude),
    (".lora_magnitude_vector.weight", Role::Magnitude),
];

/// Name for the tensors of a text encoder's LoRA.
pub const TEXT_ENCODER: &str = "a LoRA of a text encoder";

/// Parts of names that are of another method, and what they are.
const OTHERS: [(&str, &str); 7] = [
    ("lora_te", TEXT_ENCODER),
    ("text_encoder", TEXT_ENCODER),
    (".lokr_", "a LoKr"),
    (".hada_", "a LoHa"),
    (".lora_mid.", "a LoRA of convolutions"),
    (".lora_B.bias", "a bias of a LoRA"),
    (".lora_B.default.bias", "a bias of a LoRA"),
];

/// Takes a name apart.
///
/// # Errors
/// A name for what it is instead, if it is recognized.
pub fn parse(name: &str) -> Result<Key<'_>, Option<&'static str>> {
    let starts_or_holds = |part: &str| match part.starts_with('.') {
        true => name.contains(part),
        false => name.starts_with(part),
    };
    if let Some((_, what)) = OTHERS.iter().find(|(part, _)| starts_or_holds(part)) {
        return Err(Some(what));
    }
    if name.ends_with(".diff") || name.ends_with(".diff_b") {
        return Err(Some("a difference of whole weights"));
    }
    let role = |&(suffix, role): &(&str, Role)| name.strip_suffix(suffix).map(|stem| (stem, role));
    let (stem, role) = SUFFIXES.iter().find_map(role).ok_or(None)?;
    let prefix =
        |&(text, prefix): &(&str, Prefix)| stem.strip_prefix(text).map(|module| (module, prefix));
    let (module, prefix) = PREFIXES.iter().find_map(prefix).ok_or(None)?;
    Ok(Key { stem, prefix, module, role })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        for (name, prefix, module, role) in [
            ("transformer.proj_out.lora_A.weight", Prefix::Diffusers, "proj_out", Role::A),
            ("proj_out.lora_B.default.weight", Prefix::Diffusers, "proj_out", Role::B),
            (
                "transformer_blocks.0.attn.to_q.alpha",
                Prefix::Diffusers,
                "transformer_blocks.0.attn.to_q",
                Role::Alpha,
            ),
            (
                "diffusion_model.blocks.1.ffn.0.lora_up.weight",
                Prefix::Comfyui,
                "blocks.1.ffn.0",
                Role::B,
            ),
            ("lora_unet_blocks_1_ffn_0.lora_down.weight", Prefix::Kohya, "blocks_1_ffn_0", Role::A),
            (
                "lora_unet_blocks_1_ffn_0.dora_scale",
                Prefix::Kohya,
                "blocks_1_ffn_0",
                Role::Magnitude,
            ),
            (
                "base_model.model.proj_out.lora_magnitude_vector",
                Prefix::Peft,
                "proj_out",
                Role::Magnitude,
            ),
        ] {
            let key = parse(name).expect("a key");
            assert_eq!((key.prefix, key.module, key.role), (prefix, module, role), "{name}");
        }
    }

    #[test]
    fn tensors_of_other_methods_are_called_what_they_are() {
        for (name, what) in [
            (
                "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
                Some("a LoRA of a text encoder"),
            ),
            ("text_encoder.text_model.x.lora_A.weight", Some("a LoRA of a text encoder")),
            ("lycoris_blocks_0_ffn_0.lokr_w1", Some("a LoKr")),
            ("diffusion_model.blocks.0.ffn.0.diff_b", Some("a difference of whole weights")),
            ("transformer.proj_out.weight", None),
            ("lora_A.weight", None),
        ] {
            assert_eq!(parse(name).expect_err("no key"), what, "{name}");
        }
    }
}
