//! Affine map.

use tch::Tensor;

use super::{Builder, Init, Param, Views};

/// `x · weightᵀ + bias`; where the weight has low-rank changes, with them.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
}

impl Linear {
    /// Weight `[outputs, inputs]` initialized by `init`, bias `[outputs]` initialized to zero.
    pub fn new(builder: &mut Builder<'_>, inputs: i64, outputs: i64, init: Init) -> Self {
        let weight = builder.linear(inputs, outputs, init);
        Linear { weight, bias: Some(builder.param("bias", &[outputs], Init::Zeros)) }
    }

    /// Weight and optional bias, initialized as in `torch.nn.Linear`.
    pub fn pytorch(builder: &mut Builder<'_>, inputs: i64, outputs: i64, with_bias: bool) -> Self {
        let init = Init::FanIn { fan_in: inputs };
        let weight = builder.linear(inputs, outputs, init);
        Linear { weight, bias: with_bias.then(|| builder.param("bias", &[outputs], init)) }
    }

    pub fn without_bias(builder: &mut Builder<'_>, inputs: i64, outputs: i64, init: Init) -> Self {
        Linear { weight: builder.linear(inputs, outputs, init), bias: None }
    }

    /// # Shapes
    /// `x`: `[…, inputs]`. Returns `[…, outputs]`.
    pub fn forward(&self, params: &Views, x: &Tensor) -> Tensor {
        self.passing_on(params, x).1
    }

    /// As [`forward`](Self::forward); returns `x` for its other uses, whose gradient this one's is
    /// added to within a product, and the output.
    pub fn passing_on(&self, params: &Views, x: &Tensor) -> (Tensor, Tensor) {
        let (weight, bias) = (params.weight(self.weight), self.bias.map(|bias| &params[bias]));
        let mut changes = params.low_ranks(self.weight);
        let (x, changed) = match changes.next() {
            Some(low_rank) => low_rank.apply(params, &weight, bias, x),
            None => weight.product_passing_on(x, bias),
        };
        let changed = changes.fold(changed, |changed, further| changed + further.alone(params, &x));
        (x, changed)
    }
}
