//! What the message adds when a GPU, or a library that works on it, has failed.

use crate::cuda::health;

/// Kernels are queued, and the host meets their errors at some later call.
const LATE: &str =
    "Kernels run behind the host, so the place may be late: CUDA_LAUNCH_BLOCKING=1 finds it";

/// Adds to the driver's words how to find the place, and the faults that NVML knows of.
pub fn explain(what: &str) -> String {
    with_faults(what, &health::faults())
}

fn with_faults(what: &str, faults: &[String]) -> String {
    let told =
        if faults.is_empty() { String::new() } else { format!("; NVML: {}", faults.join(", ")) };
    format!("{}. {LATE}{told}", what.trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpus_words_are_followed_by_the_way_to_the_place_and_by_what_nvml_knows() {
        let words = "CUDA error: an illegal memory access was encountered";
        let late = format!("{words}. {LATE}");
        assert_eq!(with_faults(words, &[]), late);
        let faults = ["2 uncorrected ECC errors since the driver was loaded", "Xid 48, 63"];
        assert_eq!(
            with_faults(words, &faults.map(String::from)),
            format!("{late}; NVML: {}", faults.join(", "))
        );
    }
}
