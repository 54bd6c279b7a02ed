//! Texts between ranks, built from the tensor operations so that every backend has them.

use tch::{Device, Kind, Tensor};

use super::call::Call;
use super::{Collective, Sliced};
use crate::error::Result;

/// Returns the text of rank `root` on every rank.
pub fn broadcast_text(collective: &dyn Collective, text: &str, root: usize) -> Result<String> {
    let length = Tensor::from_slice(&[text.len() as i64]);
    collective.broadcast(length.shallow_clone(), root)?.wait()?;
    let length = length.int64_value(&[0]);
    let mut words = if collective.rank() == root { as_words(text) } else { Vec::new() };
    words.resize(words_of(length), 0);
    let words = Tensor::from_slice(&words);
    collective.broadcast(words.shallow_clone(), root)?.wait()?;
    as_text("broadcast_text", &words, length)
}

/// Returns every rank's text, in rank order, on every rank.
pub fn gather_texts(collective: &dyn Collective, text: &str) -> Result<Vec<String>> {
    let world_size = collective.world_size();
    let lengths = Tensor::zeros([world_size as i64], (Kind::Int64, Device::Cpu));
    let length = Tensor::from_slice(&[text.len() as i64]);
    collective.all_gather(vec![Sliced { owned: length, full: lengths.shallow_clone() }])?.wait()?;
    let mut words = as_words(text);
    words.resize(words_of(lengths.max().int64_value(&[])), 0);
    let all = Tensor::zeros([world_size as i64, words.len() as i64], (Kind::Int64, Device::Cpu));
    collective
        .all_gather(vec![Sliced { owned: Tensor::from_slice(&words), full: all.shallow_clone() }])?
        .wait()?;
    let row = |rank: i64| as_text("gather_texts", &all.get(rank), lengths.int64_value(&[rank]));
    (0..world_size as i64).map(row).collect()
}

/// Returns the node index of each rank. Nodes are counted from 0 in the order of their lowest
/// ranks.
pub fn nodes(collective: &dyn Collective) -> Result<Vec<usize>> {
    let hosts = gather_texts(collective, &gethostname::gethostname().to_string_lossy())?;
    let mut known: Vec<&String> = Vec::new();
    let number = |host| {
        known.iter().position(|other| *other == host).unwrap_or_else(|| {
            known.push(host);
            known.len() - 1
        })
    };
    Ok(hosts.iter().map(number).collect())
}

/// Returns how many lower ranks run on this rank's node: the index of the device that this rank
/// should use.
pub fn local_rank(collective: &dyn Collective) -> Result<usize> {
    let (nodes, rank) = (nodes(collective)?, collective.rank());
    Ok(nodes[..rank].iter().filter(|node| **node == nodes[rank]).count())
}

/// Bytes of a word: every backend carries i64.
const WORD: usize = size_of::<i64>();

/// Returns the number of words that hold so many bytes.
fn words_of(length: i64) -> usize {
    (length as usize).div_ceil(WORD)
}

fn as_words(text: &str) -> Vec<i64> {
    let word = |bytes: &[u8]| {
        let mut word = [0; WORD];
        word[..bytes.len()].copy_from_slice(bytes);
        i64::from_le_bytes(word)
    };
    text.as_bytes().chunks(WORD).map(word).collect()
}

/// `length`: in bytes.
fn as_text(operation: &'static str, words: &Tensor, length: i64) -> Result<String> {
    let broken = |_| Call { backend: "texts", operation }.error("what arrived is no UTF-8 text");
    let words = Vec::<i64>::try_from(words).expect("a flat integer tensor");
    let mut bytes: Vec<u8> = words.into_iter().flat_map(i64::to_le_bytes).collect();
    bytes.truncate(length as usize);
    String::from_utf8(bytes).map_err(broken)
}

/// Formats ranks for a message: `0-2 4 6-7`.
pub fn spans(ranks: &[usize]) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut rest = ranks;
    while let Some(first) = rest.first() {
        let length =
            rest.iter().enumerate().take_while(|(index, rank)| **rank == first + index).count();
        texts.push(if length == 1 {
            first.to_string()
        } else {
            format!("{first}-{}", first + length - 1)
        });
        rest = &rest[length..];
    }
    texts.join(" ")
}
