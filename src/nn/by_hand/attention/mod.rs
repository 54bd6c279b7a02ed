//! Scaled dot-product attention of all heads, a block of queries at a time.
//!
//! The scores of a block are held in f32 and never leave the cache; the gradient computes them once
//! more from what a softmax was divided by, as FlashAttention does. Keys are not cut: a block's
//! scores of 32,768 keys are 8 MiB. In bfloat16 weights and slopes are rounded where libtorch's
//! operator rounds them, so that its numbers are met.
//!
//! Source: Dao 2023, arXiv:2307.08691, section 3.1.

mod scores;

use std::ops::Range;

use half::bf16;
use tch::{Kind, Tensor};

use self::scores::{Table, exponentials, slope};
use super::fits;
use super::product::{
    self, Destination, Left, Number, Onto, Panels, Rows, Scale, Strips, multiply,
};
use crate::autograd::by_hand;
use crate::tensor::{Element, elements, elements_mut};

/// Queries of a block.
const BLOCK: usize = 64;

/// # Shapes
/// `query`: `[B, L, N, E]`; `key`, `value`: `[B, K, N, E]`. Returns `[B, L, N · E]`, none where
/// libtorch's own is faster.
pub fn attend(query: &Tensor, key: &Tensor, value: &Tensor) -> Option<Tensor> {
    let fit =
        [query, key, value].into_iter().all(|tensor| fits(tensor) && tensor.kind() == query.kind());
    // Of bfloat16 two are multiplied at once.
    if !fit || !product::is_ours() || query.size()[3] % 2 > 0 {
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

fn of<T: Number>(query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
    let forward = || {
        let [query, key, value] = [query, key, value].map(|tensor| tensor.detach().contiguous());
        let (mut output, sizes) = (query.empty_like(), Sizes::of(&query, &key));
        let logs =
            values::<T>(sizes, [&query, &key, &value].map(elements), elements_mut(&mut output));
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
        let [batch, queries, keys, heads, width] =
            [batch, queries, key.size()[1], heads, width].map(|size| size as usize);
        Sizes { batch, queries, keys, heads, width }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// Features from a token to the next.
    fn stride(&self) -> usize {
        self.heads * self.width
    }

    /// Every head of every sample.
    fn each(self) -> impl Iterator<Item = Head> {
        (0..self.batch).flat_map(move |sample| {
            (0..self.heads).map(move |head| Head { sample, head, sizes: self })
        })
    }

    /// Every block of queries.
    fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.queries).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(self.queries))
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

    /// Where a token's features begin among `[B, tokens, N, E]`.
    fn place(&self, token: usize, tokens: usize) -> usize {
        ((self.sample * tokens + token) * self.sizes.heads + self.head) * self.sizes.width
    }

    /// The features of all keys.
    fn keys<'e, T>(&self, all: &'e [T]) -> Rows<'e, T> {
        Rows::new(
            &all[self.place(0, self.sizes.keys)..],
            self.sizes.keys,
            self.sizes.width,
            self.sizes.stride(),
        )
    }

    /// The features of some queries.
    fn queries<'e, T>(&self, all: &'e [T], block: &Range<usize>) -> Rows<'e, T> {
        Rows::new(
            &all[self.place(block.start, self.sizes.queries)..],
            block.len(),
            self.sizes.width,
            self.sizes.stride(),
        )
    }

    /// A product that goes to some queries.
    fn for_queries<'o, T>(
        &self,
        all: &'o mut [T],
        block: &Range<usize>,
        scale: Scale<'o>,
    ) -> Destination<'o, T> {
        let elements = &mut all[self.place(block.start, self.sizes.queries)..];
        Destination { elements, stride: self.sizes.stride(), scale, onto: Onto::Nothing }
    }

    /// Writes what was summed for each key.
    fn write_keys<T: Element>(&self, sums: &[f32], all: &mut [T]) {
        for (token, sums) in sums.chunks_exact(self.sizes.width).enumerate() {
            let places = &mut all[self.place(token, self.sizes.keys)..];
            places.iter_mut().zip(sums).for_each(|(place, sum)| *place = T::rounded(*sum));
        }
    }
}

/// Writes the output, returns the logarithm of each query's sum of exponentials.
fn values<T: Number>(sizes: Sizes, [query, key, value]: [&[T]; 3], into: &mut [T]) -> Vec<f32> {
    let mut logs = vec![0f32; sizes.batch * sizes.heads * sizes.queries];
    let (mut by_key, mut by_value) = (Panels::new(), Panels::new());
    let (mut scores, mut weights, mut shares) =
        (Table::<f32>::new(sizes.keys), Table::<T>::new(sizes.keys), [0f32; BLOCK]);
    for head in sizes.each() {
        by_key.transposed(head.keys(key));
        by_value.straight(head.keys(value));
        for block in sizes.blocks() {
            let queries = block.len();
            multiply(
                Left::Rows(head.queries(query, &block)),
                &by_key,
                &mut scores.filled(sizes.scale()),
            );
            let logs = &mut logs[head.number() * sizes.queries..][block.clone()];
            exponentials(&scores, &mut weights, logs, &mut shares);
            let scale = Scale::Rows(&shares[..queries]);
            multiply(weights.left(queries), &by_value, &mut head.for_queries(into, &block, scale));
        }
    }
    logs
}

/// Gradients of query, key and value, into their places. With P the weights and D = Σ grad · output
/// of a query, the gradient of the scores is P ∘ (grad · valueᵀ − D).
fn gradients<T: Number>(
    sizes: Sizes,
    [query, key, value, output, grad_output]: [&[T]; 5],
    logs: &[f32],
    into: [&mut [T]; 3],
) {
    let [into_query, into_key, into_value] = into;
    let [mut by_key, mut by_value, mut keys, mut right] = [const { Panels::new() }; 4];
    let mut left = Strips::default();
    let (mut scores, mut changes) = (Table::<f32>::new(sizes.keys), Table::<f32>::new(sizes.keys));
    let (mut weights, mut slopes) = (Table::<T>::new(sizes.keys), Table::<T>::new(sizes.keys));
    let (mut grad_key, mut grad_value) =
        (vec![0f32; sizes.keys * sizes.width], vec![0f32; sizes.keys * sizes.width]);
    let scale = sizes.scale();
    for head in sizes.each() {
        by_key.transposed(head.keys(key));
        by_value.transposed(head.keys(value));
        keys.straight(head.keys(key));
        grad_key.fill(0.0);
        grad_value.fill(0.0);
        for block in sizes.blocks() {
            let queries = block.len();
            let [query, output, grad] =
                [query, output, grad_output].map(|all| head.queries(all, &block));
            multiply(Left::Rows(query), &by_key, &mut scores.filled(scale));
            multiply(Left::Rows(grad), &by_value, &mut changes.filled(1.0));
            let logs = &logs[head.number() * sizes.queries..][block.clone()];
            slope([&scores, &changes], [output, grad], logs, [&mut weights, &mut slopes]);
            let mut sum = |table: &Table<T>, rows: Rows<'_, T>, scale: f32, sums: &mut [f32]| {
                left.transposed(table.columns(queries));
                right.straight(rows);
                let (scale, onto) = (Scale::All(scale), Onto::Itself);
                multiply::<T, f32>(
                    Left::Strips(&left),
                    &right,
                    &mut Destination { elements: sums, stride: sizes.width, scale, onto },
                );
            };
            sum(&weights, grad, 1.0, &mut grad_value);
            sum(&slopes, query, scale, &mut grad_key);
            multiply(
                slopes.left(queries),
                &keys,
                &mut head.for_queries(into_query, &block, Scale::All(scale)),
            );
        }
        head.write_keys(&grad_key, into_key);
        head.write_keys(&grad_value, into_value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agree, draw};
    use super::*;

    #[test]
    fn it_is_libtorchs() {
        if !product::runs_here() {
            return eprintln!("SKIPPED: this processor has no bfloat16 products of 512 bits");
        }
        for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
            for (queries, keys) in [(150, 150), (3, 70), (65, 2)] {
                let inputs = [
                    draw(&[2, queries, 3, 16], kind, 1),
                    draw(&[2, keys, 3, 16], kind, 2),
                    draw(&[2, keys, 3, 16], kind, 3),
                ];
                let by_hand = |inputs: &[Tensor]| of_kind(&inputs[0], &inputs[1], &inputs[2]);
                let plain = |inputs: &[Tensor]| {
                    let [query, key, value] =
                        [0, 1, 2].map(|place: usize| inputs[place].transpose(1, 2));
                    let weights =
                        (query.matmul(&key.transpose(2, 3)) / 4.0).softmax(-1, Kind::Double);
                    weights.matmul(&value).transpose(1, 2).flatten(2, 3)
                };
                agree(&inputs, tolerance, by_hand, plain);
            }
        }
    }
}
