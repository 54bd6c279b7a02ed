//! One bfloat16 step of each family at its real head width, with and without masks, is the float32
//! step of a CPU within rounding. A test for each family: attention that accesses memory which is
//! not its own ends the process.

use crate::threads::real_heads::{FLUX, FLUX2, HUNYUAN_VIDEO15, QWEN_IMAGE, WAN};

#[test]
#[ignore = "needs a CUDA device"]
fn flux_in_bfloat16_is_the_float32_step_of_a_cpu() {
    FLUX.check_on("cuda");
}

#[test]
#[ignore = "needs a CUDA device"]
fn flux2_in_bfloat16_is_the_float32_step_of_a_cpu() {
    FLUX2.check_on("cuda");
}

#[test]
#[ignore = "needs a CUDA device"]
fn qwen_image_in_bfloat16_is_the_float32_step_of_a_cpu() {
    QWEN_IMAGE.check_on("cuda");
}

#[test]
#[ignore = "needs a CUDA device"]
fn wan_in_bfloat16_is_the_float32_step_of_a_cpu() {
    WAN.check_on("cuda");
}

#[test]
#[ignore = "needs a CUDA device"]
fn hunyuan_video15_in_bfloat16_is_the_float32_step_of_a_cpu() {
    HUNYUAN_VIDEO15.check_on("cuda");
}
