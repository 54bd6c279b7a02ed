//! The shapes of batches, which follow from those of the files, the padding of texts and the
//! latents of masks.

use std::collections::BTreeMap;

use super::Dataset;
use super::pixel_masks::{LOSS_MASK, shrunk_shape};
use super::unequal::{TEXTS, mask_of};
use crate::data::group::{Group, latents_key};

impl Dataset {
    /// Returns the shape of one sample's latents in a batch, `[C, (F,) H, W]`.
    pub fn latent_shape(&self, group: &Group) -> Vec<i64> {
        self.framed(group, latents_key(group.data_type), &group.latents().shape)
    }

    /// Returns the shapes of one sample's tensors in the batch of a group that has its longest
    /// texts, by key: texts of unequal length are padded, and come with their masks, masks of
    /// pixels are those of the latents, and images have a frame if they become videos.
    pub fn sample_shapes(&self, group: &Group) -> BTreeMap<String, Vec<i64>> {
        let mut shapes = BTreeMap::new();
        for (key, tensor) in &group.layout {
            let changed = self.changed_shape(group, key);
            let shape = changed.unwrap_or_else(|| tensor.shape.clone());
            let mut shape = self.framed(group, key, &shape);
            if let Some(mask) = mask_of(key).filter(|_| tensor.unequal) {
                shape[0] = self.padded_length(key, shape[0]);
                shapes.insert(mask.into(), vec![shape[0]]);
            }
            shapes.insert(key.clone(), shape);
        }
        shapes
    }

    /// Returns the shape of a sample's tensor in batches, if it has one length and another shape
    /// than it is stored with.
    pub(super) fn changed_shape(&self, group: &Group, key: &str) -> Option<Vec<i64>> {
        let tensor = group.layout.get(key)?;
        if key == LOSS_MASK {
            return shrunk_shape(&tensor.shape, &group.latents().shape);
        }
        self.padding.extended(key, tensor)
    }

    /// Returns the number of tokens of the shortest text that is stored with one length and gets
    /// more padding in batches.
    pub fn extended_text(&self) -> Option<i64> {
        let texts = self.groups.iter().filter_map(|group| group.layout.get(TEXTS[0].0));
        let extended = texts.filter(|text| self.padding.extended(TEXTS[0].0, text).is_some());
        extended.map(|text| text.shape[0]).min()
    }

    /// True if a group holds texts of unequal length, which batches pad.
    pub fn pads_texts(&self) -> bool {
        self.groups.iter().flat_map(|group| group.layout.values()).any(|tensor| tensor.unequal)
    }
}
