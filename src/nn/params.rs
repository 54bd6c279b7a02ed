//! A stage's parameters: names, shapes and initialization, one after another in one flat buffer.

use std::ops::Index;

use tch::{Kind, Tensor, no_grad};

use super::{AttentionInfo, Rows};
use crate::rng::Key;

/// The initialization of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    Normal {
        std: f64,
    },
    /// Uniform within ±1/sqrt(fan_in), PyTorch's default for linear layers.
    FanIn {
        fan_in: i64,
    },
    /// Uniform within ±sqrt(6 / (fan_in + fan_out)). Source: Glorot & Bengio 2010.
    Xavier {
        fan_in: i64,
        fan_out: i64,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct ParamInfo {
    /// Full name, e.g. `blocks.0.attn.qkv.weight`.
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    /// Stays f32 whatever the kind of the model's computation.
    pub precise: bool,
    /// The rows that it is applied to.
    pub rows: Rows,
}

impl ParamInfo {
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// True if weight decay applies: to matrices and kernels, not to biases, norms and tables of
    /// one axis.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// Handle of one parameter within its stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Param(usize);

/// The parameters of one stage in the order of its flat buffer: the precise ones, then the others,
/// each as they were built.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParamSet {
    stage: String,
    infos: Vec<ParamInfo>,
    attentions: Vec<AttentionInfo>,
    /// Index of each [`Param`] among the infos.
    places: Vec<usize>,
}

impl ParamSet {
    /// An empty set for the stage of that name (as messages show it).
    pub fn new(stage: &str) -> Self {
        ParamSet { stage: stage.into(), ..Default::default() }
    }

    pub fn stage(&self) -> &str {
        &self.stage
    }

    pub fn infos(&self) -> &[ParamInfo] {
        &self.infos
    }

    /// The stage's attentions, in the order of the forward pass.
    pub fn attentions(&self) -> &[AttentionInfo] {
        &self.attentions
    }

    /// Elements of the flat buffer.
    pub fn numel(&self) -> i64 {
        self.infos.iter().map(ParamInfo::numel).sum()
    }

    /// Runs `(offset, length)` of the flat buffer that weight decay applies to; neighbours are
    /// joined.
    pub fn decayed_runs(&self) -> Vec<(i64, i64)> {
        let mut runs: Vec<(i64, i64)> = Vec::new();
        let mut offset = 0;
        for info in &self.infos {
            match runs.last_mut() {
                Some((start, length)) if info.decays() && *start + *length == offset => {
                    *length += info.numel()
                }
                _ if info.decays() => runs.push((offset, info.numel())),
                _ => {}
            }
            offset += info.numel();
        }
        runs
    }

    /// Elements of the precise parameters, which the flat buffer begins with.
    pub fn num_precise(&self) -> i64 {
        self.infos.iter().filter(|info| info.precise).map(ParamInfo::numel).sum()
    }

    /// The flat buffer `[P]` as one view for each parameter; the rest is padding.
    pub fn split(&self, flat: &Tensor) -> Views {
        self.split_pieces(&[flat])
    }

    /// As [`split`](Self::split), for a buffer in two pieces: precise parameters and the others. A
    /// stage that has only one of the two has one piece, a stage without parameters none.
    pub fn split_pieces(&self, pieces: &[&Tensor]) -> Views {
        let num_precise = self.infos.iter().filter(|info| info.precise).count();
        let (precise, others) =
            self.infos.split_at(if pieces.len() == 2 { num_precise } else { 0 });
        let held = [precise, others].into_iter().filter(|infos| !infos.is_empty());
        let tensors = held.zip(pieces).flat_map(|(infos, piece)| split(infos, piece)).collect();
        Views { tensors, places: self.places.clone() }
    }

    /// Fills `flat` `[P]` with initial values. Each parameter has a random stream of its own, so
    /// that adding a parameter does not change the others.
    pub fn initialize(&self, flat: &Tensor, key: Key) {
        no_grad(|| {
            for (mut view, info) in self.split(flat).tensors.into_iter().zip(&self.infos) {
                // Drawn in f32 and rounded by the copy, whatever the kind of the buffer.
                let fresh = view.empty_like().to_kind(Kind::Float);
                view.copy_(&key.named(&info.name).seeded(|| info.init.draw(fresh)));
            }
        });
    }
}

/// Views of consecutive parameters at the start of a flat piece.
fn split(infos: &[ParamInfo], piece: &Tensor) -> Vec<Tensor> {
    let mut sizes: Vec<i64> = infos.iter().map(ParamInfo::numel).collect();
    sizes.push(piece.numel() as i64 - sizes.iter().sum::<i64>());
    let views = piece.split_with_sizes(sizes, 0);
    views.iter().zip(infos).map(|(view, info)| view.view(info.shape.as_slice())).collect()
}

impl Init {
    fn draw(self, mut tensor: Tensor) -> Tensor {
        let uniform = |mut tensor: Tensor, bound: f64| tensor.uniform_(-bound, bound);
        match self {
            Init::Zeros => tensor.zero_(),
            Init::Ones => tensor.fill_(1.0),
            Init::Normal { std } => tensor.normal_(0.0, std),
            Init::FanIn { fan_in } => uniform(tensor, 1.0 / (fan_in as f64).sqrt()),
            Init::Xavier { fan_in, fan_out } => {
                uniform(tensor, (6.0 / (fan_in + fan_out) as f64).sqrt())
            }
        }
    }
}

/// One tensor for each parameter.
#[derive(Debug)]
pub struct Views {
    tensors: Vec<Tensor>,
    places: Vec<usize>,
}

impl Views {
    /// In the order of the set's infos.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.iter()
    }

    /// Leaves over the same storage, at which a graph starts.
    pub fn leaves(&self, gradients: bool) -> Self {
        let leaf = |view: &Tensor| view.detach().set_requires_grad(gradients);
        Views { tensors: self.tensors.iter().map(leaf).collect(), places: self.places.clone() }
    }
}

impl Index<Param> for Views {
    type Output = Tensor;

    fn index(&self, param: Param) -> &Tensor {
        &self.tensors[self.places[param.0]]
    }
}

/// Names and registers the parameters of a stage.
#[derive(Debug)]
pub struct Builder<'a> {
    set: &'a mut ParamSet,
    prefix: String,
    precise: bool,
    rows: Rows,
}

impl<'a> Builder<'a> {
    /// All names begin with `prefix`; matrices are applied to `rows` unless
    /// [`over`](Self::over) says otherwise.
    pub fn new(set: &'a mut ParamSet, prefix: &str, rows: Rows) -> Self {
        Builder { set, prefix: prefix.into(), precise: false, rows }
    }

    /// The builder for matrices that are applied to `rows`.
    pub fn over(self, rows: Rows) -> Self {
        Builder { rows, ..self }
    }

    /// The rows that matrices are applied to.
    pub fn rows(&self) -> Rows {
        self.rows
    }

    /// Registers an attention of the stage.
    pub fn attends(&mut self, attention: AttentionInfo) {
        self.set.attentions.push(attention);
    }

    /// The builder for a part of this one: `blocks.0` at `attn` is `blocks.0.attn`; at `""` it is
    /// the same part.
    pub fn at(&mut self, part: &str) -> Builder<'_> {
        let prefix = self.join(part);
        Builder { set: self.set, prefix, precise: self.precise, rows: self.rows }
    }

    /// The builder for a part whose parameters stay f32 whatever the kind of the computation.
    pub fn precise_at(&mut self, part: &str) -> Builder<'_> {
        Builder { precise: true, ..self.at(part) }
    }

    /// A parameter that stays f32 whatever the kind of the computation.
    pub fn precise_param(&mut self, name: &str, shape: &[i64], init: Init) -> Param {
        let prefix = self.prefix.clone();
        Builder { set: self.set, prefix, precise: true, rows: self.rows }.param(name, shape, init)
    }

    pub fn param(&mut self, name: &str, shape: &[i64], init: Init) -> Param {
        let info = ParamInfo {
            name: self.join(name),
            shape: shape.to_vec(),
            init,
            precise: self.precise,
            rows: self.rows,
        };
        let ParamSet { infos, places, .. } = &mut *self.set;
        let place = if info.precise {
            infos.iter().filter(|info| info.precise).count()
        } else {
            infos.len()
        };
        places.iter_mut().filter(|earlier| **earlier >= place).for_each(|earlier| *earlier += 1);
        places.push(place);
        infos.insert(place, info);
        Param(places.len() - 1)
    }

    fn join(&self, name: &str) -> String {
        match (self.prefix.as_str(), name) {
            ("", name) => name.into(),
            (prefix, "") => prefix.into(),
            (prefix, name) => format!("{prefix}.{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::Purpose;

    fn set(names: &[&str]) -> ParamSet {
        let mut set = ParamSet::new("block");
        let mut builder = Builder::new(&mut set, "block", Rows::Image);
        for name in names {
            builder.at("part").param(name, &[2, 3], Init::Normal { std: 1.0 });
        }
        set
    }

    #[test]
    fn views_share_the_flat_storage_and_names_are_joined() {
        let set = set(&["a", "b"]);
        let flat = Tensor::arange(12, (Kind::Float, Device::Cpu));
        let views = set.split(&flat);
        assert_eq!(views[Param(1)].double_value(&[0, 0]), 6.0);
        assert_eq!(set.infos()[1].name, "block.part.b");
    }

    #[test]
    fn precise_parameters_lie_first_and_keep_their_handles() {
        let mut set = ParamSet::new("block");
        let mut builder = Builder::new(&mut set, "block", Rows::Image);
        let plain = builder.param("plain", &[4], Init::Zeros);
        let table = builder.precise_at("table").param("weight", &[2], Init::Zeros);
        let last = builder.param("last", &[3], Init::Zeros);
        let norm = builder.precise_at("norm").param("weight", &[1], Init::Zeros);
        let names: Vec<&str> = set.infos().iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["block.table.weight", "block.norm.weight", "block.plain", "block.last"]);
        assert_eq!(set.num_precise(), 3);
        let flat = Tensor::arange(10, (Kind::Float, Device::Cpu));
        let (precise, rest) = (flat.narrow(0, 0, 3), flat.narrow(0, 3, 7));
        for views in [set.split(&flat), set.split_pieces(&[&precise, &rest])] {
            let firsts = [table, norm, plain, last].map(|param| views[param].double_value(&[0]));
            assert_eq!(firsts, [0.0, 2.0, 3.0, 7.0]);
        }
    }

    #[test]
    fn a_parameter_begins_alike_whatever_stands_beside_it() {
        let key = Key::new(5, Purpose::Initialization);
        let begin = |set: &ParamSet| {
            let flat = Tensor::zeros([set.numel()], (Kind::Float, Device::Cpu));
            set.initialize(&flat, key);
            flat
        };
        let (alone, beside) = (begin(&set(&["b"])), begin(&set(&["a", "b"])));
        assert!(alone.equal(&beside.narrow(0, 6, 6)));
    }
}
