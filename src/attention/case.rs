//! Cases of attention: what a backend's soundness and speed depend on.

use std::fmt;

use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::libtorch::AttentionBackend;
use crate::nn::{AttentionInfo, Tokens};

/// Backends work in blocks of this many tokens: their treatment of the last block follows from the
/// remainder.
const BLOCK: i64 = 128;
/// Most tokens of a case. Longer sequences of the same remainder have more of the same blocks.
const MOST_TOKENS: i64 = 4096;
/// Most heads of a case: heads are computed apart from one another.
const MOST_HEADS: i64 = 8;
/// Most cases with a mask, and without.
const MOST_CASES: usize = 8;
/// A remainder that is always tried where a text's length varies from batch to batch: cuDNN 9.19
/// and 9.20 fail at it (PyTorch issue 196678).
const TRIED_REMAINDER: i64 = 64;

/// Kind of a case's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    Float32,
    Bfloat16,
}

impl Precision {
    pub fn kind(self) -> Kind {
        match self {
            Precision::Float32 => Kind::Float,
            Precision::Bfloat16 => Kind::BFloat16,
        }
    }

    /// The precision of a kind that models compute in.
    pub fn of_kind(kind: Kind) -> Self {
        if kind == Kind::BFloat16 { Precision::Bfloat16 } else { Precision::Float32 }
    }

    fn word(self) -> &'static str {
        match self {
            Precision::Float32 => "float32",
            Precision::Bfloat16 => "bfloat16",
        }
    }
}

/// One kind of attention of a run, made small: queries `[2, queries, heads, width]`, keys and
/// values `[2, keys, heads, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    pub precision: Precision,
    pub heads: i64,
    /// Width of a head.
    pub width: i64,
    /// Number of tokens; at most 4096, with the run's remainder by 128.
    pub queries: i64,
    pub keys: i64,
    pub masked: bool,
}

impl Case {
    /// Returns the case with at most `most` tokens and the same remainders.
    pub fn shortened(self, most: i64) -> Self {
        Case { queries: shortened(self.queries, most), keys: shortened(self.keys, most), ..self }
    }

    /// True if `backend` computes such inputs at all. Source: `sdp_utils.cpp` of PyTorch 2.13;
    /// libtorch has the last word.
    pub fn is_taken_by(&self, backend: AttentionBackend) -> bool {
        let half = self.precision == Precision::Bfloat16;
        match backend {
            AttentionBackend::Plain => true,
            AttentionBackend::Flash => half && !self.masked && self.width <= 256,
            AttentionBackend::Efficient => self.width % if half { 8 } else { 4 } == 0,
            AttentionBackend::Cudnn => {
                half && self.width % 8 == 0 && self.width <= 128 && self.keys != 1
            }
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { precision, heads, width, queries, keys, masked } = self;
        let mask = if *masked { "mask" } else { "no mask" };
        write!(
            f,
            "{queries} x {keys} tokens, {heads} heads of {width}, {}, {mask}",
            precision.word()
        )
    }
}

/// Returns the largest number up to `most` with the remainder of `tokens`; `tokens` itself if it is
/// no larger.
fn shortened(tokens: i64, most: i64) -> i64 {
    if tokens <= most { tokens } else { most - (most - tokens).rem_euclid(BLOCK) }
}

/// Returns the cases of a model's attentions, each once, at most 8 with a mask and 8 without.
///
/// `samples`: numbers of tokens of the run's samples. `has_masks`: true if the adapter reads masks
/// of tokens. An attention with a mask has a case without one, too: the mask goes away where a
/// batch's texts are equally long.
pub fn cases_of<'a>(
    attentions: impl IntoIterator<Item = &'a AttentionInfo>,
    samples: &[Tokens],
    kind: Kind,
    has_masks: bool,
) -> Vec<Case> {
    let mut distinct: Vec<AttentionInfo> = Vec::new();
    for info in attentions {
        if !distinct.contains(info) {
            distinct.push(*info);
        }
    }
    let mut cases = Vec::new();
    for tokens in samples {
        for info in &distinct {
            let is_masked = has_masks && info.takes_mask;
            let lengths = [Some(*tokens), is_masked.then(|| with_tried_remainder(*tokens))];
            for tokens in lengths.into_iter().flatten() {
                let unmasked = case(info, tokens, kind);
                add(&mut cases, unmasked);
                if is_masked {
                    add(&mut cases, Case { masked: true, ..unmasked });
                }
            }
        }
    }
    cases
}

fn case(info: &AttentionInfo, tokens: Tokens, kind: Kind) -> Case {
    Case {
        precision: Precision::of_kind(kind),
        heads: info.num_heads.min(MOST_HEADS),
        width: info.head_width,
        queries: tokens.rows(info.queries),
        keys: tokens.rows(info.keys),
        masked: false,
    }
    .shortened(MOST_TOKENS)
}

/// Returns the tokens with a text of another length, so that both together have
/// [`TRIED_REMAINDER`].
fn with_tried_remainder(Tokens { image, text }: Tokens) -> Tokens {
    let joint = image + text;
    let shorter = text - (joint - TRIED_REMAINDER).rem_euclid(BLOCK);
    Tokens { image, text: if shorter > 0 { shorter } else { shorter + BLOCK } }
}

fn add(cases: &mut Vec<Case>, case: Case) {
    let alike = cases.iter().filter(|other| other.masked == case.masked).count();
    if case.queries > 0 && case.keys > 0 && alike < MOST_CASES && !cases.contains(&case) {
        cases.push(case);
    }
}

/// Returns the cases that tell a machine's state without a run: bfloat16, heads of 64 and 128, with
/// and without a mask, at whole blocks and at half a block more.
pub fn standard_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for masked in [false, true] {
        for width in [64, 128] {
            for tokens in [MOST_TOKENS, MOST_TOKENS - BLOCK + TRIED_REMAINDER] {
                cases.push(Case {
                    precision: Precision::Bfloat16,
                    heads: MOST_HEADS,
                    width,
                    queries: tokens,
                    keys: tokens,
                    masked,
                });
            }
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Rows;

    fn info(queries: Rows, keys: Rows, takes_mask: bool) -> AttentionInfo {
        AttentionInfo { queries, keys, num_heads: 24, head_width: 128, takes_mask }
    }

    #[test]
    fn a_case_keeps_the_remainder_of_the_run() {
        for (tokens, kept) in [(77, 77), (4096, 4096), (4608, 4096), (4609, 3969), (75_600, 4048)] {
            assert_eq!(shortened(tokens, MOST_TOKENS), kept);
            assert_eq!(shortened(tokens, MOST_TOKENS) % BLOCK, tokens % BLOCK);
        }
    }

    #[test]
    fn equal_attentions_are_one_case_and_every_sort_of_sample_has_its_own() {
        let blocks = [info(Rows::Joint, Rows::Joint, false); 57];
        let samples = [1024, 4096, 8192, 1000].map(|image| Tokens { image, text: 512 });
        let cases = cases_of(&blocks, &samples, Kind::BFloat16, false);
        let lengths: Vec<i64> = cases.iter().map(|case| case.queries).collect();
        assert_eq!(lengths, [1536, 4096, 1512], "4608 and 8704 are 4096, made short");
        assert!(cases.iter().all(|case| !case.masked && case.heads == 8 && case.width == 128));
        let many: Vec<Tokens> = (0..40).map(|text| Tokens { image: 100, text }).collect();
        assert_eq!(cases_of(&blocks, &many, Kind::BFloat16, false).len(), MOST_CASES);
    }

    #[test]
    fn attention_over_conditions_has_another_number_of_keys() {
        let wan = [info(Rows::Image, Rows::Image, false), info(Rows::Image, Rows::Text, false)];
        let cases = cases_of(&wan, &[Tokens { image: 1000, text: 512 }], Kind::Float, false);
        let lengths: Vec<_> = cases.iter().map(|case| [case.queries, case.keys]).collect();
        assert_eq!(lengths, [[1000, 1000], [1000, 512]]);
        assert_eq!(cases_of(&wan, &[Tokens { image: 9, text: 0 }], Kind::Float, false).len(), 1);
    }

    #[test]
    fn a_mask_that_the_adapter_reads_is_tried_with_and_without_and_at_the_known_remainder() {
        let flux = [info(Rows::Joint, Rows::Joint, true)];
        let samples = [Tokens { image: 1024, text: 512 }];
        let sorts = |has_masks| -> Vec<(i64, bool)> {
            let cases = cases_of(&flux, &samples, Kind::BFloat16, has_masks);
            cases.iter().map(|case| (case.queries, case.masked)).collect()
        };
        assert_eq!(sorts(false), [(1536, false)]);
        let masked = [(1536, false), (1536, true), (1472, false), (1472, true)];
        assert_eq!(sorts(true), masked);
        for text in [1, 64, 65, 512] {
            let Tokens { image, text } = with_tried_remainder(Tokens { image: 1000, text });
            assert!(text > 0 && (image + text) % BLOCK == TRIED_REMAINDER, "{text}");
        }
    }

    #[test]
    fn kinds_masks_and_widths_that_a_backend_refuses_are_known() {
        use AttentionBackend::{Cudnn, Efficient, Flash, Plain};
        let [precision, tokens] = [Precision::Bfloat16, Precision::Float32].map(|kind| (kind, 64));
        let taken = |(precision, width): (Precision, i64), masked| -> Vec<AttentionBackend> {
            let case = Case { precision, heads: 2, width, queries: 9, keys: 9, masked };
            AttentionBackend::ALL.into_iter().filter(|by| case.is_taken_by(*by)).collect()
        };
        assert_eq!(taken(precision, false), [Flash, Cudnn, Efficient, Plain]);
        assert_eq!(taken(precision, true), [Cudnn, Efficient, Plain]);
        assert_eq!(taken(tokens, false), [Efficient, Plain]);
        assert_eq!(taken((Precision::Bfloat16, 160), false), [Flash, Efficient, Plain]);
        assert_eq!(taken((Precision::Bfloat16, 12), false), [Flash, Plain]);
        assert_eq!(taken((Precision::Float32, 12), true), [Efficient, Plain]);
    }
}
