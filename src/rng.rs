//! Stateless randomness: numbers are a function of what they are drawn for.
//!
//! A [`Key`] names one use (seed, purpose, step, …) and hashes to the 64-bit seed of libtorch's own
//! generator. A draw therefore equals what PyTorch draws after `torch.manual_seed(hash)`, and a
//! resume has no generator state to restore. A [`Stream`] selects the generators of a batch: one
//! for the whole batch, or one for each sample.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

/// libtorch's generators, one for each device, are global to the process: code that seeds them
/// holds this lock until its draws are done.
static GENERATOR: Mutex<()> = Mutex::new(());

/// The use of a random number. It is part of every key, so no two uses share a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Initialization = 1,
    Order = 2,
    FlowMatching = 3,
    Stratification = 4,
    Sampling = 5,
    Test = 6,
    Dropout = 7,
    Validation = 8,
    Encoding = 9,
    Tags = 10,
}

/// Identifies one use of randomness. Equal keys give equal numbers, on any rank and in any process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub seed: u64,
    pub purpose: Purpose,
    /// Optimizer step, epoch, or another count that the purpose defines.
    pub step: u64,
    pub micro_batch: u64,
    /// Owner of the stream: a rank, a sample id or the hash of a name.
    pub scope: u64,
}

impl Key {
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        Key { seed, purpose, step: 0, micro_batch: 0, scope: 0 }
    }

    pub fn step(self, step: u64) -> Self {
        Key { step, ..self }
    }

    pub fn micro_batch(self, micro_batch: u64) -> Self {
        Key { micro_batch, ..self }
    }

    pub fn scope(self, scope: u64) -> Self {
        Key { scope, ..self }
    }

    /// Sets the scope to the hash of a name, e.g. of a parameter.
    pub fn named(self, name: &str) -> Self {
        self.scope(hash_of_name(name))
    }

    /// Returns 64 well-mixed bits. Source: SplitMix64's finalizer (Steele et al. 2014), chained
    /// over the fields.
    pub fn hash(&self) -> u64 {
        [self.purpose as u64, self.step, self.micro_batch, self.scope]
            .iter()
            .fold(mix(self.seed), |h, &part| mix(h ^ mix(part)))
    }

    /// Runs `draw` after seeding libtorch's generator with this key, while no other thread can use
    /// the generator.
    pub fn seeded<T>(&self, draw: impl FnOnce() -> T) -> T {
        let _held = hold_generator();
        // libtorch reads the bits of the i64 as u64.
        tch::manual_seed(self.hash() as i64);
        draw()
    }

    /// Returns draw number `index` of this key as a uniform integer below `bound`. Host only, no
    /// tensor.
    pub fn below(&self, index: u64, bound: u64) -> u64 {
        // The 64x64 -> 128 bit multiplication maps the hash onto the range; the bias is below bound
        // / 2^64.
        ((u128::from(mix(self.hash() ^ mix(index))) * u128::from(bound)) >> 64) as u64
    }

    /// Returns the numbers below `count` in random order (Fisher–Yates). Host only.
    pub fn permutation(&self, count: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..count).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, self.below(last as u64, last as u64 + 1) as usize);
        }
        order
    }

    /// Returns draw number `index` of this key as a uniform number in `[0, 1)` with 53 random bits.
    /// Host only.
    pub fn unit(&self, index: u64) -> f64 {
        (mix(self.hash() ^ mix(index)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// FNV-1a, 64 bit.
pub fn hash_of_name(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The numbers of [`mix`], for tensors that are mixed alike.
pub(crate) struct Mix {
    pub add: u64,
    pub shifts: [i64; 3],
    pub factors: [u64; 2],
}

/// SplitMix64's finalizer. Source: Steele et al. 2014.
pub(crate) const MIX: Mix = Mix {
    add: 0x9e37_79b9_7f4a_7c15,
    shifts: [30, 27, 31],
    factors: [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb],
};

pub(crate) fn mix(value: u64) -> u64 {
    let Mix { add, shifts, factors } = MIX;
    let z = value.wrapping_add(add);
    let z = (z ^ (z >> shifts[0])).wrapping_mul(factors[0]);
    let z = (z ^ (z >> shifts[1])).wrapping_mul(factors[1]);
    z ^ (z >> shifts[2])
}

fn hold_generator() -> MutexGuard<'static, ()> {
    // A panic during a draw leaves no broken state: the next holder seeds the generator anew.
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The source of the draws of one batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Stream {
    /// libtorch's generator after `manual_seed` with this number, to compare draws with PyTorch's.
    TorchSeed(i64),
    /// One stream for the whole batch.
    Batch(Key),
    /// Row `i` is drawn from the stream of key `i`, so a sample's draws do not depend on the other
    /// samples of its batch.
    PerSample(Vec<Key>),
}

impl Stream {
    /// Seeds libtorch's CPU generator, and locks it until the returned draws are dropped.
    pub fn open(&self) -> Draws<'_> {
        self.open_on(Device::Cpu)
    }

    /// Does as [`open`](Self::open), and draws by the generator of `device` what PyTorch draws
    /// there after the same `torch.manual_seed`, which seeds the generators of all devices alike.
    pub fn open_on(&self, device: Device) -> Draws<'_> {
        let held = hold_generator();
        match self {
            Stream::TorchSeed(seed) => tch::manual_seed(*seed),
            // libtorch reads the bits of the i64 as u64.
            Stream::Batch(key) => tch::manual_seed(key.hash() as i64),
            Stream::PerSample(_) => {}
        }
        Draws { stream: self, device, count: Cell::new(0), _held: held }
    }
}

/// Outcome of a coin toss.
#[derive(Debug)]
pub enum Toss {
    /// One outcome for the whole batch.
    Same(bool),
    /// One outcome for each sample, boolean `[B]` on the CPU.
    Each(Tensor),
}

impl Toss {
    /// The outcome for each of `batch` samples, boolean `[batch]` on the CPU.
    pub fn per_sample(self, batch: i64) -> Tensor {
        match self {
            Toss::Same(outcome) => {
                Tensor::full([batch], i64::from(outcome), (Kind::Bool, Device::Cpu))
            }
            Toss::Each(outcomes) => outcomes,
        }
    }
}

/// An opened [`Stream`]: tensor draws whose axis 0 is the batch.
///
/// Each method is one draw. With one stream for the batch it equals PyTorch's call of the same name
/// on the global generator of the device on which the stream was opened. A CPU draws the same
/// numbers everywhere; a GPU's follow from its model, too, and from libtorch's version.
#[derive(Debug)]
pub struct Draws<'a> {
    stream: &'a Stream,
    /// Device whose generator draws, and that holds the numbers.
    device: Device,
    count: Cell<u64>,
    _held: MutexGuard<'static, ()>,
}

impl Draws<'_> {
    /// Uniform in `[0, 1)`, f32, shape `size`.
    pub fn uniform(&self, size: &[i64]) -> Tensor {
        self.draw(size, |size| Tensor::rand(size, (Kind::Float, self.device)))
    }

    /// Does as [`uniform`](Self::uniform) by the CPU's generator, whatever the device.
    pub fn host_uniform(&self, size: &[i64]) -> Tensor {
        self.draw(size, |size| Tensor::rand(size, (Kind::Float, Device::Cpu)))
    }

    /// Normal with the given mean and standard deviation, f32, shape `size`.
    pub fn normal(&self, mean: f64, std: f64, size: &[i64]) -> Tensor {
        self.draw(size, |size| Tensor::empty(size, (Kind::Float, self.device)).normal_(mean, std))
    }

    /// Beta(`alpha`, `beta`), f32, shape `[batch]`. Source: `torch.distributions.Beta`, a
    /// two-component Dirichlet.
    pub fn beta(&self, alpha: f64, beta: f64, batch: i64) -> Tensor {
        let concentration = Tensor::from_slice(&[alpha as f32, beta as f32]).to_device(self.device);
        self.draw(&[batch], |size| {
            concentration.expand([size[0], 2], false).internal_sample_dirichlet().select(1, 0)
        })
    }

    /// Tosses a coin with the given probability of `true` by the CPU's generator, whose outcome a
    /// host can read at once: one for the whole batch in a batch stream (the reference's quirk),
    /// one for each sample in per-sample streams.
    pub fn coin(&self, probability: f64, batch: i64) -> Toss {
        match self.stream {
            Stream::PerSample(_) => Toss::Each(self.host_uniform(&[batch]).lt(probability)),
            _ => Toss::Same(self.host_uniform(&[1]).double_value(&[0]) < probability),
        }
    }

    /// Tosses a coin without libtorch's generator, as the reference's host draws do: one for the
    /// whole batch in a batch stream, one for each sample in per-sample streams.
    pub fn host_coin(&self, probability: f64) -> Toss {
        let is_heads = |key: &Key| key.unit(u64::MAX) < probability;
        match self.stream {
            Stream::TorchSeed(seed) => {
                Toss::Same(is_heads(&Key::new(*seed as u64, Purpose::FlowMatching)))
            }
            Stream::Batch(key) => Toss::Same(is_heads(key)),
            Stream::PerSample(keys) => {
                Toss::Each(Tensor::from_slice(&keys.iter().map(is_heads).collect::<Vec<_>>()))
            }
        }
    }

    fn draw(&self, size: &[i64], from_generator: impl Fn(&[i64]) -> Tensor) -> Tensor {
        let Stream::PerSample(keys) = self.stream else { return from_generator(size) };
        assert_eq!(keys.len() as i64, size[0], "one key a sample");
        let one = [&[1], &size[1..]].concat();
        let number = self.count.replace(self.count.get() + 1);
        let row = |key: &Key| {
            tch::manual_seed(mix(key.hash() ^ mix(number)) as i64);
            from_generator(&one)
        };
        Tensor::cat(&keys.iter().map(row).collect::<Vec<_>>(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e9_every_field_of_a_key_changes_its_stream() {
        let key = Key::new(7, Purpose::Test);
        let others = [
            Key { seed: 8, ..key },
            key.step(1),
            key.micro_batch(1),
            key.scope(1),
            key.named("a"),
            Key::new(7, Purpose::Order),
        ];
        let mut hashes: Vec<u64> = others.iter().chain([&key]).map(Key::hash).collect();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 7);
    }

    #[test]
    fn a_sample_draws_the_same_alone_and_among_others() {
        let keys: Vec<Key> = (0..4).map(|id| Key::new(1, Purpose::Test).scope(id)).collect();
        let two_draws = |keys: &[Key]| {
            let stream = Stream::PerSample(keys.to_vec());
            let draws = stream.open();
            let batch = keys.len() as i64;
            (draws.normal(0.0, 1.0, &[batch, 3]), draws.uniform(&[batch]))
        };
        let (noise, uniform) = two_draws(&keys);
        let (noise_alone, uniform_alone) = two_draws(&keys[2..3]);
        assert!(noise.get(2).equal(&noise_alone.get(0)));
        assert!(uniform.get(2).equal(&uniform_alone.get(0)), "also in the second draw");
        assert!(!uniform.get(1).equal(&uniform.get(2)));
    }

    #[test]
    fn draws_of_the_cpu_as_a_device_are_those_of_the_host() {
        let keys: Vec<Key> = (0..3).map(|id| Key::new(6, Purpose::Test).scope(id)).collect();
        for stream in [Stream::TorchSeed(4), Stream::Batch(keys[0]), Stream::PerSample(keys)] {
            let drawn = |draws: Draws<'_>| {
                let coin = draws.coin(0.5, 3).per_sample(3).to_kind(Kind::Float);
                [
                    coin,
                    draws.uniform(&[3]),
                    draws.host_uniform(&[3]),
                    draws.normal(0.0, 1.0, &[3, 8]),
                ]
            };
            let (host, device) = (drawn(stream.open()), drawn(stream.open_on(Device::Cpu)));
            assert!(host.iter().zip(&device).all(|(host, device)| host.equal(device)));
        }
    }

    #[test]
    fn a_sample_tosses_its_own_host_coin_whoever_its_neighbours_are() {
        let keys: Vec<Key> = (0..2000).map(|id| Key::new(2, Purpose::Test).scope(id)).collect();
        let tossed = |keys: &[Key]| {
            let stream = Stream::PerSample(keys.to_vec());
            let tosses = stream.open().host_coin(0.25).per_sample(keys.len() as i64);
            Vec::<bool>::try_from(tosses).expect("one boolean a sample")
        };
        let together = tossed(&keys);
        let apart: Vec<bool> = keys.chunks(3).flat_map(tossed).collect();
        assert_eq!(together, apart);
        // Binomial(2000, 0.25) has a standard deviation of 19.4; the range is four of them.
        let heads = together.iter().filter(|heads| **heads).count();
        assert!((422..=578).contains(&heads), "{heads}");
    }

    #[test]
    fn integers_below_a_bound_cover_it_evenly() {
        let key = Key::new(3, Purpose::Test);
        let mut counts = [0; 10];
        (0..10_000).for_each(|i| counts[key.below(i, 10) as usize] += 1);
        // Binomial(10000, 0.1): 5 standard deviations are 150.
        assert!(counts.iter().all(|&c| (850..1150).contains(&c)), "{counts:?}");
    }
}
