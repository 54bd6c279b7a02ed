//! A stage's parameters: names, shapes and initialization, one after another in one flat buffer.

mod classes;
mod groups;
mod init;
mod views;

use std::sync::Arc;

use tch::{Device, Kind, Tensor, no_grad};

pub use classes::Class;
use classes::split;
pub use groups::Group;
pub use init::Init;
pub use views::Views;

use super::{AttentionInfo, FrozenDtype, LowRank, LowRankChange, Packed, Rows};
use crate::rng::Key;

#[derive(Clone, Debug, PartialEq)]
pub struct ParamInfo {
    /// Full name, e.g. `blocks.0.attn.qkv.weight`.
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    /// Stays f32 whatever the kind of the model's computation.
    pub precise: bool,
    /// True if it is not trained: it has a value, and no master, gradient or optimizer state.
    pub frozen: bool,
    /// True if it is no parameter of the model but of a change of it: no folder of weights holds
    /// it.
    pub added: bool,
    /// The rows that it is applied to.
    pub rows: Rows,
    /// The form in which it is held, if not as the numbers that it is computed with.
    pub form: Option<FrozenDtype>,
    /// Factor of the learning rate.
    pub lr_factor: f64,
    /// Factor of the weight decay; 0 where it does not decay.
    pub decay_factor: f64,
}

impl ParamInfo {
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// True if it has several axes: matrices and kernels, not biases, norms and tables of one.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() > 1
    }

    /// Its initial value, f32 on the CPU.
    pub fn drawn(&self, key: Key) -> Tensor {
        let fresh = Tensor::empty(&self.shape, (Kind::Float, Device::Cpu));
        key.named(&self.name).seeded(|| self.init.draw(fresh))
    }

    /// It as a packed weight; `None` if it is held as numbers.
    pub fn packed(&self) -> Option<Packed> {
        self.form.map(|form| Packed::new(form, &self.shape))
    }

    /// Its place in the order of a flat buffer.
    fn rank(&self) -> (bool, bool, bool) {
        (!self.frozen, !self.precise, self.form.is_some())
    }
}

/// Handle of one parameter within its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Param(pub(super) usize);

/// The parameters of one stage in the order of its flat buffer: frozen ones, then trained ones;
/// among each the precise ones, then the others, then the packed ones, as they were built.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParamSet {
    stage: String,
    infos: Vec<ParamInfo>,
    attentions: Vec<AttentionInfo>,
    /// Index of each [`Param`] among the infos.
    places: Vec<usize>,
    /// The weights that are applied as linear maps, which can be changed by a low rank.
    linears: Vec<Param>,
    low_ranks: Vec<LowRank>,
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

    /// Elements of the trained parameters, with which the flat buffer ends.
    pub fn num_trained(&self) -> i64 {
        self.trained().map(ParamInfo::numel).sum()
    }

    /// The trained parameters, in order.
    pub fn trained(&self) -> impl Iterator<Item = &ParamInfo> + Clone {
        self.infos.iter().filter(|info| !info.frozen)
    }

    /// The weights that are applied as linear maps.
    pub fn linears(&self) -> impl Iterator<Item = &ParamInfo> {
        self.linears.iter().map(|weight| self.info(*weight))
    }

    /// The same parameters, with low-rank changes `strength` times as strong.
    pub fn with_strength(mut self, strength: f64) -> Self {
        self.low_ranks.iter_mut().for_each(|change| *change = change.scaled(strength));
        self
    }

    /// The low-rank changes of linear maps.
    pub fn low_ranks(&self) -> &[LowRank] {
        &self.low_ranks
    }

    pub(super) fn info(&self, param: Param) -> &ParamInfo {
        &self.infos[self.places[param.0]]
    }

    /// The same parameters, of which those are frozen that `is_frozen` names. Handles stay valid.
    pub fn freezing(&self, is_frozen: impl Fn(&ParamInfo) -> bool) -> Self {
        self.arranged_anew(|_, info| ParamInfo {
            frozen: is_frozen(info),
            form: None,
            ..info.clone()
        })
    }

    /// The same parameters, of which the frozen weights of linear maps are held in a form; precise
    /// ones stay as they are. Handles stay valid.
    pub fn packing(&self, form: FrozenDtype) -> Self {
        let is_held = |param: Param, info: &ParamInfo| {
            info.frozen && !info.precise && self.linears.contains(&param)
        };
        self.arranged_anew(|param, info| ParamInfo {
            form: is_held(param, info).then_some(form),
            ..info.clone()
        })
    }

    fn arranged_anew(&self, changed: impl Fn(Param, &ParamInfo) -> ParamInfo) -> Self {
        let mut set = ParamSet { infos: Vec::new(), places: Vec::new(), ..self.clone() };
        for (handle, place) in self.places.iter().enumerate() {
            set.insert(changed(Param(handle), &self.infos[*place]));
        }
        set
    }

    /// The same parameters in the same places, each changed by `change`, which leaves name, shape
    /// and class as they are.
    pub fn with_each(mut self, change: impl Fn(&mut ParamInfo)) -> Self {
        self.infos.iter_mut().for_each(change);
        self
    }

    /// Adds a low-rank change of the linear map whose weight has this name. Handles stay valid.
    ///
    /// # Panics
    /// If no linear map has this weight (a bug in the caller).
    pub fn change_by_low_rank(&mut self, weight: &str, change: &LowRankChange) {
        let is_named = |param: &&Param| self.info(**param).name == weight;
        let weight = *self.linears.iter().find(is_named).expect("a linear map of the stage");
        let low_rank = LowRank::new(self, weight, change);
        self.low_ranks.push(low_rank);
    }

    /// The flat buffer `[P]` as one view for each parameter; the rest is padding.
    pub fn split(&self, flat: &Tensor) -> Views {
        self.views(split(&self.infos, flat))
    }

    /// As [`split`](Self::split), for a buffer that is held in one piece for each of its
    /// [`classes`](Self::classes).
    pub fn split_classes<'p>(
        &self,
        pieces: impl Iterator<Item = (&'p Class, &'p Tensor)>,
    ) -> Views {
        let tensors = pieces.flat_map(|(class, piece)| class.split(&self.infos, piece)).collect();
        self.held_as(tensors, self.infos.iter().map(ParamInfo::packed).collect())
    }

    /// As [`split`](Self::split), for one tensor of its own for each parameter, in the order of the
    /// infos.
    pub fn views(&self, tensors: Vec<Tensor>) -> Views {
        self.held_as(tensors, Vec::new())
    }

    fn held_as(&self, tensors: Vec<Tensor>, packed: Vec<Option<Packed>>) -> Views {
        Views::new(tensors, Arc::from(&*self.places), Arc::from(&*self.low_ranks), packed.into())
    }

    /// Fills `flat` `[P]` with initial values. Each parameter has a random stream of its own, so
    /// that adding a parameter does not change the others.
    pub fn initialize(&self, flat: &Tensor, key: Key) {
        self.initialize_only(flat, key, |_| true);
    }

    /// As [`initialize`](Self::initialize), only the parameters that `begins` names. What follows
    /// from others, the magnitudes of low-rank changes, follows from the values that they have.
    pub fn initialize_only(&self, flat: &Tensor, key: Key, begins: impl Fn(&ParamInfo) -> bool) {
        let views = self.split(flat);
        no_grad(|| {
            for (view, info) in views.iter().zip(&self.infos).filter(|(_, info)| begins(info)) {
                // Rounded by the copy, whatever the kind of the buffer.
                view.shallow_clone().copy_(&info.drawn(key));
            }
            for low_rank in &self.low_ranks {
                low_rank.measure(self, &views, &begins);
            }
        });
    }

    /// Adds a parameter; returns its handle.
    fn insert(&mut self, info: ParamInfo) -> Param {
        let ParamSet { infos, places, .. } = self;
        let place = infos.iter().filter(|other| other.rank() <= info.rank()).count();
        places.iter_mut().filter(|earlier| **earlier >= place).for_each(|earlier| *earlier += 1);
        places.push(place);
        infos.insert(place, info);
        Param(places.len() - 1)
    }
}

/// Names and registers the parameters of a stage.
#[derive(Debug)]
pub struct Builder<'a> {
    set: &'a mut ParamSet,
    prefix: String,
    precise: bool,
    added: bool,
    rows: Rows,
}

impl<'a> Builder<'a> {
    /// All names begin with `prefix`; matrices are applied to `rows` unless
    /// [`over`](Self::over) says otherwise.
    pub fn new(set: &'a mut ParamSet, prefix: &str, rows: Rows) -> Self {
        Builder { set, prefix: prefix.into(), precise: false, added: false, rows }
    }

    /// The builder of parameters that are no part of the model.
    pub(super) fn adding(set: &'a mut ParamSet, prefix: &str, rows: Rows, precise: bool) -> Self {
        Builder { set, prefix: prefix.into(), precise, added: true, rows }
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
        Builder { set: self.set, prefix, ..*self }
    }

    /// The builder for a part whose parameters stay f32 whatever the kind of the computation.
    pub fn precise_at(&mut self, part: &str) -> Builder<'_> {
        Builder { precise: true, ..self.at(part) }
    }

    /// A parameter that stays f32 whatever the kind of the computation.
    pub fn precise_param(&mut self, name: &str, shape: &[i64], init: Init) -> Param {
        Builder { precise: true, ..self.at("") }.param(name, shape, init)
    }

    pub fn param(&mut self, name: &str, shape: &[i64], init: Init) -> Param {
        let mut info = ParamInfo {
            name: self.join(name),
            shape: shape.to_vec(),
            init,
            precise: self.precise,
            frozen: false,
            added: self.added,
            rows: self.rows,
            form: None,
            lr_factor: 1.0,
            decay_factor: 0.0,
        };
        info.decay_factor = if info.is_matrix() { 1.0 } else { 0.0 };
        self.set.insert(info)
    }

    /// `weight` `[outputs, inputs]` of a linear map.
    pub(super) fn linear(&mut self, inputs: i64, outputs: i64, init: Init) -> Param {
        let weight = self.param("weight", &[outputs, inputs], init);
        self.set.linears.push(weight);
        weight
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
        let flat = Tensor::arange(10, (Kind::Float, Device::Cpu));
        let classes = set.classes(Kind::BFloat16);
        assert_eq!(classes.iter().map(Class::numel).collect::<Vec<_>>(), [3, 7]);
        assert_eq!(set.classes(Kind::Float).len(), 1, "one kind is one piece");
        let pieces = [flat.narrow(0, 0, 3), flat.narrow(0, 3, 7)];
        for views in [set.split(&flat), set.split_classes(classes.iter().zip(&pieces))] {
            let firsts = [table, norm, plain, last].map(|param| views[param].double_value(&[0]));
            assert_eq!(firsts, [0.0, 2.0, 3.0, 7.0]);
        }
    }

    #[test]
    fn frozen_parameters_lie_before_trained_ones_and_handles_stay() {
        let mut set = ParamSet::new("block");
        let mut builder = Builder::new(&mut set, "block", Rows::Image);
        let first = builder.param("first", &[2], Init::Zeros);
        let second = builder.param("second", &[3], Init::Zeros);
        let norm = builder.precise_param("norm", &[1], Init::Zeros);
        let frozen = set.freezing(|info| info.name != "block.first");
        let names = |set: &ParamSet| -> Vec<String> {
            set.infos().iter().map(|info| info.name.clone()).collect()
        };
        assert_eq!(names(&frozen), ["block.norm", "block.second", "block.first"]);
        assert_eq!((frozen.numel(), frozen.num_trained()), (6, 2));
        let views = frozen.split(&Tensor::arange(6, (Kind::Float, Device::Cpu)));
        let firsts = [first, second, norm].map(|param| views[param].double_value(&[0]));
        assert_eq!(firsts, [4.0, 1.0, 0.0]);
        let leaves = views.leaves(frozen.infos());
        assert_eq!([first, second, norm].map(|p| leaves[p].requires_grad()), [true, false, false]);
        let classes = frozen.classes(Kind::BFloat16);
        let kinds: Vec<_> = classes.iter().map(|class| (class.frozen, class.kind)).collect();
        assert_eq!(kinds, [(true, Kind::Float), (true, Kind::BFloat16), (false, Kind::BFloat16)]);
        assert_eq!(names(&frozen.freezing(|_| false)), names(&set), "and back");
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
