//! One bfloat16 step of each family at its real head width, with and without masks, is the float32
//! step of a CPU within rounding, by each backend of attention that a run may choose. A test for
//! each: attention that accesses memory which is not its own ends the process.

macro_rules! families {
    ($($name:ident: $family:ident;)*) => {$(
        mod $name {
            use crate::threads::real_heads::$family;

            #[test]
            #[ignore = "needs a CUDA device"]
            fn by_flash_attention() {
                $family.check_on("cuda", &["compute.attention=\"flash\""]);
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn by_cudnns_attention() {
                $family.check_on("cuda", &["compute.attention=\"cudnn\""]);
            }

            #[test]
            #[ignore = "needs a CUDA device"]
            fn by_efficient_attention() {
                $family.check_on("cuda", &["compute.attention=\"efficient\""]);
            }
        }
    )*};
}

families! {
    flux: FLUX;
    flux2: FLUX2;
    qwen_image: QWEN_IMAGE;
    wan: WAN;
    hunyuan_video15: HUNYUAN_VIDEO15;
}
