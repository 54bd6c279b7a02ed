//! The parts of a stage's flat buffer that are held alike: frozen or trained, in one kind.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::params::{ParamInfo, ParamSet};

/// Consecutive parameters of a stage that are frozen or trained alike and computed in one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Class {
    /// Indexes of its parameters among the set's infos.
    infos: Range<usize>,
    /// Its elements of the stage's flat buffer.
    pub elements: Range<i64>,
    pub frozen: bool,
    /// The kind that it is computed in.
    pub kind: Kind,
}

impl Class {
    /// Number of its elements.
    pub fn numel(&self) -> i64 {
        self.elements.end - self.elements.start
    }

    /// Its parameters among those of its set.
    pub fn of<'s>(&self, infos: &'s [ParamInfo]) -> &'s [ParamInfo] {
        &infos[self.infos.clone()]
    }
}

impl ParamSet {
    /// The classes of the flat buffer, in order, where the model computes in `kind`.
    pub fn classes(&self, kind: Kind) -> Vec<Class> {
        let mut classes: Vec<Class> = Vec::new();
        let mut start = 0;
        for (index, info) in self.infos().iter().enumerate() {
            let (kind, end) = (if info.precise { Kind::Float } else { kind }, start + info.numel());
            match classes.last_mut() {
                Some(class) if class.frozen == info.frozen && class.kind == kind => {
                    class.infos.end = index + 1;
                    class.elements.end = end;
                }
                _ => classes.push(Class {
                    infos: index..index + 1,
                    elements: start..end,
                    frozen: info.frozen,
                    kind,
                }),
            }
            start = end;
        }
        classes
    }

    /// A class's flat piece as one view for each of its parameters; the rest is padding.
    pub fn split_class<'s>(
        &'s self,
        class: &Class,
        piece: &Tensor,
    ) -> impl Iterator<Item = (&'s ParamInfo, Tensor)> {
        let infos = class.of(self.infos());
        infos.iter().zip(split(infos, piece))
    }
}

/// Views of consecutive parameters at the start of a flat piece.
pub(super) fn split(infos: &[ParamInfo], piece: &Tensor) -> Vec<Tensor> {
    let mut sizes: Vec<i64> = infos.iter().map(ParamInfo::numel).collect();
    sizes.push(piece.numel() as i64 - sizes.iter().sum::<i64>());
    let views = piece.split_with_sizes(sizes, 0);
    views.iter().zip(infos).map(|(view, info)| view.view(info.shape.as_slice())).collect()
}
