//! Descriptors: a process may hold only as many files open as its limit allows, and data files are not its only ones.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that stay open at most, however high the limit is: open files cost every rank's kernel memory and a network's file
/// server a lock each.
const MOST_KEPT: u64 = 1 << 14;

/// Number of `files` that may stay open. The rest is opened for each read.
///
/// The soft limit is raised as far as that needs and the hard limit allows; what stays open is at most half of the free
/// descriptors, so that libtorch, MPI, NCCL, threads and the run folder have the other half.
pub(super) fn kept_open(files: usize) -> usize {
    let (wanted, in_use) = (MOST_KEPT.min(files as u64), in_use());
    allowed(wanted, in_use, raised_to(in_use + 2 * wanted)) as usize
}

fn allowed(wanted: u64, in_use: u64, limit: u64) -> u64 {
    wanted.min(limit.saturating_sub(in_use) / 2)
}

/// The soft limit after an attempt to have it at `needed` at least.
fn raised_to(needed: u64) -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let Some(current) = current else { return u64::MAX };
    let aim = maximum.map_or(needed, |maximum| maximum.min(needed));
    let raised = aim > current && setrlimit(Resource::Nofile, Rlimit { current: Some(aim), maximum }).is_ok();
    if raised { aim } else { current }
}

/// Descriptors of this process, its guess where `/proc` is not there.
fn in_use() -> u64 {
    const USUAL: u64 = 64;
    fs::read_dir("/proc/self/fd").map_or(USUAL, |entries| entries.count() as u64)
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;
    use crate::data::Dataset;
    use crate::data::made_up::{images, written};
    use crate::data::manifest::Manifest;

    #[test]
    fn files_beyond_those_kept_open_are_read_alike_until_they_are_replaced() {
        let part = |name, first| (name, "2x2", vec![("image_latents", images(first, 2, 2))]);
        let folder = written(&[part("a.safetensors", 0), part("b.safetensors", 2), part("c.safetensors", 4)], None);
        let keeping = |kept| {
            let manifest = Manifest::of_folder(folder.path()).expect("a sound manifest");
            Dataset::keeping(folder.path(), manifest, kept).expect("a sound dataset")
        };
        for kept in 0..4 {
            let batch = keeping(kept).batch(&[5, 0, 2, 3]).expect("sound samples");
            let expected = Tensor::from_slice(&[5f32, 0.0, 2.0, 3.0]);
            assert!(batch.tensors["image_latents"].amax([1, 2, 3], false).equal(&expected), "{kept} kept");
            keeping(kept).verify_hashes().expect("untouched files");
        }
        let dataset = keeping(1);
        for name in ["a.safetensors", "c.safetensors"] {
            let (path, other) = (folder.path().join(name), folder.path().join("other"));
            fs::copy(&path, &other).and_then(|_| fs::rename(&other, &path)).expect("another file in its place");
        }
        dataset.batch(&[0, 1]).expect("the file that is still open");
        let error = dataset.batch(&[0, 4]).expect_err("another file");
        assert_eq!(error.exit_code(), 40);
        assert!(error.to_string().contains("c.safetensors: was replaced while the run used it"), "{error}");
    }

    #[test]
    fn half_of_the_free_descriptors_are_left_to_others() {
        assert_eq!(allowed(40, 12, 1024), 40, "there is room for all");
        assert_eq!(allowed(40, 12, 46), 17);
        assert_eq!(allowed(1017, 24, 1024), 500);
        assert_eq!((allowed(40, 46, 46), allowed(40, 50, 46)), (0, 0), "there is no room at all");
    }

    #[test]
    fn the_limit_is_raised_to_what_is_needed_and_never_lowered() {
        let before = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!(raised_to(1) >= before);
        let needed = before.saturating_add(1).min(getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX));
        assert!(raised_to(needed) >= needed);
        assert!(getrlimit(Resource::Nofile).current.is_none_or(|current| current >= needed));
    }
}
