//! What is between an attention's products: a block's scores, their exponentials and their
//! gradients.

use super::BLOCK;
use crate::nn::by_hand::exp::exp;
use crate::nn::by_hand::product::{Destination, Left, Number, Onto, Rows, Scale};
use crate::nn::by_hand::vectors::LANES;

/// A number for each query of a block and each key, in rows of whole units with zeros at their
/// ends.
pub struct Table<T> {
    numbers: Vec<T>,
    stride: usize,
    keys: usize,
}

impl<T: Number> Table<T> {
    pub fn new(keys: usize) -> Self {
        let stride = keys.next_multiple_of(T::IN_UNIT);
        Table { numbers: vec![T::rounded(0.0); BLOCK * stride], stride, keys }
    }

    fn rows(&self) -> impl Iterator<Item = &[T]> {
        self.numbers.chunks_exact(self.stride).map(|row| &row[..self.keys])
    }

    fn rows_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        self.numbers.chunks_exact_mut(self.stride).map(|row| &mut row[..self.keys])
    }

    /// The rows of `queries` queries, to be multiplied by what keys have.
    pub fn left(&self, queries: usize) -> Left<'_, T> {
        Left::Rows(Rows::new(&self.numbers, queries, self.stride, self.stride))
    }

    /// The columns of `queries` queries, to be multiplied by what queries have.
    pub fn columns(&self, queries: usize) -> Rows<'_, T> {
        Rows::new(&self.numbers, queries, self.keys, self.stride)
    }

    /// A product that goes there.
    pub fn filled(&mut self, scale: f32) -> Destination<'_, T> {
        Destination {
            elements: &mut self.numbers,
            stride: self.stride,
            scale: Scale::All(scale),
            onto: Onto::Nothing,
        }
    }
}

vectorized! {
    /// Exponentials of the scores' distances from a query's largest, rounded, to be divided by the
    /// exact sum: the logarithm of that sum and what to multiply by.
    pub fn exponentials<T: Number>(scores: &Table<f32>, weights: &mut Table<T>, logs: &mut [f32], shares: &mut [f32; BLOCK]) {
        for (((scores, weights), log), share) in scores.rows().zip(weights.rows_mut()).zip(logs).zip(shares) {
            let largest = largest(scores);
            let sum = powers(scores, largest, weights);
            (*log, *share) = (largest + sum.ln(), 1.0 / sum);
        }
    }
}

#[inline(always)]
fn largest(scores: &[f32]) -> f32 {
    let mut found = [f32::NEG_INFINITY; LANES];
    let (vectors, rest) = scores.as_chunks::<LANES>();
    for vector in vectors {
        found
            .iter_mut()
            .zip(vector)
            .for_each(|(found, score)| *found = if score > found { *score } else { *found });
    }
    found.iter().chain(rest).fold(f32::NEG_INFINITY, |found, score| found.max(*score))
}

/// Writes the exponentials of the distances from the largest, returns their sum before they are
/// rounded.
#[inline(always)]
fn powers<T: Number>(scores: &[f32], largest: f32, weights: &mut [T]) -> f32 {
    let mut sums = [0f32; LANES];
    let (vectors, rest) = scores.as_chunks::<LANES>();
    let (weights, rest_weights) = weights.as_chunks_mut::<LANES>();
    let mut add = |scores: &[f32], weights: &mut [T]| {
        for ((sum, weight), score) in sums.iter_mut().zip(weights).zip(scores) {
            let power = exp(*score - largest);
            *sum += power;
            *weight = T::rounded(power);
        }
    };
    vectors.iter().zip(weights).for_each(|(scores, weights)| add(scores, weights));
    add(rest, rest_weights);
    sums.iter().sum()
}

vectorized! {
    /// Weights and the scores' gradients, rounded, from scores and grad · valueᵀ.
    pub fn slope<T: Number>(
        [scores, changes]: [&Table<f32>; 2],
        [output, grad]: [Rows<'_, T>; 2],
        logs: &[f32],
        [weights, slopes]: [&mut Table<T>; 2],
    ) {
        let read = scores.rows().zip(changes.rows());
        let written = weights.rows_mut().zip(slopes.rows_mut());
        for (query, (((scores, changes), (weights, slopes)), log)) in read.zip(written).zip(logs).enumerate() {
            let change = dot(output.row(query), grad.row(query));
            slope_row([scores, changes], *log, change, [weights, slopes]);
        }
    }
}

#[inline(always)]
fn dot<T: Number>(a: &[T], b: &[T]) -> f32 {
    let mut sums = [0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a.widened() * b.widened());
    }
    sums.iter().sum()
}

/// One query's.
#[inline(always)]
fn slope_row<T: Number>(
    [scores, changes]: [&[f32]; 2],
    log: f32,
    change: f32,
    [weights, slopes]: [&mut [T]; 2],
) {
    let (score_vectors, scores) = scores.as_chunks::<LANES>();
    let (change_vectors, changes) = changes.as_chunks::<LANES>();
    let (weight_vectors, weights) = weights.as_chunks_mut::<LANES>();
    let (slope_vectors, slopes) = slopes.as_chunks_mut::<LANES>();
    let of = |scores: &[f32], changes: &[f32], weights: &mut [T], slopes: &mut [T]| {
        for (((weight, slope), score), own) in
            weights.iter_mut().zip(slopes).zip(scores).zip(changes)
        {
            let exact = exp(*score - log);
            *weight = T::rounded(exact);
            *slope = T::rounded(exact * (*own - change));
        }
    };
    for (((weights, slopes), scores), changes) in
        weight_vectors.iter_mut().zip(slope_vectors).zip(score_vectors).zip(change_vectors)
    {
        of(scores, changes, weights, slopes);
    }
    of(scores, changes, weights, slopes);
}
