//! First values of parameters.

use tch::Tensor;

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

impl Init {
    /// Fills `tensor` by libtorch's generator.
    pub(in crate::nn) fn draw(self, mut tensor: Tensor) -> Tensor {
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
