//! One stage's parameters as one flat buffer.

use tch::{Device, Kind, Tensor, no_grad};

use crate::nn::{ParamSet, Views};
use crate::rng::Key;

/// A stage's flat parameters: f32 master values, and the leaf in the compute kind that the stage's graph begins with.
#[derive(Debug)]
pub struct Bucket {
    /// `[P]` f32; what the optimizer updates and a checkpoint holds.
    master: Tensor,
    /// `[P]` in the compute kind; shares the master's storage when that is f32.
    leaf: Tensor,
    trained: bool,
}

impl Bucket {
    /// Parameters begun from `key`.
    pub fn new(params: &ParamSet, kind: Kind, device: Device, key: Key) -> Self {
        let master = Tensor::zeros([params.numel()], (Kind::Float, Device::Cpu));
        params.initialize(&master, key);
        Bucket::from_master(master.to_device(device), kind)
    }

    fn from_master(master: Tensor, kind: Kind) -> Self {
        let trained = master.numel() > 0;
        let leaf = master.detach().to_kind(kind).set_requires_grad(trained);
        Bucket { master, leaf, trained }
    }

    /// The same parameters, excluded from training.
    pub fn frozen(mut self) -> Self {
        self.trained = false;
        self.leaf = self.leaf.set_requires_grad(false);
        self
    }

    pub fn is_trained(&self) -> bool {
        self.trained
    }

    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// The leaf whose gradient the backward pass asks for; none for a frozen or empty stage.
    pub fn leaf(&self) -> Option<&Tensor> {
        self.trained.then_some(&self.leaf)
    }

    /// The parameters as the stage's forward takes them.
    pub fn views(&self, params: &ParamSet) -> Views {
        params.split(&self.leaf)
    }

    /// Changes the master values and brings the leaf up to date.
    pub fn update(&mut self, change: impl FnOnce(&mut Tensor)) {
        no_grad(|| {
            change(&mut self.master);
            if self.leaf.kind() != Kind::Float {
                self.leaf.detach().copy_(&self.master);
            }
        });
    }
}
