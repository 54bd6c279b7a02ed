//! Checks that an adapter with its settings prepares the inputs that a model takes.

use super::AdapterChoice;
use crate::model::Model;
use crate::settings::Family;

/// A value that an adapter's setting must have for a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Need {
    /// Name of the key in `[flow_matching.adapter]`.
    pub key: &'static str,
    /// The value as TOML.
    pub value: String,
    /// The reason, as a sentence without its full stop.
    pub why: String,
}

impl Need {
    fn assignment(&self) -> String {
        format!("flow_matching.adapter.{} = {}", self.key, self.value)
    }
}

impl AdapterChoice {
    /// Returns keys and lines that explain why the adapter does not fit `model`, and which values
    /// would.
    pub fn misfits(&self, model: &Model) -> Vec<(String, String)> {
        if self.name() != model.adapter() {
            return vec![("flow_matching.adapter_type".into(), self.other_than(model))];
        }
        let told = |need: Need| {
            (
                format!("flow_matching.adapter.{}", need.key),
                format!("{}; set {}", need.why, need.assignment()),
            )
        };
        self.needs(model).into_iter().map(told).collect()
    }

    fn other_than(&self, model: &Model) -> String {
        let (name, wanted) = (self.name(), model.adapter());
        let fitting = AdapterChoice::named(wanted).expect("a model names an adapter that there is");
        let mut steps = vec![format!("flow_matching.adapter_type = \"{wanted}\"")];
        steps.extend(fitting.needs(model).iter().map(Need::assignment));
        let model = model.name();
        format!(
            "`{name}` does not prepare what the model `{model}` takes; set {}, and no arguments of `{name}`",
            steps.join(" and ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Flux, Hunyuan, Simple};
    use crate::model::{HunyuanVideo15, Wan};

    #[test]
    fn each_family_names_an_adapter_that_gives_all_it_needs() {
        for name in Model::NAMES {
            let model = Model::named(name).expect("its own name");
            let adapter = AdapterChoice::named(model.adapter())
                .unwrap_or_else(|| panic!("{name}: `{}`", model.adapter()));
            assert_eq!(adapter.misfits(&model), [], "{name}");
            for input in model.inputs() {
                assert!(adapter.build().provides().contains(&input), "{name}: {input}");
            }
        }
    }

    #[test]
    fn a_misfit_is_told_with_all_that_must_be_set() {
        let image_to_video =
            Model::Wan(Wan { in_channels: 36, out_channels: 16, ..Wan::default() });
        let told = |adapter: AdapterChoice, model: &Model| {
            let [(key, what)] = adapter.misfits(model).try_into().expect("one misfit");
            format!("{key}: {what}")
        };
        assert_eq!(
            told(AdapterChoice::Simple(Simple::default()), &image_to_video),
            "flow_matching.adapter.image_conditioning: is false, the model `wan` is conditioned on images; \
             set flow_matching.adapter.image_conditioning = true"
        );
        assert_eq!(
            told(
                AdapterChoice::Simple(Simple { image_conditioning: true, ..Simple::default() }),
                &Model::Wan(Wan::default())
            ),
            "flow_matching.adapter.image_conditioning: is true, the model `wan` is not conditioned on images; \
             set flow_matching.adapter.image_conditioning = false"
        );
        assert_eq!(
            told(AdapterChoice::Flux(Flux::default()), &image_to_video),
            "flow_matching.adapter_type: `flux` does not prepare what the model `wan` takes; set flow_matching.adapter_type = \"simple\" \
             and flow_matching.adapter.image_conditioning = true, and no arguments of `flux`"
        );
        let hunyuan = Model::HunyuanVideo15(HunyuanVideo15 {
            image_embed_dim: 3,
            ..HunyuanVideo15::default()
        });
        let keys: Vec<String> =
            AdapterChoice::Hunyuan(Hunyuan { use_condition_latents: false, ..Hunyuan::default() })
                .misfits(&hunyuan)
                .into_iter()
                .map(|(key, what)| format!("{key}: {what}"))
                .collect();
        assert_eq!(
            keys,
            [
                "flow_matching.adapter.use_condition_latents: is false, the model `hunyuan_video15` takes `condition_latents` \
                 (in_channels are more than the latents'); set flow_matching.adapter.use_condition_latents = true",
                "flow_matching.adapter.default_image_embed_shape: has 1152 features, the model's image_embed_dim is 3; \
                 set flow_matching.adapter.default_image_embed_shape = [729, 3]",
            ]
        );
    }
}
