//! Scaled dot-product attention of all heads, a block of queries at a time.
//!
//! The scores of a block are held in f32 and never leave the cache; the gradient computes them once more from what a softmax
//! was divided by, as FlashAttention does. Keys are not cut: a block's scores of 32,768 keys are 8 MiB. In bfloat16 weights and
//! slopes are rounded where libtorch's operator rounds them, so that its numbers are met.
//!
//! Source: Dao 2023, arXiv:2307.08691, section 3.1.

use half::bf16;
use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::exp::exp;
use super::fits;
use super::product::{Matrix, multiply};
use crate::autograd::by_hand;
use crate::libtorch;
use crate::tensor::{Element, elements, elements_mut};

/// Queries of a block.
const BLOCK: usize = 64;

/// # Shapes
/// `query`: `[B, L, N, E]`; `key`, `value`: `[B, K, N, E]`. Returns `[B, L, N · E]`, none where libtorch's own is faster.
pub fn attend(query: &Tensor, key: &Tensor, value: &Tensor) -> Option<Tensor> {
    let fit = [query, key, value].into_iter().all(|tensor| fits(tensor) && tensor.kind() == query.kind());
    if !fit || libtorch::knows_this_cpu() {
        return None;
    }
    Some(of_kind(query, key, value))
}

fn of_kind(query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
    match query.kind() {
        Kind::BFloat16 => of::<bf16>(query, key, value),
        _ => of::<f32>(query, key, value),
    }
}

fn of<T: Element>(query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
    let forward = || {
        let [query, key, value] = [query, key, value].map(|tensor| tensor.detach().contiguous());
        let (mut output, sizes) = (query.empty_like(), Sizes::of(&query, &key));
        let logs = values::<T>(sizes, [&query, &key, &value].map(elements), elements_mut(&mut output));
        let kept = output.detach();
        (output.flatten(2, 3), Saved { sizes, query, key, value, output: kept, logs })
    };
    by_hand(&[query, key, value], forward, |saved, grad_output| {
        let Saved { sizes, query, key, value, output, logs } = saved;
        let grad_output = grad_output.contiguous();
        let mut gradients = [&query, &key, &value].map(Tensor::empty_like);
        let read = [&query, &key, &value, &output, &grad_output].map(elements::<T>);
        self::gradients(sizes, read, &logs, gradients.each_mut().map(elements_mut));
        gradients.into()
    })
}

struct Saved {
    sizes: Sizes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    /// Logarithm of each query's sum of exponentials, head by head.
    logs: Vec<f32>,
}

/// Sizes of an attention.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    width: usize,
}

impl Sizes {
    fn of(query: &Tensor, key: &Tensor) -> Self {
        let (batch, queries, heads, width) = query.size4().expect("[B, L, N, E]");
        let [batch, queries, keys, heads, width] = [batch, queries, key.size()[1], heads, width].map(|size| size as usize);
        Sizes { batch, queries, keys, heads, width }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// Every head of every sample.
    fn each(self) -> impl Iterator<Item = Head> {
        (0..self.batch).flat_map(move |sample| (0..self.heads).map(move |head| Head { sample, head, sizes: self }))
    }
}

/// One head of one sample.
#[derive(Clone, Copy)]
struct Head {
    sample: usize,
    head: usize,
    sizes: Sizes,
}

impl Head {
    fn number(&self) -> usize {
        self.sample * self.sizes.heads + self.head
    }

    /// Where a token's features lie among `[B, tokens, N, E]`.
    #[inline(always)]
    fn place(&self, token: usize, tokens: usize) -> std::ops::Range<usize> {
        let start = ((self.sample * tokens + token) * self.sizes.heads + self.head) * self.sizes.width;
        start..start + self.sizes.width
    }

    /// The features of some tokens, one after the other, in f32.
    #[inline(always)]
    fn read<T: Element>(&self, all: &[T], range: std::ops::Range<usize>, tokens: usize, into: &mut Vec<f32>) {
        into.clear();
        range.for_each(|token| into.extend(all[self.place(token, tokens)].iter().map(|x| x.widened())));
    }

    #[inline(always)]
    fn write<T: Element>(&self, from: &[f32], range: std::ops::Range<usize>, tokens: usize, all: &mut [T]) {
        for (token, from) in range.zip(from.chunks_exact(self.sizes.width)) {
            all[self.place(token, tokens)].iter_mut().zip(from).for_each(|(place, x)| *place = T::rounded(*x));
        }
    }
}

fn blocks(queries: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..queries).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(queries))
}

/// Writes the output, returns the logarithm of each query's sum of exponentials.
#[multiversion(targets = "simd")]
fn values<T: Element>(sizes: Sizes, [query, key, value]: [&[T]; 3], into: &mut [T]) -> Vec<f32> {
    let width = sizes.width as i64;
    let mut logs = vec![0f32; sizes.batch * sizes.heads * sizes.queries];
    let [mut q, mut k, mut v, mut scores, mut sums, mut shares] = [const { Vec::new() }; 6];
    for head in sizes.each() {
        head.read(key, 0..sizes.keys, sizes.keys, &mut k);
        head.read(value, 0..sizes.keys, sizes.keys, &mut v);
        for block in blocks(sizes.queries) {
            head.read(query, block.clone(), sizes.queries, &mut q);
            scores.resize(block.len() * sizes.keys, 0.0);
            multiply(&mut scores, Matrix::rows(&q, width), Matrix::rows(&k, width).transposed(), sizes.scale(), false);
            let logs = &mut logs[head.number() * sizes.queries..][block.clone()];
            shares.clear();
            for (scores, log) in scores.chunks_exact_mut(sizes.keys).zip(logs) {
                let (largest, sum) = exponentials::<T>(scores);
                *log = largest + sum.ln();
                shares.push(1.0 / sum);
            }
            sums.resize(q.len(), 0.0);
            multiply(&mut sums, Matrix::rows(&scores, sizes.keys as i64), Matrix::rows(&v, width), 1.0, false);
            for (sums, share) in sums.chunks_exact_mut(sizes.width).zip(&shares) {
                sums.iter_mut().for_each(|sum| *sum *= share);
            }
            head.write(&sums, block, sizes.queries, into);
        }
    }
    logs
}

/// Makes of scores the exponentials of their distances from the largest, rounded; returns the largest and the exact sum.
#[inline(always)]
fn exponentials<T: Element>(scores: &mut [f32]) -> (f32, f32) {
    let (mut largest, mut sums) = ([f32::NEG_INFINITY; LANES], [0f32; LANES]);
    for vector in scores.chunks(LANES) {
        largest.iter_mut().zip(vector).for_each(|(largest, score)| *largest = largest.max(*score));
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for vector in scores.chunks_mut(LANES) {
        for (sum, score) in sums.iter_mut().zip(vector) {
            let power = exp(*score - largest);
            *sum += power;
            *score = T::rounded(power).widened();
        }
    }
    (largest, sums.iter().sum())
}

/// Partial results, as many as a vector has numbers.
const LANES: usize = 16;

/// Gradients of query, key and value, into their places. With P the weights and D = Σ grad · output of a query, the gradient
/// of the scores is P ∘ (grad · valueᵀ − D).
#[multiversion(targets = "simd")]
fn gradients<T: Element>(sizes: Sizes, [query, key, value, output, grad_output]: [&[T]; 5], logs: &[f32], into: [&mut [T]; 3]) {
    let width = sizes.width as i64;
    let [into_query, into_key, into_value] = into;
    let [mut q, mut k, mut v, mut o, mut go, mut gq, mut gk, mut gv, mut weights, mut slopes] = [const { Vec::new() }; 10];
    for head in sizes.each() {
        head.read(key, 0..sizes.keys, sizes.keys, &mut k);
        head.read(value, 0..sizes.keys, sizes.keys, &mut v);
        for sum in [&mut gk, &mut gv] {
            sum.clear();
            sum.resize(k.len(), 0f32);
        }
        for block in blocks(sizes.queries) {
            head.read(query, block.clone(), sizes.queries, &mut q);
            head.read(output, block.clone(), sizes.queries, &mut o);
            head.read(grad_output, block.clone(), sizes.queries, &mut go);
            for scores in [&mut weights, &mut slopes] {
                scores.resize(block.len() * sizes.keys, 0.0);
            }
            multiply(&mut weights, Matrix::rows(&q, width), Matrix::rows(&k, width).transposed(), sizes.scale(), false);
            multiply(&mut slopes, Matrix::rows(&go, width), Matrix::rows(&v, width).transposed(), 1.0, false);
            let logs = &logs[head.number() * sizes.queries..][block.clone()];
            let rows = weights.chunks_exact_mut(sizes.keys).zip(slopes.chunks_exact_mut(sizes.keys));
            let vectors = o.chunks_exact(sizes.width).zip(go.chunks_exact(sizes.width));
            for (((weights, slopes), (o, go)), log) in rows.zip(vectors).zip(logs) {
                let mean: f32 = o.iter().zip(go).map(|(o, go)| o * go).sum();
                for (weight, slope) in weights.iter_mut().zip(slopes) {
                    let exact = exp(*weight - log);
                    *weight = T::rounded(exact).widened();
                    *slope = T::rounded(exact * (*slope - mean)).widened();
                }
            }
            let (by_query, of_scores) = (Matrix::rows(&weights, sizes.keys as i64), Matrix::rows(&slopes, sizes.keys as i64));
            multiply(&mut gv, by_query.transposed(), Matrix::rows(&go, width), 1.0, true);
            multiply(&mut gk, of_scores.transposed(), Matrix::rows(&q, width), sizes.scale(), true);
            gq.resize(q.len(), 0.0);
            multiply(&mut gq, of_scores, Matrix::rows(&k, width), sizes.scale(), false);
            head.write(&gq, block, sizes.queries, into_query);
        }
        head.write(&gk, 0..sizes.keys, sizes.keys, into_key);
        head.write(&gv, 0..sizes.keys, sizes.keys, into_value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn it_is_libtorchs() {
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
            for (queries, keys) in [(150, 150), (3, 70), (65, 2)] {
                let inputs = [draw(&[2, queries, 3, 16], kind, 1), draw(&[2, keys, 3, 16], kind, 2), draw(&[2, keys, 3, 16], kind, 3)];
                let by_hand = |inputs: &[Tensor]| of_kind(&inputs[0], &inputs[1], &inputs[2]);
                let plain = |inputs: &[Tensor]| {
                    let [query, key, value] = [0, 1, 2].map(|place: usize| inputs[place].transpose(1, 2));
                    let weights = (query.matmul(&key.transpose(2, 3)) / 4.0).softmax(-1, Kind::Double);
                    weights.matmul(&value).transpose(1, 2).flatten(2, 3)
                };
                agree(&inputs, tolerance, by_hand, plain);
            }
        }
    }
}
