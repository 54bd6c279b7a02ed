//! The padding of texts. Those of unequal length lie in a file one after another, without padding,
//! beside their lengths, and a batch pads them; those of one length may get more of it.
//!
//! `text_embeddings` `[T, D]` of `N` samples then comes with `text_embeddings.lengths` `[N]`,
//! int64, which sum up to `T`; a length may be 0. A batch has `text_embeddings` `[B, L, D]` and
//! `text_mask` `[B, L]`.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Kind, Tensor};

use crate::data::group::{Layout, SampleTensor};
use crate::error::{Error, Result};
use crate::files::safetensors::{SafeTensors, TensorInfo};

/// Ending of the key under which a file holds the lengths.
pub const LENGTHS: &str = ".lengths";
/// Keys whose samples may have unequal lengths, each with the key of the mask that a batch gets.
pub const TEXTS: [(&str, &str); 2] =
    [("text_embeddings", "text_mask"), ("text_embeddings_2", "text_mask_2")];
/// Padded lengths are multiples of this number, as in the reference.
const MULTIPLE: i64 = 8;

/// The length to which a batch's texts are padded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TextPadding {
    /// That of the batch's longest, rounded up to a multiple of 8.
    ///
    /// Source: NeMo AutoModel 0.5.0, `_stack_or_pad_text_tensors`.
    #[default]
    Longest,
    /// This number of tokens for `text_embeddings` of unequal length; further texts as
    /// [`Longest`](Self::Longest).
    Tokens(i64),
    /// As [`Tokens`](Self::Tokens), and also for those that have one length, with their mask.
    All(i64),
}

impl TextPadding {
    /// Returns the length of a batch whose longest text has `longest` tokens.
    pub fn length(self, key: &str, longest: i64) -> i64 {
        match self {
            TextPadding::Tokens(tokens) | TextPadding::All(tokens) if key == TEXTS[0].0 => tokens,
            _ => (longest.max(1) + MULTIPLE - 1) / MULTIPLE * MULTIPLE,
        }
    }

    /// Returns the shape of a sample's text, or of its mask, that gets more padding than it is
    /// stored with.
    pub fn extended(self, key: &str, tensor: &SampleTensor) -> Option<Vec<i64>> {
        let TextPadding::All(tokens) = self else { return None };
        let (found, further) = tensor.shape.split_first()?;
        let is_text = (key == TEXTS[0].0 || key == TEXTS[0].1) && !tensor.unequal;
        (is_text && *found < tokens).then(|| [&[tokens], further].concat())
    }

    /// Refuses groups with longer texts than a batch would have.
    pub fn check(self, group: &str, layout: &Layout) -> Result<(), String> {
        let is_padded = |key: &str, tensor: &SampleTensor| match self {
            TextPadding::All(_) if key == TEXTS[0].0 => !tensor.shape.is_empty(),
            _ => tensor.unequal,
        };
        for (key, tensor) in layout.iter().filter(|(key, tensor)| is_padded(key, tensor)) {
            let (longest, length) = (tensor.shape[0], self.length(key, tensor.shape[0]));
            if longest > length {
                return Err(format!(
                    "group `{group}` has a text of {longest} tokens, and data.text_tokens pads \
                     texts to {length}; set it to {longest} or more"
                ));
            }
        }
        Ok(())
    }
}

/// Returns the texts or masks `[B, L, …]` with zeros behind them, as `[B, tokens, …]`.
pub fn extended(texts: &Tensor, tokens: i64) -> Tensor {
    let size = texts.size();
    // From the last axis to the first.
    let mut padding = vec![0; 2 * (size.len() - 2)];
    padding.extend([0, tokens - size[1]]);
    texts.constant_pad_nd(padding)
}

/// Returns the key of the mask of a text.
pub fn mask_of(key: &str) -> Option<&'static str> {
    TEXTS.iter().find(|(text, _)| *text == key).map(|(_, mask)| *mask)
}

/// Returns the texts of a file that come without a mask.
pub fn unmasked_texts(file: &SafeTensors) -> Vec<&'static str> {
    let texts = TEXTS.iter().filter(|(text, mask)| file.holds(text) && !file.holds(mask));
    texts.map(|(text, _)| *text).collect()
}

/// First rows of a file's samples in a tensor that holds them one after another.
#[derive(Debug)]
pub struct Starts(Vec<u64>);

impl Starts {
    /// Reads the lengths of `samples` samples of the tensor `info`.
    fn read(file: &SafeTensors, info: &TensorInfo, samples: u64) -> Result<Self> {
        let refused = |what: String| Error::data(file.path(), format!("`{}` {what}", info.name));
        let name = format!("{}{LENGTHS}", info.name);
        let lengths = file.info(&name)?;
        if (lengths.kind, &lengths.shape[..]) != (Kind::Int64, &[samples as i64]) {
            let what = format!(
                "has lengths {:?} {:?}; expected Int64 [{samples}]",
                lengths.kind, lengths.shape
            );
            return Err(refused(what));
        }
        if info.shape.is_empty() {
            return Err(refused("is a scalar; expected the rows of all samples".into()));
        }
        let lengths = Vec::<i64>::try_from(file.read(&name)?).expect("int64, one axis");
        let mut starts = Vec::with_capacity(lengths.len() + 1);
        let mut rows = 0i64;
        starts.push(0);
        for length in lengths {
            let sum = Some(length).filter(|length| *length >= 0).and_then(|l| rows.checked_add(l));
            rows = sum.ok_or_else(|| refused(format!("has a sample of {length} tokens")))?;
            starts.push(rows as u64);
        }
        // The format holds no empty tensor: if all texts are empty, there is one unused row.
        if rows.max(1) != info.shape[0] {
            let found = info.shape[0];
            return Err(refused(format!("has {found} rows, but its lengths sum up to {rows}")));
        }
        Ok(Starts(starts))
    }

    /// Returns the rows of a sample of the file, counted from 0.
    pub fn rows(&self, sample: u64) -> Range<u64> {
        self.0[sample as usize]..self.0[sample as usize + 1]
    }

    fn longest(&self) -> u64 {
        self.0.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or_default()
    }
}

/// Returns the lengths of the `texts` of a file of one sample: all their rows. Their shapes in the
/// layout become those of texts of unequal length.
///
/// # Errors
/// [`Error::Data`] if a text has no axes.
pub fn own_lengths(
    file: &SafeTensors,
    texts: &[&str],
    layout: &mut Layout,
) -> Result<BTreeMap<String, Starts>> {
    let mut found = BTreeMap::new();
    for text in texts {
        let TensorInfo { kind, shape, .. } = file.info(text)?;
        let Some(tokens) = shape.first() else {
            return Err(Error::data(file.path(), format!("`{text}` is a scalar; expected tokens")));
        };
        let tensor = SampleTensor { kind: *kind, shape: shape.clone(), unequal: true };
        layout.insert(text.to_string(), tensor);
        found.insert(text.to_string(), Starts(vec![0, *tokens as u64]));
    }
    Ok(found)
}

/// Takes the lengths out of a file's `layout`, which has every tensor's kind and whole shape, and
/// turns the shape of each text with lengths into that of its longest sample.
///
/// # Errors
/// [`Error::Data`] if lengths contradict their text, belong to no text, or stand beside a mask.
pub fn take_lengths(
    file: &SafeTensors,
    samples: u64,
    layout: &mut Layout,
) -> Result<BTreeMap<String, Starts>> {
    let mut found = BTreeMap::new();
    let names: Vec<String> = layout.keys().filter(|key| key.ends_with(LENGTHS)).cloned().collect();
    for name in names {
        layout.remove(&name);
        let key = name.trim_end_matches(LENGTHS);
        let refused = |what: &str| Err(Error::data(file.path(), format!("`{name}` {what}")));
        let Some(mask) = mask_of(key) else {
            return refused("gives lengths to what is no text; only texts may have unequal ones");
        };
        if layout.contains_key(mask) {
            return refused("stands beside a mask, which follows from the lengths; leave one out");
        }
        let info = file.info(key)?;
        let starts = Starts::read(file, info, samples)?;
        let shape = [&[starts.longest() as i64], &info.shape[1..]].concat();
        layout.insert(key.into(), SampleTensor { kind: info.kind, shape, unequal: true });
        found.insert(key.into(), starts);
    }
    Ok(found)
}
