//! Kinds of elements, and how the ranks' elements become one.

/// A kind that the double carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    I64,
    F32,
    F64,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    Sum,
    Min,
    Max,
}

impl Element {
    /// By NCCL's number of it.
    pub fn of(number: u32) -> Option<Self> {
        match number {
            4 => Some(Element::I64),
            7 => Some(Element::F32),
            8 => Some(Element::F64),
            9 => Some(Element::Bf16),
            _ => None,
        }
    }

    pub fn bytes(self) -> usize {
        match self {
            Element::Bf16 => 2,
            Element::F32 => 4,
            Element::I64 | Element::F64 => 8,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Element::I64 => "i64",
            Element::F32 => "f32",
            Element::F64 => "f64",
            Element::Bf16 => "bf16",
        }
    }
}

impl Reduction {
    /// By NCCL's number of it.
    pub fn of(number: u32) -> Option<Self> {
        match number {
            0 => Some(Reduction::Sum),
            2 => Some(Reduction::Max),
            3 => Some(Reduction::Min),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Reduction::Sum => "sum",
            Reduction::Min => "min",
            Reduction::Max => "max",
        }
    }
}

/// Reduces the ranks' blocks into the first by the pairwise tree, `(0+1)+(2+3)` for four, rounded
/// after each addition: the order of fm-dist's other backends.
pub fn reduce(blocks: &mut [Vec<u8>], element: Element, reduction: Reduction) {
    let mut step = 1;
    while step < blocks.len() {
        for left in (0..blocks.len() - step).step_by(2 * step) {
            let (head, tail) = blocks.split_at_mut(left + step);
            join(&mut head[left], &tail[0], element, reduction);
        }
        step *= 2;
    }
}

fn join(left: &mut [u8], right: &[u8], element: Element, reduction: Reduction) {
    match element {
        Element::I64 => each(left, right, |a, b| {
            pick(i64::from_le_bytes(a), i64::from_le_bytes(b), reduction, i64::wrapping_add)
                .to_le_bytes()
        }),
        Element::F32 => each(left, right, |a, b| {
            pick(f32::from_le_bytes(a), f32::from_le_bytes(b), reduction, |a, b| a + b)
                .to_le_bytes()
        }),
        Element::F64 => each(left, right, |a, b| {
            pick(f64::from_le_bytes(a), f64::from_le_bytes(b), reduction, |a, b| a + b)
                .to_le_bytes()
        }),
        Element::Bf16 => {
            each(left, right, |a, b| narrow(pick(widen(a), widen(b), reduction, |a, b| a + b)))
        }
    }
}

fn each<const N: usize>(left: &mut [u8], right: &[u8], join: impl Fn([u8; N], [u8; N]) -> [u8; N]) {
    let (left, right) = (left.as_chunks_mut::<N>().0, right.as_chunks::<N>().0);
    for (left, right) in left.iter_mut().zip(right) {
        *left = join(*left, *right);
    }
}

fn pick<T: PartialOrd>(a: T, b: T, reduction: Reduction, add: impl Fn(T, T) -> T) -> T {
    match reduction {
        Reduction::Sum => add(a, b),
        Reduction::Min => {
            if b < a {
                b
            } else {
                a
            }
        }
        Reduction::Max => {
            if b > a {
                b
            } else {
                a
            }
        }
    }
}

fn widen(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// To the nearest bf16, ties to even.
fn narrow(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    if value.is_nan() {
        return ((bits >> 16) as u16 | 0x40).to_le_bytes();
    }
    let rounded = bits + 0x7fff + ((bits >> 16) & 1);
    ((rounded >> 16) as u16).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reduced<const N: usize>(
        ranks: &[[u8; N]],
        element: Element,
        reduction: Reduction,
    ) -> [u8; N] {
        let mut blocks: Vec<Vec<u8>> = ranks.iter().map(|bytes| bytes.to_vec()).collect();
        reduce(&mut blocks, element, reduction);
        blocks[0][..].try_into().unwrap()
    }

    #[test]
    fn sums_are_pairwise_trees_over_the_ranks() {
        // Numbers of which every order of additions gives another sum.
        let ranks = [1.0_f32, 3e-8, 6e-8, 1e-7, -1.0];
        let expected = ((ranks[0] + ranks[1]) + (ranks[2] + ranks[3])) + ranks[4];
        assert_ne!(expected, ranks.iter().sum());
        let sum = reduced(&ranks.map(f32::to_le_bytes), Element::F32, Reduction::Sum);
        assert_eq!(f32::from_le_bytes(sum), expected);
    }

    #[test]
    fn bf16_is_rounded_to_nearest_even_after_each_addition() {
        // 1 + 2^-8 lies between 1 and its neighbour and goes to the even one; 1 + 3 * 2^-8 goes up.
        let [one, half, and_a_half] = [0x3f80_u16, 0x3b80, 0x3c40].map(u16::to_le_bytes);
        assert_eq!(reduced(&[one, half], Element::Bf16, Reduction::Sum), one);
        assert_eq!(reduced(&[one, half, half], Element::Bf16, Reduction::Sum), one);
        assert_eq!(
            reduced(&[one, and_a_half], Element::Bf16, Reduction::Sum),
            0x3f82_u16.to_le_bytes()
        );
        assert!(widen(narrow(f32::NAN)).is_nan());
        assert_eq!(widen(narrow(f32::MAX)), f32::INFINITY);
    }

    #[test]
    fn integers_and_doubles_keep_all_their_bits() {
        let integers = [i64::MAX - 5, 3, -7].map(i64::to_le_bytes);
        assert_eq!(
            i64::from_le_bytes(reduced(&integers, Element::I64, Reduction::Sum)),
            i64::MAX - 9
        );
        assert_eq!(i64::from_le_bytes(reduced(&integers, Element::I64, Reduction::Min)), -7);
        let doubles = [1.0_f64, 1e-16 * 3.0, 7.5].map(f64::to_le_bytes);
        assert_eq!(
            f64::from_le_bytes(reduced(&doubles, Element::F64, Reduction::Sum)),
            (1.0 + 1e-16 * 3.0) + 7.5
        );
        assert_eq!(f64::from_le_bytes(reduced(&doubles, Element::F64, Reduction::Max)), 7.5);
    }
}
