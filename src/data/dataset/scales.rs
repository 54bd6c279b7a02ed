//! Floats of 8 bits: a file holds them beside their scale, and a batch their products as float32.
//!
//! `text_embeddings` of a kind of 8 bits may come with `text_embeddings.scale`, float32: `[N]` for
//! the file's `N` samples or `[1]` for all of them. A number is then that of the byte times the
//! scale, rounded once to float32. Without a scale the bytes count as they are.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::data::group::Layout;
use crate::error::{Error, Result};
use crate::files::finite::TOO_LARGE;
use crate::files::float8;
use crate::files::safetensors::{SafeTensors, TensorInfo, is_eight_bits};
use crate::tensor::{bytes, elements_mut};

/// Ending of the key under which a file holds the scale.
pub const SCALE: &str = ".scale";

/// The scale of one tensor of a file: one number for each sample, or one for all.
#[derive(Debug)]
pub(super) struct Scale(Vec<f32>);

impl Scale {
    /// Returns the scale of a sample of the file, counted from 0.
    pub fn of(&self, sample: u64) -> f32 {
        if self.0.len() == 1 { self.0[0] } else { self.0[sample as usize] }
    }

    /// Reads the scale of the tensor `key`, which has `rows` rows of samples.
    fn read(file: &SafeTensors, key: &str, rows: u64) -> Result<Self> {
        let name = format!("{key}{SCALE}");
        let refused = |what: String| Err(Error::data(file.path(), format!("`{name}` {what}")));
        let (kind, found) = (file.info(key)?.kind, file.info(&name)?);
        if !is_eight_bits(kind) {
            return refused(format!(
                "scales `{key}` of {kind:?}; only floats of 8 bits are scaled"
            ));
        }
        let count = found.shape.iter().product::<i64>() as u64;
        if found.kind != Kind::Float || found.shape.len() > 2 || (count != 1 && count != rows) {
            let TensorInfo { kind, shape, .. } = found;
            return refused(format!("is {kind:?} {shape:?}; expected Float [{rows}] or [1]"));
        }
        let scale = Vec::<f32>::try_from(file.read(&name)?.flatten(0, -1)).expect("f32, one axis");
        let most = TOO_LARGE / float8::largest(kind);
        match scale.iter().find(|scale| !(0.0..most).contains(*scale)) {
            Some(bad) => refused(format!("holds {bad}; scales are at least 0 and below {most:e}")),
            None => Ok(Scale(scale)),
        }
    }
}

/// Takes the scales out of a file's `layout`.
///
/// # Errors
/// [`Error::Data`] if a scale belongs to no float of 8 bits, or is not finite or negative.
pub(super) fn take_scales(
    file: &SafeTensors,
    rows: u64,
    layout: &mut Layout,
) -> Result<BTreeMap<String, Scale>> {
    let mut found = BTreeMap::new();
    let keys: Vec<String> =
        layout.keys().filter_map(|name| name.strip_suffix(SCALE)).map(String::from).collect();
    for key in keys {
        layout.remove(&format!("{key}{SCALE}"));
        found.insert(key.clone(), Scale::read(file, &key, rows)?);
    }
    Ok(found)
}

/// Returns the kind in which batches hold numbers that a file holds in `kind`.
pub fn kind_in_batches(kind: Kind) -> Kind {
    if is_eight_bits(kind) { Kind::Float } else { kind }
}

/// Writes the numbers of `stored`, bytes of a kind of 8 bits, times `scale` to `numbers`.
pub(super) fn widen(kind: Kind, stored: &[u8], scale: f32, numbers: &mut [f32]) {
    let table = float8::numbers(kind).map(|number| number * scale);
    for (number, byte) in numbers.iter_mut().zip(stored) {
        *number = table[usize::from(*byte)];
    }
}

/// Returns the finite tensors of a file with `rows` rows, as batches hold them.
///
/// # Errors
/// Errors of [`take_scales`] and [`SafeTensors::read_finite`].
pub fn read_widened(file: &SafeTensors, rows: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    let of_another = |name: &str| name.strip_suffix(SCALE).is_some_and(|key| file.holds(key));
    for info in file.tensors().iter().filter(|info| !of_another(&info.name)) {
        let stored = file.read_finite(&info.name)?;
        let scaled = file.holds(&format!("{}{SCALE}", info.name));
        let scale = if scaled { Scale::read(file, &info.name, rows)? } else { Scale(vec![1.0]) };
        let tensor = if is_eight_bits(info.kind) { widened(&stored, &scale, rows) } else { stored };
        tensors.insert(info.name.clone(), tensor);
    }
    Ok(tensors)
}

fn widened(stored: &Tensor, scale: &Scale, rows: u64) -> Tensor {
    let mut wide = Tensor::empty(stored.size(), (Kind::Float, stored.device()));
    let row = stored.numel() / rows as usize;
    let samples = bytes(stored).chunks(row).zip(elements_mut::<f32>(&mut wide).chunks_mut(row));
    for (sample, (stored_row, numbers)) in (0..).zip(samples) {
        widen(stored.kind(), stored_row, scale.of(sample), numbers);
    }
    wide
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::data::made_up::{Part, images, written, written_as};
    use crate::data::{Dataset, OnBad};
    use crate::rng::{Key, Purpose};

    fn drawn(scope: u64, size: &[i64], kind: Kind) -> Tensor {
        let draw = || Tensor::randn(size, (Kind::Float, Device::Cpu));
        Key::new(1, Purpose::Test).scope(scope).seeded(draw).to_kind(kind)
    }

    fn texts(kind: Kind) -> Tensor {
        drawn(0, &[2, 3, 4], kind)
    }

    /// Two images with these tensors beside them.
    fn part<'a>(name: &'a str, further: Vec<(&'a str, Tensor)>) -> Part<'a> {
        let mut tensors = vec![("image_latents", images(0, 2, 2))];
        tensors.extend(further);
        (name, "2x2", tensors)
    }

    fn opened(parts: &[Part<'_>]) -> Result<Dataset> {
        Dataset::open(written_as(2, parts, None).path())
    }

    fn refused(further: Vec<(&str, Tensor)>) -> String {
        opened(&[part("a.safetensors", further)]).expect_err("refused").to_string()
    }

    #[test]
    fn a_batch_holds_the_bytes_numbers_times_their_samples_scale() {
        for kind in [Kind::Float8e4m3fn, Kind::Float8e5m2] {
            let [own, common, plain] = [0, 1, 2].map(|scope| drawn(scope, &[2, 3, 4], kind));
            let of_each = Tensor::from_slice(&[0.37f32, 3e-5]);
            let dataset = opened(&[
                part(
                    "a.safetensors",
                    vec![
                        ("text_embeddings", own.copy()),
                        ("text_embeddings.scale", of_each.copy()),
                    ],
                ),
                part(
                    "b.safetensors",
                    vec![
                        ("text_embeddings", common.copy()),
                        ("text_embeddings.scale", Tensor::from_slice(&[7.3f32])),
                    ],
                ),
                part("c.safetensors", vec![("text_embeddings", plain.copy())]),
            ])
            .expect("a sound dataset");
            let batch = dataset.batch(&[5, 1, 2, 0]).expect("sound samples");
            let found = &batch.tensors["text_embeddings"];
            let wide = |texts: &Tensor, row| texts.to_kind(Kind::Float).get(row);
            let expected = [
                wide(&plain, 1),
                wide(&own, 1) * of_each.get(1),
                wide(&common, 0) * f64::from(7.3f32),
                wide(&own, 0) * of_each.get(0),
            ];
            assert_eq!(found.kind(), Kind::Float);
            assert!(found.equal(&Tensor::stack(&expected, 0)), "{kind:?}");
            assert!(!batch.tensors.contains_key("text_embeddings.scale"));
            assert_eq!(dataset.sample_shapes(&dataset.groups()[0]).len(), 2);
            let sample = dataset.sample(1).expect("a sample");
            assert_eq!(bytes(&sample["text_embeddings"]), bytes(&own.get(1)), "stored bits");
            assert_eq!(sample["text_embeddings.scale"].double_value(&[]), f64::from(3e-5f32));
            dataset.verify_numbers().expect("finite");
            dataset.verify_hashes().expect("untouched");
        }
    }

    #[test]
    fn texts_of_unequal_length_and_single_samples_have_scales_too() {
        let tokens = drawn(0, &[5, 4], Kind::Float8e4m3fn);
        let dataset = opened(&[part(
            "a.safetensors",
            vec![
                ("text_embeddings", tokens.copy()),
                ("text_embeddings.lengths", Tensor::from_slice(&[1i64, 4])),
                ("text_embeddings.scale", Tensor::from_slice(&[2f32, 0.5])),
            ],
        )])
        .expect("a sound dataset");
        let batch = dataset.batch(&[1, 0]).expect("sound samples");
        let found = &batch.tensors["text_embeddings"];
        let wide = tokens.to_kind(Kind::Float);
        assert!(found.get(0).narrow(0, 0, 4).equal(&(wide.narrow(0, 1, 4) * 0.5)));
        assert!(found.get(1).narrow(0, 0, 1).equal(&(wide.narrow(0, 0, 1) * 2.0)));
        assert_eq!(found.get(1).narrow(0, 1, 7).abs().max().double_value(&[]), 0.0);
    }

    #[test]
    fn conditions_may_have_8_bits() {
        let latents = vec![("image_latents", images(0, 2, 2))];
        let texts = texts(Kind::Float8e5m2);
        let folder =
            written(&[("a.safetensors", "2x2", latents)], Some((&["a", "b"], texts.copy())));
        let dataset = Dataset::open(folder.path()).expect("a sound dataset");
        let conditions = dataset.conditions().expect("finite").expect("some");
        assert!(conditions.tensors["text_embeddings"].equal(&texts.to_kind(Kind::Float)));
    }

    #[test]
    fn scales_that_are_none_are_refused() {
        let eight = || ("text_embeddings", texts(Kind::Float8e4m3fn));
        let scale = |scale: Tensor| ("text_embeddings.scale", scale);
        for (numbers, what) in [
            (&[1f32, 2.0, 3.0][..], "is Float [3]; expected Float [2] or [1]"),
            (&[1.0, -1.0], "holds -1; scales are at least 0 and below"),
            (&[f32::NAN, 1.0], "holds NaN"),
            (&[1e37, 1.0], "holds 10000000000000000000000000000000000000; scales"),
        ] {
            let error = refused(vec![eight(), scale(Tensor::from_slice(numbers))]);
            assert!(error.contains(&format!("`text_embeddings.scale` {what}")), "{error}");
        }
        let halves = Tensor::from_slice(&[1f32, 2.0]).to_kind(Kind::Half);
        assert!(refused(vec![eight(), scale(halves)]).contains("is Half [2]; expected Float"));
        let wide = ("text_embeddings", texts(Kind::Half));
        let error = refused(vec![wide, scale(Tensor::from_slice(&[1f32]))]);
        assert!(
            error.contains("scales `text_embeddings` of Half; only floats of 8 bits"),
            "{error}"
        );
        let error = refused(vec![scale(Tensor::from_slice(&[1f32]))]);
        assert!(error.contains("holds no tensor `text_embeddings`"), "{error}");
        let folder = written(&[part("a.safetensors", vec![eight()])], None);
        let error = Dataset::open(folder.path()).expect_err("version 1").to_string();
        assert!(
            error.contains("floats of 8 bits, which version 2 of the format brings"),
            "{error}"
        );
    }

    #[test]
    fn a_byte_that_is_no_number_is_named_with_its_sample() {
        let texts = texts(Kind::Float8e4m3fn);
        let mut stored = texts.copy();
        crate::tensor::bytes_mut(&mut stored)[17] = 0xff;
        let parts = [part("a.safetensors", vec![("text_embeddings", stored)])];
        let error =
            opened(&parts).expect("sound headers").batch(&[0, 1]).expect_err("NaN").to_string();
        assert!(
            error.contains("`text_embeddings` of sample 1 (row 1) has 1 numbers that are not finite, the first at [1, 1]"),
            "{error}"
        );
        let skipping = opened(&parts).expect("sound headers").on_bad(OnBad::Skip);
        assert_eq!(skipping.batch(&[1]).expect("its neighbour").bad_samples, 1);
    }
}
