//! Ranks decide each for itself what to cut of its texts and if a mask is needed: the bits of a run
//! do not tell how many there were.

use std::path::Path;

use fm_dist::data::{Dataset, Order};
use fm_dist::run::Resume;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::training::{FLUX, HUNYUAN_VIDEO15, QWEN_IMAGE, SAMPLES, Tiny};
use crate::runs::{checkpoint, train_in_threads};

/// Steps of each run.
const STEPS: u64 = 6;

/// Lengths of the samples' texts: half of them are equal, so that some micro-batches of two need a
/// mask and some do not.
const LENGTHS: [i64; SAMPLES as usize] = [3, 3, 3, 3, 1, 4, 5, 2];

/// A mask of `tokens` tokens for texts of these lengths, at most.
fn mask(tokens: i64) -> Tensor {
    let lengths = Tensor::from_slice(&LENGTHS).unsqueeze(1);
    Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).lt_tensor(&lengths).to_kind(Kind::Int64)
}

fn write_data(family: &Tiny, folder: &Path) {
    let mut samples = family.samples();
    samples.insert("text_mask", mask(5));
    if samples.contains_key("text_mask_2") {
        samples.insert("text_mask_2", mask(3));
    }
    family.write(folder, &samples);
}

/// True for each micro-batch of two samples whose texts have one length.
fn equal_lengths(data: &Path, seed: u64) -> Vec<bool> {
    let dataset = Dataset::open(data).unwrap();
    let order = Order::new(dataset.groups(), SAMPLES as usize, seed).unwrap();
    let is_equal = |ids: &[u64]| LENGTHS[ids[0] as usize] == LENGTHS[ids[1] as usize];
    (0..STEPS)
        .flat_map(|step| order.global_batch(step).chunks(2).map(is_equal).collect::<Vec<_>>())
        .collect()
}

#[test]
fn ranks_whose_texts_differ_in_length_train_to_the_bits_of_one() {
    for (family, masked) in [
        (FLUX, "flow_matching.adapter.use_text_mask=true"),
        (QWEN_IMAGE, "flow_matching.adapter.use_text_mask=true"),
        (HUNYUAN_VIDEO15, "flow_matching.i2v_prob=0.5"),
    ] {
        let root = TempDir::new().unwrap();
        let data = root.path().join("data");
        write_data(&family, &data);
        let run = |name: &str, ranks, settings: &[&str]| {
            let usual = [
                "parallel.deterministic=true",
                "train.global_batch_size=8",
                "max_steps=6",
                "checkpoint.every_n_steps=6",
                masked,
            ];
            let output = root.path().join(name);
            let config = family.config(&data, &output, &[&usual, settings].concat());
            let equal = equal_lengths(&data, config.seed);
            // The ranks' halves of a step have unlike micro-batches at least once.
            assert!(equal.chunks(4).any(|step| step[..2] != step[2..]), "{equal:?}");
            checkpoint(&train_in_threads(&config, &Resume::Never, ranks).unwrap(), STEPS)
        };
        let alone = run("alone", 1, &[]);
        assert!(run("two", 2, &[]) == alone, "{} on 2 ranks", family.adapter);
        let sharded = ["parallel.sharding=parameters", "parallel.recompute=always"];
        assert!(run("sharded", 2, &sharded) == alone, "{} sharded", family.adapter);
    }
}
