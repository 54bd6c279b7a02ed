//! The parts of a stage's flat buffer that are held alike: frozen or trained, in one kind.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{ParamInfo, ParamSet};
use crate::nn::Packed;

/// Consecutive parameters of a stage that are frozen or trained alike and held in one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Class {
    /// Indexes of its parameters among the set's infos.
    infos: Range<usize>,
    /// Its elements of the stage's flat buffer.
    pub elements: Range<i64>,
    pub frozen: bool,
    /// The kind that it is held in: that which it is computed in, or that of packed words.
    pub kind: Kind,
    /// Its parameters if they are packed; empty if they are not.
    packed: Vec<Packed>,
}

impl Class {
    /// Indexes of its parameters among the set's infos.
    pub fn infos(&self) -> Range<usize> {
        self.infos.clone()
    }

    /// Number of its elements.
    pub fn numel(&self) -> i64 {
        self.elements.end - self.elements.start
    }

    /// Length of a tensor that holds it: its elements, or the words that they are packed in.
    pub fn length(&self) -> i64 {
        match self.packed[..] {
            [] => self.numel(),
            ref packed => packed.iter().map(Packed::words).sum(),
        }
    }

    /// Returns what is held of its elements `[numel]`: themselves, or the words `[length]`, which
    /// are packed on `device`.
    pub fn held(&self, elements: &Tensor, device: Device) -> Tensor {
        if self.packed.is_empty() {
            return elements.shallow_clone();
        }
        let sizes: Vec<i64> = self.packed.iter().map(Packed::numel).collect();
        let parts = elements.split_with_sizes(sizes, 0);
        let words = Tensor::empty([self.length()], (self.kind, device));
        let places = self.packed_parts(&words);
        for ((packed, part), mut place) in self.packed.iter().zip(&parts).zip(places) {
            place.copy_(&packed.pack(&part.to_device(device)));
        }
        words
    }

    /// Returns its elements `[numel]`, f32, from what is held of them, `[length]`.
    pub fn elements_of(&self, held: &Tensor) -> Tensor {
        if self.packed.is_empty() {
            return held.to_kind(Kind::Float);
        }
        let parts = self.packed_parts(held);
        let numbers =
            |(packed, words): (&Packed, &Tensor)| packed.unpack(words, Kind::Float).view([-1]);
        Tensor::cat(&self.packed.iter().zip(&parts).map(numbers).collect::<Vec<_>>(), 0)
    }

    /// One view of what is held for each of its parameters; the rest is padding.
    pub(in crate::nn) fn split(&self, infos: &[ParamInfo], held: &Tensor) -> Vec<Tensor> {
        match self.packed[..] {
            [] => split(self.of(infos), held),
            _ => self.packed_parts(held),
        }
    }

    fn packed_parts(&self, held: &Tensor) -> Vec<Tensor> {
        let words = held.narrow(0, 0, self.length());
        words.split_with_sizes(self.packed.iter().map(Packed::words).collect::<Vec<_>>(), 0)
    }

    /// Its parameters among those of its set.
    fn of<'s>(&self, infos: &'s [ParamInfo]) -> &'s [ParamInfo] {
        &infos[self.infos.clone()]
    }
}

impl ParamSet {
    /// The classes of the flat buffer, in order, where the model computes in `kind`.
    pub fn classes(&self, kind: Kind) -> Vec<Class> {
        let mut classes: Vec<Class> = Vec::new();
        let mut start = 0;
        for (index, info) in self.infos().iter().enumerate() {
            let kind = match info {
                ParamInfo { form: Some(_), .. } => Kind::Int64,
                ParamInfo { precise: true, .. } => Kind::Float,
                _ => kind,
            };
            let end = start + info.numel();
            match classes.last_mut() {
                Some(class) if class.frozen == info.frozen && class.kind == kind => {
                    class.infos.end = index + 1;
                    class.elements.end = end;
                    class.packed.extend(info.packed());
                }
                _ => classes.push(Class {
                    infos: index..index + 1,
                    elements: start..end,
                    frozen: info.frozen,
                    kind,
                    packed: info.packed().into_iter().collect(),
                }),
            }
            start = end;
        }
        classes
    }

    /// A class's flat piece as one view for each of its parameters, of packed ones their words; the
    /// rest is padding.
    pub fn split_class<'s>(
        &'s self,
        class: &Class,
        piece: &Tensor,
    ) -> impl Iterator<Item = (&'s ParamInfo, Tensor)> {
        class.of(self.infos()).iter().zip(class.split(self.infos(), piece))
    }
}

/// Views of consecutive parameters at the start of a flat piece.
pub(in crate::nn) fn split(infos: &[ParamInfo], piece: &Tensor) -> Vec<Tensor> {
    let mut sizes: Vec<i64> = infos.iter().map(ParamInfo::numel).collect();
    sizes.push(piece.numel() as i64 - sizes.iter().sum::<i64>());
    let views = piece.split_with_sizes(sizes, 0);
    views.iter().zip(infos).map(|(view, info)| view.view(info.shape.as_slice())).collect()
}
