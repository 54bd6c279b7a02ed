//! Low-rank changes of linear maps: the weight is used as `W + scale · B · A`, with `A` `[r,
//! inputs]` and `B` `[outputs, r]`. With a magnitude `m`, each row of that sum gets the norm `m`.
//!
//! Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); Liu et al. 2024, arXiv:2402.09353 (DoRA).
//! Names and rounding are those of PEFT.

use tch::{Kind, Tensor, no_grad};

use crate::nn::packed::{Weight, numbers};
use crate::nn::{Builder, Init, Param, ParamInfo, ParamSet, Rows, Views};
use crate::ops::autograd::passing_on;
use crate::ops::product_onto;
use crate::rng::hash_of_name;

/// The low-rank change to add to a linear map.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankChange {
    pub rank: i64,
    /// Factor of the change.
    pub scale: f64,
    /// Initialization of `A`; `B` begins as zeros.
    pub init: Init,
    /// True if it is computed in f32 whatever the kind of the weight.
    pub precise: bool,
    /// True if the rows' norms are trained by themselves.
    pub with_magnitude: bool,
    /// Probability with which an input of `A` is dropped.
    pub dropout: f64,
}

/// The low-rank change of one linear map.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    pub(in crate::nn) weight: Param,
    down: Param,
    up: Param,
    magnitude: Option<Param>,
    scale: f64,
    dropout: f64,
    /// The stream of its dropped inputs.
    stream: u64,
    rows: Rows,
}

impl LowRank {
    /// Adds the parameters of the change to the set.
    pub(in crate::nn) fn new(set: &mut ParamSet, weight: Param, change: &LowRankChange) -> Self {
        let info = set.info(weight).clone();
        let module = info.name.strip_suffix(".weight").unwrap_or(&info.name);
        let (outputs, inputs, rank) = (info.shape[0], info.shape[1], change.rank);
        let earlier = set.low_ranks().iter().filter(|change| change.weight == weight).count();
        // Only a run's own change, the first one, is kept under its names.
        let number = if earlier == 0 { String::new() } else { format!("_{}", earlier + 1) };
        let mut builder = Builder::adding(set, module, info.rows, info.precise || change.precise);
        let down = builder.param(&format!("lora_A{number}.weight"), &[rank, inputs], change.init);
        let up = builder.param(&format!("lora_B{number}.weight"), &[outputs, rank], Init::Zeros);
        let magnitude = || builder.param("lora_magnitude_vector", &[outputs], Init::Zeros);
        LowRank {
            weight,
            down,
            up,
            magnitude: change.with_magnitude.then(magnitude),
            scale: change.scale,
            dropout: change.dropout,
            stream: hash_of_name(module),
            rows: info.rows,
        }
    }

    /// The name of the changed weight in its set.
    pub fn weight_name<'s>(&self, set: &'s ParamSet) -> &'s str {
        &set.info(self.weight).name
    }

    /// The name of the changed linear map in its set.
    pub fn module<'s>(&self, set: &'s ParamSet) -> &'s str {
        let weight = self.weight_name(set);
        weight.strip_suffix(".weight").unwrap_or(weight)
    }

    /// The names of `A`, of `B` and of the magnitude, if it has one, in its set.
    pub fn names<'s>(&self, set: &'s ParamSet) -> (&'s str, &'s str, Option<&'s str>) {
        let name = |param: Param| set.info(param).name.as_str();
        (name(self.down), name(self.up), self.magnitude.map(name))
    }

    /// True if inputs are dropped in training.
    pub(in crate::nn) fn drops(&self) -> bool {
        self.dropout > 0.0
    }

    /// The same change `strength` times as strong.
    pub(in crate::nn) fn scaled(&self, strength: f64) -> Self {
        LowRank { scale: strength * self.scale, ..self.clone() }
    }

    /// Factor of the change.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// `x · weightᵀ + bias` with the changed weight; returns `x` for its other uses, and the
    /// product.
    ///
    /// # Shapes
    /// `x`: `[…, inputs]`. Returns `x` and `[…, outputs]`.
    pub(in crate::nn) fn apply(
        &self,
        params: &Views,
        weight: &Weight<'_>,
        bias: Option<&Tensor>,
        x: &Tensor,
    ) -> (Tensor, Tensor) {
        let (down, up) = (&params[self.down], &params[self.up]);
        let is_frozen = |tensor: &Tensor| !tensor.requires_grad();
        let drops = params.drops().filter(|_| self.drops());
        let dropped = drops.map(|drops| drops.apply(x, self.dropout, self.stream, self.rows));
        let changed = dropped.as_ref().unwrap_or(x);
        let output = match self.magnitude {
            None if dropped.is_none() && weight.is_frozen() && bias.is_none_or(is_frozen) => {
                return frozen_and_changed(x, weight, bias, [down, up], self.scale);
            }
            None => weight.product(x, bias) + self.change(changed, [down, up], x.kind()),
            Some(magnitude) => {
                let norms = no_grad(|| row_norms(&self.sum(&weight.precise(), [down, up])));
                let factor = (&params[magnitude] / norms).to_kind(x.kind());
                let change = self.change(changed, [down, up], x.kind()) * &factor;
                let own = weight.product(changed, None);
                match dropped {
                    None => {
                        let turned = own * &factor + change;
                        bias.map_or_else(|| turned.shallow_clone(), |bias| &turned + bias)
                    }
                    Some(_) => weight.product(x, bias) + own * (factor - 1.0) + change,
                }
            }
        };
        (x.shallow_clone(), output)
    }

    /// The share of the output of a change that is not the first of its weight, in the kind of `x`:
    /// no magnitude, and nothing is dropped.
    pub(in crate::nn) fn alone(&self, params: &Views, x: &Tensor) -> Tensor {
        self.change(x, [&params[self.down], &params[self.up]], x.kind())
    }

    /// Sets `A`, `B` and the magnitude, if it has one.
    pub fn set(&self, views: &Views, [down, up]: [&Tensor; 2], magnitude: Option<&Tensor>) {
        let parts =
            [(Some(self.down), Some(down)), (Some(self.up), Some(up)), (self.magnitude, magnitude)];
        for (param, values) in parts {
            if let (Some(param), Some(values)) = (param, values) {
                views[param].shallow_clone().copy_(values);
            }
        }
    }

    /// `scale · (x · Aᵀ) · Bᵀ`, of `kind`.
    fn change(&self, x: &Tensor, [down, up]: [&Tensor; 2], kind: Kind) -> Tensor {
        let narrow = x.to_kind(down.kind()).linear(down, None::<&Tensor>) * self.scale;
        narrow.linear(up, None::<&Tensor>).to_kind(kind)
    }

    /// `W + scale · B · A` in f32 or wider.
    fn sum(&self, weight: &Tensor, [down, up]: [&Tensor; 2]) -> Tensor {
        let kind = if weight.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let [weight, down, up] = [weight, down, up].map(|tensor| tensor.to_kind(kind));
        weight + up.matmul(&down) * self.scale
    }

    /// The changed weight, f32.
    pub fn merged(
        &self,
        weight: &Tensor,
        factors: [&Tensor; 2],
        magnitude: Option<&Tensor>,
    ) -> Tensor {
        let sum = self.sum(weight, factors);
        match magnitude {
            Some(magnitude) => &sum * (magnitude / row_norms(&sum)).unsqueeze(1),
            None => sum,
        }
    }

    /// Sets the magnitude, if it `begins`, to what the weight, as it is held, and its change have.
    pub(in crate::nn) fn measure(
        &self,
        set: &ParamSet,
        views: &Views,
        begins: impl Fn(&ParamInfo) -> bool,
    ) {
        if let Some(magnitude) = self.magnitude.filter(|magnitude| begins(set.info(*magnitude))) {
            let weight = match set.info(self.weight).packed() {
                Some(packed) => packed.unpack(&packed.pack(&views[self.weight]), Kind::Float),
                None => views[self.weight].shallow_clone(),
            };
            let sum = self.sum(&weight, [&views[self.down], &views[self.up]]);
            views[magnitude].shallow_clone().copy_(&row_norms(&sum));
        }
    }
}

/// The norm of each row.
fn row_norms(weight: &Tensor) -> Tensor {
    weight.norm_scalaropt_dim(2, [1i64].as_slice(), false)
}

/// `x · Wᵀ + b + scale · (x · Aᵀ) · Bᵀ` where neither `W` nor `b` has a gradient: of `x`, only what
/// the gradient of `A` needs is kept, and nothing of `W`'s is computed. Returns `x` for its other
/// uses, and the output.
fn frozen_and_changed(
    x: &Tensor,
    weight: &Weight<'_>,
    bias: Option<&Tensor>,
    [down, up]: [&Tensor; 2],
    scale: f64,
) -> (Tensor, Tensor) {
    let (shape, kind, has_gradient) = (x.size(), x.kind(), x.requires_grad());
    let (inputs, outputs, packed) = (down.size()[1], up.size()[0], weight.packed);
    let is_one_kind = down.kind() == kind;
    passing_on(
        &[x, down, up],
        || {
            let output = x.linear(&weight.numbers(kind), bias).contiguous();
            let rows = x.detach().reshape([-1, inputs]);
            let narrow = rows.to_kind(down.kind()).matmul(&down.tr()) * scale;
            let mut flat = output.view([-1, outputs]);
            add_product(&mut flat, &narrow, &up.tr(), is_one_kind);
            let saved = [&rows, &narrow, weight.held, down, up].map(Tensor::detach);
            (output, saved)
        },
        move |[rows, narrow, held, down, up], gradient, passed| {
            let gradient = gradient.reshape([-1, outputs]);
            let of_change = gradient.to_kind(down.kind());
            let of_up = of_change.tr().matmul(&narrow);
            let of_narrow = of_change.matmul(&up) * scale;
            let of_down = of_narrow.tr().matmul(&rows.to_kind(down.kind()));
            let of_x = has_gradient.then(|| {
                let mut of_rows = product_onto(passed, &gradient, &numbers(&held, packed, kind));
                add_product(&mut of_rows, &of_narrow, &down, is_one_kind);
                of_rows.reshape(&shape)
            });
            vec![of_x.unwrap_or_else(Tensor::new), of_down, of_up]
        },
    )
}

/// Adds `a · b`, which may be of a wider kind, to `sum`.
fn add_product(sum: &mut Tensor, a: &Tensor, b: &Tensor, is_one_kind: bool) {
    drop(if is_one_kind { sum.addmm_(a, b) } else { sum.g_add_(&a.matmul(b)) });
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::{Key, Purpose};

    fn drawn(scope: u64, size: &[i64], kind: Kind) -> Tensor {
        let draw = || Tensor::randn(size, (Kind::Double, Device::Cpu));
        Key::new(9, Purpose::Test).scope(scope).seeded(draw).to_kind(kind)
    }

    /// Output and gradients of `x`, `A` and `B`, of a loss that weighs every output otherwise.
    fn of(
        apply: impl Fn(&Tensor, [&Tensor; 2], &Tensor, &Tensor) -> (Tensor, Tensor),
        kind: Kind,
        of_change: Kind,
    ) -> Vec<Tensor> {
        let leaf = |tensor: Tensor| tensor.set_requires_grad(true);
        let x = leaf(drawn(1, &[2, 5, 6], kind));
        let (down, up) = (leaf(drawn(2, &[3, 6], of_change)), leaf(drawn(3, &[4, 3], of_change)));
        let (weight, bias) = (drawn(4, &[4, 6], kind), drawn(5, &[4], kind));
        let (passed_on, output) = apply(&x, [&down, &up], &weight, &bias);
        assert_eq!(output.kind(), kind);
        let of_output = (&output * drawn(6, &[2, 5, 4], kind)).sum(kind);
        let loss = of_output + (passed_on * drawn(7, &[2, 5, 6], kind)).sum(kind);
        let mut found = Tensor::run_backward(&[loss], &[&x, &down, &up], false, false);
        found.push(output.detach());
        found
    }

    #[test]
    fn a_change_of_what_is_frozen_is_the_sum_of_both_maps_and_so_are_its_gradients() {
        let one = |x: &Tensor, factors: [&Tensor; 2], weight: &Tensor, bias: &Tensor| {
            let weight = Weight { held: weight, packed: None };
            frozen_and_changed(x, &weight, Some(bias), factors, 0.7)
        };
        let two = |x: &Tensor, [down, up]: [&Tensor; 2], weight: &Tensor, bias: &Tensor| {
            let narrow = x.to_kind(down.kind()).matmul(&down.tr()) * 0.7;
            let change = narrow.matmul(&up.tr()).to_kind(x.kind());
            (x.shallow_clone(), x.linear(weight, Some(bias)) + change)
        };
        for (kind, of_change, tolerance) in [
            (Kind::Double, Kind::Double, 1e-13),
            (Kind::Float, Kind::Float, 2e-6),
            (Kind::BFloat16, Kind::Float, 2e-2),
            (Kind::BFloat16, Kind::BFloat16, 2e-2),
        ] {
            for (found, expected) in of(one, kind, of_change).iter().zip(of(two, kind, of_change)) {
                assert_eq!((found.size(), found.kind()), (expected.size(), expected.kind()));
                let [found, expected] =
                    [found, &expected].map(|tensor| tensor.to_kind(Kind::Double));
                let off = (&found - &expected).norm() / expected.norm();
                assert!(off.double_value(&[]) < tolerance, "{kind:?} {of_change:?}: {off}");
            }
        }
    }

    #[test]
    fn inputs_that_need_no_gradient_get_none() {
        let x = drawn(1, &[2, 6], Kind::Float);
        let [down, up] = [drawn(2, &[3, 6], Kind::Float), drawn(3, &[4, 3], Kind::Float)]
            .map(|factor| factor.set_requires_grad(true));
        let weight = drawn(4, &[4, 6], Kind::Float);
        let weight = Weight { held: &weight, packed: None };
        let (passed_on, output) = frozen_and_changed(&x, &weight, None, [&down, &up], 1.0);
        assert!(!passed_on.requires_grad());
        let found = Tensor::run_backward(&[output.sum(Kind::Float)], &[&down, &up], false, false);
        assert!(found.iter().all(|gradient| gradient.abs().max().double_value(&[]) > 0.0));
    }
}
