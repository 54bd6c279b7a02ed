//! Buckets: the few sizes to which pictures are brought, so that samples share batches.
//!
//! Source of the 14 ratios and of the rounding: NeMo AutoModel 0.5.0, `MultiTierBucketCalculator`.

use crate::media::Size;

/// Width and height of the reference's ratios.
const REFERENCE_RATIOS: [(u32, u32); 14] = [
    (1, 2),
    (9, 16),
    (2, 3),
    (3, 4),
    (4, 5),
    (1, 1),
    (5, 4),
    (4, 3),
    (3, 2),
    (16, 10),
    (5, 3),
    (16, 9),
    (2, 1),
    (21, 9),
];

/// Most pixels of a bucket, and most ratios between two.
const MOST_PIXELS: u64 = 64 << 20;
const MOST_RATIOS: usize = 256;

/// Ratios of width to height that have a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ratios {
    /// The 14 of the reference. A picture goes to the nearest by difference.
    Reference,
    /// `count` from `least` to `most`, each as many times the one before, as diffusion-pipe has
    /// them. A picture goes to the nearest by quotient.
    Geometric { least: f64, most: f64, count: usize },
}

/// Options of buckets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BucketOptions {
    /// Buckets of at most `pixels`, whose sides are multiples of `multiple`. With `no_upscale`, a
    /// side of a bucket that is longer than the picture's is cut to it, as far as multiples go.
    Budget { pixels: u64, multiple: u32, ratios: Ratios, no_upscale: bool },
    /// One bucket for all pictures.
    One(Size),
}

/// The buckets of a dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Buckets {
    /// Rising by their ratios.
    sizes: Vec<Size>,
    by_quotient: bool,
    /// The multiple of the sides of buckets that are cut for small pictures.
    cut_to: Option<u32>,
}

impl Buckets {
    /// # Errors
    /// A text that says which option is out of its range.
    pub fn new(options: BucketOptions) -> Result<Self, String> {
        let (pixels, multiple, ratios, no_upscale) = match options {
            BucketOptions::One(size) => {
                return match size.pixels() {
                    1..=MOST_PIXELS => {
                        Ok(Buckets { sizes: vec![size], by_quotient: false, cut_to: None })
                    }
                    _ => Err(format!("a bucket has 1 to {MOST_PIXELS} pixels, not {size}")),
                };
            }
            BucketOptions::Budget { pixels, multiple, ratios, no_upscale } => {
                (pixels, multiple, ratios, no_upscale)
            }
        };
        if multiple == 0 || !(u64::from(multiple).pow(2)..=MOST_PIXELS).contains(&pixels) {
            return Err(format!(
                "buckets of {pixels} pixels cannot have sides that are multiples of {multiple}; at \
                 least its square and at most {MOST_PIXELS} are possible"
            ));
        }
        let ratios_listed = listed(ratios)?;
        let largest = |ratio: &f64| largest_size(*ratio, pixels, multiple);
        let mut sizes: Vec<Size> = ratios_listed.iter().filter_map(largest).collect();
        // Sorting is stable, and two sizes of one ratio stay in the order of the ratios.
        let mut seen = std::collections::BTreeSet::new();
        sizes.retain(|size| seen.insert(*size));
        sizes.sort_by(|one, other| one.ratio().total_cmp(&other.ratio()));
        if sizes.is_empty() {
            return Err(format!("no ratio has a bucket of at most {pixels} pixels"));
        }
        let by_quotient = ratios != Ratios::Reference;
        Ok(Buckets { sizes, by_quotient, cut_to: no_upscale.then_some(multiple) })
    }

    pub fn sizes(&self) -> &[Size] {
        &self.sizes
    }

    /// Returns the bucket of a picture: that of the nearest ratio, the narrower one of two. It is
    /// `None` if the picture is smaller than any bucket may be cut to.
    pub fn size_for(&self, picture: Size) -> Option<Size> {
        let distance = |size: &Size| match self.by_quotient {
            true => (size.ratio().ln() - picture.ratio().ln()).abs(),
            false => (size.ratio() - picture.ratio()).abs(),
        };
        let nearest = self.sizes.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
        let Some(multiple) = self.cut_to else { return Some(*nearest) };
        let cut = |bucket: u32, own: u32| bucket.min(own / multiple * multiple);
        let size =
            Size::new(cut(nearest.width, picture.width), cut(nearest.height, picture.height));
        (size.pixels() > 0).then_some(size)
    }
}

/// Returns the ratios themselves.
fn listed(ratios: Ratios) -> Result<Vec<f64>, String> {
    match ratios {
        Ratios::Reference => {
            Ok(REFERENCE_RATIOS.map(|(w, h)| f64::from(w) / f64::from(h)).to_vec())
        }
        Ratios::Geometric { least, most, count } => {
            let is_sound = least.is_finite() && most.is_finite() && 0.0 < least && least <= most;
            if !is_sound || !(1..=MOST_RATIOS).contains(&count) {
                return Err(format!(
                    "ratios from {least} to {most} in {count} steps: they must be positive and \
                     rise, in 1 to {MOST_RATIOS} steps"
                ));
            }
            let step = (most / least).ln() / count.saturating_sub(1).max(1) as f64;
            Ok((0..count).map(|index| least * (step * index as f64).exp()).collect())
        }
    }
}

/// Returns the largest size of a ratio within a budget: the height of the exact one and the width
/// that belongs to it, each rounded to a multiple, half to even; then the longer side is shortened
/// until the budget holds.
fn largest_size(ratio: f64, pixels: u64, multiple: u32) -> Option<Size> {
    let step = f64::from(multiple);
    let rounded = |length: f64| (length.trunc() / step).round_ties_even() * step;
    let mut height = rounded((pixels as f64 / ratio).sqrt());
    let mut width = rounded(height * ratio);
    while width * height > pixels as f64 {
        match width >= height {
            true => width -= step,
            false => height -= step,
        }
    }
    (width >= step && height >= step).then(|| Size::new(width as u32, height as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(side: u64, multiple: u32) -> BucketOptions {
        let ratios = Ratios::Reference;
        BucketOptions::Budget { pixels: side * side, multiple, ratios, no_upscale: false }
    }

    fn sizes(options: BucketOptions) -> String {
        let buckets = Buckets::new(options).expect("the options are sound");
        let sizes: Vec<String> = buckets.sizes().iter().map(Size::to_string).collect();
        sizes.join(" ")
    }

    #[test]
    fn the_references_buckets_are_these() {
        assert_eq!(sizes(budget(256, 64)), "192x320 192x256 256x256 256x192 320x192");
        assert_eq!(sizes(budget(512, 64)), "384x640 448x576 512x512 576x448 640x384 768x320");
        assert_eq!(
            sizes(budget(512, 16)),
            "352x720 384x672 416x624 448x576 464x560 512x512 560x464 576x448 624x416 640x400 \
             672x384 704x368 768x336"
        );
        assert_eq!(
            sizes(budget(1024, 64)),
            "768x1344 832x1216 896x1152 1024x1024 1152x896 1216x832 1280x768 1344x768 1408x704 \
             1472x640"
        );
    }

    #[test]
    fn ratios_of_a_budget_are_spread_evenly() {
        let ratios = Ratios::Geometric { least: 0.5, most: 2.0, count: 5 };
        let options =
            BucketOptions::Budget { pixels: 512 * 512, multiple: 32, ratios, no_upscale: false };
        assert_eq!(sizes(options), "384x672 416x608 512x512 576x416 704x352");
        let buckets = Buckets::new(options).expect("the options are sound");
        let of = |width| buckets.size_for(Size::new(width, 1000)).map(|it| it.to_string());
        // Between both in the middle of their logarithms, not of their ratios.
        assert_eq!(of(1659), Some("576x416".into()));
        assert_eq!(of(1669), Some("704x352".into()));
        assert_eq!(of(90_000), Some("704x352".into()));
        assert!(buckets.sizes().iter().all(|size| size.pixels() <= 512 * 512));
    }

    #[test]
    fn small_pictures_are_not_enlarged_if_that_is_asked() {
        let ratios = Ratios::Reference;
        let options =
            BucketOptions::Budget { pixels: 1 << 20, multiple: 64, ratios, no_upscale: true };
        let buckets = Buckets::new(options).expect("the options are sound");
        let of =
            |width, height| buckets.size_for(Size::new(width, height)).map(|it| it.to_string());
        assert_eq!(of(500, 400), Some("448x384".into()));
        assert_eq!(of(3000, 100), Some("1472x64".into()));
        assert_eq!(of(4000, 3000), Some("1152x896".into()));
        assert_eq!(of(63, 400), None);
    }

    #[test]
    fn one_bucket_takes_everything() {
        let size = Size::new(64, 48);
        let buckets = Buckets::new(BucketOptions::One(size)).expect("the options are sound");
        assert_eq!(buckets.size_for(Size::new(1, 900)), Some(size));
    }

    #[test]
    fn options_out_of_their_ranges_are_refused() {
        let refused = |options| Buckets::new(options).expect_err("it is refused");
        assert!(refused(budget(16, 64)).contains("at least its square"));
        assert!(refused(budget(1 << 20, 64)).contains("at least its square"));
        assert!(refused(budget(16, 0)).contains("multiples of 0"));
        assert!(refused(BucketOptions::One(Size::new(0, 64))).contains("not 0x64"));
        for (least, most, count) in
            [(0.0, 1.0, 2), (2.0, 1.0, 2), (0.5, f64::NAN, 2), (0.5, 2.0, 0)]
        {
            let ratios = Ratios::Geometric { least, most, count };
            let options =
                BucketOptions::Budget { pixels: 1 << 18, multiple: 16, ratios, no_upscale: false };
            assert!(refused(options).contains("must be positive and rise"));
        }
    }
}
