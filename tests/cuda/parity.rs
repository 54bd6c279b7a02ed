//! Steps of tiny random models are those of NeMo AutoModel and diffusers on the same GPU. With
//! draws of the host both sides draw there; with draws of the device, each on the GPU after the
//! same seed.

use crate::oracle::families::{Place, check_family};

macro_rules! parity {
    ($($by_host:ident, $by_device:ident: $family:literal;)*) => {$(
        #[test]
        #[ignore = "needs a CUDA device"]
        fn $by_host() {
            check_family($family, Place { device: "cuda", draws: "host" });
        }

        #[test]
        #[ignore = "needs a CUDA device"]
        fn $by_device() {
            check_family($family, Place { device: "cuda", draws: "device" });
        }
    )*};
}

parity! {
    flux_with_draws_of_the_host, flux_with_draws_of_the_device: "flux";
    flux2_with_draws_of_the_host, flux2_with_draws_of_the_device: "flux2";
    qwen_image_with_draws_of_the_host, qwen_image_with_draws_of_the_device: "qwen_image";
    wan_with_draws_of_the_host, wan_with_draws_of_the_device: "wan";
    hunyuan_video15_with_draws_of_the_host, hunyuan_video15_with_draws_of_the_device: "hunyuan_video15";
}
