//! The tensors that cross a stage boundary.

use tch::{Device, Tensor};

/// Named tensors in a fixed order. Constants (ids, tables, masks, the model's inputs) carry no
/// gradient.
#[derive(Debug, Default)]
pub struct Activations {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: &'static str,
    tensor: Tensor,
    constant: bool,
}

impl Activations {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor through which gradients flow.
    pub fn with(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.entries.push(Entry { name, tensor, constant: false });
        self
    }

    /// Adds a tensor that no gradient enters.
    pub fn with_constant(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.entries.push(Entry { name, tensor, constant: true });
        self
    }

    /// Adds a constant if there is one.
    pub fn with_optional(self, name: &'static str, tensor: Option<Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.with_constant(name, tensor),
            None => self,
        }
    }

    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.entries.iter().find(|entry| entry.name == name).map(|entry| &entry.tensor)
    }

    /// # Panics
    /// If there is no such activation: the stages are in the wrong order.
    pub fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("no activation `{name}` among {:?}", self.names()))
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.entries.iter().map(|entry| entry.name).collect()
    }

    /// The tensors that gradients flow through, with their names, in order.
    pub fn flowing(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        self.entries.iter().filter(|entry| !entry.constant).map(|entry| (entry.name, &entry.tensor))
    }

    /// Adds the constants of `earlier` that are not among these activations. One that was passed on
    /// unchanged stays a constant.
    pub fn carrying_constants_of(mut self, earlier: &Activations) -> Self {
        for entry in earlier.entries.iter().filter(|entry| entry.constant) {
            match self.entries.iter_mut().find(|own| own.name == entry.name) {
                Some(own) => own.constant |= is_same(&own.tensor, &entry.tensor),
                None => self = self.with_constant(entry.name, entry.tensor.shallow_clone()),
            }
        }
        self
    }

    /// The same tensors, graphs and all, under a second owner.
    pub fn alias(&self) -> Self {
        let alias = |entry: &Entry| Entry {
            name: entry.name,
            tensor: entry.tensor.shallow_clone(),
            constant: entry.constant,
        };
        Activations { entries: self.entries.iter().map(alias).collect() }
    }

    /// Leaves with the same values on another device, or the same tensors if they are already
    /// there. Constants stay where they are.
    pub fn to_device(&self, device: Device) -> Self {
        let moved = |entry: &Entry| {
            let tensor = match entry.constant {
                true => entry.tensor.shallow_clone(),
                false => entry.tensor.detach().to_device(device).set_requires_grad(true),
            };
            Entry { name: entry.name, tensor, constant: entry.constant }
        };
        Activations { entries: self.entries.iter().map(moved).collect() }
    }

    /// Fresh leaves over the same storage: where one stage's graph ends and the next begins.
    ///
    /// Without `gradients` everything becomes constant: no stage before this boundary is
    /// trained.
    pub fn leaves(&self, gradients: bool) -> Self {
        let leaf = |entry: &Entry| {
            let constant = entry.constant || !gradients;
            Entry {
                name: entry.name,
                tensor: entry.tensor.detach().set_requires_grad(!constant),
                constant,
            }
        };
        Activations { entries: self.entries.iter().map(leaf).collect() }
    }
}

/// True for two handles of one tensor.
fn is_same(a: &Tensor, b: &Tensor) -> bool {
    a.data_ptr() == b.data_ptr() && a.size() == b.size() && a.kind() == b.kind()
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn a_constant_that_is_passed_on_stays_one_and_a_changed_one_does_not() {
        let ones = || Tensor::ones([2], (Kind::Float, Device::Cpu));
        let before = Activations::new()
            .with_constant("passed", ones())
            .with_constant("changed", ones())
            .with_constant("unused", ones())
            .with("flowing", ones());
        let after = Activations::new()
            .with("passed", before.get("passed").shallow_clone())
            .with("changed", before.get("changed") * 2.0)
            .with("flowing", before.get("flowing").shallow_clone())
            .carrying_constants_of(&before);
        let flowing: Vec<_> = after.flowing().map(|(name, _)| name).collect();
        assert_eq!(flowing, ["changed", "flowing"]);
        assert_eq!(after.names(), ["passed", "changed", "flowing", "unused"]);
    }
}
