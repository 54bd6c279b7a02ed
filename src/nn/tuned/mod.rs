//! A stage of which not every parameter is trained, or whose linear maps are changed.

mod dropping;
mod low_rank;

pub use dropping::DROPOUT_KEYS;
pub(super) use dropping::Dropping;
pub use low_rank::{LowRank, LowRankChange};

use super::{Activations, ParamSet, Stage, Views};

/// A stage with another set of parameters: the same ones, some of them frozen, and others beside
/// them. The stage itself knows nothing of it, since its handles stay valid.
pub struct Tuned {
    stage: Box<dyn Stage>,
    params: ParamSet,
}

impl Tuned {
    /// `params`: made from the stage's own.
    pub fn new(stage: Box<dyn Stage>, params: ParamSet) -> Self {
        Tuned { stage, params }
    }

    /// The stage with every parameter frozen.
    pub fn frozen(stage: Box<dyn Stage>) -> Self {
        let params = stage.params().freezing(|_| true);
        Tuned { stage, params }
    }
}

impl Stage for Tuned {
    fn params(&self) -> &ParamSet {
        &self.params
    }

    fn forward(&self, params: &Views, input: &Activations) -> Activations {
        let drops = self.params.low_ranks().iter().any(LowRank::drops);
        match input.find(DROPOUT_KEYS).filter(|_| drops) {
            Some(keys) => {
                // Families with joint sequences have the text's tokens among their inputs.
                let text = input.find("encoder_hidden_states").map_or(0, |text| text.size()[1]);
                let dropping = Dropping::new(keys, text, input.find("text_places"));
                self.stage.forward(&params.dropping(dropping), input)
            }
            None => self.stage.forward(params, input),
        }
    }
}
