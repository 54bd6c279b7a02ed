//! Inputs to try: sound ones that were bent, cut, repeated and nested by the throw of a die.

use fm_dist::rng::{Key, Purpose};

/// Longest input that is made: the largest header and manifest that are read at all, and a little
/// more.
const MAX_BYTES: usize = 17 << 20;

/// Pieces that parsers trip over, besides those of the format itself.
const PIECES: &[&[u8]] = &[
    b"",
    b"\"",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"=",
    b".",
    b"\n",
    b"\r",
    b"\0",
    b"\x1b[31m",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\u0000",
    b"0",
    b"-1",
    b"1",
    b"1e999",
    b"-0.0",
    b"1.5",
    b"nan",
    b"inf",
    b"null",
    b"true",
    b"4294967296",
    b"9223372036854775807",
    b"9223372036854775808",
    b"-9223372036854775808",
    b"18446744073709551615",
    b"18446744073709551616",
    b"99999999999999999999999999999999999999",
    b"../",
    b"/",
    b"..",
    b"/dev/zero",
    b"/dev/stdin",
    b"a\nb",
    b"\"\"",
    b"\"a\\nb\"",
    b"{}",
    b"[]",
    b"[[]]",
    "µ\u{202e}".as_bytes(),
    b"'''",
    b"\"\"\"",
    b"0x",
    b"1979-05-27T07:32:00Z",
];

/// What is repeated to nest deeply.
const NESTS: &[&[u8]] =
    &[b"[", b"{\"a\":", b"[{\"a\":", b"a.", b"{a=", b"[[a]]\n", b"[a.", b"(", b"\"", b"\\"];

/// One input's random numbers.
pub struct Dice {
    key: Key,
    thrown: u64,
}

impl Dice {
    pub fn new(seed: u64, input: u64) -> Self {
        Dice { key: Key::new(seed, Purpose::Test).step(input), thrown: 0 }
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.thrown += 1;
        self.key.below(self.thrown, bound as u64) as usize
    }

    pub fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    pub fn of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }
}

/// A sound input after one to eight mutations; `others` are what it may be crossed with.
pub fn mutated(dice: &mut Dice, sound: &[u8], others: &[Vec<u8>], words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for _ in 0..=dice.below(8) {
        mutate(dice, &mut bytes, others, words);
        bytes.truncate(MAX_BYTES);
    }
    bytes
}

fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>, others: &[Vec<u8>], words: &[&[u8]]) {
    let place = dice.below(bytes.len() + 1);
    match dice.below(10) {
        0 if place < bytes.len() => bytes[place] ^= 1 << dice.below(8),
        1 => bytes.truncate(place),
        2 => drop(bytes.drain(range(dice, bytes))),
        // A key, a tensor or a line stands there twice.
        3 => {
            let piece = bytes[range(dice, bytes)].to_vec();
            insert(bytes, boundary(bytes, place), &piece);
        }
        4 => number(dice, bytes, place),
        5 => nest(dice, bytes, place),
        6 => {
            let other = &others[dice.below(others.len())];
            let piece = other[range(dice, other)].to_vec();
            insert(bytes, place, &piece);
        }
        7 => replace_word(dice, bytes, place, words),
        8 => insert(bytes, place, dice.of(words)),
        _ => insert(bytes, place, dice.of(PIECES)),
    }
}

fn insert(bytes: &mut Vec<u8>, place: usize, piece: &[u8]) {
    drop(bytes.splice(place..place, piece.iter().copied()));
}

/// Part of the bytes; more often than not from one boundary of the format to another.
fn range(dice: &mut Dice, bytes: &[u8]) -> std::ops::Range<usize> {
    let mut ends = [dice.below(bytes.len() + 1), dice.below(bytes.len() + 1)];
    if !dice.one_in(3) {
        ends = ends.map(|end| boundary(bytes, end));
    }
    ends.sort();
    // Most pieces are short.
    if !dice.one_in(4) {
        ends[1] = ends[1].min(ends[0] + 200);
    }
    ends[0]..ends[1]
}

/// The first place from there on at which something begins.
fn boundary(bytes: &[u8], place: usize) -> usize {
    bytes[place..]
        .iter()
        .position(|byte| b",{[]}\n".contains(byte))
        .map_or(bytes.len(), |distance| place + distance)
}

/// Writes another number in the place of the next one.
fn number(dice: &mut Dice, bytes: &mut Vec<u8>, place: usize) {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let Some(start) = bytes[place..].iter().position(is_digit).map(|distance| place + distance)
    else {
        return;
    };
    let end = bytes[start..]
        .iter()
        .position(|byte| !is_digit(byte))
        .map_or(bytes.len(), |length| start + length);
    let now: u64 = std::str::from_utf8(&bytes[start..end])
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_default();
    let other = match dice.below(5) {
        0 => now.wrapping_add(1).to_string(),
        1 => now.wrapping_sub(1).to_string(),
        2 => (1u128 << dice.below(80)).to_string(),
        3 => dice.below(20).to_string(),
        _ => String::from_utf8_lossy(dice.of(PIECES)).into_owned(),
    };
    drop(bytes.splice(start..end, other.into_bytes()));
}

/// Depth that no recursion bears, or a length that no cap allows.
fn nest(dice: &mut Dice, bytes: &mut Vec<u8>, place: usize) {
    let piece = dice.of(NESTS);
    // Most are shallow: what is deep costs time and is refused for its depth alone.
    let times = if dice.one_in(20) { dice.below(2_000_000) } else { dice.below(300) };
    insert(bytes, place, &piece.repeat(times.min(MAX_BYTES / piece.len())));
}

/// Puts a word of the format in the place of what stands between two boundaries.
fn replace_word(dice: &mut Dice, bytes: &mut Vec<u8>, place: usize, words: &[&[u8]]) {
    let stop = |byte: &u8| b",:={}[]\"\n .".contains(byte);
    let end = bytes[place..].iter().position(stop).map_or(bytes.len(), |length| place + length);
    let start = bytes[..place].iter().rposition(stop).map_or(0, |last| last + 1);
    drop(bytes.splice(start..end, dice.of(words).iter().copied()));
}
