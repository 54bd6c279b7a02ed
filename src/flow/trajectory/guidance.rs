//! Guidance: how closely samples follow their conditions.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::flow::SamplingSettings;

/// The meaning of a guidance scale for a family's models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guidance {
    /// The distance from the unconditional velocity is multiplied by `scale`.
    ///
    /// Source: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, in velocities.
    ClassifierFree,
    /// As [`ClassifierFree`](Guidance::ClassifierFree), but each square patch of the result is
    /// rescaled to its norm in the conditional velocity.
    ///
    /// Source: `QwenImagePipeline` of diffusers 0.42.1, whose tokens are the patches.
    Rescaled { patch_size: i64 },
    /// The model takes the scale as an input; classifier-free guidance is added if there are
    /// negative conditions.
    Embedded,
}

/// A family's guidance at the scales of one call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guide {
    guidance: Guidance,
    /// Scale of classifier-free guidance; 1 disables it.
    scale: f64,
    /// Scale for a model that embeds its guidance; `None` selects the adapter's own.
    pub embedded: Option<f64>,
}

impl Guide {
    /// Returns the guidance that the settings select, with or without negative conditions.
    ///
    /// # Errors
    /// [`Error::Config`] if the family has no such scale, or if conditions or a scale would be
    /// unused.
    pub fn new(
        guidance: Guidance,
        settings: &SamplingSettings,
        has_negative: bool,
    ) -> Result<Self> {
        let (embeds, own) = (guidance == Guidance::Embedded, settings.guidance_scale == 0.0);
        let (key, scale) = match embeds {
            true => ("sampling.true_cfg_scale", settings.true_cfg_scale),
            false => ("sampling.guidance_scale", if own { 1.0 } else { settings.guidance_scale }),
        };
        if !embeds && settings.true_cfg_scale != 1.0 {
            let what =
                "is for families whose models embed their guidance; here guidance_scale is it";
            return Err(Error::config("sampling.true_cfg_scale", what));
        }
        if has_negative && scale == 1.0 {
            return Err(Error::config(
                key,
                "is 1, which leaves the negative conditions unused; raise it or leave them out",
            ));
        }
        if embeds && !has_negative && scale != 1.0 {
            return Err(Error::config(
                key,
                "needs negative conditions, which are missing, to guide away from",
            ));
        }
        Ok(Guide { guidance, scale, embedded: (embeds && !own).then_some(settings.guidance_scale) })
    }

    /// True if the unconditional velocity is used.
    pub fn is_used(&self) -> bool {
        self.scale != 1.0
    }

    /// Returns the guided velocity; the unconditional one is computed only if it is used.
    ///
    /// # Shapes
    /// Both `[B, C, (F,) H, W]`, as is the result.
    pub fn velocity(
        &self,
        conditional: Tensor,
        unconditional: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !self.is_used() {
            return Ok(conditional);
        }
        let unconditional = unconditional()?;
        let guided = &unconditional + (&conditional - &unconditional) * self.scale;
        Ok(match self.guidance {
            Guidance::Rescaled { patch_size } => with_norms_of(&conditional, &guided, patch_size),
            _ => guided,
        })
    }
}

/// Returns `guided`, rescaled so that each patch, over its channels, rows and columns, has its norm
/// in `conditional`; both `[B, C, H, W]`.
fn with_norms_of(conditional: &Tensor, guided: &Tensor, patch_size: i64) -> Tensor {
    let (batch, channels, height, width) =
        guided.size4().expect("the family's latents are [B, C, H, W]");
    let patches =
        [batch, channels, height / patch_size, patch_size, width / patch_size, patch_size];
    let norm = |velocity: &Tensor| {
        velocity.square().sum_dim_intlist([1i64, 3, 5].as_slice(), true, velocity.kind()).sqrt()
    };
    let (conditional, guided) = (conditional.reshape(patches), guided.reshape(patches));
    // A velocity that is zero everywhere stays zero.
    let ratio = norm(&conditional) / norm(&guided).clamp_min(f64::from(f32::MIN_POSITIVE));
    (guided * ratio).reshape([batch, channels, height, width])
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::rng::{Key, Purpose};

    fn guide(
        guidance: Guidance,
        guidance_scale: f64,
        true_cfg_scale: f64,
        has_negative: bool,
    ) -> Result<Guide> {
        let settings =
            SamplingSettings { guidance_scale, true_cfg_scale, ..SamplingSettings::default() };
        Guide::new(guidance, &settings, has_negative)
    }

    #[test]
    fn scales_and_negative_conditions_are_used_or_refused() {
        use Guidance::{ClassifierFree, Embedded};
        let refused = |guidance, scales: (f64, f64), has_negative| match guide(
            guidance,
            scales.0,
            scales.1,
            has_negative,
        ) {
            Err(error) => error.to_string(),
            Ok(found) => panic!("{found:?}"),
        };
        assert!(
            refused(ClassifierFree, (0.0, 1.0), true)
                .contains("sampling.guidance_scale: is 1, which leaves")
        );
        assert!(
            refused(ClassifierFree, (4.0, 2.0), false)
                .contains("sampling.true_cfg_scale: is for families")
        );
        assert!(
            refused(Embedded, (3.5, 1.0), true)
                .contains("sampling.true_cfg_scale: is 1, which leaves")
        );
        assert!(
            refused(Embedded, (3.5, 4.0), false)
                .contains("sampling.true_cfg_scale: needs negative conditions")
        );
        let found = guide(Embedded, 3.5, 4.0, true).expect("both scales are used");
        assert_eq!((found.scale, found.embedded), (4.0, Some(3.5)));
        assert_eq!(guide(Embedded, 0.0, 1.0, false).expect("the adapter's own").embedded, None);
    }

    #[test]
    fn one_pass_is_enough_where_the_scale_is_one() {
        let conditional = Tensor::from_slice(&[1.0f32, 2.0]);
        let found = guide(Guidance::ClassifierFree, 0.0, 1.0, false).expect("no guidance");
        let velocity = found
            .velocity(conditional.copy(), || panic!("a second pass"))
            .expect("no error inside");
        assert_eq!(velocity, conditional);
    }

    #[test]
    fn each_patch_keeps_the_norm_of_the_conditional_velocity() {
        let float = (Kind::Float, Device::Cpu);
        let draw = || (Tensor::randn([2, 3, 4, 6], float), Tensor::randn([2, 3, 4, 6], float));
        let (conditional, unconditional) = Key::new(1, Purpose::Test).seeded(draw);
        let rescaled =
            guide(Guidance::Rescaled { patch_size: 2 }, 4.0, 1.0, false).expect("sound scales");
        let found = rescaled
            .velocity(conditional.copy(), || Ok(unconditional.copy()))
            .expect("no error inside");
        let patch = |velocity: &Tensor| {
            velocity.narrow(2, 2, 2).narrow(3, 4, 2).select(0, 1).norm().double_value(&[])
        };
        assert!((patch(&found) - patch(&conditional)).abs() < 1e-5);
        assert!(
            (&found - &conditional).abs().max().double_value(&[]) > 0.1,
            "the direction is another"
        );
        let still = rescaled
            .velocity(conditional.zeros_like(), || Ok(conditional.zeros_like()))
            .expect("no error inside");
        assert_eq!(
            still,
            conditional.zeros_like(),
            "a model that has learned nothing yet stands still"
        );
    }
}
