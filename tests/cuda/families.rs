//! One bfloat16 step of each family at its real head width, with and without masks, is the float32
//! step of a CPU within rounding, by each backend of attention that a run may choose. A test for
//! each: attention that accesses memory which is not its own ends the process.

use crate::threads::real_heads::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, WAN};

macro_rules! families {
    ($($by_flash:ident, $by_cudnn:ident, $by_efficient:ident: $family:expr;)*) => {$(
        #[test]
        #[ignore = "needs a CUDA device"]
        fn $by_flash() {
            $family.check_on("cuda", &["compute.attention=\"flash\""]);
        }

        #[test]
        #[ignore = "needs a CUDA device"]
        fn $by_cudnn() {
            $family.check_on("cuda", &["compute.attention=\"cudnn\""]);
        }

        #[test]
        #[ignore = "needs a CUDA device"]
        fn $by_efficient() {
            $family.check_on("cuda", &["compute.attention=\"efficient\""]);
        }
    )*};
}

families! {
    flux_by_flash_attention, flux_by_cudnns_attention, flux_by_efficient_attention:
        FLUX;
    flux2_by_flash_attention, flux2_by_cudnns_attention, flux2_by_efficient_attention:
        FLUX2;
    qwen_image_by_flash_attention, qwen_image_by_cudnns_attention, qwen_image_by_efficient_attention:
        QWEN_IMAGE;
    wan_by_flash_attention, wan_by_cudnns_attention, wan_by_efficient_attention:
        WAN;
    hunyuan_video15_by_flash_attention, hunyuan_video15_by_cudnns_attention, hunyuan_video15_by_efficient_attention:
        HUNYUAN_VIDEO15;
}
