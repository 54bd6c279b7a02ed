//! Each family: the parameters that are trained, and the change of each.

use std::collections::BTreeSet;

use super::*;
use crate::model::Model;
use crate::nn::{Init, ParamInfo};
use crate::settings::{Family, GlobMap};

/// The smallest default of a family would have billions of parameters; only names count here.
fn model(family: &str) -> Model {
    Model::named(family).expect("a registered name")
}

fn lora() -> LoraSettings {
    LoraSettings { rank: Some(4), ..LoraSettings::default() }
}

fn tuned(family: &str, lora: &LoraSettings, trainable: &[&str]) -> Result<Vec<Box<dyn Stage>>> {
    let trainable: Vec<String> = trainable.iter().map(ToString::to_string).collect();
    Tuning { trainable: &trainable, lora, frozen_form: None }.of(&*model(family))
}

fn trained(stages: &[Box<dyn Stage>]) -> Vec<&ParamInfo> {
    stages.iter().flat_map(|stage| stage.params().trained()).collect()
}

/// Ends of the names of changed modules, behind the number of their block.
fn kinds_of_targets(family: &str, targets: &[&str]) -> BTreeSet<String> {
    let target_modules = targets.iter().map(ToString::to_string).collect();
    let stages = tuned(family, &LoraSettings { target_modules, ..lora() }, &[]).expect("sound");
    let kind = |info: &&ParamInfo| {
        let module = info.name.strip_suffix(".lora_A.weight")?.to_string();
        let parts: Vec<&str> =
            module.split('.').filter(|part| part.parse::<u64>().is_err()).collect();
        Some(parts.join("."))
    };
    trained(&stages).iter().filter_map(kind).collect()
}

#[test]
fn attention_means_the_projections_of_the_blocks_of_every_family() {
    let set = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
    let of_double = [
        "transformer_blocks.attn.to_q",
        "transformer_blocks.attn.to_k",
        "transformer_blocks.attn.to_v",
        "transformer_blocks.attn.to_out",
        "transformer_blocks.attn.add_q_proj",
        "transformer_blocks.attn.add_k_proj",
        "transformer_blocks.attn.add_v_proj",
        "transformer_blocks.attn.to_add_out",
    ];
    let of_single =
        ["to_q", "to_k", "to_v"].map(|name| format!("single_transformer_blocks.attn.{name}"));
    let of_single: Vec<&str> = of_single.iter().map(String::as_str).collect();
    let fused =
        ["single_transformer_blocks.attn.to_qkv_mlp_proj", "single_transformer_blocks.attn.to_out"];
    let wide = ["attn1", "attn2"].map(|attention| {
        ["to_q", "to_k", "to_v", "to_out"].map(|name| format!("blocks.{attention}.{name}"))
    });
    let wide: Vec<&str> = wide.as_flattened().iter().map(String::as_str).collect();
    for (family, expected) in [
        ("flux", set(&[&of_double[..], &of_single].concat())),
        ("flux2", set(&[&of_double[..], &fused].concat())),
        ("qwen_image", set(&of_double)),
        ("wan", set(&wide)),
        ("hunyuan_video15", set(&of_double)),
        ("dit", set(&["blocks.attn.qkv", "blocks.attn.proj"])),
    ] {
        assert_eq!(kinds_of_targets(family, &["attention"]), expected, "{family}");
    }
}

#[test]
fn all_linear_means_every_linear_map_and_no_table_or_kernel() {
    for family in Model::NAMES {
        let stages = model(family).stages().expect("defaults are sound");
        let linears = stages.iter().flat_map(|stage| stage.params().linears()).count();
        let lora = LoraSettings { target_modules: vec!["all-linear".into()], ..lora() };
        let stages = tuned(family, &lora, &[]).expect("sound");
        assert_eq!(trained(&stages).len(), 2 * linears, "{family}");
        assert!(
            stages.iter().all(|stage| {
                stage.params().low_ranks().len() == stage.params().linears().count()
            })
        );
    }
    let kinds = kinds_of_targets("wan", &["all-linear"]);
    assert!(!kinds.contains("patch_embedding") && kinds.contains("proj_out"), "{kinds:?}");
    let kinds = kinds_of_targets("hunyuan_video15", &["all-linear"]);
    assert!(!kinds.iter().any(|kind| kind.contains("cond_type_embed")), "{kinds:?}");
    assert!(kinds.contains("context_embedder.token_refiner.refiner_blocks.attn.to_q"));
}

#[test]
fn every_published_family_has_the_adapter_that_peft_counts() {
    // Counted with PEFT's LoraConfig(r=16) on diffusers' classes on the meta device.
    let count = |family: &str, targets: &[&str]| {
        let target_modules = targets.iter().map(ToString::to_string).collect();
        let lora = LoraSettings { rank: Some(16), target_modules, ..lora() };
        let stages = tuned(family, &lora, &[]).expect("sound");
        trained(&stages).iter().map(|info| info.numel()).sum::<i64>()
    };
    let one = |inputs: i64, outputs: i64| 16 * (inputs + outputs);
    assert_eq!(count("flux", &["attention"]), (19 * 8 + 38 * 3) * one(3072, 3072));
    assert_eq!(count("wan", &["to_q", "to_v"]), 40 * 4 * one(5120, 5120));
    assert_eq!(
        count("flux2", &["to_qkv_mlp_proj"]),
        48 * one(6144, 3 * 6144 + 2 * 3 * 6144),
        "one change of the fused projection"
    );
}

#[test]
fn what_is_excluded_stays_and_patterns_give_other_ranks_whatever_their_order() {
    let lora = LoraSettings {
        target_modules: vec!["attn1.*".into()],
        exclude_modules: vec!["blocks.0.*".into()],
        alpha: Some(8.0),
        rank_pattern: GlobMap(vec![("*".into(), 2), ("blocks.3.*".into(), 7), ("to_v".into(), 3)]),
        alpha_pattern: GlobMap(vec![("to_q".into(), 1.0)]),
        ..lora()
    };
    let stages = tuned("wan", &lora, &[]).expect("sound");
    let rank = |name: &str| {
        let infos = trained(&stages);
        infos.iter().find(|info| info.name == name).map(|info| info.shape[0])
    };
    assert_eq!(rank("blocks.0.attn1.to_q.lora_A.weight"), None);
    assert_eq!(rank("blocks.1.attn1.to_q.lora_A.weight"), Some(2));
    assert_eq!(rank("blocks.1.attn1.to_v.lora_A.weight"), Some(3));
    assert_eq!(rank("blocks.3.attn1.to_v.lora_A.weight"), Some(7), "the longest pattern");
    let scales: BTreeSet<String> = stages
        .iter()
        .flat_map(|stage| stage.params().low_ranks())
        .map(|change| format!("{:.4}", change.scale()))
        .collect();
    // 8/2, 8/3, 8/7, 1/2 and 1/7.
    assert_eq!(Vec::from_iter(scales), ["0.1429", "0.5000", "1.1429", "2.6667", "4.0000"]);
    let reversed = LoraSettings {
        rank_pattern: GlobMap(lora.rank_pattern.0.iter().rev().cloned().collect()),
        ..lora.clone()
    };
    let again = tuned("wan", &reversed, &[]).expect("sound");
    assert!(stages.iter().zip(&again).all(|(a, b)| a.params() == b.params()));
}

#[test]
fn scales_and_first_values_are_those_that_were_chosen() {
    let changed = |lora: LoraSettings| {
        let stages = tuned("flux", &lora, &[]).expect("sound");
        let params = stages[1].params();
        let (down, _, magnitude) = params.low_ranks()[0].names(params);
        let info = params.infos().iter().find(|info| info.name == down).expect("A");
        (params.low_ranks()[0].scale(), info.init, magnitude.is_some(), info.precise)
    };
    let rank = |rank| LoraSettings { rank: Some(rank), ..LoraSettings::default() };
    assert_eq!(changed(rank(16)), (1.0, Init::FanIn { fan_in: 3072 }, false, false));
    let gaussian = LoraSettings {
        alpha: Some(32.0),
        init: LoraInit::Gaussian,
        use_dora: true,
        dtype: Some(crate::model::Dtype::Float32),
        ..rank(16)
    };
    assert_eq!(changed(gaussian), (2.0, Init::Normal { std: 0.0625 }, true, true));
    let stabilized =
        LoraSettings { alpha: Some(32.0), use_rslora: true, init: LoraInit::Xavier, ..rank(16) };
    let std = (2.0f64 / 3088.0).sqrt();
    assert_eq!(changed(stabilized), (8.0, Init::Normal { std }, false, false));
}

#[test]
fn only_named_parameters_are_trained() {
    let none = LoraSettings::default();
    let names = |trainable: &[&str], lora: &LoraSettings| -> Vec<String> {
        let stages = tuned("wan", lora, trainable).expect("sound");
        trained(&stages).iter().map(|info| info.name.clone()).collect()
    };
    let last = names(&["blocks.39"], &none);
    assert!(last.len() > 20 && last.iter().all(|name| name.starts_with("blocks.39.")));
    let attention = names(&["attn1", "attn2"], &none);
    assert!(attention.iter().all(|name| name.contains(".attn")), "{attention:?}");
    let both = names(
        &["proj_out"],
        &LoraSettings { target_modules: vec!["blocks.1.attn1.to_q".into()], ..lora() },
    );
    assert_eq!(
        both,
        [
            "blocks.1.attn1.to_q.lora_A.weight",
            "blocks.1.attn1.to_q.lora_B.weight",
            "proj_out.weight",
            "proj_out.bias"
        ]
    );
    let all = tuned("wan", &none, &[]).expect("sound");
    assert!(all.iter().all(|stage| stage.params().num_trained() == stage.params().numel()));
}

#[test]
fn a_pattern_that_matches_nothing_is_told_with_the_nearest_name() {
    let refused = |lora: LoraSettings, trainable: &[&str]| {
        let error = tuned("flux", &lora, trainable).err().expect("refused");
        assert_eq!(error.exit_code(), 50);
        error.to_string()
    };
    let targets = |names: &[&str]| LoraSettings {
        target_modules: names.iter().map(ToString::to_string).collect(),
        ..lora()
    };
    for (lora, trainable, says) in [
        (
            targets(&["attention", "attn.to_qq"]),
            &[][..],
            "lora.target_modules: `attn.to_qq` matches no linear map of the model; the nearest is `attn.to_q`",
        ),
        (
            targets(&["attn.norm_q"]),
            &[],
            "lora.target_modules: `attn.norm_q` matches no linear map of the model",
        ),
        (
            LoraSettings { exclude_modules: vec!["proj_mpl".into()], ..lora() },
            &[],
            "lora.exclude_modules: `proj_mpl` matches no linear map of the model; the nearest is `proj_mlp`",
        ),
        (
            LoraSettings { exclude_modules: vec!["*".into()], ..lora() },
            &[],
            "lora.target_modules: names no linear map of the model that exclude_modules leaves",
        ),
        (
            LoraSettings { rank_pattern: GlobMap(vec![("proj_mlp".into(), 8)]), ..lora() },
            &[],
            "lora.rank_pattern: `proj_mlp` matches no target; the nearest is",
        ),
        (
            LoraSettings::default(),
            &["transformer_block.1"],
            "train.trainable: `transformer_block.1` matches no parameter of the model; the nearest is `transformer_blocks.1",
        ),
    ] {
        let said = refused(lora, trainable);
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn settings_that_would_do_nothing_are_refused() {
    use crate::model::Dtype::{Bfloat16, Float32};
    let keys = |lora: &LoraSettings, model| -> Vec<&str> {
        lora.problems(model).into_iter().map(|(key, _)| key).collect()
    };
    assert!(
        keys(&LoraSettings::default(), Float32).is_empty() && keys(&lora(), Bfloat16).is_empty()
    );
    let without_rank = LoraSettings { alpha: Some(4.0), ..LoraSettings::default() };
    assert_eq!(keys(&without_rank, Float32), ["lora.rank"]);
    let narrow = LoraSettings { dtype: Some(Bfloat16), ..lora() };
    assert_eq!(keys(&narrow, Float32), ["lora.dtype"]);
    assert!(keys(&narrow, Bfloat16).is_empty());
}
