//! Places in which gradients of leaves can be computed, which spares a copy to them.

use tch::Tensor;
use torch_sys::C_tensor;

use super::ffi;

/// Offers `place`, of the shape and kind of `leaf`, to the operation that computes the gradient of
/// `leaf` in [`gradients`](super::gradients). It goes with the leaf, if none takes it.
#[allow(unsafe_code)]
pub fn offer_place(leaf: &Tensor, place: &Tensor) {
    // SAFETY: the pointers are those of living tensors.
    unsafe { ffi::fm_dist_offer_place(leaf.as_ptr(), place.as_ptr()) }
}

/// Takes the place that was offered for the gradient of `leaf`, if there is one left: of several
/// uses of a leaf only one computes there.
#[allow(unsafe_code)]
pub fn take_place(leaf: &Tensor) -> Option<Tensor> {
    // SAFETY: the pointer is that of a living tensor; the new one is owned here.
    let place: *mut C_tensor = unsafe { ffi::fm_dist_take_place(leaf.as_ptr()) };
    (!place.is_null()).then(|| unsafe { Tensor::from_ptr(place) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_place_is_taken_once() {
        let numbers = || Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let (leaf, place) = (numbers().set_requires_grad(true), numbers());
        assert!(take_place(&leaf).is_none());
        offer_place(&leaf, &place);
        let taken = take_place(&leaf).expect("it was offered");
        assert_eq!(taken.data_ptr(), place.data_ptr());
        assert!(take_place(&leaf).is_none());
    }
}
