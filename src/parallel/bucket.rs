//! One stage's parameters as one flat buffer.

use tch::{Device, Kind, Tensor, no_grad};

use crate::nn::{ParamSet, Views};
use crate::rng::Key;

/// A stage's flat parameters: f32 master values, and the leaves in the compute kind that the stage's graph begins with.
#[derive(Debug)]
pub struct Bucket {
    /// `[P]` f32; what the optimizer updates and a checkpoint holds.
    master: Tensor,
    /// The flat buffer in one piece or two: precise parameters in f32, the others in the compute kind. f32 pieces share the
    /// master's storage.
    leaves: Vec<Tensor>,
    trained: bool,
}

impl Bucket {
    /// Parameters begun from `key`, zeros without one.
    pub fn new(params: &ParamSet, kind: Kind, device: Device, key: Option<Key>) -> Self {
        let master = Tensor::zeros([params.numel()], (Kind::Float, Device::Cpu));
        if let Some(key) = key {
            params.initialize(&master, key);
        }
        let master = master.to_device(device);
        let precise = if kind == Kind::Float { 0 } else { params.num_precise() };
        let trained = params.numel() > 0;
        let pieces = [(master.narrow(0, 0, precise), Kind::Float), (master.narrow(0, precise, params.numel() - precise), kind)];
        let leaf = |(piece, kind): &(Tensor, Kind)| piece.detach().to_kind(*kind).set_requires_grad(trained);
        let leaves = pieces.iter().filter(|(piece, _)| piece.numel() > 0).map(leaf).collect();
        Bucket { master, leaves, trained }
    }

    /// The same parameters, excluded from training.
    pub fn frozen(mut self) -> Self {
        self.trained = false;
        self.leaves = self.leaves.into_iter().map(|leaf| leaf.set_requires_grad(false)).collect();
        self
    }

    pub fn is_trained(&self) -> bool {
        self.trained
    }

    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// The leaves whose gradients the backward pass asks for; none for a frozen or empty stage.
    pub fn leaves(&self) -> &[Tensor] {
        if self.trained { &self.leaves } else { &[] }
    }

    /// The parameters as the stage's forward takes them.
    pub fn views(&self, params: &ParamSet) -> Views {
        params.split_pieces(&self.leaves.iter().collect::<Vec<_>>())
    }

    /// Changes the master values and brings the leaf up to date.
    pub fn update(&mut self, change: impl FnOnce(&mut Tensor)) {
        no_grad(|| {
            change(&mut self.master);
            let mut offset = 0;
            for leaf in &self.leaves {
                let length = leaf.numel() as i64;
                if leaf.kind() != Kind::Float {
                    leaf.detach().copy_(&self.master.narrow(0, offset, length));
                }
                offset += length;
            }
        });
    }
}
