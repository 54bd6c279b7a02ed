//! The demo's own encoding: a fixed orthonormal transform of patches in place of an autoencoder,
//! and fixed random vectors in place of a text encoder. It needs no folder, and loses nothing.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use super::{Conditions, Encoding, Facts, ToConditions, ToLatents, ToPixels, UsualBuckets};
use crate::autoencoder::Factors;
use crate::data::DataType;
use crate::data::group::{Layout, SampleTensor};
use crate::error::Result;
use crate::rng::{Key, Purpose, Stream};

pub const FACTS: Facts = Facts {
    data_type: DataType::Image,
    parts: &[],
    optional_parts: &[],
    // Sides of whole patches of the model, too.
    buckets: UsualBuckets { pixels: 64 * 64, multiple: 8 },
    patch: 1,
    open: |_| Ok(Box::new(Dit)),
};

/// Colours of a pixel.
const COLOURS: i64 = 3;
/// Side of the patches.
const PATCH: i64 = 4;
/// Makes the variance of photographs' latents about 1: pixels have a standard deviation near one
/// half, which an orthonormal transform keeps.
const SCALE: f64 = 2.0;
/// Words of a prompt that count, and numbers of each.
const WORDS: i64 = 16;
const WIDTH: i64 = 64;
const TEXT: &str = "text_embeddings";

/// The encoding; it has no weights.
#[derive(Clone, Copy, Debug)]
struct Dit;

impl Encoding for Dit {
    fn factors(&self) -> Factors {
        let channels = COLOURS * PATCH * PATCH;
        Factors { colours: COLOURS, channels, space: PATCH, time: None }
    }

    fn prompt_layout(&self, _prompt: &str, kind: Kind) -> Layout {
        let text = SampleTensor { kind, shape: vec![WORDS, WIDTH], unequal: false };
        Layout::from([(TEXT.to_string(), text)])
    }

    fn to_conditions(&self, _device: Device, kind: Kind) -> Result<Box<dyn ToConditions>> {
        Ok(Box::new(Words { kind }))
    }

    fn to_latents(&self, device: Device, _kind: Kind) -> Result<Box<dyn ToLatents>> {
        Ok(Box::new(Cosines::on(device)))
    }

    fn to_pixels(&self, device: Device, _kind: Kind) -> Result<Box<dyn ToPixels>> {
        Ok(Box::new(Cosines::on(device)))
    }
}

/// Words as vectors.
struct Words {
    kind: Kind,
}

impl ToConditions for Words {
    /// `text_embeddings` `[16, 64]`: a vector for each word, upper and lower case alike, and zeros
    /// after the last one.
    fn conditions(&self, prompts: &[&str]) -> Result<Vec<Conditions>> {
        let conditions = |prompt: &&str| {
            let text = Tensor::zeros([WORDS, WIDTH], (Kind::Float, Device::Cpu));
            for (place, word) in (0..WORDS).zip(words(prompt)) {
                let key = Key::new(0, Purpose::Encoding).named(&word);
                let vector = Stream::Batch(key).open().normal(0.0, 1.0, &[WIDTH]);
                text.get(place).copy_(&vector);
            }
            Conditions::from([(TEXT.to_string(), text.to_kind(self.kind))])
        };
        Ok(prompts.iter().map(conditions).collect())
    }
}

/// Returns the runs of letters and digits, in lower case.
fn words(prompt: &str) -> impl Iterator<Item = String> {
    let words = prompt.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase)
}

/// The two-dimensional cosine transform of patches, which is its own inverse turned over.
struct Cosines {
    /// `[16, 16]`: frequencies by pixels.
    transform: Tensor,
}

impl Cosines {
    fn on(device: Device) -> Self {
        let side = PATCH as f64;
        let frequency = |k: i64| {
            let norm = if k == 0 { (1.0 / side).sqrt() } else { (2.0 / side).sqrt() };
            (0..PATCH).map(move |x| norm * (PI / side * (x as f64 + 0.5) * k as f64).cos())
        };
        let cosines = Tensor::from_slice(&(0..PATCH).flat_map(frequency).collect::<Vec<f64>>());
        let cosines = cosines.view([PATCH, PATCH]);
        let transform = cosines.kron(&cosines).to_kind(Kind::Float).to_device(device);
        Cosines { transform }
    }

    /// Mixes the numbers of each patch by `matrix`. `patches`: `[B, 3 · 16, H, W]`, as is the
    /// result.
    fn mixed(patches: &Tensor, matrix: &Tensor) -> Tensor {
        let patches = patches.to_device(matrix.device()).to_kind(Kind::Float);
        let numbers = patches.unflatten(1, [COLOURS, PATCH * PATCH]);
        Tensor::einsum("ij,bcjhw->bcihw", &[matrix, &numbers], None::<&[i64]>).flatten(1, 2)
    }
}

impl ToLatents for Cosines {
    fn latents(&self, pixels: &Tensor, _stream: &Stream) -> Tensor {
        Cosines::mixed(&pixels.pixel_unshuffle(PATCH), &self.transform) * SCALE
    }
}

impl ToPixels for Cosines {
    fn pixels(&self, latents: &Tensor) -> Tensor {
        Cosines::mixed(latents, &self.transform.tr()).pixel_shuffle(PATCH) / SCALE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{Family, Pipeline};

    #[test]
    fn latents_are_pixels_turned_and_come_back() {
        let pipeline = Pipeline::open(Family::Dit, None).expect("no folder is needed");
        let keys: Vec<Key> = (0..2).map(|id| Key::new(4, Purpose::Test).scope(id)).collect();
        let pixels = Stream::PerSample(keys).open().uniform(&[2, 3, 8, 12]) * 2.0 - 1.0;
        let latents = pipeline.encode_pixels(&pixels, &[0, 1]).expect("no weights");
        assert_eq!(latents.size()[1..], pipeline.latents_shape(&[3, 8, 12]).expect("fits"));
        let squares = |tensor: &Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
        assert!((squares(&latents) / squares(&pixels) - 4.0).abs() < 1e-5, "orthonormal, times 2");
        let flat = Tensor::ones([1, 3, 4, 4], (Kind::Float, Device::Cpu));
        let flat = pipeline.encode_pixels(&flat, &[0]).expect("no weights").flatten(0, -1);
        let numbers = Vec::<f32>::try_from(flat).expect("numbers");
        let expected = |index: usize| if index.is_multiple_of(16) { 8.0 } else { 0.0 };
        let near = |(index, number): (usize, &f32)| (number - expected(index)).abs() < 1e-5;
        assert!(numbers.iter().enumerate().all(near), "only the mean of each colour: {numbers:?}");
        let decoded = pipeline.decode(&latents).expect("no weights");
        assert!(decoded.allclose(&pixels, 0.0, 1e-5, false));
    }

    #[test]
    fn prompts_are_their_words_in_order_and_the_empty_one_is_zeros() {
        let pipeline = Pipeline::open(Family::Dit, None).expect("no folder is needed");
        let prompts = ["A cat, a dog", "a CAT a dog!", "", "dog"];
        let found = pipeline.encode_prompts(&prompts).expect("no weights");
        let [first, second, empty, dog] = [0, 1, 2, 3].map(|row: usize| &found[row][TEXT]);
        assert!(first.equal(second) && first.get(0).equal(&first.get(2)));
        assert!(first.get(3).equal(&dog.get(0)) && !first.get(1).equal(&dog.get(0)));
        assert!(empty.equal(&empty.zeros_like()) && first.get(4).equal(&empty.get(0)));
        let layout = &pipeline.prompt_shapes(prompts[0])[TEXT];
        assert_eq!((layout.shape.clone(), layout.kind), (first.size(), first.kind()));
    }
}
