//! Several linear maps as one matrix: their LoRAs become one, and the one becomes several.
//!
//! Beside each other, LoRAs A₁, A₂ and B₁, B₂ are A = [A₁; A₂] and B with B₁ and B₂ on its
//! diagonal; the rank is their sum. A LoRA that was trained on the whole matrix has a B without
//! such zeros; each part then takes A whole, and its rows of B.

use tch::{Kind, Tensor};

use crate::lora::Pair;

/// Returns one pair for maps that lie one below the other; `of` has the outputs of each as
/// multiples of the inputs. Maps without a pair keep their values.
///
/// # Errors
/// A reason on one line if their shapes are not those of such maps, or if DoRA's magnitudes are
/// missing of some.
pub fn joined(parts: &[Option<&Pair>], of: &[i64]) -> Result<Pair, String> {
    let there: Vec<&Pair> = parts.iter().copied().flatten().collect();
    let first = there.first().expect("a matrix of at least one pair");
    let inputs = first.inputs();
    let outputs: Vec<i64> = of.iter().map(|multiple| multiple * inputs).collect();
    for (part, outputs) in parts.iter().zip(&outputs) {
        if let Some(pair) = part
            && [pair.outputs(), pair.inputs()] != [*outputs, inputs]
        {
            let found = (pair.inputs(), pair.outputs());
            return Err(format!(
                "has {} inputs and {} outputs for a part that has {inputs} and {outputs}",
                found.0, found.1
            ));
        }
    }
    let magnitude = joined_magnitudes(parts)?;
    if there.len() == parts.len() && there.iter().all(|pair| has_same_a(pair, first)) {
        let b: Vec<Tensor> = there.iter().map(|pair| pair.b.shallow_clone()).collect();
        let b = Tensor::cat(&b, 0);
        return Ok(Pair { a: first.a.shallow_clone(), b, alpha: first.alpha, magnitude });
    }
    let rank: i64 = there.iter().map(|pair| pair.rank()).sum();
    // Alpha of the whole is the sum only where all have one scale.
    let is_even = there
        .iter()
        .all(|pair| pair.alpha * first.rank() as f64 == first.alpha * pair.rank() as f64);
    let kind = first.b.kind();
    let mut before = 0;
    let rows = parts.iter().zip(outputs).map(|(part, outputs)| {
        let zeros = |columns: i64| Tensor::zeros([outputs, columns], (kind, first.b.device()));
        let Some(pair) = part else { return zeros(rank) };
        let b = if is_even { pair.b.shallow_clone() } else { pair.scaled_b() };
        let after = rank - before - pair.rank();
        let row = Tensor::cat(&[zeros(before), b.to_kind(kind), zeros(after)], 1);
        before += pair.rank();
        row
    });
    let b = Tensor::cat(&rows.collect::<Vec<_>>(), 0);
    let a: Vec<Tensor> = there.iter().map(|pair| pair.a.to_kind(first.a.kind())).collect();
    let alpha = if is_even { there.iter().map(|pair| pair.alpha).sum() } else { rank as f64 };
    Ok(Pair { a: Tensor::cat(&a, 0), b, alpha, magnitude })
}

fn joined_magnitudes(parts: &[Option<&Pair>]) -> Result<Option<Tensor>, String> {
    let magnitudes: Vec<Tensor> = parts
        .iter()
        .flatten()
        .filter_map(|pair| pair.magnitude.as_ref().map(Tensor::shallow_clone))
        .collect();
    match magnitudes.len() {
        0 => Ok(None),
        count if count == parts.len() => Ok(Some(Tensor::cat(&magnitudes, 0))),
        count => Err(format!(
            "is one of {} maps that are one matrix there, and only {count} have DoRA's magnitudes",
            parts.len()
        )),
    }
}

fn has_same_a(pair: &Pair, other: &Pair) -> bool {
    pair.alpha == other.alpha && pair.a.size() == other.a.size() && pair.a.equal(&other.a)
}

/// Returns the pairs of the maps that lie one below the other in `whole`; none for a map that the
/// LoRA leaves as it is.
///
/// # Errors
/// A reason on one line if the outputs are not those of such maps.
pub fn parted(whole: &Pair, of: &[i64]) -> Result<Vec<Option<Pair>>, String> {
    let (inputs, rank) = (whole.inputs(), whole.rank());
    let outputs: Vec<i64> = of.iter().map(|multiple| multiple * inputs).collect();
    let all: i64 = outputs.iter().sum();
    if whole.outputs() != all {
        return Err(format!("maps {inputs} inputs to {} outputs, expected {all}", whole.outputs()));
    }
    let rows = |tensor: &Tensor| tensor.split_with_sizes(outputs.as_slice(), 0);
    let (b, magnitudes) = (rows(&whole.b), whole.magnitude.as_ref().map(rows));
    let used: Vec<Vec<bool>> = b.iter().map(used_columns).collect();
    let columns = columns(&used, rank as usize);
    let part = |index: usize| {
        let columns = columns.as_ref().map(|columns| columns[index].as_slice());
        let magnitude = magnitudes.as_ref().map(|rows| rows[index].contiguous());
        let (a, b) = match columns {
            Some([]) => return None,
            Some(columns) => {
                let taken = Tensor::from_slice(columns);
                (whole.a.index_select(0, &taken), b[index].index_select(1, &taken))
            }
            None => (whole.a.shallow_clone(), b[index].contiguous()),
        };
        let alpha = whole.alpha * a.size()[0] as f64 / rank as f64;
        Some(Pair { a, b, alpha, magnitude })
    };
    Ok((0..of.len()).map(part).collect())
}

/// Returns for each column whether it holds a number other than zero.
fn used_columns(rows: &Tensor) -> Vec<bool> {
    let any = rows.ne(0.0).any_dim(0, false);
    Vec::<bool>::try_from(any.to_kind(Kind::Bool)).expect("one axis of booleans")
}

/// Returns the columns of each part, if no column serves two of them; none if the parts share A.
fn columns(used: &[Vec<bool>], rank: usize) -> Option<Vec<Vec<i64>>> {
    let parts = used.len();
    // Equal ranks first: a column may be zero by chance, or before the first step.
    let share = rank / parts;
    let is_even = share * parts == rank
        && used
            .iter()
            .enumerate()
            .all(|(index, used)| (0..rank).all(|column| !used[column] || column / share == index));
    if is_even {
        let of = |index: usize| (index * share..(index + 1) * share).map(|column| column as i64);
        return Some((0..parts).map(|index| of(index).collect()).collect());
    }
    let users = |column: usize| used.iter().filter(|used| used[column]).count();
    let is_apart = (0..rank).all(|column| users(column) <= 1);
    if !is_apart || used.iter().flatten().all(|used| !used) {
        return None;
    }
    let of = |used: &Vec<bool>| {
        (0..rank).filter(|column| used[*column]).map(|column| column as i64).collect()
    };
    Some(used.iter().map(of).collect())
}

/// Returns the tensor with the second half of its rows first.
///
/// # Errors
/// A reason on one line if they are odd.
pub fn swapped(pair: &Pair) -> Result<Pair, String> {
    if pair.outputs() % 2 != 0 {
        return Err(format!("has {} outputs, expected an even number", pair.outputs()));
    }
    let swap = |tensor: &Tensor| {
        let halves = tensor.chunk(2, 0);
        Tensor::cat(&[&halves[1], &halves[0]], 0)
    };
    let magnitude = pair.magnitude.as_ref().map(swap);
    Ok(Pair { b: swap(&pair.b), magnitude, ..pair.shallow_clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::tests::pair;

    const QKV: &[i64] = &[1, 1, 1];

    fn assert_same(found: &Pair, expected: &Pair) {
        assert!(found.a.equal(&expected.a) && found.b.equal(&expected.b));
        assert_eq!(found.alpha, expected.alpha);
    }

    /// Joins three parts, and returns what they are parted into.
    fn there_and_back(parts: &[Option<&Pair>]) -> Vec<Option<Pair>> {
        let whole = joined(parts, QKV).expect("one matrix");
        let found = parted(&whole, QKV).expect("three maps");
        let zeros = Tensor::zeros([4, 4], (Kind::Float, tch::Device::Cpu));
        let product =
            |part: Option<&Pair>| part.map_or_else(|| zeros.shallow_clone(), Pair::product);
        let rows = whole.product().chunk(3, 0);
        for ((part, found), rows) in parts.iter().zip(&found).zip(rows) {
            for product in [product(*part), product(found.as_ref())] {
                let difference = (product - &rows).abs().max().double_value(&[]);
                assert!(difference < 1e-5, "{difference}");
            }
        }
        found
    }

    #[test]
    fn maps_that_were_joined_come_apart_as_they_were() {
        let [q, k, v] = [0, 1, 2].map(|scope| pair(scope, [4, 4], 2, 1.0));
        let found = there_and_back(&[Some(&q), Some(&k), Some(&v)]);
        for (found, expected) in found.iter().zip([&q, &k, &v]) {
            assert_same(found.as_ref().expect("a part"), expected);
        }
    }

    #[test]
    fn maps_of_unequal_ranks_and_missing_ones_come_apart_too() {
        let [q, v] = [pair(0, [4, 4], 3, 3.0), pair(1, [4, 4], 1, 1.0)];
        let found = there_and_back(&[Some(&q), None, Some(&v)]);
        assert!(found[1].is_none());
        assert_same(found[0].as_ref().expect("a part"), &q);
        assert_same(found[2].as_ref().expect("a part"), &v);
    }

    #[test]
    fn unequal_scales_are_folded() {
        let [q, k, v] =
            [(0, 1.0), (1, 8.0), (2, 3.0)].map(|(scope, alpha)| pair(scope, [4, 4], 2, alpha));
        let found = there_and_back(&[Some(&q), Some(&k), Some(&v)]);
        for (found, expected) in found.iter().flatten().zip([&q, &k, &v]) {
            assert_eq!(found.alpha, 2.0);
            assert!(found.b.equal(&expected.scaled_b()));
        }
    }

    #[test]
    fn a_lora_of_the_whole_matrix_is_shared_and_joins_to_itself() {
        let whole = pair(0, [12, 4], 2, 4.0);
        let parts = parted(&whole, QKV).expect("three maps");
        let parts: Vec<Option<&Pair>> = parts.iter().map(Option::as_ref).collect();
        assert!(parts.iter().flatten().all(|part| part.a.equal(&whole.a) && part.alpha == 4.0));
        assert_same(&joined(&parts, QKV).expect("one matrix"), &whole);
    }

    #[test]
    fn magnitudes_are_joined_where_all_have_them() {
        let with = |mut pair: Pair| {
            pair.magnitude = Some(pair.b.norm_scalaropt_dim(2.0, [1i64], false));
            pair
        };
        let [q, k] = [0, 1].map(|scope| with(pair(scope, [4, 4], 2, 2.0)));
        let v = pair(2, [4, 4], 2, 2.0);
        let told = joined(&[Some(&q), Some(&k), Some(&v)], QKV).expect_err("no magnitude of v");
        assert!(told.ends_with("only 2 have DoRA's magnitudes"), "{told}");
        let v = with(v);
        let whole = joined(&[Some(&q), Some(&k), Some(&v)], QKV).expect("one matrix");
        let parts = parted(&whole, QKV).expect("three maps");
        let magnitude = |pair: &Pair| pair.magnitude.as_ref().expect("DoRA").shallow_clone();
        assert!(magnitude(parts[1].as_ref().expect("a part")).equal(&magnitude(&k)));
    }

    #[test]
    fn shapes_of_other_matrices_are_refused() {
        assert_eq!(
            parted(&pair(0, [13, 4], 2, 2.0), QKV).expect_err("13 rows"),
            "maps 4 inputs to 13 outputs, expected 12"
        );
        let other = pair(0, [5, 4], 2, 2.0);
        assert!(joined(&[Some(&other), None, None], QKV).is_err());
        assert!(swapped(&other).is_err());
        let even = pair(0, [6, 4], 2, 2.0);
        let back = swapped(&swapped(&even).expect("even")).expect("even");
        assert_same(&back, &even);
    }
}
