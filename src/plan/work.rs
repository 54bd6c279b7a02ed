//! The work of a forward, stage by stage, from the shapes of its parameters.

use tch::Kind;

use crate::nn::Stage;
use crate::nn::{AttentionInfo, ParamInfo, ParamSet, Tokens};
use crate::plan::footprint::passed_bytes;

/// The cost of one micro-batch's forward in one stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardWork {
    pub parameters: u64,
    /// Those that are trained.
    pub trained: u64,
    /// Floating-point operations of matrix products; an addition and a multiplication are two.
    pub product_flop: f64,
    /// The share of it of matrices that have a gradient.
    pub trained_flop: f64,
    /// Floating-point operations of attention, over all tokens of the data: masked ones are
    /// counted, though adapters cut those that no sample sees.
    pub attention_flop: f64,
    /// Number of matrix products.
    pub products: usize,
    /// Bytes that the products read and write, their matrices aside.
    pub passed_bytes: f64,
}

/// Returns the work of the stages' forwards for `samples` of `tokens` each, computed in `kind`.
pub fn forward_work(
    stages: &[Box<dyn Stage>],
    tokens: Tokens,
    samples: i64,
    kind: Kind,
) -> Vec<ForwardWork> {
    let stage_work = |params: &ParamSet| {
        let matrices = || params.infos().iter().filter(|info| info.shape.len() > 1);
        let product =
            |info: &ParamInfo| 2.0 * (samples * tokens.rows(info.rows) * info.numel()) as f64;
        let attention = |info: &AttentionInfo| {
            let (queries, keys) = (tokens.rows(info.queries), tokens.rows(info.keys));
            4.0 * (samples * queries * keys * info.width()) as f64
        };
        ForwardWork {
            parameters: params.numel() as u64,
            trained: params.num_trained() as u64,
            product_flop: matrices().map(product).sum(),
            trained_flop: matrices().filter(|info| !info.frozen).map(product).sum(),
            attention_flop: params.attentions().iter().map(attention).sum(),
            products: matrices().count(),
            passed_bytes: passed_bytes(params, tokens, samples, kind),
        }
    };
    stages.iter().map(|stage| stage_work(stage.params())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, Dit, Flux, Flux2, HunyuanVideo15, Model, QwenImage, Wan};
    use crate::nn::Rows;
    use crate::settings::Family;

    fn total(model: &dyn Architecture, tokens: Tokens) -> (f64, f64) {
        let work = forward_work(&model.stages().expect("published"), tokens, 1, Kind::BFloat16);
        (
            work.iter().map(|stage| stage.product_flop).sum(),
            work.iter().map(|stage| stage.attention_flop).sum(),
        )
    }

    #[test]
    fn flux_1_dev_computes_what_others_have_counted() {
        let model = Flux { guidance_embeds: true, ..Flux::default() };
        let (products, attention) = total(&model, Tokens { image: 4096, text: 512 });
        // Counted by calflops for the table of huggingface.co/datasets/diffusers/benchmarks: 59 523
        // G, without attention.
        assert!((products / 59_523e9 - 1.0).abs() < 0.01, "{products:e}");
        assert_eq!(attention, 57.0 * 4.0 * 4608.0 * 4608.0 * 3072.0);
    }

    #[test]
    fn every_family_attends_once_a_block_and_where_its_blocks_do() {
        let tokens = Tokens { image: 1000, text: 100 };
        let flop = |queries: f64, keys: f64, width: f64| 4.0 * queries * keys * width;
        let joint = |blocks: f64, width| blocks * flop(1100.0, 1100.0, width);
        assert_eq!(total(&Flux2::default(), tokens).1, joint(56.0, 6144.0));
        assert_eq!(total(&QwenImage::default(), tokens).1, joint(60.0, 3072.0));
        assert_eq!(
            total(&Wan::default(), tokens).1,
            40.0 * (flop(1000.0, 1000.0, 5120.0) + flop(1000.0, 100.0, 5120.0))
        );
        assert_eq!(
            total(&HunyuanVideo15::default(), tokens).1,
            joint(54.0, 2048.0) + 2.0 * flop(100.0, 100.0, 2048.0)
        );
        assert_eq!(total(&Dit::default(), tokens).1, 4.0 * flop(1000.0, 1000.0, 128.0));
    }

    /// A matrix over each family's text tokens; the demo's condition is one vector for each sample.
    const TEXT: [(&str, &str, Rows); 6] = [
        ("dit", "y_embedder.weight", Rows::One),
        ("flux", "context_embedder.weight", Rows::Text),
        ("flux2", "context_embedder.weight", Rows::Text),
        ("qwen_image", "txt_in.weight", Rows::Text),
        ("wan", "condition_embedder.text_embedder.linear_1.weight", Rows::Text),
        ("hunyuan_video15", "context_embedder.proj_in.weight", Rows::Text),
    ];

    #[test]
    fn every_family_says_which_rows_its_text_has_and_where_it_attends() {
        for name in Model::NAMES {
            let model = Model::named(name).expect("a registered name");
            let stages = model.stages().expect("defaults are sound");
            let attentions = stages.iter().map(|stage| stage.params().attentions().len());
            assert!(attentions.sum::<usize>() > 0, "{name} attends nowhere");
            let (_, text, rows) =
                TEXT.iter().find(|(family, _, _)| family == name).expect("a line for each family");
            let mut infos = stages.iter().flat_map(|stage| stage.params().infos());
            let info = infos.find(|info| info.name == *text).expect("a parameter of the family");
            assert_eq!(info.rows, *rows, "{name}");
        }
    }

    #[test]
    fn twice_the_samples_are_twice_the_work_and_not_more_products() {
        let stages = Wan::default().stages().expect("published");
        let work =
            |samples| forward_work(&stages, Tokens { image: 100, text: 10 }, samples, Kind::Float);
        for (one, two) in work(1).into_iter().zip(work(2)) {
            assert_eq!(
                (2.0 * one.product_flop, 2.0 * one.attention_flop),
                (two.product_flop, two.attention_flop)
            );
            assert_eq!(2.0 * one.passed_bytes, two.passed_bytes);
            assert_eq!((one.parameters, one.products), (two.parameters, two.products));
        }
    }
}
