//! Frozen weights of linear maps in fewer bits than they are computed with. A product unpacks its
//! weight, forward and backward, and lets it go.

mod float8;
mod nf4;
mod weight;

use tch::{Kind, Tensor};

pub(super) use weight::{Weight, numbers};

use crate::settings::choice;

choice! {
    /// The form in which a model's frozen linear maps are held. Their biases, norms, tables and
    /// kernels, and the first and last stage, stay as they are computed with.
    pub enum FrozenDtype {
        /// 16 bits with the exponent of 32.
        "bfloat16" => Bfloat16,
        /// 8 bits, and a scale for each weight, as in ComfyUI's `fp8_scaled` files.
        "float8_e4m3" => Float8,
        /// 8 bits, and a scale for each output.
        "float8_e4m3_rows" => Float8Rows,
        /// 4 bits that stand for quantiles of the normal distribution, and a scale for every 64
        /// numbers, as QLoRA and bitsandbytes have it.
        "nf4" => Nf4,
    }
}

/// Bytes of a word, the unit in which packed weights are held: an i64, which every backend carries
/// between ranks.
const WORD: i64 = 8;
/// Bytes of a scale, f32.
const SCALE: i64 = 4;

/// A weight `[outputs, inputs]` in a form: the codes of its numbers, then its scales. A form says
/// nothing of ranks: a weight is packed whole, and then cut like any other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packed {
    form: FrozenDtype,
    shape: [i64; 2],
}

impl Packed {
    /// # Panics
    /// If the shape is not that of a matrix (a bug in the caller).
    pub(super) fn new(form: FrozenDtype, shape: &[i64]) -> Self {
        Packed { form, shape: shape.try_into().expect("the weight of a linear map is a matrix") }
    }

    /// Number of its elements.
    pub fn numel(&self) -> i64 {
        self.shape[0] * self.shape[1]
    }

    /// Number of words that hold it.
    pub fn words(&self) -> i64 {
        units(self.code_bytes(), WORD) + units(SCALE * self.num_scales(), WORD)
    }

    /// Bytes that [`unpack`](Self::unpack) takes at most, the result's included.
    pub fn unpacking_bytes(&self, kind: Kind) -> i64 {
        let (wide, result) = (SCALE, kind.elt_size_in_bytes() as i64);
        let both = if kind == Kind::Float { wide } else { wide + result };
        let of_each = match self.form {
            FrozenDtype::Bfloat16 => result,
            FrozenDtype::Float8 | FrozenDtype::Float8Rows => both,
            // The index of two numbers is an i32.
            FrozenDtype::Nf4 => both.max(wide + 2),
        };
        of_each * self.numel()
    }

    /// Bytes that [`pack`](Self::pack) takes at most for f32, the result's included.
    pub fn packing_bytes(&self) -> i64 {
        let of_each = match self.form {
            FrozenDtype::Bfloat16 => 4,
            // The numbers divided by their scale, and the codes, twice.
            FrozenDtype::Float8 | FrozenDtype::Float8Rows => 6,
            // The codes, twice; what they are made of, some at a time.
            FrozenDtype::Nf4 => 1,
        };
        of_each * self.numel()
    }

    /// Returns elements of any kind, `[outputs · inputs]`, as words, i64.
    pub fn pack(&self, elements: &Tensor) -> Tensor {
        let weight = elements.to_kind(Kind::Float).view(self.shape);
        let words = Tensor::zeros([self.words()], (Kind::Int64, weight.device()));
        let (codes, scales) = match self.form {
            FrozenDtype::Bfloat16 => (weight.to_kind(Kind::BFloat16), None),
            FrozenDtype::Float8 => float8::pack(&weight, &[0, 1]),
            FrozenDtype::Float8Rows => float8::pack(&weight, &[1]),
            FrozenDtype::Nf4 => nf4::pack(&weight),
        };
        self.codes(&words).copy_(&codes.view([-1]).view_dtype(Kind::Uint8));
        if let Some(scales) = scales {
            self.scales(&words).copy_(&scales.view([-1]));
        }
        words
    }

    /// Returns the weight `[outputs, inputs]` that words stand for.
    pub fn unpack(&self, words: &Tensor, kind: Kind) -> Tensor {
        let codes = self.codes(words);
        let weight = match self.form {
            FrozenDtype::Bfloat16 => codes.view_dtype(Kind::BFloat16),
            FrozenDtype::Float8 | FrozenDtype::Float8Rows => {
                float8::unpack(&codes.view(self.shape), &self.scales(words))
            }
            FrozenDtype::Nf4 => nf4::unpack(&codes, &self.scales(words)).narrow(0, 0, self.numel()),
        };
        weight.view(self.shape).to_kind(kind)
    }

    fn code_bytes(&self) -> i64 {
        match self.form {
            FrozenDtype::Bfloat16 => 2 * self.numel(),
            FrozenDtype::Float8 | FrozenDtype::Float8Rows => self.numel(),
            FrozenDtype::Nf4 => nf4::code_bytes(self.numel()),
        }
    }

    fn num_scales(&self) -> i64 {
        match self.form {
            FrozenDtype::Bfloat16 => 0,
            FrozenDtype::Float8 => 1,
            FrozenDtype::Float8Rows => self.shape[0],
            FrozenDtype::Nf4 => nf4::num_scales(self.numel()),
        }
    }

    /// The codes' part of the words, u8.
    fn codes(&self, words: &Tensor) -> Tensor {
        words.view_dtype(Kind::Uint8).narrow(0, 0, self.code_bytes())
    }

    /// The scales' part of the words, f32.
    fn scales(&self, words: &Tensor) -> Tensor {
        let start = units(self.code_bytes(), WORD) * WORD;
        let bytes = words.view_dtype(Kind::Uint8).narrow(0, start, SCALE * self.num_scales());
        bytes.view_dtype(Kind::Float)
    }
}

/// The largest absolute numbers along axes, which stay with a size of one.
fn sizes(tensor: &Tensor, axes: &[i64]) -> Tensor {
    // Without a copy as large as the weight.
    tensor.amax(axes, true).maximum(&tensor.amin(axes, true).neg())
}

/// Number of units that so many things fill, the last one perhaps in part.
fn units(count: i64, unit: i64) -> i64 {
    (count + unit - 1) / unit
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::rng::{Key, Purpose};
    use crate::settings::Choice;

    /// A weight as networks have them.
    fn drawn(shape: [i64; 2]) -> Tensor {
        let draw = || Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.02;
        Key::new(1, Purpose::Test).seeded(draw)
    }

    fn there_and_back(form: FrozenDtype, weight: &Tensor) -> Tensor {
        let packed = Packed::new(form, &weight.size());
        let words = packed.pack(&weight.view([-1]));
        assert_eq!(words.numel() as i64, packed.words());
        packed.unpack(&words, Kind::Float)
    }

    fn off(found: &Tensor, expected: &Tensor) -> f64 {
        ((found - expected).norm() / expected.norm()).double_value(&[])
    }

    /// The error of a rounding to `bits` of mantissa is uniform within half a unit: its root mean
    /// square is 2^-bits/√12 of a number's power of two. The other bounds are measured.
    #[test]
    fn a_form_keeps_as_much_of_a_weight_as_its_bits_can_hold() {
        let weight = drawn([192, 256]);
        for (form, expected) in [
            (FrozenDtype::Bfloat16, 0.0017),
            (FrozenDtype::Float8, 0.0265),
            (FrozenDtype::Float8Rows, 0.0262),
            (FrozenDtype::Nf4, 0.0960),
        ] {
            let found = off(&there_and_back(form, &weight), &weight);
            assert!((found / expected - 1.0).abs() < 0.05, "{form:?}: {found}");
        }
    }

    #[test]
    fn what_was_packed_once_packs_to_itself() {
        let weight = drawn([48, 64]);
        for (_, form) in FrozenDtype::ALL {
            let once = there_and_back(*form, &weight);
            assert!(off(&there_and_back(*form, &once), &once) < 1e-7, "{form:?}");
        }
    }

    #[test]
    fn odd_shapes_zeros_and_outliers_hold() {
        for (_, form) in FrozenDtype::ALL {
            let odd = drawn([3, 35]);
            assert!(off(&there_and_back(*form, &odd), &odd) < 0.12, "{form:?}");
            let zeros = Tensor::zeros([2, 70], (Kind::Float, Device::Cpu));
            assert!(there_and_back(*form, &zeros).equal(&zeros), "{form:?}");
        }
        let outlier = drawn([4, 64]);
        let _ = outlier.get(1).fill_(1e4);
        let rows = there_and_back(FrozenDtype::Float8Rows, &outlier);
        let row = |tensor: &Tensor| tensor.get(0);
        assert!(off(&row(&rows), &row(&outlier)) < 0.03, "a row's scale is its own");
        let whole = there_and_back(FrozenDtype::Float8, &outlier);
        assert!(off(&row(&whole), &row(&outlier)) > 0.5, "a weight's scale is that of its largest");
    }
}
