//! SentencePiece models: the fields of their protocol buffer that are used.
//!
//! Source: `sentencepiece_model.proto`, whose names, numbers and defaults these are.

use prost::encoding::{DecodeContext, decode_key, skip_field};
use prost::{DecodeError, Message};

use super::folder::Folder;
use super::vocabulary::MAX_ENTRIES;
use crate::error::{Error, Result};

/// Names of models, in the order in which they are looked for.
pub const MODEL_FILE_NAMES: [&str; 2] = ["spiece.model", "tokenizer.model"];
/// Longest model, twice the longest published one.
const MAX_BYTES: u64 = 8 << 20;

#[derive(Clone, PartialEq, Message)]
pub struct SentencePiece {
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    pub trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    pub normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Piece {
    #[prost(string, optional, tag = "1")]
    pub piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    pub r#type: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    pub model_type: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
}

/// Kinds of pieces, and of models.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNIGRAM: i32 = 1;

impl SentencePiece {
    /// Reads the folder's model, and its name; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Data`] if it is no SentencePiece model.
    pub fn read(folder: Folder<'_>) -> Result<Option<(Self, &'static str)>> {
        for name in MODEL_FILE_NAMES {
            if let Some(bytes) = folder.bytes(name, MAX_BYTES)? {
                let wrong = |what: String| Error::data(folder.path(name), what);
                return Ok(Some((decoded(&bytes).map_err(wrong)?, name)));
            }
        }
        Ok(None)
    }

    pub fn is_unigram(&self) -> bool {
        let spec = self.trainer_spec.as_ref();
        spec.and_then(|spec| spec.model_type).unwrap_or(UNIGRAM) == UNIGRAM
    }

    /// Texts and scores, in the order of their ids.
    pub fn scored(&self) -> Vec<(String, f64)> {
        let scored = |piece: &Piece| (piece.piece().to_string(), f64::from(piece.score()));
        self.pieces.iter().map(scored).collect()
    }

    /// Texts of pieces that are found before a text is cut, and if they are special.
    pub fn added(&self) -> Vec<(String, bool)> {
        let is_added = |piece: &&Piece| [CONTROL, USER_DEFINED].contains(&piece.r#type());
        let added = |piece: &Piece| (piece.piece().to_string(), piece.r#type() == CONTROL);
        self.pieces.iter().filter(is_added).map(added).collect()
    }

    /// Replacements that are applied to a text first.
    pub fn replacements(&self) -> Option<&[u8]> {
        let spec = self.normalizer_spec.as_ref();
        spec.map(|spec| spec.precompiled_charsmap()).filter(|map| !map.is_empty())
    }
}

fn decoded(bytes: &[u8]) -> Result<SentencePiece, String> {
    let broken = |error: DecodeError| format!("is no SentencePiece model: {error}");
    let pieces = count_pieces(bytes).map_err(broken)?;
    if pieces > MAX_ENTRIES {
        return Err(format!("has {pieces} pieces, more than the {MAX_ENTRIES} allowed"));
    }
    SentencePiece::decode(bytes).map_err(broken)
}

/// Counts pieces before each of them takes memory.
fn count_pieces(mut bytes: &[u8]) -> Result<usize, DecodeError> {
    let mut pieces = 0;
    while !bytes.is_empty() {
        let (tag, kind) = decode_key(&mut bytes)?;
        pieces += usize::from(tag == 1);
        skip_field(kind, tag, &mut bytes, DecodeContext::default())?;
    }
    Ok(pieces)
}
