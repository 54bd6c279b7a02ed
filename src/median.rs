//! The median, which is robust against an outlier.

/// The value to take if the number of values is even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Middle {
    Lower,
    Upper,
}

/// Returns the median of `values`, which is always one of them; `None` without values.
pub fn median(values: impl IntoIterator<Item = f64>, middle: Middle) -> Option<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.len() / 2;
    let index = match middle {
        Middle::Upper => upper,
        Middle::Lower => sorted.len().saturating_sub(1) / 2,
    };
    sorted.get(index).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_number_of_values_has_two_in_the_middle() {
        assert_eq!(median([4.0, 1.0, 3.0, 2.0], Middle::Lower), Some(2.0));
        assert_eq!(median([4.0, 1.0, 3.0, 2.0], Middle::Upper), Some(3.0));
        for middle in [Middle::Lower, Middle::Upper] {
            assert_eq!(median([9.0, 1.0, 2.0], middle), Some(2.0));
            assert_eq!(median([], middle), None);
        }
    }
}
