//! NF4: 4 bits that name one of 16 quantiles of the normal distribution, and for every 64 numbers
//! the largest of them, by which the others are divided.
//!
//! Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), appendix E; the order of the bits and
//! the choice between two neighbours are those of bitsandbytes.

use tch::{Kind, Tensor};

use super::{sizes, units};

/// Numbers that have a scale together.
const BLOCK: i64 = 64;

/// Blocks whose codes are found together: places in a table take more memory than numbers.
const TOGETHER: i64 = 1 << 14;

/// The number of each code.
const NUMBERS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Numbers of a table that has two for each byte.
const TABLE: i64 = 2 * 256;

/// Bytes of the codes of so many numbers, of which the last block may be a part.
pub fn code_bytes(numel: i64) -> i64 {
    units(numel, BLOCK) * BLOCK / 2
}

/// Number of scales: one a block, and the table, which lies with them so that a product needs
/// nothing from the host.
pub fn num_scales(numel: i64) -> i64 {
    units(numel, BLOCK) + TABLE
}

/// Returns the codes of a weight, two a byte, and its scales.
pub fn pack(weight: &Tensor) -> (Tensor, Option<Tensor>) {
    let (numel, device) = (weight.numel() as i64, weight.device());
    let missing = units(numel, BLOCK) * BLOCK - numel;
    let whole = match missing {
        0 => weight.shallow_clone(),
        _ => weight.view([-1]).constant_pad_nd([0, missing]),
    };
    let blocks = whole.view([-1, BLOCK]);
    let scales = sizes(&blocks, &[1]);
    let divisors = scales.where_self(&scales.gt(0.0), &scales.ones_like());
    let parts = blocks.split(TOGETHER, 0).into_iter().zip(divisors.split(TOGETHER, 0));
    let middles = NUMBERS.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect::<Vec<_>>();
    let middles = Tensor::from_slice(&middles).to_device(device);
    let bytes = parts.map(|(blocks, divisors)| {
        let codes = (blocks / divisors).bucketize(&middles, true, false).to_kind(Kind::Uint8);
        let pairs = codes.view([-1, 2]);
        // The first of two numbers has the upper bits.
        pairs.select(1, 0) * 16 + pairs.select(1, 1)
    });
    let bytes = Tensor::cat(&bytes.collect::<Vec<_>>(), 0);
    let table = Tensor::from_slice(&table()).to_device(device);
    (bytes, Some(Tensor::cat(&[table, scales.view([-1])], 0)))
}

/// Returns the numbers, f32, of codes, whose last block may be more than the weight.
pub fn unpack(bytes: &Tensor, scales: &Tensor) -> Tensor {
    let table = scales.narrow(0, 0, TABLE).view([-1, 2]);
    let of_blocks = scales.narrow(0, TABLE, scales.numel() as i64 - TABLE).view([-1, 1]);
    let numbers = table.index_select(0, &bytes.to_kind(Kind::Int));
    numbers.view([-1, BLOCK]).g_mul_(&of_blocks).view([-1])
}

/// The two numbers of each byte.
fn table() -> [f32; TABLE as usize] {
    std::array::from_fn(|place| {
        let byte = place / 2;
        NUMBERS[if place % 2 == 0 { byte >> 4 } else { byte & 15 }]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_that_of_bitsandbytes() {
        let published: [f64; 16] = [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ];
        assert_eq!(NUMBERS, published.map(|number| number as f32));
    }

    /// `quantize_4bit` of bitsandbytes 0.50.2, on a CPU, of numbers that fill two blocks and a
    /// half.
    #[test]
    fn codes_and_scales_are_those_of_bitsandbytes() {
        const CODES: [u8; 80] = [
            0, 19, 142, 42, 26, 46, 165, 33, 17, 37, 174, 42, 26, 46, 131, 16, 0, 18, 91, 5, 228,
            232, 47, 219, 153, 189, 242, 126, 61, 79, 164, 16, 238, 240, 38, 192, 127, 113, 198,
            32, 255, 240, 37, 176, 94, 79, 147, 14, 220, 205, 225, 75, 7, 248, 30, 165, 50, 34, 72,
            209, 110, 78, 113, 235, 134, 86, 140, 241, 143, 95, 129, 251, 117, 68, 106, 224, 93,
            45, 63, 181,
        ];
        let number = |place: i64| ((31 * place * place + 17 * place) % 1009 - 504) as f32 / 1000.0;
        let weight = Tensor::from_slice(&(0..160).map(number).collect::<Vec<f32>>()).view([2, 80]);
        let (codes, scales) = pack(&weight);
        let found = Vec::<u8>::try_from(codes.view([-1])).expect("bytes");
        // The rest of the last block is zeros.
        assert!(found[..80] == CODES && found[80..].iter().all(|byte| *byte == 0x77), "{found:?}");
        let scales = scales.expect("scales");
        let of_blocks = Vec::<f32>::try_from(scales.narrow(0, TABLE, 3)).expect("f32");
        assert_eq!(of_blocks, [0.504, 0.5, 0.462]);
        let numbers = unpack(&codes.view([-1]), &scales).narrow(0, 0, 128);
        let sum = numbers.sum(Kind::Double).double_value(&[]);
        assert!((sum + 2.816_943_343_728_780_7).abs() < 1e-6, "{sum}");
    }
}
