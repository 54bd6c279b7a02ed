//! Constants that depend on shapes alone, computed once for each shape.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tch::Tensor;

/// A table for each shape used so far, such as the latents' grid of each resolution group.
#[derive(Debug)]
pub struct PerShape<S>(RefCell<BTreeMap<S, Tensor>>);

impl<S: Ord> PerShape<S> {
    pub fn new() -> Self {
        PerShape(RefCell::new(BTreeMap::new()))
    }

    /// The table of that shape, built at its first use.
    pub fn get(&self, shape: S, build: impl FnOnce() -> Tensor) -> Tensor {
        self.0.borrow_mut().entry(shape).or_insert_with(|| tch::no_grad(build)).shallow_clone()
    }
}

impl<S: Ord> Default for PerShape<S> {
    fn default() -> Self {
        Self::new()
    }
}
