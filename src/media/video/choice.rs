//! The frames that stand for a video.

/// Returns the number of frames that are taken of `available` ones: at most `most`, and one more
/// than a multiple of `step`, as autoencoders that compress time want it.
pub fn kept(available: usize, most: usize, step: usize) -> usize {
    let count = available.min(most);
    count - count.saturating_sub(1) % step
}

/// Returns `count` of the frames `0..available`, from the first to the last at equal distances, cut
/// to whole numbers; all of them if there are no more.
///
/// Source: NeMo AutoModel's processors, `np.linspace(0, available - 1, count).astype(int)`.
pub fn chosen(available: usize, count: usize) -> Vec<usize> {
    if count >= available {
        return (0..available).collect();
    }
    // As NumPy computes it: index times step, and the last one exactly.
    let step = (available - 1) as f64 / count.saturating_sub(1).max(1) as f64;
    let place = |index: usize| match index + 1 == count && count > 1 {
        true => available - 1,
        false => (index as f64 * step) as usize,
    };
    (0..count).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_those_of_linspace() {
        // Source: NumPy 2.4.6.
        assert_eq!(chosen(10, 4), [0, 3, 6, 9]);
        assert_eq!(chosen(100, 5), [0, 24, 49, 74, 99]);
        assert_eq!(chosen(81, 17).len(), 17);
        assert_eq!(chosen(7, 1), [0]);
        assert_eq!(chosen(3, 9), [0, 1, 2]);
        assert_eq!(chosen(0, 4), [] as [usize; 0]);
    }

    #[test]
    fn what_is_kept_is_one_more_than_a_multiple() {
        let of = |available| kept(available, 81, 4);
        assert_eq!([1, 2, 4, 5, 8, 80, 81, 500].map(of), [1, 1, 1, 5, 5, 77, 81, 81]);
        assert_eq!(kept(30, 16, 1), 16);
        assert_eq!(kept(0, 16, 4), 0);
    }
}
