//! Factors of learning rate and weight decay by patterns of parameters.

use crate::error::{Error, Result};
use crate::nn::{ParamInfo, Stage, Tuned};
use crate::settings::GlobMap;
use crate::tuning::names::{longest, matched, nearest};

/// How parameters are updated otherwise than the optimizer's settings say.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'s> {
    /// True if parameters of one axis decay, too.
    pub decays_all: bool,
    /// Factors of the learning rate.
    pub lr: &'s GlobMap<f64>,
    /// Factors of the weight decay.
    pub decay: &'s GlobMap<f64>,
}

impl Factors<'_> {
    /// Returns the stages with the factors of each parameter.
    ///
    /// # Errors
    /// [`Error::Config`] if a pattern matches no trained parameter, with the nearest name, or of
    /// the weight decay none that decays.
    pub fn applied_to(&self, stages: Vec<Box<dyn Stage>>) -> Result<Vec<Box<dyn Stage>>> {
        let are_usual = self.lr.0.is_empty() && self.decay.0.is_empty();
        if are_usual && !self.decays_all {
            return Ok(stages);
        }
        self.check(&stages)?;
        let with_factors = |stage: Box<dyn Stage>| {
            let params = stage.params().clone().with_each(|info| self.set(info));
            Box::new(Tuned::new(stage, params)) as Box<dyn Stage>
        };
        Ok(stages.into_iter().map(with_factors).collect())
    }

    fn check(&self, stages: &[Box<dyn Stage>]) -> Result<()> {
        let trained = || stages.iter().flat_map(|stage| stage.params().trained());
        for (key, map) in [("lr_factors", self.lr), ("decay_factors", self.decay)] {
            let refused = |what| Err(Error::config(format!("optimizer.{key}"), what));
            for (glob, _) in &map.0 {
                let mut meant = trained().filter(|info| matched(glob, &info.name)).peekable();
                if meant.peek().is_none() {
                    let near = nearest(glob, trained().map(|info| info.name.as_str()));
                    let what =
                        format!("`{glob}` matches no trained parameter; the nearest is {near}");
                    return refused(what);
                }
                if key == "decay_factors" && !meant.any(|info| self.decays(info)) {
                    let what = format!(
                        "`{glob}` matches parameters of one axis only, which do not decay; optimizer.decay = \"all\" lets them"
                    );
                    return refused(what);
                }
            }
        }
        Ok(())
    }

    fn decays(&self, info: &ParamInfo) -> bool {
        self.decays_all || info.is_matrix()
    }

    fn set(&self, info: &mut ParamInfo) {
        let factor = |map| *longest(map, |glob| matched(glob, &info.name)).unwrap_or(&1.0);
        let decay = if self.decays(info) { factor(self.decay) } else { 0.0 };
        (info.lr_factor, info.decay_factor) = (factor(self.lr), decay);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, Dit};

    fn map(entries: &[(&str, f64)]) -> GlobMap<f64> {
        GlobMap(entries.iter().map(|(glob, factor)| (glob.to_string(), *factor)).collect())
    }

    fn applied(
        decays_all: bool,
        lr: &[(&str, f64)],
        decay: &[(&str, f64)],
    ) -> Result<Vec<ParamInfo>> {
        let (lr, decay) = (map(lr), map(decay));
        let factors = Factors { decays_all, lr: &lr, decay: &decay };
        let stages = factors.applied_to(Dit::default().stages()?)?;
        Ok(stages.iter().flat_map(|stage| stage.params().infos().to_vec()).collect())
    }

    #[test]
    fn the_longest_pattern_counts_and_the_others_keep_their_factors() {
        let infos =
            applied(false, &[("blocks.*", 0.5), ("blocks.*.bias", 0.1)], &[("blocks.0", 2.0)]);
        for info in infos.expect("sound") {
            let is_bias = info.name.ends_with(".bias");
            let lr = match info.name.starts_with("blocks.") {
                true if is_bias => 0.1,
                true => 0.5,
                false => 1.0,
            };
            let decay = match (info.is_matrix(), info.name.starts_with("blocks.0.")) {
                (false, _) => 0.0,
                (true, true) => 2.0,
                (true, false) => 1.0,
            };
            assert_eq!((info.lr_factor, info.decay_factor), (lr, decay), "{}", info.name);
        }
    }

    #[test]
    fn all_parameters_decay_where_that_is_asked_for() {
        let infos = applied(true, &[], &[("*.bias", 0.0)]).expect("sound");
        let decay = |info: &ParamInfo| if info.name.ends_with(".bias") { 0.0 } else { 1.0 };
        assert!(infos.iter().all(|info| info.decay_factor == decay(info)));
    }

    #[test]
    fn patterns_without_an_effect_are_refused() {
        let refused = |decays_all, lr: &[(&str, f64)], decay: &[(&str, f64)]| {
            applied(decays_all, lr, decay).expect_err("no effect").to_string()
        };
        let text = refused(false, &[("blocs.*", 0.5)], &[]);
        assert!(text.contains("`blocs.*` matches no trained parameter; the nearest is"), "{text}");
        assert!(text.contains("optimizer.lr_factors"), "{text}");
        let text = refused(false, &[], &[("*.bias", 0.5)]);
        assert!(text.contains("matches parameters of one axis only, which do not decay"), "{text}");
        assert!(applied(true, &[], &[("*.bias", 0.5)]).is_ok());
    }
}
