//! A tokenizer with its text encoder.

use std::path::PathBuf;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::Folder;
use crate::data::group::SampleTensor;
use crate::encoder::{LoadedTextEncoder, Output, TextEncoder};
use crate::error::{Error, Result};
use crate::settings::Family;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::prompt::Templated;

/// Folders of a pipeline's text encoders and of their tokenizers.
pub(super) const FIRST: [&str; 2] = ["tokenizer", "text_encoder"];
pub(super) const SECOND: [&str; 2] = ["tokenizer_2", "text_encoder_2"];

/// Keys of conditions in batches.
pub(super) const TEXT: &str = "text_embeddings";
pub(super) const SECOND_TEXT: &str = "text_embeddings_2";
pub(super) const POOLED: &str = "pooled_prompt_embeds";

/// The side of a text on which its padding stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Padding {
    Left,
    Right,
}

/// A tokenizer with its text encoder, no weight of which is loaded.
#[derive(Debug)]
pub(super) struct Texts {
    folder: PathBuf,
    tokenizer: Arc<Tokenizer>,
    pub encoder: TextEncoder,
}

impl Texts {
    /// # Errors
    /// [`Error::Data`] if the encoder is of none of these classes; errors of opening both.
    pub fn open(folder: &Folder, parts: [&str; 2], classes: &[&str]) -> Result<Self> {
        let [tokenizer, encoder] = parts.map(|part| folder.part(part));
        let opened = TextEncoder::open(&encoder)?;
        let found = opened.class().name();
        if !classes.contains(&found) {
            let what = format!(
                "is of the class {found}, and pipelines of this family have {}",
                classes.join(" or ")
            );
            return Err(Error::data(encoder, what));
        }
        let tokenizer = Arc::new(Tokenizer::open(&tokenizer)?);
        Ok(Texts { folder: encoder, tokenizer, encoder: opened })
    }

    /// Returns the tokens of a text, at most `most`.
    pub fn ids(&self, text: &str, most: usize) -> Vec<i64> {
        self.tokenizer.ids(text, most)
    }

    /// Returns the number of tokens of a chat without the template before the prompt, at most
    /// `most`.
    pub fn kept(&self, chat: &Templated, most: usize) -> usize {
        chat.ids(&self.tokenizer, chat.dropped + most).len().saturating_sub(chat.dropped)
    }

    /// Describes an output of `tokens` rows.
    pub fn layout(&self, output: &Output, tokens: usize, kind: Kind) -> SampleTensor {
        let shape = vec![tokens as i64, self.encoder.width(output)];
        SampleTensor { kind, shape, unequal: false }
    }

    /// Loads what an output needs.
    ///
    /// # Errors
    /// Errors of [`TextEncoder::load`].
    pub fn load(&self, output: Output, device: Device, kind: Kind) -> Result<LoadedTexts> {
        Ok(LoadedTexts {
            folder: self.folder.clone(),
            tokenizer: self.tokenizer.clone(),
            vocabulary: self.encoder.sizes().vocabulary,
            encoder: self.encoder.load(output, device, kind)?,
        })
    }
}

/// A tokenizer with its text encoder and the encoder's weights.
pub(super) struct LoadedTexts {
    folder: PathBuf,
    tokenizer: Arc<Tokenizer>,
    /// Number of tokens that the encoder knows.
    vocabulary: i64,
    encoder: LoadedTextEncoder,
}

impl LoadedTexts {
    pub fn ids(&self, text: &str, most: usize) -> Vec<i64> {
        self.tokenizer.ids(text, most)
    }

    pub fn ids_of_chat(&self, chat: &Templated, most: usize) -> Vec<i64> {
        chat.ids(&self.tokenizer, most)
    }

    /// Encodes texts that are padded to `length` tokens on the tokenizer's own side; with
    /// `is_masked`, no token sees padding. Returns the encoder's output on the CPU.
    ///
    /// # Errors
    /// [`Error::Data`] if the encoder does not know a token.
    pub fn encode(&self, texts: &[Vec<i64>], length: usize, is_masked: bool) -> Result<Tensor> {
        let padding = if self.tokenizer.pads_left() { Padding::Left } else { Padding::Right };
        self.encode_padded(texts, length, padding, is_masked)
    }

    fn encode_padded(
        &self,
        texts: &[Vec<i64>],
        length: usize,
        padding: Padding,
        is_masked: bool,
    ) -> Result<Tensor> {
        if let Some(id) = texts.iter().flatten().find(|id| **id >= self.vocabulary) {
            let what = format!(
                "knows {} tokens, and its tokenizer gives the token {id}: they are not of one pipeline",
                self.vocabulary
            );
            return Err(Error::data(&self.folder, what));
        }
        let (ids, mask) = padded(texts, length, self.tokenizer.pad_id(), padding);
        let output = self.encoder.encode(&ids, is_masked.then_some(&mask));
        Ok(output.to_device(Device::Cpu))
    }

    /// Encodes texts as far as the longest of them reaches, each on its own tokens alone. Returns
    /// `[tokens, D]` of each.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_unpadded(&self, texts: &[Vec<i64>]) -> Result<Vec<Tensor>> {
        let longest = texts.iter().map(Vec::len).max().unwrap_or_default();
        let output = self.encode_padded(texts, longest, Padding::Right, true)?;
        let cut = |(row, text): (usize, &Vec<i64>)| {
            output.get(row as i64).narrow(0, 0, text.len() as i64)
        };
        Ok(texts.iter().enumerate().map(cut).collect())
    }

    /// Encodes chats, and drops the template before each prompt. Returns `[tokens, D]` of each, at
    /// most `most` tokens.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_chats(&self, chats: &[Templated], most: usize) -> Result<Vec<Tensor>> {
        let ids = |chat: &Templated| self.ids_of_chat(chat, chat.dropped + most);
        let states = self.encode_unpadded(&chats.iter().map(ids).collect::<Vec<_>>())?;
        let kept = |(states, chat): (Tensor, &Templated)| {
            let rows = states.size()[0];
            let dropped = rows.min(chat.dropped as i64);
            states.narrow(0, dropped, rows - dropped)
        };
        Ok(states.into_iter().zip(chats).map(kept).collect())
    }
}

/// Returns ids and the mask of those that are no padding, both `[B, length]` int64.
fn padded(texts: &[Vec<i64>], length: usize, pad: i64, padding: Padding) -> (Tensor, Tensor) {
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for text in texts {
        let missing = length - text.len();
        let before = if padding == Padding::Left { missing } else { 0 };
        let row = |fill: i64, own: &mut dyn Iterator<Item = i64>| -> Vec<i64> {
            let mut row = vec![fill; before];
            row.extend(own);
            row.resize(length, fill);
            row
        };
        ids.extend(row(pad, &mut text.iter().copied()));
        mask.extend(row(0, &mut text.iter().map(|_| 1)));
    }
    let shape = [texts.len() as i64, length as i64];
    (Tensor::from_slice(&ids).view(shape), Tensor::from_slice(&mask).view(shape))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_stands_on_its_side_and_is_masked() {
        let texts = [vec![5, 6, 7], vec![8]];
        let rows = |tensor: Tensor| Vec::<Vec<i64>>::try_from(tensor).expect("rows");
        let (ids, mask) = padded(&texts, 4, 9, Padding::Right);
        assert_eq!(rows(ids), [[5, 6, 7, 9], [8, 9, 9, 9]]);
        assert_eq!(rows(mask), [[1, 1, 1, 0], [1, 0, 0, 0]]);
        let (ids, mask) = padded(&texts, 4, 9, Padding::Left);
        assert_eq!(rows(ids), [[9, 5, 6, 7], [9, 9, 9, 8]]);
        assert_eq!(rows(mask), [[0, 1, 1, 1], [0, 0, 0, 1]]);
    }
}
